"""Options that several commands have: name, help and type of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cache_format.errors import InputError
from extractor import config
from extractor.cli.command import take_config
from extractor.cli.shown import PANELS

_TARGET, _DATA, _SAMPLES, _STATES, _SPEED, _JOB = PANELS

Target = Annotated[
    str,
    typer.Option(
        help="Hub id or local folder of the target LLM, or a .gguf file.", rich_help_panel=_TARGET, show_default=False
    ),
]
GgufFile = Annotated[
    str | None,
    typer.Option(
        help="Which .gguf file of the folder or repository --target; its weights are dequantised.",
        rich_help_panel=_TARGET,
        show_default=False,
    ),
]
Data = Annotated[
    list[str],
    typer.Option(
        help="A .jsonl, .json (also .gz, .zst, .bz2) or .parquet file, a folder of them, a folder saved by datasets, "
        "or a hub id. Rows hold messages, a prompt and a response, preferences, text, or ids: extractor/data/DATA.md. "
        "Give it again for more sources, in this order; :SPLIT and :WEIGHT may follow a name, as in chat.jsonl:0.5 "
        "(always the same half of the rows) or owner/name:train_sft:0.1.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]
TargetLayers = Annotated[
    str | None,
    typer.Option(
        help="Decoder layers to capture, such as 1,9,17,25,33; layer i's output is hidden_states\\[i + 1] of "
        "transformers. Default: the layers DFlash publishes for --num-draft-layers.",
        rich_help_panel=_STATES,
        show_default=False,
    ),
]
NumDraftLayers = Annotated[
    int,
    typer.Option(min=1, help="Layers of the draft; one target layer is captured for each.", rich_help_panel=_STATES),
]
Dtype = Annotated[
    config.Dtype,
    typer.Option(
        help="float32, bfloat16 or float16, of the weights and of the stored states; auto: bfloat16 on CUDA, float32 "
        "on the CPU.",
        rich_help_panel=_STATES,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_SPEED)]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Attention kernel of transformers, such as sdpa or flash_attention_2. Default: what it picks.",
        rich_help_panel=_SPEED,
        show_default=False,
    ),
]
Experts = Annotated[
    config.ExpertsImplementation | None,
    typer.Option(
        help="How transformers computes the experts of a mixture: eager, batched_mm or grouped_mm. Default: what it "
        "picks.",
        rich_help_panel=_SPEED,
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub target.", rich_help_panel=_TARGET, show_default=False)
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a LoRA adapter to put beside the target's weights (pip install 'dflash-cache\\[adapter]').",
        rich_help_panel=_TARGET,
        show_default=False,
    ),
]
StrictHardware = Annotated[
    bool,
    typer.Option(
        "--strict-hardware",
        help="Refuse to go on with a cache that was begun with other hardware or software, instead of a warning: "
        "states are the same to the byte on the same kind of processor, device and packages only.",
        rich_help_panel=_JOB,
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the target.", rich_help_panel=_TARGET)
]
Split = Annotated[
    str | None,
    typer.Option(help="Split of a saved or hub dataset, such as train.", rich_help_panel=_DATA, show_default=False),
]
DataConfig = Annotated[
    str | None,
    typer.Option(help="Configuration of a hub dataset, such as main.", rich_help_panel=_DATA, show_default=False),
]
DataRevision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub dataset.", rich_help_panel=_DATA, show_default=False),
]
Streaming = Annotated[
    bool,
    typer.Option("--streaming", help="Read rows as they come instead of downloading first.", rich_help_panel=_DATA),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Only the first N rows: a trial run.", rich_help_panel=_DATA, show_default=False),
]
OnBadRow = Annotated[
    config.OnBadRow,
    typer.Option(help="fail at a malformed row, naming it, or skip and count it.", rich_help_panel=_DATA),
]
RowFormat = Annotated[
    config.RowFormat | None,
    typer.Option(
        help="messages, conversations, prompt-response, preference, text or input_ids. Default: told from the columns.",
        rich_help_panel=_SAMPLES,
        show_default=False,
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="What the data calls what a row holds, such as prompt=instruction,response=output,system=persona; the "
        "rest is told from the names. Fields: messages, prompt, input, response, chosen, system, tools, text, "
        "input_ids, ... (extractor/data/DATA.md).",
        rich_help_panel=_SAMPLES,
        show_default=False,
    ),
]
LossOn = Annotated[
    config.LossOn | None,
    typer.Option(
        help="assistant: the assistant's tokens, end-of-turn included; all: every token; column: the loss_mask or "
        "labels of pre-tokenised rows. Default: column for input_ids rows, else assistant.",
        rich_help_panel=_SAMPLES,
        show_default=False,
    ),
]
Turns = Annotated[
    config.Turns,
    typer.Option(
        help="all: a conversation is one sample, every assistant turn learned as it is rendered there. last: only the "
        "last one is learned. each: a sample for every assistant turn, its context exactly the prompt that the target "
        "would see; for templates that leave earlier reasoning out.",
        rich_help_panel=_SAMPLES,
    ),
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(
        help="File with a chat template (Jinja) to use in place of the tokenizer's own.",
        rich_help_panel=_SAMPLES,
        show_default=False,
    ),
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        help="JSON object of variables for the chat template, such as '{\"enable_thinking\": false}'. A row's own "
        "chat_template_kwargs come first.",
        rich_help_panel=_SAMPLES,
        show_default=False,
    ),
]
SystemPrompt = Annotated[
    str | None,
    typer.Option(help="System message for conversations that have none.", rich_help_panel=_SAMPLES, show_default=False),
]
TemplateDate = Annotated[
    str | None,
    typer.Option(
        help="The date that a chat template writes if it asks for one, as YYYY-MM-DD; kept for the whole cache. "
        "Default: the day on which the cache is begun.",
        rich_help_panel=_SAMPLES,
        show_default=False,
    ),
]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of the longest sample.", rich_help_panel=_SAMPLES)]
TooLong = Annotated[
    config.TooLong,
    typer.Option(
        help="truncate longer samples to their first --max-length tokens, or drop them.", rich_help_panel=_SAMPLES
    ),
]
MinLossTokens = Annotated[
    int,
    typer.Option(
        min=0,
        help="Drop samples with fewer learned tokens than this. A draft is trained on blocks that start at learned "
        "tokens, so a sample without one teaches nothing; SpecForge asks for twice the block_size (32 for blocks "
        "of 16).",
        rich_help_panel=_SAMPLES,
    ),
]
Capture = Annotated[
    list[str],
    typer.Option(
        help="Beside hidden_states: last_hidden_states (what the LM head takes; DSpark) or logits-topk=K (the K "
        "largest logits and the log-sum-exp; JetSpec). May be given twice. The whole target is then run.",
        rich_help_panel=_STATES,
        show_default=False,
    ),
]
ShardSize = Annotated[str, typer.Option(help="Largest shard file, counted before the codec.", rich_help_panel=_STATES)]
BatchTokens = Annotated[
    str,
    typer.Option(
        help="Tokens of one forward pass, padding included: memory against speed. auto: the most that fit the device, "
        "found by trying once and kept for the whole cache.",
        rich_help_panel=_SPEED,
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="Several devices of this machine, a worker process each: all, or a list such as cuda:0,cuda:1 or cpu,cpu. "
        "The same bytes as with one.",
        rich_help_panel=_SPEED,
        show_default=False,
    ),
]
Engine = Annotated[
    config.Engine,
    typer.Option(
        help="local: this process, --devices, torchrun or srun. ray: actors of a Ray cluster whose nodes all see the "
        "data, the target and an --out that is a folder under the same paths (pip install 'dflash-cache\\[ray]').",
        rich_help_panel=_SPEED,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="With --engine ray: auto (the cluster that this node is of) or host:port. Default: RAY_ADDRESS, or a "
        "cluster of this machine alone.",
        rich_help_panel=_SPEED,
        show_default=False,
    ),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With --engine ray: actors, each with the target. More than there is room for make an autoscaling cluster "
        "grow. Default: what it has room for at the start; without GPUs, one a node.",
        rich_help_panel=_SPEED,
        show_default=False,
    ),
]
GpusPerWorker = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="With --engine ray: GPUs of each actor; more than one needs --device-map auto. Default: 1, or 0 with "
        "--device cpu; with --backend vllm those of an engine.",
        rich_help_panel=_SPEED,
        show_default=False,
    ),
]
DeviceMap = Annotated[
    config.DeviceMap | None,
    typer.Option(
        help="Divide a target that is too large for one device over all of them, layer by layer; the ways are "
        "accelerate's, and auto is what one wants.",
        rich_help_panel=_SPEED,
        show_default=False,
    ),
]
TpPlan = Annotated[
    config.TpPlan | None,
    typer.Option(
        help="auto: divide each layer of a target that is too large for one device over all processes of torchrun "
        "(tensor parallelism); the states round differently.",
        rich_help_panel=_SPEED,
        show_default=False,
    ),
]
Backend = Annotated[
    config.Backend,
    typer.Option(
        help="Who computes the states. vllm: for targets that only a serving engine can hold (quantised, hundreds of "
        "billions of parameters, several nodes); pip install 'dflash-cache\\[vllm]'. A cache begun with one is not "
        "resumed with the other.",
        rich_help_panel=_SPEED,
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(min=1, help="With --backend vllm: devices that each layer is divided over.", rich_help_panel=_SPEED),
]
PipelineParallel = Annotated[
    int,
    typer.Option(min=1, help="With --backend vllm: stages that the layers are divided into.", rich_help_panel=_SPEED),
]
ExpertParallel = Annotated[
    bool,
    typer.Option(
        "--expert-parallel",
        help="Whole experts of a mixture in each process of --tp-plan, or with --backend vllm on each device of "
        "--tensor-parallel, instead of a part of each.",
        rich_help_panel=_SPEED,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="torch.compile the decoder layers. Pays on long jobs; the states round differently.",
        rich_help_panel=_SPEED,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Only kernels that give the same bits every time; an operation without one is an error.",
        rich_help_panel=_SPEED,
    ),
]
OnNonfinite = Annotated[
    config.OnNonfinite,
    typer.Option(
        help="Where the target gives NaN or Inf: fail, naming sample and layer, or quarantine: leave the sample out "
        "and list it.",
        rich_help_panel=_STATES,
    ),
]
Codec = Annotated[
    str,
    typer.Option(
        help="How hidden states are stored. raw: as they are, read without a copy. zbits: lossless, about 0.67 of "
        "bfloat16. fp8: float8 with a scale for each token and layer, 0.50 of bfloat16, SNR about 34 dB. quant: "
        "quantised and entropy-coded, about 0.28, 30 dB; quant:fine about 0.35, 37 dB; or any SNR, quant:34dB.",
        metavar="raw|zbits|fp8|quant[:fine|:NUMBERdB]",
        rich_help_panel=_STATES,
    ),
]


Keep = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Keep this many shards on the disk, for a trainer that follows (FeatureCache.open(OUT, follow=True)): "
        "shards that it has read are removed, the next are made.",
        rich_help_panel=_JOB,
        show_default=False,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With --keep: how often all shards are made, one epoch after the other. Default: once.",
        rich_help_panel=_JOB,
        show_default=False,
    ),
]


def place(text: str) -> Path | str:
    """A folder, or a checked URL."""
    from cache_format.storage.store import is_url, parse_url

    return parse_url(text) if is_url(text) else Path(text)


def folder(text: str) -> Path:
    """A folder, not a URL."""
    where = place(text)
    if isinstance(where, str):
        raise InputError(
            f"{where}: this command writes to a local folder; a finished cache or export is plain files, which the "
            "store's own tool can upload (aws s3 sync, gcloud storage rsync)"
        )
    return where


def one_cache(text: str) -> Path | str:
    """As :func:`place`, and not a collection of several caches."""
    where = place(text)
    if isinstance(where, Path) and ((where / "collection.json").is_file() or where.suffix == ".json"):
        from cache_format.layout.collection import collection_at

        if listed := collection_at(where):
            raise InputError(f"{where}: lists {len(listed)} caches; name one of them: {', '.join(map(str, listed))}")
    return where


Cache = Annotated[
    Any, typer.Argument(help="Folder or URL of the cache.", parser=place, metavar="CACHE", show_default=False)
]
OneCache = Annotated[
    Any, typer.Argument(help="Folder or URL of the cache.", parser=one_cache, metavar="CACHE", show_default=False)
]
"""Where several at once make no sense."""
Scratch = Annotated[
    Path | None,
    typer.Option(
        help="With a URL: local folder in which files are made before they are uploaded; it holds the prepared "
        "samples and a few shards. Default: below the system's temporary folder, the same for a rerun.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Report as JSON on stdout.", rich_help_panel=_JOB)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_JOB)]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with options of this command, such as max-length: 2048; the command line wins.",
        rich_help_panel=_JOB,
        show_default=False,
        is_eager=True,
        callback=take_config,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Say only errors and warnings; no progress.", rich_help_panel=_JOB)
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="A line of progress every 5 seconds instead of every minute where there is no terminal, and what "
        "transformers and datasets have to say.",
        rich_help_panel=_JOB,
    ),
]
LogFile = Annotated[
    Path | None,
    typer.Option(
        help="Add all that is said to this file, with the time; also with --quiet.",
        rich_help_panel=_JOB,
        show_default=False,
    ),
]
