"""The command line as an ExtractOptions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_format.errors import InputError
from extractor.cli.options import place

if TYPE_CHECKING:
    from extractor.config import ExtractOptions


def destination(out: Path | str, scratch: Path | None) -> dict[str, Any]:
    """``out`` and ``url`` of ExtractOptions."""
    from cache_format.writing.upload import scratch_folder

    where = place(str(out))
    if isinstance(where, str):
        return {"out": scratch_folder(where, scratch), "url": where}
    if scratch is not None:
        raise InputError("--scratch is for an --out that is a URL; a folder needs none")
    return {"out": where}


def extract_options(arguments: dict[str, Any]) -> ExtractOptions:
    """The command line as an ExtractOptions."""
    from extractor.config import (
        DataOptions,
        ExtractOptions,
        PlanOptions,
        PrepareOptions,
        TargetOptions,
        parse_batch_tokens,
        parse_captures,
        parse_columns,
        parse_size,
    )
    from extractor.target.layer_ids import parse_layer_ids

    def taken(*names: str) -> dict[str, Any]:
        return {name: arguments[name] for name in names if name in arguments}

    layers = arguments["target_layers"]
    return ExtractOptions(
        **destination(arguments["out"], arguments.get("scratch")),
        target=TargetOptions(
            name=arguments["target"],
            target_layer_ids=None if layers is None else tuple(parse_layer_ids(layers)),
            **taken("num_draft_layers", "dtype", "device", "attn_implementation", "revision", "trust_remote_code"),
            **taken("device_map", "tp_plan", "compile", "deterministic", "adapter"),
        ),
        data=DataOptions(name=arguments["data"], **taken("split", "data_revision", "streaming")),
        prepare=PrepareOptions(
            columns=parse_columns(arguments.get("columns")),
            **taken("max_length", "too_long", "min_loss_tokens", "loss_on", "row_format", "on_bad_row", "limit"),
        ),
        plan=PlanOptions(
            shard_bytes=parse_size(arguments["shard_size"]),
            batch_tokens=parse_batch_tokens(arguments["batch_tokens"]),
        ),
        capture=parse_captures(arguments["capture"]),
        **taken("on_nonfinite", "profile", "codec", "strict_hardware"),
    )
