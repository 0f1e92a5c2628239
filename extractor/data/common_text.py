"""What two renderings of a conversation have in common."""

from __future__ import annotations

import re

_OPEN_MARK = re.compile(r"(<[^<>\s]*|\[[^\[\]\s]*)\Z")


def common(one: str, other: str) -> str:
    """What both begin with."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if one[:middle] == other[:middle] else (least, middle - 1)
    return one[:least]


def common_but_for_space(one: str, other: str) -> tuple[int, int]:
    """Lengths of the beginnings of both that are the same, runs of white space of different lengths aside.

    A mark that is cut off at the end does not count as something in common behind a difference.
    """
    at = to = len(common(one, other))
    begun, begun_other = at, to
    while at < len(one) and to < len(other):
        space, other_space = _space(one, at), _space(other, to)
        same = len(common(one[at + space :], other[to + other_space :]))
        if not same or not (space or other_space):
            break
        at, to = at + space + same, to + other_space + same
        if other[begun_other : before_open_mark(other[:to])].strip():
            begun, begun_other = at, to
    return begun, begun_other


def _space(text: str, start: int) -> int:
    return len(text) - start - len(text[start:].lstrip())


def before_open_mark(text: str) -> int:
    """Length of ``text`` without a mark such as ``<thi`` or ``[INS`` that is cut off at its end."""
    mark = _OPEN_MARK.search(text)
    return mark.start() if mark else len(text)
