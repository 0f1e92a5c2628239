"""A command as typer runs it, with our own help, with --config, and with errors that name the choices."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo

from extractor.cli.command_line import given_options
from extractor.cli.config_file import by_option, read_config
from extractor.cli.help import print_help, print_overview
from extractor.cli.shown import shown

BEFORE_EXTRACT = ("preview", "estimate")
"""They read the file that is for extract, and take from it what they have."""


class Command(TyperCommand):
    """One of dflash-cache's commands; its options are those of its function's signature."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it."""
        arguments = [one.names[0] for one in map(shown, self.parameters()) if isinstance(one.info, ArgumentInfo)]
        print_help(" ".join([ctx.command_path, *arguments, "[OPTIONS]"]), self.help or "", self.parameters())

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does; who leaves out a value is told what there is to choose."""
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
            on_the_line, _, _ = self.make_parser(ctx).parse_args(given)
            together = {**(ctx.default_map or {}), **on_the_line}
            given_options.set(by_option(together, self.parameters()))
            return rest
        except Exception as error:
            name = getattr(error, "option_name", None)
            for one in map(shown, self.parameters()):
                if name in one.names and "|" in one.value:
                    error.message = f"{name} needs a value: {one.value}"  # type: ignore[attr-defined]
            raise

    def parameters(self) -> list[inspect.Parameter]:
        """Its options and arguments."""
        assert self.callback is not None
        return list(inspect.signature(self.callback).parameters.values())


class Group(TyperGroup):
    """dflash-cache itself."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it."""
        commands = {name: (command.help or "").split("\n")[0] for name, command in self.commands.items()}
        options = {", ".join(param.opts): getattr(param, "help", "") or "" for param in self.get_params(ctx)}
        print_overview(f"{ctx.command_path} COMMAND [OPTIONS]", self.help or "", commands, options)


def take_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """What the file says holds where the command line says nothing.

    Raises:
        InputError: see :func:`extractor.cli.config_file.read_config`.
    """
    if path is not None:
        command, all_commands = ctx.command, ctx.parent.command if ctx.parent else None
        assert isinstance(command, Command)
        assert isinstance(all_commands, Group)
        extract = all_commands.commands["extract"]
        assert isinstance(extract, Command)
        of_the_job = extract.parameters() if command.name in BEFORE_EXTRACT else []
        ctx.default_map = read_config(path, command.parameters(), of_the_job)
    return path
