"""Lightning: the loader as a train_dataloader. Its state goes into Lightning's checkpoint.

python scripts/recipes/lightning_loop.py CACHE OUT STEPS
"""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from draft import DraftWithLoss, fields, log
from lightning.pytorch.callbacks import ModelCheckpoint

from cache_format import DFlashTargetBatch, FeatureCache

SAVE_EVERY = 3


class Module(lightning.LightningModule):
    def __init__(self, cache: FeatureCache, out: str):
        super().__init__()
        self.model, self.out = DraftWithLoss(cache), out
        self.batches = cache.loader(4, shuffle=True, seed=0)

    def train_dataloader(self) -> Any:
        return self.batches

    def training_step(self, batch: DFlashTargetBatch, _: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**fields(batch))["loss"]
        log(self.out, self.global_step + 1, loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


def main(cache_path: str, out: str, steps: str) -> None:
    saved = Path(out) / "checkpoint"
    trainer = lightning.Trainer(
        max_steps=int(steps),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(saved, save_last=True, every_n_train_steps=SAVE_EVERY)],
    )
    last = saved / "last.ckpt"
    trainer.fit(Module(FeatureCache.open(cache_path), out), ckpt_path=str(last) if last.exists() else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
