"""Whether padding changes the states of real tokens: tried out on the target at the start, not assumed."""

from __future__ import annotations

import torch
from torch import Tensor

from cache_format.errors import InputError
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.transformers_backend import MASKED, UNMASKED, TransformersBackend, rope_parameters

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference, as a share of a token's state, that passes as rounding (experts may be batched differently).
A target that looks one token ahead is off by about 0.2, one that looks at all of them by more."""

PROBED_TOKENS = 8
"""Tokens compared, the last before the padding: all that a target can see which looks only a little ahead."""


def padding_mode(target: HFDFlashTargetModel, longest: int, dtype: torch.dtype | None = None) -> str:
    """Try out whether the states of real tokens depend on the padding: without an attention mask, else with one.

    A random row of half of ``longest`` tokens beside a full one is run twice, with other tokens in its padding. The
    shapes are the same, so a target that does not look there gives the same states but for rounding. Rotary embeddings
    of type ``dynamic`` depend on earlier batches even, which a trial need not show; they are told by the configuration.
    ``dtype``: of the states; None: of the input embedding.

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
    if longest > limit and any(rope_parameters(config, "dynamic")):
        raise InputError(
            f"--target: beyond {limit:,} tokens its rotary embedding (type dynamic) depends on the batches before; "
            f"pass --max-length {limit}, or a target with a fixed type such as yarn"
        )
    # Special tokens, which may stand for images, are at either end of a vocabulary.
    weight = target.get_input_embeddings().weight
    dtype = dtype or weight.dtype
    low, high = weight.shape[0] // 4, weight.shape[0] // 2
    short = max(1, longest // 2)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(low, high, (2, longest), generator=random)
    other = ids.clone()
    other[1, short:] = torch.randint(low, high, (longest - short,), generator=random)

    def short_row(batch: Tensor, padding: str) -> Tensor:
        layers = len(target.target_layer_ids)
        out = torch.empty(longest + short, weight.shape[1] * layers, dtype=dtype, device=weight.device)
        TransformersBackend(target, padding, dtype=dtype).forward(batch.to(weight.device), [longest, short], out)
        return out[longest:][-PROBED_TOKENS:].float().view(-1, layers, weight.shape[1]).nan_to_num(0, 0, 0)

    for padding in (UNMASKED, MASKED):
        states = short_row(ids, padding)
        error = (short_row(other, padding) - states).norm(dim=-1) / states.norm(dim=-1).clamp_min(1e-20)
        if error.square().mean(0).sqrt().max() <= PROBE_TOLERANCE[dtype]:
            return padding
    raise InputError(
        f"{type(target.model).__name__}: the states of a sample change with the padding beside it, masked or not, so "
        "samples cannot be run in padded batches; this target cannot be cached"
    )
