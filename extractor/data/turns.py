"""The turns of a conversation in any of the shapes that data has -> messages for a chat template.

A turn is an object with a role and a content (``role/content``, ``from/value``, ...), a question with its answer, or
just a text where texts take turns. What else a turn's object holds stays in the message, nulls included: a template
sees what ``apply_chat_template`` would be given. Three things are changed, as vLLM and SGLang do: a role gets the name
that templates know, text parts are joined, and a tool call's arguments are an object, not its JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from extractor.data.bad_row import BadRow
from extractor.data.transcript import turns_of_transcript

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_ROLE_NAMES = {
    **dict.fromkeys(("human", "prompter", "usr"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "bard", "bing", "claude", "ai"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function_response", "function_result", "ipython"), "tool"),
    **dict.fromkeys(("tool_result", "function-response", "tool-response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "function-call", "tool-call"), "call"),
    **{role: role for role in ROLES},
}
_ROLE_KEYS = ("role", "from", "speaker", "author")
_CONTENT_KEYS = ("content", "value", "parts", "text", "message")
_PAIR_KEYS = (
    *(("human", "assistant"), ("user", "assistant"), ("input", "output"), ("question", "answer")),
    *(("prompt", "response"), ("instruction", "output"), ("query", "response"), ("human", "gpt"), ("user", "bot")),
)
_HOLDERS = ("messages", "conversations", "conversation", "contents", "turns", "items")
_LEARN_KEYS = ("train", "trainable", "training", "learn", "loss")
_CANNOT_LEARN = ("train_detail",)


class Turn(NamedTuple):
    """One message, and whether the row says to learn it (None: it does not say)."""

    message: Message
    learn: bool | None = None


def turns_of(value: Any, column: str) -> list[Turn]:
    """The turns in the value of ``column``: a list, an object that holds one, JSON of these, or a transcript.

    Raises:
        BadRow: it is none of these, or a turn is malformed.
    """
    if isinstance(value, str):
        value = turns_of_transcript(value) or (from_json(value, repr(column)) if value.lstrip()[:1] == "[" else value)
    if isinstance(value, Mapping):
        value = _listed(value)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column!r} is an empty list" if value == [] else f"{column!r} is not a list of turns")
    if column.lower() == "data" and any(isinstance(row, Mapping) and not _tells_roles(row) for row in value):
        raise BadRow(f"{column!r} is a list of rows, not of turns: write that list itself as the .json file")
    if all(isinstance(turn, str) for turn in value) and len(value) > 1:
        value = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(value)]
    turns = [turn for number, raw in enumerate(value, 1) for turn in _turns(raw, number)]
    if any(isinstance(raw, Mapping) and isinstance(raw.get("function_call"), Mapping) for raw in value):
        # The form before tool_calls: its results are what templates call tool.
        return [_as_tool(turn) for turn in turns]
    return turns


def held_turns(value: Mapping[str, Any]) -> str | None:
    """The key under which an object holds a list of turns, as ``{"messages": [...], "tools": [...]}`` does."""
    return next((key for key in _HOLDERS if isinstance(value.get(key), list)), None)


def _is_turn(value: Any) -> bool:
    """Whether ``value`` is the object of one turn."""
    return isinstance(value, Mapping) and any(key in value for key in _ROLE_KEYS)


def _tells_roles(value: Mapping[str, Any]) -> bool:
    """Whether an object is a turn, or turns under the names of their roles; a row of data has other names."""
    return _is_turn(value) or all(name in _ROLE_NAMES for name in value)


def _listed(value: Mapping[str, Any]) -> Any:
    key = held_turns(value)
    if key is not None:
        return value[key]
    if not _is_turn(value):
        return None
    columns = {k: v for k, v in value.items() if isinstance(v, list)}
    roles = next((value[key] for key in _ROLE_KEYS if key in value), None)
    if isinstance(roles, list):
        # A Sequence of objects as datasets writes it: an object of lists.
        if any(len(column) != len(roles) for column in columns.values()):
            raise BadRow("the lists of roles and contents are of different lengths")
        return [{k: column[number] for k, column in columns.items()} for number in range(len(roles))]
    return [value]


def _turns(raw: Any, number: int) -> list[Turn]:
    if isinstance(raw, Sequence) and not isinstance(raw, str) and len(raw) == 2:
        return [Turn(_plain("user", raw[0], number)), Turn(_plain("assistant", raw[1], number))]
    if not isinstance(raw, Mapping):
        raise BadRow(f"turn {number} is {kind_of(raw)}, not an object")
    if any(key in raw for key in _ROLE_KEYS):
        return [_turn(dict(raw), number)]
    for question, answer in _PAIR_KEYS:
        if question in raw and answer in raw:
            both = (("user", raw[question]), ("assistant", raw[answer]))
            return [Turn(_plain(role, text, number)) for role, text in both]
    if len(raw) == 1:
        [(name, text)] = raw.items()
        if _ROLE_NAMES.get(name) in ("system", "user", "assistant"):
            return [Turn(_plain(_ROLE_NAMES[name], text, number))]
    raise BadRow(f"turn {number}: 'role' is missing or not one of {', '.join(ROLES)}")


def _as_tool(turn: Turn) -> Turn:
    return turn._replace(message={**turn.message, "role": "tool"}) if turn.message["role"] == "function" else turn


def _plain(role: str, text: Any, number: int) -> Message:
    return {"role": role, "content": content_of(text, number)}


def _turn(turn: dict[str, Any], number: int) -> Turn:
    shown = next(key for key in _ROLE_KEYS if key in turn)
    said = turn[shown]
    role = _ROLE_NAMES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise BadRow(f"turn {number}: {shown!r} is missing or not one of {', '.join(ROLES)}")
    if shown == "from" and role == "function":
        role = "tool"
    learn = _learn(turn, number, role)
    names = {shown: "role"} | dict.fromkeys([k for k in _CONTENT_KEYS if k in turn][:1], "content")
    turn = {names.get(key, key): value for key, value in turn.items()}
    content = turn.get("content")
    if role == "call":
        return Turn({**turn, "role": "assistant", "content": "", "tool_calls": calls_of(content, number)}, learn)
    if isinstance(turn.get("function_call"), Mapping) and not turn.get("tool_calls"):
        turn["tool_calls"] = [{"type": "function", "function": turn.pop("function_call")}]
    if turn.get("tool_calls"):
        turn["tool_calls"] = _tool_calls(turn["tool_calls"], number)
    message = {**turn, "role": role}
    if content is None and message.get("tool_calls"):
        return Turn(message, learn)
    return Turn({**message, "content": content_of(content, number)}, learn)


def _learn(turn: dict[str, Any], number: int, role: str) -> bool | None:
    """What the turn says of itself, taken out of it: a template has no use for it.

    Raises:
        BadRow: it asks for something that no loss mask of ours can say.
    """
    for key in _CANNOT_LEARN:
        if turn.pop(key, None):
            raise BadRow(f"turn {number}: {key!r} learns part of a turn; only whole turns can be left out")
    keys = [key for key in ("weight", *_LEARN_KEYS) if isinstance(turn.get(key, ""), bool | int | float | None)]
    said = {key: value for key in keys if (value := turn.pop(key)) is not None}
    if role not in ("assistant", "call"):
        asks = [key for key in _LEARN_KEYS if said.get(key)]
        if asks:
            raise BadRow(f"turn {number}: {asks[0]!r} asks to learn what the {role} says; only answers are learned")
        return None
    for key, value in said.items():
        if value not in (0, 1):
            raise BadRow(f"turn {number}: {key!r} is {value}; a turn is learned (1) or not (0)")
    return all(said.values()) if said else None


def content_of(content: Any, number: int) -> str:
    """A turn's content as one text: parts in either naming (``text``, ``value``, ``content``) are joined.

    Raises:
        BadRow: there is none, or not only text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"turn {number} has no content" if content is None else f"turn {number}: content is not a text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        text = None
        if kind in ("text", "input_text", "output_text"):
            text = next((part[key] for key in ("text", "value", "content") if isinstance(part.get(key), str)), None)
        if text is None:
            raise BadRow(f"turn {number}: content part of type {kind!r}; only text parts can be used")
        texts.append(text)
    return "".join(texts)


def calls_of(value: Any, number: int) -> list[Any]:
    """Tool calls from ``{"name", "arguments"}`` objects, or a list or JSON of them.

    Raises:
        BadRow: it is something else.
    """
    calls = from_json(value, f"turn {number}: the call") if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and ("name" in call or "function" in call) for call in calls):
        raise BadRow(f"turn {number}: the call is not an object with a name and arguments")
    return _tool_calls([c if "function" in c else {"type": "function", "function": dict(c)} for c in calls], number)


def _tool_calls(calls: Any, number: int) -> list[Any]:
    if isinstance(calls, str):
        calls = from_json(calls, f"turn {number}: 'tool_calls'")
    if not isinstance(calls, list):
        raise BadRow(f"turn {number}: 'tool_calls' is {kind_of(calls)}, not a list")
    return [_call(call, number) for call in calls]


def _call(call: Any, number: int) -> Any:
    """The call with its arguments as an object.

    Raises:
        BadRow: they are a text that is not JSON, or not of an object.
    """
    if not isinstance(call, Mapping):
        raise BadRow(f"turn {number}: a tool call is {kind_of(call)}, not an object")
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise BadRow(f"turn {number}: the 'function' of a tool call is {kind_of(function)}, not an object")
    if "arguments" not in function:
        return call
    arguments = function["arguments"]
    if isinstance(arguments, str):
        text = arguments.strip()
        arguments = from_json(text, f"turn {number}: 'arguments' of a tool call") if text not in ("", "null") else {}
        if isinstance(arguments, str):
            # Encoded twice.
            arguments = from_json(arguments, f"turn {number}: 'arguments' of a tool call")
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise BadRow(f"turn {number}: 'arguments' of a tool call are {kind_of(arguments)}, not an object")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def from_json(text: str, what: str) -> Any:
    """The value of a JSON text.

    Raises:
        BadRow: it is not JSON, or nested beyond reason.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise BadRow(f"{what} is nested too deep") from error
    except ValueError as error:
        raise BadRow(f"{what} is a text but not JSON: {error}") from error


def kind_of(value: Any) -> str:
    """``a str``; ``missing`` for None."""
    return "missing" if value is None else f"a {type(value).__name__}"
