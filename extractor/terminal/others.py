"""What other libraries would print: their bars go, their messages follow --quiet and --verbose."""

from __future__ import annotations

import os
import sys

from extractor.terminal.voice import Voice


def hush_others(voice: Voice) -> None:
    """To be called before transformers, datasets or huggingface_hub are imported: they read it from the environment.

    "Generating train split" and "Loading weights" are steps of ours, which our own progress shows. Downloads of the hub
    are not, so their bars stay where a person looks on.
    """
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if voice.quiet or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if voice.quiet or voice.verbose:
        for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, "info" if voice.verbose else "error")


def no_bar_of_transformers() -> None:
    """Of its weights: how long that took is said afterwards."""
    from transformers.utils import logging

    logging.disable_progress_bar()
