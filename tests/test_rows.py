"""Rows in the forms that people have are taken exactly, mapped with one option, or refused in words to act on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cache_format.errors import InputError
from extractor.config import parse_columns
from extractor.data.bad_row import BadRow, LeftOut
from extractor.data.conversation import Conversation, conversation_of
from extractor.data.forms import Form, form_of, named_for
from extractor.data.token_row import ids_of
from extractor.data.transcript import turns_of_transcript

Row = dict[str, Any]


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SYSTEM, USER, ANSWER = turn("system", "Be kind."), turn("user", "Hi"), turn("assistant", "Yo")
PAIR, WITH_SYSTEM = [USER, ANSWER], [SYSTEM, USER, ANSWER]
FROM_VALUE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
WORSE = turn("assistant", "No")
TOOL = {"name": "add", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
COMPLETION = {"choices": [{"index": 0, "message": ANSWER, "finish_reason": "stop"}]}


def conversation(row: Row, columns: str | None = None) -> Conversation:
    named = named_for(list(row), dict(parse_columns(columns)))
    return conversation_of(row, form_of(list(row), named=named))


def roles_and_texts(found: Conversation) -> list[tuple[str, Any]]:
    return [(message["role"], message.get("content")) for message in found.messages]


PUBLIC: dict[str, tuple[Row, list[dict[str, Any]]]] = {
    "UltraChat 200k": ({"prompt": "Hi", "prompt_id": "x", "messages": PAIR}, PAIR),
    "UltraChat": ({"id": "0", "data": ["Hi", "Yo"]}, PAIR),
    "LIMA": ({"conversations": ["Hi", "Yo"], "source": "stackexchange"}, PAIR),
    "Alpaca": ({"instruction": "Hi", "input": "", "output": "Yo", "text": "Below is ..."}, PAIR),
    "Alpaca, input": (
        {"instruction": "Sum", "input": "1 2", "output": "3"}, [turn("user", "Sum\n1 2"), turn("assistant", "3")],
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "A fox.", "response": "A fox", "category": "qa"},
        [turn("user", "Who?\nA fox."), turn("assistant", "A fox")],
    ),
    "BELLE, multi-turn": (
        {"instruction": "Human:Hi\nAssistant:Yo\nHuman:Hi\nAssistant:", "input": "", "output": "Yo"}, [*PAIR, *PAIR],
    ),
    "Firefly": ({"kind": "NLI", "input": "Hi", "target": "Yo"}, PAIR),
    "GSM8K": ({"question": "Hi", "answer": "Yo"}, PAIR),
    "OpenOrca": ({"id": "t0", "system_prompt": "Be kind.", "question": "Hi", "response": "Yo"}, WITH_SYSTEM),
    "OpenOrca, no system": ({"id": "t0", "system_prompt": "", "question": "Hi", "response": "Yo"}, PAIR),
    "Magpie": ({"instruction": "Hi", "response": "Yo", "conversations": FROM_VALUE, "intent": "x"}, PAIR),
    "Tulu 3": ({"id": "1", "messages": PAIR, "source": "x"}, PAIR),
    "OpenThoughts": (
        {"system": "Be kind.", "conversations": [
            {"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"},
        ]},
        WITH_SYSTEM,
    ),
    "SlimOrca": (
        {"conversations": [
            {"from": "system", "value": "Be kind.", "weight": None},
            {"from": "human", "value": "Hi", "weight": 0.0},
            {"from": "gpt", "value": "Yo", "weight": 1.0},
        ]},
        WITH_SYSTEM,
    ),
    "WildChat": (
        {"conversation_hash": "x", "conversation": [{**USER, "toxic": False}, {**ANSWER, "toxic": False}], "turn": 1},
        [{**USER, "toxic": False}, {**ANSWER, "toxic": False}],
    ),
    "LMSYS": ({"conversation_id": "x", "model": "m", "conversation": PAIR, "redacted": False}, PAIR),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        PAIR,
    ),
    "UltraFeedback binarized": (
        {"prompt": "Hi", "chosen": PAIR, "rejected": [USER, WORSE], "messages": PAIR, "score_chosen": 9.0},
        PAIR,
    ),
    "Orca DPO": ({"system": "Be kind.", "question": "Hi", "chosen": "Yo", "rejected": "No"}, WITH_SYSTEM),
    "LLaMA-Factory ranking": (
        {"conversations": FROM_VALUE[:1], "chosen": FROM_VALUE[1], "rejected": {"from": "gpt", "value": "No"}},
        PAIR,
    ),
    "OpenAI preference": (
        {"input": {"messages": [USER], "tools": []}, "preferred_output": [ANSWER], "non_preferred_output": [WORSE]},
        PAIR,
    ),
    "TRL preference, implicit prompt": ({"chosen": PAIR, "rejected": [USER, WORSE]}, PAIR),
    "TRL prompt-completion": ({"prompt": [USER], "completion": [ANSWER]}, PAIR),
    "TRL prompt-completion, several turns": (
        {"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER]}, [*WITH_SYSTEM, *PAIR],
    ),
    "TRL prompt-completion, texts": ({"prompt": "Hi", "completion": "Yo"}, PAIR),
    "KTO, good": ({"prompt": "Hi", "completion": "Yo", "label": True}, PAIR),
    "NuminaMath": ({"problem": "p", "solution": "s", "messages": PAIR}, PAIR),
    "NuminaMath 1.5": ({"problem": "Hi", "solution": "Yo", "answer": "4"}, PAIR),
    "OpenMathInstruct": ({"question": "Hi", "generated_solution": "Yo", "expected_answer": "4"}, PAIR),
    "MetaMath": ({"type": "x", "query": "Hi", "original_question": "y", "response": "Yo"}, PAIR),
    "medical-o1": ({"Question": "Hi", "Complex_CoT": "hm", "Response": "Yo"}, PAIR),
    "Aya": ({"inputs": "Hi", "targets": "Yo", "language": "e"}, PAIR),
    "Capybara": ({"source": "x", "conversation": [{"input": "Hi", "output": "Yo"}]}, PAIR),
    "ms-swift": (
        {"system": "Be kind.", "query": "Hi", "response": "Yo", "history": [["Hi", "Yo"]]}, [*WITH_SYSTEM, *PAIR],
    ),
    "Nemotron": ({"input": [USER], "output": "Yo", "reasoning": "off", "system_prompt": "Be kind."}, WITH_SYSTEM),
    "Gemini": (
        {"systemInstruction": {"parts": [{"text": "Be kind."}]}, "contents": [
            {"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Yo"}]},
        ]},
        WITH_SYSTEM,
    ),
    "Bedrock": (
        {"schemaVersion": "x", "system": [{"text": "Be kind."}], "messages": [
            turn("user", [{"text": "Hi"}]), turn("assistant", [{"text": "Yo"}]),  # type: ignore[arg-type]
        ]},
        WITH_SYSTEM,
    ),
    "objects of lists": ({"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Yo"]}}, PAIR),
    "JSON in a column": ({"messages": json.dumps(PAIR)}, PAIR),
    "nested conversation": ({"conversation": {"system": "Be kind.", "messages": PAIR}}, WITH_SYSTEM),
    "request log": ({"request": {"model": "m", "messages": [USER]}, "response": COMPLETION}, PAIR),
    "batch API, joined": (
        {"custom_id": "1", "body": {"messages": [USER]}, "response": {"status_code": 200, "body": COMPLETION}}, PAIR,
    ),
    "messages and choices": ({"messages": [USER], "choices": COMPLETION["choices"]}, PAIR),
    "messages and response": ({"messages": [USER], "response": "Yo"}, PAIR),
    "ToolACE": (
        {"system": "Be kind.", "conversations": [
            {"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"}, {"from": "tool", "value": "3"},
            {"from": "assistant", "value": "Yo"},
        ]},
        [*WITH_SYSTEM, turn("tool", "3"), ANSWER],
    ),
    "APIGen": (
        {"conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"}, {"from": "gpt", "value": "Yo"},
        ]},
        [USER, turn("assistant", "", tool_calls=[CALL]), turn("tool", "3"), ANSWER],
    ),
    "xLAM": (
        {"query": "Hi", "answers": '[{"name": "add", "arguments": {"a": 1}}]', "tools": json.dumps([TOOL])},
        [USER, turn("assistant", "", tool_calls=[CALL])],
    ),
    "Glaive": (
        {"system": "SYSTEM: Be kind.\n", "chat": "USER: Hi\n\n\nASSISTANT: <functioncall> "
         """{"name": "add", "arguments": '{"a": 1}'} <|endoftext|>\n\n\nFUNCTION RESPONSE: 3\n\n\n"""
         "ASSISTANT: Yo <|endoftext|>\n\n\n"},
        [SYSTEM, USER, turn("assistant", "", tool_calls=[CALL]), turn("tool", "3"), ANSWER],
    ),
    "OpenAI functions": (
        {"messages": [
            USER, turn("assistant", None, function_call={"name": "add", "arguments": '{"a": 1}'}),
            turn("function", "3", name="add"), ANSWER,
        ], "functions": [TOOL]},
        [USER, turn("assistant", None, tool_calls=[CALL]), turn("tool", "3", name="add"), ANSWER],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_form_gives_exactly_its_messages(name: str) -> None:
    row, messages = PUBLIC[name]
    found = conversation(row)
    assert found.messages == messages
    assert found.learn is None


MAPPED: dict[str, tuple[Row, str, list[dict[str, Any]]]] = {
    "HumanEval": ({"task_id": 1, "prompt": "Hi", "canonical_solution": "Yo"}, "response=canonical_solution", PAIR),
    "HelpSteer2": ({"prompt": "Hi", "response_1": "Yo", "response_2": "No"}, "response=response_1", PAIR),
    "MBPP": ({"text": "Hi", "code": "Yo", "test_list": []}, "prompt=text,response=code", PAIR),
    "summaries": ({"article": "Hi", "highlights": "Yo"}, "prompt=article,response=highlights", PAIR),
    "Dolphin": (
        {"instruction": "Be kind.", "input": "Hi", "output": "Yo"}, "system=instruction,prompt=input,response=output",
        WITH_SYSTEM,
    ),
    "arena": ({"conversation_a": PAIR, "conversation_b": [], "winner": "a"}, "messages=conversation_a", PAIR),
    "Guanaco": ({"text": "### Human: Hi### Assistant: Yo"}, "messages=text", PAIR),
    "a system column of another name": ({"persona": "Be kind.", "messages": PAIR}, "system=persona", WITH_SYSTEM),
    "reasoning": (
        {"Question": "Hi", "Complex_CoT": "hm", "Response": "Yo"}, "reasoning_content=Complex_CoT",
        [USER, turn("assistant", "Yo", reasoning_content="hm")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPPED)
def test_one_option_maps_other_names(name: str) -> None:
    row, columns, messages = MAPPED[name]
    assert conversation(row, columns).messages == messages


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("id body", "in the columns id, body. Rows need messages .* --columns prompt=COLUMN,response=COLUMN"),
        ("message_id parent_id text role", "one message .*choose a path"),
        ("message_tree_id prompt", "choose a path"),
        ("role content", "Each row is one message"),
        ("id custom_id response error", "join the two files by custom_id"),
        ("custom_id method url body", "join the two files by custom_id"),
        ("task_id prompt canonical_solution", "--columns prompt=prompt,response=COLUMN"),
        ("prompt", "prompts without answers"),
        ("context question answers", "--columns prompt=question,response=COLUMN"),
        ("id completion", "--columns prompt=COLUMN,response=completion"),
    ],
)
def test_what_no_form_fits_is_refused_with_what_to_do(columns: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        form_of(columns.split())


def test_the_format_asked_for_has_to_fit() -> None:
    assert form_of(["text", "messages"], "text").row_format == "text"
    assert form_of(["messages", "conversations"], "conversations").columns == {"messages": "conversations"}
    with pytest.raises(InputError, match="--row-format messages needs the column messages; found: text"):
        form_of(["text"], "messages")
    with pytest.raises(InputError, match="--columns names the column nothing; found: text"):
        form_of(["text"], named={"prompt": "nothing"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prompt", "write FIELD=COLUMN"),
        ("prompt=", "write FIELD=COLUMN"),
        ("prompt=a,response=a", "each once"),
        ("prompt=a,prompt=b", "each once"),
        ("promt=a", "--columns promt=...: no such field; choose among messages, prompt"),
    ],
)
def test_columns_are_checked_as_text(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_columns(text)


def test_columns_count_for_the_sources_that_have_them_all() -> None:
    assert named_for(["a", "b"], {"prompt": "a", "response": "b"}) == {"prompt": "a", "response": "b"}
    assert named_for(["messages"], {"prompt": "a", "response": "b"}) == {}
    with pytest.raises(InputError, match="names b, which the data does not have; found: a"):
        named_for(["a"], {"prompt": "a", "response": "b"})


def test_columns_that_nothing_is_taken_from_are_told() -> None:
    columns = ["id", "Question", "Complex_CoT", "Response", "system", "images"]
    assert form_of(columns).unused(columns) == ["id", "Complex_CoT"]


# -- what a row says beside its texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}', json.dumps('{"city": "Oslo"}')])
def test_arguments_of_a_tool_call_are_an_object(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    flat = {"name": "weather", "arguments": arguments}
    row = {"messages": [USER, turn("assistant", "", tool_calls=[call, flat])]}
    [first, second] = conversation(row).messages[1]["tool_calls"]
    assert first == {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    assert second == {"name": "weather", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize("arguments", ["", " ", None, "null", "{}", {}])
def test_no_arguments_are_an_empty_object(arguments: Any) -> None:
    call = {"function": {"name": "now", "arguments": arguments}}
    found = conversation({"messages": [USER, turn("assistant", None, tool_calls=[call])]})
    assert found.messages[1]["tool_calls"] == [{"function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize("arguments", ["{'city': 'Oslo'}", '{"city": ', "[1]", "5", '"Oslo"', [1], 5, "[" * 100_000])
def test_arguments_that_are_no_object_are_a_bad_row(arguments: Any) -> None:
    call = {"function": {"name": "weather", "arguments": arguments}}
    with pytest.raises(BadRow, match="turn 2: 'arguments' of a tool call"):
        conversation({"messages": [USER, turn("assistant", "", tool_calls=[call])]})


def test_nulls_of_a_row_stay_where_they_are() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"unit": {"default": None}}}}
    call = {"function": {"name": "add", "arguments": {"unit": None}}}
    row = {"messages": [USER, turn("assistant", None, tool_calls=[call], name=None)], "tools": [tool]}
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        found = conversation({**row, "tools": tools})
        assert found.tools == [tool]
        assert found.messages == row["messages"]


@pytest.mark.parametrize("text", ["Be kind.", " Be kind.\n"])
@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_a_system_column_is_used_once(column: str, text: str) -> None:
    assert conversation({column: "Be kind.", "messages": PAIR}).messages == WITH_SYSTEM
    assert conversation({column: text, "messages": WITH_SYSTEM}).messages == WITH_SYSTEM
    for nothing in ("", " ", None):
        assert conversation({column: nothing, "messages": PAIR}).messages == PAIR
    with pytest.raises(BadRow, match="a system turn and another text"):
        conversation({column: "Be brief.", "messages": WITH_SYSTEM})


def test_a_system_column_that_only_a_later_row_has_is_used() -> None:
    form = form_of(["messages"])
    assert conversation_of({"messages": PAIR, "system": "Be kind."}, form).messages == WITH_SYSTEM
    with pytest.raises(BadRow, match="'images' is not empty"):
        conversation_of({"messages": PAIR, "images": ["x.png"]}, form)


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "training", "learn", "loss"])
@pytest.mark.parametrize("value", [0, 0.0, False])
def test_a_turn_that_says_so_is_not_learned(key: str, value: Any) -> None:
    found = conversation({"messages": [{**USER, key: 0}, {**ANSWER, key: value}, USER, {**ANSWER, key: 1}]})
    assert found.learn == (True, False, True, True)
    assert found.messages == [*PAIR, *PAIR]
    assert conversation({"messages": [USER, {**ANSWER, key: 1}, USER, {**ANSWER, key: None}]}).learn is None


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([USER, {**ANSWER, "weight": 0.5}], "turn 2: 'weight' is 0.5; a turn is learned .1. or not .0."),
        ([{**USER, "train": True}, ANSWER], "turn 1: 'train' asks to learn what the user says"),
        ([USER, {**ANSWER, "train_detail": [{"begin_offset": 0}]}], "turn 2: 'train_detail' learns part of a turn"),
    ],
)
def test_what_a_mask_cannot_say_is_a_bad_row(turns: list[Any], problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        conversation({"messages": turns})


def test_the_rows_own_template_arguments_are_passed_on() -> None:
    documents = [{"title": "T", "text": "x"}]
    row = {"messages": PAIR, "chat_template_kwargs": {"enable_thinking": False}, "documents": documents}
    assert conversation(row).template_kwargs == {"enable_thinking": False, "documents": documents}
    row["chat_template_kwargs"] = '{"enable_thinking": false}'
    assert conversation(row).template_kwargs["enable_thinking"] is False
    assert conversation({"messages": PAIR, "chat_template_kwargs": None, "documents": []}).template_kwargs == {}
    for wrong in ({"tools": []}, {"add_generation_prompt": True}):
        with pytest.raises(BadRow, match="not for a row to say"):
            conversation({"messages": PAIR, "chat_template_kwargs": wrong})


@pytest.mark.parametrize("label", [False, 0])
def test_rows_labelled_as_bad_are_left_out(label: Any) -> None:
    for row in ({"prompt": "Hi", "completion": "Yo"}, {"messages": PAIR}):
        with pytest.raises(LeftOut) as left_out:
            conversation({**row, "label": label})
        assert left_out.value.reason == "rejected"
    assert conversation({"messages": PAIR, "label": "good"}).messages == PAIR


@pytest.mark.parametrize("column", ["image", "images", "videos", "audio"])
def test_what_a_text_target_cannot_see_is_a_bad_row(column: str) -> None:
    for value in (["cat.png"], "cat.png", {"bytes": b"x"}):
        with pytest.raises(BadRow, match=f"'{column}' is not empty; only text"):
            conversation({"messages": [turn("user", "<image>What?"), ANSWER], column: value})
    for nothing in (None, [], ""):
        assert conversation({"messages": PAIR, column: nothing}).messages == PAIR


def test_preferences_that_contradict_themselves_are_bad_rows() -> None:
    for row, problem in (
        ({"prompt": "Bye", "chosen": PAIR, "rejected": PAIR}, "not the one of the row's prompt"),
        ({"messages": PAIR, "chosen": "Yo", "rejected": "No"}, "already ends with one"),
        ({"chosen": "Yo", "rejected": "No"}, "'chosen' is an answer, and the row has no prompt"),
        ({"prompt": "Hi", "chosen": None, "rejected": "No"}, "'chosen' is missing"),
        ({"prompt": "Hi", "chosen": True, "rejected": "No"}, "'chosen' is a bool"),
    ):
        with pytest.raises(BadRow, match=problem):
            conversation(row)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Yo"}],
        [{"type": "text", "value": "Yo"}],
        [{"type": "text", "text": "Y"}, {"type": "output_text", "text": "o"}],
        [{"text": "Yo"}],
    ],
)
def test_text_parts_in_either_naming(content: Any) -> None:
    assert conversation({"messages": [USER, turn("assistant", content)]}).messages == PAIR


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "'messages' is missing"),
        ({"messages": None}, "'messages' is null"),
        ({"messages": []}, "empty list"),
        ({"messages": "Hi"}, "not a list"),
        ({"messages": "[{"}, "'messages' is a text but not JSON"),
        ({"messages": {"a": [1]}}, "not a list"),
        ({"messages": ["Hi"]}, "turn 1 is a str"),
        ({"messages": [USER, None]}, "turn 2 is missing"),
        ({"messages": [USER, turn("robot", "x")]}, "turn 2: 'role' is missing or not one of system"),
        ({"messages": [{"content": "x"}]}, "turn 1: 'role' is missing"),
        ({"messages": [{"from": "robot", "value": "x"}]}, "turn 1: 'from'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "turn 1: 'role'"),
        ({"messages": [{"role": "user"}]}, "turn 1 has no content"),
        ({"messages": [turn("user", 5)]}, "content is not a text"),  # type: ignore[arg-type]
        ({"messages": [turn("user", [{"type": "image", "url": "x"}])]}, "part of type 'image'"),  # type: ignore[arg-type]
        ({"messages": [turn("user", ["x"])]}, "only text parts"),  # type: ignore[arg-type]
        ({"messages": [USER, turn("assistant", "", tool_calls={"a": 1})]}, "'tool_calls' is a dict, not a list"),
        ({"messages": [USER, turn("assistant", "", tool_calls=[5])]}, "a tool call is a int"),
        ({"messages": [USER, {"from": "function_call", "value": "add(1)"}]}, "turn 2: the call is a text but not JSON"),
        ({"messages": [USER], "tools": "{"}, "'tools' is a text but not JSON"),
        ({"messages": [USER], "tools": "[" * 100_000}, "'tools' is nested too deep"),
        ({"messages": [USER], "tools": {"a": 1}}, "'tools' is a dict"),
        ({"messages": [USER], "tools": [1]}, "'tools' holds something that is not an object"),
        ({"messages": PAIR, "system": 5}, "'system' is a int, not a text"),
        ({"messages": PAIR, "chat_template_kwargs": [1]}, "'chat_template_kwargs' is a list"),
        ({"messages": PAIR, "documents": {"a": 1}}, "'documents' is a dict"),
    ],
)  # fmt: skip
def test_a_malformed_conversation_is_a_bad_row(row: Row, problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        conversation_of(row, form_of(["messages"]))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Hi", "completion": None}, "'completion' is missing"),
        ({"prompt": None, "completion": "Yo"}, "'prompt' is null"),
        ({"question": "Hi", "answer": True}, "'answer' is a bool, not a text"),
        ({"question": "Hi", "answer": ["Yo", "Ya"]}, "'answer' is a list, not a text"),
        ({"instruction": "Hi", "input": 5, "output": "Yo"}, "'input' is a int, not a text"),
        ({"request": {"messages": [USER]}, "response": {"status_code": 500, "body": {}}}, "without an answer"),
        ({"request": {"messages": [USER]}, "response": {"choices": [1, 2]}}, "has 2 choices"),
        ({"query": "Hi", "answers": "[]", "tools": "[]"}, "the call is not an object with a name"),
    ],
)
def test_a_malformed_answer_is_a_bad_row(row: Row, problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        conversation(row)


# -- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "'input_ids' is missing"),
        ({"input_ids": "12"}, "'input_ids' is not a list of whole numbers"),
        ({"input_ids": [1.5]}, "not a list of whole numbers"),
        ({"input_ids": [[1], [2, 3]]}, "not a list of whole numbers"),
        ({"input_ids": [None, 1]}, "not a list of whole numbers"),
        ({"input_ids": [1 << 70]}, "not a list of whole numbers"),
        ({"input_ids": [1, -1], "loss_mask": [0, 1]}, "token id -1 .* outside the tokenizer's 0..9"),
        ({"input_ids": [1, 10], "loss_mask": [0, 1]}, "token id 10 .* outside"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "'loss_mask' has 1 entries, 'input_ids' has 2"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "other than 0 and 1"),
        ({"input_ids": [1, 2]}, "'labels' is missing"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "must be unshifted"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "without padding"),
        ({"input_ids": [1, 2, 9, 9], "labels": [-100, 2, -100, -100]}, "ends with padding .token 9."),
        ({"input_ids": [9, 9, 1, 2], "labels": [-100, -100, 1, 2]}, "begins or ends with padding"),
    ],
)
def test_malformed_ids_are_a_bad_row(row: Row, problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        ids_of(row, 10, "column", pad_id=9)


def test_ids_take_their_mask_from_a_column() -> None:
    ids, mask = ids_of({"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}, 10, "column")
    assert (ids.tolist(), mask.tolist()) == ([1, 2, 3], [0, 1, 0])
    ids, mask = ids_of({"input_ids": [1, 2, 3], "loss_mask": [True, False, True]}, 10, "column")
    assert (str(ids.dtype), str(mask.dtype), mask.tolist()) == ("int32", "uint8", [1, 0, 1])
    assert ids_of({"input_ids": [1, 2, 3]}, 10, "all")[1].tolist() == [1, 1, 1]
    assert len(ids_of({"input_ids": [], "loss_mask": []}, 10, "column", pad_id=9)[0]) == 0
    assert ids_of({"input_ids": [1, 9], "labels": [1, 9]}, 10, "column", pad_id=9)[1].tolist() == [1, 1]


def test_a_form_gives_ids_their_names() -> None:
    form = Form(row_format="input_ids", columns={"input_ids": "tokens", "loss_mask": "mask"})
    assert ids_of(form.renamed({"tokens": [1], "mask": [0]}), 10, "column")[1].tolist() == [0]


def test_markers_behind_one_newline_are_text_where_turns_are_told_apart_by_two() -> None:
    text = "\n\nHuman: Go on:\nUser: Hi\n\nAssistant: Yo\n\nHuman: Hi\n\nAssistant:"
    turns = [turn("user", "Go on:\nUser: Hi"), turn("assistant", "Yo"), turn("user", "Hi")]
    assert turns_of_transcript(text) == turns


def test_rows_that_stand_inside_a_column_are_no_turns() -> None:
    for rows in ([{"messages": PAIR}], [{"instruction": "Hi", "output": "Yo"}]):
        with pytest.raises(BadRow, match="'data' is a list of rows"):
            conversation({"data": rows})
    assert conversation({"data": [{"user": "Hi", "assistant": "Yo"}]})
