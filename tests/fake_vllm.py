"""A stand-in for vLLM: the parts of it that the backend touches, around a target of transformers in this process.

Its model is like one of vLLM: tokens of all requests in one row, layers that leave the residual aside, auxiliary
outputs sorted and without doubles. What vLLM may do wrong, ``Faults`` says.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from extractor.target.vllm.capture import CaptureExtension


@dataclass
class Faults:
    """What goes wrong, and what is to be seen of the engine."""

    current: ClassVar[Faults]
    auxiliary: bool = True
    layers_add: bool = False
    """layers give the sum, and beside it a residual that is a part of it"""
    sum_beside: float = 0.0
    """what the final norm gets beside the last layer's states"""
    keeps_output: bool = True
    """gives what the final norm gives, and not a copy"""
    backwards: bool = False
    """auxiliary outputs from the last layer to the first"""
    bad_layer: int | None = None
    """gives NaN"""
    same_layers: bool = False
    lost: int = 0
    """requests that a step leaves out"""
    chunks: int = 1
    """passes that a step is cut into"""
    chunks_over: int = 0
    """tokens of a step beyond which it is"""
    looks_beside: bool = False
    """a request's states depend on those before it"""
    dies_after: int | None = None
    """steps until the engine is dead"""
    wrong_by: float = 0.0
    does_not_start: Exception | None = None
    meeting: str = "tcp://localhost:1"
    """how its workers met"""
    multimodal: bool = False
    steps: list[list[int]] = field(default_factory=list)
    """tokens of each request, of each step that was run"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """of the engine that was started last"""
    environment: dict[str, str] = field(default_factory=dict)
    """in which it was"""


def _keep(seen: list[Tensor], _module: nn.Module, _inputs: Any, output: Any) -> None:
    seen.append(output[0] if isinstance(output, tuple) else output)


class _Layer(nn.Module):
    def __init__(self, adds: bool):
        super().__init__()
        self.adds, self.weight = adds, nn.Parameter(torch.ones(1))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return (states * 1, states / 3) if self.adds else (states / 2, states / 2)


class _Served(nn.Module):
    """As vLLM would have it: ``forward(input_ids [T], positions [T])``, several requests one after another."""

    def __init__(self, name: str, dtype: torch.dtype, faults: Faults):
        super().__init__()
        self.whole = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
        self.config, self.faults = self.whole.config, faults
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(_Layer(faults.layers_add) for _ in range(self.config.num_hidden_layers))
        self.model.norm = self.whole.model.norm
        self.asked: tuple[int, ...] = ()
        if faults.auxiliary:
            self.set_aux_hidden_state_layers = self._set

    def _set(self, ids: tuple[int, ...]) -> None:
        self.asked = tuple(sorted(set(ids), reverse=self.faults.backwards))

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, **_: Any) -> Any:
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        by_layer: list[list[Tensor]] = [[] for _ in self.model.layers]
        before = torch.zeros(())
        for start, stop in pairwise(starts):
            seen: list[Tensor] = []
            kept = partial(_keep, seen)
            hooks = [layer.register_forward_hook(kept) for layer in self.whole.model.layers]
            ids = input_ids[None, start:stop]
            self.whole.model(input_ids=ids, use_cache=False)
            for hook in hooks:
                hook.remove()
            for place, states in zip(by_layer, seen, strict=True):
                place.append(states.reshape(stop - start, -1) + self.faults.wrong_by + before)
            if self.faults.looks_beside:
                before = before + 1
        outputs = []
        for number, parts in enumerate(by_layer):
            states = torch.cat(by_layer[0] if self.faults.same_layers else parts)
            if number == self.faults.bad_layer:
                states[-1, -1] = float("nan")
            one, other = self.model.layers[number](states)
            outputs.append(one if self.faults.layers_add else one + other)
        last = self.model.norm(outputs[-1] + self.faults.sum_beside)
        last = last if self.faults.keeps_output else last * 1
        return (last, [outputs[i - 1] for i in self.asked]) if self.asked else last


class _Worker(CaptureExtension):
    def __init__(self, model: nn.Module):
        self.distributed_init_method = Faults.current.meeting
        groups = [[SimpleNamespace(backend=SimpleNamespace(get_name=lambda: "FAKE_ATTN"))]]
        self.model_runner = SimpleNamespace(get_model=lambda: model, attn_groups=groups)


class LLM:
    """``vllm.LLM``."""

    def __init__(self, **arguments: Any):
        self._faults = faults = Faults.current
        faults.arguments, faults.environment = arguments, dict(os.environ)
        if faults.does_not_start is not None:
            raise faults.does_not_start
        self._model = _Served(arguments["model"], getattr(torch, arguments["dtype"]), faults)
        self._workers = [_Worker(self._model)]
        model = SimpleNamespace(quantization=None, enforce_eager=arguments["enforce_eager"])
        cache = SimpleNamespace(num_gpu_blocks=4096, block_size=16, cache_dtype="auto")
        config = SimpleNamespace(cache_config=cache, model_config=model)
        core = SimpleNamespace(shutdown=lambda: None)
        self.llm_engine = SimpleNamespace(vllm_config=config, engine_core=core)

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(worker, method)(*args) for worker in self._workers]

    def generate(self, prompts: list[dict[str, Any]], _sampling: Any, use_tqdm: bool) -> None:
        rows, faults = [prompt["prompt_token_ids"] for prompt in prompts], self._faults
        if faults.dies_after is not None and len(faults.steps) >= faults.dies_after:
            raise RuntimeError("Executor failed.")
        faults.steps.append([len(row) for row in rows])
        rows = rows[: len(rows) - faults.lost]
        chunks = faults.chunks if sum(faults.steps[-1]) > faults.chunks_over else 1
        each = -(-len(rows) // chunks) or 1
        for start in range(0, len(rows), each):
            part = rows[start : start + each]
            positions = torch.cat([torch.arange(len(row)) for row in part])
            ids = torch.tensor([token for row in part for token in row], dtype=torch.int32)
            self._model(input_ids=ids, positions=positions)


class _EngineArgs:
    def __init__(self, **arguments: Any):
        self._config = AutoConfig.from_pretrained(arguments["model"])

    def create_model_config(self) -> Any:
        heads = self._config.num_key_value_heads
        return SimpleNamespace(
            is_multimodal_model=Faults.current.multimodal,
            architecture=self._config.architectures[0],
            get_total_num_kv_heads=lambda: heads,
            get_head_size=lambda: self._config.head_dim,
        )


class DefaultModelLoader:
    """Gives the weights that a test has put into ``weights``."""

    weights: tuple[tuple[str, Tensor], ...] = ()

    def __init__(self, load_config: Any):
        self.load_config = load_config

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Any:
        yield from self.weights

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str) -> nn.Module:
        return vllm_config.make()

    def track_weights_loading(self, model: nn.Module, loaded: set[str]) -> None:
        missing = {name for name, _ in model.named_parameters()} - loaded
        if missing:
            raise ValueError(f"not initialized from checkpoint: {missing}")


class PPMissingLayer(nn.Identity):
    """As vLLM's: gives its first argument."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return arguments[0] if arguments else next(iter(named.values()))


def get_pp_indices(num_layers: int, rank: int, size: int) -> tuple[int, int]:
    """``vllm.distributed.utils.get_pp_indices``, of layers that divide evenly."""
    return num_layers // size * rank, num_layers // size * (rank + 1)


def install(patch: Any) -> Faults:
    """Put the stand-in where ``import vllm`` finds it; the answer says what it does wrong, and may be changed."""
    stage = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    parts: dict[str, dict[str, Any]] = {
        "vllm": {
            "LLM": LLM,
            "SamplingParams": lambda **_: None,
            "__version__": "0.32.0",
            "envs": SimpleNamespace(VLLM_BATCH_INVARIANT=False),
        },
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type="cpu", device_control_env_var="FAKE")},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": _EngineArgs},
        "vllm.distributed": {},
        "vllm.distributed.utils": {"get_pp_indices": get_pp_indices},
        "vllm.distributed.parallel_state": {
            "get_pp_group": lambda: stage,
            "get_tensor_model_parallel_rank": lambda: 0,
        },
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {"register_model_loader": lambda name: lambda kind: kind},
        "vllm.model_executor.model_loader.default_loader": {"DefaultModelLoader": DefaultModelLoader},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {"PPMissingLayer": PPMissingLayer},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        patch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    patch.delitem(sys.modules, "extractor.target.vllm.loader", raising=False)
    Faults.current = Faults()
    return Faults.current
