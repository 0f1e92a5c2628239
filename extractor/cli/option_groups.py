"""Options that preview, estimate, extract and append have in common, listed once: a command takes a group as one
parameter, and ``spread`` makes its fields options of the command.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, get_type_hints

from extractor.cli.options import (
    BatchTokens,
    Capture,
    ChatTemplate,
    ChatTemplateKwargs,
    Codec,
    Columns,
    ConfigFile,
    Data,
    DataConfig,
    DataRevision,
    Device,
    Dtype,
    GgufFile,
    Limit,
    LogFile,
    LossOn,
    MaxLength,
    MinLossTokens,
    NumDraftLayers,
    OnBadRow,
    Quiet,
    Revision,
    RowFormat,
    ShardSize,
    Split,
    Streaming,
    SystemPrompt,
    TargetLayers,
    TemplateDate,
    TooLong,
    TrustRemoteCode,
    Turns,
    Verbose,
)
from extractor.terminal.others import hush_others
from extractor.terminal.voice import Voice, speak


@dataclass(frozen=True, kw_only=True)
class TokenizerGroup:
    """How the target's configuration and tokenizer are found."""

    gguf_file: GgufFile = None
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    chat_template: ChatTemplate = None


@dataclass(frozen=True, kw_only=True)
class DataGroup:
    """Which rows."""

    data: Data
    split: Split = None
    data_config: DataConfig = None
    data_revision: DataRevision = None
    streaming: Streaming = False
    limit: Limit = None
    on_bad_row: OnBadRow = "fail"
    row_format: RowFormat = None
    columns: Columns = None


@dataclass(frozen=True, kw_only=True)
class SamplesGroup:
    """How rows become samples."""

    loss_on: LossOn = None
    turns: Turns = "all"
    chat_template_kwargs: ChatTemplateKwargs = None
    system_prompt: SystemPrompt = None
    template_date: TemplateDate = None
    max_length: MaxLength = 4096
    too_long: TooLong = "truncate"
    min_loss_tokens: MinLossTokens = 1


@dataclass(frozen=True, kw_only=True)
class StatesGroup:
    """What is stored of each token, and how."""

    target_layers: TargetLayers = None
    num_draft_layers: NumDraftLayers = 5
    capture: Capture = field(default_factory=list)
    dtype: Dtype = "auto"
    codec: Codec = "raw"
    shard_size: ShardSize = "512MiB"
    device: Device = "auto"
    batch_tokens: BatchTokens = "8192"


@dataclass(frozen=True, kw_only=True)
class CommonGroup:
    """Of every command; ``spread`` adds them."""

    config: ConfigFile = None
    quiet: Quiet = False
    verbose: Verbose = False
    log_file: LogFile = None


GROUPS = (TokenizerGroup, DataGroup, SamplesGroup, StatesGroup)


def flat(given: dict[str, Any]) -> dict[str, Any]:
    """A command's parameters by the name of the option, those of its groups among them."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        options |= vars(value) if isinstance(value, GROUPS) else {name: value}
    return options


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, with the fields of each parameter that is a group as options of their own in its signature, and the
    options that every command has.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {name: p.annotation for name, p in signature.parameters.items() if p.annotation in GROUPS}
    options: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        group = groups.get(parameter.name)
        options += [_as_option(group, one) for one in fields(group)] if group else [parameter]
    options += [_as_option(CommonGroup, one) for one in fields(CommonGroup)]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        common = {f.name: given.pop(f.name) for f in fields(CommonGroup)}
        voice = Voice(quiet=common["quiet"], verbose=common["verbose"], log_file=common["log_file"])
        speak(voice)
        hush_others(voice)
        taken = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**taken, **given)

    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    )
    return run


def _as_option(group: type, one: Field[Any]) -> inspect.Parameter:
    default = inspect.Parameter.empty
    if one.default is not MISSING:
        default = one.default
    elif one.default_factory is not MISSING:
        default = one.default_factory()
    annotation = get_type_hints(group, include_extras=True)[one.name]
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
