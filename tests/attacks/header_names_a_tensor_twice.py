"""Two entries of one name: two parsers may see two different files."""

from __future__ import annotations

import json
from pathlib import Path

from edit import change_header, shard


def attack(cache: Path) -> None:
    def twice(header: dict) -> str:
        text = json.dumps(header)
        return text[:-1] + ',"hidden_states":' + json.dumps(header["input_ids"]) + "}"

    change_header(shard(cache), twice)
