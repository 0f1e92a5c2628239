"""Which block of a peer's stored states becomes what: a layer of hidden_states, or last_hidden_states.

Of the last decoder layer a cache of ours holds the output before the final norm among hidden_states, and the same after
the norm as last_hidden_states. Peers hold either in either place. Blocks that become the same are stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache_format.errors import CacheError, InputError
from cache_format.peers.interface import POST_NORM, PRE_NORM, Record

LAST = -1
"""In place of a layer: last_hidden_states."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """What each block of a record becomes: a layer id, or ``LAST``."""

    blocks: tuple[int, ...]
    """of the states, in their order"""
    apart: int | None
    """of the last hidden states that the layout holds apart; None: it holds none"""

    @staticmethod
    def of(
        layer_ids: Sequence[int], num_hidden_layers: int, *, apart: str | None, last_layer: str | None
    ) -> Arrangement:
        """
        Args:
            layer_ids: of the blocks, in their order.
            num_hidden_layers: of the target.
            apart: ``pre-norm`` or ``post-norm``, what the layout holds apart; None: nothing.
            last_layer: ``pre-norm`` or ``post-norm``: how the last decoder layer is held among the blocks.

        Raises:
            InputError: that is not said and has to be, or is said and of no account; or no layer is left.
        """
        final = num_hidden_layers - 1
        if final in layer_ids and last_layer is None:
            raise InputError(
                f"--target-layers names the last decoder layer, {final}: give --last-layer {PRE_NORM} or {POST_NORM}, "
                "whether its states were taken before or after the target's final norm, which no layout says"
            )
        if final not in layer_ids and last_layer is not None:
            raise InputError(f"--last-layer is of layer {final}, which --target-layers does not name; leave it out")
        blocks = tuple(LAST if layer == final and last_layer == POST_NORM else layer for layer in layer_ids)
        arrangement = Arrangement(blocks=blocks, apart={None: None, PRE_NORM: final, POST_NORM: LAST}[apart])
        if not arrangement.layer_ids:
            raise InputError(
                "nothing but last hidden states would be left, and a cache has at least one layer's; name the others "
                "in --target-layers"
            )
        return arrangement

    @property
    def layer_ids(self) -> list[int]:
        """Of the cache's hidden_states, in order."""
        everything = [*self.blocks, *([] if self.apart is None else [self.apart])]
        return [layer for layer in dict.fromkeys(everything) if layer != LAST]

    @property
    def has_last(self) -> bool:
        """Whether the cache has last_hidden_states."""
        return LAST in (*self.blocks, self.apart)

    def put(self, record: Record, states: Tensor, last: Tensor | None) -> None:
        """Fill ``states [S, L*H]`` and ``last [S, H]`` of the cache from a record.

        Raises:
            CacheError: two blocks that should be the same differ.
        """
        layers = self.layer_ids
        width = states.shape[1] // len(layers)
        sources = list(zip(self.blocks, record.states.split(width, dim=1), strict=True))
        if self.apart is not None:
            assert record.last is not None
            sources.append((self.apart, record.last))
        done: set[int] = set()
        for what, source in sources:
            if what == LAST:
                assert last is not None
                into = last
            else:
                into = states[:, layers.index(what) * width :][:, :width]
            if what not in done:
                into.copy_(source)
            elif not torch.equal(_bits(into.contiguous()), _bits(source.contiguous())):
                name = "last hidden states" if what == LAST else f"layer {what}"
                raise CacheError(
                    "sample",
                    f"{record.sample.source_row} holds the {name} twice, and not the same; is --last-layer right?",
                )
            done.add(what)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)
