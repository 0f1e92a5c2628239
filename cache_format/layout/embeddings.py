"""target/embeddings.safetensors: the target's frozen input and output embeddings, tied weights stored once."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cache_format.codecs.dtypes import DTYPE_NAMES
from cache_format.errors import CacheError, StorageError
from cache_format.layout.manifest import TargetInfo
from cache_format.layout.safetensors_file import plan_container, read_container
from cache_format.storage.byte_source import LocalFile
from cache_format.storage.commit import committed, write_all
from cache_format.storage.paths import inside

EMBEDDINGS_NAME = "target/embeddings.safetensors"
EMBED = "embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
NORM = "norm.weight"


class ScaledEmbedding(nn.Embedding):
    """An embedding whose output is multiplied by a constant: in the weight's dtype, as Gemma's is, and then another."""

    def __init__(self, weight: Tensor, scale: float, then: float):
        super().__init__(weight.shape[0], weight.shape[1], _weight=weight)
        self.scale, self.then = scale, then

    def forward(self, input: Tensor) -> Tensor:
        """``[...]`` int64 -> ``[..., H]``."""
        embedded = super().forward(input)
        if self.scale != 1.0:
            embedded = embedded * torch.tensor(self.scale, dtype=self.weight.dtype, device=self.weight.device)
        return embedded if self.then == 1.0 else embedded * self.then


class ScaledHead(nn.Linear):
    """An LM head whose logits are multiplied by ``scale`` (Granite, Cohere) and then capped (Gemma 2)."""

    scale: float
    softcap: float

    def forward(self, input: Tensor) -> Tensor:
        """``[..., H]`` -> ``[..., V]``."""
        logits = super().forward(input)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if not self.softcap else self.softcap * torch.tanh(logits / self.softcap)


def write_embeddings(path: Path, tensors: dict[str, Tensor]) -> None:
    """Commit ``embed_tokens.weight [V, H]`` and, where given, ``lm_head.weight [V, H]``, its bias, ``norm.weight [H]``.

    Raises:
        StorageError: the operating system refused.
    """
    entries = [(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    container = plan_container(entries, {"format": "pt"})
    with committed(path) as file:
        write_all(file, container.header)
        for tensor in tensors.values():
            data = tensor.detach().to("cpu").contiguous().view(torch.uint8).reshape(-1)
            write_all(file, data.numpy().data)


def _load(cache: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    path = inside(cache, EMBEDDINGS_NAME)
    try:
        with closing(LocalFile(path)) as file:
            found = read_container(file).places
            wanted = [name for name in names if name in found]
            with safe_open(path, "pt") as weights:
                return {name: weights.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise CacheError(path, f"cannot be read: {error}") from None
    except OSError as error:
        raise StorageError(path, "read", error) from error


def load_input_embeddings(cache: Path, target: TargetInfo) -> nn.Embedding:
    """The target's token embedding, frozen, on the CPU, in the dtype it was extracted with; it multiplies as the target
    does before its first layer.

    Raises:
        CacheError: missing or not of the manifest's shape.
    """
    weight = _load(cache, (EMBED,)).get(EMBED)
    _check_shape(cache, EMBED, weight, target)
    assert weight is not None
    if target.embed_scale == target.input_scale == 1.0:
        return nn.Embedding.from_pretrained(weight, freeze=True)
    return ScaledEmbedding(weight, target.embed_scale, target.input_scale).requires_grad_(False)


def load_output_embeddings(cache: Path, target: TargetInfo) -> nn.Linear:
    """The target's LM head ``[V, H]``, frozen, on the CPU; from the input embedding where the two are tied. It gives
    the target's logits, so it multiplies and caps as the target does.

    Raises:
        CacheError: missing or not of the manifest's shape, or the target's logits do not follow from it.
    """
    if target.head_problem:
        raise CacheError(
            cache / EMBEDDINGS_NAME, f"holds no LM head that gives the target's logits: {target.head_problem}"
        )
    name = EMBED if target.tie_word_embeddings else HEAD
    tensors = _load(cache, (name, HEAD_BIAS))
    _check_shape(cache, name, tensors.get(name), target)
    weight, bias = tensors[name], tensors.get(HEAD_BIAS)
    with torch.device("meta"):
        bare = target.logit_scale == 1.0 and not target.logit_softcap
        kind = nn.Linear if bare else ScaledHead
        head = kind(target.hidden_size, weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    if isinstance(head, ScaledHead):
        head.scale, head.softcap = target.logit_scale, target.logit_softcap
    head.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=False)
    return head


def load_final_norm(cache: Path, target: TargetInfo) -> Tensor | None:
    """The ``w [H]`` of a target whose last norm is ``w * x / RMS(x)``; None of another, and in earlier caches.

    Raises:
        CacheError: it is of another shape.
    """
    weight = _load(cache, (NORM,)).get(NORM)
    if weight is not None and weight.shape != (target.hidden_size,):
        found = tuple(weight.shape)
        raise CacheError(cache / EMBEDDINGS_NAME, f"{NORM} is of shape {found}, expected [{target.hidden_size}]")
    return weight


def _check_shape(cache: Path, name: str, weight: Tensor | None, target: TargetInfo) -> None:
    if weight is None or weight.ndim != 2 or weight.shape[1] != target.hidden_size:
        found = "absent" if weight is None else f"of shape {tuple(weight.shape)}"
        raise CacheError(cache / EMBEDDINGS_NAME, f"{name} is {found}, expected [V, {target.hidden_size}]")
