"""NeMo AutoModel's recipes of the DFlash family (0.7.0) from a cache: DFlash, DFlash 2, Domino, JetSpec.

Matched: ``nemo_automodel/recipes/llm/train_dflash.py``. The YAML stays as it is: its batch size, length, seed, packing
and target_layer_ids (any that the cache has) count; its data paths do not. With a ``distributed:`` section the ranks of
a tensor-parallel group read the same batches.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cache_format.adapters.nemo_target import CachedTarget, Tokens
from cache_format.errors import InputError
from cache_format.reading.feature_cache import FeatureCache
from cache_format.storage.commit import committed, write_all

STATE_NAME = "dflash_cache.json"


def from_cache(
    Recipe: Any, cache: FeatureCache, *, validation: float = 0.0, logits: bool = False, **options: Any
) -> Any:
    """``Recipe``, a class of NeMo's, with ``cache`` in place of its target and its data.

    Args:
        Recipe: such as ``TrainDFlashRecipe``.
        cache: what is trained on.
        validation: share of the samples that is left out of the training, and evaluated after each epoch.
        logits: the target's, from its head and ``--capture last_hidden_states``, as JetSpec wants them.
        **options: further ones of ``cache.loader``.

    Raises:
        InputError: ``logits`` without last hidden states.
    """
    from nemo_automodel.recipes.llm import train_dflash

    if logits and not cache.manifest.capture["last_hidden_states"]:
        raise InputError(f"{cache.where}: logits=True needs --capture last_hidden_states")

    class FromCache(Recipe):
        def setup(self) -> None:
            built = train_dflash.build_eagle3_dataloader
            train_dflash.build_eagle3_dataloader = self._tokens
            try:
                super().setup()
            finally:
                train_dflash.build_eagle3_dataloader = built

        def _build_target_model(self, *_: Any) -> Any:
            self.dist_setup = self.device_mesh = self.dp_mesh = self.cp_mesh = None
            if self.cfg.get("distributed", None) is not None:
                world = self.dist_env.world_size
                self.dist_setup = train_dflash.create_distributed_setup_from_config(self.cfg, world_size=world)
                self.device_mesh = self.dist_setup.mesh_context.device_mesh
                self.dp_mesh = train_dflash._submesh_or_none(self.device_mesh, "dp")
            self._seen = cache.view(dtype=self.compute_dtype)
            embed, head = self._seen.get_input_embeddings(), self._seen.get_output_embeddings()
            embed, self._head = embed.to(self.device), head.to(self.device)
            config = SimpleNamespace(_attn_implementation="sdpa")
            given = {"get_input_embeddings": lambda: embed, "get_output_embeddings": lambda: self._head}
            return SimpleNamespace(config=config, **given)

        def _build_target_wrapper(self, target_layer_ids: list[int]) -> CachedTarget:
            return CachedTarget(self._seen.view(layers=target_layer_ids), self._head if logits else None)

        def _tokens(self, *, shuffle: bool, **asked: Any) -> Tokens:
            """The recipe asks for its training data with ``shuffle``, for the validation without."""
            if not shuffle and not validation:
                raise InputError("val_data_path is not read from; give from_cache(..., validation=0.02), a share")
            ranks, mesh, self._asked = {}, self.dp_mesh, asked
            if mesh is not None:
                ranks = {"rank": mesh.get_local_rank(), "world_size": mesh.size()}
            split = (("train", 1 - validation) if shuffle else ("validation", validation)) if validation else None
            pack_to = asked["packed_sequence_size"] or None
            loader = self.target_wrapper.cache.loader(
                asked["batch_size"],
                shuffle=shuffle,
                seed=asked["shuffle_seed"],
                device=self.device,
                split=split,
                pack_to=pack_to,
                max_length=min(asked["seq_length"], pack_to or asked["seq_length"]),
                **ranks,
                **options,
            )
            return Tokens(self.target_wrapper, loader)

        def _run_eval(self) -> Any:
            if validation and not self.val_dataloader:
                self.val_dataloader: Tokens | None = self._tokens(shuffle=False, **self._asked)
            return super()._run_eval()

        def _save_extra_state(self, path: str, epoch: int) -> None:
            super()._save_extra_state(path, epoch=epoch)
            with committed(Path(path) / STATE_NAME) as file:
                write_all(file, json.dumps(self.train_dataloader.sampler.state_dict()).encode())

        def _load_extra_state(self, ckpt_dir: str) -> None:
            super()._load_extra_state(ckpt_dir)
            state = Path(ckpt_dir) / STATE_NAME
            if state.exists():
                self.train_dataloader.sampler.load_state_dict(json.loads(state.read_text()))

    FromCache.__name__ = Recipe.__name__
    return FromCache
