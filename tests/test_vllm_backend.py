"""--backend vllm, with a stand-in for vLLM: the seam, what is refused, what goes wrong. scripts/test_vllm.sh has it."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import sys
from dataclasses import make_dataclass
from enum import Enum
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import commands
import fake_vllm
import pytest
import torch
from commands import workers_by_fork
from fake_vllm import DefaultModelLoader, install
from jobs import contents
from safetensors.torch import load_file, save_file
from tiny_models import build, gemma3_multimodal
from torch import nn

import extractor
from cache_format import FeatureCache
from cache_format.errors import InputError
from cache_format.layout.captures import Captures
from extractor.config import TargetOptions
from extractor.engine.local import engine_devices
from extractor.engine.ray_cluster import environment, gpus_of_actor
from extractor.target.stored_embeddings import StoredWeights, stored_embeddings
from extractor.target.vllm import engine
from extractor.target.vllm.capture import kernels, shared_rows
from extractor.target.vllm.engine import steps
from extractor.target.vllm.load import load_vllm
from extractor.target.vllm.processes import SHARED_MEMORY, forget_meeting, forget_shared_memory, speak_in_lines
from extractor.target.vllm.refused import require_length, require_servable
from extractor.terminal.signals import Stopped


@pytest.fixture
def faults(monkeypatch):
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, os.environ.get(name, "ERROR"))
    return install(monkeypatch)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Samples of 4 to 48 tokens, two of them alike."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lengths = [48, 48, 31, 20, 20, 9, 4, 4]
    ids = [[(7 * n + 3 * place) % 1900 + 20 for place in range(length)] for n, length in enumerate(lengths)]
    ids[1] = ids[0]
    path.write_text("".join(json.dumps({"input_ids": row, "loss_mask": [1] * len(row)}) + "\n" for row in ids))
    return path


@pytest.fixture(scope="module")
def arguments(tiny_target, rows) -> list[str]:
    return [
        *("extract", "--target", str(tiny_target), "--data", str(rows), "--device", "cpu", "--target-layers", "4,0,2"),
        *("--max-length", "64", "--shard-size", "64KiB", "--batch-tokens", "96"),
    ]


VLLM = ("--backend", "vllm")
STEPS_AT_THE_START = 5


def done(cli, *command) -> str:
    code, out, err = cli(*command)
    assert code == 0, err
    return out + err


def largest_difference(one: Path, other: Path) -> float:
    """Of a token's states of a layer, as a share of their norm."""
    one, other = FeatureCache.open(one), FeatureCache.open(other)
    worst = 0.0
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine.input_ids, theirs.input_ids)
        a, b = (x.hidden_states.view(-1, len(one.target_layer_ids), one.hidden_size) for x in (mine, theirs))
        worst = max(worst, float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()))
    return worst


@pytest.fixture
def by_transformers(cli, arguments, once) -> Path:
    return once("vllm-tests-by-transformers", lambda out: done(cli, *arguments, "--out", out))


@pytest.mark.parametrize(("auxiliary", "layers_add"), [(True, False), (False, False), (False, True)])
def test_states_are_those_of_transformers(cli, arguments, faults, tmp_path, by_transformers, auxiliary, layers_add):
    faults.auxiliary, faults.layers_add = auxiliary, layers_add
    said = done(cli, *arguments, *VLLM, "--out", tmp_path / "c")
    assert "vLLM is up after" in said
    assert "its states are those of transformers" in said
    made, expected = FeatureCache.open(tmp_path / "c"), FeatureCache.open(by_transformers)
    assert largest_difference(tmp_path / "c", by_transformers) < 2e-6
    assert made.manifest.target == expected.manifest.target
    for of in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(made, of)().weight, getattr(expected, of)().weight)
    identity = made.manifest.identity
    assert identity["backend"] == "vllm"
    assert identity["attn_implementation"] == "vllm FAKE_ATTN"
    assert identity["padding"] == "none"
    assert identity["vllm.version"] == "0.32.0"
    assert identity["vllm.eager"] is True
    assert identity["vllm.capture"] == ("auxiliary outputs" if auxiliary else "layer hooks")


def test_a_batch_is_a_step_and_shared_memory_has_no_name_to_leave(cli, arguments, faults, tmp_path, monkeypatch):
    seen, call = [], fake_vllm.LLM.collective_rpc

    def watched(self, method, args=()):
        if len(faults.steps) > STEPS_AT_THE_START:
            seen.extend(os.listdir(SHARED_MEMORY))
        return call(self, method, args)

    before = set(os.listdir(SHARED_MEMORY))
    monkeypatch.setattr(fake_vllm.LLM, "collective_rpc", watched)
    done(cli, *arguments, *VLLM, "--out", tmp_path / "c")
    run = faults.steps[STEPS_AT_THE_START:]
    assert sorted(length for lengths in run for length in lengths) == [4, 4, 9, 20, 20, 31, 48, 48]
    assert all(sum(lengths) <= 96 for lengths in run)
    assert seen
    # Other tests' processes have semaphores there.
    assert not [name for name in set(seen) - before if not name.startswith(("sem.", "psm_"))]
    asked = faults.arguments
    assert not Path(faults.environment["VLLM_RPC_BASE_PATH"]).exists()
    assert asked["max_model_len"] == 48 + 1
    assert asked["max_num_batched_tokens"] >= 96
    assert (asked["enable_prefix_caching"], asked["enable_chunked_prefill"]) == (False, False)
    assert asked["enforce_eager"]


def test_last_hidden_states(cli, arguments, faults, tmp_path):
    capture = ("--capture", "last_hidden_states")
    done(cli, *arguments, *capture, "--out", tmp_path / "t")
    done(cli, *arguments, *capture, *VLLM, "--out", tmp_path / "v")
    mine, theirs = (FeatureCache.open(tmp_path / name)[2].last_hidden_states for name in "vt")
    assert (mine - theirs).norm() / theirs.norm() < 2e-6
    assert faults.arguments["model_loader_extra_config"] == {"num_layers": 6}


def test_only_the_layers_up_to_the_last_captured_are_loaded(cli, arguments, faults, tmp_path):
    done(cli, *arguments, *VLLM, "--out", tmp_path / "c")
    assert faults.arguments["model_loader_extra_config"] == {"num_layers": 5}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"backwards": True}, "other states than transformers gives at layer"),
        ({"bad_layer": 2}, "NaN or Inf at layer 2"),
        ({"same_layers": True}, "the same states for layers 4 and 0"),
        ({"wrong_by": 0.05}, "other states than transformers gives"),
        ({"looks_beside": True}, "tokens give other states beside others"),
        ({"auxiliary": False, "layers_add": True, "sum_beside": 1.0}, "not what its final norm makes of"),
        ({"auxiliary": False, "layers_add": True, "keeps_output": False}, "is not its final norm's"),
        ({"multimodal": True}, "is a multimodal model"),
        ({"chunks": 2, "chunks_over": 90}, "took 2 passes, not one; begin another cache with a smaller --batch-tokens"),
        ({"dies_after": 1}, "This was the start, with 10 rows of 9 random tokens"),
    ],
)
def test_an_engine_that_gives_something_else_is_refused_at_the_start(cli, arguments, faults, tmp_path, fault, said):
    faults.__dict__.update(fault)
    code, _, err = cli(*arguments, *VLLM, "--out", tmp_path / "c")
    assert code == 2
    assert said in err
    assert not list((tmp_path / "c" / "shards").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"lost": 1}, "each once, and got"),
        ({"chunks": 2}, "took 2 passes"),
        ({"dies_after": STEPS_AT_THE_START + 2}, "the engine has failed (RuntimeError: Executor failed.)"),
        ({"bad_layer": 0}, "the target gave NaN or Inf at layer 0"),
    ],
)
def test_an_engine_that_fails_on_the_way_leaves_finished_shards(
    cli, arguments, faults, tmp_path, monkeypatch, fault, said
):
    done(cli, *arguments, *VLLM, "--out", tmp_path / "whole")
    generate = fake_vllm.LLM.generate

    def after_two_batches(self, *given, **named):
        if len(faults.steps) >= STEPS_AT_THE_START + 2:
            faults.__dict__.update(fault)
        generate(self, *given, **named)

    faults.steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(fake_vllm.LLM, "generate", after_two_batches)
        code, _, err = cli(*arguments, *VLLM, "--out", tmp_path / "c")
    assert code == 1
    assert said in err
    finished = contents(tmp_path / "c" / "shards")
    assert 0 < len(finished) < len(contents(tmp_path / "whole" / "shards"))
    install(monkeypatch)
    done(cli, *arguments, *VLLM, "--out", tmp_path / "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            Exception("WorkerProc initialization failed.\nSee"),
            "a worker process ended before it was ready; what it said stands above",
        ),
        (KeyError("model.layers.0.x"), "cannot run this target here: KeyError: 'model.layers.0.x'"),
        (ValueError("1 error\n  Value error, no head of 7 [type=value_error, x=1]"), "target here: no head of 7\n"),
        (AssertionError("Not enough nodes to bind threads of 2 workers"), "VLLM_CPU_OMP_THREADS_BIND='0|1' gives each"),
    ],
)
def test_an_engine_that_does_not_start(cli, arguments, faults, tmp_path, error, said):
    faults.does_not_start = error
    code, _, err = cli(*arguments, *VLLM, "--out", tmp_path / "c")
    assert code == 2
    assert said in err
    assert not Path(faults.environment["VLLM_RPC_BASE_PATH"]).exists()
    faults.does_not_start = None
    done(cli, *arguments, *VLLM, "--out", tmp_path / "c")


def test_workers_on_other_nodes_are_not_sent_to_a_folder_of_this_one(cli, arguments, faults, tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    monkeypatch.setattr("extractor.target.vllm.load._executor", lambda *_: "ray")
    done(cli, *arguments, *VLLM, "--out", tmp_path / "c")
    assert faults.arguments["distributed_executor_backend"] == "ray"
    assert "VLLM_RPC_BASE_PATH" not in faults.environment


def test_a_start_that_is_stopped_leaves_no_sockets(faults, tiny_target):
    faults.does_not_start = Stopped(2)
    target, cpu = TargetOptions(name=str(tiny_target), backend="vllm"), torch.device("cpu")
    with pytest.raises(Stopped):
        load_vllm(target, [0], Captures(), dtype=torch.float32, device=cpu, longest=8, batch_tokens=8)
    assert not Path(faults.environment["VLLM_RPC_BASE_PATH"]).exists()


@pytest.mark.parametrize("begun_with", ["vllm", "transformers"])
def test_a_cache_is_not_resumed_with_the_other_backend(cli, arguments, faults, tmp_path, begun_with):
    other = {"vllm": "transformers", "transformers": "vllm"}[begun_with]
    done(cli, *arguments, "--backend", begun_with, "--out", tmp_path / "c")
    before = contents(tmp_path / "c")
    code, _, err = cli(*arguments, "--backend", other, "--out", tmp_path / "c")
    assert code == 2
    assert "backend: cache has" in err
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("backend", [None, "transformers", "vllm"])
def test_recompute_across_backends(cli, arguments, faults, tmp_path, tiny_target, by_transformers, backend):
    done(cli, *arguments, *VLLM, "--out", tmp_path / "c")
    other = () if backend is None else ("--backend", backend)
    for cache in (tmp_path / "c", by_transformers):
        steps = len(faults.steps)
        again = done(cli, "verify", cache, "--recompute", "3", "--target", tiny_target, "--device", "cpu", *other)
        assert "that target" in again
        by_vllm = backend == "vllm" or (backend is None and cache != by_transformers)
        assert (len(faults.steps) > steps) == by_vllm


def test_another_layer_s_states_do_not_pass_recompute(cli, arguments, faults, tmp_path, tiny_target, monkeypatch):
    done(cli, *arguments, "--out", tmp_path / "c")
    faults.wrong_by = 0.2
    monkeypatch.setattr("extractor.target.vllm.load.prove", lambda *_, **__: None)
    code, out, _ = cli("verify", tmp_path / "c", "--recompute", "3", "--target", tiny_target, "--device", "cpu", *VLLM)
    assert code == 1
    assert "is not what the target gives" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--capture", "logits-topk=4"), "--capture logits-topk"),
        (("--batch-tokens", "auto"), "--batch-tokens auto"),
        (("--device-map", "auto"), "--device-map is for --backend transformers"),
        (("--tp-plan", "auto"), "--tp-plan is for --backend transformers"),
        (("--compile",), "--compile is for --backend transformers"),
        (("--deterministic",), "VLLM_BATCH_INVARIANT"),
        (("--attn-implementation", "sdpa"), "--attn-implementation is for"),
        (("--experts-implementation", "eager"), "--experts-implementation is for"),
        (("--backend", "transformers", "--tensor-parallel", "2"), "are for --backend vllm"),
        (("--backend", "transformers", "--pipeline-parallel", "2"), "are for --backend vllm"),
        (("--devices", "cpu,cpu,cpu", "--tensor-parallel", "2"), "each engine takes 2 devices"),
    ],
)
def test_options_that_do_not_go_together(cli, arguments, tmp_path, options, said):
    code, _, err = cli(*arguments, *VLLM, *options, "--out", tmp_path / "c")
    assert code == 2
    assert said in err
    assert not (tmp_path / "c").exists()


def test_whole_experts_on_a_cpu_are_refused(cli, arguments, faults, tmp_path):
    code, _, err = cli(*arguments, *VLLM, "--tensor-parallel", "2", "--expert-parallel", "--out", tmp_path / "c")
    assert code == 2
    assert "--expert-parallel: vLLM's kernel of experts for CPUs" in err
    assert not faults.arguments


def test_more_stages_than_layers_are_refused(cli, arguments, faults, tmp_path):
    code, _, err = cli(*arguments, *VLLM, "--pipeline-parallel", "6", "--out", tmp_path / "c")
    assert code == 2
    assert "--pipeline-parallel 6: there are 5 layers up to the last captured" in err
    assert not faults.arguments


def test_vllm_is_not_installed(cli, arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    code, _, err = cli(*arguments, *VLLM, "--out", tmp_path / "c")
    assert code == 2
    assert "pip install 'dflash-cache[vllm]'" in err


def test_a_multimodal_target_is_refused_before_a_row_is_prepared(cli, arguments, faults, tmp_path, tiny_target):
    shutil.copytree(tiny_target, tmp_path / "m")
    build(gemma3_multimodal).save_pretrained(tmp_path / "m")
    command = [str(tmp_path / "m") if value == str(tiny_target) else value for value in arguments]
    code, _, err = cli(*command, *VLLM, "--out", tmp_path / "c")
    assert code == 2
    assert "Gemma3ForConditionalGeneration is a multimodal model" in err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("short", [48, 40, 49])
def test_rotary_embeddings_that_change_with_the_longest_sample(short):
    from transformers import Phi3Config

    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = Phi3Config(max_position_embeddings=4096, original_max_position_embeddings=short, rope_parameters=rope)
    if short > 48:
        require_length(config, 48)
        return
    with pytest.raises(InputError, match=f"--max-length {short - 1}"):
        require_length(config, 48)


def test_targets_that_vllm_computes_otherwise_are_refused_by_name(monkeypatch):
    from transformers import BloomConfig, Cohere2Config

    monkeypatch.setattr("extractor.target.vllm.refused.find_spec", lambda _: True)
    with pytest.raises(InputError, match="type bloom vLLM takes the exact GELU"):
        require_servable(TargetOptions(name="t", backend="vllm"), BloomConfig())
    config = Cohere2Config(sliding_window=40)
    require_length(config, 40)
    with pytest.raises(InputError, match="--max-length 40"):
        require_length(config, 41)


def test_more_tokens_than_positions(cli, arguments, faults, tmp_path, tiny_target):
    shutil.copytree(tiny_target, tmp_path / "short")
    path = tmp_path / "short" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 40}))
    command = [str(tmp_path / "short") if value == str(tiny_target) else value for value in arguments]
    code, _, err = cli(*command, *VLLM, "--out", tmp_path / "c")
    assert code == 2
    assert "--max-length 40" in err


def test_no_room_in_shared_memory(cli, arguments, faults, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    code, _, err = cli(*arguments, *VLLM, "--out", tmp_path / "c")
    assert code == 2
    assert "--shm-size" in err


def test_what_transformers_leaves_out_of_a_config_is_given_to_vllm(faults, tmp_path):
    from transformers import DeepseekV3Config

    from extractor.target.vllm.load import left_out_by_transformers

    config = DeepseekV3Config()
    assert left_out_by_transformers(config) == {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    config.scoring_func, config.topk_method = "sigmoid", "noaux_tc"
    assert left_out_by_transformers(config) == {}


@pytest.mark.parametrize("lengths", [[], [5], [300], [16] * 8, [48, 48, 31, 20, 20, 9, 4, 4], [1] * 3000])
def test_steps(lengths):
    cut = list(steps(lengths, 96, 16))
    assert [place for part in cut for place in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in cut:
        assert part.stop - part.start == 1 or fits(lengths[part])
    for one, other in pairwise(cut):
        assert not fits(lengths[one.start : other.start + 1])


def fits(lengths: list[int]) -> bool:
    """In a step of 96 tokens, with blocks of 16."""
    rooms = [-(-length // 16) * 16 for length in lengths]
    return sum(lengths) <= 96 and sum(rooms) <= 2 * 96 and len(lengths) <= engine.MOST_REQUESTS


@pytest.mark.parametrize("most", [1, 5, 96, 8192])
@pytest.mark.parametrize("longest", [1, 4, 48, 8192])
@pytest.mark.parametrize("block", [1, 16, 128])
def test_the_largest_steps_are_steps_and_use_what_there_is(most, longest, block):
    most = max(most, longest)
    for lengths in engine.largest_steps(most, block, longest):
        assert len(list(steps(lengths, most, block))) == 1
        assert max(lengths) <= longest
        assert min(lengths) >= 1
    if block <= longest and most // longest < engine.MOST_REQUESTS:
        assert sum(engine.largest_steps(most, block, longest)[0]) == most


def test_memory_of_another_process_is_not_taken_for_the_job_s():
    with engine._shared_file(4096) as file:
        assert file.is_here()
        assert not file._replace(inode=file.inode + 1).is_here()
        assert not file._replace(path="/proc/0/fd/0").is_here()
        rows = shared_rows(file.path, 8, 16, torch.float32)
        rows.fill_(3)
        assert torch.equal(shared_rows(file.path, 8, 16, torch.float32), rows)
    assert not file.is_here()


def test_names_by_which_workers_met_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr("extractor.target.vllm.processes.SHARED_MEMORY", str(tmp_path))
    for name in ("met", "met-tp:0-[0-1]-cpushm", "met-pp:0-[0-1]-cpushm", "metal-1", "other-met-1"):
        (tmp_path / name).touch()
    for forget in (forget_shared_memory, forget_meeting):
        forget("tcp://localhost:29500")
    assert len(os.listdir(tmp_path)) == 5
    forget_shared_memory(f"file://{tmp_path}/met")
    assert sorted(os.listdir(tmp_path)) == ["met", "metal-1", "other-met-1"]
    forget_meeting(f"file://{tmp_path}/met")
    forget_meeting(f"file://{tmp_path}/met")
    assert sorted(os.listdir(tmp_path)) == ["metal-1", "other-met-1"]


@pytest.mark.parametrize("level", ["ERROR", "DEBUG"])
def test_a_worker_s_error_is_a_line(monkeypatch, level):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
    said, logger = io.StringIO(), logging.getLogger("vllm")
    handler = logging.StreamHandler(said)
    monkeypatch.setattr(logger, "handlers", [handler])
    speak_in_lines()
    try:
        {}["weight"]
    except KeyError:
        logging.getLogger("vllm.worker").error("%s failed", "WorkerProc", exc_info=True)
    assert (said.getvalue() == "WorkerProc failed KeyError: 'weight'\n") == (level == "ERROR")


def test_most_requests(monkeypatch):
    monkeypatch.setattr(engine, "MOST_REQUESTS", 4)
    assert [part.stop - part.start for part in steps([1] * 9, 1000, 1)] == [4, 4, 1]


@pytest.mark.parametrize(
    ("devices", "each", "first"),
    [
        (["cuda:0", "cuda:1", "cuda:2", "cuda:3"], 2, ["cuda:0", "cuda:2"]),
        (["cuda:4", "cuda:5"], 1, ["cuda:4", "cuda:5"]),
        (["cpu", "cpu"], 2, ["cpu"]),
    ],
)
def test_devices_of_engines(devices, each, first):
    assert engine_devices(devices, each) == first


@pytest.mark.parametrize(("devices", "each"), [(["cuda:0", "cuda:2"], 2), (["cuda:0", "cuda:1", "cuda:2"], 2)])
def test_devices_that_do_not_make_engines(devices, each):
    with pytest.raises(InputError, match="follow one another"):
        engine_devices(devices, each)


def with_fake() -> None:
    """For ``commands``: the stand-in in the command's process, and in workers that are forked from it."""
    install(pytest.MonkeyPatch())


@pytest.fixture
def by_vllm(arguments, once) -> Path:
    return once("vllm-tests-by-vllm", lambda out: commands.made(*arguments, *VLLM, "--out", out, before=with_fake))


def several_engines() -> None:
    with_fake()
    workers_by_fork()


def test_engines_on_several_devices_give_the_bytes_of_one(arguments, by_vllm, tmp_path):
    more = (*VLLM, "--out", tmp_path / "c", "--devices", "cpu,cpu")
    code, _, errors = commands.run(*arguments, *more, before=several_engines)
    assert code == 0, errors
    assert errors.count("vLLM is up") == 2
    assert contents(tmp_path / "c") == contents(by_vllm)


def apart_from_torchrun() -> None:
    with_fake()
    start = fake_vllm.LLM.__init__

    def checked(self, **arguments):
        found = {name for name in os.environ if name in TORCHRUN}
        assert not found, found
        start(self, **arguments)

    fake_vllm.LLM.__init__ = checked  # type: ignore[method-assign]


TORCHRUN = {"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "one", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": "9"}


def test_engines_of_torchrun_s_processes_do_not_meet_at_its_store(arguments, by_vllm, tmp_path):
    def start(rank: int) -> commands.Command:
        where = {**TORCHRUN, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        return commands.start(*arguments, *VLLM, "--out", tmp_path / "c", before=apart_from_torchrun, **where)

    ends = [(process.communicate()[1], process.returncode) for process in [start(0), start(1)]]
    assert [code for _, code in ends] == [0, 0], ends
    assert contents(tmp_path / "c") == contents(by_vllm)


def as_python_would() -> None:
    """For ``commands``, whose processes are forked from one that has read PYTHONPATH long before."""
    sys.path[:0] = os.environ["PYTHONPATH"].split(":")


def test_engines_in_actors_of_ray(arguments, by_vllm, tmp_path):
    pytest.importorskip("ray", reason="needs pip install 'dflash-cache[ray]'")
    # Actors have nothing of what was done in the driver's process.
    (tmp_path / "path" / "vllm").mkdir(parents=True)
    (tmp_path / "path" / "vllm" / "__init__.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import fake_vllm, pytest\nfake_vllm.install(pytest.MonkeyPatch())\n"
    )
    more = (*VLLM, "--out", tmp_path / "c", "--engine", "ray", "--num-workers", "1")
    where = {"PYTHONPATH": f"{tmp_path / 'path'}:{Path(extractor.__file__).parents[1]}", "OMP_NUM_THREADS": "1"}
    code, _, errors = commands.run(*arguments, *more, before=as_python_would, **where)
    assert code == 0, errors
    assert contents(tmp_path / "c") == contents(by_vllm)


@pytest.mark.parametrize(
    ("options", "asked", "gpus"),
    [
        ({"backend": "vllm", "tensor_parallel": 4, "pipeline_parallel": 2}, None, 8),
        ({"backend": "vllm", "tensor_parallel": 4}, 4, 4),
        ({"backend": "vllm", "tensor_parallel": 4, "device": "cpu"}, None, 0),
        ({}, None, 1),
        ({}, 3, 3),
        ({}, 0, 0),
        ({"device": "cpu"}, None, 0),
    ],
)
def test_an_actor_of_ray_gets_the_gpus_of_an_engine(options, asked, gpus):
    assert gpus_of_actor(TargetOptions(name="t", **options), asked) == gpus


def test_an_actor_is_not_given_other_gpus_than_an_engine_takes():
    with pytest.raises(InputError, match="--gpus-per-worker 1: an engine of --tensor-parallel 4"):
        gpus_of_actor(TargetOptions(name="t", backend="vllm", tensor_parallel=4), 1)


def test_an_actor_gets_what_decides_vllm_s_kernels_and_no_key(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert environment()["VLLM_BATCH_INVARIANT"] == "1"
    assert "VLLM_API_KEY" not in environment()


class Choice(Enum):
    MARLIN = 1


class CutlassKernel:
    pass


class Fp8Method:
    def __init__(self) -> None:
        self.kernel, self.backend, self.size = CutlassKernel(), Choice.MARLIN, 3


def test_kernels_in_force_are_named():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    for layer in list(model)[:2]:
        layer.quant_method = Fp8Method()
    assert kernels(model) == "Fp8Method CutlassKernel MARLIN 2"


class UnquantizedLinearMethod:
    pass


class _Model(nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.embed, self.lm_head, self.norm = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(8))
        for module in (self.lm_head, *self.layers):
            module.quant_method = UnquantizedLinearMethod()
        if tied:
            self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize("tied", [True, False])
def test_the_loader_stops_at_the_last_captured_layer_and_drops_the_head(faults, monkeypatch, tied):
    import vllm.distributed.utils as distributed

    from extractor.target.vllm.loader import TruncatedLoader

    seen = {}

    def make() -> nn.Module:
        seen.update(stages=[distributed.get_pp_indices(8, rank, 2) for rank in (0, 1)])
        return _Model(tied)

    stored = ["embed.weight", "model.layers.1.w", "model.layers.3.w", "model.layers.30.w", "lm_head.weight", "norm.w"]
    monkeypatch.setattr(DefaultModelLoader, "weights", tuple((name, torch.zeros(1)) for name in stored))
    loader = TruncatedLoader(LoadConfig("dflash_cache", {"num_layers": 4}))
    config = SimpleNamespace(get_vocab_size=lambda: 7)
    model = loader.load_model(SimpleNamespace(make=make), config)
    assert seen["stages"] == [(0, 2), (2, 4)]
    assert distributed.get_pp_indices is fake_vllm.get_pp_indices
    assert model.embed.weight.shape == (7, 4)
    assert model.lm_head.weight.numel() == (28 if tied else 0)
    assert model.compute_logits(torch.ones(3, 4)).shape == (3, 7)
    described = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=8))
    loaded = [name for name, _ in loader.get_all_weights(described, model)]
    # What this model has made in spite of all is gone, and what no file has given would be seen.
    assert [isinstance(layer, nn.Identity) for layer in model.layers] == [False] * 4 + [True] * 4
    one, other = torch.ones(1), torch.zeros(1)
    assert model.layers[4](positions=None, hidden_states=one, residual=other) == (one, other)
    assert model.layers[4](one, other) is one
    assert all(layer.weight.isnan().all() for layer in model.layers[:4])
    assert not model.norm.weight.isnan().any()
    expected = ["embed.weight", "model.layers.1.w", "model.layers.3.w", "norm.w"]
    assert sorted(loaded) == sorted(expected + (["lm_head.weight"] if tied else []))
    layers = {f"layers.{number}.weight" for number in range(4)}
    loader.track_weights_loading(model, {"embed.weight", "norm.weight", "norm.bias", *layers})
    with pytest.raises(ValueError, match=r"norm\.bias"):
        loader.track_weights_loading(model, {"embed.weight", "norm.weight", *layers})


LoadConfig = make_dataclass("LoadConfig", ["load_format", "model_loader_extra_config"])


def saved(folder: Path, tiny_target: Path, change) -> Path:
    """The tiny target with other weight files: ``change(tensors) -> tensors``."""
    shutil.copytree(tiny_target, folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("untied", [False, True])
def test_embeddings_out_of_files_under_another_prefix(tmp_path, tiny_target, untied):
    from transformers import AutoConfig

    head = torch.randn(load_file(tiny_target / "model.safetensors")["model.embed_tokens.weight"].shape)

    def change(tensors):
        renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        return {**renamed, "language_model.lm_head.weight": head} if untied else renamed

    folder = saved(tmp_path / "t", tiny_target, change)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = not untied
    found = stored_embeddings(StoredWeights(str(folder), None), config, torch.bfloat16, False)
    embed = load_file(tiny_target / "model.safetensors")["model.embed_tokens.weight"].bfloat16()
    assert torch.equal(found.get_input_embeddings().weight, embed)
    expected = head.bfloat16() if untied else embed
    assert torch.equal(found.get_output_embeddings().weight, expected)
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == (not untied)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {n: v for n, v in t.items() if "embed" not in n}, "have 0 tensors for"),
        (lambda t: {**t, "model.embed_tokens.weight": torch.zeros(8, 8, dtype=torch.uint8)}, "may be quantised"),
    ],
)
def test_embeddings_that_cannot_be_read(tmp_path, tiny_target, change, said):
    from transformers import AutoConfig

    folder = saved(tmp_path / "t", tiny_target, change)
    with pytest.raises(InputError, match=said):
        stored_embeddings(StoredWeights(str(folder), None), AutoConfig.from_pretrained(folder), torch.float32, False)


def test_weights_that_are_not_safetensors(tmp_path, tiny_target):
    shutil.copytree(tiny_target, tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").rename(tmp_path / "t" / "pytorch_model.bin")
    with pytest.raises(InputError, match="not safetensors"):
        StoredWeights(str(tmp_path / "t"), None)


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100_000)


def listed(text: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "model.safetensors is damaged"),
        (partial(listed, "{"), "is not an index of weight files"),
        (partial(listed, "[]"), "is not an index of weight files"),
        (partial(listed, '{"weight_map": {"a": 3}}'), "is not an index of weight files"),
        (partial(listed, '{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors is missing, which its index names"),
    ],
)
def test_damaged_weights_are_told_of_before_a_row_is_prepared(
    cli, arguments, faults, tmp_path, tiny_target, damage, said
):
    shutil.copytree(tiny_target, tmp_path / "t")
    damage(tmp_path / "t")
    command = [str(tmp_path / "t") if value == str(tiny_target) else value for value in arguments]
    code, _, err = cli(*command, *VLLM, "--out", tmp_path / "c")
    assert code == 2
    assert said in err
    assert not (tmp_path / "c").exists()


def test_the_largest_engine_is_counted_in_devices():
    assert TargetOptions(name="t", backend="vllm", tensor_parallel=4, pipeline_parallel=2).devices == 8
    with pytest.raises(InputError, match="at least 1"):
        TargetOptions(name="t", backend="vllm", tensor_parallel=0)
