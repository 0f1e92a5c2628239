"""speculators: a dataset saved by ``datasets`` and one safetensors file a sample.

Matched: speculators 0.9.0 and hs-connectors 0.9.0 (PyPI), ``speculators/train/data.py`` (ArrowDataset) with
``hs_connectors.transfer.FileTransfer``. The folder:

    dataset_info.json, state.json, data-00000-of-00001.arrow ...   what ``datasets.load_from_disk`` opens, in torch
                                   format: input_ids list<int64>, loss_mask list<int64>, seq_len int64
    hidden_states/hs_0.safetensors ...   for row i: token_ids [S] int64, hidden_states [S, L+1, H], stored dtype

The L+1-th layer is the verifier's last decoder layer *before* the final norm, which the trainer applies itself; the
others are the context. So the cache has to have captured the target's last layer among its target_layer_ids; it is not
part of the draft's own (others are trained from the same cache with ``layers=``). ``--capture last_hidden_states`` does
not help: those are after the norm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from cache_format.codecs.dtypes import DTYPE_NAMES
from cache_format.errors import InputError
from cache_format.export.interface import ExportFile, Layout, last_layer, safetensors_size, write_safetensors
from cache_format.reading.feature_cache import FeatureCache
from cache_format.storage.commit import write_all

ROWS_A_FILE = 10_000
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int64()), "loss_mask": pa.list_(pa.int64()), "seq_len": pa.int64()})


def _context(cache: FeatureCache) -> list[int]:
    """Positions, in the cache's order, of the layers that the draft is conditioned on."""
    return [position for position, layer in enumerate(cache.target_layer_ids) if layer != last_layer(cache)]


def _check(cache: FeatureCache) -> None:
    layers, last = cache.target_layer_ids, last_layer(cache)
    if last not in layers or not _context(cache):
        wanted = [str(layer) for layer in layers if layer != last] or ["..."]
        raise InputError(
            f"{cache.path}: the speculators layout holds the output of the target's last decoder layer ({last}, before "
            f"the final norm) beside that of the draft's own; this cache has layers {layers}. Extract with "
            f"`--target-layers {','.join([*wanted, str(last)])}` into another --out"
        )


def _files(cache: FeatureCache) -> Iterator[ExportFile]:
    dtype, layers = DTYPE_NAMES[cache.manifest.torch_dtype], len(_context(cache)) + 1
    for i, length in enumerate(cache.index.num_tokens.tolist()):
        states = ("hidden_states", dtype, (length, layers, cache.hidden_size))
        size = safetensors_size([states, ("token_ids", "I64", (length,))])
        yield ExportFile(name=f"hidden_states/hs_{i}.safetensors", num_bytes=size, fill=partial(_fill, cache, i))
    starts = range(0, len(cache), ROWS_A_FILE)
    names = [f"data-{number:05d}-of-{len(starts):05d}.arrow" for number in range(len(starts))]
    for name, start in zip(names, starts, strict=True):
        rows = range(start, min(start + ROWS_A_FILE, len(cache)))
        size = int(cache.index.num_tokens[rows.start : rows.stop].sum(dtype=np.int64)) * 16 + 24 * len(rows)
        yield ExportFile(name=name, num_bytes=size, fill=partial(_fill_rows, cache, rows))
    info = json.dumps({"citation": "", "description": "", "homepage": "", "license": ""}).encode()
    state = json.dumps(
        {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": cache.manifest.fingerprint[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": "torch",
            "_output_all_columns": False,
            "_split": None,
        }
    ).encode()
    for name, text in (("dataset_info.json", info), ("state.json", state)):
        yield ExportFile(name=name, num_bytes=len(text), fill=partial(lambda data, file: write_all(file, data), text))


def _fill(cache: FeatureCache, i: int, file: BinaryIO) -> None:
    sample = cache[i]
    blocks = sample.hidden_states[0].unflatten(1, (len(cache.target_layer_ids), cache.hidden_size))
    order = [*_context(cache), cache.target_layer_ids.index(last_layer(cache))]
    write_safetensors(file, {"hidden_states": blocks[:, order], "token_ids": sample.input_ids[0]})


def _fill_rows(cache: FeatureCache, rows: range, file: BinaryIO) -> None:
    # A reader of its own: without checksums, it touches only the tokens. Those of the states are checked by _fill.
    plain = FeatureCache.open(cache.path)
    with pa.ipc.new_stream(pa.PythonFile(_Whole(file), "w"), SCHEMA) as stream:
        for i in rows:
            sample = plain[i]
            ids, mask = sample.input_ids[0], sample.loss_mask[0]
            columns = [[ids.numpy()], [mask.numpy()], [len(ids)]]
            stream.write_batch(
                pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
            )


class _Whole:
    """A file whose ``write`` writes everything, as Arrow expects."""

    closed = False

    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, data: memoryview) -> int:
        write_all(self._file, data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """The file is its owner's to close."""


def _settings(cache: FeatureCache) -> list[str]:
    # speculators numbers layers as transformers' hidden_states does: layer i's output is i + 1.
    layers = [cache.target_layer_ids[position] + 1 for position in _context(cache)]
    return [
        "--data-path OUT --on-missing raise",
        f"--target-layer-ids {' '.join(map(str, layers))} (it counts from 1)",
    ]


SPECULATORS = Layout(
    name="speculators",
    reader="speculators 0.9.0, ArrowDataset",
    check=_check,
    files=_files,
    needs_last_layer=True,
    settings=_settings,
)
