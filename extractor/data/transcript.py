"""Conversations written down as one text with a marker before each turn -> turns.

The kinds are those of published data: ``\\n\\nHuman: ...\\n\\nAssistant: ...`` (Anthropic), ``USER: ... ASSISTANT: ...
FUNCTION RESPONSE: ...`` (Glaive), ``### Human: ...### Assistant: ...`` (Guanaco).
"""

from __future__ import annotations

import re
from typing import Any

_KINDS = (
    (re.compile(r"(?:\A|\n\n)(Human|Assistant|System):[ \n]?"), "Human"),
    (re.compile(r"(?:\A\s*|\n\s*)(USER|ASSISTANT|FUNCTION RESPONSE|SYSTEM): ?"), "USER"),
    (re.compile(r"(?:\A\s*|\n?)### (Human|Assistant|System): ?"), "Human"),
)
_OPEN = re.compile(r"(?:\A\s*|\n\s*)(Human|Assistant|System|User)[:：] ?")
"""markers behind one newline, which a text may hold by chance: taken where it ends in the assistant's (BELLE)"""
_OPEN_KINDS = ((_OPEN, "Human"), (_OPEN, "User"))
_ROLES = {
    **dict.fromkeys(("Human", "USER", "User"), "user"),
    **dict.fromkeys(("Assistant", "ASSISTANT"), "assistant"),
    **dict.fromkeys(("System", "SYSTEM"), "system"),
    "FUNCTION RESPONSE": "tool",
}
_ENDS_OPEN = re.compile(r"\n\s*Assistant[:：]\s*\Z")
_END = re.compile(r"\s*<\|endoftext\|>\s*\Z")
_CALL = re.compile(
    r"""<functioncall>\s*\{\s*"name":\s*"(?P<name>[^"]*)",\s*"arguments":\s*(?P<quote>'?)(?P<arguments>.*)"""
    r"""(?P=quote)\s*\}\s*\Z""",
    re.DOTALL,
)


def turns_of_transcript(text: str) -> list[dict[str, Any]] | None:
    """Turns with ``role`` and ``content``; None where ``text`` does not begin with the marker of a turn.

    White space around a turn is the transcript's, not the speaker's. A prompt's empty last answer is left out.
    """
    is_open = _ENDS_OPEN.search(text) and "\n\nHuman:" not in text and "\n\nAssistant:" not in text
    for markers, asker in (*_OPEN_KINDS, *_KINDS) if is_open else _KINDS:
        first = markers.match(text)
        if first is None or (first[1] != asker and _ROLES[first[1]] != "system"):
            continue
        found = list(markers.finditer(text))
        ends = [match.start() for match in found[1:]] + [len(text)]
        turns = [_turn(_ROLES[m[1]], text[m.end() : end]) for m, end in zip(found, ends, strict=True)]
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    return None


def _turn(role: str, text: str) -> dict[str, Any]:
    content = _END.sub("", text).strip()
    call = _CALL.search(content) if role == "assistant" else None
    if call is None:
        return {"role": role, "content": content}
    arguments = call["arguments"].replace("\\'", "'") if call["quote"] else call["arguments"]
    function = {"name": call["name"], "arguments": arguments}
    return {
        "role": role,
        "content": content[: call.start()].strip(),
        "tool_calls": [{"type": "function", "function": function}],
    }
