"""Which tokens are learned: what the assistant itself would generate, its end-of-turn token included, nothing else.

The learned stretches are found in the *rendered text* and then carried over to tokens by their character offsets.
A template with ``{% generation %}`` tags says itself where they are. For any other template each one is derived:

- it starts where the generation prompt for that turn ends: ``render(turns before, add_generation_prompt=True)``;
- its content ends where the text that follows the content begins, which is what follows a placeholder put in the
  content's place;
- there an end-of-turn token (a special token of the tokenizer) has to stand, and it ends the stretch.

Every step is checked. What cannot be derived exactly is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jinja2
import numpy as np
from tokenizers import Tokenizer, processors
from transformers.utils.chat_template_utils import render_jinja_template

from cache_format.errors import InputError
from extractor.data.conversation import Conversation, Message, check_text
from extractor.data.dataset import BadRow

WAYS_OUT = (
    "add {% generation %} tags to the chat template, use --loss-on all, or pass rows with input_ids and loss_mask"
)
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ConversationTokenizer:
    """Conversations -> token ids and loss masks, with the chat template of one tokenizer."""

    def __init__(self, tokenizer: Any, *, assistant_only: bool):
        """``tokenizer``: a transformers tokenizer. ``assistant_only=False`` learns every token.

        Raises:
            InputError: no chat template, or (for ``assistant_only``) not a fast tokenizer.
        """
        if not tokenizer.chat_template:
            raise InputError(
                "the tokenizer has no chat template: use an instruct target, "
                "or rows with prompt and response, text, or input_ids"
            )
        if assistant_only and not tokenizer.is_fast:
            raise InputError(f"{type(tokenizer).__name__} is not a fast tokenizer, so it gives no offsets: {WAYS_OUT}")
        self.tokenizer = tokenizer
        self.assistant_only = assistant_only

    def __call__(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32 ``[T]``) as ``apply_chat_template`` gives them, and the loss mask (uint8 ``[T]``).

        Raises:
            BadRow: the template refuses the conversation, or its learned tokens cannot be told exactly.
        """
        text, tagged = self._render_tagged(conversation)
        check_text(text)
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        if not self.assistant_only:
            return ids, np.ones(len(ids), np.uint8)
        spans = tagged if tagged is not None else self._derived_spans(conversation, text)
        encoding = self._untrimmed.encode(text, add_special_tokens=False)
        if not np.array_equal(ids, encoding.ids):
            raise BadRow(f"the tokenizer does not give the tokens that its backend gives: {WAYS_OUT}")
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        return ids, _token_mask(offsets, np.isin(ids, self._special_ids), spans, text)

    # -- rendering ------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except _TEMPLATE_ERRORS as error:
            raise BadRow(f"the chat template refuses the conversation: {error}") from error

    def _render_tagged(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]] | None]:
        """The whole text, and the stretches inside ``{% generation %}`` tags; None where the template has none.

        ``apply_chat_template(return_assistant_tokens_mask=True)`` is not used: it looks single characters up in
        trimmed offsets, and learns everything up to the end of the text where a turn ends in a space.
        """
        template = self._template(bool(conversation.tools))
        if not self.assistant_only or not _GENERATION_TAG.search(template):
            return self._render(conversation.messages, conversation.tools), None
        try:
            rendered: Any = render_jinja_template(
                [conversation.messages],
                tools=conversation.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except _TEMPLATE_ERRORS as error:
            raise BadRow(f"the chat template refuses the conversation: {error}") from error
        texts, spans = rendered
        return texts[0], [(start, stop) for start, stop in spans[0] if start < stop]

    def _template(self, with_tools: bool) -> str:
        return self.tokenizer.get_chat_template(tools=[{}] if with_tools else None)

    # -- deriving the learned stretches ---------------------------------------------------------------------------

    def _derived_spans(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """``(start, stop)`` of what the assistant generates in ``text``, turn by turn."""
        spans: list[tuple[int, int]] = []
        for turn, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                try:
                    span = self._span(conversation, text, turn)
                except _NotDerivable as why:
                    raise BadRow(f"turn {turn + 1}: {why}: {WAYS_OUT}") from None
                if spans and span[0] < spans[-1][1]:
                    raise BadRow(f"turn {turn + 1} overlaps the assistant turn before it: {WAYS_OUT}")
                spans.append(span)
        return spans

    def _span(self, conversation: Conversation, text: str, turn: int) -> tuple[int, int]:
        messages, tools = conversation.messages, conversation.tools
        if turn == 0:
            raise _NotDerivable("the conversation begins with the assistant, so there is no prompt to generate from")
        placeholder = _placeholder(text)
        replaced = _with_placeholder(messages[turn], placeholder)
        before, after = self._around(placeholder, [*messages[:turn], replaced, *messages[turn + 1 :]], tools)
        # What follows the placeholder up to the end of this very turn: nothing of the next turn is taken for its end.
        rest = after
        if turn + 1 < len(messages):
            rest = self._around(placeholder, [*messages[:turn], replaced], tools)[1]
        end_token = self._end_token(rest, anywhere=bool(messages[turn].get("tool_calls")))
        if end_token is None:
            raise _NotDerivable("no end-of-turn token (a special token of the tokenizer) follows the assistant's text")
        start = self._start(messages[:turn], tools, text, before)
        content_end = len(text) - len(after)
        if not text.endswith(after) or not after.startswith(rest[:end_token]) or content_end < start:
            raise _NotDerivable("the chat template writes the text around the assistant's content depending on it")
        if not messages[turn].get("tool_calls"):
            _require_content(messages[turn]["content"], text[start:content_end])
        return start, content_end + end_token

    def _start(self, earlier: list[Message], tools: list[Any] | None, text: str, before: str) -> int:
        """Where the generation prompt ends; ``before`` is the text before the content's placeholder."""
        prompt = self._render(earlier, tools, prompt=True)
        without = self._render(earlier, tools)
        if prompt == without and before[len(prompt) :].strip():
            raise _NotDerivable("the chat template ignores add_generation_prompt but writes a header for the assistant")
        if text.startswith(prompt):
            return len(prompt)
        # The template rewrites earlier turns. The prompt itself may still stand right before the content.
        header = prompt[len(without) :]
        if header and prompt.startswith(without) and before.endswith(header) and text.startswith(before):
            return len(before)
        raise _NotDerivable("the chat template does not write the generation prompt before the assistant's text")

    def _around(self, placeholder: str, messages: list[Message], tools: list[Any] | None) -> tuple[str, str]:
        parts = self._render(messages, tools).split(placeholder)
        if len(parts) != 2:
            raise _NotDerivable(f"the chat template writes the assistant's content {len(parts) - 1} times, not once")
        return parts[0], parts[1]

    def _end_token(self, rest: str, anywhere: bool) -> int | None:
        """Characters of ``rest`` (what the template writes after the content) up to the end-of-turn token's end.

        After content the token has to follow at once, white space aside. ``anywhere``: after tool calls it is the
        last special token of the turn, with nothing but white space behind it.
        """
        if not anywhere:
            match = self._leading_special.match(rest)
            return match.end() if match else None
        found = list(self._special.finditer(rest))
        return found[-1].end() if found and not rest[found[-1].end() :].strip() else None

    # -- the tokenizer's parts ------------------------------------------------------------------------------------

    @cached_property
    def _specials(self) -> str:
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return "|".join(re.escape(text) for text in sorted(filter(None, texts), key=len, reverse=True)) or "(?!)"

    @cached_property
    def _special_ids(self) -> list[int]:
        return [number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special]

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile(self._specials)

    @cached_property
    def _leading_special(self) -> re.Pattern[str]:
        return re.compile(rf"\s*(?:{self._specials})")

    @cached_property
    def _untrimmed(self) -> Tokenizer:
        """The backend with offsets that cover every character: trimmed ones hide a token that begins with a space."""
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        return backend


class _NotDerivable(Exception):
    """Why a turn's learned stretch cannot be told exactly."""


def _placeholder(text: str) -> str:
    """A word that ``text`` does not hold and that no template treats specially."""
    number = 0
    while (word := f"placeholder{number}end") in text:
        number += 1
    return word


def _with_placeholder(message: Message, placeholder: str) -> Message:
    """``message`` with the placeholder for its content, or for the name of its last tool call."""
    calls = message.get("tool_calls")
    if not calls:
        return {**message, "content": placeholder}
    try:
        last = calls[-1]
        named = {"function": {**last["function"], "name": placeholder}} if "function" in last else {"name": placeholder}
        return {**message, "tool_calls": [*calls[:-1], {**last, **named}]}
    except (TypeError, KeyError, IndexError) as error:
        raise BadRow("'tool_calls' is not a list of calls with a function's name") from error


def _require_content(content: str, body: str) -> None:
    """``body``, the learned text, ends in the content; templates may strip it and leave earlier reasoning out."""
    answer = content.rsplit("</think>", 1)[-1]
    if not body.rstrip().endswith(answer.strip()):
        raise _NotDerivable("the chat template changes the assistant's content")


def _token_mask(offsets: np.ndarray, special: np.ndarray, spans: list[tuple[int, int]], text: str) -> np.ndarray:
    """uint8 ``[T]``: 1 for the tokens with character offsets ``[T, 2]`` inside one of the spans.

    ``special`` bool ``[T]``: special tokens. Some take the white space behind them along, beyond the span's end.

    Raises:
        BadRow: another token lies on both sides of a span's start or end.
    """
    mask = np.zeros(len(offsets), np.uint8)
    begins, ends = offsets[:, 0], offsets[:, 1]
    for start, stop in spans:
        for edge, may_cross in ((start, False), (stop, special & (begins >= start))):
            # A token without characters at an edge could belong to either side.
            crossing = ((begins < edge) & (edge < ends)) | ((begins == ends) & (begins == edge))
            if (crossing & ~np.asarray(may_cross)).any():
                around = text[max(edge - 10, 0) : edge + 10]
                raise BadRow(f"a token crosses the border of what the assistant says, in {around!r}: {WAYS_OUT}")
        mask[(begins >= start) & (begins < stop)] = 1
    return mask
