"""A shard in host memory: filled in place, then committed as a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs.dtypes import DTYPES
from cache_format.codecs.interface import BLOCK_STARTS, BLOCKS, ENERGY, total_energy
from cache_format.codecs.token_snr import TOKEN_SNR, token_snr
from cache_format.layout.safetensors_file import Container, TensorPlace
from cache_format.layout.shard_layout import ShardSchema, sample_hasher
from cache_format.storage.commit import committed, write_all
from cache_format.storage.direct_write import write_direct
from cache_format.storage.host_memory import PAGE, host_memory


class ShardBuffer:
    """Host memory that holds one shard while it is filled in place; used again for shard after shard."""

    def __init__(self, capacity: int, device: torch.device | None = None):
        """``capacity`` bytes: the largest shard of the plan. Copies come from ``device``, asynchronous if it can."""
        self.capacity = capacity
        memory = host_memory(capacity + 2 * PAGE, device)
        # In memory a byte lies on a page as it does in the file: see direct_write.py.
        self._memory = memory[-memory.data_ptr() % PAGE :]
        self.container: Container | None = None

    def begin(
        self, schema: ShardSchema, number: int, sample_ids: np.ndarray, num_tokens: np.ndarray, block_bytes: int = 0
    ) -> None:
        """Lay out shard ``number`` for samples of ``num_tokens`` tokens each, and fill in all but their rows.

        ``block_bytes``: room for the samples' blocks, see :meth:`end_blocks`.
        """
        self.schema, self.number = schema, number
        self.cu_seqlens = np.concatenate([[0], np.cumsum(num_tokens)]).astype(np.int64)
        self.container = schema.layout(number, len(num_tokens), int(self.cu_seqlens[-1]), block_bytes)
        # The header is kept apart: its length may change with that of the blocks.
        self._start = len(self.container.header) % PAGE
        self.tensor("cu_seqlens").numpy()[:] = self.cu_seqlens
        self.tensor("sample_ids").numpy()[:] = sample_ids
        self.tensor("attention_mask").fill_(1)

    def end_blocks(self, block_bytes: int) -> None:
        """Say how much of the room for blocks is used."""
        self.container = self.schema.layout(
            self.number, len(self.cu_seqlens) - 1, int(self.cu_seqlens[-1]), block_bytes
        )

    def tensor(self, name: str) -> Tensor:
        """The named tensor of the shard being filled, in place."""
        assert self.container is not None
        place = self.container.places[name]
        return self._slice(place.start, place.stop).view(DTYPES[place.dtype]).view(place.shape)

    def put_energy(self, by_token: Tensor) -> None:
        """What a lossy codec says of its errors: ``by_token`` float64 ``[n, 2, L]``, see :meth:`RowCodec.encode`."""
        self.tensor(ENERGY).copy_(total_energy(by_token))
        if self.schema.counts_tokens:
            self.tensor(TOKEN_SNR).copy_(torch.from_numpy(token_snr(by_token)))

    def without(self, dropped: np.ndarray) -> ShardBuffer:
        """A copy that leaves out the samples where bool ``dropped [n]`` is True; not for shards with blocks."""
        assert self.container is not None
        lengths, kept = np.diff(self.cu_seqlens), ~dropped
        copy = ShardBuffer(self.container.num_bytes + PAGE)
        copy.begin(self.schema, self.number, self.tensor("sample_ids").numpy()[kept], lengths[kept])
        rows = torch.from_numpy(np.repeat(kept, lengths))
        for tensor in self.schema.codec_head(int(kept.sum())):
            copy.tensor(tensor.name).copy_(self.tensor(tensor.name))
        for row in self.schema.token_tensors:
            copy.tensor(row.name).copy_(self.tensor(row.name)[rows])
        return copy

    def commit(self, path: Path, *, read_next: bool = False) -> int:
        """Checksum every sample, write the file and commit it; returns its size in bytes.

        ``read_next``: the file is read at once, to be uploaded, so it goes through the page cache.

        Raises:
            StorageError: the operating system refused; nothing is left under the final name.
        """
        assert self.container is not None
        ids = self.tensor("sample_ids").numpy()
        views = [self._rows(self.container.places[t.name]) for t in self.schema.token_tensors]
        bounds = [self.cu_seqlens] * len(views)
        if self.schema.has_blocks:
            views.append(self.tensor(BLOCKS).numpy())
            bounds.append(self.tensor(BLOCK_STARTS).numpy())
        checksums = self.tensor("sample_checksums").numpy()
        for i in range(len(ids)):
            hasher = sample_hasher(int(ids[i]))
            for rows, bound in zip(views, bounds, strict=True):
                hasher.update(rows[bound[i] : bound[i + 1]].data)
            checksums[i] = hasher.intdigest()
        header = self.container.header
        with committed(path) as file:
            write_all(file, header)
            data = self._bytes(len(header), self.container.num_bytes)
            if read_next:
                write_all(file, data.data)
            else:
                write_direct(file, data)
        return self.container.num_bytes

    def _slice(self, start: int, stop: int) -> Tensor:
        """The memory of file offsets ``start`` to ``stop``."""
        assert self.container is not None
        shift = self._start - len(self.container.header)
        return self._memory[start + shift : stop + shift]

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        return self._slice(start, stop).numpy()

    def _rows(self, place: TensorPlace) -> np.ndarray:
        return self._bytes(place.start, place.stop).reshape(place.shape[0], place.row_bytes)
