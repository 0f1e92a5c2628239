"""A conversation rendered in other ways: up to a turn, with another one behind it, or with a placeholder in a turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from extractor.data.bad_row import BadRow
from extractor.data.chat_template import function_of, with_function
from extractor.data.common_text import before_open_mark, common
from extractor.data.conversation import Message

NEXT: Message = {"role": "user", "content": "next"}


class Renderings:
    """What the differences are taken of, for the turns of one conversation."""

    def __init__(self, render: Callable[..., str], messages: Sequence[Message], text: str, marks: re.Pattern[str]):
        """``render(messages, prompt=bool)`` gives text; ``text`` is ``render(messages)``.

        ``marks`` matches a token that the tokenizer keeps whole (a special or added one).
        """
        self.render, self.messages, self.text, self.marks = render, list(messages), text, marks
        self.placeholder = _placeholder(text)
        self._earlier: dict[int, tuple[str, str]] = {}

    def _header(self, turn: int) -> str:
        """What ``add_generation_prompt`` adds for this turn."""
        prompt, without = self._before(turn)
        # Some templates write an end of text where no prompt is asked for.
        header = prompt[before_open_mark(common(prompt, without)) :]
        # Behind another answer it may begin with that one's end, which was another one before (gpt-oss).
        if turn > 1 and self.messages[turn - 1]["role"] == "assistant" and header.strip():
            earlier = self._header(turn - 1)
            return earlier if earlier.strip() and header.endswith(earlier) else header
        return header

    def _asked(self, turn: int, messages: list[Message]) -> str | None:
        """What closes the last of ``messages`` where the next answer is asked for."""
        header, tail = self._header(turn), self._tail(messages, prompt=True)
        if tail is None or tail.endswith(header):
            return None if tail is None else tail.removesuffix(header)
        # Asked to go on with an answer, some templates write no header, and close it as history does (vLLM's ChatML).
        followed = self._tail([*messages, NEXT]) if self.marks.match(tail) else None
        return tail if followed is not None and followed.startswith(tail) else None

    def _before(self, turn: int) -> tuple[str, str]:
        """The text of the turns before, with the prompt for this one and without it."""
        if turn not in self._earlier:
            earlier = self.messages[:turn]
            self._earlier[turn] = self.render(earlier, prompt=True), self.render(earlier)
        return self._earlier[turn]

    # -- renderings with a placeholder ------------------------------------------------------------------------------

    def _replaced(self, message: Message) -> Message:
        """``message`` with the placeholder for its content, or as a further argument of its last tool call."""
        calls = message.get("tool_calls")
        if not calls:
            parts = [{"type": "text", "text": self.placeholder}]
            return {**message, "content": parts if isinstance(message.get("content"), list) else self.placeholder}
        if not isinstance(calls, list):
            raise BadRow("'tool_calls' is not a list of calls with a function's name")
        function = function_of(calls[-1])
        return {**message, "tool_calls": [*calls[:-1], with_function(calls[-1], self._argued(function))]}

    def _plain(self, message: Message) -> Message:
        """An answer without calls or reasoning."""
        return self._replaced({"role": "assistant", "content": message.get("content")})

    def _argued(self, function: dict[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            return {**function, "arguments": self.placeholder}
        # Its name sorts last: some templates sort the arguments.
        return {**function, "arguments": {**(arguments or {}), "~": self.placeholder}}

    def _with_replaced(self, turn: int) -> list[Message]:
        return [*self.messages[:turn], self._replaced(self.messages[turn]), *self.messages[turn + 1 :]]

    def _tail(self, messages: list[Message], *, prompt: bool = False) -> str | None:
        """What follows the placeholder; None where it is not there just once."""
        rendered = self._render_or_none(messages, prompt=prompt)
        parts = rendered.split(self.placeholder) if rendered is not None else []
        return parts[1] if len(parts) == 2 else None

    def _render_or_none(self, messages: list[Message], *, prompt: bool = False) -> str | None:
        try:
            return self.render(messages, prompt=prompt)
        except BadRow:
            return None


def _placeholder(text: str) -> str:
    """A word that ``text`` does not hold and that no template treats specially."""
    number = 0
    while (word := f"placeholder{number}end") in text:
        number += 1
    return word
