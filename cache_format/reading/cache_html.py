"""A cache in a notebook: what it is and how much of it there is."""

from __future__ import annotations

from cache_format.layout.index import Index
from cache_format.layout.manifest import Manifest
from cache_format.repr_html import html_table


def cache_html(where: str, manifest: Manifest, index: Index, layer_ids: list[int]) -> str:
    """A table of the stored samples of ``index`` and what their states are; everything escaped."""
    target, tokens = manifest.target, int(index.num_tokens.sum(dtype="int64"))
    learned, width = int(index.num_loss_tokens.sum(dtype="int64")), len(layer_ids) * manifest.hidden_size
    rows = [
        ("samples", f"{len(index):,}" + ("" if manifest.state == "complete" else f" ({manifest.state}, not complete)")),
        ("tokens", f"{tokens:,}, {100 * learned / max(tokens, 1):.0f} % learned"),
        ("target", f"{target.name} ({target.model_type}, {target.num_hidden_layers} layers)"),
        ("target_layer_ids", ", ".join(map(str, layer_ids))),
        ("hidden_states", f"[B, S, {len(layer_ids)} x {manifest.hidden_size} = {width:,}] {manifest.dtype}"),
        ("codec", manifest.codec["name"]),
    ]
    return html_table(f"FeatureCache {where}", (), rows)
