"""What every layout has in common: which files it needs, how each is filled, and how tensors get into them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import torch
from torch import Tensor

from cache_format.batch import DFlashTargetBatch
from cache_format.codecs.dtypes import DTYPE_NAMES
from cache_format.errors import InputError
from cache_format.layout.safetensors_file import plan_container
from cache_format.reading.feature_cache import FeatureCache
from cache_format.storage.commit import write_all

FILES_A_FOLDER = 5_000
"""Samples in one folder where the peer's reader walks folders: listing a folder of a million files is slow."""


class LeftOut(Exception):
    """Raised by ``ExportFile.fill`` for a sample that the peer's reader would refuse; its file is not written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFile:
    """One file of an export. Written whole or not at all, so a file that exists is not filled again."""

    name: str
    """path below OUT, with ``/``"""
    num_bytes: int
    """its size; where torch.save writes it, without the few KiB of its container"""
    fill: Callable[[BinaryIO], None]
    """writes the content; a pure function of the cache, so an interrupted export ends in the same bytes"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The files of one project's offline reader."""

    name: str
    """as in ``--to``"""
    reader: str
    """project, version and class that this was matched against"""
    check: Callable[[FeatureCache], None]
    """raises InputError where the cache lacks what the layout needs, naming the extract option that captures it"""
    files: Callable[[FeatureCache], Iterator[ExportFile]]
    """every file, lazily, in the order of writing; what makes the reader accept the folder comes last"""
    needs_last_layer: bool = False
    """whether the output of the target's last decoder layer is held beside that of the draft's own layers"""
    settings: Callable[[FeatureCache], list[str]]
    """what to set in the peer's trainer so that it fits this cache, a line each"""


def seen_by(
    layout: Layout, cache: FeatureCache, layers: Iterable[int] | None, dtype: torch.dtype | str | None
) -> FeatureCache:
    """The cache as an export of some of its layers, or in another dtype, has it.

    Args:
        layout: of the export.
        cache: all of it.
        layers: those of the draft, as for ``FeatureCache.view``.
        dtype: of the states, as there.

    Raises:
        InputError: as ``FeatureCache.view``.
    """
    last, chosen = last_layer(cache), None if layers is None else list(layers)
    if chosen and layout.needs_last_layer and last in cache.target_layer_ids and last not in chosen:
        chosen.append(last)
    return cache.view(layers=chosen, dtype=dtype)


def last_layer(cache: FeatureCache) -> int:
    """The target's last decoder layer."""
    return cache.manifest.target.num_hidden_layers - 1


def file_a_sample(
    cache: FeatureCache, file_name: str, token_bytes: int, fill: Callable[[FeatureCache, int, BinaryIO], None]
) -> Iterator[ExportFile]:
    """A file for every sample, in folders of FILES_A_FOLDER.

    Args:
        cache: what is exported.
        file_name: of one sample, with ``{:09d}`` where its number stands.
        token_bytes: bytes a token takes in a file.
        fill: called with the cache, the sample's number and the open file.
    """
    for i, length in enumerate(cache.index.num_tokens):
        name = f"rows_{i - i % FILES_A_FOLDER:09d}/{file_name.format(i)}"
        yield ExportFile(name=name, num_bytes=int(length) * token_bytes, fill=partial(fill, cache, i))


def token_bytes_with_last(cache: FeatureCache) -> int:
    """Bytes a token takes where a file holds ids, mask, the layers' states and ``last_hidden_states``, if captured."""
    manifest = cache.manifest
    states = manifest.width + manifest.hidden_size * manifest.capture["last_hidden_states"]
    return 2 * 8 + states * manifest.torch_dtype.itemsize


def require_last_hidden_states(cache: FeatureCache, name: str) -> None:
    """Refuse a cache without ``last_hidden_states``.

    Raises:
        InputError: names the option that captures them.
    """
    if not cache.manifest.capture["last_hidden_states"]:
        raise InputError(
            f"{cache.path}: the {name} layout holds the target's last hidden states, which this cache does not have. "
            "Extract with `--capture last_hidden_states` into another --out"
        )


def states_of_last_layer_normed(cache: FeatureCache, sample: DFlashTargetBatch) -> Tensor:
    """``hidden_states [S, L*H]`` in transformers' convention: of the last decoder layer, the state after the norm.

    The cache holds that layer's own output, before the norm; ``last_hidden_states`` is the same state after it.
    """
    states, layers = sample.hidden_states[0], cache.target_layer_ids
    if last_layer(cache) not in layers:
        return states
    assert sample.last_hidden_states is not None
    blocks = states.reshape(len(states), len(layers), cache.hidden_size).clone()
    blocks[:, [layer == last_layer(cache) for layer in layers]] = sample.last_hidden_states[0][:, None]
    return blocks.flatten(1)


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Append the tensor's elements in row-major order, little-endian."""
    write_all(file, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def safetensors_size(entries: list[tuple[str, str, tuple[int, ...]]]) -> int:
    """Size of a safetensors file of ``(name, dtype, shape)`` tensors."""
    return plan_container(entries, {"format": "pt"}).num_bytes


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write a plain safetensors file."""
    entries = [(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_all(file, plan_container(entries, {"format": "pt"}).header)
    for tensor in tensors.values():
        write_tensor(file, tensor)


def write_torch(file: BinaryIO, record: Mapping[str, Tensor | bool | int]) -> None:
    """``torch.save`` of a dict: the same bytes each time. Opens with ``torch.load(weights_only=True)``."""
    # A clone, because torch.save writes the whole storage that a view is part of.
    own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in record.items()}
    # Buffered, because torch.save does not notice that an unbuffered write stopped short (2 GiB limit of Linux).
    buffered = io.BufferedWriter(file)
    torch.save(own, buffered)
    buffered.flush()
    buffered.detach()
