#!/usr/bin/env bash
# An environment with packages that run quantised weights on a CPU (torchao, compressed-tensors, bitsandbytes), then
# the tests of quantised targets with all of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${DFLASH_QUANTISED_VENV:-$PWD/.venv-quantised}"
if [ ! -e "$venv/.installed" ]; then
    echo "== making $venv"
    python3 -m venv "$venv"
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt)
    "${pip[@]}" -e '.[extract,gguf]' pytest pytest-xdist hypothesis 'moto[server]' s3fs
    "${pip[@]}" torchao==0.18.0 compressed-tensors==0.20.0 bitsandbytes==0.50.2
    touch "$venv/.installed"
fi
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n 0 tests/test_quantised.py tests/test_gguf.py "$@"
