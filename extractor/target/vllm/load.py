"""An engine of vLLM for a target: what it is asked for, what is refused, and what it decided, for the identity."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cache_format.device import count, has_streams
from cache_format.errors import DFlashCacheError, InputError
from cache_format.layout.captures import Captures
from extractor.config import TargetOptions
from extractor.target.factors_unloaded import factors_around_layers
from extractor.target.load_target import TargetShape, load_config
from extractor.target.stored_embeddings import StoredWeights, stored_embeddings
from extractor.target.vllm.backend import VllmBackend
from extractor.target.vllm.engine import MOST_REQUESTS, ROOM, Engine
from extractor.target.vllm.probe import prove, prove_room
from extractor.target.vllm.processes import apart_from_the_terminal, meeting_place, speak_in_lines
from extractor.target.vllm.refused import multimodal, require_length, require_servable
from extractor.terminal.progress import say

NO_PADDING = "none"
"""Its value of ``padding`` in the identity: requests are of their own lengths."""

_MOST_IN_A_BLOCK = 1024

_NOT_STARTED, _NOT_BOUND = "WorkerProc initialization failed", "to bind threads of"
"""In what vLLM says of workers that died, and of more workers than a machine has parts of memory."""

_ENVIRONMENT = {
    # The scheduler in this process; see engine.py.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Seconds; with the four until it kills them there is time left after Ctrl-C.
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "2",
    # A request's one token, which is never run, may come after the target's last position.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}

_OF_TORCHRUN = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|(GROUP|ROLE|TORCHELASTIC)_.*"
)
"""Environment variables by which processes of torchrun meet. An engine's workers meet by themselves; told to use
torchrun's store they would wait for it for ever."""

_LEFT_OUT_BY_TRANSFORMERS = {"deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}}
"""model_type -> fields that vLLM reads and transformers 5 does not write: its class knows no other values, while vLLM
would take those of the model before it."""


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What an engine is to be made for."""

    target: TargetOptions
    target_layer_ids: Sequence[int]
    captures: Captures
    dtype: torch.dtype
    device: torch.device
    longest: int
    """tokens of the longest sample"""
    most_tokens: int
    """of the largest batch"""

    @property
    def num_layers(self) -> int | None:
        """Layers to run, from the first on; None: all."""
        return None if self.captures.last_hidden_states else max(self.target_layer_ids) + 1


def load_vllm(
    target: TargetOptions,
    target_layer_ids: Sequence[int],
    captures: Captures,
    *,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
    batch_tokens: int,
) -> VllmBackend:
    """An engine that has the target, tried out on a few tokens.

    Args:
        target: which, and how it is divided.
        target_layer_ids: to capture.
        captures: beside them.
        dtype: of the states.
        device: the first one of the engine.
        longest: tokens of the longest sample.
        batch_tokens: of the largest batch of samples that are no longer.

    Raises:
        InputError: vLLM is not installed, cannot run this target here, or gives other states than transformers.
        EngineError: the engine did not stand the trial.
    """
    began = time.monotonic()
    config = load_config(target.name, target.revision, target.trust_remote_code)
    require_servable(target, config)
    require_length(config, longest)
    _import_vllm()
    wanted = _Wanted(
        target=target,
        target_layer_ids=target_layer_ids,
        captures=captures,
        dtype=dtype,
        device=device,
        longest=longest,
        most_tokens=max(longest, batch_tokens),
    )
    shape = TargetShape.from_config(config)
    weights = StoredWeights(target.name, target.revision)
    embeddings = stored_embeddings(weights, config, wanted.dtype, target.trust_remote_code)
    factors = factors_around_layers(config, embeddings, target.trust_remote_code)
    with meeting_place() as folder:
        llm, sampling = _start(wanted, config, shape, folder)
        engine = _engine(llm, sampling, wanted, shape.hidden_size)
        backend = VllmBackend(
            engine,
            wanted.target_layer_ids,
            shape.hidden_size,
            wanted.dtype,
            wanted.captures,
            embeddings=embeddings,
            factors=factors,
            decided=decided(llm.llm_engine.vllm_config, engine.facts),
        )
        say(f"vLLM is up after {time.monotonic() - began:.0f} s: {engine.facts['model']}, {engine.facts['capture']}")
        prove_room(engine, shape, wanted.longest)
        quantised = getattr(config, "quantization_config", None) is not None
        prove(backend, target, weights, shape, quantised=quantised, longest=wanted.longest)
    return backend


def _engine(llm: Any, sampling: Any, wanted: _Wanted, width: int) -> Engine:
    cache = llm.llm_engine.vllm_config.cache_config
    _require_room(cache, wanted.most_tokens)
    return Engine(
        llm,
        wanted.target_layer_ids,
        wanted.captures.last_hidden_states,
        width=width,
        dtype=wanted.dtype,
        most_tokens=wanted.most_tokens,
        block_tokens=cache.block_size,
        sampling=sampling,
    )


def left_out_by_transformers(config: Any) -> dict[str, Any]:
    """Fields that vLLM reads and that this configuration, as transformers writes it, does not have."""
    fields = _LEFT_OUT_BY_TRANSFORMERS.get(config.model_type, {})
    return {name: value for name, value in fields.items() if not hasattr(config, name)}


def decided(vllm_config: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """What an engine has decided and what can change a byte, for the identity."""
    vllm = importlib.import_module("vllm")
    model, cache = vllm_config.model_config, vllm_config.cache_config
    return {
        "attn_implementation": "vllm " + ", ".join(facts["attention"]),
        "padding": NO_PADDING,
        "parameters": facts["parameters"],
        "vllm.model": facts["model"],
        "vllm.kernels": facts["kernels"],
        "vllm.version": vllm.__version__,
        "vllm.quantization": model.quantization,
        "vllm.kv_cache_dtype": str(cache.cache_dtype),
        "vllm.batch_invariant": bool(getattr(vllm.envs, "VLLM_BATCH_INVARIANT", False)),
        "vllm.eager": model.enforce_eager,
        "vllm.capture": facts["capture"],
        "vllm.block_size": cache.block_size,
    }


def _import_vllm() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # It removes the names that a stopped job leaves; what it says of that would alarm.
    warnings = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, warnings))
    # It sets its own level when an engine starts, and has said much by then.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    try:
        importlib.import_module("vllm")
    except Exception as error:
        raise InputError(f"--backend vllm: the vLLM that is installed here cannot be imported: {error}") from error
    speak_in_lines()


def _start(wanted: _Wanted, config: Any, shape: TargetShape, folder: str) -> tuple[Any, Any]:
    """``vllm.LLM`` and its sampling parameters; processes of this machine meet in ``folder``.

    Raises:
        InputError: vLLM cannot run this target so.
    """
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from extractor.target.vllm.loader import EXTENSION, LOAD_FORMAT, NUM_LAYERS

    target, kind = wanted.target, current_platform.device_type
    if has_streams(wanted.device) != (kind != "cpu"):
        raise InputError(f"--device {wanted.device}: the vLLM that is installed here runs on {kind}")
    if kind == "cpu" and target.expert_parallel:
        raise InputError(
            "--expert-parallel: vLLM's kernel of experts for CPUs (0.32) takes all of them for its own and reads "
            "beyond those that it has; leave it out, --tensor-parallel divides each expert"
        )
    num_layers = wanted.num_layers or shape.num_hidden_layers
    if target.pipeline_parallel > num_layers:
        raise InputError(
            f"--pipeline-parallel {target.pipeline_parallel}: there are {num_layers} layers up to the last captured, "
            "and each stage needs one"
        )
    arguments: dict[str, Any] = {
        "model": target.name,
        "revision": target.revision,
        "trust_remote_code": target.trust_remote_code,
        "skip_tokenizer_init": True,
        "dtype": str(wanted.dtype).removeprefix("torch."),
        "seed": 0,
        "enforce_eager": True,
        "async_scheduling": False,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "max_model_len": wanted.longest + 1,
        "max_num_batched_tokens": wanted.most_tokens + 1,
        "max_num_seqs": min(MOST_REQUESTS, wanted.most_tokens),
        "tensor_parallel_size": target.tensor_parallel,
        "pipeline_parallel_size": target.pipeline_parallel,
        "enable_expert_parallel": target.expert_parallel,
        "distributed_executor_backend": _executor(wanted, current_platform.device_control_env_var),
        "load_format": LOAD_FORMAT,
        "use_tqdm_on_load": False,
        "model_loader_extra_config": {NUM_LAYERS: num_layers},
        "worker_extension_cls": EXTENSION,
        "hf_overrides": left_out_by_transformers(config),
    }
    if arguments["distributed_executor_backend"] == "mp":
        # Not for Ray: it gives the environment to nodes that have no such folder.
        os.environ["VLLM_RPC_BASE_PATH"] = folder
    if kind == "cpu":
        # Its rotary kernel takes the stride of a query's heads for that of its tokens where a query has three
        # dimensions, as in MLA; torch's own operations do not.
        arguments["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    try:
        model = EngineArgs(**arguments).create_model_config()
        if model.is_multimodal_model:
            raise multimodal(model.architecture)
        if kind == "cpu":
            # Else it takes nearly all of the machine's memory for keys and values.
            arguments["kv_cache_memory_bytes"] = _cache_bytes(model, num_layers, wanted)
        with _hidden(_OF_TORCHRUN), apart_from_the_terminal():
            llm = LLM(**arguments)
    except DFlashCacheError:
        raise
    except Exception as error:  # a worker that did not start is told of by no other type
        raise InputError(f"--backend vllm: vLLM cannot run this target here: {_reason(error)}") from error
    atexit.register(llm.llm_engine.engine_core.shutdown)
    return llm, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)


@contextmanager
def _hidden(names: re.Pattern[str]) -> Iterator[None]:
    """Start processes without those environment variables."""
    kept = {name: value for name, value in os.environ.items() if names.fullmatch(name)}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


def _reason(error: Exception) -> str:
    """One line of what vLLM says; its checks of options put it below a headline."""
    if _NOT_STARTED in str(error):
        return "a worker process ended before it was ready; what it said stands above (if nothing: it was killed)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = next((line for line in lines if line.startswith("Value error, ")), lines[0]).removeprefix("Value error, ")
    said = (" ".join(lines[:2]) if said.endswith(":") else said).partition(" [type=")[0]
    if _NOT_BOUND in said:
        return f"{said}. For example: VLLM_CPU_OMP_THREADS_BIND='0|1' gives each of two workers a core"
    return said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"


def _cache_bytes(model: Any, num_layers: int, wanted: _Wanted) -> int:
    """Memory of each worker for the keys and values of one step."""
    heads = max(1, model.get_total_num_kv_heads() // wanted.target.tensor_parallel)
    token = 2 * num_layers * heads * model.get_head_size() * wanted.dtype.itemsize
    return int(token * (ROOM * wanted.most_tokens + _MOST_IN_A_BLOCK))


def _require_room(cache: Any, most_tokens: int) -> None:
    tokens = (cache.num_gpu_blocks - 1) * cache.block_size
    if tokens < ROOM * most_tokens:
        raise InputError(
            f"--backend vllm: beside its weights the device has room for the keys and values of {tokens:,} tokens, and "
            f"a batch may take {ROOM * most_tokens:,}; begin another cache with --batch-tokens {tokens // ROOM}"
        )


def _executor(wanted: _Wanted, variable: str) -> str:
    """How vLLM starts its workers; those of this machine are given their devices through ``variable``.

    Raises:
        InputError: not enough devices from this worker's on.
    """
    if not has_streams(wanted.device):
        return "mp"
    shown = os.environ.get(variable)
    here = shown.split(",") if shown else [str(number) for number in range(count(wanted.device.type))]
    first, needed = wanted.device.index or 0, wanted.target.devices
    if needed > len(here):
        return "ray"
    if first + needed > len(here):
        raise InputError(f"--device {wanted.device}: an engine of {needed} devices does not fit from there on")
    os.environ[variable] = ",".join(here[first : first + needed])
    return "mp"
