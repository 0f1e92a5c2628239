"""--help: options in groups, each with its choices and its default, in whole sentences at any width."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from rich.console import Console
from rich.padding import Padding
from rich.text import Text
from typer.models import ArgumentInfo

from extractor.cli.shown import PANELS, Shown, shown

WIDEST = 100
"""columns; longer lines are hard to read"""


def print_help(usage: str, text: str, parameters: Iterable[inspect.Parameter]) -> None:
    """Of one command."""
    console = Console(highlight=False, soft_wrap=False)
    console.width = min(console.width, WIDEST)
    _print_head(console, usage, text)
    groups: dict[str, list[Shown]] = {title: [] for title in ("Arguments", "Options", *PANELS)}
    for one in map(shown, parameters):
        title = one.info.rich_help_panel or ("Arguments" if isinstance(one.info, ArgumentInfo) else "Options")
        groups.setdefault(title, []).append(one)
    for title, members in groups.items():
        if members:
            console.print(f"\n[bold]{title}[/bold]")
        for one in members:
            _print_option(console, one)


def print_overview(usage: str, text: str, commands: dict[str, str], options: dict[str, str]) -> None:
    """Of all commands: ``{name: what it does}``, and the options that stand before a command."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    _print_head(console, usage, text)
    for title, lines in (("Commands", commands), ("Options", options)):
        console.print(f"\n[bold]{title}[/bold]")
        for name, line in lines.items():
            head = Text(f"  {name:<{max(map(len, lines)) + 2}}", style="bold cyan")
            body = Text.from_markup(line).wrap(console, console.width - len(head))
            for number, part in enumerate(body):
                console.print((head if number == 0 else Text(" " * len(head))) + part)


def _print_head(console: Console, usage: str, text: str) -> None:
    console.print(Text(usage, style="bold"))
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("Example: "):
            # Not wrapped: it is there to be copied.
            console.print("\n[bold]Example[/bold]")
            console.print(Text("  " + paragraph.removeprefix("Example: ")), soft_wrap=True)
        else:
            console.print()
            console.print(Text.from_markup(" ".join(paragraph.split())))


def _print_option(console: Console, one: Shown) -> None:
    line = Text("  ")
    line.append(", ".join(one.names), style="bold cyan")
    line.append(f" {one.value}" if one.value else "")
    line.append(f"  ({one.remark})" if one.remark else "", style="dim")
    console.print(line)
    console.print(Padding(Text.from_markup(one.info.help or ""), (0, 0, 0, 6), expand=False))
