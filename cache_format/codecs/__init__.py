"""Codecs, by the name that a manifest and ``--codec`` give them. A new codec adds a name, not a format version."""

from __future__ import annotations

from typing import Any

from cache_format.codecs.fp8 import Fp8Codec
from cache_format.codecs.interface import BlockCodec, Codec, HeadTensor, RowCodec, States, TokenTensor
from cache_format.codecs.raw import RawCodec
from cache_format.codecs.zbits import ZbitsCodec

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (RawCodec, Fp8Codec, ZbitsCodec)}

__all__ = [
    "CODECS",
    "BlockCodec",
    "Codec",
    "Fp8Codec",
    "HeadTensor",
    "RawCodec",
    "RowCodec",
    "States",
    "TokenTensor",
    "ZbitsCodec",
    "codec_from_dict",
    "codec_named",
]


def codec_named(name: Any) -> Codec:
    """The codec of that name.

    Raises:
        ValueError: unknown; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in CODECS:
        raise ValueError(f"codec {name!r} is unknown to this version; known: {', '.join(CODECS)}")
    return CODECS[name]()


def codec_from_dict(stored: Any) -> Codec:
    """The codec that a manifest names.

    Raises:
        ValueError: unknown name or parameters.
    """
    codec = codec_named(stored.get("name") if isinstance(stored, dict) else stored)
    if codec.to_dict() != stored:
        raise ValueError(f"codec {stored!r} has parameters that this version does not know")
    return codec
