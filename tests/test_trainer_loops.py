"""The loops of cache_format/TRAINERS.md ("A loop to copy"), run as they stand; only path and device are replaced.

With stand-ins for the projects' own drafts and loops always; with the projects themselves where they are installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from jobs import LAYER_IDS
from torch import Tensor, nn
from torch.nn import functional as F

from cache_format import DFlashTargetBatch, FeatureCache, InputError

ROOT = Path(__file__).resolve().parent.parent
TRAINERS = ROOT / "cache_format" / "TRAINERS.md"


def loop(title: str, cache: Path) -> str:
    """The code below ``**title**`` in "A loop to copy", for a cache and the CPU."""
    section = TRAINERS.read_text().split("\n## A loop to copy\n")[1].split("\n## ")[0]
    lines = section.split(f"**{title}**")[1].split("\n**")[0].splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    assert '"/data/cache"' in code
    return code.replace('"/data/cache"', repr(str(cache))).replace('"cuda"', '"cpu"').split("\ndflash-cache ")[0]


class Draft(nn.Module):
    """A stand-in: guesses the next token from the token and the target's states."""

    block_size = 8

    def __init__(self, layer_ids: list[int], hidden_size: int):
        super().__init__()
        torch.manual_seed(0)
        self.target_layer_ids = layer_ids
        self.fuse = nn.Linear(len(layer_ids) * hidden_size, hidden_size)
        self.seen: list[int] = []
        """real tokens of each batch"""
        self.losses: list[float] = []

    def loss(self, embed: nn.Module, head: nn.Module, ids: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy over the learned tokens."""
        assert (ids.dtype, mask.dtype, states.shape) == (torch.int64, torch.int64, (*ids.shape, self.fuse.in_features))
        logits = head(embed(ids) + self.fuse(states))[:, :-1].flatten(0, 1)
        weights = mask[:, 1:].flatten().float()
        loss = (F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none") * weights).sum() / weights.sum()
        self.seen.append(int((states != 0).any(-1).sum()))
        self.losses.append(float(loss.detach()))
        return loss

    def has_learned(self) -> bool:
        """The loss fell."""
        return sum(self.losses[-3:]) < sum(self.losses[:3]) - 0.06


@pytest.fixture
def draft(made) -> Draft:
    cache = FeatureCache.open(made)
    return Draft(cache.target_layer_ids, cache.hidden_size)


def check(draft: Draft, cache: Path, epochs: int) -> None:
    """Every token of every sample was seen once an epoch, and the draft has learned."""
    assert sum(draft.seen) == epochs * FeatureCache.open(cache).manifest.totals.tokens
    assert draft.has_learned()


def test_plain_pytorch(made, draft):
    names = {
        "draft": draft,
        "optimizer": torch.optim.AdamW(draft.parameters(), lr=1e-2),
        "loss_of": lambda draft, embed, head, batch: draft.loss(
            embed, head, batch.input_ids, batch.hidden_states, batch.loss_mask
        ),
    }
    exec(loop("Plain PyTorch.", made), names)
    check(draft, made, epochs=6)
    assert isinstance(names["batch"], DFlashTargetBatch)
    assert names["loader"].state_dict()["epoch"] == 6


class Recipe:
    """A stand-in for NeMo's TrainDFlashRecipe: the same seams, called in the same order, by the same names."""

    def __init__(self, cfg: types.SimpleNamespace):
        self.cfg = cfg

    def setup(self) -> None:
        self.device, self.compute_dtype = torch.device("cpu"), torch.float32
        self.dist_env = types.SimpleNamespace(world_size=1)
        self.target_model = self._build_target_model({}, "target", None)
        assert self.target_model.config._attn_implementation == "sdpa"
        self.target_wrapper = self._build_target_wrapper(list(self.cfg.target_layer_ids))
        module = sys.modules["nemo_automodel.recipes.llm.train_dflash"]
        options = {"seq_length": 256, "batch_size": 4, "shuffle_seed": 1, "packed_sequence_size": self.cfg.packed}
        self.train_dataloader = module.build_eagle3_dataloader(data_path="unused", shuffle=True, **options)
        self.val_dataloader = None
        self.draft: Draft = self.cfg.draft
        self.embed, self.head = self.target_model.get_input_embeddings(), self.target_model.get_output_embeddings()
        self.optimizer = torch.optim.AdamW(self.draft.parameters(), lr=1e-2)
        self.steps, self._resume_epoch, self.evaluated = len(self.train_dataloader), 0, 0
        if self.cfg.restore_from:
            self._load_extra_state(self.cfg.restore_from)

    def _save_extra_state(self, path: str, epoch: int) -> None:
        (Path(path) / "meta.json").write_text(json.dumps(epoch))

    def _load_extra_state(self, path: str) -> None:
        self._resume_epoch = json.loads((Path(path) / "meta.json").read_text())

    def _batches(self, dataloader):
        for batch in dataloader:
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            target_batch = self.target_wrapper.generate_batch(**batch)
            assert torch.equal(target_batch.input_ids, batch["input_ids"])
            assert (target_batch.seq_lens is None) == (not self.cfg.packed)
            yield target_batch

    def _run_eval(self):
        if self.val_dataloader is not None:
            self.evaluated += sum(len(batch.input_ids) for batch in self._batches(self.val_dataloader))

    def run_train_validation_loop(self) -> None:
        for epoch in range(self._resume_epoch, 2):
            self.train_dataloader.sampler.set_epoch(epoch)
            steps = len(self.train_dataloader)
            for step, batch in enumerate(self._batches(self.train_dataloader)):
                ids, states, mask = batch.input_ids, batch.hidden_states, batch.loss_mask
                self.draft.loss(self.embed, self.head, ids, states, mask).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                if step + 1 == self.cfg.stop_after:
                    self._save_extra_state(self.cfg.folder, epoch=epoch)
                    return
            assert step + 1 == steps
            self._run_eval()
        assert self.target_wrapper.target_layer_ids == self.cfg.target_layer_ids, "it goes into checkpoints"


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    """Put module ``name`` in place of the real one, its parents too."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__path__ = []
        if end > 1:
            setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(sys.modules[name]).update(content)


@pytest.fixture
def nemo(monkeypatch, draft):
    """The stand-in in NeMo's place; gives its configuration."""
    options = {"draft": draft, "target_layer_ids": LAYER_IDS, "packed": 0, "restore_from": "", "stop_after": None}
    cfg = types.SimpleNamespace(**options)
    cfg.get = lambda name, default: default
    stand_in(
        monkeypatch,
        "nemo_automodel.recipes.llm.train_dflash",
        TrainDFlashRecipe=Recipe,
        build_eagle3_dataloader=None,
        parse_args_and_load_config=lambda path: cfg,
    )
    return cfg


def test_nemo_automodel(made, draft, nemo):
    names: dict = {}
    exec(loop("NeMo AutoModel", made).replace("validation=0.02", "validation=0.25"), names)
    recipe, cache = names["recipe"], FeatureCache.open(made)
    held_out = cache.loader(1, split=("validation", 0.25))
    assert recipe.evaluated == 2 * len(held_out) > 0
    assert sum(draft.seen) == 2 * (cache.manifest.totals.tokens - sum(b.input_ids.numel() for b in held_out))
    assert draft.has_learned()
    with pytest.raises(InputError, match="other tokens"):
        recipe.target_wrapper.generate_batch(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    nemo.target_layer_ids = [0, 2, 5]
    with pytest.raises(InputError, match="layer 5 is not in this cache"):
        exec(loop("NeMo AutoModel", made), {})


def test_nemo_goes_on_where_its_checkpoint_stood(made, draft, nemo, tmp_path):
    from cache_format.adapters.nemo import from_cache

    cache = FeatureCache.open(made)
    nemo.folder, nemo.stop_after = str(tmp_path), 3
    for nemo.restore_from in ("", str(tmp_path)):
        recipe = from_cache(Recipe, cache)(nemo)
        recipe.setup()
        recipe.run_train_validation_loop()
        nemo.stop_after = None
    check(draft, made, epochs=2)


def test_nemo_packs_and_takes_fewer_layers(made, nemo):
    from cache_format.adapters.nemo import from_cache

    cache = FeatureCache.open(made)
    nemo.packed, nemo.target_layer_ids = 256, LAYER_IDS[:2]
    nemo.draft = Draft(LAYER_IDS[:2], cache.hidden_size)
    recipe = from_cache(Recipe, cache)(nemo)
    recipe.setup()
    recipe.run_train_validation_loop()
    assert sum(nemo.draft.seen) == 2 * cache.manifest.totals.tokens
    with pytest.raises(InputError, match="--capture last_hidden_states"):
        from_cache(Recipe, cache, logits=True)


class TrainBatch:
    """A stand-in for SpecForge's."""

    def __init__(self, sample_ids: list[str], strategy: str, tensors: dict[str, Tensor], metadata: dict):
        self.sample_ids, self.strategy, self.tensors, self.metadata = sample_ids, strategy, tensors, metadata


class Controller:
    """A stand-in for SpecForge's TrainerController around its DFlashTrainStrategy."""

    def __init__(self, draft: Draft, embed: nn.Module, head: nn.Module):
        self.draft, self.embed, self.head = draft, embed, head
        self.optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)

    def fit(self, data) -> None:
        for epoch in range(2):
            data.set_epoch(epoch)
            for batch in data:
                tensors = batch.tensors
                assert set(tensors) == {"input_ids", "loss_mask", "hidden_states"}
                assert (batch.strategy, len(batch.sample_ids)) == ("dflash", len(tensors["input_ids"]))
                ids, states, mask = tensors["input_ids"], tensors["hidden_states"], tensors["loss_mask"]
                self.draft.loss(self.embed, self.head, ids, states, mask).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()


def test_specforge(made, draft, monkeypatch):
    stand_in(monkeypatch, "specforge.runtime.contracts", TrainBatch=TrainBatch)
    cache = FeatureCache.open(made)
    controller = Controller(draft, cache.get_input_embeddings(), cache.get_output_embeddings())
    exec(loop("SpecForge", made), {"draft": draft, "controller": controller})
    learned = cache.index.num_loss_tokens >= 16
    assert 0 < learned.sum() < len(cache)
    assert sum(draft.seen) == 2 * cache.index.num_tokens[learned].sum()
    assert draft.has_learned()


# The projects' own classes, where they are installed.


@pytest.mark.slow
def test_nemo_automodel_itself(made, tiny_target, tmp_path):
    """NeMo's DFlash recipe as it is: its draft, mask, loss and optimizer, on the CPU."""
    pytest.importorskip("nemo_automodel")
    options = {
        "dist_env": {"backend": "gloo"},
        "recipe_args": {
            "target_model_name_or_path": str(tiny_target),
            "target_layer_ids": LAYER_IDS,
            "train_data_path": "unused",
            "output_dir": str(tmp_path),
            "micro_batch_size": 4,
            "seq_length": 256,
            "num_epochs": 2,
            "mask_token_id": 5,
            "block_size": 8,
            "num_anchors": 8,
            "draft_num_hidden_layers": 3,
            "attention_backend": "sdpa",
        },
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"enabled": False, "checkpoint_dir": str(tmp_path)},
    }
    (tmp_path / "dflash.yaml").write_text(json.dumps(options))
    script = tmp_path / "train_from_cache.py"
    script.write_text(loop("NeMo AutoModel", made).replace("validation=0.02", "validation=0.0"))
    command = [sys.executable, script, "--config", tmp_path / "dflash.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    steps = -(-len(FeatureCache.open(made)) // 4)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Finished epoch 2/2 completed_steps={steps}" in done.stdout + done.stderr


@pytest.mark.slow
def test_specforge_itself(made, tmp_path, monkeypatch):
    """SpecForge's draft, model, strategy and controller, on the CPU."""
    pytest.importorskip("specforge")
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
    from specforge.modeling.draft.dflash import DFlashDraftModel
    from specforge.training.backend import FSDPTrainingBackend, ParallelConfig
    from specforge.training.controller import TrainerController, TrainerCore
    from specforge.training.strategies.base import DFlashTrainStrategy
    from transformers import Qwen3Config

    cache = FeatureCache.open(made)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        vocab_size=2048,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_implementation="sdpa",
        block_size=8,
        num_target_layers=6,
        dflash_config={"target_layer_ids": LAYER_IDS},
    )
    draft = DFlashDraftModel(config)
    head, embed = cache.get_output_embeddings(), cache.get_input_embeddings()
    model = OnlineDFlashModel(
        draft, head, embed, mask_token_id=5, block_size=8, attention_backend="sdpa", num_anchors=8
    )

    class Optimizer:
        """What the backend steps."""

        def __init__(self) -> None:
            self.inner, self.steps = torch.optim.AdamW(draft.parameters(), lr=1e-3), 0

        def step(self) -> Tensor:
            norm = nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            self.inner.step()
            self.inner.zero_grad()
            self.steps += 1
            return norm

    backend, optimizer = FSDPTrainingBackend(ParallelConfig()), Optimizer()
    backend.prepare_model(model, wrap=False)
    backend.set_optimizer(optimizer)
    losses: list[float] = []
    controller = TrainerController(
        TrainerCore(DFlashTrainStrategy(model), backend),
        run_id="cache",
        output_dir=str(tmp_path),
        num_epochs=2,
        log_interval=1,
        logger=lambda metrics, step: losses.append(float(metrics.get("loss", metrics.get("train/loss", "nan")))),
    )
    exec(loop("SpecForge", made), {"draft": draft, "controller": controller})
    learned = int((cache.index.num_loss_tokens >= 16).sum())
    assert optimizer.steps == 2 * -(-learned // 4)
    assert losses[-1] < losses[0], losses
