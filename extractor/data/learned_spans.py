"""Where in a rendered conversation the assistant's turns are: told by differences between renderings.

No marker of any model is known here. For each assistant turn

- it *starts* where the generation prompt for it ends, ``render(turns before, prompt=True)``; where the template
  rewrites history, at the end of what its header and the generation prompt have in common;
- it *stops* before the header of the next message. A placeholder in the turn shows what the template writes behind
  its content; of that, what is there too when nothing follows, or when the next answer is asked for, closes the turn.
  A template that closes no turn is stopped by the next role's mark (GLM), which is then the turn's end;
- what it holds is compared with the row: an answer or a call that the template left out is never an empty turn.

Every step is checked. What cannot be told exactly is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from extractor.data.bad_row import BadRow
from extractor.data.chat_template import answer_of, content_text, function_of, with_function
from extractor.data.conversation import Message

WAYS_OUT = (
    "add {% generation %} tags to the chat template (--chat-template FILE), use --loss-on all, "
    "or pass rows with input_ids and loss_mask"
)
Span = tuple[int, int]
"""``(start, stop)`` in characters of the text"""
_OPEN_MARK = re.compile(r"(<[^<>\s]*|\[[^\[\]\s]*)\Z")
_MARK = re.compile(r"\s*<[|｜][^<>\n]{1,60}[|｜]>")
_NEXT: Message = {"role": "user", "content": "next"}
_BODY_KEYS = ("reasoning_content", "reasoning", "thinking")
"""where rows keep what the assistant thought before it answered"""


class NotDerivable(Exception):
    """Why a turn's learned stretch cannot be told exactly."""


class SpanFinder:
    """The learned stretches of one rendered conversation."""

    def __init__(self, render: Callable[..., str], messages: Sequence[Message], text: str, marks: re.Pattern[str]):
        """``render(messages, prompt=bool)`` gives text; ``text`` is ``render(messages)``.

        ``marks`` matches a token that the tokenizer keeps whole (a special or added one).
        """
        self.render, self.messages, self.text, self.marks = render, list(messages), text, marks
        self.placeholder = _placeholder(text)
        self._earlier: dict[int, tuple[str, str]] = {}

    def spans(self) -> dict[int, Span]:
        """Number of each assistant message -> where it is.

        Raises:
            BadRow: one cannot be told exactly, or is not all there.
        """
        found: dict[int, Span] = {}
        stopped = 0
        for turn, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            try:
                span = self._span(turn)
                if span[0] < stopped:
                    raise NotDerivable("it overlaps the assistant turn before it")
            except NotDerivable as why:
                raise BadRow(f"turn {turn + 1}: {why}: {WAYS_OUT}") from None
            found[turn], stopped = span, span[1]
        return found

    def _span(self, turn: int) -> Span:
        if turn == 0:
            raise NotDerivable("the conversation begins with the assistant, so there is no prompt to generate from")
        start, stop = self._start(turn), self._stop(turn)
        if stop < start:
            raise NotDerivable("the chat template writes the text around the assistant's content depending on it")
        require_written(self.messages[turn], self.text[start:stop])
        return start, stop

    # -- the start --------------------------------------------------------------------------------------------------

    def _start(self, turn: int) -> int:
        prompt, without = self._before(turn)
        if self.text.startswith(prompt):
            return len(prompt) + (self._unasked_header(turn, prompt) if prompt == without else 0)
        start = self._start_after(turn)
        if start is None:
            start = self._start_at_header(turn)
        if start is None:
            raise NotDerivable("the chat template does not write the generation prompt before the assistant's text")
        return start

    def _unasked_header(self, turn: int, prompt: str) -> int:
        """Length of the header that stands behind a prompt in which nothing asks for the assistant.

        0 where the answer follows at once (Mistral). Behind a tool's result some templates ask for nothing, and
        write the header that they write elsewhere all the same.
        """
        plain = self._render_or_none([*self.messages[:turn], self._plain(self.messages[turn])])
        before = plain.split(self.placeholder)[0] if plain else ""
        if not before.startswith(prompt) or not before[len(prompt) :].strip():
            return 0
        for earlier in range(1, turn):
            header = self._header(earlier) if self.messages[earlier]["role"] == "assistant" else ""
            if header.strip() and before.startswith(prompt + header) and self.text.startswith(prompt + header):
                return len(header)
        raise NotDerivable("the chat template ignores add_generation_prompt but writes a header for the assistant")

    def _start_after(self, turn: int) -> int | None:
        """The start, measured from the end of the message before: for templates that rewrite what is earlier still.

        Where the prompt goes on otherwise than history (``<think>``), at the end of what they have in common.
        """
        replaced = [*self.messages[: turn - 1], self._replaced(self.messages[turn - 1])]
        tail, prompt = self._tail([*replaced, *self.messages[turn:]]), self._tail(replaced, prompt=True)
        if tail is None or prompt is None or not self.text.endswith(tail):
            return None
        common = len(_common(tail, prompt))
        if common < len(prompt):
            common = _before_open_mark(tail[:common])
            if not self._in_header(turn, replaced, prompt, common):
                return None
        return len(self.text) - len(tail) + common

    def _in_header(self, turn: int, replaced: list[Message], prompt: str, common: int) -> bool:
        """Whether the first ``common`` characters of ``prompt`` reach into the assistant's header, or to its answer."""
        without = self._tail(replaced)
        if without == prompt:
            without = self._tail([*replaced, _NEXT])
        if without is None:
            return False
        shared = _before_open_mark(_common(prompt, without))
        answered = self._tail([*replaced, {"role": "assistant", "content": "answer"}])
        at_once = answered is not None and answered[common:].lstrip().startswith("answer")
        return common > shared or (common == shared and at_once)

    def _start_at_header(self, turn: int) -> int | None:
        """The start, where the assistant's header stands before the turn's own placeholder."""
        header = self._header(turn)
        rendered = self._render_or_none(self._with_replaced(turn))
        if not header.strip() or rendered is None or rendered.count(self.placeholder) != 1:
            return None
        before = rendered.split(self.placeholder)[0]
        start = before.rfind(header) + len(header)
        # It has to be this turn's own: what ends a message may look like it.
        added = before.count(header) > self._before(turn)[1].count(header)
        return start if added and self.text.startswith(before[:start]) else None

    def _header(self, turn: int) -> str:
        """What ``add_generation_prompt`` adds for this turn."""
        prompt, without = self._before(turn)
        # Some templates write an end of text where no prompt is asked for.
        return prompt[_before_open_mark(_common(prompt, without)) :]

    # -- the stop ---------------------------------------------------------------------------------------------------

    def _stop(self, turn: int) -> int:
        calls = bool(self.messages[turn].get("tool_calls"))
        after = self._after(turn)
        closing = self._closing(turn, after)
        rest = after[len(closing) :]
        if not self.text.endswith(rest if calls else after):
            raise NotDerivable("the chat template writes the text around the assistant's content depending on it")
        stop = len(self.text) - len(rest)
        if closing.strip() and not (calls and self._closes_nothing(turn)):
            return stop - (len(closing) - len(closing.rstrip()))
        return self._stop_without_end(turn, stop, closing, rest)

    def _after(self, turn: int) -> str:
        """What follows the turn's placeholder, to the end of the text."""
        parts = self.render(self._with_replaced(turn)).split(self.placeholder)
        count = len(parts) - 1
        if count == 1:
            return parts[1]
        number = len(self.messages[turn].get("tool_calls") or ())
        if number and not count:
            raise NotDerivable(
                "this template does not write tool calls" if number == 1 else "this template leaves tool calls out"
            )
        raise NotDerivable(f"the chat template writes the assistant's content {count} times, not once")

    def _closing(self, turn: int, after: str) -> str:
        """The beginning of ``after`` that belongs to this turn."""
        alone = [*self.messages[:turn], self._replaced(self.messages[turn])]
        asked, header = self._asked(turn, alone), self._header(turn)
        closes = asked is not None and asked.strip() and after.startswith(asked)
        # A template with a header for what is asked does not write it unasked.
        if asked is not None and closes and (header.strip() or self._continues(alone, asked)):
            return asked
        last = self._tail(alone)
        if last is not None and after.startswith(last) and self._continues(alone, last):
            return last
        if asked is not None and not asked.strip() and after.startswith(asked):
            return asked
        followed = turn + 1 < len(self.messages) and self.messages[turn + 1]["role"] == "assistant"
        if followed and header.strip() and header in after:
            return after[: after.index(header)]
        if self.messages[turn].get("tool_calls"):
            # The end of an answer, at its first place behind the call.
            plain = [*self.messages[:turn], self._plain(self.messages[turn])]
            mark = self.marks.match(self._tail([*plain, _NEXT]) or "")
            ends = (self._asked(turn, plain), self._tail(plain), mark.group() if mark else None)
            for end in ends:
                if end and end.strip() and end in after:
                    closing = after[: after.index(end) + len(end)]
                    self._require_alone(turn, after[len(closing) :])
                    return closing
        always = self._before_shared_header(alone, last) if last is not None and asked in (last, None) else None
        if always and after.startswith(always):
            return always
        raise NotDerivable("what follows the assistant's text cannot be told from the next message's header")

    def _require_alone(self, turn: int, rest: str) -> None:
        """Check that the next message stands in ``rest``, what is behind this turn: Gemma 4 writes text beside a call
        behind the tool's result."""
        if turn + 1 < len(self.messages):
            tail = self._tail(self._with_replaced(turn + 1))
            if tail is None or not self.text.endswith(tail) or len(rest) <= len(tail):
                raise NotDerivable("this template writes what others say inside the assistant's turn")

    def _before_shared_header(self, messages: list[Message], last: str) -> str | None:
        """What closes the last of ``messages`` where the template writes the next prompt behind every conversation.

        A following question and that prompt have the close in common, and the mark that headers begin with: the same
        that the conversation begins with.
        """
        followed = self._tail([*messages, _NEXT])
        if followed is None:
            return None
        common = _common(followed, last)
        common = common[: _before_open_mark(common)]
        marks = list(self.marks.finditer(common))
        first = self.marks.match(self.text)
        beginnings = [self.text, self.text[first.end() :]] if first else []
        if not marks or marks[-1].end() != len(common):
            return None
        header = marks[-1].group().strip()
        return common[: -len(header)] if any(b.startswith(header) for b in beginnings) else None

    def _asked(self, turn: int, messages: list[Message]) -> str | None:
        """What closes the last of ``messages`` where the next answer is asked for."""
        header, tail = self._header(turn), self._tail(messages, prompt=True)
        return tail.removesuffix(header) if tail is not None and tail.endswith(header) else None

    def _continues(self, messages: list[Message], last: str) -> bool:
        """Whether ``last`` closes the turn, and is not the next prompt already, which some templates always write.

        A following question shows the close in history; one mark may be another at the end (gpt-oss).
        """
        followed = self._tail([*messages, _NEXT])
        if followed is None or followed.startswith(last):
            return True
        common = _before_open_mark(_common(followed, last))
        mark = self.marks.match(last[common:])
        if mark is not None:
            common += mark.end()
        return not last[common:].strip() or (mark is None and not self.marks.search(last[common:]))

    def _closes_nothing(self, turn: int) -> bool:
        """Whether the template writes no end of a turn: what stands behind a call is then the call's own."""
        plain = self._plain(self.messages[turn])
        after = self._tail([*self.messages[:turn], plain, *self.messages[turn + 1 :]])
        tail = self._tail([*self.messages[:turn], plain])
        if after is None or tail is None or tail.strip():
            return False
        mark = self.marks.match(after)
        return mark is not None or not after.strip()

    def _stop_without_end(self, turn: int, stop: int, closing: str, rest: str) -> int:
        """The stop of a turn that the template does not close: the next role's mark ends it, if it is a token.

        Raises:
            NotDerivable: there is none.
        """
        content_end = stop - (len(closing) - len(closing.rstrip()))
        header = self._header(turn)
        followed = rest
        if not rest.strip():
            followed = self._tail([*self.messages[:turn], self._plain(self.messages[turn]), _NEXT]) or ""
        mark = self.marks.match(followed) or _MARK.match(followed)
        own = self.marks.match(header) or _MARK.match(header)
        next_role = self.messages[turn + 1]["role"] if turn + 1 < len(self.messages) else "user"
        of_any_role = mark is not None and own is not None and mark.group().strip() == own.group().strip()
        if mark is None or (of_any_role and next_role != "assistant"):
            raise NotDerivable("no end-of-turn token follows the assistant's text")
        return content_end if not rest.strip() or next_role == "assistant" else stop + mark.end()

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


def _common(one: str, other: str) -> str:
    """What both begin with."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if one[:middle] == other[:middle] else (least, middle - 1)
    return one[:least]


def _before_open_mark(text: str) -> int:
    """Length of ``text`` without a mark such as ``<thi`` or ``[INS`` that is cut off at its end."""
    mark = _OPEN_MARK.search(text)
    return mark.start() if mark else len(text)


def require_written(message: Message, body: str) -> None:
    """Check that ``body``, the text of an assistant turn, holds what the message says.

    Templates may strip the content, and leave reasoning that stands in it out.

    Raises:
        NotDerivable: it does not.
    """
    calls = message.get("tool_calls") or ()
    for call in calls:
        name = function_of(call)["name"]
        if body.count(name) < sum(function_of(other)["name"] == name for other in calls):
            raise NotDerivable("this template does not write tool calls, or not all of them")
    if answer_of(message) not in body:
        if calls:
            raise NotDerivable("this template leaves out the text beside tool calls")
        raise NotDerivable("the chat template changes the assistant's content, or leaves it out")


def reasoning_left_out(message: Message, body: str) -> bool:
    """Whether the message says what the assistant thought, and the text of its turn does not."""
    thoughts = [str(message[key]) for key in _BODY_KEYS if message.get(key)]
    content = content_text(message)
    if "</think>" in content:
        thoughts.append(content.rsplit("</think>", 1)[0].rsplit("<think>", 1)[-1])
    return any(thought.strip() not in body for thought in thoughts)
