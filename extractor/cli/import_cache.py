"""import: another project's offline cache becomes one of ours."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from extractor import config
from extractor.cli.command_line import this_command
from extractor.cli.options import Debug, Device, Json, ShardSize, Target, TrustRemoteCode, folder
from extractor.cli.output import show
from extractor.terminal.progress import say


def import_cache(
    source: Annotated[
        Path, typer.Argument(help="Folder of the other project's files; it stays as it is.", metavar="DIR")
    ],
    peer: Annotated[config.ImportLayout, typer.Option("--from", help="Who wrote them.", show_default=False)],
    target: Target,
    out: Annotated[
        Any,
        typer.Option(help="Folder of the cache: new, or begun by the same command.", parser=folder, show_default=False),
    ],
    target_layers: Annotated[
        str | None,
        typer.Option(
            help="Decoder layers whose states the files hold, in their order, counted from 0, such as 1,9,17. deepspec "
            "says itself; of speculators the last one is the target's last.",
            show_default=False,
        ),
    ] = None,
    last_layer: Annotated[
        config.LastLayer | None,
        typer.Option(
            help="Where the target's last decoder layer is among them: were its states taken before or after the final "
            "norm? After it they become last_hidden_states.",
            show_default=False,
        ),
    ] = None,
    recompute: Annotated[
        int,
        typer.Option(min=1, help="Samples to run the target on and compare, after the first shard and at the end."),
    ] = 8,
    unchecked: Annotated[
        bool,
        typer.Option("--unchecked", help="Do not compare: nobody then knows whether these are that target's states."),
    ] = False,
    shard_size: ShardSize = "512MiB",
    threads: Annotated[
        int, typer.Option(min=1, help="Shards worked on at a time; each takes memory for two shards.")
    ] = 2,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a cache of another project's offline cache, its states bit for bit. The same command again resumes it.

    Embeddings, norm, config and tokenizer are taken from the target, as extract stores them. What a layout does not say
    (which layers, and whether the last one is normed) is asked for. No pickle is executed: of torch.save's files plain
    tensors are read. extract refuses to go on with such a cache; verify, recode, export and a trainer take it as any.

    Example: dflash-cache import old --from deepspec --target Qwen/Qwen3-8B --out new
    """
    from extractor.config import PlanOptions, parse_size
    from extractor.job.import_cache import ImportOptions
    from extractor.job.import_cache import import_cache as run_import
    from extractor.target.layer_ids import parse_layer_ids

    report = run_import(
        ImportOptions(
            peer=peer,
            source=source,
            out=out,
            target=target,
            target_layer_ids=None if target_layers is None else tuple(parse_layer_ids(target_layers)),
            last_layer=last_layer,
            plan=PlanOptions(shard_bytes=parse_size(shard_size)),
            threads=threads,
            device=device,
            trust_remote_code=trust_remote_code,
            recompute=0 if unchecked else recompute,
            command=this_command(),
        )
    )
    if as_json:
        show(json.dumps(asdict(report)))
        return
    last = " and last_hidden_states" if report.last_hidden_states else ""
    say(
        f"{out}: complete, {report.samples:,} samples, {report.tokens:,} tokens, {report.shards:,} shards "
        f"({report.done_shards:,} were there); layers {report.target_layer_ids}{last}"
    )
    if unchecked:
        say(
            "unchecked: nobody has compared these states with the target's; "
            f"dflash-cache verify {out} --recompute 8 --target {target} does"
        )
    elif report.recompute is not None:
        say(
            f"recomputed {report.recompute.samples:,} samples with the target: no token is off by more than "
            f"{report.recompute.largest_error:.2g} of its norm in any layer"
        )
