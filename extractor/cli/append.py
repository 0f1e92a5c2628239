"""append: new rows for a finished cache, as a further cache beside it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from extractor.cli.command_line import this_command
from extractor.cli.extract_options import data_sources
from extractor.cli.option_groups import DataGroup, TokenizerGroup, flat
from extractor.cli.options import (
    Adapter,
    Debug,
    Device,
    DeviceMap,
    Devices,
    Experts,
    Json,
    StrictHardware,
    TpPlan,
    folder,
)
from extractor.terminal.progress import say


def append(
    cache: Annotated[
        Any,
        typer.Argument(help="Folder of the finished cache, or of the collection that it is in.", parser=folder),
    ],
    tokenizer: TokenizerGroup,
    data: DataGroup,
    out: Annotated[
        Any,
        typer.Option(
            help="Folder of the further cache, beside the first: new, or begun by the same command.",
            parser=folder,
            show_default=False,
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of the target. Default: where it was for the first.", show_default=False),
    ] = None,
    device: Device = "auto",
    devices: Devices = None,
    device_map: DeviceMap = None,
    tp_plan: TpPlan = None,
    experts_implementation: Experts = None,
    adapter: Adapter = None,
    strict_hardware: StrictHardware = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Extract new rows as an earlier job did, into a further cache; a collection.json beside both opens them as one.

    No file of the first cache is touched. Layers, dtype, masks, lengths and all else that it was made with are taken
    from its manifest; another target, tokenizer or chat template is refused. The same command again resumes it.

    Example: dflash-cache append /data/chat --data new.jsonl --out /data/chat-2
    """
    given = flat(locals())
    from cache_format.layout.manifest import Manifest
    from extractor.cli.run_job import Cluster, run_job
    from extractor.config import PrepareOptions, TargetOptions, parse_columns
    from extractor.job.append import add_to_collection, first_cache, options_like, require_place_in_collection
    from extractor.job.report import ExtractReport
    from extractor.target.gguf_file import joined_name

    first = first_cache(cache)
    require_place_in_collection(first, out)
    stored = Manifest.read(first)
    where = (
        *("device", "device_map", "tp_plan", "adapter", "revision", "trust_remote_code", "chat_template"),
        "experts_implementation",
    )
    options = options_like(
        stored,
        target=TargetOptions(
            name=joined_name(target or stored.target.name, given["gguf_file"]), **{name: given[name] for name in where}
        ),
        prepare=PrepareOptions(
            columns=parse_columns(data.columns),
            row_format=data.row_format,
            limit=data.limit,
            on_bad_row=data.on_bad_row,
        ),
        out=out,
        data=data_sources(given),
        append_to=first,
        strict_hardware=strict_hardware,
        command=this_command(),
    )

    def list_it(report: ExtractReport) -> None:
        if report.complete:
            say(f"{add_to_collection(first, out)}: lists it; FeatureCache.open({str(first.parent)!r}) reads all")

    run_job(options, devices=devices, cluster=Cluster(), as_json=as_json, then=list_it)
