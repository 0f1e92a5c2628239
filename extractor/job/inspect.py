"""inspect: what a cache holds, from its manifest alone."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_format.codecs import codec_from_dict
from cache_format.errors import InputError
from cache_format.layout.collection import collection_at
from cache_format.layout.manifest import MANIFEST_NAME, CommandLine, Manifest, SourceInfo
from cache_format.layout.samples import BadRows
from cache_format.layout.shard_layout import finished_shards, shard_name
from cache_format.storage.folder import open_folder
from extractor.job.report import bad_row_notes, dropped_note
from extractor.job.sources import source_note
from extractor.terminal.progress import size


def summarise(cache: Path | str) -> dict[str, Any]:
    """The manifest, and sizes worked out from it.

    Raises:
        InputError: ``cache`` is not a feature cache.
        CacheError: its manifest is damaged.
    """
    folder = open_folder(cache)
    if not folder.has(MANIFEST_NAME):
        raise InputError(f"{cache}: is not a feature cache: there is no {MANIFEST_NAME}")
    folder.local(MANIFEST_NAME)
    manifest = Manifest.read(folder.path)
    summary = {"cache": str(cache), **asdict(manifest)}
    del summary["files"]
    summary["codec"] = codec_from_dict(manifest.codec).asked
    if manifest.totals is not None:
        finished = [shard_name(number) for number in finished_shards(folder.names("shards"))]
        sizes = [found for name in finished if (found := folder.size(name)) is not None]
        summary |= {
            "finished_shards": len(sizes),
            "shard_bytes": sum(sizes),
        }
    return summary


def summarise_collection(place: Path | str) -> dict[str, Any] | None:
    """``summarise`` of each cache of a collection, and their totals; None where ``place`` is none.

    Raises:
        CacheError: it is damaged, or a cache is missing or another one than it was.
    """
    listed = collection_at(place) if isinstance(place, Path) else None
    if listed is None:
        return None
    caches = [summarise(path) for path in listed]
    names = ("samples", "tokens", "loss_tokens", "shards")
    totals = {name: sum(cache["totals"][name] for cache in caches) for name in names}
    return {"collection": str(place), "totals": totals, "caches": caches}


def describe_collection(collection: dict[str, Any]) -> str:
    """``summarise_collection`` for a person."""
    caches, totals = collection["caches"], collection["totals"]
    one = caches[0]
    lines = [
        f"{collection['collection']}: {len(caches)} caches, {totals['samples']:,} samples, {totals['tokens']:,} tokens "
        f"({totals['loss_tokens']:,} learned), {totals['shards']:,} shards",
        f"target {one['target']['name']}, layers {', '.join(map(str, one['target_layer_ids']))}, {one['dtype']}",
    ]
    for cache in caches:
        lines.append(
            f"  {cache['cache']}: {cache['state']}, {cache['totals']['samples']:,} samples, "
            f"{cache['totals']['tokens']:,} tokens, {size(cache['shard_bytes'])}, data {cache['data']['name']}"
        )
    return "\n".join(lines)


def describe(summary: dict[str, Any], everything: bool = False) -> str:
    """``summarise`` for a person: ten lines that matter, or ``everything`` that is not there already."""
    lines = _what_matters(summary)
    if everything:
        lines += _the_rest(summary)
    else:
        lines.append(("more", f"dflash-cache inspect {shlex.quote(summary['cache'])} --all"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines)


def _what_matters(summary: dict[str, Any]) -> list[tuple[str, str]]:
    target, data, totals = summary["target"], summary["data"], summary["totals"]
    captures = [f"{name} {value}" if value is not True else name for name, value in summary["capture"].items() if value]
    layers = ", ".join(map(str, summary["target_layer_ids"]))
    lines = [
        ("cache", f"{summary['cache']}: {summary['state']}"),
        ("target", f"{target['name']} ({target['model_type']}, {target['num_hidden_layers']} layers)"),
        ("hidden_states", f"layers {layers}; {target['hidden_size']} wide; {summary['dtype']}"),
        ("stored as", ", and ".join([f"codec {_told(summary['codec'])}{_reached(summary)}", *captures])),
    ]
    if totals:
        stored, learned = totals["samples"] - len(summary["quarantined"]), 100 * totals["loss_tokens"]
        lines += [
            ("data", f"{data['name']}, {data['rows']:,} rows; dropped: {dropped_note(data['dropped'])}"),
            (
                "samples",
                f"{stored:,}, of {totals['tokens']:,} tokens; {totals['loss_tokens']:,} of them learned "
                f"({learned / max(totals['tokens'], 1):.0f} %)",
            ),
            (
                "shards",
                f"{summary['finished_shards']:,} of {totals['shards']:,}, "
                f"{size(summary['shard_bytes'])}{_a_token(summary)}",
            ),
        ]
        if len(data["sources"]) > 1:
            lines += [("source", source_note(SourceInfo(**source))) for source in data["sources"]]
        bad_rows = {reason: BadRows(**found) for reason, found in data["bad_rows"].items()}
        lines += [("bad rows", note) for note in bad_row_notes(bad_rows)]
    lines += _snr_lines(summary)
    if summary["quarantined"]:
        lines.append(("quarantined", f"sample_id {', '.join(map(str, summary['quarantined']))}"))
    if command := summary["command"]:
        lines.append(("made by", CommandLine(**command).shell()))
    lines.append(("fingerprint", summary["fingerprint"] or "not yet known"))
    return lines


def _the_rest(summary: dict[str, Any]) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    if summary["totals"] and len(summary["data"]["sources"]) == 1:
        lines += [("source", source_note(SourceInfo(**source))) for source in summary["data"]["sources"]]
    if command := summary["command"]:
        lines += [(f"  {name}", f"is {path}") for name, path in command["paths"].items() if name != path]
    lines.append(("", ""))
    lines.append(("identity", "what a resume compares"))
    shown = ("dtype", "target_layer_ids", "codec", "capture")
    for name, value in _flat({name: value for name, value in summary["identity"].items() if name not in shown}):
        is_digest = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value)
        lines.append((f"  {name}", f"digest {value}" if is_digest else "default" if value is None else str(value)))
    lines.append(("", ""))
    lines.append(("made with", "packages and hardware"))
    lines += [(f"  {name}", str(version)) for name, version in summary["created_with"].items()]
    return lines


def _flat(options: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` -> ``[("a.b", 1)]``."""
    found: list[tuple[str, Any]] = []
    for name, value in options.items():
        found += _flat(value, f"{before}{name}.") if isinstance(value, dict) else [(f"{before}{name}", value)]
    return found


def _reached(summary: dict[str, Any]) -> str:
    """What the codec came to, once all shards are there: of the size, and how near the states are."""
    measured = summary["measured"]
    if not measured or summary["codec"]["name"] == "raw":
        return ""
    text = f", {100 * measured['ratio']:.1f} % of raw"
    if not measured["snr_db"] or measured["median_snr_db"]:
        return text
    by_layer = zip(summary["target_layer_ids"], measured["snr_db"], strict=True)
    return f"{text}; SNR {', '.join(f'layer {layer}: {snr:.1f} dB' for layer, snr in by_layer)}"


def _snr_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """By layer, of the median token and of the worst: over all together a few massive tokens would decide."""
    measured, lines = summary["measured"] or {}, []
    for name, told in {"median_snr_db": "SNR, median token", "worst_snr_db": "SNR, worst token"}.items():
        if found := measured.get(name):
            by_layer = zip(summary["target_layer_ids"], found, strict=True)
            lines.append((told, ", ".join(f"layer {layer}: {snr:.1f} dB" for layer, snr in by_layer)))
    return lines


def _a_token(summary: dict[str, Any]) -> str:
    """Bytes a token, once all shards are there."""
    if summary["measured"] is None or not summary["totals"]["tokens"]:
        return ""
    return f" ({summary['shard_bytes'] / summary['totals']['tokens']:,.0f} B a token)"


def _told(codec: dict[str, Any]) -> str:
    """A codec's name, and what was asked of it."""
    asked = f", {codec['snr_db']:g} dB asked of each layer's median token" if "snr_db" in codec else ""
    return f"{codec['name']}{asked}"
