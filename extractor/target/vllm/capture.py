"""In vLLM's worker processes: states of chosen layers off the model as it runs, into memory shared with the job.

vLLM mixes :class:`CaptureExtension` into its worker class; the job calls its methods by name. Nothing of vLLM is
imported here: what it needs of a worker is ``model_runner``, ``vllm_config`` and its ranks, which tests stand in for.

A model's *auxiliary outputs* (made for EAGLE-3) are what it says itself of its layers: id i + 1 is the output of layer
i with the residual added, before the final norm. vLLM sorts such ids and drops doubles without a word, so the order
asked for is kept here. Where a model has none, or is divided into stages, hooks on its layers give the same.

Which rows belong to which request is told from the tokens: a request begins where its position is 0, and its tokens'
digest says which one it is. That holds for whole prompts only: no prefix caching, no chunked prefill.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Sequence
from enum import Enum
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.in_fact import decided_in_fact
from extractor.target.vllm.processes import forget_shared_memory
from extractor.target.vllm.residual import Residual, Taken

AUXILIARY, HOOKS = "auxiliary outputs", "layer hooks"


def digest(tokens: np.ndarray) -> bytes:
    """Of a request's token ids, int64 ``[n]``."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, np.int64).data, digest_size=16).digest()


def shared_rows(path: str, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """``[tokens, width]`` in the file ``path``, which whoever maps it shares."""
    return torch.from_file(path, shared=True, size=tokens * width, dtype=dtype).view(tokens, width)


class SharedFile(NamedTuple):
    """Memory that the job has open, for its workers to map."""

    path: str
    """by the job's process and descriptor"""
    inode: int
    num_bytes: int

    def is_here(self) -> bool:
        """Whether ``path`` is that file; on another machine it is nothing, or another process's."""
        try:
            stat = os.stat(self.path)
        except OSError:
            return False
        return (stat.st_ino, stat.st_size) == (self.inode, self.num_bytes)


class CaptureExtension:
    """Methods that a vLLM worker gets; all workers of an engine are called with the same arguments."""

    model_runner: Any
    vllm_config: Any
    distributed_init_method: str

    def capture_begin(
        self,
        layer_ids: list[int],
        last_hidden_states: bool,
        file: SharedFile,
        tokens: int,
        width: int,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """Capture from now on, and say what kind of model this is.

        Args:
            layer_ids: of which layers, in the order of the columns.
            last_hidden_states: the model's output too, behind them.
            file: of the shared rows.
            tokens: rows that it has room for.
            width: H, features of one layer.
            dtype: of the rows.

        Raises:
            ValueError: a layer that this model has not.
        """
        forget_shared_memory(self.distributed_init_method)
        model = self.model_runner.get_model()
        columns = len(layer_ids) + last_hidden_states
        first, last, self._capture_writes = self._capture_place()
        self._capture_columns, self._capture_width = columns, width
        self._capture_last = len(layer_ids) if last_hidden_states and last else None
        self._capture_states: dict[int, Tensor] = {}
        self._capture_hooked: dict[int, Taken] = {}
        self._capture_residual: Residual | None = None
        self._capture_whole = first and last
        self._capture_wanted: dict[bytes, deque[int]] | None = None
        self._capture_taken, self._capture_passes = [0] * columns, 0
        if self._capture_writes:
            if not SharedFile(*file).is_here():
                raise ValueError("a stage of the pipeline runs on another machine than the job; use --tensor-parallel")
            self._capture_rows = shared_rows(SharedFile(*file).path, tokens, columns * width, dtype)
        self._capture_auxiliary: list[int] | None = None
        if hasattr(model, "set_aux_hidden_state_layers") and first and last:
            order = sorted({layer_id + 1 for layer_id in layer_ids})
            self._capture_auxiliary = [order.index(layer_id + 1) for layer_id in layer_ids]
            model.set_aux_hidden_state_layers(tuple(order))
        else:
            layers = HFDFlashTargetModel(model, layer_ids)._get_transformer_layers()
            here = [next(layer.parameters(), None) is not None for layer in layers]
            self._capture_residual = Residual(model, list(compress(layers, here)), last=last)
            for position, layer_id in enumerate(layer_ids):
                if here[layer_id]:
                    layers[layer_id].register_forward_hook(self._capture_hook(position))
        model.register_forward_hook(self._capture_after, with_kwargs=True)
        if not first and self.model_runner.intermediate_tensors is None:
            # vLLM makes it in a trial pass, which it leaves out on the CPU.
            self.model_runner.intermediate_tensors = model.make_empty_intermediate_tensors(
                batch_size=self.model_runner.max_num_tokens, dtype=dtype, device=self.model_runner.device
            )
        return {
            "model": type(model).__name__,
            "attention": self._capture_attention(),
            "capture": HOOKS if self._capture_auxiliary is None else AUXILIARY,
            "kernels": kernels(model),
            "meeting": self.distributed_init_method,
            **decided_in_fact(model),
        }

    def capture_want(self, lengths: list[int], digests: list[bytes]) -> None:
        """Before a step: its requests in order, whose rows follow one another from the first row on."""
        wanted: dict[bytes, deque[int]] = {}
        start = 0
        for length, key in zip(lengths, digests, strict=True):
            wanted.setdefault(key, deque()).append(start)
            start += length
        self._capture_wanted = wanted
        self._capture_taken, self._capture_passes = [0] * self._capture_columns, 0

    def capture_taken(self) -> dict[str, Any]:
        """After a step: rows written for each column by this worker, and the passes of the model it took."""
        self._capture_wanted = None
        return {"rows": self._capture_taken, "passes": self._capture_passes}

    def _capture_place(self) -> tuple[bool, bool, bool]:
        """Whether this worker has the model's first layers, its last ones, and is the one of its group that writes."""
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        stages = get_pp_group()
        return stages.is_first_rank, stages.is_last_rank, get_tensor_model_parallel_rank() == 0

    def _capture_attention(self) -> list[str]:
        """Names of the attention kernels in use."""
        groups = getattr(self.model_runner, "attn_groups", None) or []
        return sorted({group.backend.get_name() for of_cache in groups for group in of_cache})

    def _capture_hook(self, position: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._capture_wanted is None:
                return
            assert self._capture_residual is not None
            self._capture_hooked[position] = self._capture_residual.take(output)

        return hook

    def _capture_after(self, _model: nn.Module, _inputs: Any, named: dict[str, Any], output: Any) -> Any:
        """Behind every pass of the whole model; gives vLLM the output that it would have had."""
        if self._capture_auxiliary is not None:
            output, auxiliary = output
            self._capture_states = {p: auxiliary[place] for p, place in enumerate(self._capture_auxiliary)}
        if self._capture_wanted is not None:
            if self._capture_residual is not None:
                self._capture_residual.decide(output, alone=self._capture_whole)
                for position, taken in self._capture_hooked.items():
                    self._capture_states[position] = self._capture_residual.states(taken)
            if self._capture_last is not None:
                self._capture_states[self._capture_last] = output
            self._capture_passes += 1
            if self._capture_writes:
                self._capture_take(named.get("input_ids"), named["positions"])
        self._capture_states, self._capture_hooked = {}, {}
        return output

    def _capture_take(self, input_ids: Tensor | None, positions: Tensor) -> None:
        if input_ids is None:
            raise ValueError("this model takes embeddings, not tokens, so its requests cannot be told apart")
        # Models of several position axes have one row each.
        positions = positions[0] if positions.dim() > 1 else positions
        tokens = input_ids.to("cpu", torch.int64).numpy()
        begins = (positions == 0).nonzero()[:, 0].tolist()
        runs: list[tuple[int, int, int]] = []
        assert self._capture_wanted is not None
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            places = self._capture_wanted.get(digest(tokens[begin:end]))
            if not places:
                continue
            start = places.popleft()
            # Requests that follow one another on both sides are one copy; mostly all of a step do.
            if runs and runs[-1][1] == begin and runs[-1][2] + begin - runs[-1][0] == start:
                begin, _, start = runs.pop()
            runs.append((begin, end, start))
        for column, states in self._capture_states.items():
            left = column * self._capture_width
            for begin, end, start in runs:
                into = self._capture_rows[start : start + end - begin, left : left + self._capture_width]
                into.copy_(states[begin:end])
                self._capture_taken[column] += end - begin


def kernels(model: nn.Module) -> str:
    """What computes the model's linear layers and experts, such as ``Fp8LinearMethod CutlassFP8Kernel 28``."""
    found = Counter(
        _named(part)
        for module in model.modules()
        for part in (getattr(module, "quant_method", None), getattr(module, "scheme", None))
        if part is not None
    )
    return ", ".join(f"{name} {count}" for name, count in sorted(found.items()))


def _named(part: Any) -> str:
    chosen = {value.name for value in vars(part).values() if isinstance(value, Enum)}
    chosen |= {type(value).__name__ for value in vars(part).values() if type(value).__name__.endswith("Kernel")}
    return " ".join([type(part).__name__, *sorted(chosen)])


def rows_of(answers: Sequence[dict[str, Any]]) -> tuple[list[int], int]:
    """What :meth:`CaptureExtension.capture_taken` of all workers comes to: rows of each column, and passes."""
    rows = np.sum([answer["rows"] for answer in answers], axis=0).tolist()
    return rows, max(answer["passes"] for answer in answers)
