"""The `dflash-cache` command: one file a command; the work is done elsewhere."""

import sys

_OF_THE_EXTRA = ("typer", "rich", "transformers", "datasets", "accelerate", "tokenizers", "huggingface_hub")


def main() -> None:
    """Entry point of the console command; where a package of the extra is missing, it says what to install."""
    try:
        from extractor.cli.app import main as run

        run()
    except ModuleNotFoundError as error:
        if error.name not in _OF_THE_EXTRA or "--debug" in sys.argv:
            raise
        print(
            f"error: the command needs more than the reader: {error.name} is not installed. "
            "Run: pip install 'dflash-cache[extract]'",
            file=sys.stderr,
        )
        sys.exit(2)
