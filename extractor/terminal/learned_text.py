"""Text of samples for a person: what is learned in colour or in brackets, and nothing that a terminal would obey."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

LEARNED_BEGIN, LEARNED_END = "[[", "]]"
_GREEN, _FAINT, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_EDGE_SPACE = re.compile(r"\A[ \n]+|[ \n]+\Z")


@dataclass(frozen=True, slots=True)
class Stretch:
    """A run of tokens that are all learned or all not."""

    text: str
    learned: bool


def printable(text: str) -> str:
    r"""``text`` with what a terminal might obey, or not show, as an escape (``\x1b``, ``\u202e``); lines stay."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """:func:`printable`, with line breaks and tabs as escapes, too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def wants_colour(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that shows colour and nobody asked for none (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(stretches: Iterable[Stretch], colour: bool, most: int | None = None) -> str:
    """The text, what is learned of it green, or in ``[[ ]]`` without ``colour``.

    In colour, white space at the ends of a learned stretch is marked, since it would not show. ``most``: characters of
    a stretch; of a longer one the middle is left out.
    """
    shown = []
    for stretch in stretches:
        text = _shortened(printable(stretch.text), most)
        if not stretch.learned:
            shown.append(text)
        elif colour:
            marked = _EDGE_SPACE.sub(lambda found: found[0].replace(" ", "·").replace("\n", "↵\n"), text)
            shown.append(_by_line(marked, _GREEN))
        else:
            shown.append(f"{LEARNED_BEGIN}{text}{LEARNED_END}")
    return "".join(shown)


def faint(text: str, colour: bool) -> str:
    """``text`` in the background, where there is colour."""
    return _by_line(text, _FAINT) if colour else text


def rule(text: str, colour: bool) -> str:
    """A headline, with a line up to the terminal's width behind it."""
    width = shutil.get_terminal_size().columns
    return faint(f"── {text} {'─' * max(width - len(text) - 4, 0)}", colour)


def _by_line(text: str, style: str) -> str:
    """Each line begins its style anew: a pager forgets it at the end of a line."""
    return "\n".join(f"{style}{line}{_RESET}" if line else "" for line in text.split("\n"))


def _shortened(text: str, most: int | None) -> str:
    if most is None or len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"
