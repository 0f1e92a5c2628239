"""How fast is extraction, against the bare forward pass and against the ways of two peers?

    python scripts/bench_extract.py --target-shape tiny --tokens 30000
    python scripts/bench_extract.py --target-shape qwen3-8b --tokens 2000000 --device cuda

One target with random weights in a real model's shape, one set of samples (log-normal lengths: median 600 tokens, sigma
0.8, at most --max-length), everything in one process, rounds alternating; medians over the rounds, and of the ratios
round by round:

  (a) bare      the truncated model (no layer after the last captured one, no head) on our plan's batches, results
                dropped: the physical limit of any extraction with this target
  (b) ours      ShardRunner and seal as `extract` runs them: padded batches through hooks, rows gathered, checksummed,
                fsynced to disk, tables written
  (c) nemo      in the way of NeMo AutoModel's offline path: every sample padded to --max-length, attention mask, all
                layers and the LM head, hooked layers concatenated, `.cpu()`, one file a batch
  (d) deepspec  in the way of DeepSpec's: batches in order of arrival padded to their longest, attention mask, all
                layers, no head, each sample's rows copied out, a thread that appends them to a file

All four see the same samples and weights, the same dtype and attention implementation; (c) and (d) use the largest
power-of-two batch whose padded tokens fit --batch-tokens, as their users would. Loading and preparing are not timed.
Tokens are real tokens. (c) and (d) are our own few lines that do what those projects do, not their code.
"""

from __future__ import annotations

import argparse
import gc
import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from cache_format.layout.captures import Captures
from cache_format.layout.manifest import DataInfo, Manifest, TargetInfo, Totals
from cache_format.layout.samples import PartInfo, PreparedSamples, Sample, part_path, write_part
from cache_format.storage.commit import make_folder
from cache_format.writing.seal import seal
from extractor.config import PlanOptions
from extractor.job.plan import Plan
from extractor.job.run_shards import ShardRunner
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.layer_ids import default_target_layer_ids
from extractor.target.padding import padding_mode
from extractor.target.transformers_backend import TransformersBackend

SHAPES = {
    "tiny": (512, 12, 8, 4, 64, 1536, 32_000),
    "qwen3-0.6b": (1024, 28, 16, 8, 128, 3072, 151_936),
    "qwen3-4b": (2560, 36, 32, 8, 128, 9728, 151_936),
    "qwen3-8b": (4096, 36, 32, 8, 128, 12_288, 151_936),
}
"""hidden_size, layers, heads, key-value heads, head_dim, intermediate_size, vocab_size: from the published configs."""

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 matrix FLOP/s by the vendor's data sheet."""


def make_target(shape: str, dtype: torch.dtype, device: torch.device) -> Qwen3ForCausalLM:
    """A Qwen3 of that shape; random weights made on the device."""
    hidden, layers, heads, kv_heads, head_dim, intermediate, vocab = SHAPES[shape]
    config = Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def log_normal(rng: np.random.Generator, max_length: int, count: int = 1) -> np.ndarray:
    """Lengths of ``count`` samples."""
    return np.clip(rng.lognormal(np.log(600), 0.8, count), 16, max_length).astype(np.int64)


def make_samples(folder: Path, tokens: int, max_length: int, vocab: int) -> PreparedSamples:
    rng, samples, total = np.random.default_rng(0), [], 0
    while total < tokens:
        length = int(log_normal(rng, max_length)[0])
        ids = rng.integers(0, vocab, length).astype(np.int32)
        samples.append(Sample(ids, np.ones(length, np.uint8), len(samples)))
        total += length
    make_folder(folder)
    write_part(part_path(folder, 0), samples, PartInfo(0, len(samples), {}))
    return PreparedSamples(folder, 1)


class Bench:
    """The four ways over one target and one set of samples."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.device = torch.device(args.device)
        dtype = getattr(torch, args.dtype or ("bfloat16" if self.device.type == "cuda" else "float32"))
        self.args, self.work, self.dtype = args, work, dtype
        self.model = make_target(args.target_shape, dtype, self.device)
        config = self.model.config
        self.samples = make_samples(work / "samples", args.tokens, args.max_length, config.vocab_size)
        self.layer_ids = default_target_layer_ids(args.num_draft_layers, config.num_hidden_layers)
        self.target = HFDFlashTargetModel(self.model, self.layer_ids)
        self.manifest = self._manifest()
        self.options = PlanOptions(shard_bytes=args.shard_mib << 20, batch_tokens=args.batch_tokens)
        self.plan = Plan(self.samples.num_tokens, self.manifest.schema().token_bytes, self.options)
        self.manifest = Manifest(**{**vars(self.manifest), "totals": self._totals(len(self.plan))})
        mode = padding_mode(self.target, int(self.samples.num_tokens.max()))
        self.extractor = TransformersBackend(self.target, mode)
        self.tokens = int(self.samples.num_tokens.sum())
        # Of the bare forward nothing but the forward is timed.
        self.ideal = [
            self._padded(shard.sample_ids[batch].tolist(), int(shard.num_tokens[batch.start]))
            for shard in self.plan
            for batch in shard.batches
        ]

    def padding(self, count: int) -> float:
        """Share of padding in the batches of a dataset of ``count`` such samples: a few tens have more."""
        lengths = log_normal(np.random.default_rng(0), self.args.max_length, count)
        plan = Plan(lengths, self.manifest.schema().token_bytes, self.options)
        return 1 - int(lengths.sum()) / sum(shard.padded_tokens for shard in plan)

    def _totals(self, shards: int) -> Totals:
        count, tokens = len(self.samples), int(self.samples.num_tokens.sum())
        return Totals(parts=1, samples=count, tokens=tokens, loss_tokens=tokens, shards=shards)

    def _manifest(self) -> Manifest:
        config = self.model.config
        target = TargetInfo(
            name=self.args.target_shape,
            model_type="qwen3",
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            tie_word_embeddings=True,
        )
        begun = Manifest(
            state="preparing",
            identity={"bench": True},
            target=target,
            target_layer_ids=self.layer_ids,
            dtype=str(self.dtype).removeprefix("torch."),
            codec={"name": "raw"},
            capture=Captures().to_dict(),
            created_with={},
        )
        data = DataInfo(name="log-normal", rows=len(self.samples), dropped={})
        return begun.extracting(begun.identity, data=data, totals=self._totals(1))

    # -- the four ways --------------------------------------------------------------------------------------------

    def bare(self, _out: Path) -> tuple[int, int]:
        base, layers = self.model.model, self.model.model.layers
        base.layers = layers[: max(self.layer_ids) + 1]
        padded = 0
        try:
            with torch.inference_mode():
                for ids in self.ideal:
                    base(input_ids=ids, attention_mask=None, use_cache=False)
                    padded += ids.numel()
            self._synchronize()
        finally:
            base.layers = layers
        return padded, 0

    def ours(self, out: Path) -> tuple[int, int]:
        make_folder(out / "shards")
        runner = ShardRunner(
            cache=out,
            schema=self.manifest.schema(),
            plan=self.plan,
            samples=self.samples,
            backend=self.extractor,
            device=self.device,
            on_nonfinite="fail",
        )
        self.stats = runner.run(range(len(self.plan)))
        seal(out, self.manifest)
        return self.stats.padded_tokens, self.stats.bytes

    def nemo(self, out: Path) -> tuple[int, int]:
        size = self._batch_size(self.args.max_length)
        padded = written = 0
        out.mkdir()
        for number, ids in enumerate(self._arrivals(size)):
            rows = self._padded(ids, self.args.max_length)
            mask = self._mask(ids, self.args.max_length)
            batch = self.target.generate_batch(rows, mask, mask)
            tensors = {"hidden_states": batch.hidden_states.cpu(), "input_ids": rows.cpu(), "loss_mask": mask.cpu()}
            path = out / f"{number}.safetensors"
            save_file(tensors, path)
            padded, written = padded + rows.numel(), written + path.stat().st_size
        return padded, written

    def deepspec(self, out: Path) -> tuple[int, int]:
        size = self._batch_size(self.args.max_length)
        todo: queue.Queue[torch.Tensor | None] = queue.Queue(64)
        written = []

        def write() -> None:
            with open(out, "wb") as file:
                while (rows := todo.get()) is not None:
                    written.append(file.write(rows.view(torch.uint8).numpy().data))

        thread = threading.Thread(target=write)
        thread.start()
        padded = 0
        for ids in self._arrivals(size):
            longest = int(self.samples.num_tokens[ids].max())
            rows, captured = self._padded(ids, longest), {}
            with torch.inference_mode(), self.target.hooked(captured.__setitem__):
                self.model.model(input_ids=rows, attention_mask=self._mask(ids, longest), use_cache=False)
            states = torch.cat([captured[i] for i in range(len(captured))], dim=-1)
            for row, sample in enumerate(ids):
                todo.put(states[row, : int(self.samples.num_tokens[sample])].clone().cpu())
            padded += rows.numel()
        todo.put(None)
        thread.join()
        return padded, sum(written)

    # -- shared ---------------------------------------------------------------------------------------------------

    def _batch_size(self, length: int) -> int:
        return 1 << max(0, (self.args.batch_tokens // length).bit_length() - 1)

    def _arrivals(self, size: int) -> Iterator[list[int]]:
        ids = list(range(len(self.samples)))
        return (ids[start : start + size] for start in range(0, len(ids), size))

    def _padded(self, ids: list[int], length: int) -> torch.Tensor:
        rows = torch.zeros(len(ids), length, dtype=torch.int64)
        for row, sample in enumerate(ids):
            tokens = torch.tensor(self.samples[sample].input_ids)
            rows[row, : len(tokens)] = tokens
        return rows.to(self.device)

    def _mask(self, ids: list[int], length: int) -> torch.Tensor:
        lengths = torch.tensor(self.samples.num_tokens[ids])
        return (torch.arange(length)[None] < lengths[:, None]).to(torch.int64).to(self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def flops(self) -> float:
        """Of the layers that (a) and (b) run, over real tokens; attention included."""
        c = self.model.config
        heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        weights = c.hidden_size * (2 * heads + 2 * kv) + 3 * c.hidden_size * c.intermediate_size
        lengths = self.samples.num_tokens.astype(float)
        attention = 2 * heads * float((lengths**2).sum())
        return (max(self.layer_ids) + 1) * (2 * weights * self.tokens + attention)


def timed(function: Callable[[Path], tuple[int, int]], out: Path, bench: Bench) -> dict[str, Any]:
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    os.sync()  # nobody pays for what the one before left to be written
    before = host_bytes("VmRSS", from_here=True)
    started = time.perf_counter()
    padded, written = function(out)
    bench._synchronize()
    seconds = time.perf_counter() - started
    host = (host_bytes("VmHWM") - before) / 2**30
    device = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else 0.0
    return {"seconds": seconds, "padded": padded, "written": written, "device": device, "host": host}


def host_bytes(name: str, from_here: bool = False) -> int:
    """``VmRSS``, this process's memory, or ``VmHWM``, its peak, which is counted ``from_here`` on if asked for."""
    if from_here:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", type=int, default=30_000, help="real tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on CUDA, float32 on the CPU")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--num-draft-layers", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--shard-mib", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ways", default="bare,ours,nemo,deepspec", help="which of the four")
    parser.add_argument("--folder", type=Path, help="where to write (a folder on the disk to measure)")
    args = parser.parse_args()
    ways = args.ways.split(",")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(args, Path(folder))
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        bench.bare(Path())  # warm-up: kernels are chosen, memory is mapped
        for turn in range(args.repeat):
            for name in ways:
                out = Path(folder) / f"{name}-{turn}"
                results[name].append(timed(getattr(bench, name), out, bench))
        report(bench, results)


def report(bench: Bench, results: dict[str, list[dict[str, Any]]]) -> None:
    args = bench.args
    print(
        f"{args.target_shape}, {bench.dtype}, {bench.device}, layers {bench.layer_ids}, "
        f"{len(bench.samples):,} samples, {bench.tokens:,} tokens, max length {args.max_length}, "
        f"{len(bench.plan)} shards, median of {args.repeat}"
    )
    heads = (("tok/s", 10), ("of (a)", 8), ("padding", 9), ("GB written", 12), ("GB/s", 7))
    heads += (("device GiB", 12), ("host +GiB", 11))
    print(" " * 10 + "".join(f"{head:>{width}}" for head, width in heads))
    median = {name: statistics.median(r["seconds"] for r in runs) for name, runs in results.items()}

    def times(name: str, other: str) -> float:
        """How many times as long ``other`` takes, round by round: the machine's speed drifts."""
        pairs = zip(results[name], results[other], strict=True)
        return statistics.median(theirs["seconds"] / own["seconds"] for own, theirs in pairs)

    for name, runs in results.items():
        seconds, last = median[name], runs[-1]
        host = max(run["host"] for run in runs)
        of_bare = times(name, "bare") if "bare" in median else float("nan")
        print(
            f"{name:10}{bench.tokens / seconds:10,.0f}{of_bare:8.1%}{1 - bench.tokens / last['padded']:9.1%}"
            f"{last['written'] / 1e9:12.2f}{last['written'] / 1e9 / seconds:7.2f}{last['device']:12.1f}{host:11.2f}"
        )
    if "ours" in median:
        for name in ("nemo", "deepspec"):
            if name in median:
                print(f"ours / {name}: {times('ours', name):.2f}x")
        print(f"ours waited {bench.stats.seconds_waiting_for_disk:.2f} s for the disk in the last round")
    if "bare" in median and bench.device.type == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in PEAK_BF16.items() if key in name), None)
        for way in ("bare", "ours"):
            if way in median:
                speed = bench.flops() / median[way]
                share = f", {speed / peak:.0%} of {name}'s bf16 peak" if peak else ""
                print(f"{way}: {speed / 1e12:.1f} TFLOP/s of real work{share}")
    print(f"padding of the plan of 50,000 samples of such lengths: {bench.padding(50_000):.1%}")
    largest = int(bench.plan.shard_bytes(bench.manifest.schema()).max()) / 2**30
    print(
        f"host +GiB: peak beside target and samples; 3 shards and 1 GiB are {3 * largest + 1:.2f} GiB. "
        f"Whole process at its end: {host_bytes('VmRSS') / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
