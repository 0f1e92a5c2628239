"""Chat data without a download: conversations about the standard library, made from its docstrings.

    python scripts/make_demo_data.py --out train.jsonl --rows 2000

A function gives one question and its answer; a class gives a conversation that goes on to its methods. Sources are
parsed, never imported. The rows depend on the Python version, ``rows`` and ``seed`` alone.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"test", "tests", "idle_test", "lib2to3", "idlelib", "turtledemo", "site-packages", "__pycache__"}
MAX_TURNS = 4
QUESTIONS = (
    "What does `{}` do?",
    "Explain `{}` to me.",
    "How would you document `{}`?",
    "I came across `{}` in some Python code. What is it for?",
)
SYSTEM = "You are a helpful assistant who knows the Python standard library."

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Topic = list[tuple[str, str]]


def _sources() -> Iterator[tuple[str, Path]]:
    """(module name, file) of every module of the standard library that is written in Python."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not SKIPPED.intersection(parts):
            yield ".".join(part for part in parts if part != "__init__"), path


def _topics(module: str, tree: ast.Module) -> Iterator[Topic]:
    """(name, docstring) of a module, of each function in it, and of each class together with its methods."""
    yield _documented(module, tree)
    for node in tree.body:
        if isinstance(node, Definition):
            yield [pair for name, part in _named(f"{module}.{node.name}", node) for pair in _documented(name, part)]


def _named(name: str, node: Definition) -> Iterator[tuple[str, Definition]]:
    yield name, node
    if isinstance(node, ast.ClassDef):
        yield from ((f"{name}.{part.name}", part) for part in node.body if isinstance(part, ast.FunctionDef))


def _documented(name: str, node: Definition | ast.Module) -> Topic:
    text = inspect.cleandoc(ast.get_docstring(node) or "").strip()
    return [(name, text)] if len(text) >= 20 else []


def _conversations(topic: Topic, rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """The topic in pieces of up to MAX_TURNS questions."""
    for start in range(0, len(topic), MAX_TURNS):
        messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.3 else []
        for name, text in topic[start : start + MAX_TURNS]:
            messages.append({"role": "user", "content": rng.choice(QUESTIONS).format(name)})
            messages.append({"role": "assistant", "content": text})
        yield messages


def demo_conversations(seed: int = 0) -> list[list[dict[str, str]]]:
    """Every conversation there is, shuffled."""
    rng = random.Random(seed)
    conversations = []
    for module, path in _sources():
        tree = ast.parse(path.read_bytes(), str(path))
        for topic in _topics(module, tree):
            conversations += _conversations(topic, rng)
    rng.shuffle(conversations)
    return conversations


def write_demo_data(path: Path, rows: int, seed: int = 0) -> int:
    """Write up to ``rows`` conversations to ``path`` as JSON lines with ``messages``; how many it was."""
    conversations = demo_conversations(seed)[:rows]
    with open(path, "w", encoding="utf-8") as file:
        for messages in conversations:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return len(conversations)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write chat data made from the standard library's docstrings.")
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    written = write_demo_data(args.out, args.rows, args.seed)
    if written < args.rows:
        print(f"the standard library has no more than {written} conversations", file=sys.stderr)
    print(f"wrote {written} conversations to {args.out}")


if __name__ == "__main__":
    main()
