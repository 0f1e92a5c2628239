"""layers= and dtype=: some of the stored layers, in another dtype, from every codec, and no byte read for nothing."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from synthetic import LAYER_IDS, write_cache

from cache_format import CacheError, DFlashTargetBatch, FeatureCache, InputError
from cache_format.codecs import CODECS
from cache_format.storage.byte_source import LocalFile

HIDDEN = 256
LENGTHS = [5, 31, 12, 1, 17, 9, 26, 8, 40, 3]
VIEWS = [
    *({"layers": layers} for layers in ([2], [3, 0], [0, 2], [3, 2, 0], LAYER_IDS, [2, 2])),
    *({"dtype": dtype} for dtype in (torch.float32, torch.float16, "float64", torch.bfloat16)),
    {"layers": [3, 0], "dtype": torch.float32},
]


@pytest.fixture(scope="module", params=[(codec, dtype) for codec in CODECS for dtype in ("bfloat16", "float32")])
def cache(request, tmp_path_factory):
    codec, dtype = request.param
    path = tmp_path_factory.mktemp("view") / "cache"
    write_cache(path, LENGTHS, dtype=dtype, hidden=HIDDEN, codec=codec)
    return FeatureCache.open(path)


def expected(cache: FeatureCache, batch: DFlashTargetBatch, layers=None, dtype=None) -> torch.Tensor:
    """``batch.hidden_states`` of the whole cache, seen so."""
    blocks = batch.hidden_states.unflatten(-1, (len(LAYER_IDS), HIDDEN))
    chosen = [LAYER_IDS.index(layer) for layer in (LAYER_IDS if layers is None else layers)]
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return blocks[..., chosen, :].flatten(-2).to(dtype or batch.hidden_states.dtype)


def counting(read, counted: list[int]):
    def count(self, *arguments):
        counted.append(arguments[-1].nbytes)
        return read(self, *arguments)

    return count


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("asked", VIEWS, ids=str)
def test_a_batch_has_the_layers_and_the_dtype_asked_for(cache, asked):
    whole = cache.batch(range(len(cache)))
    wanted = expected(cache, whole, **asked)
    assert same(cache.batch(range(len(cache)), **asked).hidden_states, wanted)
    view = cache.view(**asked)
    assert view.target_layer_ids == list(asked.get("layers", LAYER_IDS))
    assert view.manifest.torch_dtype == wanted.dtype
    assert same(pickle.loads(pickle.dumps(view)).batch(range(len(cache))).hidden_states, wanted)
    for i in (1, 8):
        assert same(view[i].hidden_states[0], wanted[i, : LENGTHS[i]])
        assert torch.equal(view[i].input_ids, cache[i].input_ids)
    got = list(cache.loader(4, **asked))
    assert same(
        torch.cat([b.hidden_states.flatten() for b in got]),
        torch.cat(
            [
                wanted[first : first + 4, : b.input_ids.shape[1]].flatten()
                for first, b in zip((0, 4, 8), got, strict=True)
            ]
        ),
    )
    assert all(
        torch.equal(b.attention_mask, cache.batch(range(f, f + len(b.input_ids))).attention_mask)
        for f, b in zip((0, 4, 8), got, strict=True)
    )


@pytest.mark.parametrize("asked", VIEWS, ids=str)
def test_what_a_device_is_given_becomes_the_same(cache, asked):
    """The way to a device: states are copied as they are stored, decoded and cast there."""
    rows = [[2], [8], [3]]
    left = cache.view(**asked)._source.gather(rows, allocate=lambda n: torch.empty(n, dtype=torch.uint8), decode=False)
    assert same(left.to("cpu").decoded().hidden_states, cache.batch([2, 8, 3], **asked).hidden_states)


def test_packed_and_cut(cache):
    options = {"batch_size": 2, "pack_to": 48, "max_length": 20}
    for plain, seen in zip(
        cache.loader(**options), cache.loader(**options, layers=[3, 0], dtype="float32"), strict=True
    ):
        assert same(seen.hidden_states, expected(cache, plain, [3, 0], torch.float32))
        assert torch.equal(plain.seq_lens, seen.seq_lens)


def test_a_view_of_a_view_and_of_nothing_else(cache):
    view = cache.view(layers=[3, 0], dtype="float32")
    assert view.view(layers=[0]).target_layer_ids == [0]
    assert view.view(layers=[0]).manifest.dtype == "float32"
    assert view.view(dtype="bfloat16").target_layer_ids == [3, 0]
    assert cache.target_layer_ids == LAYER_IDS
    with pytest.raises(InputError, match=r"layer 2 is not .* \[3, 0\]"):
        view.view(layers=[2])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": [1]}, r"layer 1 is not .* \[0, 2, 3\]"),
        ({"layers": []}, "at least one"),
        ({"layers": 2}, "list of layer numbers"),
        ({"layers": ["2"]}, "list of layer numbers"),
        ({"layers": [-1]}, "layer -1"),
        ({"dtype": torch.int8}, "choose one of"),
        ({"dtype": "float8_e4m3fn"}, "choose one of"),
        ({"dtype": "save"}, "choose one of"),
    ],
)
def test_what_cannot_be_seen_is_refused_before_anything_is_read(cache, asked, message):
    for ask in (cache.view, lambda **a: cache.batch([0], **a), lambda **a: cache.loader(2, **a)):
        with pytest.raises(InputError, match=message):
            ask(**asked)


def test_embeddings_and_head_are_cast_with_the_states(cache):
    view = cache.view(dtype="float64")
    assert view.get_input_embeddings().weight.dtype == view.get_output_embeddings().weight.dtype == torch.float64
    assert torch.equal(view.get_input_embeddings().weight, cache.get_input_embeddings().weight.double())
    assert not view.get_output_embeddings().weight.requires_grad


@pytest.mark.parametrize("layers", [[0, 2], [3, 0], [2]])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_only_the_layers_asked_for_are_read(cache, layers, dtype, monkeypatch):
    """Of the codecs that keep layers apart."""
    if cache.manifest.codec["name"] == "zbits":
        pytest.skip("this codec has no layer on its own")

    def bytes_read(**asked) -> int:
        counted = []
        for name in ("read_into", "read_strided_into"):
            monkeypatch.setattr(LocalFile, name, counting(getattr(LocalFile, name), counted))
        cache.batch(range(len(cache)), **asked)
        monkeypatch.undo()
        return sum(counted)

    cache.batch(range(len(cache)))
    assert bytes_read(layers=layers, dtype=dtype) < (len(layers) / 3 + 0.05) * bytes_read()


@pytest.mark.parametrize("asked", VIEWS[:4] + VIEWS[-1:], ids=str)
def test_samples_are_verified_through_a_view(tmp_path, asked):
    for codec in CODECS:
        path = tmp_path / codec
        write_cache(path, LENGTHS, dtype="bfloat16", hidden=HIDDEN, codec=codec)
        cache = FeatureCache.open(path, verify="sample").view(**asked)
        assert len(list(cache.loader(4))) == 3
        shard, start, _ = cache._source.locate(8)
        name = cache._source.schema.token_tensors[0].name
        at = (
            shard.file.row_range(name, start, start + 40)[0]
            if not cache._source.schema.has_blocks
            else (shard.file.block_range(shard.file.position_at(start))[0])
        )
        with open(shard.file.where, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(CacheError, match="sample 8 does not match its checksum"):
            cache.batch([3, 8])
        assert np.isfinite(cache.batch([3]).hidden_states.float()).all()
