"""Write a cache to a URL through a scratch folder, which is an ordinary cache folder without the shards.

Files are made in the scratch folder and uploaded in the order of commits (FORMAT.md): samples and target, manifest,
shards in any order, tables, manifest. A shard leaves the scratch folder once it is up. The store is the truth: what it
has is fetched, and what the scratch folder has of another cache is thrown away.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from cache_format.errors import CacheError, InputError, MismatchError, StorageError
from cache_format.layout.index import INDEX_NAME, SHARDS_NAME, Part, shard_rows
from cache_format.layout.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from cache_format.layout.shard_layout import ShardSchema, finished_shards, shard_name
from cache_format.layout.shard_reader import ShardFile
from cache_format.storage.commit import committed, make_folder
from cache_format.storage.folder import StoreFolder
from cache_format.storage.lock import LOCK_NAME
from cache_format.storage.paths import inside
from cache_format.storage.store import Store
from cache_format.writing.seal import seal

FOLDERS = ("samples", "shards", "target")


def scratch_folder(url: str, below: Path | None = None) -> Path:
    """The scratch folder of the cache at ``url``: the same one for a rerun, below ``below`` or the system's temporary
    folder.

    Raises:
        InputError: somebody else's file or folder is in its place.
    """
    name = f"dflash-cache-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    if below is not None:
        path = below.absolute() / name
        # Nothing is made yet, but what stands in the way is told before any work.
        there = next(place for place in (path, *path.parents) if os.path.lexists(place))
        if not there.is_dir():
            raise InputError(f"--scratch {below}: {there} is not a folder; name another one")
        if path.is_symlink() or any((path / inner).is_symlink() for inner in (*FOLDERS, MANIFEST_NAME)):
            raise InputError(f"--scratch {below}: {path} is, or holds, a symbolic link, which could lead anywhere")
        return path
    path = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        if path.is_symlink() or path.stat().st_uid != os.getuid():
            raise InputError(f"{path} is not this user's folder; name a --scratch folder")
    except OSError as error:
        raise StorageError(path, "create the folder", error) from error
    return path


class Upload:
    """A cache at a URL that is being written; threads may share it."""

    def __init__(self, store: Store, scratch: Path):
        self.store, self.scratch = store, scratch
        self._done: dict[int, int] = {}
        self._parts: dict[int, Part] = {}
        self._up: set[str] = set()
        """files that are up as they are in the scratch folder"""
        self._lock = threading.Lock()
        self.require_allowed: Callable[[], None] = lambda: None
        """raises where this job must not go on; called before each file"""

    def require(self, allowed: Callable[[], None]) -> None:
        """Have ``allowed`` say whether this job may go on."""
        self.require_allowed = allowed

    def manifest(self) -> Manifest | None:
        """As the store has it.

        Raises:
            CacheError: it is damaged.
            StoreError: the store refused.
        """
        content = self.store.get(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        return None if content is None else Manifest.parse(content, self.store.at(MANIFEST_NAME))

    def refuse_foreign(self) -> None:
        """Whether the place may be written to.

        Raises:
            InputError: it has files, and they are not a cache's.
        """
        names = self.store.list()
        known = {*FOLDERS, "quarantine", LOCK_NAME}
        strange = sorted({name.split("/")[0] for name in names} - known)
        if MANIFEST_NAME not in names and strange:
            raise InputError(f"--out {self.store.url} is not empty and not a cache (it has {strange[0]!r})")

    def pull(self) -> None:
        """Make the scratch folder what the store has, but for the shards, and list these.

        Raises:
            CacheError: a file is missing or damaged there.
            StoreError: the store refused.
        """
        manifest = self.manifest()
        if manifest is None or not self._is_of(manifest):
            self._clear()
        self.list_shards()
        if manifest is None:
            return
        manifest.write(self.scratch)
        if manifest.state == "complete":
            return
        folder = StoreFolder(self.store, self.scratch)
        for name, info in manifest.files.items():
            folder.checked(name, info)

    def list_shards(self) -> dict[int, int]:
        """The shards that are up: number -> bytes."""
        sizes = self.store.list()
        names = [name.removeprefix("shards/") for name in sizes if name.startswith("shards/")]
        with self._lock:
            self._done = {number: sizes[shard_name(number)] for number in finished_shards(names)}
        return self.shards

    @property
    def shards(self) -> dict[int, int]:
        """The shards that are up, as far as this process knows: number -> bytes."""
        with self._lock:
            return dict(self._done)

    def left_behind(self) -> list[int]:
        """Shards in the scratch folder: made by a run that was stopped before they were up. Others' are removed."""
        numbers = finished_shards(os.listdir(self.scratch / "shards"))
        for number in set(numbers) & set(self.shards):
            (self.scratch / shard_name(number)).unlink()
        return [number for number in numbers if number not in self.shards]

    def push(self, name: str) -> None:
        """Upload one file that a manifest will name, before it is committed, for other workers to :meth:`bring`.

        Raises:
            StoreError: the store refused.
        """
        self.require_allowed()
        self.store.upload(inside(self.scratch, name), name)
        self._up.add(name)

    def bring(self, name: str) -> None:
        """Fetch a file that the scratch folder does not have, if it is up; what it says is for the caller to check.

        Raises:
            StoreError: the store refused.
        """
        path = inside(self.scratch, name)
        size = None if path.exists() else self.store.size(name)
        if size is None:
            return
        # It may be removed in between, which is as if it had not been there.
        with suppress(CacheError), committed(path) as file:
            self.store.fetch(name, Path(file.name), size)
            self._up.add(name)

    def commit(self, manifest: Manifest) -> Manifest:
        """Upload the files that ``manifest`` names, then itself; gives the manifest that is there now.

        The first manifest of a cache is put only if there is none: of two jobs that begin at once, one finds the
        other's and compares.

        Raises:
            MismatchError: the cache there has another fingerprint.
            StoreError: the store refused.
        """
        self.require_allowed()
        if manifest.state == "preparing":
            if not self.store.put_new(MANIFEST_NAME, manifest.to_bytes()):
                there = self.manifest()
                assert there is not None
                manifest = there
            manifest.write(self.scratch)
            return manifest
        self._refuse_another(manifest)
        self._push(name for name in manifest.files if name not in (INDEX_NAME, SHARDS_NAME))
        self.store.put(MANIFEST_NAME, manifest.to_bytes())
        manifest.write(self.scratch)
        return manifest

    def commit_shard(self, schema: ShardSchema, number: int) -> None:
        """Upload shard ``number`` from the scratch folder, keep what the tables say of it, and remove it there.

        Raises:
            CacheError: it is damaged.
            StoreError: the store refused; it stays in the scratch folder.
        """
        self.require_allowed()
        path = inside(self.scratch, shard_name(number))
        with ShardFile(path, schema, number) as shard:
            part = shard_rows(shard)
        self.store.upload(path, shard_name(number))
        with self._lock:
            self._parts[number], self._done[number] = part, part[0].bytes
        path.unlink()

    def seal(self, manifest: Manifest) -> Manifest:
        """Upload the tables, then the manifest of state complete; every shard must be up.

        Shards that this process has not made are read by range: their heads and loss masks.

        Raises:
            CacheError: a shard is missing or damaged; nothing was written.
            MismatchError: the cache there has another fingerprint.
            StoreError: the store refused.
        """
        self.require_allowed()
        self._refuse_another(manifest)
        folder = StoreFolder(self.store, self.scratch)
        folder.listing  # noqa: B018  one listing instead of a question a shard
        sealed = seal(self.scratch, manifest, folder, self._parts)
        self._push((INDEX_NAME, SHARDS_NAME))
        self.store.put(MANIFEST_NAME, sealed.to_bytes())
        return sealed

    def _push(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._up:
                self.store.upload(inside(self.scratch, name), name)

    def _refuse_another(self, manifest: Manifest) -> None:
        there = self.manifest()
        if there is not None and there.state != "preparing" and there.fingerprint != manifest.fingerprint:
            different = {"fingerprint": (there.fingerprint, manifest.fingerprint)}
            raise MismatchError(f"{self.store.url}: another job has begun another cache here. Different:", different)

    def _is_of(self, manifest: Manifest) -> bool:
        """Whether the scratch folder is of the cache that is up; its prepared samples are then of use."""
        try:
            mine = Manifest.read(self.scratch)
        except CacheError:
            return False
        names = set(mine.identity) & set(manifest.identity)
        return all(mine.identity[name] == manifest.identity[name] for name in names)

    def _clear(self) -> None:
        try:
            for name in FOLDERS:
                shutil.rmtree(self.scratch / name, ignore_errors=True)
                make_folder(self.scratch / name)
            for name in (MANIFEST_NAME, INDEX_NAME, SHARDS_NAME):
                (self.scratch / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(self.scratch, "clear", error) from error
