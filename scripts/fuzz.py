"""Does a damaged cache ever crash its reader, give wrong values, or pass `verify`?

    python scripts/fuzz.py --files 10000 --flips 2000

One small cache is copied and one of its files is mutated, again and again: bytes, cuts, swaps, zeros, splices, numbers
in headers, and manifests whose own checksum is set right again. Every mutated cache is opened, every sample is read
with verify="sample", embeddings and prepared samples are read, and `verify` and `repair`'s plan look at it, in a child
process with a memory limit. Allowed: the values of the original, or DFlashCacheError. Everything else is a finding:
another exception, a crash of the interpreter, wrong values. Then single bits are flipped at random places of every kind
of file; `verify` has to find each of them. Exit code 1 where there is a finding; a file that crashed is kept and named.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from synthetic_cache import write_cache

from cache_format import DFlashCacheError, FeatureCache
from cache_format.layout.manifest import MANIFEST_NAME, _checksum
from cache_format.layout.samples import PreparedSamples
from cache_format.upkeep.repair import plan_repair
from cache_format.upkeep.verify import verify

MEMORY_LIMIT = 1 << 30
"""Address space that a child may take beyond what it has when it begins."""

FILES_A_CHILD = 100
LENGTHS = [5, 40, 3, 17, 29, 8, 61, 12, 33, 2]


def make(cache: Path) -> None:
    """A cache of ten samples in a few shards."""
    generator = torch.Generator().manual_seed(0)
    write_cache(
        cache,
        LENGTHS,
        dtype="float32",
        hidden=64,
        target_layer_ids=[0, 2, 3],
        shard_bytes=64 << 10,
        states=lambda _i, n: torch.randn(n, 192, generator=generator),
    )


def exercise(cache: Path) -> str:
    """Use the cache in every way that only reads; returns a digest of all values.

    Raises:
        DFlashCacheError: something was refused.
    """
    refused: DFlashCacheError | None = None
    with suppress(DFlashCacheError):
        report = verify(cache, threads=1)
        plan_repair(cache, report.problems)
    for options in ({}, {"allow_incomplete": True}):
        with suppress(DFlashCacheError):
            FeatureCache.open(cache, **options).batch([0])  # type: ignore[arg-type]
    opened = FeatureCache.open(cache, verify="sample")
    digest = xxhash.xxh3_64()
    for i in range(len(opened)):
        try:
            for batch in (opened[i], opened.batch([i])):
                for name in ("hidden_states", "input_ids", "attention_mask", "loss_mask"):
                    digest.update(getattr(batch, name).contiguous().view(torch.uint8).numpy().tobytes())
        except DFlashCacheError as error:
            refused = error
    for part in (opened.get_input_embeddings(), opened.get_output_embeddings()):
        digest.update(part.weight.numpy().tobytes())
    samples = PreparedSamples(cache / "samples", opened.manifest.totals.parts)  # type: ignore[union-attr]
    for sample in (samples[i] for i in range(len(samples))):
        digest.update(sample.input_ids.tobytes() + sample.loss_mask.tobytes())
    if refused is not None:
        raise refused
    return digest.hexdigest()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of the ways in which a file goes bad."""
    at, other = rng.randrange(len(data)), rng.randrange(len(data))
    start, stop = min(at, other), max(at, other)
    size = rng.choice([1, 2, 4, 8, 64])
    ways: list[Callable[[], bytes]] = [
        lambda: data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
        lambda: data[:at] + rng.randbytes(size) + data[at + size :],
        lambda: data[:at],
        lambda: data + rng.randbytes(rng.randrange(1, 100)),
        lambda: data[:start] + bytes(stop - start) + data[stop:],
        lambda: data[:start] + data[stop:],
        lambda: data[:start] + data[start:stop] + data[start:],
        lambda: data[:at] + (b"\xff" * 8) + data[at + 8 :],
        lambda: data[:at] + (2 ** rng.randrange(64)).to_bytes(8, "little") + data[at + 8 :],
        lambda: b"",
        lambda: _other_number(data, rng),
        lambda: _other_number(data, rng),
    ]
    return rng.choice(ways)()


def _other_number(data: bytes, rng: random.Random) -> bytes:
    """Change one number of the text at the beginning, as long as it was or not."""
    found = list(re.finditer(rb"\d+", data[:4096]))
    if not found:
        return data[::-1]
    match = rng.choice(found)
    length = len(match[0])
    new = rng.choice([b"9" * length, b"0" * length, b"-" + match[0][1:], b"1" + b"0" * 18, b"1e9", b"null"])
    return data[: match.start()] + new + data[match.end() :]


def mutate_manifest(data: bytes, rng: random.Random) -> bytes:
    """Change a value somewhere in the manifest and set its checksum right."""
    content = json.loads(data)
    content.pop("checksum")
    at = content
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        at[key] = rng.choice([None, -1, 0, 2**63, 1e300, "", "../../x", [], {}, True, [1] * 3, "complete"])
        break
    return json.dumps({**content, "checksum": _checksum(content)}).encode()


def case(cache: Path, seed: int) -> tuple[Path, bytes, bool]:
    """The file that case ``seed`` mutates, its new bytes, and whether other values are allowed to come of it."""
    rng = random.Random(seed)
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    if rng.random() < 0.15:
        path = cache / MANIFEST_NAME
        return path, mutate_manifest(path.read_bytes(), rng), True
    path = rng.choice(files)
    if rng.random() < 0.1:
        return path, rng.choice(files).read_bytes(), False
    return path, mutate(path.read_bytes(), rng), False


def outcome(cache: Path, seed: int, expected: str) -> str:
    """What comes of one mutated cache: read, refused, or a finding."""
    path, data, other_values = case(cache, seed)
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        digest = exercise(cache)
        return "read" if digest == expected or other_values else "FINDING wrong values"
    except DFlashCacheError:
        return "refused"
    except BaseException as error:
        return f"FINDING {type(error).__name__}: {error}"
    finally:
        path.write_bytes(before)


Case = Callable[[Path, int], tuple[Path, bytes, bool]]
Outcome = Callable[[Path, int, str], str]


def run(
    cache: Path,
    seeds: range,
    keep: Path,
    *,
    case: Case = case,
    outcome: Outcome = outcome,
    expected: str | None = None,
) -> Iterator[tuple[int, str, str]]:
    """(seed, kind of file, outcome) of every seed; a child that dies is one finding, and the next child goes on.

    ``case`` and ``outcome`` may be others than those of this file; ``expected`` is what ``outcome`` compares with.
    """
    expected, done = exercise(cache) if expected is None else expected, 0
    while done < len(seeds):
        some = seeds[done : done + FILES_A_CHILD]
        results = list(_child(cache, some, expected, case, outcome))
        yield from results
        done += len(results)
        if len(results) < len(some):
            yield _crashed(cache, some[len(results)], keep, case)
            done += 1


def _child(cache: Path, seeds: range, expected: str, case: Case, outcome: Outcome) -> Iterator[tuple[int, str, str]]:
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        with tempfile.TemporaryDirectory() as folder, os.fdopen(writing, "w", buffering=1) as pipe:
            copy = Path(shutil.copytree(cache, Path(folder) / "cache"))
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, resource.RLIM_INFINITY))
            for seed in seeds:
                result = outcome(copy, seed, expected)
                pipe.write(json.dumps([seed, _kind(case(copy, seed)[0], copy), result]) + "\n")
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        for line in pipe:
            yield tuple(json.loads(line))
    os.waitpid(pid, 0)


def _crashed(cache: Path, seed: int, keep: Path, case: Case) -> tuple[int, str, str]:
    path, data, _ = case(cache, seed)
    kept = keep / f"{seed}-{path.name}"
    kept.write_bytes(data)
    return seed, _kind(path, cache), f"FINDING the interpreter crashed; the file is {kept}"


def _kind(path: Path, cache: Path) -> str:
    relative = path.relative_to(cache)
    return relative.name if len(relative.parts) == 1 else relative.parts[0] + "/"


def flip_bits(cache: Path, count: int, seed: int) -> Counter[tuple[str, bool]]:
    """Flip single bits, ``count`` in all, in every kind of file alike; (kind, found by verify) -> how many."""
    rng = random.Random(seed)
    kinds: dict[str, list[Path]] = {}
    for path in sorted(cache.rglob("*")):
        if path.is_file():
            kinds.setdefault(_kind(path, cache), []).append(path)
    found: Counter[tuple[str, bool]] = Counter()
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        path = rng.choice(kinds[kind])
        data = path.read_bytes()
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        found[kind, not verify(cache, threads=1).whole] += 1
        path.write_bytes(data)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="mutated files")
    parser.add_argument("--flips", type=int, default=2_000, help="single bits flipped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(), help="folder for files that crashed the interpreter")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        make(cache)
        table: Counter[tuple[str, str]] = Counter()
        for seed, kind, result in run(cache, range(args.seed, args.seed + args.files), args.keep):
            table[kind, result.split()[0]] += 1
            if result.startswith("FINDING"):
                print(f"seed {seed}, {kind}: {result}")
        flips = flip_bits(cache, args.flips, args.seed)
    print(f"{'':16}{'read':>8}{'refused':>9}{'findings':>10}{'bits flipped':>14}{'found':>8}")
    kinds = sorted({kind for kind, _ in table} | {kind for kind, _ in flips})
    for kind in kinds:
        flipped = flips[kind, True] + flips[kind, False]
        print(
            f"{kind:16}{table[kind, 'read']:8,}{table[kind, 'refused']:9,}{table[kind, 'FINDING']:10,}"
            f"{flipped:14,}{flips[kind, True]:8,}"
        )
    bad = sum(count for (_, result), count in table.items() if result == "FINDING")
    missed = sum(count for (_, found), count in flips.items() if not found)
    print(f"{args.files:,} files: {bad:,} findings; {args.flips:,} bits: {missed:,} missed")
    sys.exit(1 if bad or missed else 0)


if __name__ == "__main__":
    main()
