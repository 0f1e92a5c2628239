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

from extractor.data.bad_row import BadRow
from extractor.data.chat_template import content_text
from extractor.data.common_text import before_open_mark, common, common_but_for_space
from extractor.data.conversation import Message
from extractor.data.renderings import NEXT, Renderings
from extractor.data.written import NotDerivable, require_written

WAYS_OUT = (
    "add {% generation %} tags to the chat template (--chat-template FILE), use --loss-on all, "
    "or pass rows with input_ids and loss_mask"
)
Span = tuple[int, int]
"""``(start, stop)`` in characters of the text"""
_MARK = re.compile(r"\s*<[|｜][^<>\n]{1,60}[|｜]>")


class SpanFinder(Renderings):
    """The learned stretches of one rendered conversation."""

    def __init__(self, render: Callable[..., str], messages: Sequence[Message], text: str, marks: re.Pattern[str]):
        """As :class:`Renderings`."""
        super().__init__(render, messages, text, marks)
        self.endless: set[int] = set()
        """turns behind which the template writes no token that ends them, not even the next role's"""

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
        message = self.messages[turn]
        rest = self.text[len(prompt) :]
        for earlier in range(1, turn):
            header = self._header(earlier) if self.messages[earlier]["role"] == "assistant" else ""
            if header.strip() and rest.startswith(header) and not content_text(message).startswith(header.strip()):
                return len(header)
        plain = self._render_or_none([*self.messages[:turn], self._plain(message)])
        before = plain.split(self.placeholder)[0] if plain else ""
        if not before.startswith(prompt) or not before[len(prompt) :].strip() or self._prompts_always(turn, prompt):
            return 0
        raise NotDerivable("the chat template ignores add_generation_prompt but writes a header for the assistant")

    def _prompts_always(self, turn: int, prompt: str) -> bool:
        """Whether ``prompt`` ends in what the template writes behind every conversation: the next answer's header."""
        alone = [*self.messages[:turn], self._replaced(self.messages[turn])]
        last = self._tail(alone)
        closing = self._before_shared_header(alone, last) if last is not None else None
        header = last[len(closing) :] if last is not None and closing is not None else ""
        return bool(header.strip()) and prompt.endswith(header)

    def _start_after(self, turn: int) -> int | None:
        """The start, measured from the end of the message before: for templates that rewrite what is earlier still.

        Where the prompt goes on otherwise than history (``<think>``), at the end of what they have in common.
        """
        replaced = [*self.messages[: turn - 1], self._replaced(self.messages[turn - 1])]
        tail, prompt = self._tail([*replaced, *self.messages[turn:]]), self._tail(replaced, prompt=True)
        if tail is None or prompt is None or not self.text.endswith(tail):
            return None
        begun, asked = common_but_for_space(tail, prompt)
        if prompt[asked:].strip():
            begun = before_open_mark(tail[:begun])
            asked = before_open_mark(prompt[:asked])
            if not self._in_header(turn, replaced, prompt, tail[:begun], asked):
                return None
        return len(self.text) - len(tail) + begun

    def _in_header(self, turn: int, replaced: list[Message], prompt: str, begun: str, asked: int) -> bool:
        """Whether the first ``asked`` characters of ``prompt`` reach into the assistant's header, or to its answer.

        ``begun``: the same, as history writes it.
        """
        without = self._tail(replaced)
        if without == prompt:
            without = self._tail([*replaced, NEXT])
        if without is None:
            return False
        shared = before_open_mark(common(prompt, without))
        answered = self._tail([*replaced, {"role": "assistant", "content": "answer"}])
        at_once = answered is not None and answered[len(begun) :].lstrip().startswith("answer")
        return asked > shared or (asked == shared and at_once)

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

    # -- the stop ---------------------------------------------------------------------------------------------------

    def _stop(self, turn: int) -> int:
        calls = bool(self.messages[turn].get("tool_calls"))
        after = self._after(turn)
        closing = self._closing(turn, after)
        rest = after[len(closing) :]
        closing = closing.removesuffix(self._empty_turn(turn, closing)) if calls else closing
        if not self.text.endswith(rest if calls else after):
            raise NotDerivable("the chat template writes the text around the assistant's content depending on it")
        stop = len(self.text) - len(after) + len(closing)
        if closing.strip() and not (calls and self._closes_nothing(turn)):
            return stop - (len(closing) - len(closing.rstrip()))
        return self._stop_without_end(turn, stop, closing, rest)

    def _empty_turn(self, turn: int, closing: str) -> str:
        """The turn without text that some templates write behind calls, for the empty content beside them."""
        empty = [*self.messages[:turn], {"role": "assistant", "content": self.placeholder}]
        rendered, without = self._render_or_none(empty), self._before(turn)[1]
        if self.messages[turn].get("content") or rendered is None or not rendered.startswith(without):
            return ""
        header, _, end = rendered[len(without) :].partition(self.placeholder)
        return header + end if header.strip() and end.strip() and closing.endswith(end + header + end) else ""

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
        if asked is not None and closes and self._continues(alone, asked):
            return self._with_end_in_history(turn, asked, after)
        last = self._tail(alone)
        if last is not None and after.startswith(last) and self._continues(alone, last):
            return last
        if asked is not None and not asked.strip() and after.startswith(asked):
            return asked
        followed = turn + 1 < len(self.messages) and self.messages[turn + 1]["role"] == "assistant"
        if followed and header.strip() and header in after:
            return after[: after.index(header)]
        always = self._before_shared_header(alone, last) if last is not None and asked in (last, None) else None
        if always and after.startswith(always):
            return always
        if self.messages[turn].get("tool_calls"):
            # The end of an answer, at its first place behind the call.
            plain = [*self.messages[:turn], self._plain(self.messages[turn])]
            mark = self.marks.match(self._tail([*plain, NEXT]) or "")
            ends = (self._asked(turn, plain), self._tail(plain), mark.group() if mark else None)
            for end in ends:
                if end and end.strip() and end in after:
                    closing = after[: after.index(end) + len(end)]
                    self._require_alone(turn, after[len(closing) :])
                    return closing
        raise NotDerivable("what follows the assistant's text cannot be told from the next message's header")

    def _with_end_in_history(self, turn: int, asked: str, after: str) -> str:
        """``asked``, and what closes a call in history alone, where a last answer is not closed."""
        before, message = self.messages[:turn], self.messages[turn]
        plain = self._asked(turn, [*before, self._plain(message)])
        followed = self._tail([*before, self._replaced(message), NEXT])
        if not message.get("tool_calls") or plain is None or plain.strip() or followed is None:
            return asked
        both = common(followed, after)
        ended = min(both[: before_open_mark(both)], self._end_before_question(followed), key=len)
        return ended if ended.startswith(asked) else asked

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
        followed = self._tail([*messages, NEXT])
        if followed is None:
            return None
        shared = common(followed, last)
        shared = shared[: before_open_mark(shared)]
        marks = list(self.marks.finditer(shared))
        first = self.marks.match(self.text)
        beginnings = [self.text, self.text[first.end() :]] if first else []
        if not marks or marks[-1].end() != len(shared.rstrip()):
            return None
        header = marks[-1].group().strip()
        if any(b.startswith(header) for b in beginnings):
            return shared.rstrip()[: -len(header)]
        return shared if self._end_before_question(followed).rstrip() == shared.rstrip() else None

    def _end_before_question(self, followed: str) -> str:
        """The beginning of ``followed``, a tail with a question, that does not stand before the first question, too."""
        before = followed.split(str(NEXT["content"]))[0]
        question = next((m for m in self.messages if m["role"] == "user"), NEXT)
        rendered = self._render_or_none([self._replaced(question)])
        begun = rendered.split(self.placeholder)[0] if rendered is not None else ""
        cut = len(before) - len(common(before[::-1], begun[::-1]))
        inside = (m for m in self.marks.finditer(before) if m.end() - len(m.group().lstrip()) < cut < m.end())
        return before[: next((mark.end() for mark in inside), cut)]

    def _continues(self, messages: list[Message], last: str) -> bool:
        """Whether ``last`` closes the turn, and is not the next prompt already, which some templates always write.

        A following question shows the close in history; one mark may be another at the end (gpt-oss).
        """
        followed = self._tail([*messages, NEXT])
        if followed is None or followed.startswith(last):
            return True
        shared = before_open_mark(common(followed, last))
        more = last[shared:].strip()
        if more and any(before.rstrip().endswith(more) for before in self._before(len(messages) - 1)):
            return False
        mark = self.marks.match(last[shared:])
        if mark is not None:
            shared += mark.end()
        return not last[shared:].strip() or (mark is None and not self.marks.search(last[shared:]))

    def _closes_nothing(self, turn: int) -> bool:
        """Whether the template writes no end of a turn: what stands behind a call is then the call's own."""
        plain = self._plain(self.messages[turn])
        after = self._tail([*self.messages[:turn], plain, *self.messages[turn + 1 :]])
        tail = self._tail([*self.messages[:turn], plain])
        if after is None or tail is None or tail.strip() or self._closes_in_history(turn):
            return False
        mark = self.marks.match(after)
        return mark is not None or not after.strip()

    def _closes_in_history(self, turn: int) -> bool:
        """Whether the template ends an answer before the next question."""
        followed = self._tail([*self.messages[:turn], self._plain(self.messages[turn]), NEXT])
        return followed is not None and self.marks.search(self._end_before_question(followed)) is not None

    def _stop_without_end(self, turn: int, stop: int, closing: str, rest: str) -> int:
        """The stop of a turn that the template does not close: the next role's mark ends it, if it is a token.

        Where headers are plain text, nothing behind the answer is generated.

        Raises:
            NotDerivable: all roles begin with the same mark, which ends nothing.
        """
        content_end = stop - (len(closing) - len(closing.rstrip()))
        if not rest.strip() and self._closes_in_history(turn):
            return content_end
        header = self._header(turn)
        followed = rest
        if not rest.strip():
            followed = self._tail([*self.messages[:turn], self._plain(self.messages[turn]), NEXT]) or ""
        mark = self.marks.match(followed) or _MARK.match(followed)
        if mark is None:
            self.endless.add(turn)
            return content_end
        own = self.marks.match(header) or _MARK.match(header)
        next_role = self.messages[turn + 1]["role"] if turn + 1 < len(self.messages) else "user"
        if own is not None and mark.group().strip() == own.group().strip() and next_role != "assistant":
            raise NotDerivable("no end-of-turn token follows the assistant's text")
        return content_end if not rest.strip() or next_role == "assistant" else stop + mark.end()
