"""An engine of vLLM that computes states: requests in, rows out of memory that its workers share with this process.

The scheduler runs in this process, so that all requests of a batch are there before its step begins: one batch is one
step, and what a step computes together is the plan's choice. The workers are processes of their own.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_format.errors import DFlashCacheError, InputError
from extractor.target.vllm.capture import SharedFile, digest, rows_of, shared_rows
from extractor.target.vllm.processes import SHARED_MEMORY, forget_meeting

MOST_REQUESTS = 1024
"""Of one step; a batch with more rows is several steps, cut in order."""

ROOM = 2
"""Tokens of keys and values over those of a step: a request's last block is seldom full."""


class EngineError(DFlashCacheError):
    """The engine has failed; shards that were finished are kept."""


class Engine:
    """Steps of an engine that captures ``layer_ids``, and behind them the last hidden states where asked for."""

    def __init__(
        self,
        llm: Any,
        layer_ids: Sequence[int],
        last_hidden_states: bool,
        *,
        width: int,
        dtype: torch.dtype,
        most_tokens: int,
        block_tokens: int,
        sampling: Any,
    ):
        """
        Args:
            llm: ``vllm.LLM``, whose workers have :class:`CaptureExtension`.
            width: H.
            dtype: of the states.
            most_tokens: of one step.
            block_tokens: tokens of a block in which vLLM keeps keys and values.
            sampling: ``vllm.SamplingParams`` for one token.

        Raises:
            InputError: no room for the shared rows.
            EngineError: the workers cannot capture these layers.
        """
        self._llm, self._sampling = llm, sampling
        self.most_tokens, self.block_tokens = most_tokens, block_tokens
        self.columns = len(layer_ids) + last_hidden_states
        with _shared_file(most_tokens * self.columns * width * dtype.itemsize) as file:
            self._rows = shared_rows(file.path, most_tokens, self.columns * width, dtype)
            told = (list(layer_ids), last_hidden_states, file, most_tokens, width, dtype)
            self.facts: dict[str, Any] = self._call("capture_begin", *told)[0]
        atexit.register(self.close)

    def close(self) -> None:
        """End the workers; more than once is the same."""
        self._llm.llm_engine.engine_core.shutdown()
        forget_meeting(self.facts["meeting"])

    def run(self, rows: Sequence[np.ndarray]) -> Iterator[tuple[slice, Tensor]]:
        """States of requests of token ids int64 ``[n]``, a step after another.

        Yields:
            which rows of all requests' together, and their states ``[tokens, columns * H]``, valid until the next.

        Raises:
            EngineError: the engine has died, or has not given each request's states exactly once, in one pass.
        """
        done = 0
        for part in steps([len(row) for row in rows], self.most_tokens, self.block_tokens):
            tokens = self._step(rows[part])
            yield slice(done, done + tokens), self._rows[:tokens]
            done += tokens

    def _step(self, rows: Sequence[np.ndarray]) -> int:
        lengths = [len(row) for row in rows]
        self._call("capture_want", lengths, [digest(row) for row in rows])
        prompts = [{"prompt_token_ids": row.tolist()} for row in rows]
        try:
            self._llm.generate(prompts, self._sampling, use_tqdm=False)
        except Exception as error:
            raise _failed(error) from error
        taken, passes = rows_of(self._call("capture_taken"))
        tokens = sum(lengths)
        if taken != [tokens] * self.columns:
            raise EngineError(
                f"--backend vllm: asked for {tokens:,} tokens' states, each once, and got {taken} for the captured "
                "layers; nothing of this batch is stored. Is prefix caching or chunked prefill forced on?"
            )
        if passes != 1:
            raise EngineError(
                f"--backend vllm: a batch of {len(rows):,} samples and {tokens:,} tokens took {passes} passes, not "
                "one; begin another cache with a smaller --batch-tokens"
            )
        return tokens

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        try:
            answers: list[Any] = self._llm.collective_rpc(method, args=arguments)
        except Exception as error:
            raise _failed(error) from error
        return answers


def steps(lengths: Sequence[int], most_tokens: int, block_tokens: int) -> Iterator[slice]:
    """Cut requests, in order, into runs of at most ``most_tokens`` and :data:`MOST_REQUESTS`, whose blocks of keys and
    values are no more than :data:`ROOM` times those tokens; at least one request each.
    """
    start = tokens = taken = 0
    for stop, length in enumerate(lengths):
        room = -(-length // block_tokens) * block_tokens
        fits = tokens + length <= most_tokens and taken + room <= ROOM * most_tokens and stop - start < MOST_REQUESTS
        if stop > start and not fits:
            yield slice(start, stop)
            start, tokens, taken = stop, 0, 0
        tokens, taken = tokens + length, taken + room
    if start < len(lengths):
        yield slice(start, len(lengths))


def largest_steps(most_tokens: int, block_tokens: int, longest: int) -> list[list[int]]:
    """Lengths of the requests of two steps that none is larger than: of the longest requests, and of the most."""
    rest = most_tokens % longest
    long = [longest] * (most_tokens // longest) + [rest] * (rest > 0)
    # Half empty blocks take the most memory.
    each = min(longest, max(block_tokens // 2 + 1, -(-most_tokens // MOST_REQUESTS)))
    many = [each] * (most_tokens // each)
    return [rows[next(steps(rows, most_tokens, block_tokens))] for rows in (long, many)]


def _failed(error: Exception) -> EngineError:
    lines = str(error).strip().splitlines() or [""]
    return EngineError(
        f"--backend vllm: the engine has failed ({type(error).__name__}: {lines[0]}); what its workers said stands "
        "above. Finished shards are kept: run the same command again once the cause is mended"
    )


@contextmanager
def _shared_file(num_bytes: int) -> Iterator[SharedFile]:
    """Shared memory, its room taken at once. It never has a name: it goes with those who have mapped it, however they
    end.
    """
    with tempfile.TemporaryFile(dir=SHARED_MEMORY) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            raise InputError(
                f"--backend vllm: {SHARED_MEMORY} has no room for the {num_bytes / 1e9:.1f} GB of one batch's states "
                f"({error.strerror}); make it larger (docker run --shm-size), or begin another cache with a smaller "
                "--batch-tokens"
            ) from None
        stat = os.fstat(file.fileno())
        yield SharedFile(f"/proc/{os.getpid()}/fd/{file.fileno()}", stat.st_ino, stat.st_size)
