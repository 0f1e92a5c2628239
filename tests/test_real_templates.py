"""Loss masks with the chat templates of real models: exact, or refused for a reason that a user can act on.

The oracle needs no expected strings: every answer and call is learned, nothing that others say is, and what stands
between a learned stretch and the next message is what the template writes before a message of that role elsewhere.
"""

from __future__ import annotations

import re
from datetime import date
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
from real_templates import CONVERSATIONS, TOOLS, TWIN, assistant, conversation, real_tokenizer, template_names, user

from extractor.data.bad_row import BadRow
from extractor.data.chat_template import ChatTemplate, dated, uses_date
from extractor.data.conversation import Conversation
from extractor.data.loss_mask import ConversationTokenizer

DOCUMENT = Path(__file__).parents[1] / "extractor/data/DATA.md"
REASONS = {
    "this template does not write tool calls": "no calls",
    "this template leaves tool calls out": "no calls",
    "is not inside the template's generation tags": "not in tags",
    "Conversation roles must alternate": "roles",
    "This model only supports single tool-calls": "one call",
    "System role not supported": "no system",
    "Only user and assistant roles are supported": "no tool role",
}
"""Part of a refusal -> its word in the table."""


@cache
def converter(name: str, turns: str = "all") -> ConversationTokenizer:
    template = ChatTemplate(real_tokenizer(name), today=date(2026, 1, 31))
    return ConversationTokenizer(template, assistant_only=True, turns=turns)


@cache
def outcome(name: str, case: str) -> tuple[list[tuple[str, bool]], str]:
    """The pieces ``(text, learned)`` of a conversation, or why it is refused."""
    try:
        ((ids, mask),) = converter(name)(conversation(case))
    except BadRow as refused:
        return [], str(refused)
    tokenizer = real_tokenizer(name)
    pairs = groupby(zip(mask.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0])
    return [(tokenizer.decode([i for _, i in group]), bool(learned)) for learned, group in pairs], ""


def word(name: str, case: str) -> str:
    """What the table says of a template and a conversation."""
    pieces, problem = outcome(name, case)
    if pieces:
        return "exact"
    return next(word for part, word in REASONS.items() if part in problem)


@pytest.mark.parametrize("name", template_names())
def test_answers_and_calls_are_learned_and_nothing_else(name: str) -> None:
    for case, messages in CONVERSATIONS.items():
        pieces, problem = outcome(name, case)
        if problem:
            assert any(part in problem for part in REASONS), (case, problem)
            continue
        learned = [text for text, is_learned in pieces if is_learned]
        rest = "\0".join(text for text, is_learned in pieces if not is_learned)
        for message in messages:
            content = (message["content"] or "").rsplit("</think>", 1)[-1].strip()
            if message["role"] != "assistant":
                assert content in rest, (case, content)
                assert not any(content in text for text in learned), (case, content)
            elif message.get("tool_calls"):
                assert any(all(c["function"]["name"] in text for c in message["tool_calls"]) for text in learned), case
            else:
                assert sum(content in text for text in learned) == 1, (case, content)


@pytest.mark.parametrize("name", template_names())
def test_what_follows_an_answer_is_the_next_header_alone(name: str) -> None:
    """What the template writes before the first question, it writes before the second: no end of a turn is in it."""
    pieces, problem = outcome(name, "multi")
    assert not problem
    before_first, between = (
        text for text, learned in pieces if (not learned and "question?" in text) or "one?" in text
    )
    header = between[: between.index("Second one?")].strip()
    assert before_first[: before_first.index("First question?")].rstrip().endswith(header)


@pytest.mark.parametrize("name", [n for n in template_names() if n + TWIN in template_names()])
def test_tagged_twins_learn_the_same_but_for_white_space_and_known_differences(name: str) -> None:
    """TRL tagged these by hand. Where its tags differ: they take the newline behind the end-of-turn token along, which
    is not generated, some take the header before the answer or the end of the whole text, and some variants of a
    template write an empty think block that the original leaves out."""

    def core(text: str) -> str:
        text = re.sub(r"</?think>|\s+", " ", text).strip()
        text = re.sub(r"(<\|endoftext\|>|<\|im_end\|>|<\|user\|>)$", "", text).strip()
        return re.sub(r"^(<｜Assistant｜>|<\|start\|>assistant)", "", text).strip()

    for case in ("single", "multi", "system"):
        ours, theirs = outcome(name, case)[0], outcome(name + TWIN, case)[0]
        assert [core(t) for t, is_learned in ours if is_learned] == [core(t) for t, is_learned in theirs if is_learned]


def test_the_table_in_the_document_is_what_the_templates_give() -> None:
    cases = list(CONVERSATIONS)
    lines = [f"| template | {' | '.join(cases)} |", f"| --- |{' --- |' * len(cases)}"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in template_names():
        rows.setdefault(tuple(word(name, case) for case in cases), []).append(name)
    lines += [f"| {', '.join(names)} | {' | '.join(words)} |" for words, names in rows.items()]
    assert "\n".join(lines) in DOCUMENT.read_text()


# -- kinds that were wrong or refused once ----------------------------------------------------------------------------


def learned(name: str, found: Conversation, turns: str = "all") -> list[list[str]]:
    """Learned stretches of each sample."""
    tokenizer, samples = real_tokenizer(name), []
    for ids, mask in converter(name, turns)(found):
        runs = groupby(zip(mask.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0])
        samples.append([tokenizer.decode([i for _, i in group]) for is_learned, group in runs if is_learned])
    return samples


def test_all_marks_that_close_a_turn_are_learned() -> None:
    assert learned("cohere2", conversation("single")) == [["Oslo is the capital.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"]]


def test_a_turn_in_history_may_end_otherwise_than_the_last() -> None:
    call, answer, last = learned("gptoss", conversation("then a question"))[0]
    assert call == ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
    assert answer == "<|channel|>final<|message|>It rains in town.<|end|>"
    assert last == "<|channel|>final<|message|>Welcome indeed.<|return|>"


def test_the_next_role_ends_a_turn_that_nothing_closes() -> None:
    first, last = learned("glm4moe", conversation("multi"))[0]
    assert first == "\n<think></think>\nFirst answer.<|user|>"
    assert last == "\n<think></think>\nLast answer."


def test_history_without_the_think_block_that_the_prompt_opens() -> None:
    first, last = learned("deepseekv3", conversation("multi"))[0]
    assert (first, last) == ("First answer.<｜end▁of▁sentence｜>", "Last answer.<｜end▁of▁sentence｜>")


def test_a_template_that_joins_arguments_as_text_gets_text() -> None:
    call, _ = learned("deepseekv3", conversation("tool call"))[0]
    assert '```json\n{"city": "Oslo"}\n```' in call


def test_a_template_that_wants_content_in_parts_gets_parts() -> None:
    assert learned("idefics3", conversation("single")) == [[" Oslo is the capital.<end_of_utterance>"]]


def test_an_answer_outside_the_generation_tags_is_a_bad_row() -> None:
    tokenizer = real_tokenizer("qwen2_5")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{% if not m.skipped %}{{ m.content }}{% endif %}<|im_end|>{% endgeneration %}\n{% else %}"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    convert = ConversationTokenizer(ChatTemplate(tokenizer), assistant_only=True)
    messages = [user("One?"), assistant("First."), user("Two?"), assistant("Second.", skipped=True)]
    assert len(convert(Conversation(messages=messages[:2]))) == 1
    with pytest.raises(BadRow, match=r"turn 4: .*generation tags"):
        convert(Conversation(messages=messages))


def test_with_loss_on_all_an_answer_that_is_not_in_the_text_is_a_bad_row() -> None:
    convert = ConversationTokenizer(ChatTemplate(real_tokenizer("llama3")), assistant_only=False)
    assert convert(conversation("single"))[0][1].all()
    with pytest.raises(BadRow, match="does not write tool calls"):
        convert(conversation("tool call"))


def test_reasoning_that_the_template_leaves_out_is_noted() -> None:
    assert converter("qwen3")(conversation("reasoning")).notes == ["reasoning_left_out"]
    assert converter("qwen2_5")(conversation("reasoning")).notes == ["reasoning_left_out"] * 2
    assert converter("qwen3")(conversation("think tags")).notes == ["reasoning_left_out"]
    assert converter("qwen3", "each")(conversation("reasoning")).notes == []


# -- --turns ----------------------------------------------------------------------------------------------------------


def test_each_turn_is_a_sample_with_the_prompt_that_the_target_saw() -> None:
    messages = CONVERSATIONS["reasoning"]
    first, last = converter("qwen3", "each")(conversation("reasoning"))
    tokenizer = real_tokenizer("qwen3")
    for (ids, mask), turn in ((first, 1), (last, 3)):
        prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=True, add_generation_prompt=True)["input_ids"]
        assert ids[: len(prompt)].tolist() == prompt
        assert not mask[: len(prompt)].any()
        assert mask[len(prompt) : -1].all()
    assert learned("qwen3", conversation("reasoning"), "each") == [
        ["<think>\nAdding two numbers.\n</think>\n\nFour exactly.<|im_end|>"],
        ["<think>\nAdding again now.\n</think>\n\nSix exactly.<|im_end|>"],
    ]


def test_the_last_turn_alone() -> None:
    assert learned("qwen2_5", conversation("multi"), "last") == [["Last answer.<|im_end|>"]]
    assert learned("qwen3_training", conversation("multi"), "last")[0][0].endswith("Last answer.<|im_end|>\n")


@pytest.mark.parametrize("turns", ["all", "last", "each"])
def test_turns_that_the_row_says_not_to_learn(turns: str) -> None:
    found = Conversation(messages=CONVERSATIONS["multi"], learn=(True, True, True, False))
    assert learned("qwen2_5", found, turns) == [["First answer.<|im_end|>"]]


def test_a_system_prompt_for_those_that_have_none() -> None:
    template = ChatTemplate(real_tokenizer("llama3"))
    convert = ConversationTokenizer(template, assistant_only=True, system_prompt="Be kind.")
    texts = [real_tokenizer("llama3").decode(convert(conversation(case))[0][0]) for case in ("single", "system")]
    assert "system<|end_header_id|>\n\nBe kind.<|eot_id|>" in texts[0]
    assert "Be kind." not in texts[1]


# -- variables and the date -------------------------------------------------------------------------------------------


def test_variables_of_the_job_and_of_the_row() -> None:
    template = ChatTemplate(real_tokenizer("glm4moe"), kwargs={"enable_thinking": False})
    found = conversation("single")
    assert "/nothink" in template.render(found, found.messages)
    thinking = Conversation(messages=found.messages, template_kwargs={"enable_thinking": True})
    assert "/nothink" not in template.render(thinking, thinking.messages)


def test_a_template_writes_the_date_that_it_is_given() -> None:
    named = [name for name in template_names() if uses_date(real_tokenizer(name).get_chat_template(tools=TOOLS))]
    assert {"gptoss", "llama3_2"} <= set(named)
    for name in named:
        texts = []
        for today in (date(2026, 1, 31), date(2027, 2, 28)):
            found = conversation("single")
            texts.append(ChatTemplate(real_tokenizer(name), today=today).render(found, found.messages))
        assert texts[0] != texts[1]
        assert "2026" in texts[0]
        assert "2027" in texts[1]


def test_a_format_that_the_template_computes_cannot_be_kept() -> None:
    from cache_format.errors import InputError

    assert dated("{{ strftime_now('%d %b') }}", date(2026, 1, 31)) == '{{ "31 Jan" }}'
    with pytest.raises(InputError, match="computes the format"):
        dated("{{ strftime_now(format) }}", date(2026, 1, 31))


def test_text_beside_a_call_that_is_written_behind_the_tools_result_is_refused() -> None:
    messages = [*CONVERSATIONS["tool call"]]
    messages[1] = {**messages[1], "content": "Let me look that up."}
    found = Conversation(messages=messages, tools=TOOLS)
    for name in ("gemma4", "gemma4_v5"):
        with pytest.raises(BadRow, match="turn"):
            converter(name)(found)
    assert learned("qwen2_5", found)[0][0].startswith("Let me look that up.\n<tool_call>")
