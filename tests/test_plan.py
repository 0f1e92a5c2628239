"""The plan: every sample once, shards within their size, little padding - for any lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_format.codecs import RawCodec, States
from cache_format.errors import InputError
from cache_format.layout.shard_layout import ShardSchema
from extractor.config import PlanOptions
from extractor.job.plan import Plan

SCHEMA = ShardSchema(fingerprint="0" * 64, codec=RawCodec(), states=States(torch.bfloat16, 5, 64))


def plan_of(lengths, **options) -> Plan:
    return Plan(np.asarray(lengths), SCHEMA.token_bytes, PlanOptions(**options))


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=200),
    st.integers(64 << 10, 1 << 20),
    st.integers(1, 3000),
)
def test_every_sample_is_in_exactly_one_batch_of_one_shard(lengths, shard_bytes, batch_tokens):
    plan = plan_of(lengths, shard_bytes=shard_bytes, batch_tokens=batch_tokens)
    seen = []
    for shard in plan:
        assert shard.num_tokens.tolist() == [lengths[i] for i in shard.sample_ids]
        positions = [i for batch in shard.batches for i in range(batch.start, batch.stop)]
        assert positions == list(range(len(shard.sample_ids)))
        for batch in shard.batches:
            padded = max(shard.num_tokens[batch]) * (batch.stop - batch.start)
            assert padded <= batch_tokens or batch.stop - batch.start == 1
        seen += shard.sample_ids.tolist()
    assert sorted(seen) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 600), min_size=1, max_size=200), st.integers(64 << 10, 1 << 20))
def test_a_shard_is_no_larger_than_asked_unless_one_sample_is(lengths, shard_bytes):
    plan = plan_of(lengths, shard_bytes=shard_bytes)
    for shard, size in zip(plan, plan.shard_bytes(SCHEMA).tolist(), strict=True):
        assert size <= shard_bytes or len(shard.sample_ids) == 1
        assert size == SCHEMA.layout(shard.number, len(shard.sample_ids), shard.tokens).num_bytes


def test_the_plan_depends_on_its_arguments_alone():
    lengths = np.random.default_rng(0).integers(1, 500, 300)
    first, second = plan_of(lengths, shard_bytes=1 << 20), plan_of(lengths, shard_bytes=1 << 20)
    assert [s.sample_ids.tolist() for s in first] == [s.sample_ids.tolist() for s in second]


def test_padding_is_small_on_log_normal_lengths_even_with_few_samples_a_shard():
    lengths = np.random.default_rng(0).lognormal(6.5, 0.8, 20_000).astype(int).clip(16, 4096)
    qwen3_8b = ShardSchema(fingerprint="0" * 64, codec=RawCodec(), states=States(torch.bfloat16, 5, 4096))
    plan = Plan(lengths, qwen3_8b.token_bytes, PlanOptions())
    padded = sum(shard.padded_tokens for shard in plan)
    assert 1 - lengths.sum() / padded < 0.03


def test_any_run_of_shards_has_short_and_long_samples():
    lengths = np.random.default_rng(0).lognormal(6, 0.8, 5000).astype(int).clip(16, 4096)
    plan = plan_of(lengths, shard_bytes=2 << 20)
    assert len(plan) > 100
    for start in range(0, len(plan) - 16, 16):
        window = np.concatenate([plan.shard(n).num_tokens for n in range(start, start + 16)])
        assert 0.5 < np.mean(window) / np.mean(lengths) < 2


def test_sizes_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="--shard-size"):
        PlanOptions(shard_bytes=100)
    with pytest.raises(InputError, match="--batch-tokens"):
        PlanOptions(batch_tokens=0)
