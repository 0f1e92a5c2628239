"""What a notebook shows of an object: a small table, everything in it escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """``title`` above a table with ``head`` (may be empty) and ``rows`` of text."""
    cell = '<td style="text-align:left">{}</td>'
    heads = "".join(f'<th style="text-align:left">{escape(one)}</th>' for one in head)
    lines = [f"<tr>{heads}</tr>"] if heads else []
    lines += [f"<tr>{''.join(cell.format(escape(str(one))) for one in row)}</tr>" for row in rows]
    return f"<div><b>{escape(title)}</b><table>{''.join(lines)}</table></div>"
