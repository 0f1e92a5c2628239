#!/usr/bin/env bash
# Set-up, then ruff, types and the test suite: minutes. Arguments go to pytest: bash scripts/test.sh -k plan
# With --all first: the soaks too, and property tests with many more examples.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
all=()
if [ "${1:-}" = --all ]; then
    shift
    all=(-m '' --hypothesis-profile=deep)
fi
source scripts/setup.sh dev

# Tests wait a lot, for disks, processes and locks: one process more than there are cores. A file stays in one process,
# for what its tests share.
side_by_side=$(($(nproc) < 8 ? $(nproc) + 1 : 8))
echo "== ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "== mypy"
"$python" -m mypy
echo "== pytest"
"$python" -m pytest -n "$side_by_side" --dist loadfile --no-loadscope-reorder --durations 15 ${all[@]+"${all[@]}"} "$@"
