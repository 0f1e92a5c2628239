"""What identifies a target: digests of all that transformers reads of it, watched until it has been loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from cache_format.errors import CacheError, InputError
from cache_format.storage.file_info import file_info
from cache_format.storage.watched_file import WatchedFile
from extractor.target.adapter import adapter_files, refuse_adapter_beside
from extractor.target.gguf_file import place_and_file

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")

_VOLATILE_CONFIG = (
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_attn_implementation",
    "use_cache",
)
"""Fields of a config that say where it came from or how it is run; dtype and attention are compared on their own."""

_VOLATILE_TOKENIZER = (
    *("name_or_path", "is_local", "local_files_only", "trust_remote_code", "revision", "_commit_hash", "_from_auto"),
    *("chat_template", "processor_class", "auto_map", "token", "cache_dir", "transformers_version"),
)
"""Of a tokenizer's settings those that say where it came from, and the template, which is compared on its own."""


@dataclass(frozen=True, kw_only=True)
class TargetIdentity:
    """``config``, ``weights`` and, where there are such, ``code`` and ``adapter``: digests, or the hub's commit."""

    name: str
    fields: dict[str, str]
    files: tuple[WatchedFile, ...]

    def require_unchanged(self, *, in_place: bool = False) -> None:
        """Refuse a target that is no longer what was digested: of whatever was loaded meanwhile nobody can tell.

        Args:
            in_place: only look for files that were written to, as one does while weights are mapped into memory.

        Raises:
            InputError: names the file.
        """
        for file in self.files:
            if file.is_changed(in_place):
                raise InputError(
                    f"--target {self.name}: {file.path} was changed while this command ran, so what was loaded is not "
                    "what was identified. Finished shards are kept. Let it be complete, then run the same command again"
                )


def identify_target(
    name: str, revision: str | None, config: Any, *, adapter: Path | None = None, trust_remote_code: bool = False
) -> TargetIdentity:
    """Digest configuration, weights, code and adapter of a target; takes as long as reading them.

    Raises:
        InputError: a local folder without weights, or an adapter that would be used by chance.
    """
    place, gguf = place_and_file(name)
    refuse_adapter_beside(place, revision)
    fields = {"config": _config_digest(config)}
    folder, files = Path(place), _Watched()
    if folder.is_dir():
        weights = _weight_files(folder, config) if gguf is None else [folder / gguf]
        fields["weights"] = files.digest(folder, weights)
    else:
        commit = f"commit {getattr(config, '_commit_hash', None) or revision or 'unknown'}"
        fields["weights"] = commit if gguf is None else f"{commit} {gguf}"
    code = _code(place, revision, config, files) if trust_remote_code else ""
    if code:
        fields["code"] = code
    if adapter is not None:
        fields["adapter"] = files.digest(adapter, adapter_files(adapter))
    return TargetIdentity(name=name, fields=fields, files=tuple(files.all))


class _Watched:
    """Digests files, and remembers all of them."""

    def __init__(self) -> None:
        self.all: list[WatchedFile] = []

    def digest(self, folder: Path, paths: Iterable[Path]) -> str:
        """Of names below ``folder``, sizes and content of ``paths``."""
        paths = list(paths)
        try:
            with ThreadPoolExecutor(4) as pool:
                watched = list(pool.map(lambda path: WatchedFile(path, _size_and_checksum), paths))
        except CacheError as error:
            raise InputError(f"--target {folder}: {error}") from None
        self.all += watched
        lines = [f"{_below(folder, file.path)} {file.digest}" for file in watched]
        return xxhash.xxh3_128("\n".join(lines).encode()).hexdigest()


def _size_and_checksum(path: Path) -> str:
    info = file_info(path)
    return f"{info.bytes} {info.checksum}"


def _below(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _config_digest(config: Any) -> str:
    fields = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE_CONFIG}
    return xxhash.xxh3_128(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def _weight_files(folder: Path, config: Any) -> list[Path]:
    """All that may be weights in ``folder``, and all that an index or the configuration names, wherever it lies."""
    files = {path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)}
    named = getattr(config, "transformers_weights", None)
    if named:
        files.add(folder / named)
    for index in [path for path in files if path.name.endswith(".index.json")]:
        try:
            files |= {folder / name for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--target {folder}: {index.name} cannot be read: {error!r}") from None
    if not files:
        raise InputError(f"--target {folder}: the folder has no weights ({', '.join(WEIGHT_PATTERNS)})")
    return sorted(files)


def _code(name: str, revision: str | None, config: Any, files: _Watched) -> str:
    """Digest of the Python files of a target that comes with code, its own or another repository's; "" without any."""
    found = []
    for place in dict.fromkeys([name, *_other_places(getattr(config, "auto_map", None) or {})]):
        folder = Path(place)
        if folder.is_dir():
            # All of them: one may import any other.
            paths = [path for path in folder.rglob("*.py") if not path.relative_to(folder).as_posix().startswith(".")]
            found += [files.digest(folder, sorted(paths))] if paths else []
        elif place != name:
            found.append(f"{place} {_commit_of_code(place, name, revision, config)}")
    return xxhash.xxh3_128("\n".join(found).encode()).hexdigest() if found else ""


def _other_places(auto_map: Any) -> Iterator[str]:
    """The repositories of ``repository--module.Class``."""
    if isinstance(auto_map, dict):
        for value in auto_map.values():
            yield from _other_places(value)
    elif isinstance(auto_map, list | tuple):
        for value in auto_map:
            yield from _other_places(value)
    elif isinstance(auto_map, str) and "--" in auto_map:
        yield auto_map.split("--")[0]


def _commit_of_code(place: str, name: str, revision: str | None, config: Any) -> str:
    """The commit of another repository that holds the target's code: a part of its module's name."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    references = [text for text in config.auto_map.values() if isinstance(text, str) and text.startswith(f"{place}--")]
    modules = [get_class_from_dynamic_module(text, name, revision=revision).__module__ for text in references]
    return " ".join(sorted(modules))


def tokenizer_identity(tokenizer: Any) -> dict[str, str]:
    """``tokenizer``: digest of its class, vocabulary, merges, special tokens and settings; ``chat_template``: digest
    of the template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if _is_setting(name)}
    decides = [type(tokenizer).__name__, tokenizer.special_tokens_map, settings]
    decides += [] if backend is not None else _vocabulary_files(tokenizer)
    text = json.dumps(decides, sort_keys=True, default=repr)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return {
        "tokenizer": xxhash.xxh3_128(f"{vocabulary}\n{text}".encode()).hexdigest(),
        "chat_template": xxhash.xxh3_128(template.encode()).hexdigest(),
    }


def _is_setting(name: str) -> bool:
    return name not in _VOLATILE_TOKENIZER and not name.endswith("_file")


def _vocabulary_files(tokenizer: Any) -> list[str]:
    """Of a tokenizer in Python: what decides its ids beside the vocabulary (merges, a SentencePiece model)."""
    paths = [tokenizer.init_kwargs.get(name) for name in sorted(tokenizer.vocab_files_names)]
    return [_size_and_checksum(Path(path)) for path in paths if path and Path(path).is_file()]
