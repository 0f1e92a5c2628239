"""What of the stored states a batch holds: which layers, in which order, and in which dtype."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cache_format.codecs import States, TokenTensor
from cache_format.errors import InputError
from cache_format.layout.captures import LAST_HIDDEN_STATES, TOPK_VALUES
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import ShardSchema

CAST = ("hidden_states", LAST_HIDDEN_STATES, TOPK_VALUES)
"""The fields of a batch that are in the stored dtype."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Layers and dtype of a batch, where they are not those that are stored."""

    layers: tuple[int, ...] | None = None
    """their positions among the stored layers; None: all, in order"""
    dtype: torch.dtype | None = None
    """None: the stored one"""

    def read(self, schema: ShardSchema) -> States:
        """The states as they are read and decoded: only the layers wanted, where the codec has each on its own."""
        layers = len(self.layers) if self.layers is not None and self.by_layer(schema) else schema.states.layers
        return replace(schema.states, layers=layers)

    def given(self, schema: ShardSchema) -> States:
        """The states as a batch holds them."""
        layers = schema.states.layers if self.layers is None else len(self.layers)
        return replace(schema.states, layers=layers, dtype=self.dtype or schema.states.dtype)

    def columns(self, schema: ShardSchema, tensor: TokenTensor) -> list[slice] | None:
        """The bytes to read of each row of a tensor, in the order wanted; None: all of them."""
        codec, states = schema.codec, schema.states
        if self.layers is None or not self.by_layer(schema) or tensor not in codec.tensors(states):
            return None
        size = tensor.row_bytes // states.layers
        runs: list[slice] = []
        for layer in self.layers:
            if runs and runs[-1].stop == layer * size:
                runs[-1] = slice(runs[-1].start, (layer + 1) * size)
            else:
                runs.append(slice(layer * size, (layer + 1) * size))
        return runs

    def selected(self, states: Tensor, schema: ShardSchema) -> Tensor:
        """``[..., L*H]`` as they were decoded -> the layers that are wanted."""
        if self.layers is None or self.by_layer(schema):
            return states
        layers = states.unflatten(-1, (schema.states.layers, schema.states.hidden_size))
        return layers[..., list(self.layers), :].flatten(-2)

    def is_decoded(self, schema: ShardSchema) -> bool:
        """Whether states are as they are wanted once they are decoded."""
        return self.dtype is None and (self.layers is None or self.by_layer(schema))

    @staticmethod
    def by_layer(schema: ShardSchema) -> bool:
        """Whether layers are stored so that each can be read and decoded on its own."""
        return schema.codec.by_layer


STORED = View()


def view_of(manifest: Manifest, among: list[int], layers: Iterable[int], dtype: torch.dtype | str) -> View:
    """The view of a cache that a user asks for.

    Args:
        manifest: of the cache as it is stored.
        among: the layers that can be asked for.
        layers: ids of decoder layers, any of those in any order.
        dtype: a floating dtype of 16 bits or more, or its name.

    Raises:
        InputError: a layer that is not stored, or no such dtype; names what there is.
    """
    stored, asked = manifest.target_layer_ids, _listed(layers)
    if not asked:
        raise InputError(f"layers=[]: name at least one of the layers {among}")
    missing = [layer for layer in asked if layer not in among]
    if missing:
        raise InputError(f"layers: layer {missing[0]} is not in this cache; it has {among}")
    as_dtype = _dtype(dtype)
    return View(
        layers=None if asked == stored else tuple(stored.index(layer) for layer in asked),
        dtype=None if as_dtype == manifest.torch_dtype else as_dtype,
    )


def seen(manifest: Manifest, view: View) -> Manifest:
    """The manifest of the cache as it is seen through ``view``."""
    ids = manifest.target_layer_ids
    return replace(
        manifest,
        target_layer_ids=ids if view.layers is None else [ids[position] for position in view.layers],
        dtype=manifest.dtype if view.dtype is None else str(view.dtype).removeprefix("torch."),
    )


def _listed(layers: Iterable[int]) -> list[int]:
    try:
        return [operator.index(layer) for layer in layers]
    except TypeError:
        raise InputError(f"layers={layers!r}: give a list of layer numbers, such as [1, 9]") from None


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found: torch.dtype | None = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES:
        names = ", ".join(str(known) for known in _DTYPES)
        raise InputError(f"dtype={dtype!r}: choose one of {names}")
    return found
