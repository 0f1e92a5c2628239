"""Which columns of a row mean what: told from their names, or said by ``--columns field=column``.

A *field* is what a row can hold for us (``config.FIELDS``), a *column* is what the data calls it. Names are
compared without regard to case. What cannot be told is refused with the columns found and the option to give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cache_format.errors import InputError
from extractor.data.column_paths import head, paths_among

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("messages",),
    "prompt-response": ("prompt", "response"),
    "preference": ("chosen",),
    "input_ids": ("input_ids",),
    "text": ("text",),
}
"""``--row-format`` -> the fields that it needs."""

_TURNS = ("messages", "conversations", "conversation", "contents", "items", "chat", "data")
_PAIRS = (
    *(("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response")),
    *(("question", "response"), ("question", "answer"), ("query", "response"), ("query", "answer")),
    *(("problem", "solution"), ("problem", "generated_solution"), ("question", "generated_solution")),
    *(("question", "solution"), ("input", "output"), ("inputs", "targets"), ("input", "target"), ("user", "assistant")),
    *(("human", "assistant"), ("request", "response"), ("body", "response")),
)
_PROMPTS = tuple(dict.fromkeys(prompt for prompt, _ in _PAIRS if prompt not in ("request", "body")))
_ANSWERS = tuple(dict.fromkeys(answer for _, answer in _PAIRS))
_CHOSEN = ("chosen", "preferred_output", "chosen_response")
_REJECTED = ("rejected", "non_preferred_output", "rejected_response", "rejected_messages")
_TEXTS = ("text", "content", "code")

OPTIONAL: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt", "system_message", "system_instruction", "systeminstruction"),
    "tools": ("tools",),
    "functions": ("functions",),
    "rejected": _REJECTED,
    "history": ("history",),
    "reasoning_content": ("reasoning_content", "thinking"),
    "label": ("label", "kto_tag"),
    "documents": ("documents",),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "loss_mask": ("loss_mask",),
    "labels": ("labels",),
}
"""Fields that any row may have beside those of its format, and the columns they are looked for in."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")
"""Columns of what a text target never sees; a row that has something in one of them is bad."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the rows of one source are read."""

    row_format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """field -> column, for the fields of the format and those that ``--columns`` names; others by OPTIONAL"""

    def get(self, row: Mapping[str, Any], name: str) -> Any:
        """The value of a field in ``row``, None where there is none. Optional ones may come in any row."""
        if name in self.columns:
            return row.get(self.columns[name])
        for alias in OPTIONAL.get(name, ()):
            for column in (alias, *(c for c in row if c != alias and c.lower() == alias)):
                if row.get(column) is not None and column not in self.columns.values():
                    return row[column]
        return None

    def column(self, name: str) -> str:
        """What the data calls a field, for messages."""
        return self.columns.get(name, name)

    def renamed(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """``row`` with the columns of this form under the names of their fields."""
        return {**row, **{name: row.get(column) for name, column in self.columns.items()}}

    def unused(self, columns: Sequence[str]) -> list[str]:
        """Those of ``columns`` that nothing is taken from."""
        known = {alias for aliases in OPTIONAL.values() for alias in aliases} | set(MEDIA) | {"attention_mask"}
        taken = {*self.columns.values(), *map(head, paths_among(self.columns.values(), columns))}
        return [c for c in columns if c not in taken and c.lower() not in known]


def form_of(columns: Sequence[str], row_format: str | None = None, named: Mapping[str, str] | None = None) -> Form:
    """The form that rows with ``columns`` have, or a check that they have the one asked for.

    ``named``: field -> column of ``--columns``, for a source that has all of these columns.

    Raises:
        InputError: nothing fits; the message lists the columns found and says what to give.
    """
    named = dict(named or {})
    found = ", ".join(columns)
    missing = [column for column in named.values() if column not in columns]
    if missing:
        raise InputError(f"--columns names the column {' and '.join(missing)}; found: {found}")
    free = _by_name([c for c in columns if c not in named.values()])
    if row_format is None:
        row_format = _format_named(named)
    wanted = [row_format] if row_format else ["preference", "messages", "prompt-response", "input_ids", "text"]
    for candidate in wanted:
        taken = _fields_of(candidate, free, named, asked=row_format is not None)
        if taken is not None:
            return Form(row_format=candidate, columns=taken)
    if row_format:
        needed = " and ".join(f for f in FORMATS[row_format] if f not in named)
        needed = "conversations" if row_format == "conversations" else needed
        raise InputError(
            f"--row-format {row_format} needs the column {needed}; found: {found}. "
            f"If it has another name, say so: --columns {FORMATS[row_format][-1]}=COLUMN"
        )
    raise InputError(f"no known row format in the columns {found}. {_way_out(free)}")


def named_for(columns: Sequence[str], named: Mapping[str, str]) -> dict[str, str]:
    """Those of ``--columns`` that count for a source: all, or none where it has none of the columns.

    Raises:
        InputError: it has some of them.
    """
    there = [column for column in named.values() if column in columns]
    if there and len(there) < len(named):
        missing = [column for column in named.values() if column not in columns]
        raise InputError(
            f"--columns names {' and '.join(missing)}, which the data does not have; found: {', '.join(columns)}"
        )
    return dict(named) if there else {}


def _by_name(columns: Sequence[str]) -> dict[str, str]:
    """Lower-case name -> column; a column that is written so exactly comes first."""
    found = {column.lower(): column for column in reversed(columns)}
    return {**found, **{column: column for column in columns if column == column.lower()}}


def _format_named(named: Mapping[str, str]) -> str | None:
    for name in ("chosen", "messages", "prompt", "response", "calls", "input_ids", "text"):
        if name in named:
            formats = {"chosen": "preference", "prompt": "prompt-response", "response": "prompt-response"}
            return {**formats, "calls": "prompt-response"}.get(name, name)
    return None


def _fields_of(
    row_format: str, free: Mapping[str, str], named: Mapping[str, str], *, asked: bool
) -> dict[str, str] | None:
    """field -> column of a format, or None where the columns do not have it."""
    found: dict[str, str] | None
    if row_format == "messages":
        found = _first(free, "messages", _TURNS[:1] if asked and "messages" in free else _TURNS)
    elif row_format == "conversations":
        found = _first(free, "messages", ("conversations",))
    elif row_format == "preference":
        found = _preference(free, named, asked=asked)
    elif row_format == "prompt-response":
        found = _pair(free, named)
    elif row_format == "text":
        found = None if _single_messages(free) and not asked else _first(free, "text", _TEXTS)
    else:
        found = _first(free, row_format, (row_format,))
    needed = FORMATS[row_format]
    together = {**(found or {}), **named}
    has_answer = "calls" in together and needed[-1] == "response"
    if any(name not in together and not (has_answer and name == "response") for name in needed):
        return None
    return together


def _first(free: Mapping[str, str], name: str, aliases: Sequence[str]) -> dict[str, str] | None:
    return next(({name: free[alias]} for alias in aliases if alias in free), None)


def _prompt(free: Mapping[str, str], named: Mapping[str, str]) -> dict[str, str]:
    """The prompt, and what else belongs to it."""
    found = {} if "prompt" in named else _first(free, "prompt", _PROMPTS) or {}
    return {**found, **_second_part(free, {**found, **named}.get("prompt", "").lower())}


def _second_part(free: Mapping[str, str], prompt: str) -> dict[str, str]:
    """Alpaca's ``input`` belongs to an ``instruction``, Dolly's ``context`` to whatever asks."""
    aliases = ("input", "context") if prompt == "instruction" else ("context",)
    return next(({"input": free[a]} for a in aliases if a in free and a != prompt), {})


def _pair(free: Mapping[str, str], named: Mapping[str, str]) -> dict[str, str] | None:
    if named.keys() & {"prompt", "response", "calls"}:
        answer = {} if named.keys() & {"response", "calls"} else _first(free, "response", _ANSWERS) or {}
        rest = {name: column for name, column in free.items() if column not in answer.values()}
        return {**_prompt(rest, named), **answer}
    if {"query", "answers", "tools"} <= free.keys():
        return {"prompt": free["query"], "calls": free["answers"]}
    for prompt, answer_name in _PAIRS:
        if prompt in free and answer_name in free:
            pair = {"prompt": free[prompt], "response": free[answer_name]}
            return {**pair, **_second_part({k: v for k, v in free.items() if v not in pair.values()}, prompt)}
    prompts, answers = [p for p in _PROMPTS if p in free], [a for a in _ANSWERS if a in free]
    if len(prompts) == len(answers) == 1:
        return {"prompt": free[prompts[0]], "response": free[answers[0]], **_second_part(free, prompts[0])}
    return None


def _preference(free: Mapping[str, str], named: Mapping[str, str], *, asked: bool) -> dict[str, str] | None:
    chosen = {} if "chosen" in named else _first(free, "chosen", _CHOSEN)
    if chosen is None:
        return None
    context = _prompt(free, named)
    if "prompt" not in {**context, **named}:
        context = _first(free, "messages", _TURNS) or {}
    rejected = any(name in free for name in _REJECTED) or "rejected" in named
    if not asked and not rejected and not context:
        return None
    return {**context, **chosen}


def _single_messages(free: Mapping[str, str]) -> bool:
    return "role" in free or "parent_id" in free


_INSIDE = "; one inside a list or an object is written with dots, such as answers.0.text"


def _way_out(free: Mapping[str, str]) -> str:
    """What to do with columns that no format has."""
    if "replies" in free or "message_tree_id" in free or "parent_id" in free:
        return (
            "Each row is one message (or one tree) of branching conversations: choose a path from the first message to "
            "an answer for each and write it as one row with messages"
        )
    if _single_messages(free):
        return "Each row is one message: write a whole conversation as one row with messages"
    if "custom_id" in free:
        return (
            "These are the requests or the answers of a batch, apart: join the two files by custom_id and write rows "
            "with messages, or with request and response"
        )
    prompt = next((free[p] for p in _PROMPTS if p in free), None)
    answer = next((free[a] for a in _ANSWERS if a in free), None)
    if prompt is not None and len(free) == 1:
        return "There are prompts without answers: let the target answer them first"
    if prompt is not None:
        return f"Say which column is the answer: --columns prompt={prompt},response=COLUMN{_INSIDE}"
    if answer is not None:
        return f"Say which column is the prompt: --columns prompt=COLUMN,response={answer}{_INSIDE}"
    return (
        "Rows need messages (or conversations), a prompt and a response (or instruction and output, question and "
        "answer, prompt and chosen), text, or input_ids. Say which column is what: --columns prompt=COLUMN,"
        f"response=COLUMN (or messages=COLUMN, or text=COLUMN){_INSIDE}"
    )
