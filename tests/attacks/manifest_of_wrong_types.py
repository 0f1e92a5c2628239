"""Every field of the manifest of another type, its checksum right."""

from __future__ import annotations

from pathlib import Path

from edit import change_manifest


def attack(cache: Path) -> None:
    def change(content: dict) -> None:
        for name in content:
            if name not in ("format", "format_version"):
                content[name] = [content[name]]

    change_manifest(cache, change)
