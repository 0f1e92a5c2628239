"""Import: another project's offline cache becomes one of ours, its states bit for bit; killed at any time, it goes on.

Samples and states are the peer's. Embeddings, norm, config and tokenizer are the target's, as extract stores them. The
identity says where the states are from, so extract refuses to go on with such a cache. Whether they are that target's
states is found out by running it on some samples: after the first shard, and before the cache is complete.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_format.codecs import codec_named
from cache_format.codecs.dtypes import DTYPES
from cache_format.errors import CacheError, InputError
from cache_format.layout.captures import LAST_HIDDEN_STATES, Captures
from cache_format.layout.manifest import (
    IMPORTED_FROM,
    MANIFEST_NAME,
    CommandLine,
    DataInfo,
    Manifest,
    fingerprint,
    require_same_identity,
)
from cache_format.layout.samples import PartInfo, PreparedSamples, part_path, read_part, write_part
from cache_format.peers import PEERS, Arrangement
from cache_format.reading.feature_cache import FeatureCache
from cache_format.storage.commit import make_folder
from cache_format.storage.lock import writing
from cache_format.storage.own_folders import begin_folders
from cache_format.writing.make_shards import ShardMaker, ShardRows, is_done, require_room
from cache_format.writing.seal import seal
from extractor.config import PlanOptions
from extractor.data.prepare import ROWS_PER_PART
from extractor.job.identity import software
from extractor.job.out_folder import refuse_foreign_folder, shards_schema
from extractor.job.plan import PLAN_VERSION, Plan
from extractor.job.planned_manifest import planned_manifest, target_info
from extractor.target.backend import TargetBackend
from extractor.target.load_backend import load_backend_of
from extractor.target.load_target import TargetShape, load_config, load_tokenizer, resolve_device
from extractor.target.recompute import RecomputeReport, recompute_with
from extractor.target.target_identity import identify_target, tokenizer_identity
from extractor.terminal.progress import Reporter, say


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Everything ``dflash-cache import`` was told."""

    peer: str
    """as in ``--from``"""
    source: Path
    """the peer's folder"""
    out: Path
    target: str
    target_layer_ids: tuple[int, ...] | None = None
    """of the blocks, in the peer's order; None: its layout says"""
    last_layer: str | None = None
    """``pre-norm`` or ``post-norm``, where the last decoder layer is among them"""
    plan: PlanOptions
    threads: int = 2
    device: str = "auto"
    trust_remote_code: bool = False
    recompute: int
    """samples to run the target on; 0: none, and nobody knows whether the states are its"""
    command: CommandLine | None = None


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What was done."""

    cache: str
    fingerprint: str
    samples: int
    tokens: int
    shards: int
    done_shards: int
    """of these, found done"""
    target_layer_ids: list[int]
    last_hidden_states: bool
    recompute: RecomputeReport | None
    """None: unchecked, or complete before"""


def import_cache(options: ImportOptions) -> ImportReport:
    """Make the cache that ``options`` describe, or finish the one that an earlier run with the same options began.

    Raises:
        InputError: something is not said that has to be, or does not fit; nothing was written.
        MismatchError: another cache is in ``out``.
        CacheError: the peer's files are damaged, or the states are not those of the target; the cache stays incomplete.
        StorageError: the operating system refused; finished shards stay.
    """
    _require_apart(options.out, options.source)
    # Before the target's weights are digested.
    refuse_foreign_folder(options.out)
    job = _Import(options)
    make_folder(options.out)
    with writing(options.out):
        return job.run()


class _Import:
    """The inputs of an import, opened and identified; nothing is written before ``run``."""

    def __init__(self, options: ImportOptions):
        self.options, self.out = options, options.out
        self.config = load_config(options.target, None, options.trust_remote_code)
        self.shape = TargetShape.from_config(self.config)
        self.peer = PEERS[options.peer](options.source)
        blocks = _layer_ids(options, self.peer.layer_ids, self.shape.num_hidden_layers)
        self.arrangement = Arrangement.of(
            blocks, self.shape.num_hidden_layers, apart=self.peer.last, last_layer=options.last_layer
        )
        first, hidden_size = self.peer.record(0), self.shape.hidden_size
        if first.states.shape[1] != len(blocks) * hidden_size:
            raise InputError(
                f"{options.source}: its states are {first.states.shape[1]:,} wide, and {len(blocks)} layers of this "
                f"target are {len(blocks)} x {hidden_size:,}; name those that it holds in --target-layers, in order"
            )
        if first.last is not None and first.last.shape[1] != hidden_size:
            raise InputError(f"{options.source}: its last hidden states are not {hidden_size:,} wide; see --target")
        self.dtype = first.states.dtype
        self.device = resolve_device(options.device)
        self.tokenizer = load_tokenizer(options.target, None, options.trust_remote_code)
        self.target = identify_target(options.target, None, self.config, trust_remote_code=options.trust_remote_code)
        self.captures = Captures(last_hidden_states=self.arrangement.has_last)
        self.identity: dict[str, Any] = {
            **{f"target.{name}": value for name, value in self.target.fields.items()},
            **tokenizer_identity(self.tokenizer),
            "target_layer_ids": self.arrangement.layer_ids,
            "dtype": str(self.dtype).removeprefix("torch."),
            "codec": codec_named("raw").asked,
            "capture": self.captures.to_dict(),
            IMPORTED_FROM: options.peer,
            "imported.files": self.peer.digest(),
            "imported.layers": list(blocks),
            **({} if options.last_layer is None else {"imported.last_layer": options.last_layer}),
            "plan": PLAN_VERSION,
            "shard_bytes": options.plan.shard_bytes,
        }
        self._check_out()
        self._backend: TargetBackend | None = None
        self._thread = threading.local()

    def _check_out(self) -> None:
        """Refuse a folder that is not this import's own."""
        refuse_foreign_folder(self.out)
        stored = Manifest.find(self.out)
        if stored is not None:
            samples = {name: value for name, value in stored.identity.items() if name == "samples"}
            require_same_identity(self.out, stored.identity, {**samples, **self.identity})

    def run(self) -> ImportReport:
        # Once more: another import may have come first.
        self._check_out()
        begin_folders(self.out, ["samples", "shards", "target"])
        samples, manifest = self._begun()
        schema = manifest.schema()
        plan = Plan(samples.num_tokens, schema.raw.token_bytes, self.options.plan)
        missing = [n for n in range(len(plan)) if not is_done(self.out, schema, n, plan.samples_of(n)[0])]
        require_room(self.out, schema, [plan.samples_of(number)[1] for number in missing])
        maker = ShardMaker(self.out, schema, lambda number: self._rows(samples, plan, number))
        report, done = None, len(plan) - len(missing)
        tokens = [int(plan.samples_of(number)[1].sum()) for number in range(len(plan))]
        with Reporter("import", sum(tokens), "tokens") as reporter:
            counted = sum(tokens) - sum(tokens[number] for number in missing)

            def count(number: int) -> None:
                nonlocal counted
                counted += tokens[number]
                reporter.update(counted)

            if self.options.recompute and missing and len(plan) > 1:
                # What is wrong with all is told after the first.
                first = [] if done else missing[:1]
                maker.make_all(first, 1, count)
                self._require_right(manifest)
                missing = missing[len(first) :]
            maker.make_all(missing, self.options.threads, count)
        if manifest.state != "complete":
            report = self._require_right(manifest) if self.options.recompute else None
            manifest = seal(self.out, manifest)
        return ImportReport(
            cache=str(self.out),
            fingerprint=manifest.fingerprint,
            samples=len(samples),
            tokens=sum(tokens),
            shards=len(plan),
            done_shards=done,
            target_layer_ids=manifest.target_layer_ids,
            last_hidden_states=self.arrangement.has_last,
            recompute=report,
        )

    def _begun(self) -> tuple[PreparedSamples, Manifest]:
        """The samples and the manifest, made or found."""
        folder = self.out / "samples"
        if (self.out / MANIFEST_NAME).exists():
            manifest = Manifest.read(self.out)
            assert manifest.totals is not None
            samples = PreparedSamples(folder, manifest.totals.parts)
            if samples.digest() != manifest.identity["samples"]:
                raise CacheError(folder, f"is not what the manifest says; remove {self.out} and import again")
            return samples, manifest
        samples = PreparedSamples(folder, self._write_samples(folder))
        manifest = self._planned(samples)
        manifest.write(self.out)
        return samples, manifest

    def _write_samples(self, folder: Path) -> int:
        """Write the parts that are not there yet; how many there are."""
        made_for, count = fingerprint(self.identity), len(self.peer)
        starts = range(0, count, ROWS_PER_PART)
        paths = [part_path(folder, number) for number in range(len(starts))]
        for stray in set(folder.glob("samples-*.arrow")) - set(paths):
            stray.unlink()
        with Reporter("read tokens", count, "samples") as reporter:
            for path, start in zip(paths, starts, strict=True):
                stop = min(start + ROWS_PER_PART, count)
                info = PartInfo(start, stop, {}, made_for)
                if not _is_part(path, info):
                    write_part(path, [self._tokens(i) for i in range(start, stop)], info)
                reporter.update(stop)
        return len(starts)

    def _tokens(self, i: int) -> Any:
        sample = self.peer.tokens(i)
        if int(sample.input_ids.max()) >= self.shape.vocab_size:
            raise InputError(
                f"{self.options.source}: sample {i} has token {int(sample.input_ids.max())}, and this target only "
                f"{self.shape.vocab_size:,}; see --target"
            )
        return sample

    def _planned(self, samples: PreparedSamples) -> Manifest:
        """See :func:`planned_manifest`."""
        manifest = Manifest(
            state="preparing",
            identity=self.identity,
            target=target_info(self.options.target, self.shape),
            target_layer_ids=self.arrangement.layer_ids,
            dtype=self.identity["dtype"],
            codec=self.identity["codec"],
            capture=self.captures.to_dict(),
            created_with=software(self.device),
            command=self.options.command,
        )
        return planned_manifest(
            self.out,
            manifest,
            samples,
            self._loaded(manifest),
            config=self.config,
            tokenizer=self.tokenizer,
            data=DataInfo(name=str(self.options.source), rows=len(samples), dropped={}),
            num_shards=len(Plan(samples.num_tokens, shards_schema(manifest).raw.token_bytes, self.options.plan)),
            decided={},
            tell=say,
        )

    def _rows(self, samples: PreparedSamples, plan: Plan, number: int) -> ShardRows:
        """Those of shard ``number``, from the peer's files."""
        ids, lengths = plan.samples_of(number)
        raw = {name: memory[: int(lengths.sum())] for name, memory in self._memory(plan.largest_shard_tokens).items()}
        states, last = raw["hidden_states"], raw.get(LAST_HIDDEN_STATES)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        for i, start, stop in zip(ids.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            record = self.peer.record(i)
            if record.sample.digest() != samples[i].digest() or record.states.dtype != self.dtype:
                raise CacheError(
                    self.options.source,
                    f"sample {i} was changed while it was imported, or is not of {self.identity['dtype']} as the first "
                    "is; let its writer finish, then import into another --out",
                )
            self.arrangement.put(record, states[start:stop], None if last is None else last[start:stop])
            raw["input_ids"][start:stop] = torch.from_numpy(record.sample.input_ids)
            raw["loss_mask"][start:stop] = torch.from_numpy(record.sample.loss_mask)
        self._require_finite(ids, starts, states, last)
        return ShardRows(ids, lengths, raw)

    def _memory(self, tokens: int) -> dict[str, torch.Tensor]:
        """This thread's, for the largest shard: fresh memory costs more than the copy into it."""
        memory: dict[str, torch.Tensor] | None = getattr(self._thread, "memory", None)
        if memory is None:
            layers, hidden_size = len(self.arrangement.layer_ids), self.shape.hidden_size
            memory = self._thread.memory = {
                "hidden_states": torch.empty(tokens, layers * hidden_size, dtype=self.dtype),
                "input_ids": torch.empty(tokens, dtype=DTYPES["I32"]),
                "attention_mask": torch.ones(tokens, dtype=DTYPES["U8"]),
                "loss_mask": torch.empty(tokens, dtype=DTYPES["U8"]),
            }
            if self.arrangement.has_last:
                memory[LAST_HIDDEN_STATES] = torch.empty(tokens, hidden_size, dtype=self.dtype)
        return memory

    def _require_finite(
        self, ids: np.ndarray, starts: np.ndarray, states: torch.Tensor, last: torch.Tensor | None
    ) -> None:
        finite = states.sum(-1, dtype=torch.float32).isfinite()
        if last is not None:
            finite &= last.sum(-1, dtype=torch.float32).isfinite()
        if not bool(finite.all()):
            at = int(np.searchsorted(starts, int(finite.logical_not().nonzero()[0]), side="right")) - 1
            raise CacheError(
                self.options.source,
                f"sample {int(ids[at])} has NaN or Inf in its states, which would spoil a training; remove it there, "
                "then import into another --out",
            )

    def _loaded(self, manifest: Manifest) -> TargetBackend:
        if self._backend is None:
            say(f"loading target {self.options.target} ({self.identity['dtype']}) on {self.device}")
            self._backend = load_backend_of(
                manifest, self.options.target, self.device, longest=1, trust_remote_code=self.options.trust_remote_code
            )
            self.target.require_unchanged()
        return self._backend

    def _require_right(self, manifest: Manifest) -> RecomputeReport:
        """Run the target on some samples of the shards that are there.

        Raises:
            CacheError: it gives other states.
        """
        cache = FeatureCache.open(self.out, allow_incomplete=True)
        backend = self._loaded(manifest)
        chosen = np.random.RandomState(0).permutation(len(cache))[: self.options.recompute]
        report = recompute_with(cache, backend, backend.rows_device(self.device), chosen)
        if report.problems:
            raise CacheError(
                self.out,
                f"stays incomplete: the states are not what --target gives for these tokens. {report.problems[0]}. Are "
                "--target, --target-layers and --last-layer right? Import with others into another --out",
            )
        return report


def _layer_ids(options: ImportOptions, told: list[int] | None, num_hidden_layers: int) -> list[int]:
    """Of the peer's blocks, in order.

    Raises:
        InputError: nobody says, two say different things, or they are not layers of the target.
    """
    given = None if options.target_layer_ids is None else list(options.target_layer_ids)
    if told is None and given is None:
        raise InputError(
            f"--from {options.peer}: its files do not say which layers they hold; name them with --target-layers, in "
            "the order of the files, counted from 0 (layer i's output is hidden_states[i + 1] of transformers)"
        )
    if told is not None and given is not None and told != given:
        raise InputError(f"--target-layers {given}: {options.source} says that it holds {told}; leave the option out")
    ids = given if told is None else told
    assert ids is not None
    if not ids or len(set(ids)) != len(ids) or not all(0 <= layer < num_hidden_layers for layer in ids):
        raise InputError(
            f"--target-layers {ids}: a cache has only decoder layers of 0..{num_hidden_layers - 1}, each once"
        )
    return ids


def _require_apart(out: Path, source: Path) -> None:
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give the one that the other project's files lie in")
    one, other = out.resolve(), source.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise InputError(f"--out {out}: choose a folder beside {source}, not inside it or around it")


def _is_part(path: Path, info: PartInfo) -> bool:
    if not path.exists():
        return False
    try:
        batch, found = read_part(path)
    except CacheError:
        return False
    return found == info and batch.num_rows == info.stop_row - info.first_row
