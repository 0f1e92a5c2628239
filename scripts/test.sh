#!/usr/bin/env bash
# Set-up, then ruff, types and the whole test suite. Arguments go to pytest: bash scripts/test.sh -k plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev

echo "== ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "== mypy"
"$python" -m mypy
echo "== pytest"
"$python" -m pytest "$@"
