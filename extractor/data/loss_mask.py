"""Which tokens are learned: what the assistant itself would generate, its end-of-turn token included, nothing else.

The learned stretches are found in the *rendered text* and then carried over to tokens by their character offsets.
A template with ``{% generation %}`` tags says itself where they are; for any other they are derived from differences
between renderings (learned_spans.py). Either way what they hold is compared with the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from cache_format.errors import InputError
from extractor.data.bad_row import BadRow
from extractor.data.chat_template import ChatTemplate, content_text
from extractor.data.conversation import Conversation, check_text
from extractor.data.learned_spans import WAYS_OUT, Span, SpanFinder
from extractor.data.written import NotDerivable, reasoning_left_out, require_written

Ids = tuple[np.ndarray, np.ndarray]
"""input_ids int32 ``[T]``, loss_mask uint8 ``[T]``"""
_PROVED = 32
"""conversations whose tokens are compared with the tokenizer's own, before its backend alone is trusted"""


class Encoded(list[Ids]):
    """The samples of one row, and what of the row is not in them."""

    def __init__(self, samples: Iterable[Ids] = (), notes: Iterable[str] = ()):
        """``notes``: names of what the row has and no sample does, such as ``reasoning_left_out``, once a turn."""
        super().__init__(samples)
        self.notes = list(notes)


class ConversationTokenizer:
    """Conversations -> token ids and loss masks, with the chat template of one tokenizer."""

    def __init__(
        self, template: ChatTemplate, *, assistant_only: bool, turns: str = "all", system_prompt: str | None = None
    ):
        """Args:
            template: of a transformers tokenizer.
            assistant_only: False learns every token.
            turns: ``all``: a conversation is one sample, each assistant turn learned as it is rendered there;
                ``last``: only the last one is learned, and what follows it is left out; ``each``: a sample for every
                assistant turn, its context the prompt that the target would see.
            system_prompt: for conversations that have no system message.

        Raises:
            InputError: (for ``assistant_only``) not a fast tokenizer.
        """
        tokenizer = template.tokenizer
        if assistant_only and not tokenizer.is_fast:
            raise InputError(f"{type(tokenizer).__name__} is not a fast tokenizer, so it gives no offsets: {WAYS_OUT}")
        self.template, self.tokenizer = template, tokenizer
        self.assistant_only, self.turns, self.system_prompt = assistant_only, turns, system_prompt
        self._proved = 0
        self._kinds_proved: set[int] = set()

    def __call__(self, conversation: Conversation) -> Encoded:
        """The samples of a conversation: token ids as ``apply_chat_template`` gives them, and loss masks.

        Raises:
            BadRow: the template refuses the conversation, or its learned tokens cannot be told exactly.
        """
        conversation, text = self.template.fitted(self._with_system(conversation))
        if self.turns == "all":
            return self._sample(conversation, None, text)
        learned = [
            n for n, m in enumerate(conversation.messages) if m["role"] == "assistant" and _learns(conversation, n)
        ]
        if self.turns == "last":
            learned = learned[-1:]
        parts = [self._sample(_until(conversation, turn), turn) for turn in learned]
        return Encoded((sample for part in parts for sample in part), (note for part in parts for note in part.notes))

    def _with_system(self, conversation: Conversation) -> Conversation:
        first = conversation.messages[0]["role"]
        if self.system_prompt is None or first in ("system", "developer"):
            return conversation
        message = {"role": "system", "content": self.system_prompt}
        learn = None if conversation.learn is None else (False, *conversation.learn)
        return replace(conversation, messages=[message, *conversation.messages], learn=learn)

    def _sample(self, conversation: Conversation, only: int | None, text: str | None = None) -> Encoded:
        """One sample, with every turn learned or only this one; ``text``: that of the conversation, if known."""
        messages = conversation.messages
        tagged = self.assistant_only and self.template.has_generation_tags(tools=bool(conversation.tools))
        if tagged:
            text, stretches = self.template.render_tagged(conversation, messages)
        else:
            text, stretches = self.template.render(conversation, messages) if text is None else text, []
        check_text(text)
        _require_context(conversation, text)
        if not self.assistant_only:
            _require_in_text(conversation, text)
            ids = self._tokenized(text).ids
            return Encoded([(np.asarray(ids, np.int32), np.ones(len(ids), np.uint8))])
        endless: set[int] = set()
        if tagged:
            turns = _tagged_turns(conversation, text, stretches)
        else:
            turns, endless = self._derived(conversation, text)
        learned = {n: s for n, s in turns.items() if _learns(conversation, n) and (only is None or n == only)}
        said = {n: "".join(text[start:stop] for start, stop in spans) for n, spans in learned.items()}
        notes = ["reasoning_left_out" for n, body in said.items() if reasoning_left_out(messages[n], body)]
        notes += ["no_end_of_turn"] * len(endless & learned.keys())
        return Encoded([self._masked(text, [span for spans in learned.values() for span in spans])], notes)

    def _derived(self, conversation: Conversation, text: str) -> tuple[dict[int, list[Span]], set[int]]:
        """The stretch of each assistant message, and those behind which the template writes no end."""

        def render(messages: Sequence[dict[str, Any]], *, prompt: bool = False) -> str:
            return self.template.render(conversation, messages, prompt=prompt)

        finder = SpanFinder(render, conversation.messages, text, self._leading_mark)
        return {turn: [span] for turn, span in finder.spans().items()}, finder.endless

    # -- tokens -----------------------------------------------------------------------------------------------------

    def _masked(self, text: str, spans: list[Span]) -> Ids:
        encoding = self._tokenized(text)
        ids = np.asarray(encoding.ids, np.int32)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        return ids, _token_mask(offsets, np.isin(ids, self._special_ids), spans)

    def _tokenized(self, text: str) -> Any:
        """Tokens with offsets, from the backend alone: half the time of asking the tokenizer as well.

        Compared with the tokenizer's own tokens for the first conversations, and for every one with characters of a
        block (128 code points) not seen before.

        Raises:
            BadRow: they differ.
        """
        if not self.tokenizer.is_fast:
            return self.tokenizer(text, add_special_tokens=False)
        encoding = self._untrimmed.encode(text, add_special_tokens=False)
        kinds = {ord(character) >> 7 for character in set(text)}
        if self._proved < _PROVED or not kinds <= self._kinds_proved:
            if self.tokenizer(text, add_special_tokens=False)["input_ids"] != encoding.ids:
                raise BadRow(f"the tokenizer does not give the tokens that its backend gives: {WAYS_OUT}")
            self._proved += 1
            self._kinds_proved |= kinds
        return encoding

    @cached_property
    def _special_ids(self) -> list[int]:
        return [number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special]

    @cached_property
    def _leading_mark(self) -> re.Pattern[str]:
        """A token that is never divided, white space before it aside."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        texts = sorted(filter(str.strip, added | set(self.tokenizer.all_special_tokens)), key=len, reverse=True)
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, texts)) or '(?!)'})")

    @cached_property
    def _untrimmed(self) -> Tokenizer:
        """The backend with offsets that cover every character: trimmed ones hide a token that begins with a space."""
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.encode_special_tokens = bool(getattr(self.tokenizer, "split_special_tokens", False))
        return backend


def _learns(conversation: Conversation, turn: int) -> bool:
    return conversation.learn is None or conversation.learn[turn]


def _until(conversation: Conversation, turn: int) -> Conversation:
    """The conversation up to this message."""
    learn = None if conversation.learn is None else conversation.learn[: turn + 1]
    return replace(conversation, messages=conversation.messages[: turn + 1], learn=learn)


def _require_context(conversation: Conversation, text: str) -> None:
    """Check that the template writes what is said to the assistant: some have no place for a system message.

    Templates may strip or escape a text, so its longest word stands for it.

    Raises:
        BadRow: a system or user message is not in the text.
    """
    for turn, message in enumerate(conversation.messages, 1):
        if message["role"] in ("system", "developer", "user"):
            words = content_text(message).split()
            if words and max(words, key=len) not in text:
                raise BadRow(f"turn {turn}: the chat template leaves out what the {message['role']} says")


def _require_in_text(conversation: Conversation, text: str) -> None:
    """Every answer and call is in the text, if it is all learned."""
    for turn, message in enumerate(conversation.messages, 1):
        if message["role"] == "assistant":
            try:
                require_written(message, text)
            except NotDerivable as why:
                raise BadRow(f"turn {turn}: {why}") from None


def _tagged_turns(conversation: Conversation, text: str, stretches: list[Span]) -> dict[int, list[Span]]:
    """Number of each assistant message -> its stretches, of those inside generation tags.

    Raises:
        BadRow: an answer or call is not inside them, or they cannot be told apart.
    """
    turns = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    found: dict[int, list[Span]] = {turn: [] for turn in turns}
    rest = list(stretches)
    for number, turn in enumerate(turns):
        # A turn may have several stretches: it takes those up to the first with which it is complete.
        least = 1 if len(stretches) >= len(turns) else 0
        while not _complete(conversation.messages[turn], text, found[turn], least):
            if not rest or len(rest) < len(turns) - number:
                raise BadRow(
                    f"turn {turn + 1}: what the assistant says is not inside the template's generation tags; "
                    "mend the template (--chat-template FILE) or the row"
                )
            found[turn].append(rest.pop(0))
    if turns and rest:
        found[turns[-1]] += rest
    return found


def _complete(message: dict[str, Any], text: str, spans: list[Span], least: int) -> bool:
    try:
        require_written(message, "".join(text[start:stop] for start, stop in spans))
    except NotDerivable:
        return False
    return len(spans) >= least


def _token_mask(offsets: np.ndarray, special: np.ndarray, spans: list[Span]) -> np.ndarray:
    """uint8 ``[T]``: 1 for the tokens with character offsets ``[T, 2]`` inside one of the spans.

    A token that lies on both sides of a border is not learned: the assistant would not have generated it. ``special``
    bool ``[T]``: special tokens; some take the white space behind them along, beyond the span's end, and are learned.
    """
    mask = np.zeros(len(offsets), np.uint8)
    begins, ends = offsets[:, 0], offsets[:, 1]
    for start, stop in spans:
        inside = (begins >= start) & (begins < stop) & ((ends <= stop) | special)
        # A token without characters at the start could belong to either side.
        mask[inside & ~((begins == ends) & (begins == start))] = 1
    return mask
