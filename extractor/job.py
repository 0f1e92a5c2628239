"""One extraction from end to end: prepare -> plan -> run -> seal, each step resumed where an earlier run stopped."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache_format.errors import CacheError, InputError
from cache_format.lock import LOCK_NAME, writing
from cache_format.manifest import (
    MANIFEST_NAME,
    DataInfo,
    Manifest,
    TargetInfo,
    Totals,
    require_same_identity,
    torch_dtype,
)
from cache_format.repair import QUARANTINE_NAME
from cache_format.samples import PreparedSamples, part_path
from cache_format.seal import describe_files, seal
from cache_format.shard import ShardSchema, shard_name
from cache_format.storage import make_folder, remove_temporaries
from extractor.config import ExtractOptions
from extractor.dataset import open_source
from extractor.forward import HiddenStateExtractor, padding_mode
from extractor.identity import inputs_identity, other_software, software
from extractor.load_target import (
    TargetShape,
    load_config,
    load_target,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from extractor.plan import Plan
from extractor.prepare import prepare
from extractor.progress import Reporter, compact, say, size
from extractor.resume import missing_shards, require_all_files
from extractor.run import RunStats, ShardRunner
from extractor.target import HFDFlashTargetModel
from extractor.target_files import write_target_files


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What ``extract`` did, for the screen and for ``--json``."""

    cache: str
    fingerprint: str
    samples: int
    tokens: int
    shards: int
    quarantined: int
    dropped: dict[str, int]
    run: RunStats
    """of this run alone; zeros where nothing was left to do"""


def extract(options: ExtractOptions) -> ExtractReport:
    """Make the cache that ``options`` describe, or finish the one that an earlier run with the same options began.

    Raises:
        DFlashCacheError: bad input (nothing written), another cache in ``out``, a refused write, non-finite states.
    """
    _refuse_foreign_folder(options.out)
    job = _Job(options)
    stored = Manifest.read(options.out) if (options.out / MANIFEST_NAME).exists() else None
    if stored is not None:
        require_same_identity(options.out, stored.identity, job.identity)
    make_folder(options.out)
    with writing(options.out):
        return job.run()


class _Job:
    """The inputs of one extraction, opened and identified; nothing is written before ``run``."""

    def __init__(self, options: ExtractOptions):
        self.options, self.out = options, options.out
        target = options.target
        self.device = resolve_device(target.device)
        self.dtype = resolve_dtype(target.dtype, self.device)
        self.config = load_config(target.name, target.revision, target.trust_remote_code)
        self.shape = TargetShape.from_config(self.config)
        self.layer_ids = target.layer_ids(self.shape.num_hidden_layers)
        self.tokenizer = load_tokenizer(target.name, target.revision, target.trust_remote_code)
        self.source = open_source(options.data, options.prepare.limit)
        self.identity = inputs_identity(
            options,
            config=self.config,
            tokenizer=self.tokenizer,
            target_layer_ids=self.layer_ids,
            dtype=self.dtype,
            data_digest=self.source.digest,
        )

    def run(self) -> ExtractReport:
        """Bring the cache to state complete, from whatever state it is in."""
        out = self.out
        for folder in (out, out / "samples", out / "shards", out / "target"):
            make_folder(folder)
            remove_temporaries(folder)
        if (out / MANIFEST_NAME).exists():
            manifest = Manifest.read(out)
            require_same_identity(out, manifest.identity, self.identity)
            changed = other_software(manifest.created_with)
            if changed and manifest.state != "complete":
                say(f"warning: this cache was begun with other software; rounding may differ: {', '.join(changed)}")
        else:
            manifest = self._begin()
            manifest.write(out)
        stats = RunStats()
        if manifest.state == "complete":
            require_all_files(out, manifest)
            say(f"{out}: already complete, nothing to do")
        else:
            stats, manifest = self._make(manifest)
        assert manifest.data is not None
        assert manifest.totals is not None
        return ExtractReport(
            cache=str(out),
            fingerprint=manifest.fingerprint,
            samples=manifest.totals.samples - len(manifest.quarantined),
            tokens=manifest.totals.tokens,
            shards=manifest.totals.shards,
            quarantined=len(manifest.quarantined),
            dropped=manifest.data.dropped,
            run=stats,
        )

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

    def _make(self, manifest: Manifest) -> tuple[RunStats, Manifest]:
        try:
            samples = self._prepared(manifest)
        except InputError:
            # Rows that cannot be prepared have to change, and with them the identity: these parts are of no use.
            if not any((self.out / "shards").iterdir()):
                shutil.rmtree(self.out / "samples")
                (self.out / MANIFEST_NAME).unlink()
            raise
        plan = Plan(samples.num_tokens, _schema(manifest).token_bytes, self.options.plan)
        sizes = plan.shard_bytes(_schema(manifest))
        absent = [number for number in range(len(plan)) if not (self.out / shard_name(number)).exists()]
        require_space(self.out, int(sizes[absent].sum()))
        stats = RunStats()
        if absent or manifest.state == "preparing":
            target, extractor, decided = self._load(samples)
            if manifest.state == "preparing":
                manifest = self._planned(manifest, samples, plan, target, decided)
                manifest.write(self.out)
            require_same_identity(self.out, manifest.identity, decided)
        missing = missing_shards(self.out, manifest.schema(), plan)
        if len(missing) < len(plan):
            say(f"{self.out}: {len(plan) - len(missing):,} of {len(plan):,} shards are finished")
        if missing:
            runner = ShardRunner(
                cache=self.out,
                schema=manifest.schema(),
                plan=plan,
                samples=samples,
                extractor=extractor,
                device=self.device,
                on_nonfinite=self.options.on_nonfinite,
            )
            stats = self._run(runner, missing)
        return stats, seal(self.out, manifest)

    def _prepared(self, manifest: Manifest) -> PreparedSamples:
        if manifest.totals is not None:
            samples = PreparedSamples(self.out / "samples", manifest.totals.parts)
            if samples.digest() != manifest.identity["samples"]:
                raise CacheError(
                    self.out / "samples", "is not what the manifest says; the prepared samples are damaged"
                )
            return samples
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
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(samples.dropped.items()) if count)
        if not len(samples):
            raise InputError(f"{self.source.name}: no sample is left to extract; dropped rows: {dropped or 'none'}")
        say(
            f"prepared {len(samples):,} samples, {int(samples.num_tokens.sum()):,} tokens from {samples.num_rows:,} "
            f"rows; dropped: {dropped or 'none'}"
        )
        return samples

    def _load(self, samples: PreparedSamples) -> tuple[HFDFlashTargetModel, HiddenStateExtractor, dict[str, Any]]:
        """The target, ready to run, and the part of the identity that only the loaded target decides."""
        options = self.options.target
        say(f"loading target {options.name} ({self.dtype}) on {self.device}")
        model = load_target(
            options.name,
            revision=options.revision,
            dtype=torch_dtype(self.dtype),
            device=self.device,
            attn_implementation=options.attn_implementation,
            trust_remote_code=options.trust_remote_code,
        )
        target = HFDFlashTargetModel(model, self.layer_ids)
        mode = padding_mode(target, longest=int(samples.num_tokens.max()))
        attention = getattr(model.config, "_attn_implementation", None) or "eager"
        extractor = HiddenStateExtractor(target, mode, self.options.capture)
        return target, extractor, {"attn_implementation": attention, "padding": mode}

    def _planned(
        self,
        manifest: Manifest,
        samples: PreparedSamples,
        plan: Plan,
        target: HFDFlashTargetModel,
        decided: dict[str, Any],
    ) -> Manifest:
        """The manifest of state extracting; the target's folder is written first."""
        tied, scale = write_target_files(self.out, target.model, self.config, self.tokenizer)
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
        with Reporter("extract", todo, "tokens") as reporter:
            return runner.run(missing, lambda stats: reporter.update(stats.tokens, _note(stats)))


def require_space(cache: Path, num_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        InputError: the disk has less free space than the missing shards need.
    """
    free = shutil.disk_usage(cache).free
    if free < num_bytes:
        raise InputError(
            f"{cache}: the missing shards need {size(num_bytes)} but the disk has {size(free)} free. Free some space, "
            "choose another --out, fewer layers (--target-layers), a smaller --max-length, or --limit."
        )


def _schema(manifest: Manifest) -> ShardSchema:
    """The shards' schema for sizes: the fingerprint may not be known yet, but its length is."""
    schema = manifest.schema()
    return schema if schema.fingerprint else replace(schema, fingerprint="0" * 64)


def _refuse_foreign_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a new or empty folder")
    if out.is_dir() and not (out / MANIFEST_NAME).exists():
        known = {"samples", "shards", "target", QUARANTINE_NAME, LOCK_NAME}
        strange = sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.endswith(".tmp"))
        if strange:
            raise InputError(f"--out {out} is not empty and not a cache (it has {strange[0]!r}); name another folder")


def _note(stats: RunStats) -> str:
    seconds = max(stats.seconds, 1e-9)
    return (
        f"{compact(stats.samples)} samples, {compact(stats.tokens / seconds)} tok/s, "
        f"{stats.bytes / seconds / 1e9:.2f} GB/s"
    )
