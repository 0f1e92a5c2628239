"""What a trainer needs to keep packed samples apart: position_ids, seq_lens, doc_remaining.

Names and meaning are those of NeMo AutoModel's packed DFlash path: a block of K tokens may start where
``doc_remaining >= K - 1``, and attention is confined to the documents that ``seq_lens`` spells out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cache_format.batch import DFlashTargetBatch


def with_documents(batch: DFlashTargetBatch, lengths: Sequence[Sequence[int]]) -> DFlashTargetBatch:
    """``batch`` with its three packing fields.

    Args:
        batch: ``[B, S]``, each row holding samples one after the other.
        lengths: of each row's samples; what is left of S is padding, a document of its own without supervision.
    """
    rows, length = batch.input_ids.shape
    documents = [[*row, *([length - sum(row)] if sum(row) < length else [])] for row in lengths]
    seq_lens = torch.zeros(rows, max(len(row) for row in documents), dtype=torch.int64)
    position_ids = torch.zeros(rows, length, dtype=torch.int64)
    doc_remaining = torch.zeros(rows, length, dtype=torch.int64)
    for row, sizes in enumerate(documents):
        seq_lens[row, : len(sizes)] = torch.tensor(sizes)
        position_ids[row] = torch.cat([torch.arange(size) for size in sizes])
        real = torch.cat([torch.arange(size - 1, -1, -1) for size in lengths[row]])
        doc_remaining[row, : len(real)] = real
    return replace(batch, position_ids=position_ids, seq_lens=seq_lens, doc_remaining=doc_remaining)
