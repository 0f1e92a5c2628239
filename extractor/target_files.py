"""target/: what a trainer needs of the target beside the hidden states - config, tokenizer, embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_format.embeddings import EMBED, EMBEDDINGS_NAME, HEAD, HEAD_BIAS, write_embeddings
from cache_format.storage import sync_tree


def write_target_files(cache: Path, model: Any, config: Any, tokenizer: Any) -> tuple[bool, float]:
    """Fill target/ durably.

    Returns:
        Whether the embeddings are tied (lm_head.weight is then not stored again), and what the target multiplies
        an embedding by.

    Raises:
        StorageError: the operating system refused.
    """
    folder = cache / "target"
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tensors = {EMBED: embed.weight}
    tied = head is not None and head.weight.data_ptr() == embed.weight.data_ptr()
    if head is not None and not tied:
        tensors[HEAD] = head.weight
    if head is not None and head.bias is not None:
        tensors[HEAD_BIAS] = head.bias
    write_embeddings(cache / EMBEDDINGS_NAME, tensors)
    sync_tree(folder)
    return tied, float(getattr(embed, "embed_scale", 1.0))
