"""DeepSpec."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cache_format import FeatureCache
from peer_checks.common import LAYERS, awake, exported, late, online, same_records, target_of, told

MODEL = {
    "target_layer_ids": LAYERS,
    "num_draft_layers": 1,
    "block_size": 4,
    "num_anchors": 8,
    "mask_token_id": 5,
    "confidence_head_with_markov": True,
    "markov_head_type": "vanilla",
}
"""What its configs of DFlash and DSpark have in common."""
LOSSES = {
    "dflash": {"markov_rank": 0, "confidence_head_alpha": 0.0, "ce_loss_alpha": 1.0, "l1_loss_alpha": 0.0},
    "dspark": {"markov_rank": 8, "confidence_head_alpha": 1.0, "ce_loss_alpha": 0.1, "l1_loss_alpha": 0.9},
}
STATES = ("target_hidden_states", "target_last_hidden_states")


def deepspec(work: Path) -> None:
    """Records, of some of the layers; what its own writer makes of the target's states, imported; losses."""
    from deepspec.data.target_cache_dataset import CacheDataset

    from cache_format.adapters.deepspec import CacheRecords

    cache = FeatureCache.open(work / "cache").view(layers=LAYERS, dtype=torch.bfloat16)
    theirs = CacheDataset(str(exported(work, "deepspec", layers=LAYERS, dtype=torch.bfloat16)))
    same_records("DeepSpec", CacheRecords(cache), theirs)
    imported_from_deepspec(work)
    losses_of_drafts(work)


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


def losses_of_drafts(work: Path) -> None:
    """Its DFlash and DSpark in float32: records of a float32 cache, in its collator.

    Its trainer is not imported, for it asks for Triton: model and loss are called as its run_batch calls them.
    """
    from deepspec.data import CacheCollator
    from deepspec.data.cuda_prefetcher import move_batch_to_device
    from deepspec.modeling.dspark.qwen3 import Qwen3DSparkModel
    from deepspec.modeling.dspark.qwen3.config import build_draft_config
    from deepspec.utils.config import to_config_node

    from cache_format.adapters.deepspec import record
    from cache_format.adapters.records import Records

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    target, records = target_of(work), Records(FeatureCache.open(work / "cache").view(layers=LAYERS), record)
    for name, options in LOSSES.items():
        torch.manual_seed(1)
        draft = Qwen3DSparkModel(build_draft_config(target.config, to_config_node({**MODEL, **options})))
        draft.initialize_embeddings_and_head(
            embed_tokens=target.get_input_embeddings(), lm_head=target.get_output_embeddings(), freeze=True
        )
        weights = {key: value for key, value in options.items() if key.endswith("_alpha")}
        loss, losses = partial(loss_of, awake(draft), weights), []
        for i in range(0, len(records), 2):
            here = move_batch_to_device(CacheCollator()([records[i], records[i + 1]]), "cpu")
            there = {**here, **dict(zip(STATES, online(target, here["input_ids"], LAYERS), strict=True))}
            wrong = [{**there, kind: late(there[kind])} for kind in STATES[: len(STATES) if name == "dspark" else 1]]
            losses.append(tuple(map(loss, (here, there, *wrong))))
        told(f"DeepSpec {name}", losses)
    torch.distributed.destroy_process_group()


@torch.no_grad()
def loss_of(draft: Any, weights: dict[str, float], batch: dict[str, torch.Tensor]) -> float:
    """A training loss, with the anchors that seed 0 draws; without gradients, which flex attention has not on a CPU."""
    from deepspec.modeling.dspark.loss import compute_dspark_loss

    torch.manual_seed(0)
    given = {key: value for key, value in batch.items() if key != "attention_mask"}
    return float(compute_dspark_loss(outputs=draft(**given), loss_decay_gamma=4.0, **weights))
