"""A disk that refuses: the operations that write below a folder are counted, and fail from a chosen one on.

Python's own calls are replaced (``open``, ``os.open``, ``os.fsync``, ``os.replace``, ...), so what is seen is what this
package, pathlib, tempfile, shutil, pyarrow and transformers ask of the operating system. Libraries in Rust go past it.
"""

from __future__ import annotations

import builtins
import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REMOVES = ("unlink", "rmdir")
NEEDS_NO_SPACE = (*REMOVES, "open folder")
"""What a full disk still lets through; one that is gone or read-only does not."""


@dataclass
class Fault:
    """What fails, and from which operation on (counted from 0)."""

    start: int
    errno: int
    spares: tuple[str, ...] = ()
    """kinds of operations that go on working"""
    short: bool = False
    """operation ``start`` is a write, which writes half of its bytes first; the next one fails"""


class FaultyDisk:
    """While active, all that writes below ``folder`` is listed in ``done``, or fails as ``fault`` says."""

    def __init__(self, folder: Path, fault: Fault | None = None, most_at_once: int | None = None):
        self.folder, self.fault, self.most_at_once = str(folder), fault, most_at_once
        self.done: list[tuple[str, str]] = []
        """(kind, path below the folder) of what was let through"""
        self.failed: list[tuple[str, str]] = []
        self._one_at_a_time = threading.Lock()

    def __enter__(self) -> FaultyDisk:
        self._patch = pytest.MonkeyPatch()
        for name, kind in [("mkdir", "mkdir"), ("unlink", "unlink"), ("remove", "unlink"), ("rmdir", "rmdir")]:
            self._replace(
                os, name, lambda real, kind=kind: lambda path, *a, **k: self._by_path(kind, real, path, *a, **k)
            )
        for name in ("replace", "rename"):
            self._replace(
                os, name, lambda real: lambda src, dst, **k: self._by_path("rename", self._swapped(real), dst, src)
            )
        for name in ("fsync", "ftruncate", "pwrite"):
            self._replace(os, name, lambda real, name=name: lambda fd, *a: self._by_fd(name, real, fd, *a))
        self._replace(os, "open", lambda real: lambda path, flags, *a, **k: self._os_open(real, path, flags, *a, **k))
        for module in (builtins, io):
            self._replace(module, "open", lambda real: lambda *a, **k: self._open(real, *a, **k))
        return self

    def __exit__(self, *exc: object) -> None:
        self._patch.undo()

    def _replace(self, module: Any, name: str, make: Callable[[Any], Any]) -> None:
        self._patch.setattr(module, name, make(getattr(module, name)))

    @staticmethod
    def _swapped(real: Any) -> Any:
        return lambda dst, src: real(src, dst)

    def count(self, kind: str, path: str) -> int:
        """One more operation; its number, from 0.

        Raises:
            OSError: it is one of those that fail.
        """
        operation, fault = (kind, path.removeprefix(self.folder).lstrip("/")), self.fault
        with self._one_at_a_time:
            number = len(self.done) + len(self.failed)
            fails = fault and number >= fault.start + fault.short and kind not in fault.spares
            (self.failed if fails else self.done).append(operation)
        if fault and fails:
            raise OSError(fault.errno, os.strerror(fault.errno), path)
        return number

    def at_once(self, number: int, size: int) -> int:
        """Bytes that write ``number`` may write in one go."""
        if self.fault and self.fault.short and number == self.fault.start:
            return max(1, size // 2)
        return size if self.most_at_once is None else min(size, self.most_at_once)

    def _is_mine(self, path: str) -> bool:
        return path == self.folder or path.startswith(self.folder + "/")

    def _by_path(self, kind: str, real: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        name = os.fspath(path)
        if options.get("dir_fd") is not None:
            name = os.path.join(_path_of(options["dir_fd"]), name)
        if isinstance(name, str) and self._is_mine(name):
            self.count(kind, name)
        return real(path, *arguments, **options)

    def _by_fd(self, kind: str, real: Any, fd: int, *arguments: Any) -> Any:
        name = _path_of(fd)
        if self._is_mine(name):
            self.count(kind, name)
        return real(fd, *arguments)

    def _os_open(self, real: Any, path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT or flags & os.O_DIRECTORY:
            return self._by_path(
                "open" if flags & os.O_CREAT else "open folder", real, path, flags, *arguments, **options
            )
        return real(path, flags, *arguments, **options)

    def _open(self, real: Any, path: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        writes = isinstance(path, str | os.PathLike) and any(letter in mode for letter in "wxa")
        if not writes or not self._is_mine(os.fspath(path)):
            return real(path, mode, buffering, *arguments, **options)
        self.count("open", os.fspath(path))
        raw = _CountedFile(self, os.fspath(path), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        file = io.BufferedWriter(raw)
        return file if "b" in mode else io.TextIOWrapper(file, *arguments, **options)


def _path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


class _CountedFile(io.FileIO):
    def __init__(self, disk: FaultyDisk, path: str, mode: str):
        self._disk, self._path = disk, path
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        number = self._disk.count("write", self._path)
        return super().write(view[: self._disk.at_once(number, len(view))])
