"""transformers as a backend: right-padded, stopped as soon as all is captured, real tokens only.

With a causal target a token never sees what stands to its right, so right-padding needs no attention mask, and
without a mask the fastest attention kernel is taken. Whether that holds for a target is tried out, not assumed.

What a sample's states are must not depend on the samples beside it, or the plan would change the cache. Rotary
embeddings of type ``longrope`` (Phi) pick their frequencies by the longest row of a batch; such a batch is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from cache_format.device import sent
from cache_format.errors import InputError
from cache_format.layout.captures import LAST_HIDDEN_STATES, LOGSUMEXP, TOPK_IDS, TOPK_VALUES, Captures
from extractor.target.backend import TargetBackend
from extractor.target.batch_budget import find_batch_tokens
from extractor.target.factors import Factors, measured_factors
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.in_fact import decided_in_fact
from extractor.target.quantised import is_quantised, other_dtype

UNMASKED, MASKED = "unmasked", "masked"

_ROWS_OF_LOGITS = 1024
"""Rows whose logits are reduced at once, in float32: 0.6 GB for a vocabulary of 150,000."""


class _Enough(Exception):
    """Raised by a hook once all that is captured is there; nothing after it is computed."""


class TransformersBackend(TargetBackend):
    """Runs batches through a hooked target; the model's own code after the last thing captured never runs."""

    def __init__(
        self,
        target: HFDFlashTargetModel,
        padding: str,
        captures: Captures | None = None,
        embeddings: Any = None,
        dtype: torch.dtype | None = None,
    ):
        """
        Args:
            target: with its hooks' places known.
            padding: ``unmasked`` or ``masked``, as :func:`extractor.target.padding.padding_mode` found it.
            captures: beside hidden_states.
            embeddings: whose input and output embeddings are whole; None: the target's own are.
            dtype: of the states; None: of the input embedding. A quantised target that gives others is refused.

        Raises:
            InputError: captures that need an LM head, and the target has none or one too small.
        """
        if padding not in (UNMASKED, MASKED):
            raise ValueError(f"padding {padding!r} is not {UNMASKED} or {MASKED}")
        weight = target.get_input_embeddings().weight
        super().__init__(target.target_layer_ids, weight.shape[1], dtype or weight.dtype, captures or Captures())
        self.target, self.padding = target, padding
        self._uncast = is_quantised(target.model) or weight.dtype != self.dtype
        self._embeddings = target.model if embeddings is None else embeddings
        ids = target.target_layer_ids
        self._last = ids.index(max(ids))
        self._limit = longrope_limit(getattr(target.model, "config", None))
        self._head = None
        if self.captures != Captures():
            self._head = target.model.get_output_embeddings()  # type: ignore[operator]
            if self._head is None:
                raise InputError(f"--capture: {type(target.model).__name__} has no LM head")
            if self.captures.logits_topk > self._head.weight.shape[0]:
                raise InputError(f"--capture logits-topk={self.captures.logits_topk}: more than the vocabulary")

    @property
    def decided(self) -> dict[str, Any]:
        """See :class:`TargetBackend`: the attention kernel, whether padding is masked, and what :mod:`in_fact` says."""
        attention = getattr(self.target.model.config, "_attn_implementation", None) or "eager"
        return {"attn_implementation": attention, "padding": self.padding, **decided_in_fact(self.target.model)}

    @property
    def factors(self) -> Factors | None:
        """See :class:`TargetBackend`: tried out, but for a target whose other parts are in other processes."""
        return measured_factors(self.target) if self.target.before_pass is None else None

    @property
    def repeatable(self) -> bool:
        """See :class:`TargetBackend`: a target that is divided over processes runs in all of them at once."""
        return self.target.before_pass is None

    @property
    def embeddings(self) -> Any:
        """See :class:`TargetBackend`."""
        return self._embeddings

    def find_batch_tokens(self, device: torch.device, longest: int, most: int) -> int:
        """See :class:`TargetBackend`."""
        return find_batch_tokens(self, device, longest, most)

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, lengths: Sequence[int], out: Tensor, extra: Mapping[str, Tensor] | None = None
    ) -> None:
        """See :class:`TargetBackend`. Hooks are there during the call only; no KV cache and no gradients are kept.

        Raises:
            RuntimeError: a captured layer did not run.
            InputError: a quantised target gives states of another dtype.
        """
        start = 0
        for part in _parts(lengths, self._limit):
            stop = start + sum(lengths[part])
            some = {name: tensor[start:stop] for name, tensor in (extra or {}).items()}
            self._run(input_ids[part, : max(lengths[part])], lengths[part], out[start:stop], some)
            start = stop

    def _run(self, input_ids: Tensor, lengths: Sequence[int], out: Tensor, extra: Mapping[str, Tensor]) -> None:
        """:meth:`forward` for one call of the model."""
        real = _real_tokens(lengths, input_ids.shape[1], input_ids.device)
        width = out.shape[1] // len(self.target.target_layer_ids)
        written = set()

        def write(position: int, output: Tensor) -> None:
            if self._uncast and output.dtype != out.dtype:
                name = str(self.dtype).removeprefix("torch.")
                raise other_dtype(str(getattr(self.target.model, "name_or_path", "")), name, output.dtype)
            out[:, position * width : (position + 1) * width].copy_(_rows(output, real))
            written.add(position)
            if position == self._last and self._head is None:
                raise _Enough

        mask = None
        if self.padding == MASKED:
            mask = sent(torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None], input_ids.device).long()
        if self.target.before_pass is not None:
            self.target.before_pass(input_ids, lengths, self.padding, self.captures)
        with self.target.hooked(write), self._hooked_head(real, extra), suppress(_Enough):
            output = self.target.model(input_ids=input_ids, attention_mask=mask, **self.target.forward_flags())
            self._write_topk(output.logits, real, extra)
        if len(written) != len(self.target.target_layer_ids):
            raise RuntimeError(f"Expected {len(self.target.target_layer_ids)} captured layers but got {len(written)}")

    @contextmanager
    def _hooked_head(self, real: Tensor | None, extra: Mapping[str, Tensor]) -> Iterator[None]:
        """Take the LM head's input as last_hidden_states; stop there unless its logits are wanted."""

        def before(_head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if LAST_HIDDEN_STATES in extra:
                extra[LAST_HIDDEN_STATES].copy_(_rows(inputs[0], real))
            if TOPK_IDS not in extra:
                raise _Enough

        if self._head is None:
            yield
            return
        handle = self._head.register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()

    def _write_topk(self, logits: Tensor, real: Tensor | None, extra: Mapping[str, Tensor]) -> None:
        rows = _rows(logits, real)
        for start in range(0, len(rows), _ROWS_OF_LOGITS):
            part = slice(start, start + _ROWS_OF_LOGITS)
            top = rows[part].topk(self.captures.logits_topk, dim=-1)
            extra[TOPK_VALUES][part] = top.values
            extra[TOPK_IDS][part] = top.indices
            extra[LOGSUMEXP][part] = rows[part].float().logsumexp(-1)


def _rows(output: Tensor, real: Tensor | None) -> Tensor:
    """``[B, S, F]`` -> ``[real tokens, F]``; a view where there is no padding."""
    flat = output.reshape(-1, output.shape[-1])
    return flat if real is None else flat.index_select(0, real.to(flat.device))


def _real_tokens(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor | None:
    """Positions of the real tokens in the flattened batch; None where there is no padding."""
    if all(length == longest for length in lengths):
        return None
    positions = [torch.arange(row * longest, row * longest + length) for row, length in enumerate(lengths)]
    return sent(torch.cat(positions), device)


def _parts(lengths: Sequence[int], limit: int | None) -> Iterator[slice]:
    """Runs of rows that are all within ``limit`` tokens, or all longer; one run where there is no limit."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or (limit is not None and (lengths[stop] > limit) != (lengths[start] > limit)):
            yield slice(start, stop)
            start = stop


def longrope_limit(config: Any) -> int | None:
    """Tokens beyond which rotary embeddings take their long factors, for a whole batch; None without such."""
    for rope in rope_parameters(config, "longrope"):
        text = config.get_text_config()
        original = rope.get("original_max_position_embeddings")
        return int(original or getattr(text, "original_max_position_embeddings", text.max_position_embeddings))
    return None


def rope_parameters(config: Any, kind: str) -> Iterator[dict[str, Any]]:
    """Rotary embedding parameters of that type; models with several kinds of layers may have several."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    # transformers 4 calls them rope_scaling.
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for rope in (parameters, *parameters.values()):
        if isinstance(rope, dict) and kind in (rope.get("rope_type"), rope.get("type")):
            yield rope
