"""Whether a folder can become the cache: it is new or one of ours, and its disk has room."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cache_format.errors import InputError
from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.layout.shard_layout import ShardSchema
from cache_format.storage.own_folders import refuse_foreign
from cache_format.upkeep.repair import QUARANTINE_NAME
from extractor.job.timeline import TRACE_BEGINS
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


def refuse_out_inside_data(out: Path, sources: Iterable[str], option: str = "--out") -> None:
    """Refuse an OUT that the next run would read as data.

    Raises:
        InputError: it lies in the folder of one of ``sources``.
    """
    for source in sources:
        folder = Path(source).expanduser()
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{option} {out} lies inside --data {source}, and would be read as data; choose another {option}"
            )


def refuse_profile(path: Path, out: Path, sources: Iterable[str]) -> None:
    """Refuse a ``--profile`` that would write over something that is no trace, or where others would stumble over it.

    Raises:
        InputError: there is another file, a link, a folder or a device; or it lies in ``out`` or in one of ``sources``.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"--profile {path}: is a link, a folder or a device; name a new file")
    if path.exists() and not _begins_with(path, TRACE_BEGINS):
        raise InputError(f"--profile {path}: is there already, and not a trace; name a new file")
    for option, folder in [("--out", out), *(("--data", Path(source).expanduser()) for source in sources)]:
        if folder.is_dir() and path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--profile {path}: lies inside {option} {folder}; name another folder for it")


def _begins_with(path: Path, begin: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(begin)) == begin
    except OSError:
        return False


def refuse_foreign_folder(out: Path) -> None:
    refuse_foreign(out, "a cache", MANIFEST_NAME, {"samples", "shards", "target", QUARANTINE_NAME}, "--out")
