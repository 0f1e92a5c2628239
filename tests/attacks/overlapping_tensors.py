"""Two tensors that share their bytes."""

from __future__ import annotations

from pathlib import Path

from edit import change_header, shard


def attack(cache: Path) -> None:
    def overlap(header: dict) -> None:
        header["loss_mask"]["data_offsets"] = header["attention_mask"]["data_offsets"]

    change_header(shard(cache), overlap)
