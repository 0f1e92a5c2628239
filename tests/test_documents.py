"""Every document says what is so: its commands parse, its code compiles or runs, its links lead somewhere, and every
error message is explained by itself or in TROUBLESHOOTING.md.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import shutil
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import commands
import jobs
import pytest
import tomllib
import torch

import cache_format.errors
from cache_format import FeatureCache
from extractor.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cache_format", "extractor", "scripts")
DOCUMENTS = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(path: Path) -> list[str]:
    """What stands indented by four after an empty line, or between fences; not the text of a list."""
    found, block, before = [], [], ""
    for line in [*path.read_text().splitlines(), "end"]:
        if line.startswith("    ") and (block or not before.strip()):
            block.append(line)
        elif not line.strip() and block:
            block.append("")
        elif block:
            found.append(textwrap.dedent("\n".join(block)))
            block = []
        before = line
    return found + re.findall(r"```\w*\n(.*?)```", path.read_text(), re.DOTALL)


def command_lines(path: Path) -> list[list[str]]:
    """Each ``dflash-cache ...`` of its blocks, in words; lines that end in a backslash go on."""
    found = []
    for block in blocks(path):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:dflash-cache|-m extractor) +([a-z]+ .*)", line)
            if match and not line.lstrip().startswith("#"):
                found.append(shlex.split(match[1].partition(" > ")[0], comments=True))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_those_that_there_are(name):
    import typer.main

    group = typer.main.get_command(app)
    for words in command_lines(ROOT / name):
        command = group.commands[words[0]]
        arguments = [word for word in words[1:] if word != "..."]
        known = {option for parameter in command.params for option in parameter.opts}
        for word in arguments:
            if word.startswith("-"):
                assert word.partition("=")[0] in known, f"{' '.join(words)}: {word}"
        if "..." not in words and "--config" not in words:
            # Values too: choices, numbers, and what is required.
            command.make_context(words[0], arguments, parent=group.make_context("dflash-cache", [words[0]]))


def python_blocks(path: Path) -> list[str]:
    """Blocks that are Python: those that import, or use what a block before them made."""
    starts = ("from ", "import ", "cache =", "loader =", "followed =", "use(", "with ", "for ")
    return [block for block in blocks(path) if block.lstrip("# ").startswith(starts) and "dflash-cache" not in block]


@pytest.mark.parametrize("name", NAMES)
def test_python_is_python(name):
    for block in python_blocks(ROOT / name):
        ast.parse(block)


PEERS_BLOCKS = ("nemo_automodel", "specforge", "speculators", "modelopt", "deepspec", "angelslim")
"""Blocks that need another project's trainer: scripts/test_peers.sh runs what they use."""


@pytest.mark.parametrize("name", ["README.md", "cache_format/TRAINERS.md"])
def test_blocks_for_trainers_run(name, made, tmp_path):
    """With a cache of ours in place of those that they name, one draft of three numbers, and no GPU."""
    chat, code, maths = (Path(shutil.copytree(made, tmp_path / name)) for name in ("chat", "code", "math"))
    layers = jobs.LAYER_IDS
    numbers = torch.nn.Parameter(torch.zeros(3))
    draft = SimpleNamespace(target_layer_ids=layers, block_size=4, numbers=numbers)
    names = {
        "torch": torch,
        "FeatureCache": FeatureCache,
        "cache": FeatureCache.open(made),
        "chat": FeatureCache.open(chat),
        "code": FeatureCache.open(code),
        "draft": draft,
        "optimizer": torch.optim.SGD([numbers]),
        "loss_of": lambda draft, embed, head, batch: (draft.numbers * batch.hidden_states.mean()).sum(),
    }
    instead = {
        "/data/cache": made,
        "/data/chat": chat,
        "/data/code": code,
        "/data/math": maths,
        "Qwen/Qwen3-8B": names["cache"].manifest.target.name,
        "bfloat16": "float32",
        "cuda": "cpu",
        "[1, 17]": [layers[0], layers[-1]],
    }
    run = [block for block in python_blocks(ROOT / name) if not any(peer in block for peer in PEERS_BLOCKS)]
    assert len(run) == {"README.md": 1}.get(name, 5)
    for block in run:
        for written, ours in instead.items():
            block = block.replace(written, str(ours))
        exec(block, names)
    assert names["batch"].hidden_states.shape[:2] == names["batch"].input_ids.shape
    assert name == "README.md" or numbers.abs().min() > 0


def test_the_demo_of_the_readme_gives_what_stands_there(tmp_path, monkeypatch):
    """Numbers aside, which depend on the machine and on Python's docstrings."""
    block = next(block for block in blocks(ROOT / "README.md") if block.startswith("$ "))
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    monkeypatch.chdir(tmp_path)
    for part in re.split(r"(?m)^\$ ", block)[1:]:
        line, *expected = part.strip().splitlines()
        words = shlex.split(line)
        if words[0] == "dflash-cache":
            code, out, errors = commands.run(*words[1:])
        else:
            code, out, errors = run_python(words[1:])
        assert code == 0, errors
        if expected:
            assert without_numbers(out + errors) == without_numbers("\n".join(expected)), line


def run_python(words: list[str]) -> tuple[int, str, str]:
    """``python words``, in a process that has the heavy imports done."""
    out = Path("out.txt")
    process = commands.ready_processes().get_context("").Process(target=as_main, args=(words, out.absolute()))
    process.start()
    process.join()
    return process.exitcode, out.read_text(), ""


def as_main(words: list[str], out: Path) -> None:
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = words
    if words[0] == "-c":
        exec(words[1], {})
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def without_numbers(text: str) -> str:
    return re.sub(r"[\d][\d,.]*(e-?\d+)?", "N", text).strip()


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name):
    path = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?m)^    .*$|`[^`]*`", "", path.read_text())):
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        to = (path.parent / file).resolve() if file else path
        assert to.exists(), link
        if heading:
            titles = re.findall(r"(?m)^#+ (.*)", to.read_text())
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_are_there(name):
    path = ROOT / name
    for named in re.findall(r"`((?:scripts|tests|cache_format|extractor)/[\w./-]+\.(?:py|sh|md))`", path.read_text()):
        assert (ROOT / named).is_file(), named


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", [name for name in NAMES if Path(name).name != "README.md"])
def test_every_document_is_found_from_another_one(name):
    others = [path for path in DOCUMENTS if path != ROOT / name]
    assert any(Path(name).name in path.read_text() for path in others), "link it from README.md"


def test_the_picture_is_one():
    picture = ElementTree.parse(ROOT / "scripts" / "flow.svg").getroot()
    assert picture.tag.endswith("svg")
    assert picture.find("{http://www.w3.org/2000/svg}title").text


def test_every_package_of_the_extras_that_is_named_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in DOCUMENTS:
        for named in re.findall(r"pip install '(?:\.|dflash-cache)\[([\w,]+)\]'", path.read_text()):
            assert set(named.split(",")) <= set(extras), f"{path}: {named}"


# -- messages ---------------------------------------------------------------------------------------------------------

TELLS = re.compile(
    r"--[a-z]|\b(choose|write|give|run|leave|needs?|must|use|save|install|name|look|let|keep|try|has to|wait|merge|"
    r"open|then|at least|only|make|free|begin|mend|repair|set|start|pass|see|batch|remove|rename)\b"
)
"""Words of a message that tell what to do, so that it needs no row of its own."""

OURS = {name for name, one in vars(cache_format.errors).items() if isinstance(one, type)} | {
    "LockedError",
    "WorkerError",
}


def template(node: ast.expr) -> str:
    """A message as it stands in the code, with ... for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "..."


def messages() -> list[tuple[str, str]]:
    """Each message that the program raises for a user, and where; the words of StorageError are its class's."""
    found = []
    for path in sorted([*ROOT.glob("cache_format/**/*.py"), *ROOT.glob("extractor/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            name = getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))
            if name in OURS and name not in ("StorageError",):
                text = ": ".join(map(template, node.exc.args))
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", text))
    return found


def test_every_message_says_what_to_do_or_is_explained():
    document = (ROOT / "extractor" / "TROUBLESHOOTING.md").read_text()
    rows = [line.split(" | ")[0] for line in document.splitlines() if line.startswith("| `")]
    explained = [words for row in rows for words in re.findall(r"`([^`]+)`", row)]
    found = messages()
    assert len(found) > 250
    dumb = [
        f"{where} {text}"
        for where, text in found
        # What is filled in whole was collected where it was made.
        if re.search(r"[a-z]{4}", text) and not (TELLS.search(text) or any(words in text for words in explained))
    ]
    assert dumb == []
    texts = [text for _, text in found]
    written = "\n".join(path.read_text() for d in ("cache_format", "extractor") for path in (ROOT / d).rglob("*.py"))
    unknown = [words for words in explained if not any(words in text for text in texts) and "[" not in words]
    stale = [words for words in unknown if words not in written]
    assert stale == [], "no message has these words any more"
