"""The `dflash-cache` command: one file a command; the work is done elsewhere."""

import os
import signal
import sys
from types import FrameType

_OF_THE_EXTRA = ("typer", "rich", "transformers", "datasets", "accelerate", "tokenizers", "huggingface_hub")


def main() -> None:
    """Entry point of the console command; where a package of the extra is missing, it says what to install."""
    # Until the command has handlers of its own: importing takes seconds, and nothing has been written.
    before = {number: signal.signal(number, _leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if any(_is_not_text(argument) for argument in sys.argv):
            print("error: an argument is not UTF-8; rename the file or folder that it names", file=sys.stderr)
            sys.exit(2)
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
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    os.write(2, f"stopped by {signal.Signals(number).name}; nothing was begun\n".encode())
    os._exit(128 + number)


def _is_not_text(argument: str) -> bool:
    """Whether it came as bytes that are not UTF-8, which Python keeps as surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in argument)
