"""What happened when: spans of the stages of an extraction, for ``--profile`` (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cache_format.device import current_stream, has_streams, synchronize, timing_event
from cache_format.storage.commit import committed, write_all

DEVICE_TRACK = "device"
TRACE_BEGINS = b'{"traceEvents"'
"""The first bytes of every trace that this package writes."""


class Timeline:
    """Spans by thread, and by what a device with streams did; costs next to nothing where ``enabled`` is False."""

    def __init__(self, enabled: bool = False):
        self.enabled = enabled
        self._spans: list[tuple[str, str, float, float]] = []
        self._device_spans: list[tuple[str, Any, Any]] = []
        self._origin: tuple[torch.device, float, Any] | None = None

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """The work of this thread inside the ``with`` block."""
        if not self.enabled:
            yield
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append((name, threading.current_thread().name, started, time.perf_counter()))

    @contextmanager
    def device_span(self, name: str, device: torch.device) -> Iterator[None]:
        """As long as what the block gives the current stream of ``device`` to do takes; without streams, a span."""
        if not self.enabled or not has_streams(device):
            with self.span(name):
                yield
            return
        stream = current_stream(device)
        if self._origin is None:
            stream.synchronize()
            self._origin = device, time.perf_counter(), timing_event(device, stream)
        begin = timing_event(device, stream)
        with self.span(f"launch {name}"):
            yield
        self._device_spans.append((name, begin, timing_event(device, stream)))

    def write(self, path: Path) -> None:
        """Write the spans as a Chrome trace.

        Raises:
            StorageError: the operating system refused.
        """
        spans = list(self._spans)
        if self._origin is not None:
            device, zero, first = self._origin
            synchronize(device)
            for name, begin, end in self._device_spans:
                times = (zero + first.elapsed_time(event) / 1e3 for event in (begin, end))
                spans.append((name, DEVICE_TRACK, *times))
        with committed(path) as file:
            write_all(file, json.dumps({"traceEvents": _events(spans)}).encode())


def _events(spans: list[tuple[str, str, float, float]]) -> list[dict[str, Any]]:
    tracks = {track: number for number, track in enumerate(dict.fromkeys(track for _, track, _, _ in spans))}
    zero = min((start for _, _, start, _ in spans), default=0.0)
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": track}}
        for track, tid in tracks.items()
    ]
    return names + [
        {"ph": "X", "name": name, "pid": 0, "tid": tracks[track], "ts": (a - zero) * 1e6, "dur": (b - a) * 1e6}
        for name, track, a, b in spans
    ]
