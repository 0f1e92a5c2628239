"""The options of an extraction: frozen, validated once, then passed along whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cache_format.codecs import CODECS
from cache_format.errors import InputError
from cache_format.layout.captures import Captures
from extractor.data.prepare import PrepareOptions
from extractor.job.plan import PlanOptions
from extractor.target.layer_ids import default_target_layer_ids

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
    trust_remote_code: bool = False
    device_map: str | None = None
    """auto: a target too large for one device is divided over several, layer by layer (accelerate)"""
    tp_plan: str | None = None
    """auto: divided over all processes of torchrun (tensor parallelism)"""
    compile: bool = False
    """torch.compile the decoder layers"""
    deterministic: bool = False
    """only kernels that give the same bits every time"""
    target_layer_ids: tuple[int, ...] | None = None
    num_draft_layers: int = 5
    """used where target_layer_ids is None: the published DFlash default for that many layers"""

    def __post_init__(self) -> None:
        if self.tp_plan not in (None, "auto"):
            raise InputError(f"--tp-plan {self.tp_plan!r}: the only plan is auto, transformers' own")
        if self.tp_plan and self.device_map:
            raise InputError("--tp-plan and --device-map both divide the target; give one of them")

    def layer_ids(self, num_hidden_layers: int) -> list[int]:
        """The layers to capture from a target of ``num_hidden_layers``.

        Raises:
            InputError: a layer that the target does not have, or one named twice.
        """
        if self.target_layer_ids is None:
            return default_target_layer_ids(self.num_draft_layers, num_hidden_layers)
        ids = list(self.target_layer_ids)
        wrong = [i for i in ids if not 0 <= i < num_hidden_layers]
        if wrong or not ids:
            raise InputError(f"--target-layers {ids}: the target has layers 0..{num_hidden_layers - 1}")
        if len(set(ids)) != len(ids):
            raise InputError(f"--target-layers {ids}: a layer is named twice")
        return ids


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the rows come from."""

    name: str
    """local .jsonl/.json/.parquet file or folder, saved dataset, or hub id"""
    split: str | None = None
    data_revision: str | None = None
    streaming: bool = False


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Everything ``dflash-cache extract`` was told."""

    out: Path
    target: TargetOptions
    data: DataOptions
    prepare: PrepareOptions = field(default_factory=PrepareOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    capture: Captures = field(default_factory=Captures)
    """beside hidden_states"""
    codec: str = "raw"
    """how hidden_states are stored"""
    on_nonfinite: str = "fail"
    """fail, or quarantine: leave samples with NaN or Inf out and list them"""
    url: str | None = None
    """where the cache goes, if not to a folder; ``out`` is then the scratch folder, see cache_format/upload.py"""
    profile: Path | None = None
    """where to write a Chrome trace of the run"""

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise InputError(f"--codec {self.codec!r}: choose one of {', '.join(CODECS)}")
        if self.on_nonfinite not in ("fail", "quarantine"):
            raise InputError(f"--on-nonfinite {self.on_nonfinite!r}: choose fail or quarantine")
        if self.target.tp_plan and self.plan.batch_tokens is None:
            raise InputError("--batch-tokens auto cannot be tried out with --tp-plan; give a number, such as 8192")
        if self.profile is not None and not self.profile.absolute().parent.is_dir():
            raise InputError(f"--profile {self.profile}: no such folder")


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
        elif name == "logits-topk" and number.isdigit() and int(number) > 0:
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
    if not text.isdigit():
        raise InputError(f"--batch-tokens {text!r}: write auto, or a number of tokens such as 8192")
    return int(text)


def parse_size(text: str) -> int:
    """Bytes of ``512MiB``, ``2GB``, ``1.5GiB``, ``1048576``.

    Raises:
        InputError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise InputError(f"{text!r} is not a size; write bytes or a unit, such as 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
