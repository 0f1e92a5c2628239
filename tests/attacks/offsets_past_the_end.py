"""A tensor that ends beyond the file, to read what is not its own."""

from __future__ import annotations

from pathlib import Path

from edit import change_header, shard


def attack(cache: Path) -> None:
    def beyond(header: dict) -> None:
        header["loss_mask"]["data_offsets"][1] += 1 << 40
        header["loss_mask"]["shape"][0] += 1 << 40

    change_header(shard(cache), beyond)
