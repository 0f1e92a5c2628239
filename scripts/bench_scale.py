"""Time and memory of what has to look at a whole cache, from 10^3 to 10^7 samples, on a generated cache.

The shards are sparse files: their headers, lengths and ids are real, their states are holes. Everything else (samples/,
tables, manifest) is real. 256 samples a shard, so 10^7 samples are 4 x 10^4 shards. Each step runs in a process of its
own, so that its memory is its own.

    python scripts/bench_scale.py --samples 1e3,1e4,1e5,1e6,1e7 --folder /data/scale
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from cache_format import FeatureCache
from cache_format.codecs import RawCodec
from cache_format.layout.arrow_file import write_batch
from cache_format.layout.captures import Captures
from cache_format.layout.embeddings import EMBED, EMBEDDINGS_NAME, write_embeddings
from cache_format.layout.index import INDEX_NAME, SHARDS_NAME
from cache_format.layout.manifest import DataInfo, Manifest, TargetInfo, Totals
from cache_format.layout.samples import _META, SCHEMA, PreparedSamples, Sample, part_path
from cache_format.layout.shard_layout import shard_name
from cache_format.reading.order import full_order, random_source, window_order
from cache_format.storage.commit import make_folder
from cache_format.upkeep.verify import verify
from cache_format.writing.seal import describe_files, seal
from extractor.config import PlanOptions
from extractor.job.missing_shards import missing_shards
from extractor.job.plan import Plan

SAMPLES_PER_SHARD, SAMPLES_PER_PART, LENGTHS = 256, 100_000, 8
WIDTH_BYTES = 5 * 4096 * 2
STEPS = ("plan", "resume scan", "seal", "open", "verify --quick", "full shuffle", "window shuffle")


def lengths_of(count: int) -> np.ndarray:
    """Tokens of each sample: 1 to 8, so that the prepared samples of 10^7 stay small; shards are cut by bytes."""
    return np.random.default_rng(0).integers(1, LENGTHS + 1, count)


def write_parts(folder: Path, lengths: np.ndarray) -> int:
    """samples/ with true digests; token t of every sample is t, all learned."""
    digests = np.array([_sample(n).digest() for n in range(LENGTHS + 1)], np.uint64)
    starts = range(0, len(lengths), SAMPLES_PER_PART)
    for number, start in enumerate(starts):
        part = lengths[start : start + SAMPLES_PER_PART]
        offsets = pa.array(np.concatenate([[0], np.cumsum(part)]).astype(np.int32))
        ids = np.concatenate([np.arange(n, dtype=np.int32) for n in range(LENGTHS + 1)])
        firsts = np.cumsum(np.arange(LENGTHS + 1)) - np.arange(LENGTHS + 1)
        within = np.arange(int(part.sum())) - np.repeat(np.cumsum(part) - part, part)
        tokens = pa.array(ids[np.repeat(firsts[part], part) + within])
        columns = [
            pa.array(np.arange(start, start + len(part))),
            pa.array(part.astype(np.int32)),
            pa.array(digests[part]),
            pa.ListArray.from_arrays(offsets, tokens).cast(SCHEMA.field("input_ids").type),
            pa.ListArray.from_arrays(offsets, pa.array(np.ones(len(within), np.uint8))).cast(
                SCHEMA.field("loss_mask").type
            ),
        ]
        meta = {"first_row": start, "stop_row": start + len(part), "dropped": {}}
        schema = SCHEMA.with_metadata({_META: json.dumps(meta).encode()})
        write_batch(part_path(folder, number), pa.record_batch(columns, schema=schema))
    return len(starts)


def _sample(tokens: int) -> Sample:
    return Sample(np.arange(tokens, dtype=np.int32), np.ones(tokens, np.uint8), 0)


def planned(cache: Path, manifest: Manifest) -> tuple[PreparedSamples, Plan]:
    """As ``extract`` plans it on a resume."""
    assert manifest.totals is not None
    samples = PreparedSamples(cache / "samples", manifest.totals.parts)
    shard_bytes = int(manifest.identity["shard_bytes"])
    return samples, Plan(samples.num_tokens, manifest.schema().raw.token_bytes, PlanOptions(shard_bytes=shard_bytes))


def generate(cache: Path, count: int) -> None:
    """A cache of ``count`` samples with all shards, not yet sealed."""
    for folder in ("samples", "shards", "target"):
        make_folder(cache / folder)
    parts = write_parts(cache / "samples", lengths_of(count))
    samples = PreparedSamples(cache / "samples", parts)
    target = TargetInfo(
        name="generated",
        model_type="qwen3",
        hidden_size=4096,
        num_hidden_layers=36,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    shard_bytes = int(SAMPLES_PER_SHARD * (WIDTH_BYTES + 6) * (LENGTHS + 1) / 2)
    begun = Manifest(
        state="preparing",
        identity={"name": "generated", "shard_bytes": shard_bytes},
        target=target,
        target_layer_ids=[1, 9, 17, 25, 33],
        dtype="bfloat16",
        codec=RawCodec().to_dict(),
        capture=Captures().to_dict(),
        created_with={},
    )
    plan = Plan(samples.num_tokens, begun.schema().raw.token_bytes, PlanOptions(shard_bytes=shard_bytes))
    write_embeddings(cache / EMBEDDINGS_NAME, {EMBED: torch.zeros(64, 8)})
    names = [EMBEDDINGS_NAME]
    names += [f"samples/{part_path(cache / 'samples', n).name}" for n in range(parts)]
    manifest = begun.extracting(
        {**begun.identity, "samples": samples.digest()},
        data=DataInfo(name="generated", rows=count, dropped={}),
        totals=Totals(
            parts=parts,
            samples=count,
            tokens=int(samples.num_tokens.sum()),
            loss_tokens=int(samples.num_loss_tokens.sum()),
            shards=len(plan),
        ),
        files=describe_files(cache, names),
    )
    manifest.write(cache)
    schema = manifest.schema()
    for shard in plan:
        container = schema.layout(shard.number, len(shard.sample_ids), shard.tokens)
        with open(cache / shard_name(shard.number), "wb") as file:
            file.truncate(container.num_bytes)
            file.write(container.header)
            heads = {"cu_seqlens": np.concatenate([[0], np.cumsum(shard.num_tokens)]), "sample_ids": shard.sample_ids}
            for name, values in heads.items():
                file.seek(container.places[name].start)
                file.write(values.astype("<i8").tobytes())


def run(step: str, cache: Path) -> None:
    """One step; prints its seconds and the memory that it added."""
    manifest = Manifest.read(cache)
    assert manifest.totals is not None
    _, plan = planned(cache, manifest) if step == "resume scan" else (None, None)
    index = FeatureCache.open(cache).index if "shuffle" in step else None
    manifest.schema()
    before, started = peak_kib(), time.perf_counter()
    if step == "plan":
        _, plan = planned(cache, manifest)
        plan.shard_bytes(manifest.schema())
    elif step == "resume scan":
        assert plan is not None
        assert not missing_shards(cache, manifest.schema(), plan, range(len(plan)))
    elif step == "seal":
        files = {name: info for name, info in manifest.files.items() if name not in (INDEX_NAME, SHARDS_NAME)}
        seal(cache, replace(manifest, state="extracting", files=files))
    elif step == "open":
        assert len(FeatureCache.open(cache)) == manifest.totals.samples
    elif step == "verify --quick":
        problems = verify(cache, quick=True).problems
        assert not problems, problems[:3]
    elif step == "full shuffle":
        full_order(len(index), random_source(0, 0))
    elif step == "window shuffle":
        window_order(index.shard, 16, random_source(0, 0))
    seconds = time.perf_counter() - started
    memory = peak_kib() - before
    print(json.dumps({"seconds": seconds, "mib": memory / 1024}))


def peak_kib() -> int:
    """Peak resident memory of this process (not ru_maxrss, which begins with the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", default="1e3,1e4,1e5,1e6", help="sizes, with commas between")
    parser.add_argument("--folder", type=Path, required=True, help="where the caches are made, and removed afterwards")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        run(arguments.step, arguments.folder)
        return
    print(f"{'samples':>10} {'shards':>7} {'step':<16} {'seconds':>9} {'MiB':>8}")
    for count in (int(float(text)) for text in arguments.samples.split(",")):
        cache = arguments.folder / f"{count}"
        generate(cache, count)
        try:
            totals = Manifest.read(cache).totals
            for step in STEPS:
                command = [sys.executable, __file__, "--folder", cache, "--step", step]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found = json.loads(output)
                print(
                    f"{count:>10,} {totals.shards:>7,} {step:<16} {found['seconds']:>9.3f} {found['mib']:>8.0f}",
                    flush=True,
                )
        finally:
            shutil.rmtree(cache)


if __name__ == "__main__":
    main()
