"""A row that cannot be used: why, which class of reasons that is, and a guard that lets nothing else out of a row.

Whatever a row or a chat template raises, or does not finish, makes that row bad, and no more than that row.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cache_format.errors import DFlashCacheError

SECONDS_A_ROW = 30.0
"""Processor time that one row may take, rendering and tokenising: a thousand times what a long conversation takes."""

MOST_CHARACTERS = 300
"""Of a problem's text; a template may raise a whole document."""

_OUR_WORDS = frozenset(
    (
        *(
            "messages",
            "conversations",
            "conversation",
            "prompt",
            "response",
            "text",
            "role",
            "from",
            "value",
            "content",
        ),
        *("input_ids", "labels", "loss_mask", "attention_mask", "tools", "tool_calls", "arguments", "system"),
        *("chat_template_kwargs", "documents", "weight", "train", "label", "images", "chosen", "rejected"),
        *("instruction", "input", "output", "question", "completion"),
    )
)
"""What a class of problems may quote: names of columns and keys."""
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)""", re.DOTALL)
_TURN = re.compile(r"^turn \d+:? ")


class BadRow(ValueError):
    """A row that cannot be used; the text says why, without file and row number (see :meth:`Rows.where`)."""

    reason: str
    """the class of the problem: the same text for all rows that are bad in the same way, with nothing of a row in it"""

    def __init__(self, problem: str, reason: str | None = None):
        """``reason`` None: ``problem`` up to its first colon, without numbers and what it quotes of the row."""
        super().__init__(problem if len(problem) <= MOST_CHARACTERS else f"{problem[:MOST_CHARACTERS]}...")
        self.reason = class_of(problem) if reason is None else reason


class LeftOut(BadRow):
    """A row that is fine but not to be learned from: it counts under ``reason`` and never stops a job."""


def class_of(problem: str) -> str:
    """``turn 3: content part of type 'image_url'; only text`` -> ``content part of type ...; only text``."""

    def kept(match: re.Match[str]) -> str:
        return match[0] if match[0][1:-1] in _OUR_WORDS else "..."

    text = _QUOTED.sub(kept, _TURN.sub(lambda match: "" if ":" in match[0] else "a turn ", problem))
    return re.sub(r"(?<![\w-])-?\d[\d.,]*", "N", text.partition(": ")[0])


class _Overdue(BaseException):
    """Raised in the midst of a row. Not an Exception: nothing on the way may swallow it."""


@contextmanager
def guarded() -> Iterator[None]:
    """Turn all that goes wrong with a row in this block into :class:`BadRow`.

    In the main thread of a process a row also has ``SECONDS_A_ROW`` of processor time; elsewhere, where no signal
    interrupts, it has as long as it takes.

    Raises:
        BadRow: anything was raised, or the time is over.
        DFlashCacheError: one that is not the row's fault.
    """
    try:
        with _limited():
            yield
    except (BadRow, DFlashCacheError):
        raise
    except _Overdue:
        # It may have rung in the very step that disarms.
        _disarm()
        raise BadRow(
            f"is not done after {SECONDS_A_ROW:.0f} s of processor time; does the chat template end?",
            "is not done in time",
        ) from None
    except Exception as error:
        raise _raised(error) from error
    except BaseException as error:
        # What Rust code panics with; it says nothing of its own, and is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _raised(error) from None


def _raised(error: BaseException) -> BadRow:
    kind = type(error).__name__
    text = str(error).strip().partition("\n")[0]
    return BadRow(f"the row or the chat template raises {kind}{f': {text}' if text else ''}")


@contextmanager
def _limited() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGVTALRM) is not _ring:
        signal.signal(signal.SIGVTALRM, _ring)
    try:
        # Processor time, so that a busy machine makes no row bad. Rings again where the first ring was swallowed.
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_A_ROW, 1.0)
        yield
    finally:
        _disarm()


def _ring(_number: int, _frame: FrameType | None) -> None:
    raise _Overdue


def _disarm() -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
