"""Tensor parallelism: one target divided over all processes of torchrun, by transformers' plan for its architecture.

Rank 0 does the job as if it were alone; only it touches the cache. Before each pass it tells the others what it is
about to run, and they run their part of the same pass and throw the states away. So whatever rank 0 decides (what is
missing, which batches, trials at the start), the others follow without knowing of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed

from cache_format.codecs.dtypes import torch_dtype
from cache_format.errors import InputError
from cache_format.layout.captures import Captures
from extractor.config import ExtractOptions
from extractor.target.deterministic import be_deterministic
from extractor.target.forward import MASKED, UNMASKED, HiddenStateExtractor, row_memory
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.layer_ids import chosen_layer_ids
from extractor.target.load_target import TargetShape, load_config, load_wanted, resolve_device, resolve_dtype

_STOP, _LOAD, _PASS = range(3)
_HEADER = 5
"""int64: what, masked, with captures, rows, tokens a row"""

_PATIENCE = timedelta(days=7)
"""The others wait for as long as rank 0 prepares samples, or the disk holds it up."""


def world_size() -> int:
    """Processes that torchrun started.

    Raises:
        InputError: fewer than two.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size < 2:
        raise InputError(
            "--tp-plan divides the target over the processes of torchrun; start it as "
            "`torchrun --nproc-per-node 8 -m extractor extract --tp-plan auto ...`"
        )
    return size


def require_plan(config: Any) -> None:
    """Refuse a target that transformers cannot divide so, before anything is begun.

    Raises:
        InputError: no plan for its architecture, or attention heads that do not divide by the number of processes.
    """
    text, size = config.get_text_config(), world_size()
    if not getattr(text, "base_model_tp_plan", None):
        raise InputError(f"--tp-plan: transformers has none for {config.model_type}; try --device-map auto")
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None)
        if heads and heads % size:
            raise InputError(f"--tp-plan: {size} processes do not divide the target's {heads} {name}")


class Group:
    """The processes that share one target; everything sent goes from rank 0 to all."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)

    def load(self) -> None:
        """Rank 0: have the others load their parts, as this process is about to."""
        self._send(_LOAD)

    def announce(self, input_ids: Tensor, lengths: Sequence[int], padding: str, captures: Captures) -> None:
        """Rank 0: have the others run the pass that this process is about to run."""
        rows, longest = input_ids.shape
        self._send(_PASS, padding == MASKED, captures != Captures(), rows, longest)
        distributed.broadcast(torch.tensor(lengths, device=self.device), 0)
        distributed.broadcast(input_ids.contiguous(), 0)

    def stop(self) -> None:
        """Rank 0: let the others go."""
        self._send(_STOP)

    def follow(self, options: ExtractOptions) -> None:
        """The other ranks: do what rank 0 says, until it says that it is done."""
        target: HFDFlashTargetModel | None = None
        while True:
            header = torch.zeros(_HEADER, dtype=torch.int64, device=self.device)
            distributed.broadcast(header, 0)
            what, masked, captured, rows, longest = header.tolist()
            if what == _STOP:
                return
            if what == _LOAD:
                target = self._load(options)
                continue
            lengths = torch.zeros(rows, dtype=torch.int64, device=self.device)
            input_ids = torch.zeros(rows, longest, dtype=torch.int64, device=self.device)
            distributed.broadcast(lengths, 0)
            distributed.broadcast(input_ids, 0)
            assert target is not None
            captures = options.capture if captured else Captures()
            extractor = HiddenStateExtractor(target, MASKED if masked else UNMASKED, captures)
            out, extra = row_memory(extractor, int(lengths.sum()), self.device)
            extractor.forward(input_ids, lengths.tolist(), out, extra)

    def _send(self, *numbers: int) -> None:
        header = [*map(int, numbers), *[0] * (_HEADER - len(numbers))]
        distributed.broadcast(torch.tensor(header, device=self.device), 0)

    def _load(self, options: ExtractOptions) -> HFDFlashTargetModel:
        target = options.target
        if target.deterministic:
            be_deterministic()
        config = load_config(target.name, target.revision, target.trust_remote_code)
        dtype = torch_dtype(resolve_dtype(target.dtype, self.device))
        model = load_wanted(target, dtype, self.device, tp_size=world_size())
        whole_embeddings(model)
        hooked = HFDFlashTargetModel(model, chosen_layer_ids(target, TargetShape.from_config(config).num_hidden_layers))
        if target.compile:
            hooked.compile()
        return hooked


def follow(options: ExtractOptions) -> None:
    """A rank other than 0, from beginning to end."""
    Group(resolve_device(options.target.device, int(os.environ.get("LOCAL_RANK", 0)))).follow(options)


def whole_embeddings(model: Any) -> Any:
    """``model``'s two embeddings, put together on the CPU from all processes' parts; all of them call it together.

    Returns:
        what ``write_target_files`` asks a model for.
    """
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embed.weight
    weight = _whole(embed.weight)
    whole_embed = SimpleNamespace(weight=weight, embed_scale=getattr(embed, "embed_scale", 1.0))
    whole_head = None
    if head is not None:
        bias = None if head.bias is None else _whole(head.bias)
        whole_head = SimpleNamespace(weight=weight if tied else _whole(head.weight), bias=bias)
    return SimpleNamespace(get_input_embeddings=lambda: whole_embed, get_output_embeddings=lambda: whole_head)


def _whole(tensor: Any) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu()
