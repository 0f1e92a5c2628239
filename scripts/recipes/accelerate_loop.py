"""Accelerate: the loader divides the epoch itself, so it is not prepared; its place is in save_state.

accelerate launch scripts/recipes/accelerate_loop.py CACHE OUT STEPS
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from draft import DraftWithLoss, fields, log

from cache_format import FeatureCache

SAVE_EVERY = 3


class Progress:
    """Steps done, for save_state."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def main(cache_path: str, out: str, steps: str) -> None:
    accelerator, cache = Accelerator(gradient_accumulation_steps=2), FeatureCache.open(cache_path)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loader = cache.loader(4, shuffle=True, seed=0, device=accelerator.device, **ranks)
    model = DraftWithLoss(cache)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    progress, saved = Progress(), Path(out) / "checkpoint"
    accelerator.register_for_checkpointing(loader, progress)
    if saved.exists():
        accelerator.load_state(str(saved))
    while progress.step < int(steps):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**fields(batch))["loss"]
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            if accelerator.is_main_process:
                log(out, progress.step, loss)
            if progress.step % SAVE_EVERY == 0:
                accelerator.save_state(str(saved))
            if progress.step == int(steps):
                break


if __name__ == "__main__":
    main(*sys.argv[1:])
