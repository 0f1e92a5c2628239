"""Codecs, by the name that a manifest and ``--codec`` give them. A new codec adds a name, not a format version."""

from __future__ import annotations

from typing import Any

from cache_format.codecs.fp8 import Fp8Codec
from cache_format.codecs.interface import (
    BlockCodec,
    Codec,
    HeadTensor,
    LayeredBlockCodec,
    RowCodec,
    States,
    TokenTensor,
)
from cache_format.codecs.quant import QuantCodec
from cache_format.codecs.quant_statistics import CalibrationShare
from cache_format.codecs.raw import RawCodec
from cache_format.codecs.zbits import ZbitsCodec

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (RawCodec, Fp8Codec, ZbitsCodec, QuantCodec)}

__all__ = [
    "CODECS",
    "BlockCodec",
    "CalibrationShare",
    "Codec",
    "Fp8Codec",
    "HeadTensor",
    "LayeredBlockCodec",
    "QuantCodec",
    "RawCodec",
    "RowCodec",
    "States",
    "TokenTensor",
    "ZbitsCodec",
    "codec_from_dict",
    "codec_named",
]


def codec_named(name: Any) -> Codec:
    """The codec of that name, or of ``NAME:QUALITY``, as ``--codec`` takes it.

    Raises:
        ValueError: unknown; the message lists the known ones.
    """
    known, _, quality = name.partition(":") if isinstance(name, str) else ("", "", "")
    if known not in CODECS:
        raise ValueError(f"codec {name!r} is unknown to this version; known: {', '.join(CODECS)}")
    return CODECS[known].of_quality(quality)


def codec_from_dict(stored: Any) -> Codec:
    """The codec that a manifest names.

    Raises:
        ValueError: unknown name or parameters.
    """
    name = stored.get("name") if isinstance(stored, dict) else stored
    if not isinstance(name, str) or name not in CODECS:
        raise ValueError(f"codec {name!r} is unknown to this version; known: {', '.join(CODECS)}")
    if not isinstance(stored, dict):
        raise ValueError(f"codec {name} is a name, not an object")
    return CODECS[name].from_dict(stored)
