"""The frozen target: loaded, hooked, run over padded batches; see README.md for the order to read it in."""

from extractor.target.hooks import HFDFlashTargetModel

__all__ = ["HFDFlashTargetModel"]
