"""The command line of this process, for the manifest of the cache that it makes; what may be a secret is left out."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

from cache_format.errors import InputError

if TYPE_CHECKING:
    from cache_format.layout.manifest import CommandLine

LEFT_OUT = "***"

Given = str | list[str] | bool

given_options: ContextVar[Mapping[str, Given]] = ContextVar("given_options", default={})  # noqa: B039
"""Of the command that runs, by name without dashes: what the command line and --config say together."""

_SECRETS = (
    # user:password@ and ?query of a URL
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE), rf"\1{LEFT_OUT}@"),
    (re.compile(r"([a-z][a-z0-9+.-]*://[^\s?]*)\?[^\s:]*", re.IGNORECASE), rf"\1?{LEFT_OUT}"),
    # "api_key": "..." and storage options such as {"token": ...} or secret=...; not our own --batch-tokens 8192
    (
        re.compile(
            r"(?<![-\w])([\"']?[\w.-]*(?:secret|passw(?:or)?d|api[_-]?key|access[_-]?key|private[_-]?key|credentials?|"
            r"auth|token)[\"']?\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|[^\s,}&;]+)",
            re.IGNORECASE,
        ),
        rf"\1{LEFT_OUT}",
    ),
    # tokens by their looks: of the Hub, GitHub, OpenAI, AWS, Slack; and an Authorization header's
    (
        re.compile(
            r"\b(?:hf_\w{8,}|gh[pousr]_\w{16,}|github_pat_\w+|sk-[\w-]{16,}|A[KS]IA[0-9A-Z]{12,}|xox[a-z]-[\w-]+)|"
            r"(?<=bearer )\S+",
            re.IGNORECASE,
        ),
        LEFT_OUT,
    ),
)


def without_secrets(argument: str) -> str:
    """An argument, with ``***`` in place of what may be a key, a token, a password or a URL's query."""
    for pattern, instead in _SECRETS:
        argument = pattern.sub(instead, argument)
    return argument


def this_command(arguments: Sequence[str] | None = None) -> CommandLine:
    """``arguments`` (default: of this process) as they were given, and where each of them that is a path leads to.

    Raises:
        InputError: an argument that is not UTF-8, which no manifest can hold.
    """
    from cache_format.layout.manifest import CommandLine

    given, options = (sys.argv[1:], given_options.get()) if arguments is None else (list(arguments), {})
    named = [text for name, value in options.items() for one in texts(value) for text in (f"--{name}", one)]
    for argument in [*given, *named]:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise InputError(f"{argument!r}: is not UTF-8; give the file or folder another name") from None
    paths = {name: os.path.abspath(os.path.expanduser(name)) for name in [*_paths(given), *_paths(named)]}
    return CommandLine(
        arguments=[without_secrets(argument) for argument in given],
        folder=os.getcwd(),
        paths={name: path for name, path in paths.items() if name == without_secrets(name)},
        options={name: each_text(without_secrets, value) for name, value in options.items()},
    )


def texts(value: Given) -> list[str]:
    """Of one option; none where it is a switch."""
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def each_text(change: Callable[[str], str], value: Given) -> Given:
    """``value`` with its texts changed."""
    if isinstance(value, list):
        return [change(text) for text in value]
    return change(value) if isinstance(value, str) else value


def _paths(arguments: Sequence[str]) -> list[str]:
    """What is a file or folder, or will be one (OUT), also in ``--option=path`` and ``path:split:weight``."""
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, value = argument.partition("=")
        is_option = argument.startswith("--")
        text = value if is_option and equals else argument
        option = name if is_option and equals else before
        if is_option and not equals:
            continue
        if option in ("--out", "--scratch") and "://" not in text:
            found.append(text)
            continue
        parts = text.split(":")
        wholes = (":".join(parts[:count]) for count in range(len(parts), max(len(parts) - 3, 0), -1))
        found += [whole for whole in wholes if whole and os.path.lexists(os.path.expanduser(whole))][:1]
    return found
