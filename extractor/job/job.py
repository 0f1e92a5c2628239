"""One extraction from end to end: prepare -> plan -> run -> seal, each step resumed where an earlier run stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from cache_format.codecs.dtypes import torch_dtype
from cache_format.errors import CacheError, InputError
from cache_format.layout.manifest import MANIFEST_NAME, DataInfo, Manifest, TargetInfo, Totals, require_same_identity
from cache_format.layout.samples import PreparedSamples, part_path
from cache_format.layout.shard import shard_name
from cache_format.storage.files import inside, make_folder, remove_temporaries
from cache_format.storage.lock import writing
from cache_format.upkeep.repair import LATER_IDENTITY
from cache_format.writing.seal import describe_files, seal
from extractor.config import DEFAULT_BATCH_TOKENS, ExtractOptions
from extractor.data.dataset import open_source
from extractor.data.prepare import prepare
from extractor.job.identity import inputs_identity, other_software, software
from extractor.job.out_folder import refuse_foreign_folder, require_space, shards_schema
from extractor.job.plan import Plan
from extractor.job.report import ExtractReport, progress_note
from extractor.job.resume import missing_shards, require_all_files
from extractor.job.run import RunStats, ShardRunner
from extractor.job.timeline import Timeline
from extractor.job.worker import Worker
from extractor.target.batch_budget import find_batch_tokens
from extractor.target.forward import HiddenStateExtractor
from extractor.target.layer_ids import chosen_layer_ids
from extractor.target.load_extractor import load_extractor
from extractor.target.load_target import TargetShape, load_config, load_tokenizer, resolve_device, resolve_dtype
from extractor.target.target_files import write_target_files
from extractor.target.tensor_parallel import Group, require_plan
from extractor.terminal.progress import Reporter, say

PATIENCE_SECONDS = 30 * 60.0
"""How long a worker waits for the leading one without seeing it make anything."""


def extract(
    options: ExtractOptions,
    worker: Worker | None = None,
    *,
    on_todo: Callable[[int], None] | None = None,
    on_stats: Callable[[RunStats], None] | None = None,
) -> ExtractReport:
    """Make the cache that ``options`` describe, or finish the one that an earlier run with the same options began.

    Args:
        options: what to make.
        worker: this process's part in it; None: all of it.
        on_todo: takes the number of tokens to run, before they are run.
        on_stats: takes the progress after every batch, instead of the terminal.

    Raises:
        DFlashCacheError: bad input (nothing written), another cache in ``out``, a refused write, non-finite states.
    """
    if options.url is not None:
        from extractor.job.store_job import extract_to_store

        return extract_to_store(options, worker or Worker(), on_todo, on_stats)
    with opened(options, worker or Worker(), on_todo, on_stats) as (job, alone):
        return job.run(alone)


@contextmanager
def opened(
    options: ExtractOptions,
    worker: Worker,
    on_todo: Callable[[int], None] | None = None,
    on_stats: Callable[[RunStats], None] | None = None,
) -> Iterator[tuple[Job, Callable[[], bool]]]:
    """The job of a cache in a folder, with the folder's lock held; and whether this worker holds it alone.

    Raises:
        DFlashCacheError: as :func:`extract`; nothing was written.
    """
    refuse_foreign_folder(options.out)
    job = Job(options, worker, on_todo, on_stats)
    if (options.out / MANIFEST_NAME).exists():
        job.require_same_inputs(Manifest.read(options.out))
    make_folder(options.out)
    with job.grouped(), writing(options.out, worker.job, first=job.clear) as alone:
        yield job, alone


class Job:
    """The inputs of one extraction, opened and identified; nothing is written before ``run``.

    Its steps are what every engine is made of: :meth:`begun`, :meth:`prepared`, :meth:`plan`, :meth:`loaded`, seal.
    """

    def __init__(
        self,
        options: ExtractOptions,
        worker: Worker,
        on_todo: Callable[[int], None] | None = None,
        on_stats: Callable[[RunStats], None] | None = None,
    ):
        self.options, self.out, self.worker = options, options.out, worker
        self.where = str(options.out)
        self.on_todo, self.on_stats = on_todo, on_stats
        self.started = time.monotonic()
        self.timeline = Timeline(options.profile is not None)
        target = options.target
        self.device = resolve_device(target.device, worker.local_rank)
        self.dtype = resolve_dtype(target.dtype, self.device)
        self.config = load_config(target.name, target.revision, target.trust_remote_code)
        self.shape = TargetShape.from_config(self.config)
        if target.tp_plan:
            require_plan(self.config)
        self.layer_ids = chosen_layer_ids(target, self.shape.num_hidden_layers)
        self.tokenizer = load_tokenizer(target.name, target.revision, target.trust_remote_code)
        self.source = open_source(options.data, options.prepare.limit)
        self.group: Group | None = None
        """the processes that the target is divided over, with --tp-plan"""
        self.identity = inputs_identity(
            options,
            config=self.config,
            tokenizer=self.tokenizer,
            target_layer_ids=self.layer_ids,
            dtype=self.dtype,
            data_digest=self.source.digest,
        )

    def require_same_inputs(self, stored: Manifest) -> None:
        """Refuse to go on with a cache begun with others; what only the loaded target decides is compared then.

        Raises:
            MismatchError: names each field that differs.
        """
        later = {name: stored.identity[name] for name in (*LATER_IDENTITY, "batch_tokens") if name in stored.identity}
        require_same_identity(self.where, stored.identity, {**later, **self.identity})

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """With --tp-plan: join the processes that the target is divided over; they are let go once the work is done."""
        if self.options.target.tp_plan:
            self.group = Group(self.device)
        yield
        if self.group is not None:
            self.group.stop()

    def say(self, text: str) -> None:
        """To the terminal, once a job."""
        if self.worker.leads:
            say(text)

    def clear(self) -> None:
        """Make the folders, and remove what killed processes left half-written; before any other worker is there."""
        # Checked before anything is made or removed: a link would lead both out of the cache.
        for folder in (self.out, *(inside(self.out, name) for name in ("samples", "shards", "target"))):
            make_folder(folder)
            remove_temporaries(folder)

    def run(self, alone: Callable[[], bool]) -> ExtractReport:
        """Do this worker's share, from whatever state the cache is in; the last worker brings it to state complete."""
        manifest, stats = self.begun(), RunStats()
        if manifest.state == "complete":
            self.require_all_files(manifest)
            self.say(f"{self.where}: already complete, nothing to do")
        else:
            stats, manifest = self._make(manifest, alone)
        return self.report(manifest, stats)

    def begun(self) -> Manifest:
        """The manifest of the cache as it is, begun here if need be; workers that do not lead wait for the plan.

        Raises:
            MismatchError: it was begun with other inputs.
            InputError: the leading worker does not make anything.
        """
        if not self.worker.leads:
            self.await_plan()
        if not (self.out / MANIFEST_NAME).exists():
            return self.commit(self._begin())
        manifest = Manifest.read(self.out)
        self.require_same_inputs(manifest)
        changed = other_software(manifest.created_with)
        if changed and manifest.state != "complete":
            list_ = ", ".join(changed)
            self.say(f"warning: this cache was begun with other software; rounding may differ: {list_}")
        return manifest

    def report(self, manifest: Manifest, stats: RunStats) -> ExtractReport:
        """What was done, once the cache is planned."""
        assert manifest.data is not None
        assert manifest.totals is not None
        return ExtractReport(
            cache=self.where,
            fingerprint=manifest.fingerprint,
            samples=manifest.totals.samples - len(manifest.quarantined),
            tokens=manifest.totals.tokens,
            shards=manifest.totals.shards,
            quarantined=len(manifest.quarantined),
            dropped=manifest.data.dropped,
            run=stats,
            complete=manifest.state == "complete",
        )

    def await_plan(self) -> None:
        """Until the leading worker has prepared the samples and planned the shards.

        Raises:
            InputError: it has not made anything for half an hour.
        """
        seen, since = 0, time.monotonic()
        while not (self.out / MANIFEST_NAME).exists() or Manifest.read(self.out).state == "preparing":
            made = len(list((self.out / "samples").glob("*.arrow")))
            if made != seen:
                seen, since = made, time.monotonic()
            if time.monotonic() - since > PATIENCE_SECONDS:
                raise InputError(
                    f"{self.out}: worker {self.worker.rank} has waited {PATIENCE_SECONDS / 60:.0f} minutes for worker "
                    "0 to prepare the samples and has not seen it make any; look at its output, then start all again"
                )
            time.sleep(0.2)

    def _begin(self) -> Manifest:
        shape = self.shape
        info = TargetInfo(
            name=self.options.target.name,
            model_type=shape.model_type,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_hidden_layers,
            vocab_size=shape.vocab_size,
            tie_word_embeddings=shape.tie_word_embeddings,
        )
        return Manifest(
            state="preparing",
            identity=self.identity,
            target=info,
            target_layer_ids=self.layer_ids,
            dtype=self.dtype,
            codec=self.identity["codec"],
            capture=self.options.capture.to_dict(),
            created_with=software(),
        )

    def _make(self, manifest: Manifest, alone: Callable[[], bool]) -> tuple[RunStats, Manifest]:
        samples = self.prepared(manifest)
        plan = self.plan(manifest, samples)
        share = self.worker.share(range(len(plan)))
        absent = self.require_room(manifest, plan, share)
        stats = RunStats()
        if absent or manifest.state == "preparing":
            manifest, plan, extractor = self.loaded(manifest, samples, plan)
        missing = self.missing(manifest, plan, share)
        if len(missing) < len(share):
            self.say(f"{self.where}: {len(share) - len(missing):,} of {len(share):,} shards are finished")
        if missing:
            stats = self._run(self.runner(manifest, plan, samples, extractor), missing)
        return stats, self.sealed() if alone() else Manifest.read(self.out)

    def require_room(self, manifest: Manifest, plan: Plan, share: list[int]) -> list[int]:
        """Those of the shards ``share`` that have no file yet.

        Raises:
            InputError: the disk has no room for them.
        """
        absent = [number for number in share if not (self.out / shard_name(number)).exists()]
        missing_bytes = int(plan.shard_bytes(shards_schema(manifest))[absent].sum())
        require_space(self.out, missing_bytes + self.embedding_bytes(manifest))
        return absent

    def embedding_bytes(self, manifest: Manifest) -> int:
        """Of target/embeddings.safetensors, where it is still to be written."""
        return self.shape.embedding_bytes(torch_dtype(self.dtype)) if manifest.state == "preparing" else 0

    def missing(self, manifest: Manifest, plan: Plan, share: list[int]) -> list[int]:
        """Those of the shards ``share`` still to be made; the others are as planned.

        Raises:
            CacheError: a shard that is there is damaged, or holds other samples than planned.
        """
        return missing_shards(self.out, manifest.schema(), plan, share)

    def require_allowed(self) -> None:
        """Whether this job may still write.

        Raises:
            LockedError: another one has taken over.
        """

    def current(self) -> Manifest:
        """The manifest as it is now, another worker's perhaps."""
        return Manifest.read(self.out)

    def has_shard(self, number: int) -> bool:
        """Whether shard ``number`` is committed, by whomever."""
        return (self.out / shard_name(number)).exists()

    def commit(self, manifest: Manifest) -> Manifest:
        """Commit the manifest, once the files that it names are; gives the one that is there now."""
        manifest.write(self.out)
        return manifest

    def require_all_files(self, manifest: Manifest) -> None:
        """Whether a cache of state complete still has every file.

        Raises:
            CacheError: one is missing.
        """
        require_all_files(self.out, manifest)

    def loaded(
        self, manifest: Manifest, samples: PreparedSamples, plan: Plan
    ) -> tuple[Manifest, Plan, HiddenStateExtractor]:
        """The target, loaded, and the manifest of state extracting: what only a loaded target can say is decided here.

        Raises:
            MismatchError: this target decides otherwise than the one that the cache was begun with.
        """
        self.say(f"loading target {self.options.target.name} ({self.dtype}) on {self.device}")
        loaded = load_extractor(
            self.options,
            dtype=torch_dtype(self.dtype),
            device=self.device,
            target_layer_ids=self.layer_ids,
            longest=int(samples.num_tokens.max()),
            group=self.group,
        )
        extractor, decided = loaded.extractor, dict(loaded.decided)
        if manifest.state == "preparing":
            if self.options.plan.batch_tokens is None and "batch_tokens" not in manifest.identity:
                found = find_batch_tokens(
                    extractor, self.device, int(samples.num_tokens.max()), int(samples.num_tokens.sum())
                )
                self.say(f"--batch-tokens auto: {found:,}")
                decided["batch_tokens"] = found
            manifest = self.commit(self._planned(manifest, samples, plan, decided, loaded.embeddings))
            plan = self.plan(manifest, samples)
        require_same_identity(self.out, manifest.identity, {**manifest.identity, **decided})
        return manifest, plan, extractor

    def runner(
        self, manifest: Manifest, plan: Plan, samples: PreparedSamples, extractor: HiddenStateExtractor
    ) -> ShardRunner:
        """What makes shards of this cache on this worker's device."""
        return ShardRunner(
            cache=self.out,
            schema=manifest.schema(),
            plan=plan,
            samples=samples,
            extractor=extractor,
            device=self.device,
            on_nonfinite=self.options.on_nonfinite,
            timeline=self.timeline,
        )

    def plan(self, manifest: Manifest, samples: PreparedSamples) -> Plan:
        """The plan; shards do not depend on batch_tokens, so their sizes are right before it has been found out."""
        options = self.options.plan
        if options.batch_tokens is None:
            found = manifest.identity.get("batch_tokens", DEFAULT_BATCH_TOKENS)
            options = replace(options, batch_tokens=found)
        return Plan(samples.num_tokens, shards_schema(manifest).raw.token_bytes, options)

    def sealed(self) -> Manifest:
        """The manifest, of state complete if nothing is missing. Call it with the lock held alone."""
        manifest = Manifest.read(self.out)
        assert manifest.totals is not None
        there = all((self.out / shard_name(number)).exists() for number in range(manifest.totals.shards))
        return seal(self.out, manifest) if there and manifest.state != "complete" else manifest

    def prepared(self, manifest: Manifest) -> PreparedSamples:
        """The prepared samples, made or finished here while the state is preparing.

        Raises:
            InputError: rows that cannot be prepared.
            CacheError: they are not what the manifest says.
        """
        if manifest.totals is not None:
            samples = PreparedSamples(self.out / "samples", manifest.totals.parts)
            if samples.digest() != manifest.identity["samples"]:
                raise CacheError(
                    self.out / "samples", "is not what the manifest says; the prepared samples are damaged"
                )
            return samples
        try:
            return self._prepare()
        except InputError:
            # Rows that cannot be prepared have to change, and with them the identity: these parts are of no use.
            if not any((self.out / "shards").iterdir()):
                shutil.rmtree(self.out / "samples")
                (self.out / MANIFEST_NAME).unlink()
            raise

    def _prepare(self) -> PreparedSamples:
        total = self.source.num_rows
        with Reporter("prepare", total, "rows") as reporter:
            parts = prepare(
                self.source,
                self.tokenizer,
                self.options.prepare,
                self.out / "samples",
                progress=lambda done, _, kept: reporter.update(done, f"{kept:,} samples"),
            )
        samples = PreparedSamples(self.out / "samples", parts)
        if not len(samples):
            dropped = _listed(samples.dropped)
            raise InputError(f"{self.source.name}: no sample is left to extract; dropped rows: {dropped}")
        self.say_prepared(samples)
        return samples

    def say_prepared(self, samples: PreparedSamples) -> None:
        """What became of the rows."""
        self.say(
            f"prepared {len(samples):,} samples, {int(samples.num_tokens.sum()):,} tokens from {samples.num_rows:,} "
            f"rows; dropped: {_listed(samples.dropped)}"
        )

    def _planned(
        self,
        manifest: Manifest,
        samples: PreparedSamples,
        plan: Plan,
        decided: dict[str, Any],
        embeddings: nn.Module,
    ) -> Manifest:
        """The manifest of state extracting; the target's folder is written first."""
        tied, scale = write_target_files(self.out, embeddings, self.config, self.tokenizer)
        totals = Totals(
            parts=sum(1 for _ in (self.out / "samples").glob("samples-*.arrow")),
            samples=len(samples),
            tokens=int(samples.num_tokens.sum()),
            loss_tokens=int(samples.num_loss_tokens.sum()),
            shards=len(plan),
        )
        paths = [part_path(self.out / "samples", n) for n in range(totals.parts)]
        paths += sorted(path for path in (self.out / "target").rglob("*") if path.is_file())
        names = [path.relative_to(self.out).as_posix() for path in paths]
        return manifest.extracting(
            {**manifest.identity, **decided, "samples": samples.digest()},
            target=replace(manifest.target, tie_word_embeddings=tied, embed_scale=scale),
            data=DataInfo(name=self.source.name, rows=samples.num_rows, dropped=dict(sorted(samples.dropped.items()))),
            totals=totals,
            files=describe_files(self.out, names),
        )

    def _run(self, runner: ShardRunner, missing: list[int]) -> RunStats:
        todo = sum(runner.plan.shard(number).tokens for number in missing)
        if self.on_todo is not None:
            self.on_todo(todo)
        before = time.monotonic() - self.started
        if self.on_stats is not None:
            stats = runner.run(missing, self.on_stats)
        else:
            with Reporter("extract", todo, "tokens") as reporter:
                stats = runner.run(missing, lambda stats: reporter.update(stats.tokens, progress_note(stats)))
        stats.seconds_to_first_batch = before
        if self.options.profile is not None and self.worker.leads:
            self.timeline.write(self.options.profile)
            say(f"{self.options.profile}: what each thread did when; open it at ui.perfetto.dev")
        return stats


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()) if count) or "none"
