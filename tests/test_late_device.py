"""On a device that does everything later: the bytes of the CPU, and each wait that is left out shows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import late_device
import make_tiny_target
import pytest
import synthetic_cache
import torch
from jobs import contents
from late_device import EAGERNESS, in_a_process, install
from synthetic import write_cache

from cache_format import FeatureCache
from cache_format.layout.manifest import Manifest

CAPTURES = ["--capture", "last_hidden_states", "--capture", "logits-topk=3"]
MAIN_AHEAD, SIDE_AHEAD = 1, 2


@pytest.fixture(scope="module")
def small(demo_jsonl, tmp_path_factory) -> list[object]:
    """Arguments of an extraction of 3 shards, of 4 batches each, from a target of two small layers."""
    folder = tmp_path_factory.mktemp("late")
    make_tiny_target.make_tiny_target(folder / "tiny", demo_jsonl, layers=2, hidden_size=32, vocab_size=512)
    return [
        *("extract", "--target", folder / "tiny", "--data", demo_jsonl, "--target-layers", "0", "--limit", "36"),
        *("--max-length", "96", "--shard-size", "160KiB", "--batch-tokens", "300", "--dtype", "float32"),
    ]


def shards(cache: Path) -> dict[str, bytes]:
    """All but the manifest, which says on what device a cache was made."""
    return {name: data for name, data in contents(cache).items() if name != "manifest.json"}


@pytest.fixture(scope="module")
def on_the_cpu(small, tmp_path_factory) -> Callable[..., dict[str, bytes]]:
    @functools.cache
    def made(*options: str) -> dict[str, bytes]:
        out = tmp_path_factory.mktemp("cpu") / "cache"
        commands.made(*small, *options, "--device", "cpu", "--out", out)
        return shards(out)

    return made


@pytest.mark.parametrize(
    ("options", "seed"),
    [([], 0), ([], MAIN_AHEAD), ([], SIDE_AHEAD), (["--codec", "fp8"], 3), (["--codec", "zbits"], 4), (CAPTURES, 1)],
    ids=str,
)
def test_an_extraction_gives_the_bytes_of_the_cpu(small, on_the_cpu, tmp_path, options, seed):
    out = tmp_path / "cache"
    code, _, errors = commands.run(
        *small, *options, "--device", "late", "--out", out, before=functools.partial(install, seed)
    )
    assert code == 0, errors
    assert shards(out) == on_the_cpu(*options)


def install_without(seed: int, mutant: tuple[Any, ...]) -> None:
    install(seed, seconds_of_a_thread=0.2)
    late_device.without(*mutant)


RUN = "extractor.job.run_shards"


@pytest.mark.parametrize(
    ("seed", "mutant"),
    [
        (0, (RUN, "end.arrived.synchronize()")),
        (SIDE_AHEAD, (RUN, "self._stream.wait_stream(current_stream(self._device))", 0)),
        (SIDE_AHEAD, (RUN, "self._stream.wait_stream(current_stream(self._device))", 1)),
        (MAIN_AHEAD, (RUN, "current_stream(self._device).wait_event(copied)")),
        (0, (RUN, "buffer = self._free.get()", 0, "buffer = vars(self).setdefault('_one', self._free.queue[0])")),
    ],
    ids=lambda x: "" if isinstance(x, int) else x[1],
)
def test_a_wait_that_is_left_out_of_an_extraction_shows(small, on_the_cpu, tmp_path, seed, mutant):
    out = tmp_path / "cache"
    code, _, errors = commands.run(
        *small, "--device", "late", "--out", out, before=functools.partial(install_without, seed, mutant)
    )
    assert code or shards(out) != on_the_cpu()
    assert "Traceback" not in errors, errors


LENGTHS = [40, 31, 38, 33, 37, 39, 32, 36, 35, 34] * 3
LOADED = ("raw", "fp8", "quant")


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loader")
    for codec in LOADED:
        write_cache(folder / codec, LENGTHS, dtype="bfloat16", hidden=512, codec=codec)
    return {codec: folder / codec for codec in LOADED}


@pytest.fixture(params=LOADED)
def cache(request, caches) -> Path:
    return caches[request.param]


def trained_on(path: Path, seed: int, mutant: tuple[Any, ...] | None, **asked: Any) -> tuple[bool, int]:
    """Whether a trainer that drops each batch before its work on it is done saw what is stored; bytes that crossed."""
    late = install(seed)
    if mutant is not None:
        late_device.without(*mutant)
    stored = FeatureCache.open(path)
    options: dict[str, Any] = {"batch_size": 2, "shuffle": True, "threads": 2, **asked}
    seen: list[list[torch.Tensor]] = []
    for batch in stored.loader(**options, device="late"):
        seen.append([tensor + 0 for tensor in vars(batch).values() if tensor is not None])
        del batch
    crossed = sum(late.crossed)
    right = [[t for t in vars(batch).values() if t is not None] for batch in stored.loader(**options)]
    pairs = [pair for ours, theirs in zip(seen, right, strict=True) for pair in zip(ours, theirs, strict=True)]
    same = all(torch.equal(bits(ours.cpu()), bits(theirs + 0)) for ours, theirs in pairs)
    return same, crossed


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("seed", range(len(EAGERNESS)))
def test_a_loader_gives_what_is_stored(cache, seed):
    assert in_a_process(trained_on, cache, seed, None)[0]


LOADER = "cache_format.reading.loader"


@pytest.mark.parametrize(
    ("seed", "mutant"),
    [
        (SIDE_AHEAD, (LOADER, "used_on(tensor, current)")),
        (0, (LOADER, "copied.synchronize()")),
    ],
    ids=lambda x: "" if isinstance(x, int) else x[1],
)
def test_a_wait_that_is_left_out_of_the_loader_shows(cache, seed, mutant):
    assert not in_a_process(trained_on, cache, seed, mutant)[0]


def test_with_fp8_and_quant_half_the_bytes_cross_the_bus(caches):
    crossed = {codec: in_a_process(trained_on, path, 0, None)[1] for codec, path in caches.items()}
    assert crossed["fp8"] <= 0.51 * crossed["raw"]
    assert crossed["quant"] <= 0.51 * crossed["raw"]


def wild(sample_id: int, num_tokens: int) -> torch.Tensor:
    """Means, loud channels, a massive first token, what is no number; and a sample that no codec makes smaller."""
    generator = torch.Generator().manual_seed(sample_id)
    states = torch.randn(num_tokens, 3 * 64, generator=generator) * (1 + 5 * (torch.arange(3 * 64) % 7 == 0)) - 3
    states[0, ::64] = 3e4
    states[num_tokens // 2, 5:9] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38])
    if sample_id % 4 == 1:
        states *= 10 ** (20 * torch.rand(states.shape, generator=generator))
    return states


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "asked",
    [{}, {"layers": [3, 0], "dtype": "float32"}, {"pack_to": 128}],
    ids=str,
)
def test_quant_is_decoded_to_the_same_bits_on_a_device(tmp_path, dtype, asked):
    synthetic_cache.write_cache(
        tmp_path,
        LENGTHS[:9],
        dtype=dtype,
        hidden=64,
        target_layer_ids=[0, 2, 3],
        shard_bytes=64 << 10,
        states=lambda sample_id, num_tokens: wild(sample_id, num_tokens).to(getattr(torch, dtype)),
        codec="quant",
    )
    assert in_a_process(functools.partial(trained_on, **asked), tmp_path, 0, None)[0]


def install_small(memory: int) -> None:
    install(MAIN_AHEAD, memory)


def test_batch_tokens_auto_finds_what_fits_and_no_more_than_a_shard_holds(small, tmp_path):
    """A device whose memory would hold 8192 tokens and more, and one for which that is too much."""
    found = {}
    for memory in (1 << 30, 6 << 20):
        out = tmp_path / str(memory)
        arguments = [*small, "--shard-size", "2MiB", "--batch-tokens", "auto", "--device", "late", "--out", out]
        code, _, errors = commands.run(*arguments, before=functools.partial(install_small, memory))
        assert code == 0, errors
        found[memory] = Manifest.read(out).identity["batch_tokens"]
        commands.made(*small, "--batch-tokens", found[memory], "--device", "cpu", "--out", tmp_path / f"{memory} cpu")
        pairs = zip(FeatureCache.open(out), FeatureCache.open(tmp_path / f"{memory} cpu"), strict=True)
        assert all(torch.allclose(a.hidden_states, b.hidden_states, atol=1e-5) for a, b in pairs)
    assert found[1 << 30] == 8192
    assert found[6 << 20] < 8192
