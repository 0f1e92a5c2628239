"""What each source of the data gave, for the manifest and for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from cache_format.layout.manifest import SourceInfo
from cache_format.layout.samples import PreparedSamples
from extractor.data.dataset import RowSource
from extractor.data.forms import Form


def source_infos(source: RowSource, forms: Sequence[Form], samples: PreparedSamples) -> list[SourceInfo]:
    """One of each source that was reached, in order; ``forms``: one of each source."""
    source.read_to_the_end(samples.num_rows)
    starts = [*source.source_starts(), samples.num_rows]
    files = [(label, first) for first, label in source.places()]
    infos = []
    for number, (first, stop) in enumerate(pairwise(starts)):
        if first >= samples.num_rows:
            break
        one, form, columns = source.sources[number], forms[number], source.column_sets[number]
        of_it = (samples.source_rows >= first) & (samples.source_rows < stop)
        infos.append(
            SourceInfo(
                name=one.name,
                split=one.split,
                weight=one.weight,
                files={label: at for label, at in files if first <= at < min(stop, samples.num_rows)},
                row_format=form.row_format,
                columns=dict(form.columns),
                unused_columns=form.unused(columns),
                samples=int(np.count_nonzero(of_it)),
                tokens=int(samples.num_tokens[of_it].sum()),
                loss_tokens=int(samples.num_loss_tokens[of_it].sum()),
            )
        )
    return infos


def source_note(info: SourceInfo) -> str:
    """``chat.jsonl:0.5: 12 samples, 3,456 tokens (789 learned); messages from conversations; not used: id``."""
    name = info.name if info.weight == 1 else f"{info.name}:{info.weight:g}"
    return (
        f"{name}: {info.samples:,} samples, {info.tokens:,} tokens ({info.loss_tokens:,} learned); "
        f"{reading_note(info.row_format, info.columns, info.unused_columns)}"
    )


def reading_note(row_format: str, columns: Mapping[str, str], unused: Sequence[str]) -> str:
    """``messages (messages from conversations); columns not used: id``."""
    taken = ", ".join(f"{field} from {column}" for field, column in columns.items())
    return f"{row_format} ({taken})" + (f"; columns not used: {', '.join(unused)}" if unused else "")
