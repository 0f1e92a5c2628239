"""What a command's signature says of its options: for --help, --config, and errors that name the choices."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from typer.models import ArgumentInfo, OptionInfo

PANELS = ("Target", "Data", "Samples and loss mask", "States", "Speed", "Job")
"""Of the help, in the order in which one thinks of them."""


@dataclass(frozen=True)
class Shown:
    """What a command's signature says of one of its options or arguments."""

    names: tuple[str, ...]
    """``--shard-size``, or ``CACHE``"""
    kind: Any
    """type of a value; bool for a switch, None where ``parser`` makes it"""
    many: bool
    default: Any
    info: OptionInfo | ArgumentInfo

    @property
    def choices(self) -> tuple[str, ...]:
        """Empty where any value goes."""
        return tuple(get_args(self.kind)) if get_origin(self.kind) is Literal else ()

    @property
    def required(self) -> bool:
        """Whether the command cannot do without it."""
        return self.default is inspect.Parameter.empty

    @property
    def value(self) -> str:
        """What stands behind the name."""
        if self.kind is bool or isinstance(self.info, ArgumentInfo):
            return ""
        if self.choices:
            return "|".join(self.choices)
        return self.info.metavar or {int: "N", float: "X", Path: "PATH"}.get(self.kind, "TEXT")

    @property
    def remark(self) -> str:
        """Whether it has to be given, how often, and what holds without it."""
        if self.required:
            return "required, may be repeated" if self.many else "required"
        if self.many:
            return "may be repeated"
        shown = self.info.show_default is not False and self.kind is not bool and self.default is not None
        return f"default: {self.default}" if shown else ""


def shown(parameter: inspect.Parameter) -> Shown:
    """One parameter of a command, as its ``Annotated`` says."""
    kind, info = get_args(parameter.annotation)[:2]
    if get_origin(kind) in (Union, UnionType):
        kind = next(one for one in get_args(kind) if one is not NoneType)
    many = get_origin(kind) is list
    kind = get_args(kind)[0] if many else kind
    if isinstance(info, ArgumentInfo):
        names: tuple[str, ...] = (info.metavar or parameter.name.upper(),)
    else:
        # Typer takes the first name given as a default; it is one only of options without Annotated.
        given = [info.default, *(info.param_decls or ())]
        names = tuple(name for name in given if isinstance(name, str)) or (f"--{parameter.name.replace('_', '-')}",)
    return Shown(names, kind, many, parameter.default, info)
