"""Whether a folder can become the cache: it is new or one of ours, and its disk has room."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cache_format.errors import InputError
from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.layout.shard_layout import ShardSchema
from cache_format.storage.lock import LOCK_NAME
from cache_format.upkeep.repair import QUARANTINE_NAME
from extractor.terminal.progress import size


def require_space(cache: Path, num_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        InputError: the disk has fewer bytes free than that; what is prepared so far stays for the next run.
    """
    free = shutil.disk_usage(cache).free
    if free < num_bytes:
        raise InputError(
            f"{cache}: what is missing needs {size(num_bytes)} but the disk has {size(free)} free. Free some space "
            "and run the same command again, or choose another --out, fewer layers (--target-layers), a smaller "
            "--max-length, or --limit."
        )


def shards_schema(manifest: Manifest) -> ShardSchema:
    """The shards' schema for sizes: the fingerprint may not be known yet, but its length is."""
    schema = manifest.schema()
    return schema if schema.fingerprint else replace(schema, fingerprint="0" * 64)


def refuse_out_inside_data(out: Path, sources: Iterable[str]) -> None:
    """Refuse an OUT that the next run would read as data.

    Raises:
        InputError: it lies in the folder of one of ``sources``.
    """
    for source in sources:
        folder = Path(source).expanduser()
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"--out {out} lies inside --data {source}, and would be read as data; choose another --out"
            )


def refuse_foreign_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a new or empty folder")
    if out.is_dir() and not (out / MANIFEST_NAME).exists():
        known = {"samples", "shards", "target", QUARANTINE_NAME, LOCK_NAME}
        strange = sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.endswith(".tmp"))
        if strange:
            raise InputError(f"--out {out} is not empty and not a cache (it has {strange[0]!r}); name another folder")
