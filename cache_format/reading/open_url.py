"""A cache at a URL, opened for training: where its small files and whole shards are kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cache_format.errors import CacheError, InputError
from cache_format.layout.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from cache_format.storage.commit import committed, make_folder, write_all
from cache_format.storage.folder import StoreFolder
from cache_format.storage.shard_cache import ShardCache
from cache_format.storage.store import Store


def open_url(url: str, cache_dir: Path | None, cache_limit: int | None, path: Path | None = None) -> StoreFolder:
    """The cache at ``url`` for training: its manifest is fetched anew, small files and shards may be there already.

    Args:
        url: of the cache.
        cache_dir: where whole shards (and small files) are kept for the next time; None: shards are read by range.
        cache_limit: bytes of shards in ``cache_dir``; None: no limit.
        path: a folder with the small files, of a process that has opened the cache already.

    Raises:
        InputError: a URL or limit that cannot be used.
        CacheError: no cache there.
    """
    if cache_limit is not None and (cache_dir is None or cache_limit < 1):
        raise InputError(f"cache_limit={cache_limit!r} goes with cache_dir= and is a number of bytes from 1")
    store = Store(url)
    content = store.get(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    if content is None:
        raise CacheError(store.url, f"is not a feature cache: there is no {MANIFEST_NAME}")
    manifest = Manifest.parse(content, store.at(MANIFEST_NAME))
    key = hashlib.sha256(manifest.fingerprint.encode()).hexdigest()[:16]
    shards = None if cache_dir is None else ShardCache(cache_dir / "shards", cache_limit)
    if cache_dir is not None:
        # Of this very manifest: a cache that was extracted anew under the same URL has another folder.
        path = cache_dir / hashlib.sha256(content).hexdigest()[:16]
        make_folder(path)
    elif path is not None and not (path / MANIFEST_NAME).exists():
        path = None
    folder = StoreFolder(store, path, shards, key)
    with committed(folder.path / MANIFEST_NAME) as file:
        write_all(file, content)
    return folder
