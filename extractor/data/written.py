"""Whether the text of an assistant's turn holds what the row's message says."""

from __future__ import annotations

from extractor.data.chat_template import answer_of, content_text, function_of
from extractor.data.conversation import Message

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""where rows keep what the assistant thought before it answered"""


class NotDerivable(Exception):
    """Why a turn's learned stretch cannot be told exactly."""


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
    thoughts = [str(message[key]) for key in _THOUGHTS if message.get(key)]
    content = content_text(message)
    if "</think>" in content:
        thoughts.append(content.rsplit("</think>", 1)[0].rsplit("<think>", 1)[-1])
    return any(thought.strip() not in body for thought in thoughts)
