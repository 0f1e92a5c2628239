"""In a notebook: what cells show of a cache and a batch, and scripts/notebook.ipynb from its first cell to its last."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient
from synthetic import LAYER_IDS, write_cache

from cache_format import DFlashTargetBatch, FeatureCache

NOTEBOOK = Path(__file__).resolve().parent.parent / "scripts" / "notebook.ipynb"


def test_a_cache_shows_itself_and_no_markup_of_others(tmp_path):
    write_cache(tmp_path / "<b>c", [5, 90, 17], name="<script>alert(1)</script>")
    cache = FeatureCache.open(tmp_path / "<b>c")
    shown = cache._repr_html_()
    assert "<td" in shown
    assert "112, " in shown
    assert ", ".join(map(str, LAYER_IDS)) in shown
    assert "<script" not in shown
    assert "<b>c" not in shown
    assert "&lt;script&gt;" in shown
    view = cache.view(layers=LAYER_IDS[:1], dtype="float64")._repr_html_()
    assert f"[B, S, 1 x {cache.hidden_size} = {cache.hidden_size}] float64" in view


def test_a_batch_shows_its_shapes_and_how_full_it_is(tmp_path):
    write_cache(tmp_path / "c", [5, 90, 17])
    cache = FeatureCache.open(tmp_path / "c")
    batch = cache.batch([0, 1])
    shown = batch._repr_html_()
    assert f"95 tokens, {int(batch.loss_mask.sum())} learned, 47 % padding" in shown
    assert f"{str(batch.hidden_states.dtype).removeprefix('torch.')} [2, 90, " in shown
    assert "logits" not in shown
    abstract = DFlashTargetBatch(*(torch.empty(1, 2, device="meta") for _ in range(4)))
    assert "on meta" in abstract._repr_html_()


def test_the_notebook_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_the_notebook_runs(made, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(made))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    html = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert [re.search(r"<b>(\w+)", one)[1] for one in html] == [
        "FeatureCache",
        "DFlashTargetBatch",
        "DFlashTargetBatch",
    ]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "<|im_start|>assistant\n[[" in printed
    before, after = map(float, re.search(r"loss ([\d.]+) before the step, ([\d.]+) after", printed).groups())
    assert after < before
    assert not [output for output in outputs if output.get("name") == "stderr"]
