#!/usr/bin/env bash
# Regenerates every table and figure:  ./run_all.sh [options]   (--help lists them)
# Runs the test suite:                 ./run_all.sh test [pytest's options]
# Sets up its own environment first: an active conda environment is used as it is, else .venv.
set -euo pipefail
cd "$(dirname "$0")"

die() { echo "error: $*" >&2; exit 2; }

find_python() {
    for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "Python 3.11 or newer is needed"
}

# A checksum of the pinned list marks an environment that holds it; a new list updates it.
set_up() {
    if [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base ]]; then
        python=python
        return
    fi
    python=.venv/bin/python
    local wanted
    wanted=$(cksum requirements.txt pyproject.toml | cksum)
    [[ -x $python && "$(cat .venv/.complete 2>/dev/null)" == "$wanted" ]] && return
    echo "setting up .venv with requirements.txt (once; a few minutes, about 6 GB) ..."
    local found
    [[ -x $python ]] || { found=$(find_python) || exit 2; "$found" -m venv .venv; }
    if ! "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt \
        >.venv/install.log 2>&1; then
        tail -n 5 .venv/install.log >&2
        die "the installation failed: see .venv/install.log"
    fi
    echo "$wanted" >.venv/.complete
}

set_up

# glibc would hand big blocks back to the system after each step, and fault them in again.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
export PYDEVD_DISABLE_FILE_VALIDATION=1 TQDM_MININTERVAL=5

if [[ "${1:-}" == test ]]; then
    exec "$python" -m pytest "${@:2}"
fi
exec "$python" -m cplib notebooks "$@"
