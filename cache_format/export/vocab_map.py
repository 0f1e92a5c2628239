"""A draft vocabulary smaller than the target's, of the tokens that are learned most, as EAGLE-3 drafts have it.

Matched: speculators 0.9.0 (``train/vocab_mapping.py``, whose choice this is, and ``d2t_path``, ``t2d_path``), SpecForge
0.2.0 (``load_vocab_mapping``), NeMo AutoModel 0.7.0 (``selected_token_ids_path``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache_format.errors import InputError
from cache_format.export.interface import write_torch
from cache_format.storage.commit import committed, make_folder
from cache_format.storage.lock import in_turn


@dataclass(frozen=True)
class VocabMap:
    """Which tokens of the target a draft has."""

    d2t: np.ndarray
    """int64 ``[size]``: draft token i is the target's i + d2t[i]"""
    t2d: np.ndarray
    """bool ``[V]``: whether a token of the target is among them"""
    covered: float
    """share of the learned tokens that are among them"""

    @property
    def tokens(self) -> np.ndarray:
        """int64 ``[size]``, ascending: the target's token ids."""
        return self.d2t + np.arange(len(self.d2t))


def vocab_map(counts: np.ndarray, size: int) -> VocabMap:
    """The ``size`` tokens with the largest ``counts [V]``; of equal counts the lower ids.

    Raises:
        InputError: not from 1 to V tokens.
    """
    if not 1 <= size <= len(counts):
        raise InputError(
            f"--size {size:,}: the target's vocabulary has {len(counts):,} tokens; choose fewer, at least 1"
        )
    chosen = np.sort(np.argsort(-counts, kind="stable")[:size])
    t2d = np.zeros(len(counts), bool)
    t2d[chosen] = True
    return VocabMap(chosen - np.arange(size), t2d, float(counts[chosen].sum() / max(counts.sum(), 1)))


def write_vocab_map(folder: Path, found: VocabMap) -> list[Path]:
    """Write d2t.npy and t2d.npy for speculators, vocab_mapping.pt for SpecForge, selected_token_ids.pt for NeMo.

    Raises:
        StorageError: the operating system refused.
    """
    make_folder(folder)
    paths = [folder / name for name in ("d2t.npy", "t2d.npy", "vocab_mapping.pt", "selected_token_ids.pt")]
    d2t, t2d, tokens = (torch.from_numpy(array) for array in (found.d2t, found.t2d, found.tokens))
    # All of one size: another one may write there at the same moment.
    with in_turn(folder, ".vocab-map.lock"):
        for path, array in zip(paths, (found.d2t, found.t2d), strict=False):
            with committed(path) as file:
                np.save(file, array)
        with committed(paths[2]) as file:
            write_torch(file, {"d2t": d2t, "t2d": t2d})
        with committed(paths[3]) as file:
            write_torch(file, {"selected_token_ids": tokens, "target_vocab_size": len(t2d)})
    return paths
