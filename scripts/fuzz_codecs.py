"""Is a mutated codec stream ever decoded to something else in silence, or does it crash its reader?

    python scripts/fuzz_codecs.py --files 10000

A small cache of each codec and dtype is copied, and the bytes that stand for hidden_states in one of its shards
(values and scales of fp8; shared tables, block starts and zstd frames of zbits) are mutated, again and again, in a
child process with a memory limit. What has to come of it:

- `verify` names the shard, unless the mutation left the file as it was;
- a reader with verify="sample" gives the exact original, or an error that names the shard;
- a reader without it gives some values, or such an error: never another exception, a crash or more memory.

Exit code 1 where there is anything else; a file that crashed the interpreter is kept and named.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path

import fuzz
import torch
import xxhash
from synthetic_cache import write_cache

from cache_format import DFlashCacheError, FeatureCache
from cache_format.codecs import CODECS
from cache_format.codecs.dtypes import torch_dtype
from cache_format.layout.safetensors_file import read_container
from cache_format.storage.byte_source import LocalFile
from cache_format.upkeep.verify import verify

HIDDEN, LAYER_IDS = 64, [0, 2, 3]
DTYPES = ("float32", "bfloat16", "float16")


def make(cache: Path, codec: str, dtype: str) -> None:
    """Ten samples whose layers differ in size, in a few shards."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.01, 1.0, 30.0]).repeat_interleave(HIDDEN)
    write_cache(
        cache,
        fuzz.LENGTHS,
        dtype=dtype,
        hidden=HIDDEN,
        target_layer_ids=LAYER_IDS,
        shard_bytes=64 << 10,
        states=lambda _i, n: (torch.randn(n, len(scales), generator=generator) * scales).to(torch_dtype(dtype)),
        codec=codec,
    )


def streams(path: Path) -> list[tuple[str, int, int]]:
    """Name, first byte and end of each tensor of a shard that a codec wrote."""
    with closing(LocalFile(path)) as file:
        places = read_container(file).places
    return [(name, at.start, at.stop) for name, at in places.items() if name.startswith("hidden_states")]


def case(cache: Path, seed: int) -> tuple[Path, bytes, bool]:
    """The shard that case ``seed`` mutates, and its new bytes; its length stays, as of a disk that went bad."""
    rng = random.Random(seed)
    path = rng.choice(sorted((cache / "shards").iterdir()))
    # Each stream as often as the others, however small: the smaller ones steer the decoder.
    _, start, stop = rng.choice([stream for stream in streams(path) if stream[2] > stream[1]])
    data = path.read_bytes()
    part = fuzz.mutate(data[start:stop], rng)[: stop - start]
    part += rng.randbytes(stop - start - len(part)) if rng.random() < 0.5 else bytes(stop - start - len(part))
    return path, data[:start] + part + data[stop:], False


def read_all(cache: FeatureCache, where: Path) -> str:
    """Digest of all states, one by one and in batches; a sample that is refused with the shard's name is left out."""
    digest = xxhash.xxh3_64()
    for i in range(len(cache)):
        try:
            alone, batched = cache[i].hidden_states, cache.batch([i, 0]).hidden_states
        except DFlashCacheError as error:
            if where.name not in str(error):
                raise AssertionError(f"an error that does not name {where.name}: {error}") from error
            digest.update(b"refused")
            continue
        for tensor in (alone, batched):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def outcome(cache: Path, seed: int, expected: str) -> str:
    """What came of one mutated shard: unchanged, refused (by the codec too), or a finding."""
    path, data, _ = case(cache, seed)
    before = path.read_bytes()
    if data == before:
        return "unchanged"
    path.write_bytes(data)
    try:
        problems = verify(cache, threads=1).problems
        if not any(path.name in problem.file or problem.shard is not None for problem in problems):
            return "FINDING verify does not name the shard"
        found = samples_read_right(cache, path)
        if found:
            return f"FINDING {found}"
        plain = read_all(FeatureCache.open(cache), path)
        return "read" if plain == expected else "refused"
    except DFlashCacheError as error:
        # At opening: the head of the shard does not add up.
        return "refused" if path.name in str(error) else f"FINDING does not name the shard: {error}"
    except BaseException as error:
        return f"FINDING {type(error).__name__}: {error}"
    finally:
        path.write_bytes(before)


ORIGINAL: list[torch.Tensor] = []
"""States of each sample; children have them by the fork."""


def samples_read_right(cache: Path, where: Path) -> str:
    """Whether a checked reader gives the original or an error that names the shard; "" where so."""
    opened = FeatureCache.open(cache, verify="sample")
    for i, right in enumerate(ORIGINAL):
        for read in (lambda i=i: opened[i], lambda i=i: opened.batch([i])):
            try:
                states = read().hidden_states
            except DFlashCacheError as error:
                if where.name not in str(error):
                    return f"does not name {where.name}: {error}"
                continue
            if not torch.equal(states.view(torch.uint8), right.view(torch.uint8)):
                return f"sample {i} is read to something else in silence"
    return ""


def run(cache: Path, codec: str, dtype: str, seeds: range, keep: Path) -> list[tuple[int, str, str]]:
    """Make a cache and mutate it: (seed, kind of file, outcome) of every seed."""
    make(cache, codec, dtype)
    opened = FeatureCache.open(cache, verify="sample")
    ORIGINAL.clear()
    ORIGINAL.extend(opened[i].hidden_states.clone() for i in range(len(opened)))
    return list(fuzz.run(cache, seeds, keep, case=case, outcome=outcome, expected=read_all(opened, cache)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="mutated shards, over all codecs and dtypes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(), help="folder for files that crashed the interpreter")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [(codec, dtype) for codec in CODECS if codec != "raw" for dtype in DTYPES]
    each, bad = -(-args.files // len(kinds)), 0
    for codec, dtype in kinds:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache"
            table = Counter[str]()
            for seed, _, result in run(cache, codec, dtype, range(args.seed, args.seed + each), args.keep):
                table[result.split()[0]] += 1
                if result.startswith("FINDING"):
                    print(f"{codec} {dtype} seed {seed}: {result}")
        bad += table["FINDING"]
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(table.items()))
        print(f"{codec} {dtype}: {each:,} mutated: {counts}", flush=True)
    print(f"{each * len(kinds):,} mutated streams: {bad:,} findings")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
