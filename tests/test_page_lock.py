"""Host memory is page-locked as it is, on a stand-in for CUDA's runtime that keeps books."""

from __future__ import annotations

import gc
import sys
import warnings
from pathlib import Path
from typing import Any

import late_device
import pytest
import torch
from late_device import in_a_process, install
from synthetic import write_cache

from cache_format import FeatureCache
from cache_format.device import accelerators
from cache_format.reading.buffer_pool import BufferPool
from cache_format.storage.host_memory import PAGE, host_memory

REFUSED = 2


class Books(late_device._Runtime):
    """Every block that was locked, with its bytes, and unlocked; locking is refused after ``most``."""

    locked: list[tuple[int, int]] = []  # noqa: RUF012
    unlocked: list[int] = []  # noqa: RUF012
    held: dict[int, int]
    most: float = float("inf")
    kept_error: int = 0

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert flags == 1
        assert not any(pointer < at + other and at < pointer + size for at, other in self.held.items())
        if len(self.locked) >= self.most:
            Books.kept_error = REFUSED
            return REFUSED
        self.locked.append((pointer, size))
        return super().cudaHostRegister(pointer, size, flags)

    def cudaHostUnregister(self, pointer: int) -> int:
        self.unlocked.append(pointer)
        return super().cudaHostUnregister(pointer)

    @classmethod
    def each_once(cls) -> bool:
        """Nothing is locked any more, and nothing was unlocked twice."""
        return not cls.held and sorted(at for at, _ in cls.locked) == sorted(cls.unlocked)


def keep_books(most: float = float("inf")) -> torch.device:
    Books.held, Books.most = install(0).registered, most
    late_device._Runtime = Books  # type: ignore[misc]
    zeros = torch.zeros

    def launched(*args: Any, **kwargs: Any) -> torch.Tensor:
        """CUDA tells of an error of an earlier call at the next kernel, once."""
        if Books.kept_error and "device" in kwargs:
            Books.kept_error = 0
            raise RuntimeError("CUDA error")
        return zeros(*args, **kwargs)

    torch.zeros = launched
    return accelerators()[0]


def blocks() -> tuple[list[tuple[int, ...]], list[tuple[int, int]], list[int], bool]:
    """Memory of several sizes, held by a view and let go; then blocks held while a pool lends them, and afterwards."""
    device, sizes, held = keep_books(), [], []
    for num_bytes in (1, PAGE, PAGE + 1, 5 * PAGE - 1, 3 << 20):
        memory = host_memory(num_bytes, device)
        at, size = Books.locked[-1]
        sizes.append((num_bytes, memory.numel(), memory.data_ptr() - at, at % PAGE, size % PAGE, size))
        view = memory[:1].numpy()
        del memory
        gc.collect()
        before = len(Books.held)
        del view
        held.append((before, len(Books.held)))
    pool = BufferPool(PAGE, keep=1, device=device)
    lent = [pool.lease(100), pool.lease(200), pool.lease(2 * PAGE)]
    of_pool = [len(Books.held)]
    lent.clear()
    of_pool.append(len(Books.held))
    pool.lease(50)
    of_pool.append(len(Books.locked) - len(sizes))
    del pool
    gc.collect()
    return sizes, held, of_pool, Books.each_once()


def test_a_block_is_locked_as_it_is_and_unlocked_once():
    sizes, held, of_pool, each_once = in_a_process(blocks)
    for num_bytes, numel, *off, size in sizes:
        assert (numel, off) == (num_bytes, [0, 0, 0])
        assert num_bytes <= size < num_bytes + PAGE
    assert held == [(1, 0)] * len(sizes)
    assert of_pool == [3, 1, 3], "lent, kept, locked in all: one is used again"
    assert each_once


def refused(most: int) -> tuple[list[bool], list[int], list[str]]:
    device = keep_books(most)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        held = [host_memory(3 * PAGE, device) for _ in range(3)]
    torch.zeros(1, device=device)
    return [memory.is_pinned() for memory in held], [len(memory) for memory in held], [str(w.message) for w in said]


@pytest.mark.parametrize("most", [0, 1])
def test_where_locking_is_refused_torchs_own_is_taken_and_that_is_said_once(most):
    """And no kernel is blamed for the error that the runtime keeps."""
    pinned, sizes, said = in_a_process(refused, most)
    assert (pinned, sizes) == ([True] * 3, [3 * PAGE] * 3)
    assert len(said) == 1
    assert f"cannot page-lock memory as it is (error {REFUSED})" in said[0]


def dropped_with_a_copy_under_way() -> tuple[int, int]:
    device = keep_books()
    memory = host_memory(PAGE, device).fill_(7)
    there = memory.to(device, non_blocking=True)
    del memory
    gc.collect()
    unlocked = len(Books.unlocked)
    others = [host_memory(PAGE, device).fill_(9) for _ in range(10)]
    return unlocked, int(there.cpu().sum()) + 0 * len(others)


def test_memory_that_is_being_copied_is_unlocked_afterwards():
    assert in_a_process(dropped_with_a_copy_under_way) == (1, 7 * PAGE)


def read(path: Path) -> tuple[int, int, bool]:
    """All batches of a cache, and then some of them: how many blocks were locked, bytes of the largest."""
    keep_books()
    loader = FeatureCache.open(path).loader(batch_size=2, device="late")
    for _ in loader:
        pass
    for _ in loader:
        break
    del _, loader
    gc.collect()
    return len(Books.locked), max(size for _, size in Books.locked), Books.each_once()


def test_a_loader_locks_its_batches_and_leaves_nothing_behind(tmp_path):
    write_cache(tmp_path / "cache", [40, 31, 38, 33] * 3, dtype="bfloat16", hidden=512)
    locked, largest, each_once = in_a_process(read, tmp_path / "cache")
    assert locked >= 1
    assert largest & (largest - 1), "a power of two"
    assert each_once


def extracted(arguments: list[str]) -> tuple[int, list[int], bool]:
    """Exit code, bytes of each block that was locked, whether each was unlocked once."""
    from extractor.cli import main

    keep_books()
    sys.argv = ["dflash-cache", *arguments]
    with pytest.raises(SystemExit) as end:
        main()
    gc.collect()
    return int(end.value.code or 0), [size for _, size in Books.locked], Books.each_once()


def test_an_extraction_locks_its_shards_and_leaves_nothing_behind(small_job, tmp_path):
    out = tmp_path / "cache"
    code, locked, each_once = in_a_process(extracted, [*small_job, "--device", "late", "--out", str(out)])
    files = [path.stat().st_size for path in (out / "shards").iterdir()]
    assert (code, len(locked), each_once) == (0, len(files), True)
    assert all(max(files) <= size <= max(files) + 4 * PAGE for size in locked)
