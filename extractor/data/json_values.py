"""The rows of a JSON file that is not JSON lines: the elements of a list, or objects one after the other.

They are cut out as bytes and not parsed here: one malformed row stays one bad row, and no date becomes anything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from mmap import mmap

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_BLANK = re.compile(rb"[\s,]*")
_BOM = b"\xef\xbb\xbf"


def json_values(data: bytes | mmap) -> Iterator[bytes]:
    """The values in ``data``, each as its own bytes.

    Raises:
        ValueError: it is neither a list nor objects, or ends in the middle of one.
    """
    start = _after_blank(data, len(_BOM) if data[: len(_BOM)] == _BOM else 0)
    if data[start : start + 1] == b"[":
        yield from _elements(data, start + 1)
    elif data[start : start + 1] == b"{":
        yield from _objects(data, start)
    else:
        raise ValueError("it is neither a JSON list nor JSON objects")


def _elements(data: bytes | mmap, start: int) -> Iterator[bytes]:
    depth = 0
    for token in _TOKEN.finditer(data, start):
        kind = token[0][:1]
        if kind in b"[{":
            depth += 1
        elif kind in b"]}":
            depth -= 1
        elif token[0] == b'"':
            break
        if depth < 0 or (depth == 0 and kind == b","):
            element = data[start : token.start()].strip()
            if element or depth == 0:
                yield element
            start = token.end()
        if depth < 0:
            if data[_after_blank(data, start) :]:
                raise ValueError(f"something follows the list, at byte {start + 1}")
            return
    raise ValueError("it ends in the middle of a list")


def _objects(data: bytes | mmap, start: int) -> Iterator[bytes]:
    depth = 0
    for token in _TOKEN.finditer(data, start):
        kind = token[0][:1]
        if token[0] == b'"':
            break
        if depth == 0 and kind not in b"{,":
            raise ValueError(f"something stands between two objects, at byte {token.start() + 1}")
        if depth == 0 and kind == b"{":
            if data[start : token.start()].strip(b" \t\r\n,"):
                raise ValueError(f"something stands between two objects, at byte {start + 1}")
            start = token.start()
        depth += (kind in b"[{") - (kind in b"]}")
        if depth == 0 and kind in b"]}":
            yield data[start : token.end()]
            start = token.end()
    if depth or data[_after_blank(data, start) :]:
        raise ValueError("it ends in the middle of an object")


def _after_blank(data: bytes | mmap, start: int) -> int:
    found = _BLANK.match(data, start)
    assert found is not None
    return found.end()
