"""The extractor's own way through the target: right-padded, stopped after the last captured layer, real tokens only.

With a causal target a token never sees what stands to its right, so right-padding needs no attention mask, and
without a mask the fastest attention kernel is taken. Whether that holds for a target is tried out, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from cache_format.errors import InputError
from extractor.target import HFDFlashTargetModel

UNMASKED, MASKED = "unmasked", "masked"

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest difference, as a share of the states' RMS, that passes as rounding (experts may be batched differently)."""


class _LastLayerDone(Exception):
    """Raised by the hook on the last captured layer; nothing after it is computed."""


class HiddenStateExtractor:
    """Runs batches through a hooked target; the model's own code after the last captured layer never runs."""

    def __init__(self, target: HFDFlashTargetModel, padding: str):
        """``padding``: ``unmasked`` or ``masked``, as :func:`padding_mode` found it for this target."""
        if padding not in (UNMASKED, MASKED):
            raise ValueError(f"padding {padding!r} is not {UNMASKED} or {MASKED}")
        self.target, self.padding = target, padding
        ids = target.target_layer_ids
        self._last = ids.index(max(ids))

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, lengths: Sequence[int], out: Tensor) -> None:
        """Fill ``out [sum(lengths), L*H]`` with the states of the real tokens, row after row of the batch.

        Args:
            input_ids: ``[B, S]`` int64 on the target's device, right-padded.
            lengths: real tokens of each row, B of them.
            out: on the target's device, in the stored dtype.

        Raises:
            RuntimeError: a captured layer did not run.
        """
        batch, longest = input_ids.shape
        real = _real_tokens(lengths, longest, input_ids.device)
        width = out.shape[1] // len(self.target.target_layer_ids)
        written = set()

        def write(position: int, output: Tensor) -> None:
            columns = out[:, position * width : (position + 1) * width]
            rows = output.reshape(batch * longest, width)
            columns.copy_(rows if real is None else rows.index_select(0, real.to(rows.device)))
            written.add(position)
            if position == self._last:
                raise _LastLayerDone

        mask = None
        if self.padding == MASKED:
            mask = torch.zeros_like(input_ids)
            for row, length in enumerate(lengths):
                mask[row, :length] = 1
        with self.target.hooked(write), suppress(_LastLayerDone):
            self.target.model(input_ids=input_ids, attention_mask=mask, **self.target.forward_flags())
        if len(written) != len(self.target.target_layer_ids):
            raise RuntimeError(f"Expected {len(self.target.target_layer_ids)} captured layers but got {len(written)}")

    @torch.inference_mode()
    def nonfinite(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """Which samples of ``rows [sum(lengths), L*H]`` have NaN or Inf, at which layer: bool ``[B, L]``, there too."""
        layers = len(self.target.target_layer_ids)
        # One pass: NaN and Inf survive a float32 sum, and finite states cannot add up to one.
        by_token = rows.view(len(rows), layers, -1).sum(-1, dtype=torch.float32).isfinite().logical_not()
        samples = torch.repeat_interleave(
            torch.arange(len(lengths), device=rows.device),
            torch.tensor(lengths, device=rows.device),
            output_size=len(rows),
        )
        found = torch.zeros(len(lengths), layers, dtype=torch.int32, device=rows.device)
        return found.index_add_(0, samples, by_token.to(torch.int32)).bool()


def _real_tokens(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor | None:
    """Positions of the real tokens in the flattened batch; None where there is no padding."""
    if all(length == longest for length in lengths):
        return None
    positions = [torch.arange(row * longest, row * longest + length) for row, length in enumerate(lengths)]
    return torch.cat(positions).to(device, non_blocking=True)


def padding_mode(target: HFDFlashTargetModel, longest: int) -> str:
    """Try out whether the states of real tokens depend on the padding: without an attention mask, else with one.

    A random row of half of ``longest`` tokens beside a full one is run twice, with other tokens in its padding. The
    shapes are the same, so a target that does not look there gives the same states but for rounding.

    Raises:
        InputError: they depend on it either way; such a target cannot be run on padded batches.
    """
    weight = target.get_input_embeddings().weight
    short = max(1, longest // 2)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, weight.shape[0], (2, longest), generator=random)
    other = ids.clone()
    other[1, short:] = torch.randint(0, weight.shape[0], (longest - short,), generator=random)

    def short_row(batch: Tensor, padding: str) -> Tensor:
        width = weight.shape[1] * len(target.target_layer_ids)
        out = torch.empty(longest + short, width, dtype=weight.dtype, device=weight.device)
        HiddenStateExtractor(target, padding).forward(batch.to(weight.device), [longest, short], out)
        return out[longest:].float()

    for padding in (UNMASKED, MASKED):
        states = short_row(ids, padding)
        error = (short_row(other, padding) - states).square().mean().sqrt() / states.square().mean().sqrt()
        if not error > PROBE_TOLERANCE[weight.dtype]:
            return padding
    raise InputError(
        f"{type(target.model).__name__}: the states of a sample change with the padding beside it, masked or not, so "
        "samples cannot be run in padded batches; this target cannot be cached"
    )
