#!/usr/bin/env bash
# Regenerates every table and figure:  ./run_all.sh [options]   (--help lists them)
# Runs the test suite:                 ./run_all.sh test [pytest's options]
# Runs the notebooks as on Colab:      ./run_all.sh test --colab [NN,NN]
# Compares a GPU with the CPU:         ./run_all.sh test --gpu [--device cuda]
# Sets up the environment alone:       ./run_all.sh setup
# The environment is set up first: an active conda environment is used as it is, else .venv.
set -euo pipefail
cd "$(dirname "$0")"

die() { echo "error: $*" >&2; exit 2; }

find_python() {
    for name in "$@"; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "Python 3.11 or newer is needed: one of $*"
}

# install LIST: by uv, in seconds; where it cannot be had, or finds no packages, by pip.
install() {
    local pip=("$python" -m pip install --quiet --no-compile --disable-pip-version-check)
    { "${pip[@]}" uv && "$python" -m uv pip install --quiet --python "$python" -r "$1"; } ||
        "${pip[@]}" -r "$1"
}

# set_up FOLDER LIST PYTHON...: an environment with the list's packages.
# A checksum of the list marks one that holds it; a new list updates it.
set_up() {
    local folder=$1 list=$2 wanted found
    python=$folder/bin/python
    wanted=$(cksum "$list" pyproject.toml | cksum)
    [[ -x $python && "$(cat "$folder/.complete" 2>/dev/null)" == "$wanted" ]] && return
    echo "setting up $folder with $list (once; a minute or more, about 6 GB) ..."
    if ! "$python" -m pip --version >/dev/null 2>&1; then  # not there, or left half made
        found=$(find_python "${@:3}") || exit 2
        "$found" -m venv "$folder" >&2 ||
            die "$found cannot make an environment: on Debian and Ubuntu, install python3-venv"
    fi
    install "$list" >"$folder/install.log" 2>&1 || {
        tail -n 5 "$folder/install.log" >&2
        die "the installation failed: see $folder/install.log"
    }
    echo "$wanted" >"$folder/.complete"
}

if [[ "${1:-} ${2:-}" == "test --colab" ]]; then
    set_up .venv-colab requirements-colab.txt python3.13 python3.12 python3.11
elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base ]]; then
    python=python
else
    set_up .venv requirements.txt python3 python3.14 python3.13 python3.12 python3.11 python
fi

# glibc would hand big blocks back to the system after each step, and fault them in again.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
export PYDEVD_DISABLE_FILE_VALIDATION=1 TQDM_MININTERVAL=5
unset PYTHONDONTWRITEBYTECODE  # what is imported is compiled once

if [[ "${1:-} ${2:-}" == "test --colab" ]]; then
    exec "$python" tests/colab/run.py "${@:3}"
elif [[ "${1:-} ${2:-}" == "test --gpu" ]]; then
    exec "$python" tests/gpu/check.py "${@:3}"
elif [[ "${1:-}" == test ]]; then
    exec "$python" -m pytest "${@:2}"
elif [[ "${1:-}" == setup ]]; then
    exit
fi
exec "$python" -m cplib notebooks "$@"
