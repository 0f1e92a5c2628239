"""A loop of one's own: gradient accumulation, a checkpoint in mid-epoch, and on from there by the same command.

python scripts/recipes/torch_loop.py CACHE OUT STEPS
"""

import json
import sys
from pathlib import Path

import torch
from draft import DraftWithLoss, fields, log
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from cache_format import FeatureCache

ACCUMULATE, SAVE_EVERY = 2, 3


def main(cache_path: str, out: str, steps: str) -> None:
    cache, saved = FeatureCache.open(cache_path), sorted(Path(out).glob("step-*/position.json"))
    model = DraftWithLoss(cache)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader, step = cache.loader(4, shuffle=True, seed=0), 0
    if saved:
        weights = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(weights, checkpoint_id=saved[-1].parent)
        set_state_dict(model, optimizer, model_state_dict=weights["model"], optim_state_dict=weights["optimizer"])
        position = json.loads(saved[-1].read_text())
        step = position["step"]
        loader.load_state_dict(position["loader"])
    micro = 0
    while step < int(steps):
        for batch in loader:
            micro += 1
            loss = model(**fields(batch))["loss"]
            (loss / ACCUMULATE).backward()
            if micro % ACCUMULATE:
                continue
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            log(out, step, loss)
            if step % SAVE_EVERY == 0:
                folder = Path(out) / f"step-{step:06d}"
                weights = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                checkpoint.save(weights, checkpoint_id=folder)
                # Last: with it the checkpoint counts. Its loader's state is the same on every rank.
                (folder / "position.json").write_text(json.dumps({"step": step, "loader": loader.state_dict()}))
            if step == int(steps):
                break


if __name__ == "__main__":
    main(*sys.argv[1:])
