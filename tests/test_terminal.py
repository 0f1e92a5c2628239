"""What a person at a terminal sees: help, progress, --config, --quiet and --log-file."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import pty
import re
import shlex
import struct
import termios
from pathlib import Path

import commands
import pytest

from extractor.cli.app import app
from extractor.cli.command import Command
from extractor.cli.help import WIDEST
from extractor.cli.shown import shown
from extractor.terminal import progress, voice

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def all_commands() -> dict[str, Command]:
    import typer.main

    return typer.main.get_command(app).commands


COMMANDS = all_commands()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("width", [80, 120])
def test_help_is_whole_at_any_width(name, width, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, errors = cli(name, "--help")
    assert (code, errors) == (0, "")
    assert max(map(len, out.splitlines())) <= min(width, WIDEST)
    assert "…" not in out
    assert not re.search(r"<\w+>", out), "types of Python mean nothing to a person"
    one_line = " ".join(out.split())
    for parameter in COMMANDS[name].parameters():
        one = shown(parameter)
        assert one.names[-1] in out
        assert "|".join(one.choices) in out
        assert re.sub(r"\\\[", "[", " ".join((one.info.help or "").split())) in one_line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_an_example_that_fits(name, cli):
    _, out, _ = cli(name, "--help")
    example = re.search(r"\nExample\n  (dflash-cache .*)\n", out)
    assert example is not None
    assert f"dflash-cache {name} " in example[1]
    assert len(example[1]) <= 80
    used = set(re.findall(r"--[\w-]+", example[1]))
    assert used <= {n for parameter in COMMANDS[name].parameters() for n in shown(parameter).names}


def test_groups_come_in_the_order_of_use(cli):
    _, out, _ = cli("extract", "--help")
    titles = [line for line in out.splitlines() if line in ("Target", "Data", "States", "Speed", "Job")]
    assert titles == ["Target", "Data", "States", "Speed", "Job"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "a", "b", "--to"], ["specforge", "deepspec", "angelslim"]),
        (["extract", "--codec"], ["raw", "zbits", "fp8"]),
        (["extract", "--turns"], ["all", "last", "each"]),
    ],
)
def test_an_option_without_its_value_lists_the_choices(arguments, said, cli):
    code, _, errors = cli(*arguments)
    assert code == 2
    assert all(word in errors for word in [arguments[-1], *said])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--shard-size", "5 parsecs"), ("--shard-size", "1KiB"), ("--batch-tokens", "many"), ("--columns", "a")],
        *[("--target-layers", "one"), ("--capture", "all"), ("--template-date", "today"), ("--device-map", "x")],
        *[
            ("--chat-template-kwargs", "[]"),
            ("--chat-template", "none.jinja"),
            ("--data-config", "x"),
            ("--split", "x"),
        ],
        *[("--profile", "no/such/folder/x.json"), ("--scratch", "x"), ("--address", "x"), ("--tensor-parallel", "2")],
    ],
)
def test_an_error_names_the_option_as_it_is_typed(option, value, job, cli, tmp_path):
    code, _, errors = cli("extract", *job, "--out", tmp_path / "out", option, value)
    assert code == 2
    assert option in errors
    assert "Traceback" not in errors


# -- --config ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_options_come_from_a_file_and_the_command_line_wins(tiny_target, demo_jsonl, config, cli):
    path = config(
        f"target: {tiny_target}\ndata: [{demo_jsonl}]\nlimit: 30\nmax_length: 64\ntarget-layers: [0, 3]\n"
        "chat-template-kwargs: {enable_thinking: false}\njson: true\ndevice: cpu\ncompile: true  # of extract alone\n"
    )
    _, out, _ = cli("estimate", "--config", path, "--limit", "20")
    report = json.loads(out)
    assert (report["rows_read"], report["target_layer_ids"]) == (20, [0, 3])
    assert report["tokens"] <= 20 * 64


def test_an_argument_can_stand_in_the_file(made, config, cli):
    assert cli("verify", "--config", config(f"cache: {made}\nquick: true\n"))[0] == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("shard_bytes: 3", "no such option"),
        ("max-length: long", "write a number"),
        ("max-length: 12.5", "write a number"),
        ("max-length: true", "write a number"),
        ("limit: 0", "at least 1"),
        ("streaming: 1", "true or false"),
        ("too-long: cut", "truncate, drop"),
        ("target: [a, b]", "one value"),
        ("target: {a: b}", "one value"),
        ("target:", "no value"),
        ("device: cpu\ndevice: cpu", "twice"),
        ("config: other.yaml", "no such option"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_line_is_named(line, said, config, cli, tmp_path):
    code, out, errors = cli("extract", "--config", config(f"# a comment\n{line}\n"), "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert said in errors
    assert re.search(r"run.yaml line [23]", errors)
    assert line.split(":")[0] in errors or "not YAML" in errors
    assert not (tmp_path / "out").exists()


# -- progress ---------------------------------------------------------------------------------------------------------


def on_a_terminal(columns: int) -> None:
    """For ``before``: stdout and stderr are a terminal of so many columns, whose text goes where they went."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    into = os.dup(2)
    if os.fork():
        os.close(leader)
        os.dup2(follower, 2)
        os.environ.pop("COLUMNS", None)
        return
    os.close(follower)
    try:
        while data := os.read(leader, 65536):
            os.write(into, data)
    except OSError:
        pass
    os._exit(0)


def on_80_columns() -> None:
    on_a_terminal(80)


def test_a_bar_says_how_far_it_is(job, tmp_path):
    out, _, errors = commands.run("extract", *job, "--out", tmp_path / "out", before=on_80_columns, TERM="xterm")
    assert out == 0, errors
    lines = [CONTROL.sub("", line) for line in re.split(r"[\r\n]+", errors)]
    bars = [line for line in lines if line.startswith("extract") and "tok/s" in line]
    assert bars
    assert all(len(line) <= 80 for line in lines if "━" in line)
    for part in (r"━", r"\d+%", r"[\d.k]+/[\d.k]+ tokens", r"tok/s", r"GB/s", r"pad [\d.]+%", r"ETA \d+s"):
        assert re.search(part, bars[-1] if part != r"ETA \d+s" else " ".join(bars)), part
    foreign = ("Generating", "Loading", "it/s", "Map:", "examples/s")
    assert not [line for line in lines if any(word in line for word in foreign)]


def test_several_workers_have_a_line_each(monkeypatch):
    told = []

    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "Console", lambda **_: progress.Progress().console)
    reporter = progress.Reporter("extract", 200, "tokens")
    monkeypatch.undo()
    for name in ("worker 0 (cpu)", "worker 1 (cpu)"):
        reporter.worker(name, 50, 100, "9 tok/s")
    reporter.update(100, "18 tok/s")
    told = [(task.description.strip(), task.percentage) for task in reporter._bar.tasks]
    reporter.close()
    assert told == [("extract", 50.0), ("worker 0 (cpu)", 50.0), ("worker 1 (cpu)", 50.0)]


def test_without_a_terminal_a_line_a_minute(monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Reporter("extract", 1200, "tokens") as reporter:
        for _ in range(1200):
            now += 0.5
            reporter.update(round((now - 1000) * 2), "2 tok/s")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[4] == "extract: 50% 600/1.2k tokens, 2 tok/s, ETA 5m00s"


def test_quiet_says_errors_alone_and_the_log_has_all(job, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    code, stdout, errors = commands.run("extract", *job, "--limit", "20", "--out", out, "--quiet", "--log-file", log)
    assert (code, stdout, errors) == (0, "", "")
    lines = log.read_text().splitlines()
    assert [line for line in lines if "complete, 20 samples" in line]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ", line) for line in lines)
    code, _, errors = commands.run("extract", *job, "--limit", "21", "--out", out, "-q", "--log-file", log)
    assert code == 2
    assert errors.startswith("error: ")
    assert log.read_text().splitlines()[-1].endswith(errors.strip().splitlines()[-1])


@pytest.mark.parametrize("options", [["--quiet", "--verbose"], ["--log-file", "no/such/folder/log"]])
def test_a_voice_that_cannot_be(options, cli, made):
    code, _, errors = cli("inspect", made, *options)
    assert code == 2
    assert options[0] in errors


def test_what_a_command_was_told_does_not_outlive_it(cli, made):
    cli("inspect", made, "--quiet")
    cli("inspect", made)
    assert voice.voice() == voice.Voice()


def test_every_option_has_help():
    for name, command in COMMANDS.items():
        for parameter in command.parameters():
            assert shown(parameter).info.help, f"{name} {parameter.name}"
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


def test_inspect_is_ten_lines_and_all_says_nothing_twice(made, cli):
    code, out, _ = cli("inspect", made)
    assert code == 0
    assert len(out.splitlines()) <= 10
    for word in ("complete", "120, of", "learned", "shards", "fingerprint", "--all"):
        assert word in out
    whole = cli("inspect", made, "--all")[1].splitlines()
    names = [line.split("  ")[0] for line in whole if line.strip() and not line.startswith(" ")]
    assert len(set(names)) == len(names)
    digests = re.findall(r"[0-9a-f]{32,}", "\n".join(whole))
    assert len(set(digests)) == len(digests)
    for line in whole:
        if re.search(r"[0-9a-f]{32,}", line):
            assert re.match(r"\s*[\w.]+ +(digest )?[0-9a-f]+$", line), "a hash has a name"
    values = {line.split("  ", 1)[-1].strip() for line in whole}
    assert {line.split("  ", 1)[-1].strip() for line in out.splitlines()[:-1]} <= values


def test_a_trainer_speaks_from_the_first_step(made, tmp_path):
    import os
    import subprocess
    import sys

    script = Path(__file__).parents[1] / "scripts" / "train_draft.py"
    where = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    options = ["--cache", made, "--out", tmp_path / "draft", "--steps", "2", "--batch-size", "1", "--blocks", "4"]
    done = subprocess.run(
        [sys.executable, script, *options, "--device", "cpu"], capture_output=True, text=True, env=where, check=True
    )
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step")] == ["1", "2"]


def test_estimate_says_what_to_run(job, cli):
    code, out, _ = cli("estimate", *job, "--codec", "fp8", "--tokens-per-second", "100", "--debug")
    assert code == 0
    assert out.splitlines()[-1] == f"to run it: dflash-cache extract {shlex.join(job)} --codec fp8 --debug --out OUT"
    assert re.search(r"--codec zbits +about .*, saves \d+ %", out)
    assert re.search(r"--codec raw +[\d.]+ MiB\n", out)
    assert re.search(r"memory +[\d.]+ MiB of the host", out)
