"""One shard: flat, unpadded tensors over its samples in one safetensors file. Its name, its layout, its checksums.

The head comes first (cu_seqlens, sample_ids, sample_checksums and the codec's own: multiples of 8 bytes), then the
tensors with one row a token, those whose rows keep the widest alignment first: the codec's tensors (hidden_states on a
page), input_ids, the masks; last, where the codec makes them, the encoded blocks of the samples. But for the length
of these, a header follows from the plan, so it can be compared byte for byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import xxhash

from cache_format.codecs import BlockCodec, Codec, HeadTensor, RawCodec, States, TokenTensor
from cache_format.codecs.dtypes import DTYPE_NAMES
from cache_format.codecs.interface import BLOCKS
from cache_format.codecs.token_snr import BINS, TOKEN_SNR
from cache_format.layout.captures import LAST_HIDDEN_STATES, LOGSUMEXP, TOPK_IDS, TOPK_VALUES, Captures
from cache_format.layout.safetensors_file import Container, plan_container

FORMAT_NAME = "dflash-cache"
FORMAT_VERSION = 1
HEAD = (("cu_seqlens", "I64"), ("sample_ids", "I64"), ("sample_checksums", "U64"))


def capture_tensors(captures: Captures, dtype: torch.dtype, hidden_size: int) -> tuple[TokenTensor, ...]:
    """The tensors with a row a token that stand for ``captures``; states and logits in the stored ``dtype``."""
    name, tensors = DTYPE_NAMES[dtype], []
    if captures.last_hidden_states:
        tensors.append(TokenTensor(LAST_HIDDEN_STATES, name, hidden_size))
    if captures.logits_topk:
        tensors.append(TokenTensor(TOPK_VALUES, name, captures.logits_topk))
        tensors.append(TokenTensor(TOPK_IDS, "I32", captures.logits_topk))
        tensors.append(TokenTensor(LOGSUMEXP, "F32"))
    return tuple(tensors)


def shard_name(number: int) -> str:
    """File of shard ``number`` below the cache, with ``/`` between folder and name."""
    return f"shards/shard-{number:05d}.safetensors"


def finished_shards(names: Iterable[str]) -> list[int]:
    """Numbers of the shards among ``names``, the files in shards/, in order."""
    numbers = (re.fullmatch(r"shard-([0-9]{5,12})\.safetensors", name) for name in names)
    return sorted(int(match[1]) for match in numbers if match)


@dataclass(frozen=True, kw_only=True)
class ShardSchema:
    """What every shard of one cache has in common."""

    fingerprint: str
    """the cache's fingerprint; a shard of another cache is told by it"""
    codec: Codec
    states: States
    """hidden_states before the codec"""
    captures: tuple[TokenTensor, ...] = ()
    """see :func:`capture_tensors`"""
    token_snr: bool = False
    """whether shards of a lossy codec count the tokens by their SNR; those of earlier versions do not"""

    @cached_property
    def token_tensors(self) -> tuple[TokenTensor, ...]:
        """The tensors with a row for each token, in file order."""
        tensors = [
            *self.codec.tensors(self.states),
            *self.captures,
            TokenTensor("input_ids", "I32"),
            TokenTensor("attention_mask", "U8"),
            TokenTensor("loss_mask", "U8"),
        ]
        return tuple(sorted(tensors, key=lambda tensor: -math.gcd(tensor.row_bytes, 8)))

    @property
    def has_blocks(self) -> bool:
        """Whether a sample has, beside its rows, a run of bytes in ``BLOCKS``."""
        return isinstance(self.codec, BlockCodec)

    @property
    def raw(self) -> ShardSchema:
        """The same before the codec."""
        return replace(self, codec=RawCodec())

    @property
    def token_bytes(self) -> int:
        """Bytes stored for each token; without its share of the blocks."""
        return sum(tensor.row_bytes for tensor in self.token_tensors)

    def head(self, num_samples: int) -> list[HeadTensor]:
        """The tensors before those with a row a token."""
        sizes = {"cu_seqlens": num_samples + 1, "sample_ids": num_samples, "sample_checksums": num_samples}
        head = [HeadTensor(name, dtype, (sizes[name],)) for name, dtype in HEAD]
        return [*head, *self.codec_head(num_samples)]

    def codec_head(self, num_samples: int) -> list[HeadTensor]:
        """Those of them that the codec brings."""
        counts = [HeadTensor(TOKEN_SNR, "I32", (self.states.layers, BINS))] if self.counts_tokens else []
        return [*self.codec.head(self.states, num_samples), *counts]

    @property
    def counts_tokens(self) -> bool:
        """Whether a shard says how many tokens have which SNR."""
        return self.token_snr and not self.codec.lossless

    def metadata(self, number: int) -> dict[str, str]:
        """``__metadata__`` of shard ``number``."""
        return {
            "format": FORMAT_NAME,
            "format_version": str(FORMAT_VERSION),
            "fingerprint": self.fingerprint,
            "shard": str(number),
        }

    def layout(self, number: int, num_samples: int, num_tokens: int, block_bytes: int = 0) -> Container:
        """Header and places of shard ``number``; a pure function."""
        tensors = [(tensor.name, tensor.dtype, tensor.shape) for tensor in self.head(num_samples)]
        tensors += [(tensor.name, tensor.dtype, tensor.shape(num_tokens)) for tensor in self.token_tensors]
        if self.has_blocks:
            return plan_container([*tensors, (BLOCKS, "U8", (block_bytes,))], self.metadata(number))
        return plan_container(tensors, self.metadata(number), page_aligned="hidden_states")

    def num_bytes(self, number: int, num_samples: int, num_tokens: int) -> int:
        """Size of shard ``number`` as a file; where it depends on the states, the size that is to be expected."""
        expected = self.codec.expected_bytes(num_tokens, self.states) if self.has_blocks else 0
        return self.layout(number, num_samples, num_tokens, expected).num_bytes


def sample_hasher(sample_id: int) -> xxhash.xxh3_64:
    """Start of a sample's checksum: xxh3_64 over sample_id (int64), then its stored rows, tensor by tensor."""
    return xxhash.xxh3_64(np.int64(sample_id).astype("<i8").tobytes())
