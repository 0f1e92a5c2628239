"""estimate: what an extraction will take, before it is begun."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from extractor.cli.extract_options import extract_options
from extractor.cli.options import (
    BatchTokens,
    Capture,
    ChatTemplate,
    ChatTemplateKwargs,
    Codec,
    Columns,
    Data,
    DataConfig,
    DataRevision,
    Debug,
    Device,
    Dtype,
    Json,
    Limit,
    LossOn,
    MaxLength,
    MinLossTokens,
    NumDraftLayers,
    OnBadRow,
    Revision,
    RowFormat,
    ShardSize,
    Split,
    Streaming,
    SystemPrompt,
    Target,
    TargetLayers,
    TemplateDate,
    TooLong,
    TrustRemoteCode,
    Turns,
)
from extractor.cli.output import show


def estimate(
    target: Target,
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Folder whose disk is looked at for free space.")] = None,
    target_layers: TargetLayers = None,
    num_draft_layers: NumDraftLayers = 5,
    capture: Capture = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    split: Split = None,
    data_config: DataConfig = None,
    data_revision: DataRevision = None,
    streaming: Streaming = False,
    limit: Limit = None,
    on_bad_row: OnBadRow = "fail",
    row_format: RowFormat = None,
    columns: Columns = None,
    loss_on: LossOn = None,
    turns: Turns = "all",
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    system_prompt: SystemPrompt = None,
    template_date: TemplateDate = None,
    max_length: MaxLength = 4096,
    too_long: TooLong = "truncate",
    min_loss_tokens: MinLossTokens = 1,
    codec: Codec = "raw",
    shard_size: ShardSize = "512MiB",
    batch_tokens: BatchTokens = "8192",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bytes, shards and tokens of a cache, from the data and the target's config; no weights are loaded.

    Up to 10,000 rows are tokenised; larger data is estimated from rows spread evenly over it.
    """
    from extractor.job.estimate import describe
    from extractor.job.estimate import estimate as run_estimate

    result = run_estimate(extract_options({**locals(), "out": out or Path.cwd()}))
    if as_json:
        show(json.dumps(asdict(result)))
    else:
        show(describe(result))
