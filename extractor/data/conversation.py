"""A row -> a conversation (messages) or ready token ids: which columns mean what, and what makes a row malformed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cache_format.errors import InputError
from extractor.data.dataset import BadRow

Row = Mapping[str, Any]
Message = dict[str, Any]

COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt-response": ("prompt", "response"),
    "input_ids": ("input_ids",),
    "text": ("text",),
}
"""Row format -> the columns that it needs. Looked for in this order."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_SHAREGPT_ROLES |= {"observation": "tool", **{role: role for role in ROLES}}


def detect_format(columns: Sequence[str], row_format: str | None = None) -> str:
    """The row format that fits ``columns``, or a check that the one asked for does.

    Raises:
        InputError: nothing fits; the message lists the columns found.
    """
    found = ", ".join(columns)
    if row_format is not None:
        missing = [c for c in COLUMNS[row_format] if c not in columns]
        if missing:
            raise InputError(f"--row-format {row_format} needs the column {' and '.join(missing)}; found: {found}")
        return row_format
    for name, needed in COLUMNS.items():
        if all(c in columns for c in needed):
            return name
    forms = "; ".join(" + ".join(needed) for needed in COLUMNS.values())
    raise InputError(f"no known row format in the columns {found}. Name the columns after one of: {forms}")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages with string content, ready for a chat template."""

    messages: list[Message]
    """``role``, ``content``, and what else the row has for the template (``tool_calls``, ``reasoning_content``)"""
    tools: list[Any] | None = None
    learn: tuple[bool, ...] | None = None
    """one a message; None: every assistant turn is learned. False: an assistant turn that the row says not to learn"""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """the row's own ``chat_template_kwargs`` and ``documents``, for the template"""


def conversation_of(row: Row, row_format: str) -> Conversation:
    """The conversation in a ``messages``, ``conversations`` or ``prompt-response`` row.

    Raises:
        BadRow: it is malformed.
    """
    if row_format == "prompt-response":
        pair = [("user", text_of(row, "prompt")), ("assistant", text_of(row, "response"))]
        return Conversation(messages=[{"role": role, "content": text} for role, text in pair])
    turns = row.get(row_format)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{row_format!r} is not a list of turns" if turns != [] else f"{row_format!r} is an empty list")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    return Conversation(messages=messages, tools=_tools(row.get("tools")))


def text_of(row: Row, column: str) -> str:
    """The string in ``column``.

    Raises:
        BadRow: there is none.
    """
    text = row.get(column)
    if not isinstance(text, str):
        raise BadRow(f"{column!r} is {_kind(text)}, not a text")
    return check_text(text)


def check_text(text: str) -> str:
    """``text`` itself.

    Raises:
        BadRow: it holds half a surrogate pair, which no tokenizer can encode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"the text holds half a surrogate pair ({text[error.start]!r})") from error
    return text


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"turn {number} is {_kind(turn)}, not an object")
    turn = _without_nulls(turn)
    if "from" in turn and "role" not in turn:
        role, content = _SHAREGPT_ROLES.get(str(turn.pop("from"))), turn.pop("value", None)
        shown = "from"
    else:
        role, content = turn.pop("role", None), turn.pop("content", None)
        shown = "role"
    if role not in ROLES:
        raise BadRow(f"turn {number}: {shown!r} is missing or not one of {', '.join(ROLES)}")
    if content is None and turn.get("tool_calls"):
        content = ""
    return {**turn, "role": role, "content": _content(content, number)}


def _content(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"turn {number} has no content" if content is None else f"turn {number}: content is not a text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise BadRow(f"turn {number}: content part of type {kind!r}; only text parts can be used")
        texts.append(text)
    return "".join(texts)


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(f"'tools' is a text but not JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRow(f"'tools' is {_kind(tools)}, not a list")
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    """Tables fill the keys that a row lacks with null; templates take the key for present."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def ids_of(row: Row, vocab_size: int, loss_on: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (int32 ``[T]``) and loss mask (uint8 ``[T]``) of a pre-tokenised row.

    ``loss_on="column"`` takes ``loss_mask``, or else ``labels``: unshifted, -100 where nothing is learned.
    ``"all"`` learns every token.

    Raises:
        BadRow: it is malformed.
    """
    ids = _integers(row, "input_ids")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise BadRow(f"token id {wrong} in 'input_ids' is outside the tokenizer's 0..{vocab_size - 1}")
    if row.get("attention_mask") is not None and not _integers(row, "attention_mask", len(ids)).all():
        raise BadRow("'attention_mask' has zeros: store the row without padding")
    if loss_on == "all":
        return ids.astype(np.int32), np.ones(len(ids), np.uint8)
    if row.get("loss_mask") is not None:
        mask = _integers(row, "loss_mask", len(ids))
        if not np.isin(mask, (0, 1)).all():
            raise BadRow("'loss_mask' holds something other than 0 and 1")
        return ids.astype(np.int32), mask.astype(np.uint8)
    labels = _integers(row, "labels", len(ids))
    learned = labels != -100
    if (labels[learned] != ids[learned]).any():
        raise BadRow("'labels' differ from 'input_ids' where they are not -100; they must be unshifted")
    return ids.astype(np.int32), learned.astype(np.uint8)


def _integers(row: Row, column: str, length: int | None = None) -> np.ndarray:
    values = row.get(column)
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.asarray(None)
    if array.ndim == 1 and array.size == 0:
        array = array.astype(np.int64)
    if not isinstance(values, list) or array.ndim != 1 or array.dtype.kind not in "iub":
        raise BadRow(f"{column!r} is not a list of whole numbers" if values is not None else f"{column!r} is missing")
    if length is not None and len(array) != length:
        raise BadRow(f"{column!r} has {len(array)} entries, 'input_ids' has {length}")
    return array.astype(np.int64)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
