"""How fast is --backend vllm on a CPU, against our transformers path, and what does our part cost it?

    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python scripts/bench_vllm.py --tokens 12000

The target, samples and plan of bench_extract; both stop after the last captured layer. Rounds alternate between

  (a) transformers  ShardRunner over the truncated model, to sealed shards on the disk
  (b) vllm          the same over an engine in its own process
  (c) engine        that engine given the same batches, nothing captured, nothing copied, nothing written

Processor seconds are those of this process and the engine's; on a machine with other work only these and the ratios
round by round mean something. The engine's start, with its trial, is timed once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_extract import SHAPES, Bench

from cache_format.layout.captures import Captures
from extractor.config import TargetOptions
from extractor.target.vllm.load import load_vllm


def processor_seconds() -> float:
    """Of this process and all below it."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        process = int(path.parent.name)
        parents[process], used[process] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(used[process] for process in family) / os.sysconf("SC_CLK_TCK")


def engine_alone(bench: Bench, engine: Any) -> Callable[[Path], Any]:
    """Way (c)."""
    batches = [
        [{"prompt_token_ids": bench.samples[sample].input_ids.tolist()} for sample in shard.sample_ids[batch].tolist()]
        for shard in bench.plan
        for batch in shard.batches
    ]

    def run(_out: Path) -> None:
        for prompts in batches:
            engine._llm.generate(prompts, engine._sampling, use_tqdm=False)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", type=int, default=12_000, help="real tokens")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--num-draft-layers", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--shard-mib", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    args.device, args.dtype = "cpu", "float32"
    with tempfile.TemporaryDirectory() as folder:
        bench, target = Bench(args, Path(folder)), Path(folder) / "target"
        bench.model.save_pretrained(target)
        by_transformers = bench.extractor
        began, used = time.monotonic(), processor_seconds()
        by_vllm = load_vllm(
            TargetOptions(name=str(target), backend="vllm"),
            bench.layer_ids,
            Captures(),
            dtype=torch.float32,
            device=torch.device("cpu"),
            longest=int(bench.samples.num_tokens.max()),
            batch_tokens=args.batch_tokens,
        )
        took, used = time.monotonic() - began, processor_seconds() - used
        print(f"engine started and tried out: {took:.0f} s, {used:.0f} processor s")

        def ours(backend: Any) -> Callable[[Path], Any]:
            def run(out: Path) -> None:
                bench.extractor = backend
                bench.ours(out)

            return run

        ways = {
            "transformers": ours(by_transformers),
            "vllm": ours(by_vllm),
            "engine": engine_alone(bench, by_vllm._engine),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(-1, args.repeat):
            for name, run in ways.items():
                used, began = processor_seconds(), time.perf_counter()
                run(Path(folder) / f"{name}-{turn}")
                if turn >= 0:  # the first round warms up
                    found[name].append((time.perf_counter() - began, processor_seconds() - used))
        print(f"{args.target_shape}, {bench.tokens:,} tokens, {len(bench.plan)} shards, median of {args.repeat} rounds")
        for name, rounds in found.items():
            seconds, cores = (statistics.median(of) for of in zip(*rounds, strict=True))
            print(f"{name:14}{bench.tokens / seconds:8,.0f} tok/s {seconds:7.1f} s {cores:7.1f} processor s")
        for one, other in (("vllm", "transformers"), ("vllm", "engine")):
            for place, what in enumerate(("time", "processor time")):
                ratios = [a[place] / b[place] for a, b in zip(found[one], found[other], strict=True)]
                print(f"{one} / {other}, {what}: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")


if __name__ == "__main__":
    main()
