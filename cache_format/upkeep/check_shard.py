"""One shard of a cache, checked: against the tables and, unless the check is quick, every byte of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cache_format.errors import CacheError, StorageError
from cache_format.layout.index import INDEX_NAME, SHARDS_NAME, shard_rows
from cache_format.layout.samples import Sample
from cache_format.layout.shard_layout import shard_name
from cache_format.layout.shard_reader import ShardFile
from cache_format.upkeep.problem import Problem, told
from cache_format.upkeep.tables import Tables


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedShard:
    """What was found of one shard."""

    number: int
    samples: int = 0
    bytes: int = 0
    """of the file"""
    problems: tuple[Problem, ...] = ()


class ShardCheck:
    """Checks shards of one cache; threads may share it."""

    def __init__(self, tables: Tables, *, quick: bool):
        """``tables``: of the cache, already read. ``quick``: headers, sizes and heads only."""
        self.tables, self.quick = tables, quick
        self._schema = tables.manifest.schema()

    def __call__(self, number: int) -> CheckedShard | None:
        """None: it is not there, in a cache that is not finished; one line about all of those says so."""
        tables, name = self.tables, shard_name(number)
        if tables.manifest.state != "complete" and not tables.folder.has(name):
            return None
        try:
            source = tables.folder.open(name) if self.quick else tables.folder.open_whole(name)
            with ShardFile(source, self._schema, number) as shard:
                problems = [*self._against_tables(shard)]
                if not self.quick:
                    problems += self._content_problems(shard)
                size = shard.container.num_bytes
                return CheckedShard(number=number, samples=shard.num_samples, bytes=size, problems=tuple(problems))
        except (CacheError, StorageError) as error:
            problem = Problem(file=name, shard=number, problem=told(error))
            return CheckedShard(number=number, problems=(problem,))

    def _against_tables(self, shard: ShardFile) -> Iterator[Problem]:
        """What shards.arrow and index.arrow say of the shard."""
        name, number, rows, index = shard_name(shard.number), shard.number, self.tables.rows, self.tables.index
        row, found = shard_rows(shard)
        if rows is not None and number < len(rows) and rows[number] != row:
            yield Problem(file=SHARDS_NAME, shard=number, problem=f"says {rows[number]} of {name}, which is {row}")
        places = self.tables.places(number)
        if places is None or index is None:
            return
        for column in ("sample_id", "row_start", "num_tokens", "num_loss_tokens", "checksum"):
            if not np.array_equal(getattr(index, column)[places], getattr(found, column)):
                problem = f"does not say what {name} says of its samples"
                yield Problem(file=INDEX_NAME, shard=number, field=column, problem=problem)

    def _content_problems(self, shard: ShardFile) -> Iterator[Problem]:
        """Every byte of every sample against its checksum, and its tokens against the prepared sample."""
        name, number, samples = shard_name(shard.number), shard.number, self.tables.samples
        for position, sample_id in enumerate(shard.sample_ids.tolist()):
            if shard.computed_checksum(position) != int(shard.sample_checksums[position]):
                yield Problem(file=name, shard=number, sample=sample_id, problem="does not match its checksum")
                continue
            stored = _stored_sample(shard, position)
            masks = {
                "attention_mask": _stored_rows(shard, "attention_mask", position) != 1,
                "loss_mask": stored.loss_mask > 1,
            }
            for field_name in (field_name for field_name, wrong in masks.items() if wrong.any()):
                problem = "has values that this format does not allow"
                yield Problem(file=name, shard=number, sample=sample_id, field=field_name, problem=problem)
            if samples is None or not 0 <= sample_id < len(samples):
                continue
            try:
                prepared = samples[sample_id]
            except (CacheError, StorageError) as error:
                yield self.tables.problem(error)
                continue
            if stored.digest() != prepared.digest():
                yield Problem(
                    file=name,
                    shard=number,
                    sample=sample_id,
                    field="input_ids",
                    problem="its tokens or loss mask are not those of the prepared sample",
                )


def _stored_sample(shard: ShardFile, position: int) -> Sample:
    """Tokens and loss mask of the sample at ``position`` of a shard.

    Raises:
        CacheError: the file ended early.
    """
    ids, mask = (_stored_rows(shard, name, position) for name in ("input_ids", "loss_mask"))
    return Sample(ids.view("<i4"), mask, -1)


def _stored_rows(shard: ShardFile, name: str, position: int) -> np.ndarray:
    """The bytes (uint8) of a per-token tensor for the sample at ``position``.

    Raises:
        CacheError: the file ended early.
    """
    offset, size = shard.row_range(name, int(shard.cu_seqlens[position]), int(shard.cu_seqlens[position + 1]))
    out = np.empty(size, np.uint8)
    shard.read_into(offset, out)
    return out
