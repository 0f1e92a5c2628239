"""One extraction from end to end: prepare -> plan -> run -> seal, each step resumed where an earlier run stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np

from cache_format.codecs import Codec, codec_from_dict, codec_named
from cache_format.codecs.dtypes import torch_dtype
from cache_format.errors import CacheError, InputError
from cache_format.layout.manifest import (
    LATER_IDENTITY,
    MANIFEST_NAME,
    STATISTICS,
    DataInfo,
    Manifest,
    SourceInfo,
    require_same_identity,
)
from cache_format.layout.samples import PreparedSamples
from extractor.config import DEFAULT_BATCH_TOKENS, ExtractOptions
from extractor.data.dataset import open_source
from extractor.data.prepare import form_of_source, prepare
from extractor.job.append import require_same_job
from extractor.job.calibrate import calibration_rows
from extractor.job.destination import Destination
from extractor.job.divided_preparation import await_plan, division_of, help_prepare
from extractor.job.folder_destination import FolderDestination
from extractor.job.identity import compare_hardware, inputs_identity, samples_identity, software, template_date
from extractor.job.kept_window import begin_window, run_window
from extractor.job.out_folder import refuse_out_inside_data, refuse_profile, require_space, shards_schema
from extractor.job.plan import Plan
from extractor.job.planned_manifest import planned_manifest, target_info
from extractor.job.report import ExtractReport, bad_row_notes, dropped_note, noted_notes, progress_note
from extractor.job.run_shards import RunStats, ShardRunner
from extractor.job.sources import source_infos, source_note
from extractor.job.timeline import Timeline
from extractor.job.url_destination import UrlDestination
from extractor.job.worker import Worker
from extractor.target.backend import TargetBackend
from extractor.target.layer_ids import chosen_layer_ids
from extractor.target.load_backend import load_backend
from extractor.target.load_target import TargetShape, load_config, load_tokenizer, resolve_device
from extractor.target.parallel_plan import require_plan
from extractor.target.quantised import run_dtype
from extractor.target.target_identity import identify_target
from extractor.target.tensor_parallel import Group, joined
from extractor.target.unloaded import require_runnable
from extractor.target.vllm.refused import require_servable
from extractor.terminal.progress import Reporter, say


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
    with opened(options, worker or Worker(), on_todo, on_stats) as job:
        report = job.run()
        job.destination.close(report.complete)
        return report


@contextmanager
def opened(
    options: ExtractOptions,
    worker: Worker,
    on_todo: Callable[[int], None] | None = None,
    on_stats: Callable[[RunStats], None] | None = None,
) -> Iterator[Job]:
    """The job of ``options``, its inputs compared with the cache that may be there, which is held for writing.

    Raises:
        DFlashCacheError: as :func:`extract`; nothing was written.
    """
    destination = destination_of(options, worker)
    destination.refuse_foreign()
    sources = options.data if isinstance(options.data, tuple) else (options.data,)
    refuse_out_inside_data(
        options.out, [source.name for source in sources], "--out" if not options.url else "--scratch"
    )
    if options.profile is not None:
        refuse_profile(options.profile, options.out, [source.name for source in sources])
    stored = destination.manifest()
    job = Job(options, destination, worker, stored, on_todo, on_stats)
    if stored is not None:
        job.require_same_inputs(stored)
    if options.append_to is not None:
        require_same_job(options.append_to, job.identity)
    with joined(options.target, job.device) as job.group, destination.held():
        yield job


def destination_of(options: ExtractOptions, worker: Worker) -> Destination:
    """Where ``options`` want the cache; at a URL each worker has a scratch folder of its own."""
    if options.url is None:
        return FolderDestination(options.out, worker.job)
    return UrlDestination(options.url, options.out / f"worker-{worker.rank}", leads=worker.leads)


class Job:
    """The inputs of one extraction, opened and identified; nothing is written before ``run``.

    Its steps are what every engine is made of: :meth:`begun`, :meth:`prepared`, :meth:`plan`, :meth:`loaded`,
    :meth:`runner`; what they mean in a folder or at a URL, the destination knows.
    """

    def __init__(
        self,
        options: ExtractOptions,
        destination: Destination,
        worker: Worker,
        stored: Manifest | None = None,
        on_todo: Callable[[int], None] | None = None,
        on_stats: Callable[[RunStats], None] | None = None,
    ):
        """``stored``: of the cache that is there already; what was decided by the day keeps that day."""
        self.options, self.destination, self.worker = options, destination, worker
        self.folder, self.where = destination.folder, destination.where
        self.on_todo, self.on_stats = on_todo, on_stats
        self.started = time.monotonic()
        self.timeline = Timeline(options.profile is not None)
        target = options.target
        self.device = resolve_device(target.device, worker.local_rank * target.devices)
        self.config = load_config(target.name, target.revision, target.trust_remote_code)
        self.dtype = run_dtype(target, self.config, self.device)
        self.shape = TargetShape.from_config(self.config)
        require_plan(target, self.config)
        require_runnable(target, self.config, torch_dtype(self.dtype))
        if target.backend == "vllm":
            require_servable(target, self.config)
        self.layer_ids = chosen_layer_ids(target, self.shape.num_hidden_layers)
        self.tokenizer = load_tokenizer(target.name, target.revision, target.trust_remote_code, target.chat_template)
        self.source = open_source(options.data, options.prepare.limit)
        self.group: Group | None = None
        """the processes that the target is divided over, with --tp-plan"""
        self.target = identify_target(
            target.name,
            target.revision,
            self.config,
            adapter=target.adapter,
            trust_remote_code=target.trust_remote_code,
        )
        self.identity = inputs_identity(
            options,
            target=self.target,
            tokenizer=self.tokenizer,
            target_layer_ids=self.layer_ids,
            dtype=self.dtype,
            data_digest=self.source.digest,
        )
        today = template_date(self.tokenizer, options.prepare, stored)
        if today is not None:
            self.identity["template_date"] = today
        self.prepare_options = replace(options.prepare, template_date=today, num_embeddings=self.shape.vocab_size)

    def require_same_inputs(self, stored: Manifest) -> None:
        """Refuse to go on with a cache begun with others; what only the loaded target decides is compared then.

        Raises:
            MismatchError: names each field that differs.
        """
        later = {name: stored.identity[name] for name in (*LATER_IDENTITY, "batch_tokens") if name in stored.identity}
        require_same_identity(self.where, stored.identity, {**later, **self.identity})

    def say(self, text: str) -> None:
        """To the terminal, once a job."""
        if self.worker.leads:
            say(text)

    def run(self) -> ExtractReport:
        """Do this worker's share, from whatever state the cache is in; the last worker brings it to state complete."""
        manifest, stats = self.begun(), RunStats()
        if manifest.state == "complete":
            self.destination.require_all_files(manifest)
            self.say(f"{self.where}: already complete, nothing to do")
        else:
            stats, manifest = self._make(manifest)
        return self.report(manifest, stats)

    def begun(self) -> Manifest:
        """The manifest of the cache as it is, begun here if need be; workers that do not lead wait for the plan.

        Raises:
            MismatchError: it was begun with other inputs.
            InputError: the leading worker does not make anything.
        """
        if not self.worker.leads:
            await_plan(self.destination, self.worker.rank, self._prepare_share)
        self.destination.begin()
        if not (self.folder / MANIFEST_NAME).exists():
            return self.commit(self._begin())
        manifest = Manifest.read(self.folder)
        self.require_same_inputs(manifest)
        if manifest.state != "complete":
            compare_hardware(self.where, manifest.created_with, self.device, self.options.strict_hardware)
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
            bad_rows=manifest.data.bad_rows,
            run=stats,
            complete=manifest.state == "complete",
        )

    def _begin(self) -> Manifest:
        return Manifest(
            state="preparing",
            identity=self.identity,
            target=target_info(self.options.target.name, self.shape),
            target_layer_ids=self.layer_ids,
            dtype=self.dtype,
            codec=self.identity["codec"],
            capture=self.options.capture.to_dict(),
            created_with=software(self.device),
            token_snr=not codec_named(self.options.codec).lossless,
            command=self.options.command,
        )

    def _make(self, manifest: Manifest) -> tuple[RunStats, Manifest]:
        samples = self.prepared(manifest)
        plan = self.plan(manifest, samples)
        share = self.worker.share(range(len(plan)))
        absent = self.require_room(manifest, plan, share)
        begin_window(self.folder, self.options.keep, self.worker)
        stats, kept = RunStats(), self.options.keep is not None
        if absent or kept or manifest.state == "preparing":
            manifest, plan, backend = self.loaded(manifest, samples, plan)
        missing = self.destination.missing(manifest.schema(), plan, share)
        if len(missing) < len(share):
            self.say(f"{self.where}: {len(share) - len(missing):,} of {len(share):,} shards are finished")
        if missing or kept:
            stats = self._run(self.runner(manifest, plan, samples, backend), missing)
        seals = not kept and self.destination.alone()
        return stats, self.destination.seal() if seals else Manifest.read(self.folder)

    def require_room(self, manifest: Manifest, plan: Plan, share: list[int]) -> list[int]:
        """Those of the shards ``share`` that are not there yet.

        Raises:
            InputError: the disk has no room for them.
        """
        absent = self.destination.absent(share)
        sizes, keep = plan.shard_bytes(shards_schema(manifest)), self.options.keep
        needed = self.destination.room(sizes[absent] if keep is None else np.sort(sizes[absent])[-keep.keep :])
        if manifest.state == "preparing":
            needed += self.shape.embedding_bytes(torch_dtype(self.dtype))
        require_space(self.folder, needed)
        return absent

    def commit(self, manifest: Manifest) -> Manifest:
        """Commit the manifest, once the files that it names are; gives the one that is there now.

        Raises:
            MismatchError: another job, with other inputs, has begun a cache there meanwhile.
        """
        there = self.destination.commit(manifest)
        self.require_same_inputs(there)
        return there

    def loaded(self, manifest: Manifest, samples: PreparedSamples, plan: Plan) -> tuple[Manifest, Plan, TargetBackend]:
        """The target, loaded, and the manifest of state extracting: what only a loaded target can say is decided here.

        Raises:
            MismatchError: this target decides otherwise than the one that the cache was begun with.
        """
        self.say(f"loading target {self.options.target.name} ({self.dtype}) on {self.device}")
        backend = load_backend(
            self.options,
            dtype=torch_dtype(self.dtype),
            device=self.device,
            target_layer_ids=self.layer_ids,
            longest=int(samples.num_tokens.max()),
            group=self.group,
        )
        self.target.require_unchanged()
        decided = dict(backend.decided)
        if manifest.state == "preparing":
            if self.options.plan.batch_tokens is None and "batch_tokens" not in manifest.identity:
                longest, largest_shard = int(samples.num_tokens.max()), plan.largest_shard_tokens
                found = backend.find_batch_tokens(self.device, longest, largest_shard)
                self.say(f"--batch-tokens auto: {found:,}")
                decided["batch_tokens"] = found
            codec = self._calibrated(manifest, samples, plan, decided, backend)
            known = replace(manifest, codec=codec.to_dict())
            planned = self._planned(known, samples, plan, decided, backend)
            if self.options.append_to is not None:
                require_same_job(self.options.append_to, planned.identity)
            manifest = self.commit(planned)
            plan = self.plan(manifest, samples)
        # What the target has not decided is not as it was, if it was there.
        later = set(LATER_IDENTITY) - {"samples", STATISTICS}
        as_before = {name: value for name, value in manifest.identity.items() if name not in later}
        require_same_identity(self.where, manifest.identity, {**as_before, **decided})
        return manifest, plan, backend

    def _calibrated(
        self, manifest: Manifest, samples: PreparedSamples, plan: Plan, decided: dict[str, Any], backend: TargetBackend
    ) -> Codec:
        """The codec, once it knows of the states what it has to know; the target is run on some of them."""
        codec = codec_from_dict(manifest.codec)
        if codec.is_calibrated:
            return codec
        self.say(f"codec {codec.name}: the first rows of some shards are run to find its steps")
        if "batch_tokens" in decided:
            plan = Plan(
                samples.num_tokens,
                shards_schema(manifest).raw.token_bytes,
                replace(self.options.plan, batch_tokens=decided["batch_tokens"]),
            )
        rows = calibration_rows(self.runner(manifest, plan, samples, backend))
        return codec.calibrated(rows, manifest.schema().states)

    def runner(self, manifest: Manifest, plan: Plan, samples: PreparedSamples, backend: TargetBackend) -> ShardRunner:
        """What makes shards of this cache on this worker's device."""
        return ShardRunner(
            cache=self.folder,
            schema=manifest.schema(),
            plan=plan,
            samples=samples,
            backend=backend,
            device=backend.rows_device(self.device),
            on_nonfinite=self.options.on_nonfinite,
            timeline=self.timeline,
            on_commit=self.destination.on_commit(manifest.schema()),
        )

    def plan(self, manifest: Manifest, samples: PreparedSamples) -> Plan:
        """The plan; shards do not depend on batch_tokens, so their sizes are right before it has been found out."""
        options = self.options.plan
        if options.batch_tokens is None:
            found = manifest.identity.get("batch_tokens", DEFAULT_BATCH_TOKENS)
            options = replace(options, batch_tokens=found)
        return Plan(samples.num_tokens, shards_schema(manifest).raw.token_bytes, options)

    def prepared(self, manifest: Manifest) -> PreparedSamples:
        """The prepared samples, made or finished here while the state is preparing.

        Raises:
            InputError: rows that cannot be prepared.
            CacheError: they are not what the manifest says.
        """
        if manifest.totals is not None:
            samples = PreparedSamples(self.folder / "samples", manifest.totals.parts)
            if samples.digest() != manifest.identity["samples"]:
                raise CacheError(
                    self.folder / "samples", "is not what the manifest says; the prepared samples are damaged"
                )
            return samples
        try:
            return self._prepare()
        except InputError:
            self.destination.forget()
            raise

    def _prepare(self) -> PreparedSamples:
        for source in self.source.sources:
            if source.note:
                self.say(source.note)
        total = self.source.num_rows
        with Reporter("prepare", total, "rows") as reporter:
            parts = self._prepare_parts(lambda done, _, kept: reporter.update(done, f"{kept:,} samples"))
        samples = PreparedSamples(self.folder / "samples", parts)
        if not len(samples):
            why = "; ".join([dropped_note(samples.dropped), *bad_row_notes(samples.dropped.bad_rows)])
            raise InputError(f"{self.source.name}: no sample is left to extract; dropped rows: {why}")
        self.say_prepared(samples)
        return samples

    def _prepare_parts(self, progress: Callable[[int, int | None, int], None] | None = None) -> int:
        return prepare(
            self.source,
            self.tokenizer,
            self.prepare_options,
            self.folder / "samples",
            made_for=samples_identity(self.identity),
            progress=progress,
            division=division_of(self.worker, self.destination),
        )

    def prepare_share(self) -> None:
        """Of a worker that does not lead and will not wait: what it can of the samples, while they are prepared."""
        help_prepare(self.destination, self._prepare_share)

    def _prepare_share(self, manifest: Manifest) -> None:
        """Of a worker that does not lead; what is wrong with the rows, the leading one meets too, and says."""
        self.require_same_inputs(manifest)
        with suppress(InputError):
            self._prepare_parts()

    def say_prepared(self, samples: PreparedSamples) -> None:
        """What became of the rows."""
        self.say(
            f"prepared {len(samples):,} samples, {int(samples.num_tokens.sum()):,} tokens from {samples.num_rows:,} "
            f"rows; dropped: {dropped_note(samples.dropped)}"
        )
        for info in self.source_infos(samples):
            self.say(source_note(info))
        for note in noted_notes(samples.dropped.noted):
            self.say(note)

    def source_infos(self, samples: PreparedSamples) -> list[SourceInfo]:
        """What each source of the data gave."""
        forms = [form_of_source(columns, self.prepare_options) for columns in self.source.column_sets]
        return source_infos(self.source, forms, samples)

    def _planned(
        self,
        manifest: Manifest,
        samples: PreparedSamples,
        plan: Plan,
        decided: dict[str, Any],
        backend: TargetBackend,
    ) -> Manifest:
        """See :func:`planned_manifest`."""
        data = DataInfo(
            name=self.source.name,
            rows=samples.num_rows,
            dropped=dict(sorted(samples.dropped.items())),
            bad_rows=dict(sorted(samples.dropped.bad_rows.items())),
            sources=self.source_infos(samples),
            noted=dict(sorted(samples.dropped.noted.items())),
        )
        return planned_manifest(
            self.folder,
            manifest,
            samples,
            backend,
            config=self.config,
            tokenizer=self.tokenizer,
            data=data,
            num_shards=len(plan),
            decided=decided,
            tell=self.say,
        )

    def watched(self, report: Callable[[RunStats], None] = lambda stats: None) -> Callable[[RunStats], None]:
        """``report``, called after each batch; a target whose weights were written to meanwhile ends the run before
        the shard is committed: on the CPU they are mapped into memory, not copied."""

        def look_and_report(stats: RunStats) -> None:
            self.target.require_unchanged(in_place=True)
            report(stats)

        return look_and_report

    def _run(self, runner: ShardRunner, missing: list[int]) -> RunStats:
        todo = sum(runner.plan.shard(number).tokens for number in missing)
        if self.on_todo is not None:
            self.on_todo(todo)
        before = time.monotonic() - self.started
        window = self.options.keep

        def run(report: Callable[[RunStats], None]) -> RunStats:
            if window is None:
                return runner.run(missing, self.watched(report))
            return run_window(runner, window, self.worker, self.watched(report), self.say)

        if self.on_stats is not None:
            stats = run(self.on_stats)
        else:
            with Reporter("extract", None if window else todo, "tokens") as reporter:
                stats = run(lambda stats: reporter.update(stats.tokens, progress_note(stats)))
        stats.seconds_to_first_batch = before
        if self.options.profile is not None and self.worker.leads:
            self.timeline.write(self.options.profile)
            say(f"{self.options.profile}: what each thread did when; open it at ui.perfetto.dev")
        return stats
