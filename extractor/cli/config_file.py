"""--config run.yaml: options of a command in a file. Keys are the options' names; the command line wins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_format.errors import InputError
from extractor.cli.command_line import LEFT_OUT, Given, each_text, texts
from extractor.cli.shown import Shown, shown

if TYPE_CHECKING:
    from cache_format.layout.manifest import CommandLine

JOINED = ("target-layers", "layers", "devices", "columns")
"""Options with several values in one text, with commas between: a list, or a mapping for ``a=b``, reads better here."""


def read_config(path: Path, parameters: Iterable[Parameter], others: Iterable[Parameter] = ()) -> dict[str, Any]:
    """What ``path`` says of a command's ``parameters``, by their names: text, a list of texts, or true and false.

    ``others``: may stand there too, for another command that reads the same file; they are checked and left out.

    Raises:
        InputError: no such file, not YAML, a key that the command does not have, or a value of the wrong type; names
            key and line.
    """
    import yaml

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"--config {path}{line}: is not YAML: {getattr(error, 'problem', error)}") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"--config {path}: write a line for each option, such as max-length: 2048")
    own, known = _by_key(parameters), {**_by_key(others), **_by_key(parameters)}
    found: dict[str, Any] = {}
    for key_node, value in node.value:
        key = str(key_node.value).replace("_", "-")
        where = f"--config {path} line {key_node.start_mark.line + 1}: {key_node.value}"
        if key not in known:
            raise InputError(f"{where}: there is no such option; choose among {', '.join(sorted(own))}")
        name, one = known[key]
        if name in found:
            raise InputError(f"{where}: is there twice")
        if value.tag == "tag:yaml.org,2002:null":
            raise InputError(f"{where}: has no value; leave the line out, or write one")
        found[name] = _value(value, one, key, where)
    names = {name for name, _ in own.values()}
    return {name: value for name, value in found.items() if name in names}


def by_option(values: Mapping[str, Any], parameters: Iterable[Parameter]) -> dict[str, Given]:
    """What was given for a command's ``parameters``, by the names that :func:`read_config` takes."""
    keys = {name: key for key, (name, _) in _by_key(parameters).items()}
    return {
        keys[name]: value for name, value in values.items() if name in keys and isinstance(value, str | list | bool)
    }


def as_config(cache: str, command: CommandLine | None) -> str:
    """YAML that ``--config`` takes, of what was given to the command that made a cache; paths are absolute.

    Raises:
        InputError: the manifest does not have it: the cache was begun without a command, or by an earlier version.
    """
    import yaml

    if command is None or not command.options:
        raise InputError(
            f"{cache}: its manifest does not have the options by name; `inspect` shows the command, if any"
        )

    def absolute(text: str) -> str:
        path = next((path for path in command.paths if text == path or text.startswith(f"{path}:")), "")
        return command.paths[path] + text[len(path) :] if path else text

    values = {key: each_text(absolute, value) for key, value in command.options.items()}
    single = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in values.items()}
    written = {
        key: int(str(value)) if re.fullmatch("0|[1-9][0-9]*", str(value)) else value for key, value in single.items()
    }
    lines = [f"# dflash-cache {command.arguments[0]} --config THIS_FILE"]
    if any(LEFT_OUT in text for value in values.values() for text in texts(value)):
        lines.append(f"# {LEFT_OUT} stands for what may be a secret: write it in.")
    return "\n".join([*lines, yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=10**6).rstrip()])


def _by_key(parameters: Iterable[Parameter]) -> dict[str, tuple[str, Shown]]:
    """``shard-size`` -> the parameter's name and what the signature says of ``--shard-size``; ``cache`` of CACHE."""
    found = {}
    for parameter in parameters:
        one = shown(parameter)
        found[one.names[0].lstrip("-").lower()] = (parameter.name, one)
    found.pop("config", None)
    return found


def _value(node: Any, one: Shown, key: str, where: str) -> Any:
    import yaml

    if isinstance(node, yaml.SequenceNode) and (one.many or key in JOINED):
        texts = [_scalar(item, where) for item in node.value]
        return texts if one.many else ",".join(texts)
    if isinstance(node, yaml.MappingNode) and key == "columns":
        return ",".join(f"{_scalar(name, where)}={_scalar(column, where)}" for name, column in node.value)
    if isinstance(node, yaml.MappingNode) and key == "chat-template-kwargs":
        return json.dumps(yaml.SafeLoader("").construct_document(node))
    text = _scalar(node, where)
    if one.kind is bool:
        if node.tag != "tag:yaml.org,2002:bool":
            raise InputError(f"{where}: is {text!r}; write true or false")
        return yaml.SafeLoader("").construct_document(node)
    if one.kind is int and not re.fullmatch(r"[+-]?[0-9]+", text):
        raise InputError(f"{where}: is {text!r}; write a number")
    if one.kind is int and one.info.min is not None and int(text) < one.info.min:
        raise InputError(f"{where}: is {text}; it must be at least {one.info.min}")
    if one.choices and text not in one.choices:
        raise InputError(f"{where}: is {text!r}; choose one of {', '.join(one.choices)}")
    return [text] if one.many else text


def _scalar(node: Any, where: str) -> str:
    if not isinstance(node.value, str):
        raise InputError(f"{where}: is a {'list' if node.id == 'sequence' else 'mapping'}; write one value")
    return node.value
