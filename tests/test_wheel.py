"""What a trainer installs: the wheel and its base dependencies, nothing of the job."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

READ = """
import json, sys
from cache_format import FeatureCache, __version__
cache = FeatureCache.open(sys.argv[1], verify="sample")
tokens = sum(int(batch.attention_mask.sum()) for batch in cache.loader(batch_size=2, shuffle=True))
head = cache.get_output_embeddings()
print(json.dumps({"version": __version__, "samples": len(cache), "tokens": tokens, "head": list(head.weight.shape)}))
"""


def closure(requirements: list[str]) -> set[str]:
    """The installed distributions that these requirements bring, without any extra."""
    todo, found = list(requirements), set[str]()
    while todo:
        requirement = todo.pop()
        name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")  # type: ignore[index]
        if "extra ==" in requirement or name in found:
            continue
        try:
            below = metadata.requires(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform or Python
        found.add(name)
        todo += below or []
    return found


def link(distribution: str, into: Path) -> None:
    """Make an installed distribution importable in another environment."""
    installed = metadata.distribution(distribution)
    for top in {Path(file).parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
        if not (into / top).exists():
            (into / top).symlink_to(Path(str(installed.locate_file(top))))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    # A copy: setuptools leaves its build folder where it builds.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("cache_format", "extractor"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel and, linked from this one, what its base requires."""
    folder = tmp_path_factory.mktemp("trainer")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    # Also where PYTHONPATH has a folder that this package was installed from.
    command += ["--ignore-installed", wheel]
    subprocess.run(command, check=True)
    (info,) = site.glob("*.dist-info")
    requirements = [
        line.split(": ", 1)[1] for line in (info / "METADATA").read_text().splitlines() if "Requires-Dist" in line
    ]
    for distribution in closure(requirements):
        link(distribution, site)
    return folder


def test_the_base_reads_a_cache(environment, made):
    run = subprocess.run([environment / "bin" / "python", "-c", READ, made], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["samples"] > 0 < found["tokens"]
    assert found["version"] == metadata.version("dflash-cache")
    absent = (
        "import importlib.util as u; assert not [n for n in ('transformers', 'datasets', 'typer') if u.find_spec(n)]"
    )
    subprocess.run([environment / "bin" / "python", "-c", absent], check=True, cwd="/")


def test_the_command_without_the_extra_says_what_to_install(environment):
    run = subprocess.run([environment / "bin" / "dflash-cache", "--help"], capture_output=True, text=True, cwd="/")
    assert run.returncode == 2
    assert "pip install 'dflash-cache[extract]'" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_wheel_has_the_documents_of_every_wing(wheel):
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True)
    for path in [*ROOT.glob("cache_format/**/*.md"), *ROOT.glob("extractor/**/*.md")]:
        assert str(path.relative_to(ROOT)) in names.stdout
