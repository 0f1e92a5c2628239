"""A target in GGUF: one file with weights, configuration and tokenizer. transformers reads it, and dequantises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cache_format.errors import InputError

SUFFIX = ".gguf"
_WEIGHTS = ("*.safetensors", "*.bin")


def place_and_file(name: str) -> tuple[str, str | None]:
    """What transformers takes for ``--target``: the folder or hub id, and the GGUF file there.

    The file may be named (``folder/model.gguf``, ``owner/name/model.gguf``), or be the only one in a folder without
    other weights. None: ``name`` is not GGUF.

    Raises:
        InputError: no such file, several that could be meant, or a part of one.
    """
    path = Path(name)
    if name.endswith(SUFFIX):
        place, file = _named(name)
    elif path.is_dir() and not any(found for pattern in _WEIGHTS for found in path.glob(pattern)):
        files = sorted(found.name for found in path.glob(f"*{SUFFIX}"))
        if len(files) > 1:
            raise InputError(
                f"--target {name}: has {len(files)} GGUF files; choose one with --gguf-file: {', '.join(files)}"
            )
        if not files:
            return name, None
        place, file = name, files[0]
    else:
        return name, None
    if (part := re.search(r"-\d{5}-of-(\d{5})\.gguf$", file)) and int(part[1]) > 1:
        raise InputError(
            f"--target {name}: is one of {int(part[1])} parts, which transformers cannot read; put them together with "
            "llama.cpp's `llama-gguf-split --merge`, or give the target as safetensors"
        )
    return place, file


def _named(name: str) -> tuple[str, str]:
    path = Path(name)
    if path.is_file() or path.parent.is_dir():
        if not path.is_file():
            raise InputError(f"--target {name}: no such file")
        return str(path.parent), path.name
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if path.is_absolute() or not file:
        raise InputError(f"--target {name}: no such file (of the hub it would be owner/name/file.gguf)")
    return f"{owner}/{repository}", file


def joined_name(target: str, gguf_file: str | None) -> str:
    """``--target`` with ``--gguf-file``, as one name.

    Raises:
        InputError: the two do not go together.
    """
    if gguf_file is None:
        return target
    if not gguf_file.endswith(SUFFIX) or gguf_file.startswith("/") or ".." in Path(gguf_file).parts:
        raise InputError(
            f"--gguf-file {gguf_file}: give the name of a .gguf file in the folder or repository of --target"
        )
    if target.endswith(SUFFIX):
        raise InputError(f"--target {target} is a GGUF file already; leave out --gguf-file")
    return f"{target.rstrip('/')}/{gguf_file}"


def gguf_options(file: str | None) -> dict[str, Any]:
    """For ``from_pretrained`` of a configuration or tokenizer."""
    return {} if file is None else {"gguf_file": file}


def dequantising() -> dict[str, Any]:
    """For ``from_pretrained`` of a model: plain weights, so that states do not hang on which kernels are installed."""
    try:
        from transformers import GgufConfig
    except ImportError:
        # Versions before it do nothing else.
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
