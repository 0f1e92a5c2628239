"""Is what an engine captures what was asked for? Tried out on a few tokens at the start, not assumed.

A small target is run by transformers too and compared layer by layer. Of every target: the states are finite, those of
different layers differ, a sample gives the same alone, again, and beside others, and so does its beginning; and batches
as large as they may be are one step of the engine.
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
from extractor.target.vllm.engine import Engine, EngineError, largest_steps
from extractor.terminal.progress import say

PROBED_TOKENS = 48

TOLERANCE = {**PROBE_TOLERANCE, torch.float32: 5e-5}
"""Largest difference, as a share of a token's state, that passes as rounding: another GELU is off by 2e-4."""

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
    # Five rows, three of them whole, fit into a step where it has room for more than a few tokens.
    length = max(1, min(PROBED_TOKENS, longest, backend.most_tokens // 5))
    ids = _random_ids(shape, 2 * length).view(2, length)
    alone = _states(backend, ids[:1], [length])
    finite = alone.isfinite().all(-1).all(0)
    if not finite.all():
        where = backend.checked[int((~finite).nonzero()[0])]
        raise InputError(
            f"--backend vllm: NaN or Inf at {where}: the weight files lack a tensor, or {backend.dtype} has not the "
            "range for this target (try --dtype bfloat16 or float32)"
        )
    for (one, layer), (other, later) in itertools.combinations(enumerate(backend.target_layer_ids), 2):
        if torch.equal(alone[:, one], alone[:, other]):
            raise InputError(f"--backend vllm: vLLM gives the same states for layers {layer} and {later}")
    again = _states(backend, ids[:1], [length])
    _require_near(again, alone, backend, "a sample gives other states a second time")
    lengths = [max(1, length // 2), length, 1, length, max(1, length // 3)]
    beside = _states(backend, ids[[1, 0, 0, 0, 0]], lengths).split(lengths)
    # One token alone and a twin are what kernels and schedulers may treat in ways of their own.
    for states in beside[1:]:
        _require_near(states, alone[: len(states)], backend, f"{len(states)} tokens give other states beside others")
    if quantised:
        say("not compared with transformers: the weights are quantised")
    elif weights.num_bytes() > SMALL_BYTES:
        say(f"not compared with transformers: the weight files are over {SMALL_BYTES >> 30} GiB")
    else:
        _compare(backend, target, alone, ids[:1])


def prove_room(engine: Engine, shape: TargetShape, longest: int) -> None:
    """Run batches as large as they may be: memory and the scheduler's limits are tried out, not computed.

    Args:
        engine: to try out.
        shape: of its target.
        longest: tokens of the longest sample.

    Raises:
        InputError: it has no room for them.
    """
    for lengths in largest_steps(engine.most_tokens, engine.block_tokens, longest):
        ids = _random_ids(shape, sum(lengths))
        try:
            for _ in engine.run([part.numpy() for part in ids.split(lengths)]):
                pass
        except EngineError as error:
            raise InputError(
                f"{error}. This was the start, with {len(lengths):,} rows of {lengths[0]:,} random tokens, as many as "
                "--batch-tokens allows: begin another cache with fewer"
            ) from error


def _random_ids(shape: TargetShape, count: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    # Special tokens, which may stand for images, are at either end of a vocabulary.
    return torch.randint(shape.vocab_size // 4, shape.vocab_size // 2 + 1, (count,), generator=random)


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
    if not by_layer[worst] <= TOLERANCE[backend.dtype]:
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
