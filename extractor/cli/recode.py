"""recode: a copy of a cache with another codec."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from cache_format.errors import CacheError, InputError
from extractor import config
from extractor.cli.command_line import this_command
from extractor.cli.extract_options import destination
from extractor.cli.options import Debug, Json, OneCache, Scratch, place
from extractor.cli.output import show
from extractor.terminal.progress import Reporter, say, size


def recode(
    cache: OneCache,
    out: Annotated[
        Any,
        typer.Argument(
            help="Folder or URL of the copy: new, or begun by the same command.", parser=place, metavar="OUT"
        ),
    ],
    codec: Annotated[
        str,
        typer.Option(
            help="zbits: lossless, about 0.67 of bfloat16. fp8: 0.50, SNR about 34 dB. quant: about 0.28, 30 dB; "
            "quant:fine about 0.35, 37 dB; or any SNR, quant:34dB.",
            metavar="raw|zbits|fp8|quant[:fine|:NUMBERdB]",
            show_default=False,
        ),
    ],
    threads: Annotated[
        int, typer.Option(min=1, help="Shards worked on at a time; each takes memory for two shards.")
    ] = 2,
    scratch: Scratch = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Copy a cache with another codec, without its target; the cache itself stays as it is.

    Each sample's checksum is checked as it is read. The same command again resumes. The copy is the cache that extract
    would have made with that --codec, so the same extract command can mend it.

    Example: dflash-cache recode /data/cache /data/cache-fp8 --codec fp8
    """
    from cache_format import FeatureCache
    from cache_format.storage.folder import shard_bytes
    from cache_format.upkeep.recode import recode as run_recode
    from cache_format.upkeep.recode_to_store import recode_to_store

    config.require_codec(codec)
    try:
        source = FeatureCache.open(cache, verify="sample")
    except CacheError as error:
        raise InputError(str(error)) from error
    total = shard_bytes(cache)
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        reporter.update(done)

    where, command = destination(out, scratch), this_command()
    with Reporter("recode", total, "bytes") as reporter:
        if "url" in where:
            report = recode_to_store(
                source, where["url"], where["out"], codec, threads=threads, progress=count, tell=say, command=command
            )
        else:
            report = run_recode(source, where["out"], codec, threads=threads, progress=count, command=command)
    if as_json:
        show(json.dumps(asdict(report)))
        return
    say(f"{out}: complete, {report.shards:,} shards made, {report.done_shards:,} were there")
    say(f"{size(report.bytes_before)} -> {size(report.bytes)}; states {100 * report.ratio:.1f} % of raw")
    if report.median_snr_db:
        pairs = zip(report.median_snr_db, report.worst_snr_db, strict=True)
        say(f"SNR by layer, median and worst token: {', '.join(f'{median} and {worst} dB' for median, worst in pairs)}")
