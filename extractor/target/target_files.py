"""target/: what a trainer needs of the target beside the hidden states - config, tokenizer, embeddings."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from cache_format.errors import StorageError
from cache_format.layout.embeddings import EMBED, EMBEDDINGS_NAME, HEAD, HEAD_BIAS, NORM, write_embeddings
from cache_format.storage.commit import TEMPORARY_SUFFIX, committed, make_folder, write_all
from extractor.target.final_norm import final_norm_weight
from extractor.target.quantised import dense_weight

_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_target_files(
    cache: Path, model: Any, config: Any, tokenizer: Any, dtype: torch.dtype = torch.float32
) -> tuple[bool, float]:
    """Fill target/, committing file by file. Quantised embeddings are written as what they stand for, in ``dtype``.

    Returns:
        Whether the embeddings are tied (lm_head.weight is then not stored again), and what the target multiplies
        an embedding by.

    Raises:
        StorageError: the operating system refused.
    """
    _commit_saved(cache / "target", config, tokenizer)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tensors = {EMBED: dense_weight(embed, dtype)}
    tied = head is not None and head.weight.data_ptr() == embed.weight.data_ptr()
    if head is not None and not tied:
        tensors[HEAD] = dense_weight(head, dtype)
    if head is not None and head.bias is not None:
        tensors[HEAD_BIAS] = head.bias
    norm = final_norm_weight(model)
    if norm is not None:
        tensors[NORM] = norm
    write_embeddings(cache / EMBEDDINGS_NAME, tensors)
    return tied, float(getattr(embed, "embed_scale", 1.0))


def _commit_saved(folder: Path, *parts: Any) -> None:
    """Commit what ``save_pretrained`` of each part writes; it knows no temporary names, so it is sent aside."""
    aside = None
    try:
        aside = Path(tempfile.mkdtemp(dir=folder, prefix=".saved.", suffix=TEMPORARY_SUFFIX))
        for part in parts:
            part.save_pretrained(aside)
        for path in sorted(path for path in aside.rglob("*") if path.is_file()):
            final = folder / path.relative_to(aside)
            make_folder(final.parent)
            with committed(final) as file:
                write_all(file, path.read_bytes())
    except StorageError:
        raise
    except Exception as error:
        refused = _os_error(error)
        if refused is None:
            raise
        raise StorageError(folder, "write the config and tokenizer files", refused) from error
    finally:
        # Not a TemporaryDirectory: its clean-up recurses without end where removing is not permitted.
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _os_error(error: Exception) -> OSError | None:
    """The refusal of the operating system behind ``error``; libraries in Rust tell it in the text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    found = _RUST_OS_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None
