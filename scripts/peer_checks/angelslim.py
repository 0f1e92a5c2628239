"""AngelSlim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cache_format import FeatureCache
from peer_checks.common import LAYERS, awake, exported, late, same_records, told


def angelslim(work: Path) -> None:
    """Records of its offline dataset, and the losses of its drafts."""
    from angelslim.compressor.speculative.train.data.dataset_builder.offline_dataset_builder import OfflineEagle3Dataset

    from cache_format.adapters.angelslim import dataset

    same_records(
        "AngelSlim", dataset(FeatureCache.open(work / "cache")), OfflineEagle3Dataset(str(exported(work, "angelslim")))
    )
    losses_of_drafts(work)


def losses_of_drafts(work: Path) -> None:
    """Its offline trainers on the cache, its online ones with the target, in the collator of both.

    DFlash also sees the target's last layer, 5, which its target model gives after the norm. Its trainer puts frozen
    embeddings and head on "cuda", in bfloat16: here they are on the CPU, in float32.
    """
    from angelslim.compressor.speculative.train.data.data_utils import DataCollatorWithPadding
    from angelslim.compressor.speculative.train.models.target.target_model_wrapper import TargetModelWrapper
    from angelslim.compressor.speculative.train.trainer.online_dflash_trainer import TargetEmbeddingsAndHead

    from cache_format.adapters.angelslim import dataset

    load, here = TargetEmbeddingsAndHead.from_pretrained, {"device": "cpu", "dtype": torch.float32}
    TargetEmbeddingsAndHead.from_pretrained = lambda path, **given: load(path, **{**given, **here})
    options = {"torch_dtype": torch.float32, "attn_implementation": "sdpa"}
    target = TargetModelWrapper(str(work / "tiny"), **options)
    for name, make, layers in (("dflash", dflash_trainers, [1, 3, 5]), ("eagle3", eagle3_trainers, LAYERS)):
        records, losses = dataset(FeatureCache.open(work / "cache").view(layers=layers)), []
        torch.manual_seed(1)
        offline, online = make(work, target, layers)
        for i in range(0, len(records), 2):
            batch = DataCollatorWithPadding()([records[i], records[i + 1]])
            kinds = ("hidden_states", "target_hiddens")[: 2 if name == "eagle3" else 1]
            wrong = [loss_of(offline, {**batch, kind: late(batch[kind])}) for kind in kinds]
            losses.append((loss_of(offline, batch), loss_of(online, batch), *wrong))
        told(f"AngelSlim {name}", losses)


def dflash_trainers(work: Path, target: Any, layers: list[int]) -> list[Any]:
    """Offline and online, of one draft."""
    from angelslim.compressor.speculative.train.models.draft.qwen_dflash import QwenDFlashDraftModel
    from angelslim.compressor.speculative.train.trainer.offline_dflash_trainer import OfflineDFlashTrainer
    from angelslim.compressor.speculative.train.trainer.online_dflash_trainer import OnlineDFlashTrainer
    from transformers import Qwen3Config, TrainingArguments

    given = target.model.config.to_dict()
    for name in ("num_hidden_layers", "layer_types", "architectures", "dtype"):
        given.pop(name)
    config = Qwen3Config(
        **given,
        num_hidden_layers=1,
        num_target_layers=6,
        block_size=4,
        num_anchors=8,
        dflash_config={"mask_token_id": 5, "target_layer_ids": layers},
        aux_hidden_states_layer_ids=layers,
        target_model_name_or_path=str(work / "tiny"),
    )
    draft = awake(QwenDFlashDraftModel(config))
    args = TrainingArguments(str(work / "angelslim"), use_cpu=True, report_to=[])
    return [
        kind(draft_model=draft, target_model=model, length=1, draft_model_config=config, args=args)
        for kind, model in ((OfflineDFlashTrainer, None), (OnlineDFlashTrainer, target))
    ]


def eagle3_trainers(work: Path, target: Any, layers: list[int]) -> list[Any]:
    """Offline and online, of one draft with the whole vocabulary."""
    from angelslim.compressor.speculative.train.models.draft.llama_eagle3 import Eagle3LlamaForCausalLM
    from angelslim.compressor.speculative.train.models.target.target_head import TargetHead
    from angelslim.compressor.speculative.train.trainer.offline_eagle3_trainer import OfflineEagle3Trainer
    from angelslim.compressor.speculative.train.trainer.online_eagle3_trainer import OnlineEagle3Trainer
    from transformers import LlamaConfig, TrainingArguments

    shape = target.model.config
    names = ("hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(**{name: getattr(shape, name) for name in names}, num_hidden_layers=1)
    config.draft_vocab_size, config.aux_hidden_states_layer_ids = shape.vocab_size, layers
    draft = awake(Eagle3LlamaForCausalLM(config))
    draft.t2d.fill_(True)
    given = {"draft_model": draft, "length": 2}
    given["args"] = TrainingArguments(str(work / "angelslim"), use_cpu=True, report_to=[])
    head = TargetHead(FeatureCache.open(work / "cache").get_output_embeddings())
    return [
        OfflineEagle3Trainer(target_head=head, **given),
        OnlineEagle3Trainer(target_model=target, draft_model_config=config, **given),
    ]


@torch.no_grad()
def loss_of(trainer: Any, batch: dict[str, torch.Tensor]) -> float:
    """A training loss, with the anchors that seed 0 draws; without gradients, which flex attention has not on a CPU."""
    torch.manual_seed(0)
    return float(trainer.compute_loss(trainer.model, batch))
