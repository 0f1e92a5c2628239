"""Chat templates of real models, from TRL's package, and conversations of every kind to write with them.

``CONVERSATIONS`` have no two texts alike, so that where one ends up can be told from the text alone.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from chat import chat_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from extractor.data.conversation import Conversation

Message = dict[str, Any]
TWIN = "_training"
"""Ending of a template that TRL has given generation tags."""
_MARKS = re.compile(
    r"<[|｜][^<>|｜\s{}'\"]{1,40}[|｜]>|</?s>|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS)\]"
    r"|<(?:end|start)_of_(?:turn|utterance)>|<\|?(?:turn|channel|tool_call|tool_response)\|?>|</?think>|</?tool_call>"
)


@cache
def template_names() -> tuple[str, ...]:
    """Every template of the package, those with tags included."""
    return tuple(sorted(path.stem for path in _folder().glob("*.jinja")))


def _folder() -> Path:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "chat_templates"


@cache
def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with this template; the marks that the template writes are special tokens of it."""
    template = (_folder() / f"{name}.jinja").read_text()
    tokenizer = chat_tokenizer("qwen2", template)
    marks = sorted(set(_MARKS.findall(template)))
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks], special_tokens=True)
    tokenizer.bos_token = "<s>"
    return tokenizer


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def call(city: str, number: int = 0) -> Message:
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(content: str, number: int = 0) -> Message:
    return {"role": "tool", "content": content, "tool_call_id": f"call0000{number}", "name": "get_weather"}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "City"}},
                "required": ["city"],
            },
        },
    }
]
OSLO = assistant("", tool_calls=[call("Oslo")])
SUMS = [user("How much is two plus two?"), user("And three plus three?")]
CONVERSATIONS: dict[str, list[Message]] = {
    "single": [user("What is the capital of Norway?"), assistant("Oslo is the capital.")],
    "multi": [user("First question?"), assistant("First answer."), user("Second one?"), assistant("Last answer.")],
    "system": [{"role": "system", "content": "You are terse."}, user("Name a fjord."), assistant("Geiranger it is.")],
    "reasoning": [
        *(SUMS[0], assistant("Four exactly.", reasoning_content="Adding two numbers.")),
        *(SUMS[1], assistant("Six exactly.", reasoning_content="Adding again now.")),
    ],
    "think tags": [
        *(SUMS[0], assistant("<think>\nAdding two numbers.\n</think>\n\nFour exactly.")),
        *(SUMS[1], assistant("<think>\nAdding again now.\n</think>\n\nSix exactly.")),
    ],
    "tool call": [user("Weather in Oslo?"), OSLO, result("rainy, 7 degrees"), assistant("It rains in town.")],
    "then a question": [
        *(user("Weather in Oslo?"), OSLO, result("rainy, 7 degrees"), assistant("It rains in town.")),
        *(user("Thanks a lot."), assistant("Welcome indeed.")),
    ],
    "parallel calls": [
        *(user("Weather in Oslo and Rome?"), assistant("", tool_calls=[call("Oslo", 1), call("Rome", 2)])),
        *(result("rainy, 7 degrees", 1), result("sunny, 25 degrees", 2), assistant("Rain and sun.")),
    ],
    "null content": [
        *(user("Weather in Oslo?"), assistant(None, tool_calls=[call("Oslo")])),
        *(result("rainy, 7 degrees"), assistant("It rains in town.")),
    ],
    "ends in a call": [user("Weather in Oslo?"), OSLO],
}


def conversation(case: str) -> Conversation:
    """The conversation of this name, with tools where it calls one."""
    messages = CONVERSATIONS[case]
    return Conversation(messages=messages, tools=TOOLS if any("tool_calls" in m for m in messages) else None)
