"""The wings of both packages: imports go down only, no two files import each other, and what is light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import get_args

import pytest

import cache_format
import extractor
from cache_format.codecs import CODECS
from cache_format.export import LAYOUTS
from cache_format.peers import PEERS
from extractor import config
from extractor.data.forms import FORMATS

ROOT = Path(__file__).resolve().parent.parent

FLOORS = [
    ("repr_html",),
    ("errors", "batch", "device", "codecs"),
    ("storage",),
    ("layout",),
    ("writing", "reading"),
    ("upkeep", "export", "peers"),
    ("adapters",),
    ("extractor.config", "extractor.terminal"),
    ("extractor.data",),
    ("extractor.target",),
    ("extractor.job",),
    ("extractor.engine", "extractor.report"),
    ("extractor.cli",),
]
"""From the ground up. A wing imports from itself and from lower floors; wings of one floor do not know each other."""


def modules() -> dict[str, Path]:
    found = {}
    for package in ("cache_format", "extractor"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The modules of this project that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name.split(".")[0] in ("cache_format", "extractor")}


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def wing(module: str) -> str:
    """``cache_format.layout.shard_layout`` -> ``layout``, ``extractor.job.plan`` -> ``extractor.job``."""
    package, _, rest = module.partition(".")
    first = rest.split(".")[0]
    return first if package == "cache_format" else f"extractor.{first}"


def floor(module: str) -> int:
    return next(number for number, wings in enumerate(FLOORS) if wing(module) in wings)


DOORS = {"cache_format", "extractor", "extractor.__main__", "extractor.target"}
"""What others import from outside: the packages' own names, and the fixed one of the target."""


@pytest.mark.parametrize("module", sorted(set(MODULES) - DOORS))
def test_imports_go_down(module):
    for other in IMPORTS[module] - {"cache_format"}:
        same = wing(other) == wing(module)
        assert same or floor(other) < floor(module), f"{module} imports {other}, which stands above or beside it"


def test_no_two_files_import_each_other():
    try:
        order = list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))
    assert set(order) >= set(MODULES)


def test_the_reader_does_not_know_the_job():
    for module, others in IMPORTS.items():
        if module.startswith("cache_format"):
            assert not [other for other in others if other.startswith("extractor")], module


def test_a_kind_of_device_is_named_in_one_file():
    """Everybody else asks cache_format/device.py; the help and its examples may name one."""
    for module, path in MODULES.items():
        if module == "cache_format.device":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Attribute) and node.attr in ("cuda", "xpu", "mps")
            meant = isinstance(node, ast.Constant) and node.value in ("cuda", "nccl", "gloo", "xpu")
            assert not any([named, meant]), f"{path}:{node.lineno}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}))
def test_a_wing_says_what_it_is_for(folder):
    """A README of at most 25 lines where there are more than four files; it names each of them."""
    files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    if len(files) <= 4 or folder.parent == ROOT:
        return
    text = (folder / "README.md").read_text()
    assert len(text.splitlines()) <= 25
    assert [name for name in files if name not in text] == []


def test_one_list_of_choices():
    """Help and options have them as types, so that they are refused before anything heavy is imported."""
    assert set(get_args(config.Codec)) == set(CODECS)
    assert set(get_args(config.ExportLayout)) == set(LAYOUTS)
    assert set(get_args(config.ImportLayout)) == set(PEERS)
    assert get_args(config.RowFormat) == tuple(FORMATS)


def test_one_version():
    assert cache_format.__version__ == extractor.__version__


HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy", "huggingface_hub")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["extract", "--help"],
        ["extract", "--too-long", "cut"],
        ["export", "a", "b", "--to", "x"],
    ],
)
def test_help_and_a_wrong_choice_import_nothing_heavy(arguments):
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], flush=True))\n"
        f"sys.argv = ['dflash-cache', *{arguments!r}]\n"
        "from extractor.cli import main\n"
        "main()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "HEAVY []", run.stdout + run.stderr
    assert run.returncode == (0 if arguments[-1].startswith("--") else 2)


def test_floors_name_every_wing():
    named = [name for wings in FLOORS for name in wings]
    assert len(named) == len(set(named))
    assert {wing(module) for module in set(MODULES) - DOORS} == set(named)
