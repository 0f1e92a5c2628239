"""How fast a target may be before the host is the limit: a fake one gives states at a set rate to the real runner.

    python scripts/bench_pipeline.py --out /scratch/bench --gb 8              # as fast as the host takes them
    python scripts/bench_pipeline.py --out /scratch/bench --gb 8 --rate 1.5   # does it keep up with 1.5 GB/s?

The fake target copies prepared rows to their place, as a device's copy engine would; that copy is not counted. What is:
processor seconds a GB of states (before the codec), by what they go to. `runner` is the thread that drives the target
(ids, masks, and with fp8 on a host the encoding); `writers` checksum and write; `encoders` are the codec's pool. `here`
is GB/s by the clock on this machine, its disk and whatever else runs on it included.
`16 cores` is reckoned from the processor seconds: a core drives the target, two writers, the other 14 (cores less two)
encode. What is slowest of the three is named. A disk has to take the rate times `stored`.
fp8 is encoded on the device where there is one; its host then has half of raw's bytes to write and nothing to encode.

Then how the encoders scale: two shards, each encoded by one thread and by two, in turns, best of the rounds. The clock
says little where other work runs; how often threads were blocked (each time for the interpreter's lock, or for work)
and whether two need more processor time than one says whether they hold each other up.
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import torch
from bench_codec import made_up
from torch import Tensor

from cache_format.codecs import BlockCodec, States, codec_named
from cache_format.layout.captures import Captures
from cache_format.layout.samples import PartInfo, PreparedSamples, Sample, part_path, write_part
from cache_format.layout.shard_layout import ShardSchema
from cache_format.storage.commit import make_folder
from cache_format.writing.encode import encode_buffer
from cache_format.writing.shard_buffer import ShardBuffer
from extractor.config import PlanOptions
from extractor.job.plan import Plan
from extractor.job.run_shards import ShardRunner
from extractor.target.backend import TargetBackend

LAYERS, HIDDEN = 5, 4096
WARM_UP = 4
"""Shards before counting begins: the kernel has to clear the memory of the buffers once."""
CPU = torch.device("cpu")


class FakeTarget(TargetBackend):
    """Gives the rows of ``pool`` again and again, at most ``rate`` bytes a second; 0: as fast as they are taken."""

    def __init__(self, pool: Tensor, rate: float):
        super().__init__(range(LAYERS), HIDDEN, pool.dtype, Captures())
        self.pool, self.rate = pool, rate
        self.given, self.copying, self.began = 0, 0.0, time.monotonic()

    decided: dict[str, Any] = {}  # noqa: RUF012
    embeddings = None

    def find_batch_tokens(self, device: torch.device, longest: int, most: int) -> int:
        raise NotImplementedError

    def forward(
        self, input_ids: Tensor, lengths: Sequence[int], out: Tensor, extra: Mapping[str, Tensor] | None = None
    ) -> None:
        began = time.thread_time()
        out.copy_(self.pool[: len(out)])
        self.copying += time.thread_time() - began
        self.given += out.nbytes
        if self.rate:
            time.sleep(max(0.0, self.began + self.given / self.rate - time.monotonic()))

    def nonfinite(self, out: Tensor, lengths: Sequence[int], extra: Mapping[str, Tensor] | None = None) -> Tensor:
        return torch.zeros(len(lengths), LAYERS, dtype=torch.bool)


def seconds_by_kind() -> dict[str, float]:
    """Processor seconds of this process's threads so far, by the first word of a thread's name."""
    found: dict[str, float] = {}
    for thread in threading.enumerate():
        fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
        kind = "runner" if thread is threading.main_thread() else thread.name.partition("_")[0]
        found[kind] = found.get(kind, 0.0) + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def prepared(folder: Path, tokens: int, longest: int) -> PreparedSamples:
    """Samples of log-normal length, ``tokens`` together."""
    rng, samples = np.random.default_rng(0), []
    while tokens > 0:
        length = int(np.clip(rng.lognormal(6.3, 0.8), 16, longest))
        samples.append(Sample(np.zeros(length, np.int32), np.ones(length, np.uint8), len(samples)))
        tokens -= length
    make_folder(folder)
    write_part(part_path(folder, 0), samples, PartInfo(0, len(samples), {}))
    return PreparedSamples(folder, 1)


def runner_of(out: Path, codec: str, pool: Tensor, samples: PreparedSamples, rate: float) -> ShardRunner:
    states = States(pool.dtype, LAYERS, HIDDEN)
    chosen = codec_named(codec)
    chosen = chosen if chosen.is_calibrated else chosen.calibrated(pool, states)
    schema = ShardSchema(fingerprint="0" * 64, codec=chosen, states=states)
    plan = Plan(samples.num_tokens, schema.raw.token_bytes, PlanOptions())
    return ShardRunner(
        cache=out,
        schema=schema,
        plan=plan,
        samples=samples,
        backend=FakeTarget(pool, rate),
        device=CPU,
        on_nonfinite="fail",
    )


def measure(runner: ShardRunner, codec: str) -> None:
    """Run all shards; a row of the table."""
    make_folder(runner.cache / "shards")
    numbers, target = list(range(len(runner.plan))), runner.backend
    assert isinstance(target, FakeTarget)
    with runner.begin(numbers) as making:
        for written in [making.make(number) for number in numbers[:WARM_UP]]:
            written.result()
        before, began = seconds_by_kind(), time.monotonic()
        waited, target.given, target.copying, target.began = making.stats.seconds_waiting_for_disk, 0, 0.0, began
        files = [making.make(number) for number in numbers[WARM_UP:]]
        stored = sum(written.result()[0] for written in files)
        wall = time.monotonic() - began
        used = {kind: seconds - before.get(kind, 0.0) for kind, seconds in seconds_by_kind().items()}
        waited = making.stats.seconds_waiting_for_disk - waited
    gb = target.given / 1e9
    used["runner"] -= target.copying
    cost = {kind: used.get(kind, 0.0) / gb for kind in ("runner", "shard-writer", "encoder")}
    limits = {kind: cores / cost[kind] for kind, cores in zip(cost, (1, 2, 14), strict=True) if cost[kind] > 0.005}
    slowest = min(limits, key=lambda kind: limits[kind])
    kept = "" if not target.rate else f"   waited for the disk {waited / wall:.1%}"
    print(
        f"{codec:<6} {gb / wall:>6.2f} {cost['runner']:>9.3f} {cost['shard-writer']:>9.3f} {cost['encoder']:>9.3f} "
        f"{sum(cost.values()):>9.3f} {stored / target.given:>8.3f} {limits[slowest]:>9.1f}  {slowest}{kept}"
    )


def scaling(runner: ShardRunner, number: int, rounds: int) -> None:
    """One shard by one encoder and by two."""
    shard = runner.plan.shard(number)
    raw = ShardBuffer(int(runner.plan.shard_bytes(runner.schema.raw)[number]))
    raw.begin(runner.schema.raw, number, shard.sample_ids, shard.num_tokens)
    pool = runner.backend.pool  # type: ignore[attr-defined]
    rows = raw.tensor("hidden_states")
    for start in range(0, len(rows), len(pool)):
        rows[start : start + len(pool)] = pool[: len(rows) - start]
    with ThreadPoolExecutor(2) as encoders:
        into = encode_buffer(raw, runner.schema, None, encoders)
    walls: dict[int, list[float]] = {1: [], 2: []}
    used: dict[int, list[float]] = {1: [], 2: []}
    blocked: dict[int, list[int]] = {1: [], 2: []}
    for _ in range(rounds):
        for count in (1, 2):
            with ThreadPoolExecutor(count, thread_name_prefix="encoder") as encoders:
                before, began, processor = getrusage(RUSAGE_SELF).ru_nvcsw, time.monotonic(), time.process_time()
                into = encode_buffer(raw, runner.schema, into, encoders)
                walls[count].append(time.monotonic() - began)
                used[count].append((time.process_time() - processor) * 1e9 / rows.nbytes)
                blocked[count].append(getrusage(RUSAGE_SELF).ru_nvcsw - before)
    print(
        f"{runner.schema.codec.name}: 2 encoders over 1: {min(walls[1]) / min(walls[2]):.2f} by the clock; "
        f"{min(used[1]):.2f} and {min(used[2]):.2f} processor s/GB; "
        f"blocked {min(blocked[1])} and {min(blocked[2])} times in a shard of {len(shard.num_tokens)} samples"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards, emptied after each codec")
    parser.add_argument("--gb", type=float, default=4.0, help="GB of states for each codec")
    parser.add_argument("--rate", type=float, default=0.0, help="GB/s that the target gives; 0: all that is taken")
    parser.add_argument("--codecs", default="raw,zbits,fp8,quant")
    parser.add_argument("--rounds", type=int, default=5, help="of the scaling")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool = made_up(8192, States(torch.bfloat16, LAYERS, HIDDEN), outliers=False)
    print(
        f"{os.cpu_count()} cores; {LAYERS} layers of {HIDDEN} in bfloat16, shards of 512 MiB, {options.gb:g} GB a codec"
    )
    print("        GB/s   --- processor seconds a GB of states ---   bytes     GB/s,")
    print("codec   here    runner   writers  encoders       all   stored  16 cores  slowest there")
    blocks = []
    for codec in options.codecs.split(","):
        shutil.rmtree(options.out, ignore_errors=True)
        samples = prepared(options.out / "samples", round(options.gb * 1e9 / pool[0].nbytes), 4096)
        runner = runner_of(options.out, codec, pool, samples, options.rate * 1e9)
        if len(runner.plan) <= WARM_UP:
            parser.error(f"--gb {options.gb:g}: the first {WARM_UP} shards are not counted; give at least 3")
        measure(runner, codec)
        if isinstance(runner.schema.codec, BlockCodec):
            blocks.append(runner)
    for runner in blocks:
        # The first has the longest samples, and so the fewest.
        for number in (0, len(runner.plan) // 2):
            scaling(runner, number, options.rounds)
    shutil.rmtree(options.out)


if __name__ == "__main__":
    main()
