"""The extractor's own way through the target: right-padded, stopped as soon as all is captured, real tokens only.

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

from cache_format.codecs.dtypes import DTYPES
from cache_format.errors import InputError
from cache_format.layout.captures import LAST_HIDDEN_STATES, LOGSUMEXP, TOPK_IDS, TOPK_VALUES, Captures
from cache_format.layout.shard import capture_tensors
from extractor.target.hooks import HFDFlashTargetModel

UNMASKED, MASKED = "unmasked", "masked"

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference, as a share of a token's state, that passes as rounding (experts may be batched differently).
A target that looks one token ahead is off by about 0.2, one that looks at all of them by more."""

PROBED_TOKENS = 8
"""Tokens compared, the last before the padding: all that a target can see which looks only a little ahead."""


_ROWS_OF_LOGITS = 1024
"""Rows whose logits are reduced at once, in float32: 0.6 GB for a vocabulary of 150,000."""


class _Enough(Exception):
    """Raised by a hook once all that is captured is there; nothing after it is computed."""


class HiddenStateExtractor:
    """Runs batches through a hooked target; the model's own code after the last thing captured never runs."""

    def __init__(self, target: HFDFlashTargetModel, padding: str, captures: Captures | None = None):
        """``padding``: ``unmasked`` or ``masked``, as :func:`padding_mode` found it for this target.

        Raises:
            InputError: captures that need an LM head, and the target has none or one too small.
        """
        if padding not in (UNMASKED, MASKED):
            raise ValueError(f"padding {padding!r} is not {UNMASKED} or {MASKED}")
        self.target, self.padding, self.captures = target, padding, captures or Captures()
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

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, lengths: Sequence[int], out: Tensor, extra: Mapping[str, Tensor] | None = None
    ) -> None:
        """Fill ``out [sum(lengths), L*H]`` with the states of the real tokens, row after row of the batch.

        Hooks are there during the call only; no KV cache and nothing for gradients is kept.

        Args:
            input_ids: ``[B, S]`` int64 on the target's device, right-padded.
            lengths: real tokens of each row, B of them.
            out: on the target's device, in the stored dtype.
            extra: the captures' tensors by name, each with as many rows as ``out``.

        Raises:
            RuntimeError: a captured layer did not run.
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
            out[:, position * width : (position + 1) * width].copy_(_rows(output, real))
            written.add(position)
            if position == self._last and self._head is None:
                raise _Enough

        mask = None
        if self.padding == MASKED:
            mask = _sent(torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None], input_ids.device).long()
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

    @property
    def checked(self) -> list[str]:
        """What the columns of :meth:`nonfinite` stand for."""
        names = [f"layer {layer_id}" for layer_id in self.target.target_layer_ids]
        names += [LAST_HIDDEN_STATES] if self.captures.last_hidden_states else []
        return names + ([LOGSUMEXP] if self.captures.logits_topk else [])

    @torch.inference_mode()
    def nonfinite(self, out: Tensor, lengths: Sequence[int], extra: Mapping[str, Tensor] | None = None) -> Tensor:
        """Which samples have NaN or Inf, and where: bool ``[B, len(checked)]`` on the device of ``out``."""
        extra, layers = extra or {}, len(self.target.target_layer_ids)
        # One pass: NaN and Inf survive a float32 sum, and no states but those beyond 1e34 could add up to one.
        sums = [out.view(len(out), layers, -1).sum(-1, dtype=torch.float32)]
        if LAST_HIDDEN_STATES in extra:
            sums.append(extra[LAST_HIDDEN_STATES].sum(-1, keepdim=True, dtype=torch.float32))
        if LOGSUMEXP in extra:
            sums.append(extra[LOGSUMEXP][:, None])
        by_token = torch.cat(sums, dim=1).isfinite().logical_not()
        samples = torch.repeat_interleave(
            torch.arange(len(lengths), device=out.device),
            _sent(torch.tensor(lengths), out.device),
            output_size=len(out),
        )
        found = torch.zeros(len(lengths), by_token.shape[1], dtype=torch.int32, device=out.device)
        return found.index_add_(0, samples, by_token.to(torch.int32)).bool()


def _rows(output: Tensor, real: Tensor | None) -> Tensor:
    """``[B, S, F]`` -> ``[real tokens, F]``; a view where there is no padding."""
    flat = output.reshape(-1, output.shape[-1])
    return flat if real is None else flat.index_select(0, real.to(flat.device))


def _real_tokens(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor | None:
    """Positions of the real tokens in the flattened batch; None where there is no padding."""
    if all(length == longest for length in lengths):
        return None
    positions = [torch.arange(row * longest, row * longest + length) for row, length in enumerate(lengths)]
    return _sent(torch.cat(positions), device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without waiting for what the device has still to do: from page-locked memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def row_memory(extractor: HiddenStateExtractor, tokens: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Memory for the rows of ``tokens`` tokens: hidden_states ``[tokens, L*H]``, and the captures by name."""
    weight = extractor.target.get_input_embeddings().weight
    width, dtype = weight.shape[1], weight.dtype
    out = torch.empty(tokens, len(extractor.target.target_layer_ids) * width, dtype=dtype, device=device)
    captures = capture_tensors(extractor.captures, dtype, width)
    return out, {
        tensor.name: torch.empty(tensor.shape(tokens), dtype=DTYPES[tensor.dtype], device=device) for tensor in captures
    }


def _parts(lengths: Sequence[int], limit: int | None) -> Iterator[slice]:
    """Runs of rows that are all within ``limit`` tokens, or all longer; one run where there is no limit."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or (limit is not None and (lengths[stop] > limit) != (lengths[start] > limit)):
            yield slice(start, stop)
            start = stop


def longrope_limit(config: Any) -> int | None:
    """Tokens beyond which rotary embeddings take their long factors, for a whole batch; None without such."""
    for rope in _rope_parameters(config, "longrope"):
        text = config.get_text_config()
        original = rope.get("original_max_position_embeddings")
        return int(original or getattr(text, "original_max_position_embeddings", text.max_position_embeddings))
    return None


def _rope_parameters(config: Any, kind: str) -> Iterator[dict[str, Any]]:
    """Rotary embedding parameters of that type; models with several kinds of layers may have several."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    # transformers 4 calls them rope_scaling.
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for rope in (parameters, *parameters.values()):
        if isinstance(rope, dict) and kind in (rope.get("rope_type"), rope.get("type")):
            yield rope


def padding_mode(target: HFDFlashTargetModel, longest: int) -> str:
    """Try out whether the states of real tokens depend on the padding: without an attention mask, else with one.

    A random row of half of ``longest`` tokens beside a full one is run twice, with other tokens in its padding. The
    shapes are the same, so a target that does not look there gives the same states but for rounding. Rotary embeddings
    of type ``dynamic`` depend on earlier batches even, which a trial need not show; they are told by the configuration.

    Raises:
        InputError: they depend on it either way, such a target cannot be run on padded batches; or its layers are at
            no known place.
    """
    try:
        target._get_transformer_layers()
    except ValueError as unknown:
        raise InputError(f"--target: {unknown}") from None
    config = getattr(target.model, "config", None)
    limit = getattr(config, "max_position_embeddings", longest)
    if longest > limit and any(_rope_parameters(config, "dynamic")):
        raise InputError(
            f"--target: beyond {limit:,} tokens its rotary embedding (type dynamic) depends on the batches before; "
            f"pass --max-length {limit}, or a target with a fixed type such as yarn"
        )
    # Special tokens, which may stand for images, are at either end of a vocabulary.
    weight = target.get_input_embeddings().weight
    low, high = weight.shape[0] // 4, weight.shape[0] // 2
    short = max(1, longest // 2)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(low, high, (2, longest), generator=random)
    other = ids.clone()
    other[1, short:] = torch.randint(low, high, (longest - short,), generator=random)

    def short_row(batch: Tensor, padding: str) -> Tensor:
        layers = len(target.target_layer_ids)
        out = torch.empty(longest + short, weight.shape[1] * layers, dtype=weight.dtype, device=weight.device)
        HiddenStateExtractor(target, padding).forward(batch.to(weight.device), [longest, short], out)
        return out[longest:][-PROBED_TOKENS:].float().view(-1, layers, weight.shape[1]).nan_to_num(0, 0, 0)

    for padding in (UNMASKED, MASKED):
        states = short_row(ids, padding)
        error = (short_row(other, padding) - states).norm(dim=-1) / states.norm(dim=-1).clamp_min(1e-20)
        if error.square().mean(0).sqrt().max() <= PROBE_TOLERANCE[weight.dtype]:
            return padding
    raise InputError(
        f"{type(target.model).__name__}: the states of a sample change with the padding beside it, masked or not, so "
        "samples cannot be run in padded batches; this target cannot be cached"
    )
