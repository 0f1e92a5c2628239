"""Calibrate: the first rows of some shards, run before any shard is made, for a codec that has to know the states.

Whole batches of the plan are run, so the rows are those that the shards will have, to the bit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs import CalibrationShare
from extractor.job.run_shards import ShardRunner


def calibration_rows(runner: ShardRunner) -> Tensor:
    """Rows ``[n, L*H]`` on the host; of samples that are finite alone, as only these are stored."""
    share, found = CalibrationShare.of(len(runner.plan)), []
    for number in range(min(share.shards, len(runner.plan))):
        shard, left = runner.plan.shard(number), share.rows
        for batch in shard.batches:
            if left > 0:
                rows = _rows(runner, number, shard.sample_ids[batch], shard.num_tokens[batch])[:left]
                found.append(rows)
                left -= len(rows)
    return torch.cat(found)


def _rows(runner: ShardRunner, number: int, sample_ids: np.ndarray, num_tokens: np.ndarray) -> Tensor:
    """Of the finite samples of one batch."""
    input_ids, lengths = torch.zeros(len(num_tokens), int(num_tokens.max()), dtype=torch.int64), num_tokens.tolist()
    for row, sample_id in enumerate(sample_ids.tolist()):
        input_ids[row, : lengths[row]] = torch.from_numpy(np.array(runner.samples[sample_id].input_ids))
    rows, extra = runner.backend.row_memory(sum(lengths), runner.device)
    runner.forward(input_ids, lengths, rows, extra, number)
    is_finite = ~runner.backend.nonfinite(rows, lengths, extra).any(1).cpu()
    return rows.cpu()[torch.repeat_interleave(is_finite, torch.tensor(lengths))]
