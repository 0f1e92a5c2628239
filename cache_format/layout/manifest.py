"""manifest.json: what a cache is (identity, schema), what it holds (totals, files) and how far it is (state)."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from cache_format.codecs import Codec, States, codec_from_dict
from cache_format.codecs.dtypes import torch_dtype
from cache_format.errors import CacheError, MismatchError, StorageError
from cache_format.layout.captures import Captures
from cache_format.layout.samples import BadRows
from cache_format.layout.shard_layout import FORMAT_NAME, FORMAT_VERSION, ShardSchema, capture_tensors
from cache_format.storage.commit import committed, write_all
from cache_format.storage.file_info import FileInfo
from cache_format.storage.paths import inside, open_for_reading

MANIFEST_NAME = "manifest.json"
STATES = ("preparing", "extracting", "complete")
MAX_MANIFEST_BYTES = 64 << 20
_DECIDED_BY_VLLM = tuple(f"vllm.{name}" for name in ("version", "quantization", "kv_cache_dtype", "block_size"))
_DECIDED_BY_VLLM += ("vllm.batch_invariant", "vllm.eager", "vllm.capture", "vllm.model", "vllm.kernels")
LATER_IDENTITY = (
    *("samples", "padding", "attn_implementation", "experts_implementation", "parameters", "quantization"),
    *_DECIDED_BY_VLLM,
    "codec.statistics",
)
"""Identity fields that are found out while the samples are prepared and the target is loaded."""

STATISTICS = "codec.statistics"
"""Identity field: digest of what a codec knows of the states; only where it has to know any."""

CODEC_BEFORE = "codec.before"
"""Identity field: the lossy codec of the cache that this one was recoded from; the states were rounded twice."""

IMPORTED_FROM = "imported_from"
"""Identity field: the project whose offline cache the states are from; no target was run for them here."""

LATER: Mapping[str, Any] = {"later": True}
"""Metadata of fields that caches of earlier versions of this package do not have. They then have their default, and are
not written where they have it, so that such a manifest stays what it was to the byte."""


@dataclass(frozen=True, kw_only=True)
class TargetInfo:
    """The frozen target, as far as a trainer needs it."""

    name: str
    """hub id or folder, as given to ``extract --target``"""
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    tie_word_embeddings: bool
    """True where lm_head.weight is embed_tokens.weight, and stored once"""
    embed_scale: float = 1.0
    """what the target's embedding multiplies a row by, in the weight's dtype (Gemma: sqrt of hidden_size)"""
    input_scale: float = field(default=1.0, metadata=LATER)
    """what the target multiplies that by before its first layer (Granite: embedding_multiplier)"""
    logit_scale: float = field(default=1.0, metadata=LATER)
    """what the target multiplies by what its LM head gives (Cohere: logit_scale; Granite: 1 / logits_scaling)"""
    logit_softcap: float = field(default=0.0, metadata=LATER)
    """c of ``c * tanh(logits / c)``, which the target does last (Gemma 2); 0: nothing of the kind"""
    head_problem: str = field(default="", metadata=LATER)
    """why the target's logits do not follow from its LM head like this; "" where they do"""


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One source of the data, and what it gave."""

    name: str
    split: str | None
    weight: float
    """share of its rows that was drawn"""
    files: dict[str, int]
    """name -> first row: ``source_row`` of a sample, less this, is the row in the file, counted from 0"""
    row_format: str
    columns: dict[str, str]
    """field -> column: what was taken for what"""
    unused_columns: list[str]
    samples: int
    tokens: int
    loss_tokens: int


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """The dataset the samples came from."""

    name: str
    rows: int
    """dataset rows read, dropped ones included"""
    dropped: dict[str, int]
    """reason -> rows"""
    bad_rows: dict[str, BadRows] = field(default_factory=dict, metadata=LATER)
    """what ``bad_row`` of these is made of: class of what is wrong with a row -> how many, and the first"""
    sources: list[SourceInfo] = field(default_factory=list, metadata=LATER)
    """in order; empty in caches of earlier versions"""
    noted: dict[str, int] = field(default_factory=dict, metadata=LATER)
    """what is missing from samples that were kept, such as ``reasoning_left_out`` (turns whose reasoning the chat
    template does not write) -> how often"""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sizes, known once the samples are prepared and planned."""

    parts: int
    """files in samples/"""
    samples: int
    """prepared samples; those in ``quarantined`` have no rows in the shards"""
    tokens: int
    loss_tokens: int
    shards: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the codec made of the states, once all shards are there."""

    ratio: float
    """bytes stored for hidden_states over their bytes before"""
    snr_db: list[float]
    """signal-to-noise ratio of each captured layer, in dB, over all tokens together: the few that hold most of the
    energy decide it; empty with a lossless codec"""
    median_snr_db: list[float] = field(default_factory=list, metadata=LATER)
    """the same of each layer's median token, within half a dB"""
    worst_snr_db: list[float] = field(default_factory=list, metadata=LATER)
    """what every token of each layer reaches, in whole dB; 0: the worst may be below"""


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command that began the cache; for people, not part of the identity."""

    arguments: list[str]
    """after ``dflash-cache``, as given, with ``***`` in place of what may be a secret"""
    folder: str
    """the working folder, from which relative paths count"""
    paths: dict[str, str]
    """each argument that is a path, as given -> absolute"""
    options: dict[str, Any] = field(default_factory=dict, metadata=LATER)
    """option without its dashes -> what the command line or --config gave: text, a list of texts, or true and false"""

    def shell(self) -> str:
        """To be run again from anywhere, as a shell takes it."""
        return shlex.join(["cd", self.folder]) + " && " + shlex.join(["dflash-cache", *self.arguments])


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of manifest.json. Immutable: a new state is a new manifest, committed over the old one."""

    state: str
    identity: dict[str, Any]
    """dotted field -> JSON value: everything that can change a byte; ``samples`` and what the loaded target
    decides are added when the state becomes extracting, and the fingerprint is taken over all of them"""
    target: TargetInfo
    target_layer_ids: list[int]
    dtype: str
    codec: dict[str, Any]
    capture: dict[str, Any]
    """see captures.py"""
    created_with: dict[str, str]
    """software versions of the run that began the cache; for information, not part of the identity"""
    token_snr: bool = field(default=False, metadata=LATER)
    """whether the shards of a lossy codec count their tokens by SNR; no state depends on it"""
    command: CommandLine | None = field(default=None, metadata=LATER)
    """None: it was begun by no command line, or by an earlier version"""
    fingerprint: str = ""
    data: DataInfo | None = None
    totals: Totals | None = None
    quarantined: list[int] = field(default_factory=list)
    """sample_ids left out of the shards because the target gave non-finite states for them"""
    measured: Measured | None = None
    files: dict[str, FileInfo] = field(default_factory=dict)
    """path below the cache -> size and checksum, for all but the manifest and the shards"""

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state {self.state!r} is not one of {', '.join(STATES)}")
        if not self.target_layer_ids or not all(0 <= i < self.target.num_hidden_layers for i in self.target_layer_ids):
            raise ValueError(f"target_layer_ids {self.target_layer_ids} are not layers of the target")
        if min(self.target.hidden_size, self.target.vocab_size) < 1:
            raise ValueError("hidden_size and vocab_size must be at least 1")
        torch_dtype(self.dtype)
        codec = codec_from_dict(self.codec)
        Captures.from_dict(self.capture)
        if self.state != "preparing":
            if self.data is None or self.totals is None or min(asdict(self.totals).values()) < 0:
                raise ValueError(f"state {self.state} needs data and totals")
            if max(asdict(self.totals).values()) >= 1 << 62:
                raise ValueError("totals are larger than any cache can be")
            bounds = [-1, *self.quarantined, self.totals.samples]
            if any(low >= high for low, high in itertools.pairwise(bounds)):
                raise ValueError("quarantined are not sample_ids in ascending order")
            if self.identity.get(STATISTICS) != codec_identity(codec).get(STATISTICS) or not codec.is_calibrated:
                raise ValueError("the codec's parameters are not those of the identity")
            if self.fingerprint != fingerprint(self.identity):
                raise ValueError("the fingerprint is not that of the identity")

    @property
    def hidden_size(self) -> int:
        """H: features of one layer."""
        return self.target.hidden_size

    @property
    def width(self) -> int:
        """``L*H``: features of a token in hidden_states."""
        return len(self.target_layer_ids) * self.target.hidden_size

    @property
    def torch_dtype(self) -> torch.dtype:
        """Stored dtype of hidden_states."""
        return torch_dtype(self.dtype)

    @property
    def run_again(self) -> str:
        """What makes what is missing, for a message: ``run ...``."""
        if self.command is not None:
            return f"run its command again: {self.command.shell()}"
        made_by = "import" if IMPORTED_FROM in self.identity else "extract"
        return f"run the cache's `dflash-cache {made_by}` command again"

    def schema(self) -> ShardSchema:
        """What the cache's shards have in common."""
        return ShardSchema(
            fingerprint=self.fingerprint,
            codec=codec_from_dict(self.codec),
            states=States(self.torch_dtype, len(self.target_layer_ids), self.hidden_size),
            captures=capture_tensors(Captures.from_dict(self.capture), self.torch_dtype, self.hidden_size),
            token_snr=self.token_snr,
        )

    def extracting(self, identity: Mapping[str, Any], **changes: Any) -> Manifest:
        """The manifest of state extracting: the identity is now whole and gets its fingerprint."""
        return replace(self, state="extracting", identity=dict(identity), fingerprint=fingerprint(identity), **changes)

    def to_bytes(self) -> bytes:
        """The file's bytes; a function of the content alone, with a checksum over it."""
        content = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **_plain(self)}
        content["checksum"] = _checksum(content)
        return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"

    def write(self, cache: Path) -> None:
        """Commit manifest.json in folder ``cache``.

        Raises:
            StorageError: the operating system refused; the old manifest stands.
        """
        with committed(cache / MANIFEST_NAME) as file:
            write_all(file, self.to_bytes())

    @staticmethod
    def find(cache: Path) -> Manifest | None:
        """:meth:`read`; None where there is none, or none any more: a job may take back what it began."""
        path = cache / MANIFEST_NAME
        try:
            return Manifest.read(cache) if path.exists() else None
        except CacheError:
            if path.exists():
                raise
            return None

    @staticmethod
    def read(cache: Path) -> Manifest:
        """Read and check manifest.json of folder ``cache``.

        Raises:
            CacheError: missing, damaged, or of a format version that this package does not know.
        """
        path = cache / MANIFEST_NAME
        if not os.path.lexists(path):
            raise CacheError(cache, f"is not a feature cache: there is no {MANIFEST_NAME}")
        try:
            with open(open_for_reading(inside(cache, MANIFEST_NAME)), "rb") as file:
                text = file.read(MAX_MANIFEST_BYTES + 1)
        except OSError as error:
            raise StorageError(path, "read", error) from error
        return Manifest.parse(text, path)

    @staticmethod
    def parse(text: bytes, where: str | os.PathLike[str]) -> Manifest:
        """Check the content of a manifest.json; ``where`` is its path or URL, for messages.

        Raises:
            CacheError: damaged, or of a format version that this package does not know.
        """
        if len(text) > MAX_MANIFEST_BYTES:
            raise CacheError(where, f"is longer than {MAX_MANIFEST_BYTES >> 20} MiB")
        try:
            return _parse(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise CacheError(where, f"is damaged or foreign: {error}") from None


def codec_identity(codec: Codec) -> dict[str, Any]:
    """The identity's fields of a codec: what was asked for and, where it has seen the states, a digest of the rest."""
    told = codec.to_dict()
    if told == codec.asked:
        return {"codec": told}
    return {"codec": codec.asked, STATISTICS: xxhash.xxh3_128(_canonical(told)).hexdigest()}


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the identity as JSON with sorted keys, no spaces, UTF-8."""
    return hashlib.sha256(_canonical(dict(identity))).hexdigest()


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> both values, of the fields that differ; one that only one side has differs too."""
    names = dict.fromkeys([*other, *one])
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def require_same_identity(cache: Path | str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a resume with anything that would change a byte; a field that only one side has differs too.

    Raises:
        MismatchError: names each field that differs, with both values.
    """
    different = differing(stored, asked)
    if different:
        raise MismatchError(
            f"{cache}: this cache was begun with other inputs; nothing was touched. Different:",
            different,
            "Run with the original options to resume it, or choose another --out for the new ones.",
        )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64(_canonical(content)).hexdigest()


def _plain(value: Any) -> Any:
    """For JSON, in the order of the fields."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(item) for f in fields(value) if not _is_left_out(f, item := getattr(value, f.name))}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [*map(_plain, value)] if isinstance(value, list | tuple) else value


def _is_left_out(of: Field[Any], value: Any) -> bool:
    default = of.default if of.default_factory is MISSING else of.default_factory()
    return "later" in of.metadata and bool(value == default)


def _parse(content: Any) -> Manifest:
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT_NAME:
        raise ValueError(f"it does not say that it is of format {FORMAT_NAME!r}")
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r}; this package reads version {FORMAT_VERSION}")
    stored = content.pop("checksum", None)
    if stored != _checksum({"format": FORMAT_NAME, "format_version": version, **content}):
        raise ValueError("its checksum does not match its content")
    manifest: Manifest = _build(Manifest, content, "manifest")
    schema = manifest.schema()
    if not schema.codec.fits(schema.states):
        raise ValueError(f"the parameters of codec {schema.codec.name} are not of L layers of H features")
    return manifest


def _build(kind: Any, value: Any, where: str) -> Any:
    """``value`` from JSON as ``kind``, a dataclass or a plain annotation, with its type checked."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if hasattr(kind, "__dataclass_fields__"):
        hints = typing.get_type_hints(kind)
        absent = {f.name for f in fields(kind)} ^ set(value) if isinstance(value, dict) else {""}
        if absent - {f.name for f in fields(kind) if "later" in f.metadata}:
            raise ValueError(f"{where} does not have exactly the fields {', '.join(hints)}")
        return kind(**{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(arguments[0], value, where)
    if type(value) is not (origin or kind):
        raise ValueError(f"{where} is a {type(value).__name__}, not a {(origin or kind).__name__}")
    if origin is list:
        return [_build(arguments[0], item, where) for item in value]
    if origin is dict:
        return {name: _build(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    return value
