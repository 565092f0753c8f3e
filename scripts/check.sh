#!/usr/bin/env bash
# Format, lint, types, tests, and most tests once more on the installed wheel; `make check` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Every test process, and the wheel's again, compiles the same programs: they share one cache for the time of this check.
# Its size limit is what makes jax lock it; without one a process could read what another has half written.
export JAX_COMPILATION_CACHE_DIR=$scratch/jax JAX_COMPILATION_CACHE_MAX_SIZE=4294967296 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
EASYLM_LIKE_TEST_DATA=$(realpath -m "${EASYLM_LIKE_TEST_DATA:-../shared/data}") # the wheel is tested in another folder
export EASYLM_LIKE_TEST_DATA

failed=""
stage() { # NAME COMMAND...: a failure is remembered, so that one run shows every cheap finding
    echo "== $1 (after $SECONDS s)"
    "${@:2}" || failed+=" $1"
}
finish() {
    [ -z "$failed" ] || { echo "error: failed:$failed; after $SECONDS s" >&2; exit 1; }
}

stage format "$python" -m ruff format --check --quiet .
stage lint "$python" -m ruff check --output-format concise .
stage types "$python" -m mypy
stage tests "$python" -m pytest -n 2
finish
stage wheel scripts/check_wheel.sh "$python" "$scratch"
finish
