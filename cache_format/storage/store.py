"""A folder at a URL: list, read by range, fetch, upload, put if new. Object stores through fsspec, nothing of our own.

A put is atomic: an object is whole or not there. Every call is tried again with growing pauses; what stays an error is
a StoreError with the URL and the store's own code, never with a query, a header or a credential. Credentials come from
the environment that the store's library reads (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ...), and no other way.
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np

from cache_format.errors import CacheError, InputError, StoreError
from cache_format.storage.paths import is_plain

EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hub"}
"""URL scheme -> the extra of this package that brings its library."""

TRIES, PAUSE_SECONDS = 6, 0.5
"""How often a call is tried, and the first pause; each is twice the one before, and off by up to half."""

PART_BYTES = 16 << 20
"""Of an upload, and the largest range of a read: larger ones are divided and run side by side."""

CONNECTIONS = 32

_SPLIT = re.compile(r"^([a-z][a-z0-9+.-]*)://([^/?#]*)(.*)$", re.IGNORECASE)
_NOT_AGAIN = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
_NOT_AGAIN_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound")
T = TypeVar("T")


def is_url(place: object) -> bool:
    """Whether ``place`` is a text such as ``s3://bucket/prefix``, and not a path."""
    return isinstance(place, str) and _SPLIT.match(place) is not None


def parse_url(url: str) -> str:
    """``url`` without a slash at its end.

    Raises:
        InputError: a scheme that this package does not write to, no bucket, or credentials or a query in it.
    """
    match = _SPLIT.match(url)
    scheme, host, rest = match.groups() if match else ("", "", "")
    if scheme not in EXTRAS:
        known = ", ".join(f"{name}://" for name in EXTRAS)
        raise InputError(f"{scheme or url}://: unknown kind of store; known are {known}, or give a local folder")
    if "@" in host or "?" in rest or "#" in rest:
        # Not repeated: what stands there may be a secret.
        raise InputError(
            f"{scheme}://: a URL must not hold credentials or a query; set them in the environment (AWS_PROFILE, "
            "AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ...) and write scheme://bucket/prefix"
        )
    name = rest.strip("/")
    if not host or not name or not is_plain(name):
        raise InputError(f"{url}: write {scheme}://bucket/prefix, the folder of one cache")
    return f"{scheme}://{host}/{name}"


class Store:
    """The folder at ``url``. Threads may share it; after a fork, and after pickling, it connects anew."""

    def __init__(self, url: str):
        """Connects when it is first used.

        Raises:
            InputError: not a URL that can be used, or the library of its kind of store is not installed.
        """
        self.url = parse_url(url)
        self._opened: tuple[int, Any, ThreadPoolExecutor] | None = None
        self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url,)

    def at(self, name: str) -> str:
        """URL of the file ``name``."""
        return f"{self.url}/{name}"

    def list(self) -> dict[str, int]:
        """Every file below the folder: name -> bytes. One listing, whatever their number.

        Raises:
            StoreError: the store refused.
        """
        return {name: int(info["size"]) for name, info in self._listed().items()}

    def stamps(self) -> dict[str, str]:
        """Every file below the folder: name -> its size, checksum and time, as far as a listing has them.

        Raises:
            StoreError: the store refused.
        """
        known = ("size", "ETag", "md5Hash", "LastModified", "updated", "blob_id")
        return {
            name: "-".join(str(info[key]).strip('"') for key in known if info.get(key))
            for name, info in self._listed().items()
        }

    def times(self) -> dict[str, float]:
        """Every file below the folder whose time the listing has: name -> seconds since 1970, of its upload.

        Raises:
            StoreError: the store refused.
        """
        found = {name: info.get("LastModified") or info.get("mtime") for name, info in self._listed().items()}
        return {name: when.timestamp() for name, when in found.items() if isinstance(when, datetime)}

    def _listed(self) -> dict[str, dict[str, Any]]:
        """Every file below the folder, as the store's library describes it."""
        filesystem = self._filesystem
        root = filesystem._strip_protocol(self.url).rstrip("/") + "/"

        def find() -> Any:
            filesystem.invalidate_cache()
            return filesystem.find(root, detail=True)

        found: dict[str, Any] = self._tried("list", "", find, missing=dict)
        return {
            name.removeprefix(root): info
            for name, info in sorted(found.items())
            if info.get("type") == "file" and name.startswith(root)
        }

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none.

        Raises:
            StoreError: the store refused.
        """
        info = self._tried("look at", name, lambda: self._info(name), missing=lambda: None)
        return None if info is None else int(info["size"])

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of a file.

        Raises:
            CacheError: the file is missing or ends before ``stop``.
            StoreError: the store refused.
        """
        out = np.empty(stop - start, np.uint8)
        self.read_into(name, start, out)
        return out.tobytes()

    def read_into(self, name: str, offset: int, out: np.ndarray) -> None:
        """Fill ``out`` (uint8, contiguous) with the file's bytes from ``offset``, in parts side by side.

        Raises:
            CacheError: the file is missing or ends early.
            StoreError: the store refused.
        """

        def part(at: int) -> None:
            piece = out[at : at + PART_BYTES]
            start = offset + at
            data = self._tried("read", name, lambda: self._range(name, start, start + len(piece)))
            piece[:] = np.frombuffer(data, np.uint8)

        places = range(0, len(out), PART_BYTES)
        if len(places) == 1:
            part(0)
        else:
            for _ in self._pool.map(part, places):
                pass

    def fetch(self, name: str, path: Path, size: int) -> None:
        """Fill ``path``, an existing file that nobody else writes, with the ``size`` bytes of a file.

        Raises:
            CacheError: the file is missing or shorter.
            StoreError: the store refused.
        """

        def part(start: int) -> None:
            stop = min(start + PART_BYTES, size)
            data = self._tried("read", name, lambda: self._range(name, start, stop))
            os.pwrite(fd, data, start)

        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            for _ in self._pool.map(part, range(0, size, PART_BYTES)):
                pass
        finally:
            os.close(fd)

    def upload(self, path: Path, name: str) -> None:
        """Put a file, in parts where it is large, then check what the store has: its size and its checksum.

        The checksum is the one that the store reports (MD5 as S3's etag and Google's md5Hash, SHA-256 at the Hub).
        Where it reports none of these (S3 with KMS keys), the file is read back and compared.

        Raises:
            StoreError: the store refused, or kept something else.
        """

        def put() -> None:
            options: dict[str, Any] = {}
            if self.url.startswith("s3:"):
                options = {"chunksize": PART_BYTES, "max_concurrency": 4}
            self._filesystem.put_file(str(path), self._key(name), **options)
            if not self._is_stored(path, name):
                raise OSError("what the store has is not what was sent")

        self._tried("write", name, put)

    def put(self, name: str, data: bytes) -> None:
        """Put a small file.

        Raises:
            StoreError: the store refused.
        """
        self._tried("write", name, lambda: self._filesystem.pipe_file(self._key(name), data))

    def put_new(self, name: str, data: bytes) -> bool:
        """Put a small file unless there is one of that name; whether the file is now the one given.

        S3 and Google decide it in one step (If-None-Match, ifGenerationMatch); others look first, then put.

        Raises:
            StoreError: the store refused.
        """

        def put() -> bool:
            try:
                self._filesystem.pipe_file(self._key(name), data, mode="create")
            except OSError as error:
                if not isinstance(error, FileExistsError) and _code(error) not in ("PreconditionFailed", "412"):
                    raise
                # Perhaps our own: an answer may be lost and the put tried again.
                return self._filesystem.cat_file(self._key(name)) == data
            return True

        return self._tried("write", name, put)

    def get(self, name: str, most_bytes: int) -> bytes | None:
        """A small file's content; None where there is none.

        Raises:
            CacheError: longer than ``most_bytes``.
            StoreError: the store refused.
        """
        size = self.size(name)
        if size is None:
            return None
        if size > most_bytes:
            raise CacheError(self.at(name), f"is longer than {most_bytes:,} bytes")
        return self._tried("read", name, lambda: self._filesystem.cat_file(self._key(name)), missing=lambda: None)

    def move(self, name: str, to: str) -> None:
        """Copy a file inside the store, then remove it.

        Raises:
            StoreError: the store refused; the file is at least in one of the two places.
        """
        self._tried("copy", name, lambda: self._filesystem.cp_file(self._key(name), self._key(to)))
        self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there.

        Raises:
            StoreError: the store refused.
        """
        self._tried("remove", name, lambda: self._filesystem.rm_file(self._key(name)), missing=lambda: None)

    @property
    def _filesystem(self) -> Any:
        return self._open()[1]

    @property
    def _pool(self) -> ThreadPoolExecutor:
        return self._open()[2]

    def _open(self) -> tuple[int, Any, ThreadPoolExecutor]:
        """fsspec's file system of this process: its event loop does not survive a fork."""
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="store")
            opened = self._opened = (os.getpid(), _connect(self.url), pool)
        return opened

    def _key(self, name: str) -> str:
        if not is_plain(name):
            raise CacheError(
                self.url, f"file name {name!r} is not a plain relative path; it could lead out of the cache"
            )
        return str(self._filesystem._strip_protocol(self.at(name)))

    def _info(self, name: str) -> dict[str, Any]:
        filesystem, key = self._filesystem, self._key(name)
        filesystem.invalidate_cache()
        info = filesystem.info(key)
        if info.get("type") != "file":
            raise FileNotFoundError(name)
        return info

    def _range(self, name: str, start: int, stop: int) -> bytes:
        data = self._filesystem.cat_file(self._key(name), start=start, end=stop)
        if len(data) != stop - start:
            size = int(self._info(name)["size"])
            if size < stop:
                raise CacheError(self.at(name), f"ends at byte {size:,}; truncated since it was opened")
            raise OSError("the answer was cut off")
        return data

    def _is_stored(self, path: Path, name: str) -> bool:
        info = self._info(name)
        if int(info["size"]) != path.stat().st_size:
            return False
        reported = _reported_checksum(info)
        if reported is not None and _checksum(path, *reported):
            return True
        if reported is not None and reported[0] != "etag":
            return False
        return self._is_same(path, name)

    def _is_same(self, path: Path, name: str) -> bool:
        """Read the file back and compare."""
        size = path.stat().st_size
        with open(path, "rb") as file:
            parts = ((start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES))
            return all(self._range(name, start, stop) == file.read(stop - start) for start, stop in parts)

    def _tried(self, doing: str, name: str, call: Callable[[], T], missing: Callable[[], T] | None = None) -> T:
        """``call()``, tried again where that may help; ``missing()`` where there is no such file.

        Raises:
            CacheError: no such file, and no ``missing``.
            StoreError: the store refused.
        """
        where = self.at(name) if name else self.url
        for attempt in range(1, TRIES + 1):
            try:
                return call()
            except CacheError:
                raise
            except FileNotFoundError as error:
                if missing is not None and _code(error) != "NoSuchBucket":
                    return missing()
                if doing in ("read", "look at") and _code(error) != "NoSuchBucket":
                    raise CacheError(where, "is missing") from None
                raise StoreError(where, doing, _reason(error)) from None
            except Exception as error:
                again = not isinstance(error, _NOT_AGAIN) and type(error).__name__ not in _NOT_AGAIN_NAMES
                if attempt == TRIES or not again:
                    # Not chained: a library's text may repeat what it was configured with.
                    tries = f", after {attempt} tries" if attempt > 1 else ""
                    raise StoreError(where, doing, _reason(error) + tries) from None
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        raise AssertionError("not reached")


def _connect(url: str) -> Any:
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        options["config_kwargs"] = {"max_pool_connections": CONNECTIONS}
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        raise InputError(
            f"{scheme}:// needs a package that is not installed: pip install 'dflash-cache[{EXTRAS[scheme]}]'"
        ) from None
    except Exception as error:
        raise StoreError(url, "connect", _reason(error)) from None


def _code(error: BaseException) -> str:
    """The store's own code of an error, such as NoSuchBucket; '' where it has none."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        code = getattr(one, "code", None)
        if isinstance(code, int | str):
            return str(code)
    return ""


def _reason(error: BaseException) -> str:
    """What went wrong in our own words: a library's text may hold URLs with queries, or worse."""
    name, code = type(error).__name__, _code(error)
    detail = f"[{', '.join(filter(None, (name, code)))}]"
    if "Credentials" in name or name == "ProfileNotFound":
        return f"there are no credentials; set them as usual for this store, such as AWS_PROFILE or HF_TOKEN {detail}"
    if isinstance(error, PermissionError) or code in ("401", "403"):
        return f"permission denied; check the credentials and their rights {detail}"
    if code == "NoSuchBucket":
        return f"there is no such bucket; make it, or correct the URL {detail}"
    if type(error) is OSError and not code and error.args and isinstance(error.args[0], str):
        return f"{error.args[0]} {detail}"
    return f"the store did not do it; run the same command again, what was finished is kept {detail}"


def _reported_checksum(info: dict[str, Any]) -> tuple[str, str] | None:
    """(kind, value) of the checksum in a file system's answer, as far as the stores that we know have one."""
    if info.get("md5Hash"):
        return "md5", base64.b64decode(info["md5Hash"]).hex()
    sha256 = getattr(info.get("lfs"), "sha256", None)
    if sha256:
        return "sha256", sha256
    etag = str(info.get("ETag", "")).strip('"')
    return ("etag", etag) if re.fullmatch(r"[0-9a-f]{32}(-\d+)?", etag) else None


def _checksum(path: Path, kind: str, expected: str) -> bool:
    """Whether the file has the checksum. An etag ``X-N`` of S3 is the MD5 over the MD5s of the N parts."""
    whole, parts = hashlib.new("md5" if kind == "etag" else kind, usedforsecurity=False), []
    with open(path, "rb") as file:
        while chunk := file.read(PART_BYTES):
            whole.update(chunk)
            parts.append(hashlib.md5(chunk, usedforsecurity=False).digest())
    if kind == "etag" and "-" in expected:
        return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}" == expected
    return whole.hexdigest() == expected
