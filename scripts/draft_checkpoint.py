"""A draft's training in a file, to go on with: what comes is what would have come without the interruption.

Weights, both moments of Adam, the state of the generator of anchors and the losses so far, as safetensors; the file is
there whole or not at all.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from train_draft import Trainer

_DRAFT, _ADAM = "draft.", "adam."


def save(trainer: Trainer, losses: list[float], seconds: float, path: Path) -> None:
    """``losses`` of the steps done and the processor seconds that they took, with all that the next step needs."""
    moments = {
        f"{_ADAM}{number}.{name}": tensor
        for number, of_weight in trainer.optimizer.state_dict()["state"].items()
        for name, tensor in of_weight.items()
    }
    weights = {_DRAFT + name: tensor for name, tensor in trainer.draft.state_dict().items()}
    more = {
        "anchors": trainer.generator.get_state(),
        "losses": torch.tensor(losses, dtype=torch.float64),
        "seconds": torch.tensor(seconds, dtype=torch.float64),
    }
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in (weights | moments | more).items()}, temporary)
    os.replace(temporary, path)


def restore(trainer: Trainer, path: Path) -> tuple[list[float], float]:
    """Bring ``trainer`` to where :meth:`save` was called; the losses and seconds until then. No file: the beginning."""
    if not path.exists():
        return [], 0.0
    found = load_file(path)
    weights = {name.removeprefix(_DRAFT): tensor for name, tensor in found.items() if name.startswith(_DRAFT)}
    trainer.draft.load_state_dict(weights)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name in (name for name in found if name.startswith(_ADAM)):
        _, number, which = name.split(".")
        moments.setdefault(int(number), {})[which] = found[name]
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": moments})
    trainer.generator.set_state(found["anchors"])
    losses = found["losses"].tolist()
    trainer.steps_done = len(losses)
    return losses, float(found["seconds"])
