"""A stand-in for an accelerator that does what it is told *later*: a wait that is missing shows as wrong bytes.

``install(seed)`` makes ``late:0`` a device of this process for good, so it is for processes of their own. Its memory is
ordinary memory, its kernels are the CPU's, so what it gives is equal to the CPU's to the last bit. But a kernel or a
copy only goes to a queue, its stream; results are there once somebody waits for an event or a stream, or when the
schedule, a function of the seed, lets a stream go on: one that runs ahead of another shows that nothing orders them.
Memory is that of torch's allocator: given to the next tensor of the same stream as soon as the last one is dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import multiprocessing
import random
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import numpy as np
import torch
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten

EAGERNESS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.1, 0.02), (0.02, 0.1)]
"""(the default stream, all others): how likely each goes on at every launch; one of them for each seed."""


class Stream:
    """A queue of work; ``done`` of the ``given`` entries have been run."""

    def __init__(self, device: Any = None):
        self.queue: deque[Any] = deque()
        self.given = self.done = 0
        self.number = len(_late.streams)
        _late.streams.append(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.stream, event.place = self, self.given
        return event

    def wait_event(self, event: Event) -> None:
        if event.stream is not None:
            self.give((event.stream, event.place))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def query(self) -> bool:
        _late.go_on()
        return self.done == self.given

    def synchronize(self) -> None:
        _late.run(self, self.given)

    def give(self, entry: Any) -> None:
        with _late.lock:
            self.queue.append(entry)
            self.given += 1
            _late.go_on()


class Event:
    """A place in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False):
        self.stream: Stream | None = None
        self.place, self.blocking, self.time = 0, blocking, time.perf_counter()

    def query(self) -> bool:
        _late.go_on()
        return self.stream is None or self.stream.done >= self.place

    def synchronize(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            _late.waited_by_threads.append(self.blocking)
            time.sleep(_late.seconds_of_a_thread)
        if self.stream is not None:
            _late.run(self.stream, self.place)

    def elapsed_time(self, later: Event) -> float:
        return (later.time - self.time) * 1e3


class Lifetime:
    """Of the memory that some tensors share: the tensor that was allocated, and its views."""

    def __init__(self, block: np.ndarray, stream: Stream):
        self.block, self.stream, self.used_on = block, stream, set[Stream]()
        weakref.finalize(self, _late.freed.append, (block, stream, self.used_on)).atexit = False


class Late:
    """The device."""

    def __init__(self, seed: int, memory: int, seconds_of_a_thread: float):
        self.lock, self.random = threading.RLock(), random.Random(seed)
        self.eagerness = EAGERNESS[seed % len(EAGERNESS)]
        self.streams: list[Stream] = []
        self.memory, self.seconds_of_a_thread = memory, seconds_of_a_thread
        self.free: list[tuple[np.ndarray, Stream, list[tuple[Stream, int]]]] = []
        self.freed: deque[Any] = deque()
        self.held = self.peak = 0
        self.pinned: dict[int, np.ndarray] = {}
        self.registered: dict[int, int] = {}
        self.crossed: list[int] = []
        """bytes of each copy from the host"""
        self.waited_by_threads: list[bool] = []
        """whether each event that another thread waited for was a blocking one"""
        self.current = threading.local()

    def run(self, stream: Stream, place: int) -> None:
        """Do the work of ``stream`` up to ``place``, and what it waits for."""
        with self.lock:
            while stream.done < place:
                self._step(stream)

    def _step(self, stream: Stream) -> None:
        entry = stream.queue.popleft()
        if isinstance(entry, tuple):
            self.run(*entry)
        else:
            with torch.inference_mode():
                entry()
        stream.done += 1

    def go_on(self) -> None:
        """Let streams that nothing holds up go on, as the schedule says."""
        with self.lock:
            for stream in self.streams:
                if self.random.random() < self.eagerness[min(stream.number, 1)]:
                    for _ in range(self.random.randrange(1, 200)):
                        head = stream.queue[0] if stream.queue else None
                        if head is None or (isinstance(head, tuple) and head[0].done < head[1]):
                            break
                        self._step(stream)

    def stream(self) -> Stream:
        return getattr(self.current, "stream", self.streams[0])

    def allocate(self, num_bytes: int) -> Lifetime:
        stream = self.stream()
        with self.lock:
            while self.freed:
                block, of, used_on = self.freed.popleft()
                self.free.append((block, of, [(other, other.given) for other in used_on]))
            best = None
            for number, (block, of, pending) in enumerate(self.free):
                fits = of is stream and num_bytes <= len(block) <= 2 * num_bytes + 512
                if fits and all(other.done >= place for other, place in pending):
                    best = number if best is None or len(block) < len(self.free[best][0]) else best
            if best is not None:
                return Lifetime(self.free.pop(best)[0], stream)
            if self.held + num_bytes > self.memory:
                self.release()
            if self.held + num_bytes > self.memory:
                raise torch.OutOfMemoryError(f"late device: {num_bytes:,} more bytes than its {self.memory:,}")
            self.held += num_bytes
            self.peak = max(self.peak, self.held)
            return Lifetime(np.full(num_bytes, 0x5A, np.uint8), stream)

    def release(self) -> None:
        """``empty_cache``: waits for all, and gives unused memory back."""
        for stream in self.streams:
            self.run(stream, stream.given)
        while self.freed:
            self.free.append((*self.freed.popleft()[:2], []))
        self.held -= sum(len(block) for block, _, _ in self.free)
        self.free.clear()

    def pin(self, num_bytes: int) -> np.ndarray:
        """Page-locked memory, kept for good: a copy that was not waited for finds it there, its bytes another's."""
        memory = np.full(num_bytes, 0xA5, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return memory

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        at = tensor.data_ptr()
        ranges = [(start, len(memory)) for start, memory in self.pinned.items()] + list(self.registered.items())
        return any(start <= at < start + size for start, size in ranges)


_late: Late


class LateTensor(torch.Tensor):
    """A tensor on the device: its memory as a CPU tensor in ``_memory``, which only queued work looks at."""

    @staticmethod
    def of(memory: torch.Tensor, lifetime: Lifetime) -> LateTensor:
        assert not isinstance(memory, LateTensor)
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                LateTensor,
                memory.shape,
                strides=memory.stride(),
                storage_offset=memory.storage_offset(),
                dtype=memory.dtype,
                device=torch.device("late", 0),
            )
        made._memory, made._lifetime = memory, lifetime
        return made

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self._lifetime.used_on.add(stream)

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LateTensor({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WHOLE:
            return _kernel(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


_WHOLE = {
    functional.scaled_dot_product_attention,
    functional.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
}
"""Taken to pieces by torch, and differently on other devices than the CPU: run as one kernel, for the same bits."""

_ANSWERS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
}
"""What the host wants to know: it waits."""


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    if func is aten.copy_.default:
        return _copy(*args, **kwargs)
    if func is aten._to_copy.default:
        return _to_copy(*args, **kwargs)
    if func in _ANSWERS:
        _late.run(_late.stream(), _late.stream().given)
        answer = func(*_memories(args), **_memories(kwargs))
        return _new(answer, eager=True) if isinstance(answer, torch.Tensor) else answer
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        # Without gradients they come whole.
        return func.decompose(*args, **kwargs)
    if func.is_view or func in (aten.detach.default, aten.alias.default, aten.lift_fresh.default):
        base = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, LateTensor))
        with torch.inference_mode():
            views = func(*_memories(args), **_memories(kwargs))
        return pytree.tree_map_only(torch.Tensor, lambda view: LateTensor.of(view, base._lifetime), views)
    if func._schema.is_mutable:
        changed = [
            args[i] if i < len(args) else kwargs[argument.name]
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        memories = _captured((args, kwargs))
        _late.stream().give(lambda: func(*memories[0], **memories[1]))
        return changed[0] if len(func._schema.returns) == 1 else tuple(changed)
    return _kernel(func, args, kwargs)


def _kernel(func: Any, args: Any, kwargs: Any) -> Any:
    """Memory for what ``func`` gives, now; what it gives, later."""
    given_args, given_kwargs = pytree.tree_map_only(torch.Tensor, _shape_of, (args, kwargs))
    if "device" in given_kwargs:
        given_kwargs["device"] = torch.device("meta")
    if given_kwargs.get("pin_memory"):
        given_kwargs["pin_memory"] = False
    shapes = func(*given_args, **given_kwargs)
    results = pytree.tree_map_only(torch.Tensor, _new, shapes)
    out = [result._memory for result in pytree.tree_leaves(results) if isinstance(result, LateTensor)]
    memories = _captured((args, kwargs))
    if "device" in memories[1]:
        memories[1]["device"] = torch.device("cpu")
    empty = getattr(func, "__name__", "").startswith(("empty", "new_empty"))

    def run() -> None:
        values = pytree.tree_leaves(func(*memories[0], **memories[1]))
        for memory, value in zip(out, [v for v in values if isinstance(v, torch.Tensor)], strict=True):
            memory.copy_(value)

    if not empty:
        _late.stream().give(run)
    return results


def _make(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _kernel(func, args, kwargs)


def _copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    memories = [x._memory if isinstance(x, LateTensor) else _bare(x) for x in (to, source)]
    if not isinstance(source, LateTensor):
        _late.crossed.append(source.nbytes)
        if not _late.is_pinned(source):
            # What CUDA does with memory that can be paged out: it has been read when the call returns.
            memories[1] = source.clone()
    _late.stream().give(lambda: memories[0].copy_(memories[1]))
    on_both = isinstance(to, LateTensor) and isinstance(source, LateTensor)
    if not on_both and not non_blocking:
        _late.run(_late.stream(), _late.stream().given)
    return to


def _to_copy(source: torch.Tensor, *, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
    device = kwargs.pop("device", None)
    kwargs.pop("pin_memory", None)
    if device is not None and torch.device(device).type == "cpu":
        host = torch.empty_like(_shape_of(source), device="cpu", **kwargs)
        return _copy(host, source, non_blocking)
    return _kernel(aten._to_copy.default, (source,), kwargs)


def _new(shape: torch.Tensor, eager: bool = False) -> LateTensor:
    """Memory for a tensor like ``shape``."""
    lifetime = _late.allocate(max(1, shape.untyped_storage().nbytes()))
    memory = torch.from_numpy(lifetime.block)[: shape.untyped_storage().nbytes()].view(shape.dtype)
    memory = memory.as_strided(shape.shape, shape.stride(), shape.storage_offset())
    if eager:
        memory.copy_(shape)
    return LateTensor.of(memory, lifetime)


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, but nobody's: what counts the uses of host memory must not count those of a queue."""
    if not tensor.numel():
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    at = (ctypes.c_uint8 * (extent * tensor.itemsize)).from_address(tensor.data_ptr())
    return torch.from_numpy(np.frombuffer(at, np.uint8)).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _memories(tree: Any) -> Any:
    return pytree.tree_map_only(LateTensor, lambda tensor: tensor._memory, tree)


def _captured(tree: Any) -> Any:
    """Arguments of a kernel: memory of the device as it will be, numbers of the host as they are."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, LateTensor):
            return tensor._memory
        assert tensor.ndim == 0, f"a kernel of the late device was given a CPU tensor {list(tensor.shape)}"
        return tensor.clone()

    return pytree.tree_map_only(torch.Tensor, one, tree)


class _Runtime:
    """What torch.cuda.cudart() has of page-locked memory."""

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        _late.registered[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del _late.registered[pointer]
        return 0


class _Module(_DummyBackendModule):
    """``torch.late``."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.calls: list[str] = []

    def cudart(self) -> _Runtime:
        return _Runtime()

    def current_stream(self, device: Any = None) -> Stream:
        return _late.stream()

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = _late.stream()
        _late.current.stream = stream
        try:
            yield
        finally:
            _late.current.stream = before

    def synchronize(self, device: Any = None) -> None:
        for stream in _late.streams:
            _late.run(stream, stream.given)

    def get_device_name(self, device: Any = None) -> str:
        return "Late Device"

    def empty_cache(self) -> None:
        _late.release()

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        _late.peak = _late.held

    def max_memory_reserved(self, device: Any = None) -> int:
        return _late.peak

    def memory_reserved(self, device: Any = None) -> int:
        return _late.held

    def memory_allocated(self, device: Any = None) -> int:
        return _late.held

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return _late.memory - _late.held, _late.memory

    def set_device(self, device: Any) -> None:
        pass


def install(seed: int = 0, memory: int = 1 << 34, seconds_of_a_thread: float = 0.0) -> Late:
    """Make ``late:0`` the accelerator of this process, for good.

    Args:
        seed: of the schedule.
        memory: bytes of the device.
        seconds_of_a_thread: how much longer than it takes a thread other than the main one waits for an event.
    """
    global _late, _library
    _late = Late(seed, memory, seconds_of_a_thread)
    Stream()
    _setup_privateuseone_for_python_backend("late", _Module())
    torch.accelerator.set_device_index = lambda device, /: None  # type: ignore[assignment]
    _library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _library[0].fallback(lambda func, *args, **kwargs: _dispatch(func, args, kwargs), "PrivateUse1")
    for overload in ("default", "start", "start_step"):
        # torch makes an empty one and lets the device resize it.
        func = getattr(aten.arange, overload)
        _library[1].impl(func, functools.partial(_make, func), "PrivateUse1")
    # Else tied weights would be two, which they stay on a real device.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _pin_by_hand()
    return _late


def _pin_by_hand() -> None:
    """torch asks a part of the device written in C++ for page-locked memory; there is none here."""
    empty: Callable[..., torch.Tensor] = torch.empty
    # Before it is replaced: models are built on the device meta, which is done to the functions that are found then.
    _device_constructors()

    def pinned_empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if not pin_memory:
            return empty(*args, **kwargs)
        shape = empty(*args, **{**kwargs, "device": "meta"})
        return torch.from_numpy(_late.pin(max(1, shape.nbytes))[: shape.nbytes]).view(shape.dtype).view(shape.shape)

    torch.empty = pinned_empty
    torch.Tensor.pin_memory = lambda tensor: pinned_empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(  # type: ignore[method-assign]
        tensor
    )
    torch.Tensor.is_pinned = lambda tensor, device=None: _late.is_pinned(tensor)  # type: ignore[method-assign]


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function``, of a test module, gives in a process of its own; the imports are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(commands.PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _answer(pipe: Any, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(function(*arguments))


def without(module: str, line: str, occurrence: int = 0, instead: str = "pass") -> None:
    """Have this process go on as if ``module`` had ``instead`` in place of ``line``, for good."""
    mutated = importlib.import_module(module)
    parts = Path(str(mutated.__file__)).read_text().split(line)
    assert len(parts) > occurrence + 1, f"{module} has no longer {line!r}"
    source = instead.join([line.join(parts[: occurrence + 1]), line.join(parts[occurrence + 1 :])])
    before = dict(vars(mutated))
    exec(compile(source, str(mutated.__file__), "exec"), vars(mutated))
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").split(".")[0] in ("extractor", "cache_format"):
            for name, value in list(vars(other).items()):
                if name in before and value is before[name] and not name.startswith("__"):
                    setattr(other, name, vars(mutated)[name])
