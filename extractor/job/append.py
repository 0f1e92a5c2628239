"""append: new rows of a finished job become a further cache beside its own, and a collection.json opens both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache_format.codecs import codec_from_dict
from cache_format.errors import InputError, MismatchError
from cache_format.layout.captures import Captures
from cache_format.layout.collection import (
    COLLECTION_NAME,
    Member,
    changing,
    collection_at,
    member,
    read_collection,
    write_collection,
)
from cache_format.layout.manifest import IMPORTED_FROM, LATER_IDENTITY, STATISTICS, Manifest, differing
from extractor.config import ExtractOptions, PlanOptions, PrepareOptions, TargetOptions

OF_THE_DATA = ("data.digest", "samples", "row_format", "columns", "limit", "on_bad_row", STATISTICS)
"""Identity fields in which an appended cache may differ."""


def first_cache(place: Path) -> Path:
    """The cache that ``place`` is, or the first one of the collection that it is.

    Raises:
        CacheError: a collection that is damaged.
    """
    listed = collection_at(place)
    return place if listed is None else listed[0]


def options_like(stored: Manifest, *, target: TargetOptions, prepare: PrepareOptions, **options: Any) -> ExtractOptions:
    """The options of the job that made a cache, as far as its manifest has them.

    Args:
        stored: of the cache.
        target: where the target lies and what runs it; what decides a byte is taken from ``stored``.
        prepare: what is said of the new data; the rest is taken from ``stored``.
        **options: ``out``, ``data``, ``append_to`` and other fields of ExtractOptions.

    Raises:
        InputError: it was made by no such job.
    """
    identity = stored.identity
    if IMPORTED_FROM in identity:
        raise InputError(
            f"this cache was imported from {identity[IMPORTED_FROM]}, and does not say how its rows became samples; "
            "make the new rows a cache of their own with `dflash-cache extract`, and open both as one"
        )
    kwargs = identity.get("chat_template_kwargs")
    samples = ("max_length", "too_long", "min_loss_tokens", "loss_on", "turns", "system_prompt", "template_date")
    alike: dict[str, Any] = {name: identity[name] for name in samples if name in identity}
    names = ("compile", "deterministic", "backend", "tensor_parallel", "pipeline_parallel", "expert_parallel")
    kernels = ("attn_implementation",) if "backend" not in identity else ()
    return ExtractOptions(
        target=replace(
            target,
            dtype=stored.dtype,
            target_layer_ids=tuple(stored.target_layer_ids),
            **{name: identity[name] for name in (*names, *kernels) if name in identity},
        ),
        prepare=replace(prepare, chat_template_kwargs=None if kwargs is None else json.dumps(kwargs), **alike),
        plan=PlanOptions(shard_bytes=identity["shard_bytes"], batch_tokens=identity["batch_tokens"]),
        capture=Captures.from_dict(stored.capture),
        codec=codec_from_dict(stored.codec).spelled,
        on_nonfinite=identity["on_nonfinite"],
        **options,
    )


def require_same_job(first: Path, identity: Mapping[str, Any]) -> None:
    """Whether ``identity`` is that of ``first``, but for the data; what is not decided yet is left out.

    Raises:
        MismatchError: names each field that differs.
    """
    stored = {name: value for name, value in Manifest.read(first).identity.items() if name not in OF_THE_DATA}
    open_ = {name for name in LATER_IDENTITY if name not in identity}
    asked = {name: value for name, value in identity.items() if name not in OF_THE_DATA}
    different = differing({name: value for name, value in stored.items() if name not in open_}, asked)
    if different:
        raise MismatchError(
            f"{first}: what is appended has to be made as this cache was; nothing was touched. Different:",
            different,
            "Name the target, adapter or chat template that it was made with (--target, --adapter, --chat-template), "
            "or make a cache of its own with `dflash-cache extract`.",
        )


def require_place_in_collection(first: Path, out: Path) -> None:
    """Whether both can be listed in the collection.json beside them.

    Raises:
        InputError: they do not lie side by side, ``first`` is not finished, or one is there that lists other caches.
        CacheError: it is damaged.
    """
    if Manifest.read(first).state != "complete":
        raise InputError(f"{first}: is not complete; run its extract command again, then append to it")
    if out.resolve().parent != first.resolve().parent or out.resolve() == first.resolve():
        raise InputError(
            f"--out {out}: a collection lists caches that lie side by side; name a new folder beside {first}, such as "
            f"{first}-2"
        )
    _with(first.parent / COLLECTION_NAME, first)


def add_to_collection(first: Path, out: Path) -> Path:
    """List ``out`` in the collection.json beside ``first``, which is made if need be; gives its path.

    Raises:
        CacheError, StorageError: it is damaged, or cannot be written.
    """
    path = first.parent / COLLECTION_NAME
    with changing(path):
        others = [listed for listed in _with(path, first) if listed.name != out.name]
        write_collection(path, [*others, member(out, path)])
    return path


def _with(path: Path, first: Path) -> list[Member]:
    """The caches listed there, ``first`` among them; only ``first`` where there is no such file."""
    mine = member(first, path)
    if not path.exists():
        return [mine]
    members = read_collection(path)
    if mine not in members:
        names = ", ".join(m.name for m in members)
        raise InputError(
            f"{path}: lists {names}, and not {first.name} as it is; caches of several jobs go into folders of their own"
        )
    return members
