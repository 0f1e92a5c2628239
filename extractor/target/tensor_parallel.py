"""Tensor parallelism: one target divided over all processes of torchrun, by transformers' plan for its architecture.

Rank 0 does the job as if it were alone; only it touches the cache. Before each pass it tells the others what it is
about to run, and they run their part of the same pass and throw the states away. So whatever rank 0 decides (what is
missing, which batches, trials at the start), the others follow without knowing of it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed

from cache_format.codecs.dtypes import torch_dtype
from cache_format.device import collective_backend, leaves_alone, select
from cache_format.errors import DFlashCacheError, InputError
from cache_format.layout.captures import Captures
from extractor.config import ExtractOptions, TargetOptions
from extractor.target.deterministic import be_deterministic
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.layer_ids import chosen_layer_ids
from extractor.target.load_target import TargetShape, load_config, load_wanted, resolve_device
from extractor.target.parallel_plan import world_size
from extractor.target.quantised import run_dtype
from extractor.target.transformers_backend import MASKED, UNMASKED, TransformersBackend

_STOP, _LOAD, _PASS = range(3)
_HEADER = 5
"""Numbers: what, masked, with captures, rows, tokens a row."""

_MEETING = timedelta(minutes=30)
"""How long a process waits for the others to start."""

_SIGNS_OF_A_LOST_PROCESS = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe")
"""What gloo and the store say of one."""

_PATIENCE = timedelta(days=7)
"""Of a collective: a disk may hold rank 0 up in the middle of a pass."""

_SECONDS_TO_LEAVE = 3.0
"""How long a process waits for the others before it leaves the group, less than a signal gives it. They have left at
once, unless they are in the middle of a pass that this process has broken off."""


class Group:
    """The processes that share one target. What rank 0 wants is said through the store that they met at.

    A context manager: its end destroys the group in every case, for a thread of it that outlives the interpreter aborts
    the process. The others wait at the store, where a signal finds them, and not in a collective, where none would.
    """

    def __init__(self, device: torch.device):
        """``device``: of this process's part of the target."""
        self.device, self._said, self._own = device, 0, not distributed.is_initialized()
        self.rank, self.size = int(os.environ.get("RANK", 0)), world_size()

    def __enter__(self) -> Group:
        """Meet the other processes.

        Raises:
            InputError: the environment does not say where.
            DFlashCacheError: they have not come for half an hour.
        """
        from torch.distributed.rendezvous import rendezvous

        select(self.device)
        _await_store()
        store, _, _ = next(iter(rendezvous("env://", timeout=_MEETING)))
        store.set_timeout(_PATIENCE)
        # torchrun keeps one store over its restarts.
        self._store = distributed.PrefixStore(f"dflash-cache {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # Rank 0 may have gigabytes to look at before it comes, and may refuse.
        if self._store.add("met", 1) == self.size:
            self._store.set("all met", "")
        self._await("all met", _MEETING)
        if self._own:
            backend = collective_backend(self.device)
            distributed.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE
            )
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """Let the others go, and leave.

        Raises:
            DFlashCacheError: ``error`` says that another process is gone.
        """
        all_left = False
        # A store that does not answer any more has lost its process, and the others with it.
        with suppress(RuntimeError):
            if self.rank == 0:
                self._say(_STOP)
            self._store.add("left", 1)
            all_left = self._await_the_others()
        # NCCL's end waits for all: with some of them in the middle of a pass it is left to torchrun, which ends them.
        if self._own and (all_left or leaves_alone(self.device)):
            distributed.destroy_process_group()
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PROCESS):
            reason = str(error).strip().splitlines()[0]
            raise DFlashCacheError(f"--tp-plan: another process of the group is gone ({reason})") from None

    def load(self) -> None:
        """Rank 0: have the others load their parts, as this process is about to."""
        self._say(_LOAD)

    def announce(self, input_ids: Tensor, lengths: Sequence[int], padding: str, captures: Captures) -> None:
        """Rank 0: have the others run the pass that this process is about to run."""
        rows, longest = input_ids.shape
        self._say(_PASS, padding == MASKED, captures != Captures(), rows, longest)
        distributed.broadcast(torch.tensor(lengths, device=self.device), 0)
        distributed.broadcast(input_ids.contiguous(), 0)

    def follow(self, options: ExtractOptions) -> None:
        """The other ranks: do what rank 0 says, until it says that it is done, or has failed and said why."""
        target: HFDFlashTargetModel | None = None
        while True:
            what, masked, captured, rows, longest = self._heard()
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
            backend = TransformersBackend(target, MASKED if masked else UNMASKED, captures)
            out, extra = backend.row_memory(int(lengths.sum()), self.device)
            backend.forward(input_ids, lengths.tolist(), out, extra)

    def _say(self, *numbers: int) -> None:
        numbers = (*map(int, numbers), *[0] * (_HEADER - len(numbers)))
        self._store.set(f"said {self._said}", ",".join(map(str, numbers)))
        self._said += 1

    def _heard(self) -> list[int]:
        key = f"said {self._said}"
        self._await(key)
        numbers = [int(text) for text in self._store.get(key).split(b",")]
        if self._store.add(f"heard {self._said}", 1) == self.size - 1:
            self._store.delete_key(key)
            self._store.delete_key(f"heard {self._said}")
        self._said += 1
        return numbers

    def _await(self, key: str, patience: timedelta | None = None) -> None:
        """Until ``key`` is there; a signal interrupts it, as it would not the store's own wait."""
        began = time.monotonic()
        while not self._store.check([key]):
            waited = time.monotonic() - began
            if patience is not None and waited > patience.total_seconds():
                raise DFlashCacheError(f"--tp-plan: not all {self.size} processes have come within {patience}")
            # Soon after a pass the next one is announced; samples may take hours to prepare.
            time.sleep(min(max(waited / 10, 0.0005), 0.05))

    def _await_the_others(self) -> bool:
        """Whether all are done with the group; False where they are not to be waited for: one may be gone."""
        deadline = time.monotonic() + _SECONDS_TO_LEAVE
        while self._store.add("left", 0) < self.size:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _load(self, options: ExtractOptions) -> HFDFlashTargetModel:
        target = options.target
        if target.deterministic:
            be_deterministic()
        config = load_config(target.name, target.revision, target.trust_remote_code)
        dtype = torch_dtype(run_dtype(target, config, self.device))
        model = load_wanted(target, dtype, self.device, tp_size=self.size)
        whole_embeddings(model)
        layer_ids = chosen_layer_ids(target, TargetShape.from_config(config).num_hidden_layers)
        hooked = HFDFlashTargetModel(model, layer_ids)
        if target.compile:
            hooked.compile()
        return hooked


def _await_store() -> None:
    """Until whoever keeps the store listens: torchrun itself, or rank 0, which may have much to look at before.

    Raises:
        InputError: the environment does not say where.
        DFlashCacheError: nobody has listened for half an hour.
    """
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if absent:
        raise InputError(f"--tp-plan: {' and '.join(absent)} not set; start the job with torchrun")
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    deadline = time.monotonic() + _MEETING.total_seconds()
    listens = os.environ["RANK"] == "0"
    while not listens:
        try:
            socket.create_connection(place, timeout=1).close()
            listens = True
        except OSError as error:
            if time.monotonic() > deadline:
                raise DFlashCacheError(f"--tp-plan: nobody listens at {place[0]}:{place[1]} ({error})") from None
            time.sleep(0.2)


@contextmanager
def joined(target: TargetOptions, device: torch.device) -> Iterator[Group | None]:
    """Rank 0's part of the group that ``target`` is divided over; None where it is not divided."""
    if target.tp_plan is None:
        yield None
        return
    with Group(device) as group:
        yield group


def follow(options: ExtractOptions) -> None:
    """A rank other than 0, from beginning to end.

    Raises:
        DFlashCacheError: another process of the group is gone.
    """
    with Group(resolve_device(options.target.device, int(os.environ.get("LOCAL_RANK", 0)))) as group:
        group.follow(options)


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
