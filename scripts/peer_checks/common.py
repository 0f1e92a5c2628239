"""What each check begins and ends with: the target, its states now, and the line that is printed."""

from __future__ import annotations

from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from cache_format import FeatureCache

LAYERS = [1, 3, 4]
"""The layers that every draft is conditioned on; the cache has the target's last, 5, beside."""


def target_of(work: Path) -> Any:
    """The target itself, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(work / "tiny", dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def online(target: Any, ids: torch.Tensor, layers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, S, L*H]`` of ``layers``, and what the head takes, of a forward pass now."""
    states: dict[int, torch.Tensor] = {}
    hooks = [
        target.model.layers[i].register_forward_hook(lambda _m, _i, out, i=i: states.__setitem__(i, out))
        for i in layers
    ]
    last = target.model(input_ids=ids).last_hidden_state
    for hook in hooks:
        hook.remove()
    return torch.cat([states[i] for i in layers], -1), last


@torch.no_grad()
def awake(draft: torch.nn.Module) -> Any:
    """``draft`` with weights five times as large: of a fresh one the states hardly reach the loss."""
    for weight in draft.parameters():
        if weight.requires_grad:
            weight.mul_(5)
    return draft


def late(states: torch.Tensor) -> torch.Tensor:
    """``[B, S, W]`` a token late: wrong ones, which a loss has to tell."""
    return states.roll(1, 1)


def told(draft: str, losses: list[tuple[float, ...]]) -> None:
    """A line; fails where a loss is not that of the target's own states, or is the same for wrong states.

    Args:
        draft: its name.
        losses: of each batch, from the cache, online, and online with each kind of states in turn :func:`late`.
    """
    assert all(map(isfinite, chain(*losses))), losses
    off = [[abs(loss - there) / abs(there) for loss in (here, *wrong)] for here, there, *wrong in losses]
    worst, *wrong = (max(column) for column in zip(*off, strict=True))
    print(
        f"{draft}: {len(losses)} losses {losses[0][0]:.4f} ... {losses[-1][0]:.4f}, at most {worst:.1e} from online;"
        f" of states a token late {', '.join(f'{of_wrong:.1e}' for of_wrong in wrong)}"
    )
    assert worst < 1e-6, losses
    assert min(wrong) > 5e-5, losses


def same_records(name: str, ours: Any, theirs: Any) -> None:
    """A line; fails where a record is not, bit for bit, what the project's own reader gives of an export."""
    assert len(ours) == len(theirs) > 0
    for i in range(len(ours)):
        one, other = ours[i], theirs[i]
        assert set(one) == set(other), (sorted(one), sorted(other))
        for key, value in other.items():
            same = (
                torch.equal(one[key], value) and one[key].dtype == value.dtype
                if torch.is_tensor(value)
                else one[key] == value
            )
            assert same, (i, key, one[key], value)
    print(f"{name}: {len(ours)} records equal to those of its own reader, of an export")


def exported(work: Path, to: str, **seen: Any) -> Path:
    """An export of the cache, made once."""
    from cache_format.export import LAYOUTS, export, seen_by

    cache = seen_by(
        LAYOUTS[to], FeatureCache.open(work / "cache", verify="sample"), seen.get("layers"), seen.get("dtype")
    )
    export(cache, LAYOUTS[to], work / f"export-{to}")
    return work / f"export-{to}"
