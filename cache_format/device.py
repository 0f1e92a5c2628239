"""The device seam: streams, events, page-locked memory and memory statistics of whatever accelerator torch has.

No other file names a kind of device: CUDA, ROCm (which torch calls cuda), XPU and Ascend NPU take the same way, by
``torch.accelerator`` and the module of that name in torch. A device without streams (the CPU, MPS) does what it is
told at once; callers ask :func:`has_streams` and take the plain way then.

Streams and events are those of torch: ``record_event``, ``wait_event``, ``wait_stream``, ``query``, ``synchronize``.
"""

from __future__ import annotations

import platform
import warnings
import weakref
from contextlib import AbstractContextManager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")

RAY_GPUS = "cuda"
"""Kind of the devices that a Ray cluster counts as GPUs; the driver may have none itself."""

_COLLECTIVES = {"cuda": "nccl", "xpu": "xccl", "npu": "hccl"}
"""Kind of device -> backend of torch.distributed for tensors on it; gloo for the others."""

_FOR_EVERY_DEVICE = 1
"""Flag of cudaHostRegister: the memory is page-locked for all devices."""


def parse(text: torch.device | str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1``, ``xpu:0``, ...: whether this machine has it, :func:`count` says.

    Raises:
        ValueError: not the name of a device; the message says what such names look like.
    """
    try:
        return torch.device(text)
    except RuntimeError:
        raise ValueError(f"{text!r} is not a torch device; write such as cuda:0 or cpu") from None


def accelerators() -> list[torch.device]:
    """The accelerators of this machine that work through streams, in order; empty where torch finds none."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    if not has_streams(kind):
        return []
    return [torch.device(kind.type, number) for number in range(torch.accelerator.device_count())]  # type: ignore[union-attr]


def count(kind: str) -> int:
    """Devices with streams of that kind (``cuda``, ``xpu``, ...) on this machine."""
    return sum(device.type == kind for device in accelerators())


def without_streams(kind: str) -> bool:
    """Whether ``kind`` is the accelerator of this machine and does what it is told at once, as MPS does."""
    if not torch.accelerator.is_available():
        return False
    here = torch.accelerator.current_accelerator()
    return here is not None and here.type == kind and not has_streams(here)


def has_streams(device: torch.device | None) -> bool:
    """Whether ``device`` works through streams: what it is given returns before it is done."""
    return device is not None and device.type != CPU.type and hasattr(_module(device), "Stream")


def name(device: torch.device) -> str:
    """What the device is called, such as ``NVIDIA H100 80GB HBM3``."""
    of_module = getattr(_module(device), "get_device_name", None)
    return device.type if of_module is None else str(of_module(device))


def hardware(device: torch.device) -> dict[str, str]:
    """What rounding may depend on, by name: the device, its capability, the libraries that torch computes with."""
    found = {"device": name(device) if has_streams(device) else platform.machine()}
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    capability = getattr(_module(device), "get_device_capability", None) if has_streams(device) else None
    if capability is not None:
        found["device_capability"] = ".".join(map(str, capability(device)))
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def select(device: torch.device) -> None:
    """Make it this process's own: what names no device goes there."""
    if has_streams(device):
        torch.accelerator.set_device_index(device.index or 0)


def collective_backend(device: torch.device) -> str:
    """The backend of torch.distributed for tensors on ``device``."""
    return _COLLECTIVES.get(device.type, "gloo")


def leaves_alone(device: torch.device) -> bool:
    """Whether a process may destroy its part of such a group while others are in a collective: NCCL would wait."""
    return collective_backend(device) == "gloo"


def new_stream(device: torch.device) -> Any:
    """A side stream of ``device``."""
    return _module(device).Stream(device)


def current_stream(device: torch.device) -> Any:
    """The stream that work for ``device`` goes to now."""
    return _module(device).current_stream(device)


def on_stream(device: torch.device, stream: Any) -> AbstractContextManager[Any]:
    """A context in which work for ``device`` goes to ``stream``."""
    context: AbstractContextManager[Any] = _module(device).stream(stream)
    return context


def timing_event(device: torch.device, stream: Any) -> Any:
    """An event recorded on ``stream`` now, which knows when it is reached: ``earlier.elapsed_time(later)``, in ms."""
    return stream.record_event(_module(device).Event(enable_timing=True))


def event_to_sleep_for(device: torch.device, stream: Any) -> Any:
    """An event recorded on ``stream`` now; a thread that waits for it sleeps, where it would else keep a core busy."""
    try:
        event = _module(device).Event(blocking=True)
    except TypeError:
        event = _module(device).Event()
    return stream.record_event(event)


def used_on(tensor: Tensor, stream: Any) -> None:
    """Say that ``stream`` uses ``tensor``, which another one allocated: its memory is not given away before."""
    tensor.record_stream(stream)


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all that it was given."""
    if has_streams(device):
        _module(device).synchronize(device)


def page_lock(memory: np.ndarray, device: torch.device) -> bool:
    """Page-lock ``memory``, whole pages of its own, until it is dropped: copies between it and ``device`` don't hold up
    the host. It is taken for what it is, where torch's allocator rounds up to powers of two.

    Returns:
        whether that could be done; the kind of device may have no way to, or refuse, which is told once.
    """
    of_module = getattr(_module(device), "cudart", None)
    if of_module is None:
        return False
    runtime, at = of_module(), memory.ctypes.data
    error = int(runtime.cudaHostRegister(at, memory.nbytes, _FOR_EVERY_DEVICE))
    if error:
        # The runtime keeps its last error, and the next kernel would be blamed for it: let this one be.
        with suppress(RuntimeError):
            torch.zeros(1, device=device)
        warnings.warn(
            f"{device} cannot page-lock memory as it is (error {error}); torch's own, rounded up, is taken",
            stacklevel=2,
        )
        return False
    # The end of the process unlocks what is left.
    weakref.finalize(memory, _unlock, runtime, at, device).atexit = False
    return True


def _unlock(runtime: Any, at: int, device: torch.device) -> None:
    # A trainer that has broken off drops memory that is still being copied. After an error of the device nothing is.
    with suppress(RuntimeError):
        synchronize(device)
    runtime.cudaHostUnregister(at)


def pinned_memory(num_bytes: int) -> Tensor:
    """Page-locked uint8 ``[num_bytes]`` of torch's allocator, not cleared."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without waiting for what the device has still to do: through page-locked memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if has_streams(device) else tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """``tensor`` in page-locked memory once the current stream has come to this copy."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def release_memory(device: torch.device) -> None:
    """Give what torch's allocator holds and nobody uses back to the device."""
    if has_streams(device):
        _module(device).empty_cache()


def forget_peak(device: torch.device) -> None:
    """Begin to measure :func:`peak_share` anew."""
    _module(device).reset_peak_memory_stats(device)


def peak_share(device: torch.device) -> float:
    """Largest share of the device's memory that torch's allocator has held."""
    _, whole = _module(device).mem_get_info(device)
    return float(_module(device).max_memory_reserved(device) / whole)


def _module(device: torch.device) -> Any:
    """``torch.cuda`` and its like; None for kinds without one (meta, xla)."""
    return getattr(torch, device.type, None)
