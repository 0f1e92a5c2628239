"""The target from a folder or the hub: configuration, tokenizer, weights."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache_format.device import CPU, accelerators, count, has_streams, parse, select, synchronize, without_streams
from cache_format.errors import InputError
from extractor.config import TargetOptions
from extractor.target.adapter import with_adapter
from extractor.target.gguf_file import dequantising, gguf_options, place_and_file
from extractor.target.parallel_plan import parallel_plan
from extractor.target.unloaded import auto_class, caps_attention, require_experts, require_on_devices
from extractor.terminal.others import no_bar_of_transformers
from extractor.terminal.progress import say


@dataclass(frozen=True, kw_only=True)
class TargetShape:
    """Sizes of a target, from its configuration alone."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    tie_word_embeddings: bool

    def embedding_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the input embedding and, unless tied, the LM head."""
        return (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size * dtype.itemsize

    @staticmethod
    def from_config(config: Any) -> TargetShape:
        """Sizes of the text decoder, also where it is part of a multimodal model.

        Raises:
            InputError: the configuration does not name them.
        """
        text = config.get_text_config()
        try:
            return TargetShape(
                model_type=config.model_type,
                hidden_size=text.hidden_size,
                num_hidden_layers=text.num_hidden_layers,
                vocab_size=text.vocab_size,
                tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", text.tie_word_embeddings)),
            )
        except AttributeError as error:
            raise InputError(
                f"--target: a {config.model_type} model is not a decoder language model: {error}"
            ) from None


def load_config(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The target's configuration.

    Raises:
        InputError: no such target, or one that transformers cannot load; says what to do.
    """
    from transformers import AutoConfig

    place, file = place_and_file(name)
    _require_found(place, revision)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, **gguf_options(file)}
    return _loaded(AutoConfig.from_pretrained, place, **options)


def load_tokenizer(name: str, revision: str | None, trust_remote_code: bool, chat_template: Path | None = None) -> Any:
    """The target's tokenizer; ``chat_template``: file with the template to give it.

    Raises:
        InputError: the target has none that transformers can load, or the template cannot be read.
    """
    from transformers import AutoTokenizer

    place, file = place_and_file(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, **gguf_options(file)}
    tokenizer = _loaded(AutoTokenizer.from_pretrained, place, **options)
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--chat-template {chat_template}: cannot be read: {error}") from error
    return tokenizer


def load_target(
    name: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
    trust_remote_code: bool,
    experts_implementation: str | None = None,
    device_map: str | None = None,
    tp_size: int | None = None,
    expert_parallel: bool = False,
) -> nn.Module:
    """The target with its weights, frozen, in eval mode, on ``device`` or divided as ``device_map`` says.

    Weights go to a device tensor by tensor (with accelerate): the host never holds all of them.

    With ``tp_size`` it is divided over as many processes, as :func:`parallel_plan` says, which all call this together.

    Raises:
        InputError: it cannot be loaded so; says why.
    """
    place, file = place_and_file(name)
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code}
    config = load_config(name, revision, trust_remote_code)
    if file is not None:
        # Reading the configuration out of such a file takes seconds.
        options |= {**gguf_options(file), **dequantising(), "config": config}
    if attn_implementation is None and caps_attention(config):
        attn_implementation = "eager"
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if experts_implementation:
        options["experts_implementation"] = experts_implementation
    if device_map:
        options["device_map"] = device_map
    elif device != CPU and not tp_size and find_spec("accelerate"):
        options["device_map"] = {"": device}
    if tp_size:
        options["distributed_config"] = parallel_plan(
            config, tp_size, expert_parallel=expert_parallel, trust_remote_code=trust_remote_code
        )
    no_bar_of_transformers()
    kind = auto_class(config)
    if not device_map:
        # What names no device, kernels of other packages among it, would begin something on the first one.
        select(device)
    try:
        model: nn.Module = _loaded(kind.from_pretrained, place, **options)
        # Quantised weights are where the package that runs them wants them.
        placed = device_map or tp_size or getattr(model, "hf_quantizer", None) is not None
        model = model if placed else model.to(device)
    except torch.OutOfMemoryError:
        raise InputError(f"--target {name}: its weights do not fit on {device}; choose a larger --device") from None
    if device_map:
        require_on_devices(model, device_map)
    return model.eval().requires_grad_(False)


def load_wanted(target: TargetOptions, dtype: torch.dtype, device: torch.device, tp_size: int | None) -> nn.Module:
    """:func:`load_target` as the options of an extraction say; tells how fast it was.

    Raises:
        InputError: it cannot be loaded so; says why.
    """
    begun = time.perf_counter()
    model = load_target(
        target.name,
        revision=target.revision,
        dtype=dtype,
        device=device,
        attn_implementation=target.attn_implementation,
        experts_implementation=target.experts_implementation,
        trust_remote_code=target.trust_remote_code,
        device_map=target.device_map,
        tp_size=tp_size,
        expert_parallel=target.expert_parallel,
    )
    synchronize(device)
    seconds, loaded = time.perf_counter() - begun, sum(weight.nbytes for weight in model.parameters()) / 1e9
    say(f"loaded {loaded:.3g} GB of weights in {seconds:.1f} s, {loaded / seconds:.2g} GB/s")
    if place_and_file(target.name)[1] is not None:
        say(
            f"{target.name}: its GGUF blocks are dequantised to {str(dtype).removeprefix('torch.')}; the states are "
            "those of the weights as the file rounds them, which differ from those of the target it was made of"
        )
    if target.experts_implementation:
        require_experts(model)
    return model if target.adapter is None else with_adapter(model, target.adapter)


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` or such as ``cuda`` (the ``local_rank``-th accelerator; auto: else the CPU), ``cpu``, or ``cuda:1``.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        found = accelerators()
        return found[local_rank % len(found)] if found else CPU
    try:
        device = parse(name)
    except ValueError as error:
        raise InputError(f"--device {error}, or auto") from None
    if device.type == CPU.type or without_streams(device.type):
        return device
    if not has_streams(device):
        raise InputError(f"--device {name}: this machine has no {device.type.upper()} device; pass auto or cpu")
    here = count(device.type)
    if (device.index or 0) >= here:
        raise InputError(f"--device {name}: this machine has {here} {device.type.upper()} devices")
    return device if device.index is not None else torch.device(device.type, local_rank % here)


def resolve_dtype(name: str, device: torch.device) -> str:
    """``auto`` is bfloat16 on a device with streams (CUDA and its like) and float32 on the CPU and elsewhere.

    Raises:
        InputError: not a dtype that can be stored.
    """
    known = ("float32", "bfloat16", "float16")
    if name == "auto":
        return "bfloat16" if has_streams(device) else "float32"
    if name not in known:
        raise InputError(f"--dtype {name!r} is not one of auto, {', '.join(known)}")
    return name


def _require_found(name: str, revision: str | None) -> None:
    """Ask the hub once, and at once: transformers would try again for half a minute where a path has a typo.

    Raises:
        InputError: no such folder, and no such target on the hub.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if Path(name).exists() or constants.HF_HUB_OFFLINE:
        return
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"--target {name}: no such folder (as a target of the hub it would be owner/name)")
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        HfApi().model_info(name, revision=revision, timeout=30)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--target {name}: no such folder here; if you mean the hub: it cannot be had from there ({reason})"
        ) from error


def _loaded(load: Any, name: str, **options: Any) -> Any:
    """Call a ``from_pretrained``; what it raises on bad input becomes one line that says what to do."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    # What reads a GGUF file raises whatever the bytes lead it to.
    refused = Exception if "gguf_file" in options else (OSError, ValueError, ImportError, KeyError, RuntimeError)
    try:
        return load(name, **options)
    except torch.OutOfMemoryError:
        raise
    except refused as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own; pass --trust-remote-code to run that"
        elif not Path(name).exists() and not Path(name).is_absolute() and name.count("/") <= 1:
            reason = f"no such folder here; if you mean the hub: it cannot be had from there ({reason})"
        elif not Path(name).exists():
            reason = "no such folder"
        elif "gguf_file" in options:
            missing = "" if find_spec("gguf") else "; first pip install 'dflash-cache[gguf]'"
            reason = f"{options['gguf_file']} cannot be read as GGUF ({reason}){missing}"
        raise InputError(f"--target {name}: {reason}") from error
