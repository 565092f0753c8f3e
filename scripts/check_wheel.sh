#!/usr/bin/env bash
# Build the wheel and run most tests on it, where the checkout cannot be imported: check_wheel.sh PYTHON EMPTY_FOLDER.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
source=$2/source site=$2/site names=$2/names run=$2/run
mkdir -p "$source" "$names" "$run"

# Build from a copy of what git knows: an old build/ folder would put deleted modules into the wheel.
git ls-files -z --cached --others --exclude-standard | while IFS= read -rd '' file; do
    [ ! -f "$file" ] || cp --parents "$file" "$source"
done
"$python" -m build --wheel --no-isolation --outdir "$2" "$source" >"$2/build.log" 2>&1 || { cat "$2/build.log" >&2; exit 1; }
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$site" "$2"/*.whl
cp -r "$source"/{tests,configs,pyproject.toml} "$run"
cd "$run"

landed=$(ls "$site" | sed 's/-.*dist-info$/ dist-info/' | tr '\n' ' ')
[ "$landed" = "easylm_like easylm_like dist-info " ] || { echo "error: the wheel installs $landed" >&2; exit 1; }
for program in data_prep eval; do
    PYTHONPATH=$site "$python" -m "easylm_like.$program" --help >/dev/null
done

# Tests and configs say data_prep and eval, as in the checkout: here these names are the wheel's folders.
ln -s "$site/easylm_like/data_prep" "$site/easylm_like/eval" "$names"
export PYTHONPATH=$site:$names
"$python" - "$site" <<'PYTHON'
import pathlib, sys
import data_prep, easylm_like, eval
for package in (data_prep, easylm_like, eval):
    place = pathlib.Path(package.__file__).resolve()
    assert place.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), f"{package.__name__} comes from {place}"
PYTHON
# What is asked here is whether the wheel holds everything; the numbers of data, model and trainer are the checkout's.
"$python" -m pytest -n 2 -m "not checkout and not slow" tests/test_*.py tests/{data_prep,eval} tests/convert/test_{card,main}.py tests/train/test_loop.py tests/serve/test_{chat,api}.py
