"""A target goes to its device tensor by tensor: the host never holds all of it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import late_device
import pytest
import torch
from late_device import in_a_process, install
from transformers import Qwen3Config, Qwen3ForCausalLM

from cache_format.device import CPU, accelerators
from extractor.config import TargetOptions
from extractor.target.load_target import load_wanted

SIZES = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 8),
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 14,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target of 122 MB in bfloat16, in several files, of tensors of at most 4 MB."""
    path = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(path, max_shard_size="40MB")
    return path


class Watch:
    """The most memory that was not a file's and not the device's, in bytes, sampled all the time."""

    def __init__(self, late: late_device.Late):
        self._late, self._stop, self.most = late, threading.Event(), 0
        self._before = self._now()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

    def _run(self) -> None:
        while not self._stop.is_set():
            # The device first: what it is given meanwhile is not counted as the host's.
            held = self._late.held
            self.most = max(self.most, self._now() - self._before - held)
            time.sleep(0.0005)


def loaded(folder: Path, by_way_of_the_host: bool) -> tuple[int, int, int]:
    """Bytes of the weights, those of them on the device, and the most that the host had besides."""
    # What the first use of torch and transformers takes is none of the target's.
    import accelerate  # noqa: F401
    from transformers import modeling_utils
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    late = install(0)
    device = accelerators()[0]
    # A block that torch's allocator for CUDA cuts up, and this one does not.
    modeling_utils.caching_allocator_warmup = lambda *_: None
    options = TargetOptions(name=str(folder), dtype="float32", device="late")
    with Watch(late) as watch:
        if by_way_of_the_host:
            model = load_wanted(options, torch.float32, CPU, None).to(device)
        else:
            model = load_wanted(options, torch.float32, device, None)
    weights = list(model.parameters())
    on_device = sum(weight.nbytes for weight in weights if weight.device == device)
    return sum(weight.nbytes for weight in weights), on_device, watch.most


def test_the_host_does_not_hold_a_target_that_goes_to_a_device(folder):
    """Its weights are float32 there and bfloat16 in the files, so nothing of them can be used where it lies."""
    whole, on_device, most = in_a_process(loaded, folder, False)
    assert on_device == whole > 240e6
    assert most < 0.4 * whole
    # The way that it was once: so the test can fail.
    *_, by_the_host = in_a_process(loaded, folder, True)
    assert by_the_host > 0.9 * whole
