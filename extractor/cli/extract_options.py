"""The command line as an ExtractOptions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_format.errors import InputError
from extractor.cli.options import place

if TYPE_CHECKING:
    from cache_format.layout.follow_files import KeptWindow
    from extractor.config import DataOptions, ExtractOptions


def destination(out: Path | str, scratch: Path | None) -> dict[str, Any]:
    """``out`` and ``url`` of ExtractOptions."""
    from cache_format.writing.upload import scratch_folder

    where = place(str(out))
    if isinstance(where, str):
        return {"out": scratch_folder(where, scratch), "url": where}
    if scratch is not None:
        raise InputError("--scratch is for an --out that is a URL; a folder needs none")
    return {"out": where}


def data_sources(arguments: dict[str, Any]) -> tuple[DataOptions, ...]:
    """Each ``--data``. Of several, ``--split`` counts for those that have splits and do not name their own, and
    ``--data-config`` and ``--data-revision`` for those of the hub.

    Raises:
        InputError: one of these is given and counts for none.
    """
    from extractor.config import DataOptions, parse_data

    common = {name: arguments.get(name) for name in ("split", "data_config", "data_revision")}
    unused = {name for name, value in common.items() if value is not None}
    sources = []
    for text in arguments["data"]:
        name, split, weight = parse_data(text)
        takes = _takes(name) if len(arguments["data"]) > 1 else set(common)
        unused -= takes
        options = {option: value for option, value in common.items() if option in takes}
        options["split"] = split or options.get("split")
        sources.append(DataOptions(name=name, weight=weight, streaming=arguments.get("streaming", False), **options))
    if unused:
        option = min(unused)
        raise InputError(f"--{option.replace('_', '-')} {common[option]}: no source given with --data has any")
    return tuple(sources)


def _takes(name: str) -> set[str]:
    """The options that count for a source among several."""
    path = Path(name).expanduser()
    if not path.exists():
        return {"split", "data_config", "data_revision"}
    return {"split"} if (path / "dataset_dict.json").exists() else set()


def _window(keep: int | None, epochs: int | None) -> KeptWindow | None:
    from cache_format.layout.follow_files import KeptWindow

    if keep is None and epochs is not None:
        raise InputError("--epochs is for --keep; a whole cache serves any number of epochs")
    return None if keep is None else KeptWindow(keep=keep, epochs=epochs or 1)


def extract_options(arguments: dict[str, Any]) -> ExtractOptions:
    """The command line as an ExtractOptions."""
    from extractor.config import (
        ExtractOptions,
        PlanOptions,
        PrepareOptions,
        TargetOptions,
        parse_batch_tokens,
        parse_captures,
        parse_columns,
        parse_size,
    )
    from extractor.target.gguf_file import joined_name
    from extractor.target.layer_ids import parse_layer_ids

    def taken(*names: str) -> dict[str, Any]:
        return {name: arguments[name] for name in names if name in arguments}

    layers = arguments["target_layers"]
    return ExtractOptions(
        **destination(arguments["out"], arguments.get("scratch")),
        target=TargetOptions(
            name=joined_name(arguments["target"], arguments.get("gguf_file")),
            target_layer_ids=None if layers is None else tuple(parse_layer_ids(layers)),
            **taken("num_draft_layers", "dtype", "device", "attn_implementation", "revision", "trust_remote_code"),
            **taken(
                "device_map",
                "tp_plan",
                "compile",
                "deterministic",
                "adapter",
                "chat_template",
            ),
            **taken("experts_implementation", "backend", "tensor_parallel", "pipeline_parallel", "expert_parallel"),
        ),
        data=data_sources(arguments),
        prepare=PrepareOptions(
            columns=parse_columns(arguments.get("columns")),
            **taken(
                "turns",
                "chat_template_kwargs",
                "system_prompt",
                "template_date",
                "max_length",
                "too_long",
                "min_loss_tokens",
                "loss_on",
                "row_format",
                "on_bad_row",
                "limit",
            ),
        ),
        plan=PlanOptions(
            shard_bytes=parse_size(arguments["shard_size"]),
            batch_tokens=parse_batch_tokens(arguments["batch_tokens"]),
        ),
        capture=parse_captures(arguments["capture"]),
        keep=_window(arguments.get("keep"), arguments.get("epochs")),
        **taken("on_nonfinite", "profile", "codec", "strict_hardware"),
    )
