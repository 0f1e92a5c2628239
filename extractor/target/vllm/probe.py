"""Is what an engine captures what was asked for? Tried out on a few tokens at the start, not assumed.

A small target is run by transformers too and compared layer by layer. Of every target: the states are finite, those of
different layers differ, and a sample gives the same alone, again, and beside others.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cache_format.device import CPU
from cache_format.errors import InputError
from cache_format.layout.captures import LAST_HIDDEN_STATES
from extractor.config import TargetOptions
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.load_target import TargetShape, load_target
from extractor.target.padding import PROBE_TOLERANCE
from extractor.target.stored_embeddings import StoredWeights
from extractor.target.transformers_backend import UNMASKED, TransformersBackend
from extractor.target.vllm.backend import VllmBackend
from extractor.terminal.progress import say

PROBED_TOKENS = 48

SMALL_BYTES = 4 << 30
"""Weight files up to this size are loaded by transformers too."""


def prove(
    backend: VllmBackend,
    target: TargetOptions,
    weights: StoredWeights,
    shape: TargetShape,
    *,
    quantised: bool,
    longest: int,
) -> None:
    """Try the engine out.

    Args:
        backend: with its engine.
        target: that it runs.
        weights: their size decides whether transformers runs it too.
        shape: of the target.
        quantised: whether the weights are stored so; they are not loaded by transformers then.
        longest: tokens of the longest sample.

    Raises:
        InputError: it gives other states than were asked for; says which.
    """
    # Two rows, one half as long, fit into a step.
    length = max(1, min(PROBED_TOKENS, longest, 2 * backend.most_tokens // 3))
    random = torch.Generator().manual_seed(0)
    # Special tokens, which may stand for images, are at either end of a vocabulary.
    ids = torch.randint(shape.vocab_size // 4, shape.vocab_size // 2 + 1, (2, length), generator=random)
    alone = _states(backend, ids[:1], [length])
    finite = alone.isfinite().all(-1).all(0)
    if not finite.all():
        where = backend.checked[int((~finite).nonzero()[0])]
        raise InputError(f"--backend vllm: NaN or Inf at {where}; try --dtype bfloat16 or float32")
    for (one, layer), (other, later) in itertools.combinations(enumerate(backend.target_layer_ids), 2):
        if torch.equal(alone[:, one], alone[:, other]):
            raise InputError(f"--backend vllm: vLLM gives the same states for layers {layer} and {later}")
    shorter = max(1, length // 2)
    beside = _states(backend, ids.flip(0), [shorter, length])
    found = {"a second time": _states(backend, ids[:1], [length]), "beside others": beside[shorter:]}
    for how, states in found.items():
        _require_near(states, alone, backend, f"a sample gives other states {how}")
    if not quantised and weights.num_bytes() <= SMALL_BYTES:
        _compare(backend, target, alone, ids[:1])


def _compare(backend: VllmBackend, target: TargetOptions, alone: Tensor, ids: Tensor) -> None:
    """Refuse other states than those of the same target in transformers."""
    try:
        model = load_target(
            target.name,
            revision=target.revision,
            dtype=backend.dtype,
            device=CPU,
            attn_implementation=None,
            trust_remote_code=target.trust_remote_code,
        )
    except InputError as error:
        say(f"not compared with transformers, which cannot load it: {error}")
        return
    hooked = HFDFlashTargetModel(model, backend.target_layer_ids)
    expected = _states(TransformersBackend(hooked, UNMASKED, backend.captures), ids, [ids.shape[1]])
    _require_near(alone, expected, backend, "other states than transformers gives")
    say("its states are those of transformers, tried out on one sample")


def _require_near(states: Tensor, expected: Tensor, backend: VllmBackend, what: str) -> None:
    """Every token in float32; in lower precision most of them, for a few may be routed to other experts."""
    errors = (states.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-20)
    by_layer = errors.amax(0) if backend.dtype == torch.float32 else errors.median(0).values
    worst = int(by_layer.nan_to_num(float("inf")).argmax())
    if not by_layer[worst] <= PROBE_TOLERANCE[backend.dtype]:
        raise InputError(
            f"--backend vllm: {what} at {backend.checked[worst]}: off by {float(by_layer[worst]):.2g} of a token's "
            "norm. Either vLLM or transformers does not compute this target as it was trained; use --backend "
            "transformers if in doubt"
        )


def _states(backend: VllmBackend | TransformersBackend, ids: Tensor, lengths: list[int]) -> Tensor:
    """``[tokens, L, H]``"""
    out, extra = backend.row_memory(sum(lengths), CPU)
    backend.forward(ids, lengths, out, extra)
    states = out.view(len(out), len(backend.target_layer_ids), -1)
    last = extra.get(LAST_HIDDEN_STATES)
    return states if last is None else torch.cat([states, last[:, None]], dim=1)
