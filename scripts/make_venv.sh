#!/usr/bin/env bash
# Make .venv and put exactly the packages of requirements.lock into it: make_venv.sh UV_VERSION [INTERPRETER].
# Without INTERPRETER it takes the newest Python that it finds.
set -euo pipefail
cd "$(dirname "$0")/.."

die() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local name without_venv=""
    for name in "$@"; do
        # Run it: a version manager leaves names on the PATH that start nothing.
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
        if "$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
        without_venv=${without_venv:-$name}
    done
    [ -z "$without_venv" ] || die "$without_venv cannot make virtual environments, its venv or ensurepip module is missing;" \
        "install it (Debian and Ubuntu: apt install python3-venv) or name another Python: make PYTHON=/path/to/python"
    die "no Python 3.11 or newer among: $*; install one or name it: make PYTHON=/path/to/python"
}

uv_version=$1
read -ra candidates <<<"${2:-python3.13 python3.12 python3.11 python3}"

if ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    python=$(find_python "${candidates[@]}")
    echo "making .venv with $("$python" -V)"
    "$python" -m venv --clear .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
.venv/bin/uv pip install --quiet --python .venv/bin/python --require-hashes -r requirements.lock
