"""The options of an extraction: frozen, validated once, then passed along whole.

Nothing heavy is imported here: a wrong option is refused before torch is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cache_format.errors import InputError
from cache_format.layout.captures import Captures
from cache_format.layout.follow_files import KeptWindow

if TYPE_CHECKING:
    from cache_format.layout.manifest import CommandLine

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Codec = Literal["raw", "zbits", "fp8", "quant"]
RowFormat = Literal["messages", "conversations", "prompt-response", "preference", "input_ids", "text"]
LossOn = Literal["assistant", "all", "column"]
Turns = Literal["all", "last", "each"]
TooLong = Literal["truncate", "drop"]
OnBadRow = Literal["fail", "skip"]
OnNonfinite = Literal["fail", "quarantine"]
Engine = Literal["local", "ray"]
TpPlan = Literal["auto"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
ExpertsImplementation = Literal["eager", "batched_mm", "grouped_mm"]
Backend = Literal["transformers", "vllm"]
ExportLayout = Literal["specforge", "speculators", "modelopt", "deepspec", "nemo-dspark", "angelslim"]
ImportLayout = Literal["deepspec", "specforge", "speculators", "modelopt", "angelslim"]
LastLayer = Literal["pre-norm", "post-norm"]

FIELDS = (
    *("messages", "prompt", "input", "response", "calls", "chosen", "rejected", "history", "system", "tools"),
    *("reasoning_content", "label", "documents", "chat_template_kwargs", "text", "input_ids", "loss_mask", "labels"),
)
"""What a row can hold for us, whatever the data calls it; --columns says so."""

NOT_FOR_TEMPLATES = frozenset(
    (
        *("messages", "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt"),
        *("return_dict", "continue_final_message", "return_tensors", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "strftime_now"),
    )
)
"""What the one who renders decides, not the variables of a chat template."""
DEFAULT_BATCH_TOKENS = 8192

_VLLM_INSTEAD = {
    "device_map": "vLLM divides a target by --tensor-parallel and --pipeline-parallel",
    "tp_plan": "vLLM divides a target by --tensor-parallel, without torchrun",
    "compile": "vLLM has kernels of its own",
    "deterministic": "vLLM's own way is VLLM_BATCH_INVARIANT=1, where its build has it",
    "adapter": "save the target with it merged in",
    "attn_implementation": "vLLM picks its own kernel, which the manifest names",
    "experts_implementation": "vLLM has kernels of its own",
}

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Which target, and how it runs."""

    name: str
    """hub id or local folder"""
    revision: str | None = None
    dtype: str = "auto"
    """of the weights and of the stored hidden_states; auto: bfloat16 on CUDA, float32 on the CPU"""
    device: str = "auto"
    attn_implementation: str | None = None
    """None: what transformers picks for the model (sdpa where it can)"""
    experts_implementation: str | None = None
    """of a mixture of experts; None: what transformers picks for the model (grouped_mm where it can)"""
    trust_remote_code: bool = False
    adapter: Path | None = None
    """folder of a LoRA adapter that is put beside the target's weights (peft)"""
    device_map: str | None = None
    """auto: a target too large for one device is divided over several, layer by layer (accelerate)"""
    tp_plan: str | None = None
    """auto: divided over all processes of torchrun (tensor parallelism)"""
    chat_template: Path | None = None
    """file with the chat template to use in place of the tokenizer's own"""
    compile: bool = False
    """torch.compile the decoder layers"""
    deterministic: bool = False
    """only kernels that give the same bits every time"""
    backend: str = "transformers"
    """who computes the states"""
    tensor_parallel: int = 1
    """vllm: devices that each layer is divided over"""
    pipeline_parallel: int = 1
    """vllm: stages that the layers are divided into"""
    expert_parallel: bool = False
    """whole experts on each device that layers are divided over, instead of a part of each"""
    target_layer_ids: tuple[int, ...] | None = None
    num_draft_layers: int = 5
    """used where target_layer_ids is None: the published DFlash default for that many layers"""

    def __post_init__(self) -> None:
        _require_choice("--dtype", self.dtype, Dtype)
        if self.device_map is not None:
            _require_choice("--device-map", self.device_map, DeviceMap)
        if self.tp_plan not in (None, "auto"):
            raise InputError(f"--tp-plan {self.tp_plan!r}: the only plan is auto, transformers' own")
        if self.tp_plan and self.device_map:
            raise InputError("--tp-plan and --device-map both divide the target; give one of them")
        if self.tp_plan and self.adapter is not None:
            raise InputError("--tp-plan divides no adapter; save the target with it merged in, and leave out --adapter")
        if self.chat_template is not None and not self.chat_template.is_file():
            raise InputError(f"--chat-template {self.chat_template}: no such file")
        _require_choice("--backend", self.backend, Backend)
        if self.experts_implementation is not None:
            _require_choice("--experts-implementation", self.experts_implementation, ExpertsImplementation)
        for name in ("tensor_parallel", "pipeline_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.backend == "vllm":
            given = {
                name: getattr(self, name) for name in ("device_map", "tp_plan", "compile", "deterministic", "adapter")
            }
            given["attn_implementation"] = self.attn_implementation
            given["experts_implementation"] = self.experts_implementation
            for name in (name for name, value in given.items() if value):
                raise InputError(f"--{name.replace('_', '-')} is for --backend transformers; {_VLLM_INSTEAD[name]}")
        elif (self.tensor_parallel, self.pipeline_parallel) != (1, 1):
            raise InputError("--tensor-parallel and --pipeline-parallel are for --backend vllm")
        elif self.expert_parallel and not self.tp_plan:
            raise InputError(
                "--expert-parallel divides the experts over the processes of --tp-plan auto, or with --backend vllm "
                "over the devices of --tensor-parallel; give one of them too"
            )

    @property
    def devices(self) -> int:
        """That one copy of the target takes, as far as the backend divides it itself."""
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the rows come from: one of the sources."""

    name: str
    """local .jsonl/.json/.parquet file or folder, saved dataset, or hub id"""
    split: str | None = None
    data_config: str | None = None
    data_revision: str | None = None
    streaming: bool = False
    weight: float = 1.0
    """share of the rows that is drawn, always the same ones"""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise InputError(
                f"--data {self.name}:{self.weight:g}: a weight is the share of rows to take, more than 0 and at most "
                "1; to take all rows twice, give the source twice"
            )


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How rows become samples."""

    max_length: int = 4096
    """tokens"""
    too_long: str = "truncate"
    """truncate to the first max_length tokens, or drop"""
    min_loss_tokens: int = 1
    """samples with fewer learned tokens (after truncation) are dropped"""
    loss_on: str | None = None
    """assistant, all or column; None: column for input_ids rows, else assistant"""
    row_format: str | None = None
    """None: told from the columns"""
    columns: tuple[tuple[str, str], ...] = ()
    """(field, column) of --columns: what the data calls what we look for"""
    turns: str = "all"
    """all: a conversation is one sample, its assistant turns learned as they are rendered there; last: learned is the
    last one; each: a sample for each, its context the prompt that the target would see"""
    chat_template_kwargs: str | None = None
    """JSON object of variables for the chat template, such as ``{"enable_thinking": false}``"""
    system_prompt: str | None = None
    """of conversations that have no system message"""
    template_date: str | None = None
    """YYYY-MM-DD: what a chat template that asks for the date is told; None: the day on which the cache is begun"""
    on_bad_row: str = "fail"
    """fail, or skip: count it as dropped"""
    limit: int | None = None
    """only the first rows of the dataset; given to the source"""

    num_embeddings: int | None = None
    """rows of the target's embedding, which token ids have to be below; not an option, the job knows it"""

    def __post_init__(self) -> None:
        _require_choice("--turns", self.turns, Turns)
        _require_choice("--too-long", self.too_long, TooLong)
        _require_choice("--on-bad-row", self.on_bad_row, OnBadRow)
        if self.loss_on is not None:
            _require_choice("--loss-on", self.loss_on, LossOn)
        if self.row_format is not None:
            _require_choice("--row-format", self.row_format, RowFormat)
        _ = self.template_kwargs, self.today
        for name, least in (("max_length", 1), ("min_loss_tokens", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """``chat_template_kwargs`` as an object.

        Raises:
            InputError: it is none, or sets what is not for it to say.
        """
        text = self.chat_template_kwargs
        if text is None:
            return {}
        try:
            kwargs = json.loads(text)
        except ValueError as error:
            raise InputError(f"--chat-template-kwargs {text!r} is not JSON: {error}") from error
        if not isinstance(kwargs, dict):
            raise InputError(
                f'--chat-template-kwargs {text!r} is not a JSON object, such as {{"enable_thinking": false}}'
            )
        if taken := sorted(kwargs.keys() & NOT_FOR_TEMPLATES):
            raise InputError(f"--chat-template-kwargs sets {taken[0]!r}, which the rows or other options say")
        return kwargs

    @property
    def today(self) -> date | None:
        """``template_date`` as a date.

        Raises:
            InputError: it is none.
        """
        try:
            return None if self.template_date is None else date.fromisoformat(self.template_date)
        except ValueError as error:
            raise InputError(f"--template-date {self.template_date!r}: write YYYY-MM-DD, such as 2026-01-31") from error


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Sizes that decide the plan; both are part of the fingerprint."""

    shard_bytes: int = 512 << 20
    """a shard is cut before it would grow beyond this, its states counted before the codec; a single larger sample gets
    a shard of its own"""
    batch_tokens: int | None = DEFAULT_BATCH_TOKENS
    """padded tokens (samples times the longest) of one forward pass; a longer sample is a batch of its own. None: as
    many as fit the device, to be found out before a plan is made"""

    def __post_init__(self) -> None:
        if self.shard_bytes < 64 << 10:
            raise InputError(f"--shard-size is {self.shard_bytes:,} bytes; it must be at least 64KiB")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise InputError(f"--batch-tokens is {self.batch_tokens}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Everything ``dflash-cache extract`` was told."""

    out: Path
    target: TargetOptions
    data: DataOptions | tuple[DataOptions, ...]
    prepare: PrepareOptions = field(default_factory=PrepareOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    capture: Captures = field(default_factory=Captures)
    """beside hidden_states"""
    codec: str = "raw"
    """how hidden_states are stored"""
    on_nonfinite: str = "fail"
    """fail, or quarantine: leave samples with NaN or Inf out and list them"""
    url: str | None = None
    """where the cache goes, if not to a folder; ``out`` is then the scratch folder, see writing/upload.py"""
    strict_hardware: bool = False
    """refuse to go on with a cache that was begun with other hardware or software"""
    append_to: Path | None = None
    """a finished cache: ``out`` is made as it was, from other data"""
    keep: KeptWindow | None = None
    """only some shards at a time, as readers go on; None: all"""
    profile: Path | None = None
    """where to write a Chrome trace of the run"""
    command: CommandLine | None = None
    """that gave these options; kept in the manifest, of no account to anything else"""

    def __post_init__(self) -> None:
        require_codec(self.codec)
        _require_choice("--on-nonfinite", self.on_nonfinite, OnNonfinite)
        if self.keep is not None and self.url is not None:
            raise InputError("--keep is for an --out that is a folder; readers tell there how far they are")
        if self.target.tp_plan and self.codec.startswith("quant"):
            raise InputError("--codec quant is not found out with --tp-plan: extract with zbits, then recode")
        if self.target.tp_plan and self.plan.batch_tokens is None:
            raise InputError("--batch-tokens auto cannot be tried out with --tp-plan; give a number, such as 8192")
        if self.target.backend == "vllm":
            if self.plan.batch_tokens is None:
                raise InputError("--batch-tokens auto cannot be tried out with --backend vllm; give a number")
            if self.capture.logits_topk:
                raise InputError(
                    "--capture logits-topk: vLLM leaves the LM head out, and gives the logits of a prompt for few "
                    "tokens at most; use --backend transformers"
                )
        if self.profile is not None and not self.profile.absolute().parent.is_dir():
            raise InputError(f"--profile {self.profile}: no such folder")


def require_codec(text: str) -> None:
    """``--codec``: a name, or ``quant:fine``, or an SNR such as ``quant:34dB``.

    Raises:
        InputError: something else.
    """
    quality = re.fullmatch(r"quant:(?:fine|(\d{1,3}(?:\.\d{1,3})?)(?:dB)?)", text, re.IGNORECASE)
    if quality is None:
        if text.startswith("quant:"):
            raise InputError(f"--codec {text}: write quant, quant:fine, or an SNR of 10 to 60 dB such as quant:34dB")
        _require_choice("--codec", text, Codec)
    elif quality[1] and not 10 <= float(quality[1]) <= 60:
        raise InputError(f"--codec {text}: an SNR is 10 to 60 dB")


def _require_choice(option: str, value: str, choices: Any) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise InputError(f"{option} {value!r}: choose one of {', '.join(allowed)}")


def parse_data(text: str) -> tuple[str, str | None, float]:
    """``a.jsonl`` or ``owner/name:train_sft:0.5`` -> (name, split, weight); a path that exists is all name."""
    match = re.fullmatch(r"(.+?)(?::([A-Za-z_][\w.-]*))?(?::(\d+(?:\.\d*)?|\.\d+))?", text)
    if match is None or Path(text).expanduser().exists():
        return text, None, 1.0
    return match[1], match[2], 1.0 if match[3] is None else float(match[3])


def parse_columns(text: str | None) -> tuple[tuple[str, str], ...]:
    """``prompt=instruction,response=output`` -> ``(("prompt", "instruction"), ("response", "output"))``.

    Raises:
        InputError: something else, or a field that no row has.
    """
    pairs = [] if text is None else [part.partition("=") for part in text.split(",")]
    columns = {field.strip(): column.strip() for field, _, column in pairs}
    if any(not column for column in columns.values()) or len(set(columns.values())) < len(pairs):
        raise InputError(f"--columns {text}: write FIELD=COLUMN, each once, such as prompt=instruction,response=output")
    if unknown := [field for field in columns if field not in FIELDS]:
        raise InputError(f"--columns {unknown[0]}=...: no such field; choose among {', '.join(FIELDS)}")
    return tuple(columns.items())


def parse_captures(texts: Sequence[str]) -> Captures:
    """``["last_hidden_states", "logits-topk=64"]`` -> Captures.

    Raises:
        InputError: something else.
    """
    captures = Captures()
    for text in texts:
        name, _, number = text.partition("=")
        if text == "last_hidden_states":
            captures = replace(captures, last_hidden_states=True)
        elif name == "logits-topk" and number.isascii() and number.isdigit() and int(number) > 0:
            captures = replace(captures, logits_topk=int(number))
        else:
            raise InputError(f"--capture {text!r}: choose last_hidden_states or logits-topk=K, such as logits-topk=64")
    return captures


def parse_batch_tokens(text: str) -> int | None:
    """``8192``, or ``auto`` -> None.

    Raises:
        InputError: something else.
    """
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"--batch-tokens {text!r}: write auto, or a number of tokens such as 8192")
    return int(text)


def parse_size(text: str) -> int:
    """Bytes of ``512MiB``, ``2GB``, ``1.5GiB``, ``1048576``.

    Raises:
        InputError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise InputError(f"--shard-size {text!r}: is not a size; write bytes or a unit, such as 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
