"""vocab-map: a smaller vocabulary for an EAGLE-3 draft, by what a cache learns."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from extractor.cli.exit_codes import or_could_not_run
from extractor.cli.options import Cache, Debug, Json, folder
from extractor.cli.output import show


def vocab_map(
    cache: Cache,
    out: Annotated[Any, typer.Argument(help="Folder for the maps.", parser=folder, metavar="OUT")],
    size: Annotated[int, typer.Option(min=1, help="Tokens of the draft's vocabulary.", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Choose the tokens that are learned most, and write d2t and t2d as EAGLE-3 drafts take them.

    d2t.npy and t2d.npy are for speculators, vocab_mapping.pt for SpecForge, selected_token_ids.pt for NeMo AutoModel.
    Counts the learned tokens of the prepared samples; reads no states. Of a collection all caches count.

    Example: dflash-cache vocab-map /data/cache /data/vocab --size 32000
    """
    from cache_format import FeatureCache
    from cache_format.export.vocab_map import vocab_map as choose
    from cache_format.export.vocab_map import write_vocab_map

    with or_could_not_run():
        counts = FeatureCache.open(cache, allow_incomplete=True).learned_counts()
    found = choose(counts, size)
    paths = write_vocab_map(out, found)
    if as_json:
        show(json.dumps({"size": size, "covered": found.covered, "files": [str(path) for path in paths]}))
        return
    show(f"{out}: {size:,} of {len(counts):,} tokens, {100 * found.covered:.2f} % of {counts.sum():,} learned tokens")
    for path in paths:
        show(path)
