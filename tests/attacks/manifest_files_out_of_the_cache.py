"""Files of the manifest that lie outside, to be hashed, moved or read."""

from __future__ import annotations

from pathlib import Path

from edit import change_manifest


def attack(cache: Path) -> None:
    def change(content: dict) -> None:
        (cache.parent / "outside" / "canary").write_text("secret")
        info = next(iter(content["files"].values()))
        content["files"] |= {"../outside/canary": info, "/etc/passwd": info, "target/../../outside/canary": info}

    change_manifest(cache, change)
