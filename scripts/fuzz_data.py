"""Does a damaged or hostile data file ever crash a job, or end it without saying which file it is?

    python scripts/fuzz_data.py --target TARGET --files 1000

Small files of every kind that --data takes (and two that it does not) are mutated again and again, as scripts/fuzz.py
does with a cache, opened with and without --streaming, and all their rows prepared with --on-bad-row skip, in a child
process with a memory limit. Allowed: samples, bad rows, or DFlashCacheError that names the file. All else is a finding.
Exit code 1 where there is one; a file that crashed the interpreter is kept and named.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import fuzz
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from transformers import AutoTokenizer

from cache_format.errors import DFlashCacheError
from extractor.config import DataOptions, PrepareOptions
from extractor.data.dataset import open_source
from extractor.data.prepare import prepare_rows, require_forms


def make(folder: Path) -> None:
    """The files, with the same forty conversations each."""
    folder.mkdir()
    answer = "Yo, \u00e4" * 9
    rows: list[dict[str, Any]] = [
        {
            "id": number,
            "messages": [
                {"role": "user", "content": f"Hi {number}"},
                {"role": "assistant", "content": answer},
            ],
            "more": {"tags": ["a", None], "score": number / 7},
        }
        for number in range(40)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=number % 2 == 0) + "\n" for number, row in enumerate(rows)).encode()
    table = pa.Table.from_pylist(rows)
    (folder / "rows.jsonl").write_bytes(lines)
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "rows.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    (folder / "rows.json.bz2").write_bytes(bz2.compress(json.dumps(rows).encode()))
    (folder / "rows.csv").write_text("prompt,response\n" + "Hi,Yo\n" * 40)
    pq.write_table(table, folder / "rows.parquet", row_group_size=16)
    pq.write_table(table, folder / "plain.parquet", compression="none", use_dictionary=False)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset(table).save_to_disk(str(folder / "saved"))


def case(folder: Path, seed: int) -> tuple[Path, bytes, bool]:
    """The file that case ``seed`` mutates, and its new bytes."""
    rng = random.Random(seed)
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    return path, fuzz.mutate(path.read_bytes(), rng), False


def outcome(target: str, folder: Path, seed: int, _expected: str) -> str:
    """What comes of one mutated file: read, refused, or a finding."""
    path, data, _ = case(folder, seed)
    before = path.read_bytes()
    path.write_bytes(data)
    named = folder / "saved" if path.parent.name == "saved" else path
    try:
        prepare_all(named, tokenizer_of(target), streaming=seed % 2 == 0)
    except DFlashCacheError as error:
        return "refused" if named.name in str(error) else f"FINDING it does not name the file: {error}"
    except BaseException as error:
        return f"FINDING {type(error).__name__}: {error}"
    finally:
        path.write_bytes(before)
    return "read"


def prepare_all(path: Path, tokenizer: Any, *, streaming: bool) -> None:
    """Every row of the data at ``path``.

    Raises:
        DFlashCacheError: it cannot be read.
    """
    options = PrepareOptions(on_bad_row="skip")
    source = open_source(DataOptions(name=str(path), streaming=streaming))
    require_forms(source, tokenizer, options)
    first = 0
    while len(rows := source.read(first, first + 16)):
        prepare_rows(rows, tokenizer, options)
        first += len(rows)


@cache
def tokenizer_of(target: str) -> Any:
    """Loaded once."""
    return AutoTokenizer.from_pretrained(target)


def run(folder: Path, target: Path, seeds: range, keep: Path) -> Iterator[tuple[int, str, str]]:
    """(seed, file, outcome) of every seed."""
    tokenizer_of(str(target))
    yield from fuzz.run(folder, seeds, keep, case=case, outcome=partial(outcome, str(target)), expected="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="a target's folder, for its tokenizer")
    parser.add_argument("--files", type=int, default=1_000, help="mutated files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(), help="folder for files that crashed the interpreter")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    table: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "datasets"
        make(Path(folder) / "data")
        for seed, kind, result in run(
            Path(folder) / "data", args.target, range(args.seed, args.seed + args.files), args.keep
        ):
            table[kind, result.split()[0]] += 1
            if result.startswith("FINDING"):
                print(f"seed {seed}, {kind}: {result}", flush=True)
    for kind in sorted({kind for kind, _ in table}):
        counts = [table[kind, result] for result in ("read", "refused", "FINDING")]
        print(f"{kind:16}" + "{:8,} read{:8,} refused{:8,} findings".format(*counts))
    bad = sum(count for (_, result), count in table.items() if result == "FINDING")
    print(f"{args.files:,} files: {bad:,} findings")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
