"""The target's two embeddings straight from its weight files, without the target."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cache_format.errors import InputError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class StoredWeights:
    """The safetensors files of a target, from a folder or the hub, opened tensor by tensor."""

    def __init__(self, name: str, revision: str | None):
        """
        Raises:
            InputError: the target has no such files, or damaged ones.
        """
        self._name, self._revision = name, revision
        index = self._path(INDEX)
        if index is not None:
            self._files = self._listed(index)
            return
        single = self._path(SINGLE)
        if single is None:
            raise InputError(f"--target {name}: its weights are not safetensors files ({INDEX}, or {SINGLE})")
        with self._opened(single) as file:
            self._files = dict.fromkeys(file.keys(), SINGLE)

    def require_whole(self) -> None:
        """
        Raises:
            InputError: a file is missing, or not as long as it says.
        """
        for file in sorted(set(self._files.values())):
            with self._opened(self._whole_path(file)):
                pass

    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(self._whole_path(file).stat().st_size for file in set(self._files.values()))

    def read(self, name: str) -> Tensor:
        """The tensor that a model of transformers calls ``name``; files may have another prefix before it.

        Raises:
            InputError: no file has it, or several might.
        """
        last = "." + ".".join(name.split(".")[-2:])
        found = [name] if name in self._files else [stored for stored in self._files if ("." + stored).endswith(last)]
        if len(found) != 1:
            raise InputError(
                f"--target {self._name}: its weight files have {len(found)} tensors for {name}, not one, so the cache "
                "cannot have its embeddings"
            )
        with self._opened(self._whole_path(self._files[found[0]])) as file:
            tensor: Tensor = file.get_tensor(found[0])
        return tensor

    def _listed(self, index: Path) -> dict[str, str]:
        try:
            files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            if not all(isinstance(file, str) for file in files.values()):
                raise TypeError("not names of files")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--target {self._name}: {index} is not an index of weight files ({error})") from error
        return files

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, "pt") as file:
                yield file
        except SafetensorError as error:
            raise InputError(f"--target {self._name}: {path} is damaged ({error}); fetch it again") from error

    def _whole_path(self, file: str) -> Path:
        path = self._path(file)
        if path is None:
            raise InputError(f"--target {self._name}: {file} is missing, which its index names")
        return path

    def _path(self, file: str) -> Path | None:
        from transformers.utils import cached_file

        found = cached_file(
            self._name,
            file,
            revision=self._revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)


def stored_embeddings(weights: StoredWeights, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """What ``write_target_files`` asks a model for: both embeddings in ``dtype``.

    Raises:
        InputError: they cannot be found in the files, or are stored in a quantised form.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()

    def read(parameter: Tensor) -> Tensor:
        name = names[id(parameter)]
        tensor = weights.read(name)
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise InputError(f"--target: {name} is stored as {tensor.dtype} {list(tensor.shape)}; it may be quantised")
        return tensor.to(dtype)

    weight = read(embed.weight)
    # On the device meta a buffer has no value; in float32 it is what the model multiplies by.
    scale = getattr(embed, "scalar_embed_scale", getattr(embed, "embed_scale", 1.0))
    whole_embed = SimpleNamespace(weight=weight, embed_scale=torch.tensor(scale).item())
    whole_head = None
    if head is not None:
        tied = head.weight is embed.weight or model.config.get_text_config().tie_word_embeddings
        bias = None if getattr(head, "bias", None) is None else read(head.bias)
        whole_head = SimpleNamespace(weight=weight if tied else read(head.weight), bias=bias)
    return SimpleNamespace(get_input_embeddings=lambda: whole_embed, get_output_embeddings=lambda: whole_head)
