#!/usr/bin/env bash
# An environment with other projects' trainers (2 GB, minutes the first time), then cache_format.adapters under them: losses
# from a cache against those of the target itself, records against those of each project's own reader.
# NeMo AutoModel, speculators and Model Optimizer come from PyPI; SpecForge, DeepSpec and AngelSlim are checked too where
# their checkouts lie in $DFLASH_PEERS (folders SpecForge, DeepSpec, AngelSlim).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD" venv="${DFLASH_PEERS_VENV:-$PWD/.venv-peers}" peers="${DFLASH_PEERS:-}"
python="$venv/bin/python"
if [ ! -e "$venv/.installed" ]; then
    echo "== making $venv"
    python3 -m venv "$venv"
    pip=("$python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" torch==2.13.0 transformers==5.19.0 -e ".[extract]"
    # Without their dependencies (vLLM clients, kernels for GPUs, audio), then what their trainers import.
    "${pip[@]}" --no-deps nemo-automodel==0.7.0 speculators==0.9.0 nvidia-modelopt==0.47.0 hs-connectors==0.9.0
    "${pip[@]}" --no-deps torchao torchdata openai sniffio omegaconf pulp shortuuid
    "${pip[@]}" httpx pydantic scipy pillow loguru pydantic-settings aiohttp requests ninja nvidia-ml-py
    touch "$venv/.installed"
fi
# Model Optimizer takes transformers below 5.15 only: one of its own, beside the other.
old="$venv/transformers-5.14"
if [ ! -d "$old" ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$old" \
        transformers==5.14.1 "tokenizers>=0.22,<=0.23.0" "huggingface_hub>=1.5,<2"
fi
checks=(nemo nemo_dspark nemo_eagle speculators modelopt)
path="$root"
for name in SpecForge DeepSpec AngelSlim; do
    if [ -n "$peers" ] && [ -d "$peers/$name" ]; then
        path="$path:$peers/$name"
        case "$name" in
        SpecForge) checks+=(specforge eagle3) ;;
        *) checks+=("$(echo "$name" | tr '[:upper:]' '[:lower:]')") ;;
        esac
    else
        echo "== $name is not checked: no \$DFLASH_PEERS/$name"
    fi
done

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1 PYTHONPATH="$path"
"$python" "$root/scripts/make_demo_data.py" --out train.jsonl --rows 60 >/dev/null 2>&1
"$python" "$root/scripts/make_tiny_target.py" --out tiny --data train.jsonl --hidden-size 64 --vocab-size 2048 >/dev/null 2>&1
"$python" -m extractor extract --out cache --target tiny --data train.jsonl --device cpu --limit 32 --max-length 128 \
    --target-layers 1,3,4,5 --capture last_hidden_states --shard-size 1MiB --batch-tokens 2048 2>extract.log
for check in "${checks[@]}"; do
    [ "$check" = modelopt ] && export PYTHONPATH="$old:$path" || export PYTHONPATH="$path"
    "$python" "$root/scripts/check_peers.py" . "$check" 2>"$check.log" | grep -v '^{\|INFO\|^Found \|^\[Single\|torch distributed' || { tail -20 "$check.log"; exit 1; }
done
