#!/usr/bin/env bash
# The whole way on a machine without GPU or network data: a tiny target and a chat dataset made here from the standard
# library's docstrings, extracted, verified, read. Everything lands in .demo/ (or the folder given as the first argument).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh extract
out="${1:-.demo}"
export PATH="$venv/bin:$PATH"
show() { printf '\n$ %s\n' "$*"; "$@"; }

mkdir -p "$out"
show python scripts/make_demo_data.py --out "$out/train.jsonl" --rows 2000
[ -f "$out/target/config.json" ] || show python scripts/make_tiny_target.py --out "$out/target" --data "$out/train.jsonl"
job=(--target "$out/target" --data "$out/train.jsonl" --num-draft-layers 3 --max-length 512 --shard-size 64MiB)
show dflash-cache estimate "${job[@]}" --out "$out"
show dflash-cache extract "${job[@]}" --out "$out/cache"
show dflash-cache inspect "$out/cache"
show dflash-cache verify "$out/cache"
show python - "$out/cache" <<'PYTHON'
import sys
from cache_format import FeatureCache

cache = FeatureCache.open(sys.argv[1])
batch = cache.batch([0, 1])
print(cache)
for name in ("hidden_states", "input_ids", "attention_mask", "loss_mask"):
    tensor = getattr(batch, name)
    print(f"  {name:15} {str(tuple(tensor.shape)):18} {tensor.dtype}")
print(f"  input embedding {tuple(cache.get_input_embeddings().weight.shape)}, target never loaded: {'transformers' not in sys.modules}")
PYTHON
printf '\nDone. The cache is in %s; the same commands again resume or find nothing to do.\n' "$out/cache"
