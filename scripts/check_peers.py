"""Other projects' own drafts and losses, fed from a cache by cache_format.adapters and by the target itself.

    python scripts/check_peers.py WORK nemo specforge speculators deepspec modelopt angelslim

Run by scripts/test_peers.sh, which makes the environment and WORK: ``tiny``, a target, and ``cache``, made of it with
layers 1, 3, 4 and 5 (its last) and last hidden states. Prints, of each draft, how far the losses are apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from cache_format import FeatureCache

LAYERS = [1, 3, 4]
DRAFTS = {"markov_rank": 8, "markov_head_type": "vanilla", "emb_dim": 8, "gru_hidden_dim": 8}
"""What SpecForge's Domino and DSpark drafts ask for beside."""


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


def told(draft: str, pairs: list[tuple[float, float]]) -> None:
    """A line; fails where a loss is not that of the target's own states."""
    worst = max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs)
    print(f"{draft}: {len(pairs)} losses {pairs[0][0]:.4f} ... {pairs[-1][0]:.4f}, at most {worst:.1e} from online")
    assert worst < 1e-5, pairs


def loss_of(trainer: Any, batch: Any) -> float:
    """A loss of NeMo's recipe or SpecForge's strategy, with the anchors that seed 0 draws."""
    torch.manual_seed(0)
    step = trainer._run_trainer_step if hasattr(trainer, "_run_trainer_step") else trainer.forward_loss
    return float(step(batch).loss.detach())


def nemo(work: Path) -> None:
    """DFlash and JetSpec: the recipe from the cache, a validation, a resume in mid-epoch, and its losses online."""
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.components.speculative.dflash.target import HFDFlashTargetModel
    from nemo_automodel.recipes.llm.train_dflash import TrainDFlashRecipe
    from nemo_automodel.recipes.llm.train_dflash2 import TrainDFlash2Recipe
    from nemo_automodel.recipes.llm.train_domino import TrainDominoRecipe
    from nemo_automodel.recipes.llm.train_jetspec import TrainJetSpecRecipe

    from cache_format.adapters.nemo import from_cache

    cache, target = FeatureCache.open(work / "cache"), target_of(work)

    def recipe(kind: Any, out: str, epochs: int, packed: int = 0, **options: Any) -> Any:
        config = {
            "dist_env": {"backend": "gloo"},
            "recipe_args": {
                "target_model_name_or_path": str(work / "tiny"),
                "target_layer_ids": LAYERS,
                "train_data_path": "unused",
                "output_dir": str(work / out),
                "micro_batch_size": 2,
                "seq_length": 128,
                "num_epochs": epochs,
                "mask_token_id": 5,
                "block_size": 4,
                "num_anchors": 8,
                "draft_num_hidden_layers": 1,
                "attention_backend": "sdpa",
                "ckpt_every_steps": 5,
                "packed_sequence_size": packed,
                "log_every_steps": 1,
            },
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"enabled": True, "checkpoint_dir": str(work / out), "save_consolidated": False},
        }
        made = from_cache(kind, cache, **options)(ConfigNode(config))
        made.setup()
        return made

    for kind, options in (
        (TrainDFlashRecipe, {"validation": 0.25}),
        (TrainDFlashRecipe, {"packed": 160}),
        (TrainDFlash2Recipe, {}),
        (TrainDominoRecipe, {}),
        (TrainJetSpecRecipe, {"logits": True}),
    ):
        name = kind.__name__.removeprefix("Train").removesuffix("Recipe") + (" packed" if "packed" in options else "")
        made, pairs = recipe(kind, name, 1, **options), []
        loss = partial(loss_of, made)
        wrapper = HFDFlashTargetModel(target, LAYERS, capture_logits="logits" in options)
        for tokens in made.train_dataloader:
            batches = made.target_wrapper.generate_batch(**tokens), wrapper.generate_batch(**tokens)
            pairs.append(tuple(map(loss, batches)))
        told(f"NeMo {name}", pairs[:12])
    made = recipe(TrainDFlashRecipe, "resumed", 1, validation=0.25)
    whole = len(made.train_dataloader)
    seen: list[list[int]] = []
    step, made._run_trainer_step = made._run_trainer_step, lambda b: seen.append(b.input_ids[:, 3].tolist()) or step(b)
    save = made._maybe_save_step_checkpoint

    def stop(epoch: int) -> bool:
        if save(epoch):
            raise KeyboardInterrupt
        return False

    made._maybe_save_step_checkpoint = stop
    with suppress(KeyboardInterrupt):
        made.run_train_validation_loop()
    again = recipe(TrainDFlashRecipe, "resumed", 1, validation=0.25)
    assert len(again.train_dataloader) == whole - 5, (len(again.train_dataloader), whole)
    step_again = again._run_trainer_step
    again._run_trainer_step = lambda b: (
        (again.trainer_module.training and seen.append(b.input_ids[:, 3].tolist())) or (step_again(b))
    )
    again.run_train_validation_loop()
    straight = [
        b.input_ids[:, 3].tolist() for b in recipe(TrainDFlashRecipe, "x", 1, validation=0.25).train_dataloader.sampler
    ]
    assert seen == straight, (len(seen), len(straight))
    assert set(again._run_eval()) >= {"val_loss"}
    print(f"NeMo DFlash: stopped after 5 of {whole} steps and resumed there; validated on samples of its own")


def specforge(work: Path) -> None:
    """DFlash, Domino and DSpark."""
    from specforge.algorithms.common import dflash_family_model as models
    from specforge.modeling.draft.dflash import DFlashDraftModel
    from specforge.modeling.draft.domino import DominoDraftModel
    from specforge.modeling.draft.dspark import DSparkDraftModel
    from specforge.training.strategies import base as strategies
    from transformers import Qwen3Config

    from cache_format.adapters.specforge import Batches

    cache, target = FeatureCache.open(work / "cache").view(layers=LAYERS), target_of(work)
    shape = target.config
    head, embed = cache.get_output_embeddings(), cache.get_input_embeddings()
    options = {"mask_token_id": 5, "block_size": 4, "attention_backend": "sdpa", "num_anchors": 8}
    for name, draft, model, kind in (
        ("dflash", DFlashDraftModel, models.OnlineDFlashModel, strategies.DFlashTrainStrategy),
        ("domino", DominoDraftModel, models.OnlineDominoModel, strategies.DominoTrainStrategy),
        ("dspark", DSparkDraftModel, models.OnlineDSparkModel, strategies.DSparkTrainStrategy),
    ):
        config = Qwen3Config(
            **{k: getattr(shape, k) for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")},
            **{k: getattr(shape, k) for k in ("num_attention_heads", "num_key_value_heads")},
            num_hidden_layers=1,
            attn_implementation="sdpa",
            block_size=4,
            num_target_layers=6,
            dflash_config={"target_layer_ids": LAYERS, **DRAFTS},
        )
        torch.manual_seed(1)
        strategy, pairs = kind(model(draft(config), head, embed, **options)), []
        for batch in Batches(cache.loader(2, filter=lambda index: index.num_loss_tokens >= 8), name):
            states, last = online(target, batch.tensors["input_ids"], LAYERS)
            now = {**batch.tensors, "hidden_states": states}
            now |= {"target_last_hidden_states": last} if name == "dspark" else {}
            there = SimpleNamespace(tensors=now, metadata={})
            pairs.append((loss_of(strategy, batch), loss_of(strategy, there)))
        told(f"SpecForge {name}", pairs[:12])


def soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of probabilities ``target [B, S, V]`` where ``mask [B, S, 1]`` is 1, over all places."""
    return -(mask * target * logits.float().log_softmax(2)).sum(2).mean()


def eagle3(work: Path) -> None:
    """SpecForge's EAGLE-3: its strategy, head and TTT loss."""
    # Its loss is a kernel for GPUs: the same sum, by torch.
    kernels = ModuleType("specforge.core.loss")
    kernels.LogSoftmaxLoss = SimpleNamespace(apply=soft_cross_entropy)  # type: ignore[attr-defined]
    sys.modules[kernels.__name__] = kernels
    from specforge.algorithms.eagle3.model import OnlineEagle3Model
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from specforge.training.strategies.base import Eagle3TrainStrategy
    from transformers import LlamaConfig

    from cache_format.adapters.specforge import Batches, target_head

    cache, target = FeatureCache.open(work / "cache").view(layers=LAYERS), target_of(work)
    shape = target.config
    config = LlamaConfig(
        **{name: getattr(shape, name) for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")},
        **{name: getattr(shape, name) for name in ("num_attention_heads", "num_key_value_heads")},
        num_hidden_layers=1,
    )
    config.draft_vocab_size = shape.vocab_size
    torch.manual_seed(1)
    draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa")
    model = OnlineEagle3Model(draft_model=draft, length=2, attention_backend="sdpa")
    strategy, pairs = Eagle3TrainStrategy(model, target_head=target_head(cache)), []
    for batch in Batches(cache.loader(2), "eagle3"):
        states, last = online(target, batch.tensors["input_ids"], LAYERS)
        there = SimpleNamespace(
            tensors={**batch.tensors, "hidden_state": states, "target": last}, metadata=batch.metadata
        )
        pairs.append((loss_of(strategy, batch), loss_of(strategy, there)))
    told("SpecForge eagle3", pairs[:6])


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


def speculators(work: Path) -> None:
    """Records of its train split, and a collated, packed batch."""
    from speculators.train.data import ArrowDataset, CollateFn
    from speculators.train.vocab_mapping import build_vocab_mappings_from_distribution

    from cache_format.adapters.speculators import CacheDataset, seen_by_draft
    from cache_format.export.vocab_map import vocab_map

    folder = exported(work, "speculators")
    options = {"max_len": 512, "train_ratio": 0.75, "split": "val", "hidden_states_dtype": torch.float32}
    theirs = ArrowDataset(datapath=folder, on_missing="raise", **options)
    ours = CacheDataset(seen_by_draft(FeatureCache.open(work / "cache"), LAYERS), **options)
    same_records("speculators", ours, theirs)
    assert list(ours.approx_lengths) == list(theirs.approx_lengths)
    packed = [CollateFn(512, 64, 3, torch.float32)([d[i] for i in range(4)]) for d in (ours, theirs)]
    assert all(torch.equal(packed[0][k], packed[1][k]) for k in packed[0] if torch.is_tensor(packed[0][k]))
    counts = FeatureCache.open(work / "cache").learned_counts()
    seen = {token: int(count) for token, count in enumerate(counts) if count}
    for size in (100, 1500):
        d2t, t2d = build_vocab_mappings_from_distribution(seen, size, len(counts))
        found = vocab_map(counts, size)
        assert d2t.tolist() == found.d2t.tolist()
        assert t2d.tolist() == found.t2d.tolist()
    print("speculators: vocab-map chooses the tokens that it chooses")


def deepspec(work: Path) -> None:
    """Records, of some of the layers; and what its own writer makes of the target's states, imported."""
    from deepspec.data.target_cache_dataset import CacheDataset

    from cache_format.adapters.deepspec import CacheRecords

    cache = FeatureCache.open(work / "cache").view(layers=LAYERS, dtype=torch.bfloat16)
    theirs = CacheDataset(str(exported(work, "deepspec", layers=LAYERS, dtype=torch.bfloat16)))
    same_records("DeepSpec", CacheRecords(cache), theirs)
    imported_from_deepspec(work)


def imported_from_deepspec(work: Path) -> None:
    """Its writer's shards, index and manifest, as its prepare_target_cache.py calls them, become a cache."""
    from deepspec.data import target_cache_dataset as theirs

    out, layers, target = work / "deepspec-own", [1, 3, 5], target_of(work).to(torch.bfloat16)
    theirs.prepare_target_cache_output_dir(str(out))
    (rank := out / "_tmp" / "rank_0").mkdir()
    writer, samples = theirs.LocalTargetCacheWriter(rank_dir=str(rank), max_shard_bytes=1 << 18), []
    for i, sample in enumerate(FeatureCache.open(work / "cache")):
        states, last = online(target, sample.input_ids, layers)
        names = ("input_ids", "attention_mask", "loss_mask")
        writer.write_sample(
            sample_id=i,
            **{name: getattr(sample, name)[0] for name in names},
            target_hidden_states=states[0],
            target_last_hidden_states=last[0],
        )
        samples.append((sample, states, last))
    writer.close()
    summary = {
        "global_rank": 0,
        "source_sample_start": 0,
        "local_shard_files": writer.local_shard_files,
    }
    shard_map, shards = theirs.build_global_target_cache_shard_map([summary])
    theirs.rename_local_target_cache_shards(
        output_dir=str(out), rank_dir=str(rank), summary=summary, shard_map=shard_map
    )
    theirs.finalize_target_cache_index(output_dir=str(out), summaries=[summary], shard_map=shard_map)
    manifest = theirs.build_target_cache_manifest(
        num_samples=len(samples), shards=shards, target_layer_ids=layers, hidden_size=target.config.hidden_size
    )
    theirs.write_target_cache_manifest(output_dir=str(out), manifest=manifest)
    theirs.cleanup_target_cache_tmp_dir(str(out))
    command = [sys.executable, "-m", "extractor", "import", out, "--from", "deepspec", "--target", work / "tiny"]
    options = ["--last-layer", "pre-norm", "--shard-size", "1MiB", "--device", "cpu", "--out", work / "imported"]
    subprocess.run([str(part) for part in command + options], check=True, stdout=sys.stderr)
    for ours, (sample, states, last) in zip(FeatureCache.open(work / "imported"), samples, strict=True):
        assert torch.equal(ours.input_ids, sample.input_ids)
        assert torch.equal(ours.loss_mask, sample.loss_mask)
        assert torch.equal(ours.hidden_states, states)
        assert torch.equal(ours.last_hidden_states, last)
    print(f"DeepSpec: {len(samples)} samples in {len(shards)} shards of its own writer, imported: bit for bit")


def modelopt(work: Path) -> None:
    """Records, with the target's last layer among those of the draft."""
    from modelopt.torch.speculative.eagle.utils import OfflineSupervisedDataset

    from cache_format.adapters.modelopt import dataset

    files = sorted(map(str, exported(work, "modelopt").rglob("*.pt")))
    for only in (True, False):
        same_records(
            "Model Optimizer",
            dataset(FeatureCache.open(work / "cache"), answer_only_loss=only),
            OfflineSupervisedDataset(files, answer_only_loss=only),
        )


def angelslim(work: Path) -> None:
    """Records of its offline dataset."""
    from angelslim.compressor.speculative.train.data.dataset_builder.offline_dataset_builder import OfflineEagle3Dataset

    from cache_format.adapters.angelslim import dataset

    same_records(
        "AngelSlim", dataset(FeatureCache.open(work / "cache")), OfflineEagle3Dataset(str(exported(work, "angelslim")))
    )


CHECKS = {f.__name__: f for f in (nemo, specforge, eagle3, speculators, deepspec, modelopt, angelslim)}

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in sys.argv[2:]:
        CHECKS[name](Path(sys.argv[1]).absolute())
    print(json.dumps({"checked": sys.argv[2:]}))
