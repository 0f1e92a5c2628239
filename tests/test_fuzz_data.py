"""Damaged and hostile data files: rows, bad rows, or an error that names the file. scripts/fuzz_data.py, for longer."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import datasets
import fuzz_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from cache_format.errors import InputError
from extractor.config import DataOptions, PrepareOptions
from extractor.data.dataset import open_source
from extractor.data.prepare import prepare_rows

KINDS = {
    *("rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.jsonl.zst", "rows.json.bz2", "rows.csv", "rows.parquet"),
    *("plain.parquet", "rows.arrow", "saved/"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz-data") / "data"
    fuzz_data.make(folder)
    return folder


def test_mutated_files(files, tiny_target, tmp_path):
    results = list(fuzz_data.run(files, tiny_target, range(1_000_000, 1_000_100), tmp_path))
    assert [result for result in results if result[2].startswith("FINDING")] == []
    assert {kind for _, kind, _ in results} == KINDS
    assert {result for _, _, result in results} == {"read", "refused"}


@pytest.mark.soak
def test_five_thousand_mutated_files(files, tiny_target, tmp_path):
    first = random.randrange(1 << 30)
    results = fuzz_data.run(files, tiny_target, range(first, first + 5_000), tmp_path)
    assert [result for result in results if result[2].startswith("FINDING")] == []


@pytest.mark.parametrize("name", sorted(name for name in KINDS if name[-1] != "/"))
@pytest.mark.parametrize("how", ["cut", "noise"])
def test_the_command_names_a_file_that_is_cut_or_noise(cli, files, tiny_target, name, how, tmp_path):
    data = (files / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: len(data) // 2] if how == "cut" else random.Random(0).randbytes(2000))
    job = ["--target", tiny_target, "--device", "cpu", "--num-draft-layers", "2", "--out", tmp_path / "cache"]
    code, _, errors = cli("extract", *job, "--data", path)
    assert code == 2, errors
    assert name in errors
    assert "Traceback" not in errors


def prepared(path: Path, target: Path, on_bad_row: str):
    options, source = PrepareOptions(on_bad_row=on_bad_row, loss_on="all"), open_source(DataOptions(name=str(path)))
    return prepare_rows(source.read(0, 9), AutoTokenizer.from_pretrained(target), options)


def test_text_in_a_table_that_is_not_utf8_is_a_bad_row(tiny_target, tmp_path):
    path = tmp_path / "rows.parquet"
    text = pa.array([b"Hi there", b"caf\xe9", b"Yo"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), path)
    samples, dropped = prepared(path, tiny_target, "skip")
    assert [sample.source_row for sample in samples] == [0, 2]
    assert dropped == {"bad_row": 1}
    with pytest.raises(InputError, match=r"rows.parquet row 2: is damaged: .*Invalid UTF8"):
        prepared(path, tiny_target, "fail")


def test_a_saved_dataset_whose_offsets_lead_out_of_the_file_is_not_followed(tiny_target, tmp_path):
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["Hi there", "Yo", "Who?"]}).save_to_disk(str(saved))
    [file] = saved.glob("*.arrow")
    data, offsets = file.read_bytes(), struct.pack("<4i", 0, 8, 10, 14)
    assert data.count(offsets) == 1
    file.write_bytes(data.replace(offsets, struct.pack("<4i", 0, 8, 10, 1 << 30)))
    samples, dropped = prepared(saved, tiny_target, "skip")
    assert [sample.source_row for sample in samples] == [0, 1]
    assert dropped == {"bad_row": 1}
