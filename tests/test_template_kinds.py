"""Kinds of chat templates, each in a few lines of its own: what is learned is spelled out here.

Each kind was found in templates of real models, and was learned wrongly or refused once.
"""

from __future__ import annotations

from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
from chat import SPECIAL
from real_templates import OSLO, TOOLS, Message, assistant, call, result, user
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from extractor.data.chat_template import ChatTemplate
from extractor.data.common_text import before_open_mark, common_but_for_space
from extractor.data.conversation import Conversation
from extractor.data.loss_mask import ConversationTokenizer, Encoded

QUESTIONS = [user("One?"), assistant("First."), user("Two?"), assistant("Last.")]
CALLS = [
    user("Oslo?"),
    OSLO,
    result("rainy"),
    assistant("", tool_calls=[call("Rome")]),
    result("sunny"),
    assistant("Ok."),
]
TWO_ANSWERS = [user("One?"), assistant("First."), assistant("More."), user("Two?"), assistant("Last.")]
SYSTEM = {"role": "system", "content": "Be terse."}
OSLO_CALL, ROME_CALL = (f'[{{"name": "get_weather", "arguments": {{"city": "{c}"}}}}]' for c in ("Oslo", "Rome"))

LEARNED = {
    ("always_prompts", "questions"): ["First.<|im_end|>", "Last.<|im_end|>"],
    ("always_prompts", "calls"): [f"{OSLO_CALL}<|im_end|>", f"{ROME_CALL}<|im_end|>", "Ok.<|im_end|>"],
    ("other_space", "questions"): ["First.<|im_end|>", "Last.<|im_end|>"],
    ("closed_in_history", "questions"): ["First.<|im_end|>", "Last."],
    ("closed_in_history", "system"): ["First.<|im_end|>", "Last."],
    ("closed_before_results", "questions"): ["First.\n<|im_end|>", "Last."],
    ("closed_before_results", "calls"): [f"{OSLO_CALL}\n<|im_end|>", f"{ROME_CALL}\n<|im_end|>", "Ok."],
    ("empty_turn", "calls"): [f"{OSLO_CALL}<|im_end|>", f"{ROME_CALL}<|im_end|>", "Ok.<|im_end|>"],
    ("header_before_calls", "calls"): [f"{OSLO_CALL}<|im_end|>", f"{ROME_CALL}<|im_end|>", "Ok.<|im_end|>"],
    ("another_last_end", "two answers"): ["First.<|im_end|>", "More.<|im_end|>", "Last.<|eot_id|>"],
    ("plain", "questions"): ["First.", "Last."],
}
CONVERSATIONS: dict[str, list[Message]] = {
    "questions": QUESTIONS,
    "system": [SYSTEM, *QUESTIONS],
    "calls": CALLS,
    "two answers": TWO_ANSWERS,
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A token a byte, but for marks: none lies on both sides of a border."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: n for n, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    template = (Path(__file__).parent / f"templates/{kind}.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=template)


def encoded(kind: str, case: str) -> tuple[list[tuple[str, bool]], Encoded]:
    """The pieces ``(text, learned)`` of the only sample."""
    tokenizer = tokenizer_of(kind)
    convert = ConversationTokenizer(ChatTemplate(tokenizer), assistant_only=True)
    samples = convert(Conversation(messages=CONVERSATIONS[case], tools=TOOLS if case == "calls" else None))
    ((ids, mask),) = samples
    runs = groupby(zip(mask.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0])
    return [(tokenizer.decode([i for _, i in group]), bool(learned)) for learned, group in runs], samples


@pytest.mark.parametrize(("kind", "case"), LEARNED)
def test_what_each_kind_of_template_learns(kind: str, case: str) -> None:
    pieces, _ = encoded(kind, case)
    assert [text for text, learned in pieces if learned] == LEARNED[kind, case]


def test_turns_that_nothing_ends_are_noted() -> None:
    assert encoded("plain", "questions")[1].notes == ["no_end_of_turn"] * 2
    assert encoded("closed_in_history", "questions")[1].notes == []


def test_white_space_of_other_length_is_in_common_where_text_follows_it() -> None:
    for one, other, in_common in (
        ("a\n\n  b:x", "a\n b:", ("a\n\n  b:", "a\n b:")),
        ("a\n\n<call>", "a\n<think>", ("a\n", "a\n")),
        ("a b", "ab", ("a b", "ab")),
        ("same", "same", ("same", "same")),
        ("", "x", ("", "")),
    ):
        at, to = common_but_for_space(one, other)
        assert (one[:at], other[:to]) == in_common
    assert "a<b> <thi"[: before_open_mark("a<b> <thi")] == "a<b> "
