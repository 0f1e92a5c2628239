"""A tokenizer's chat template: conversations -> text, with the options of the job and of the row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, time
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from cache_format.errors import InputError
from extractor.data.bad_row import BadRow
from extractor.data.conversation import Conversation, Message

_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """The chat template of one tokenizer with what it is given beside a conversation."""

    def __init__(self, tokenizer: Any, *, kwargs: Mapping[str, Any] | None = None, today: date | None = None):
        """``kwargs``: variables for every conversation; a row's own come first.

        ``today``: the date that the template writes. None: the real one, as transformers has it.

        Raises:
            InputError: the tokenizer has no chat template, or one whose date cannot be set.
        """
        if not tokenizer.chat_template:
            raise InputError(
                "the tokenizer has no chat template: use an instruct target or --chat-template FILE, "
                "or rows with prompt and response, text, or input_ids"
            )
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs or {})
        self._today = today
        self._sources: dict[bool, str] = {}

    def source(self, *, tools: bool) -> str:
        """The template's text, its date set; some tokenizers have another one for conversations with tools."""
        if tools not in self._sources:
            text = self.tokenizer.get_chat_template(tools=[{}] if tools else None)
            self._sources[tools] = text if self._today is None else dated(text, self._today)
        return self._sources[tools]

    def has_generation_tags(self, *, tools: bool) -> bool:
        """Whether it says itself what the assistant generates."""
        return _GENERATION_TAG.search(self.source(tools=tools)) is not None

    def render(self, conversation: Conversation, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The text of ``messages``, with the tools and variables of ``conversation``.

        ``prompt``: up to where the assistant's next turn begins (``add_generation_prompt``).

        Raises:
            BadRow: the template refuses them.
        """
        return self._guarded(
            lambda: self.tokenizer.apply_chat_template(
                list(messages),
                tools=conversation.tools,
                tokenize=False,
                add_generation_prompt=prompt,
                chat_template=self.source(tools=bool(conversation.tools)),
                **self._variables(conversation),
            )
        )

    def render_tagged(
        self, conversation: Conversation, messages: Sequence[Message]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the stretches of it inside ``{% generation %}`` tags.

        Nulls are left out, as ``apply_chat_template`` does.

        ``apply_chat_template(return_assistant_tokens_mask=True)`` is not used: it looks single characters up in
        trimmed offsets, and learns everything up to the end of the text where a turn ends in a space.

        Raises:
            BadRow: the template refuses them.
        """
        rendered: Any = self._guarded(
            lambda: render_jinja_template(
                [[{key: value for key, value in message.items() if value is not None} for message in messages]],
                tools=conversation.tools,
                chat_template=self.source(tools=bool(conversation.tools)),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self._variables(conversation)},
            )
        )
        texts, spans = rendered
        return texts[0], [(start, stop) for start, stop in spans[0] if start < stop]

    def fitted(self, conversation: Conversation) -> tuple[Conversation, str]:
        """``conversation`` in the form that this template expects, and its text: the first of a few that is whole.

        Most templates take the arguments of tool calls as an object, as vLLM and SGLang give them; a few
        (DeepSeek-V3's) join JSON text to the text around it: they raise for an object, or write it as Python does.
        Templates of multimodal models want content in parts.

        Raises:
            BadRow: the template refuses every form.
        """
        if any(message.get("content") is None for message in conversation.messages):
            try:
                self.render(conversation, conversation.messages)
            except BadRow:
                conversation = _changed(conversation, _with_content)
        problems: list[BadRow] = []
        written: tuple[Conversation, str] | None = None
        for form in _forms(conversation):
            try:
                text = self.render(form, form.messages)
            except BadRow as refused:
                problems.append(refused)
                continue
            if all(_writes(text, message) for message in form.messages):
                return form, text
            written = written or (form, text)
        if written is None:
            in_parts = f" (with content in parts: {problems[2]})" if str(problems[2]) != str(problems[0]) else ""
            raise BadRow(f"{problems[0]}{in_parts}")
        return written

    def _variables(self, conversation: Conversation) -> dict[str, Any]:
        return {**self.kwargs, **conversation.template_kwargs}

    @staticmethod
    def _guarded(render: Callable[[], Any]) -> Any:
        try:
            return render()
        except BadRow:
            raise
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses the conversation: {error}") from error
        except Exception as error:
            # A template is a program: it may raise anything.
            raise BadRow(f"the chat template raises {type(error).__name__}: {error}") from error


def uses_date(source: str) -> bool:
    """Whether a template asks for the current date."""
    return "strftime_now" in source


def dated(source: str, today: date) -> str:
    """``source`` with ``today`` for the current date: a cache made over two days would else hold two dates.

    Raises:
        InputError: it asks for the date with a format that it computes.
    """
    midnight = datetime.combine(today, time())
    fixed = _DATE.sub(lambda call: json.dumps(midnight.strftime(call[2]), ensure_ascii=False), source)
    if "strftime_now(" in fixed:
        raise InputError(
            "the chat template computes the format of the date it writes, so the date cannot be kept the same; "
            "write the format, or the date, into it (--chat-template FILE)"
        )
    return fixed


def _calls(message: Message) -> list[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def function_of(call: Any) -> dict[str, Any]:
    """The part of a tool call with ``name`` and ``arguments``: OpenAI's form nests it, others do not.

    Raises:
        BadRow: there is no name.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("'tool_calls' is not a list of calls with a function's name")
    return function


def with_function(call: dict[str, Any], function: dict[str, Any]) -> dict[str, Any]:
    """``call`` with ``function`` for its own."""
    return {**call, "function": function} if "function" in call else function


def content_text(message: Message) -> str:
    """The content, without the parts it may be in."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def answer_of(message: Message) -> str:
    """The content without the reasoning that may stand before it."""
    return content_text(message).rsplit("</think>", 1)[-1].strip()


def _forms(conversation: Conversation) -> Iterator[Conversation]:
    yield conversation
    yield _changed(conversation, _with_json_arguments)
    yield _changed(conversation, _in_parts)
    yield _changed(_changed(conversation, _in_parts), _with_json_arguments)


def _changed(conversation: Conversation, change: Callable[[Message], Message]) -> Conversation:
    return replace(conversation, messages=[change(message) for message in conversation.messages])


def _writes(text: str, message: Message) -> bool:
    """Whether the text has the content's answer, and the arguments of calls not as Python writes them."""
    if message["role"] == "assistant" and answer_of(message) not in text:
        return False
    given = [function_of(call).get("arguments") for call in _calls(message)]
    return not any(isinstance(arguments, Mapping) and arguments and str(arguments) in text for arguments in given)


def _with_content(message: Message) -> Message:
    """Beside calls a row may have no content."""
    return {**message, "content": ""} if message.get("content") is None else message


def _in_parts(message: Message) -> Message:
    content = message.get("content") or ""
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_json_arguments(message: Message) -> Message:
    calls = _calls(message)
    if not calls:
        return message
    texts = []
    for call in calls:
        function = function_of(call)
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):
            function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
        texts.append(with_function(call, function))
    return {**message, "tool_calls": texts}
