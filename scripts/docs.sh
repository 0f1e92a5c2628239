#!/usr/bin/env bash
# The API reference, from docstrings: .docs/index.html (or the folder given as the first argument).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev
out="${1:-.docs}"
"$python" - "$out" <<'PYTHON'
import sys
from pathlib import Path

import pdoc

import cache_format

# Names that the package imports when they are first used; pdoc would not see them.
vars(cache_format).update({name: getattr(cache_format, name) for name in cache_format.__all__})
pdoc.render.configure(docformat="google")
# What others import. Everything else is the program's own, and its docstrings are read in the code.
pdoc.pdoc("cache_format", "cache_format.adapters", "extractor.target", "extractor.config", output_directory=Path(sys.argv[1]))
PYTHON
echo "wrote $out/index.html"
