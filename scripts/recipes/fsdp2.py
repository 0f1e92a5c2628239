"""FSDP2 under torchrun: each rank takes its batches of the epoch by itself; checkpoints resume on any number of ranks.

torchrun --nproc-per-node 2 scripts/recipes/fsdp2.py CACHE OUT STEPS
"""

import json
import sys
from pathlib import Path

import torch
from draft import DraftWithLoss, fields, log
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cache_format import FeatureCache

SAVE_EVERY = 3


def main(cache_path: str, out: str, steps: str) -> None:
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    cache, saved = FeatureCache.open(cache_path), sorted(Path(out).glob("step-*/position.json"))
    model = DraftWithLoss(cache).to(device)
    for layer in (*model.draft.layers, model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Rank and world size are those of torch.distributed.
    loader, step = cache.loader(4, shuffle=True, seed=0, device=device), 0
    if saved:
        weights = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(weights, checkpoint_id=saved[-1].parent)
        set_state_dict(model, optimizer, model_state_dict=weights["model"], optim_state_dict=weights["optimizer"])
        position = json.loads(saved[-1].read_text())
        step = position["step"]
        loader.load_state_dict(position["loader"])
    while step < int(steps):
        for batch in loader:
            loss = model(**fields(batch))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            mean = loss.detach() / distributed.get_world_size()
            distributed.all_reduce(mean)
            if distributed.get_rank() == 0:
                log(out, step, mean)
            if step % SAVE_EVERY == 0:
                folder = Path(out) / f"step-{step:06d}"
                weights = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                checkpoint.save(weights, checkpoint_id=folder)
                # Last: with it the checkpoint counts. Its loader's state is the same on every rank.
                (folder / "position.json").write_text(json.dumps({"step": step, "loader": loader.state_dict()}))
            if step == int(steps):
                break


if __name__ == "__main__":
    distributed.init_process_group()
    try:
        main(*sys.argv[1:])
    finally:
        distributed.destroy_process_group()
