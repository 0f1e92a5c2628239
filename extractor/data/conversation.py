"""A row -> a conversation: which turns it has, what is learned of them, and what else the template is to be given.

Nothing that a row says is dropped in silence: it is used, or the row is bad, or it is left out for a named reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from extractor.config import NOT_FOR_TEMPLATES
from extractor.data.bad_row import BadRow, LeftOut
from extractor.data.forms import MEDIA, Form
from extractor.data.transcript import turns_of_transcript
from extractor.data.turns import Message, Turn, calls_of, content_of, from_json, held_turns, kind_of, turns_of

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages with text content, ready for a chat template."""

    messages: list[Message]
    """``role``, ``content``, and what else the row has for the template (``tool_calls``, ``reasoning_content``).
    ``content`` may be None or missing beside ``tool_calls``, as it is in the row"""
    tools: list[Any] | None = None
    learn: tuple[bool, ...] | None = None
    """one a message; None: every assistant turn is learned. False: an assistant turn that the row says not to learn"""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """the row's own ``chat_template_kwargs`` and ``documents``, for the template"""


def conversation_of(row: Row, form: Form) -> Conversation:
    """The conversation in a row of messages, of prompt and response, or of preferences.

    Raises:
        BadRow: it is malformed, or asks for what cannot be done.
        LeftOut: it says itself that it is not to be learned.
    """
    refuse_media(row)
    _require_good(form.get(row, "label"))
    if form.row_format in ("messages", "conversations"):
        turns, holder = _context(row, form)
        turns += _missing_answer(row, form, turns)
    elif form.row_format == "preference":
        turns, holder = _chosen(row, form)
    else:
        turns, holder = _context(row, form)
        turns += _answer(row, form)
    turns = _with_system(turns, form.get(row, "system"), _held(holder, "system"))
    messages = [turn.message for turn in turns]
    tools = form.get(row, "tools") or _held(holder, "tools")
    if not tools:
        tools = _as_tools(form.get(row, "functions") or _held(holder, "functions"))
    return Conversation(
        messages=messages,
        tools=_tools(tools),
        learn=tuple(turn.learn is not False for turn in turns) if any(t.learn is False for t in turns) else None,
        template_kwargs=_template_kwargs(form.get(row, "chat_template_kwargs"), form.get(row, "documents")),
    )


def text_of(row: Row, column: str) -> str:
    """The string in ``column``.

    Raises:
        BadRow: there is none.
    """
    refuse_media(row)
    text = row.get(column)
    if not isinstance(text, str):
        raise BadRow(f"{column!r} is {kind_of(text)}, not a text")
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


def refuse_media(row: Row) -> None:
    """Raise BadRow where a row has images, videos or sounds: a text target does not see them."""
    for column in MEDIA:
        value = row.get(column)
        if value is not None and (not hasattr(value, "__len__") or len(value)):
            raise BadRow(f"{column!r} is not empty; only text can be used")


# -- the turns --------------------------------------------------------------------------------------------------------


def _context(row: Row, form: Form) -> tuple[list[Turn], Row]:
    """The turns before the answer (of messages: all of them), and the object that holds them, if one does."""
    name = "messages" if "messages" in form.columns else "prompt"
    column, value = form.column(name), form.get(row, name)
    holder = value if isinstance(value, Mapping) and held_turns(value) else {}
    if value is None:
        raise BadRow(f"{column!r} is missing" if column not in row else f"{column!r} is null")
    if name == "prompt" and isinstance(value, str) and turns_of_transcript(value) is None:
        turns = [_said("user", _whole_prompt(value, row, form))]
    else:
        turns = turns_of(value, column)
    return [*_history(form.get(row, "history")), *turns], holder


def _whole_prompt(prompt: str, row: Row, form: Form) -> str:
    """The prompt and its second part, as LLaMA-Factory and Axolotl join them."""
    part = form.get(row, "input")
    if part is None or part == "":
        return prompt
    if not isinstance(part, str):
        raise BadRow(f"{form.column('input')!r} is {kind_of(part)}, not a text")
    return f"{prompt}\n{part}" if prompt else part


def _history(history: Any) -> list[Turn]:
    if not history:
        return []
    if not isinstance(history, list):
        raise BadRow(f"'history' is {kind_of(history)}, not a list of turns")
    return turns_of(history, "history")


def _answer(row: Row, form: Form) -> list[Turn]:
    if "calls" in form.columns:
        calls = calls_of(form.get(row, "calls"), 2)
        return [Turn({"role": "assistant", "content": "", "tool_calls": calls})]
    return _answer_turns(form.get(row, "response"), form.column("response"), form.get(row, "reasoning_content"))


def _answer_turns(value: Any, column: str, reasoning: Any = None) -> list[Turn]:
    """The turns of an answer: a text, one turn or several, or a completion as an API returns it."""
    if isinstance(value, Mapping):
        value = _completion(value, column)
    if isinstance(value, str):
        turn = _said("assistant", value)
        return [Turn({**turn.message, "reasoning_content": reasoning})] if reasoning else [turn]
    if isinstance(value, list) and all(isinstance(turn, str) for turn in value):
        one = f"; to learn the first one: --columns response={column}.0" if value else ""
        raise BadRow(f"{column!r} is {kind_of(value)}, not a text{one}")
    turns = turns_of(value, column) if isinstance(value, list | Mapping) else []
    if not turns:
        raise BadRow(f"{column!r} is {kind_of(value)}, not a text")
    return turns


def _completion(value: Mapping[str, Any], column: str) -> Any:
    """What an API's response says, where ``value`` is one; else ``value``."""
    status = value.get("status_code", 200)
    body = value["body"] if isinstance(value.get("body"), Mapping) else value
    if "choices" not in body and status == 200 and not body.get("error"):
        return value
    choices = body.get("choices")
    if status != 200 or not isinstance(choices, list) or not choices:
        raise BadRow(f"{column!r} is a response without an answer (status {status})")
    if len(choices) > 1:
        raise BadRow(f"{column!r} has {len(choices)} choices; keep the one to learn")
    choice = choices[0] if isinstance(choices[0], Mapping) else {}
    return choice.get("message", choice.get("text"))


def _missing_answer(row: Row, form: Form, turns: list[Turn]) -> list[Turn]:
    """The answer in a column of its own, to messages that end with somebody else."""
    if turns[-1].message["role"] == "assistant":
        return []
    taken = form.columns.values()
    names = ["response", "completion", "choices"]
    column = next((name for name in names if row.get(name) is not None and name not in taken), None)
    if "response" in form.columns:
        column = form.columns["response"]
    if column is None or row.get(column) is None:
        return []
    return _answer_turns({"choices": row[column]} if column == "choices" else row[column], column)


def _chosen(row: Row, form: Form) -> tuple[list[Turn], Row]:
    """The better side of a preference row: a whole conversation, or the answer to its prompt."""
    column, value = form.column("chosen"), form.get(row, "chosen")
    known = "messages" in form.columns or "prompt" in form.columns
    context, holder = _context(row, form) if known else ([], {})
    whole = isinstance(value, str) and turns_of_transcript(value) is not None
    chosen = turns_of(value, column) if whole else _answer_turns(value, column, form.get(row, "reasoning_content"))
    if chosen[0].message["role"] == "assistant":
        if not context:
            raise BadRow(f"{column!r} is an answer, and the row has no prompt")
        if context[-1].message["role"] == "assistant":
            raise BadRow(f"{column!r} is an answer, but {form.column('messages')!r} already ends with one")
        return [*context, *chosen], holder
    said = {_spoken(turn) for turn in chosen}
    if context and not {_spoken(turn) for turn in context if turn.message["role"] == "user"} <= said:
        raise BadRow(f"{column!r} is a conversation, but not the one of the row's prompt")
    return chosen, holder


def _spoken(turn: Turn) -> tuple[str, str]:
    return turn.message["role"], str(turn.message.get("content")).strip()


def _said(role: str, text: str) -> Turn:
    return Turn({"role": role, "content": text})


# -- what stands beside them ------------------------------------------------------------------------------------------


def _held(holder: Row, name: str) -> Any:
    """A field of the object that holds the turns."""
    return Form(row_format="messages").get(holder, name)


def _with_system(turns: list[Turn], *systems: Any) -> list[Turn]:
    """``turns`` after the system text that stands in columns of its own."""
    for system in systems:
        text = _system_text(system)
        if not text.strip():
            continue
        first = turns[0].message
        if first["role"] not in ("system", "developer"):
            turns = [_said("system", text), *turns]
        elif str(first.get("content")).strip() != text.strip():
            raise BadRow("the row has a system turn and another text in a column for it")
    return turns


def _system_text(system: Any) -> str:
    if isinstance(system, Mapping):
        system = system.get("parts", system.get("content"))
    if system is None:
        return ""
    if not isinstance(system, str | list):
        raise BadRow(f"'system' is {kind_of(system)}, not a text")
    text = content_of(system, 0) if system else ""
    return text.removeprefix("SYSTEM:").strip() if text.startswith("SYSTEM:") else text


def _require_good(label: Any) -> None:
    """Raise LeftOut where the row is labelled as one not to learn from (KTO)."""
    if isinstance(label, bool | int) and label == 0:
        raise LeftOut("'label' is false", "rejected")


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        tools = from_json(tools, "'tools'")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRow(f"'tools' is {kind_of(tools)}, not a list")
    tools = [from_json(tool, "'tools'") if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("'tools' holds something that is not an object")
    return tools


def _as_tools(functions: Any) -> list[Any] | None:
    """What the form before tools had, as tools."""
    if isinstance(functions, str) and functions.strip():
        functions = from_json(functions, "'functions'")
    if functions and not isinstance(functions, list):
        raise BadRow(f"'functions' is {kind_of(functions)}, not a list")
    return [{"type": "function", "function": function} for function in functions or ()]


def _template_kwargs(kwargs: Any, documents: Any) -> dict[str, Any]:
    kwargs = from_json(kwargs, "'chat_template_kwargs'") if isinstance(kwargs, str) and kwargs.strip() else kwargs
    if kwargs and not isinstance(kwargs, Mapping):
        raise BadRow(f"'chat_template_kwargs' is {kind_of(kwargs)}, not an object")
    found = dict(kwargs or {})
    if taken := sorted(found.keys() & NOT_FOR_TEMPLATES):
        raise BadRow(f"'chat_template_kwargs' sets {taken[0]!r}, which is not for a row to say")
    if documents:
        documents = from_json(documents, "'documents'") if isinstance(documents, str) else documents
        if not isinstance(documents, list):
            raise BadRow(f"'documents' is {kind_of(documents)}, not a list")
        found["documents"] = documents
    return found
