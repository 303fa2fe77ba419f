#!/usr/bin/env bash
# For a machine that has a GPU, PyTorch and Python 3.12, but no network: what it lacks, into .lease/
#   tests/gpu/pack.sh FOLDER CATEGORY...     images of these categories of FOLDER, and wheels
# There, in the repository's root:
#   python3 -m pip install -q --no-index --no-deps --target /tmp/site .lease/*.whl
#   export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1
#   python3 tests/gpu/check.py
#   python3 benchmarks/search.py --data .lease/data --out "$OUT/choice.csv" --minutes 6
#   python3 tests/gpu/lease.py --data .lease/data --categories screw,transistor --minutes 6
set -euo pipefail
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
rm -rf .lease
mkdir -p .lease/data
for category in "${@:2}"; do cp -r "$folder/$category" .lease/data/; done
fetch() { python3 -m pip download -q --only-binary=:all: -d .lease "$@"; }
fetch --python-version 3.12 --platform manylinux2014_x86_64 pydantic
fetch --no-deps captum
du -sh .lease
