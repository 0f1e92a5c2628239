"""Writing past the page cache: the same bytes as any write, whatever the place, the size and the file system."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_format.storage.direct_write import write_direct
from cache_format.storage.host_memory import PAGE

DATA = np.random.default_rng(0).integers(0, 256, 8 * PAGE, np.uint8)


class File(io.FileIO):
    """Where O_DIRECT is set, ``direct(data)`` stands for the file system; ``asked`` has the sizes it was given."""

    def __init__(self, path, direct=None):
        super().__init__(path, "w")
        self.asked: list[int] = []
        self.direct = direct or super().write

    def write(self, data) -> int:
        if not fcntl.fcntl(self, fcntl.F_GETFL) & os.O_DIRECT:
            return super().write(data)
        self.asked.append(len(data))
        return self.direct(data)


def placed(size: int, shift: int) -> np.ndarray:
    """The first ``size`` bytes of DATA, in memory ``shift`` bytes behind the beginning of a page."""
    memory = np.empty(size + 2 * PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE + shift
    memory[start : start + size] = DATA[:size]
    return memory[start : start + size]


@given(
    before=st.integers(0, 2 * PAGE), size=st.integers(0, 6 * PAGE), shift=st.integers(0, PAGE - 1), fits=st.booleans()
)
def test_every_byte_is_written_wherever_it_lies(tmp_path_factory, before, size, shift, fits):
    path = tmp_path_factory.mktemp("direct") / "file"
    with File(path) as file:
        file.write(bytes(before))
        write_direct(file, placed(size, before % PAGE if fits else shift))
        assert not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT
    assert path.read_bytes() == bytes(before) + DATA[:size].tobytes()


def test_whole_pages_go_past_the_page_cache(tmp_path):
    with File(tmp_path / "file") as file:
        file.write(bytes(100))
        write_direct(file, placed(5 * PAGE, 100))
    assert file.asked == [4 * PAGE]


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP])
def test_a_file_system_without_direct_writes_gets_buffered_ones(tmp_path, refusal):
    def refuse(data):
        raise OSError(refusal, os.strerror(refusal))

    with File(tmp_path / "file", refuse) as file, warnings.catch_warnings(record=True) as said:
        write_direct(file, placed(3 * PAGE + 7, 0))
    # A file system without it is nothing to tell anybody of; that of this memory a device may have to do with.
    assert len(said) == (refusal == errno.EFAULT)
    assert file.asked == [3 * PAGE]
    assert (tmp_path / "file").read_bytes() == DATA[: 3 * PAGE + 7].tobytes()


@pytest.mark.parametrize("short", [PAGE, 512])
def test_a_write_that_stops_short_is_gone_on_with(tmp_path, short):
    with File(tmp_path / "file") as file:
        whole = file.direct
        file.direct = lambda data: whole(data[:short])
        write_direct(file, placed(3 * PAGE, 0))
    assert (tmp_path / "file").read_bytes() == DATA[: 3 * PAGE].tobytes()


def test_a_full_disk_is_not_taken_for_a_refusal(tmp_path):
    def full(data):
        raise OSError(errno.ENOSPC, "full")

    with File(tmp_path / "file", full) as file, pytest.raises(OSError, match="full"):
        write_direct(file, placed(3 * PAGE, 0))
