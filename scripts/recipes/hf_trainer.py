"""transformers' Trainer: the loader in place of its DataLoader, its place kept in the Trainer's own checkpoints.

python scripts/recipes/hf_trainer.py CACHE OUT STEPS
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from draft import DraftWithLoss, fields, log
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from cache_format import FeatureCache
from cache_format.reading.loader import CacheLoader


class Fields:
    """Batches as the Trainer wants them: dicts."""

    def __init__(self, loader: CacheLoader):
        self.loader, self.set_epoch = loader, loader.set_epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(fields, self.loader)


class CacheTrainer(Trainer):
    loader: CacheLoader

    def get_train_dataloader(self) -> Any:
        return Fields(self.loader)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        log(self.args.output_dir, self.state.global_step + 1, loss)
        return loss


class SavePlace(TrainerCallback):
    def __init__(self, loader: CacheLoader):
        self.loader = loader

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "loader.json").write_text(
            json.dumps(self.loader.state_dict())
        )


def main(cache_path: str, out: str, steps: str) -> None:
    cache = FeatureCache.open(cache_path)
    options = {"max_steps": int(steps), "save_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    # The loader goes to its place by itself.
    arguments = TrainingArguments(out, ignore_data_skip=True, report_to="none", disable_tqdm=True, **options)
    trainer = CacheTrainer(DraftWithLoss(cache), arguments)
    trainer.loader = cache.loader(4, shuffle=True, seed=0)
    trainer.add_callback(SavePlace(trainer.loader))
    last = get_last_checkpoint(out) if Path(out).is_dir() else None
    if last:
        trainer.loader.load_state_dict(json.loads((Path(last) / "loader.json").read_text()))
    trainer.train(resume_from_checkpoint=last)


if __name__ == "__main__":
    main(*sys.argv[1:])
