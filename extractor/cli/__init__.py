"""The `dflash-cache` command: one file a command; the work is done elsewhere."""

from extractor.cli.app import app, main

__all__ = ["app", "main"]
