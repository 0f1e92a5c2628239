"""report: the command on real caches, whole, unfinished, damaged and far away, and its page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import synthetic_cache
import torch
from jobs import contents
from PIL import Image
from s3 import upload_folder

from cache_format import FeatureCache
from cache_format.layout.index import INDEX_NAME, Index, write_index
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import shard_name
from cache_format.storage.store import Store
from extractor.report.chosen_samples import choose_tokens
from extractor.report.make_report import make_report, to_dict
from extractor.report.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "</pre></details></main><img src=x onerror='window.hacked = 3'>",
    "<svg onload=window.hacked=4><style>body{display:none}</style>",
    "{{ 7 * 7 }} {% raw %} &amp; \" ' > \x1b[31m \u202e right to left",
    "needle in a haystack",
]


@pytest.fixture(scope="module")
def hostile(once, tiny_target: Path) -> Path:
    """A cache of rows that want to run as script, some dropped, from two sources."""

    def make(out: Path) -> None:
        data = out.with_name("hostile-data")
        data.mkdir(exist_ok=True)
        rows = [f"{text} row {number}" for number in range(5) for text in HOSTILE]
        for name, answer in (("<img src=x onerror=hacked=5>.jsonl", "Yes, {} it is."), ("second.jsonl", "{} " * 40)):
            with open(data / name, "w") as file:
                for text in rows:
                    chat = [("user", f"Say {text}"), ("assistant", answer.replace("{}", text))]
                    messages = [{"role": role, "content": content} for role, content in chat]
                    file.write(json.dumps({"messages": messages}) + "\n")
                file.write("not json\n")
        sources = [argument for path in sorted(data.iterdir()) for argument in ("--data", path)]
        commands.made(
            *("extract", "--target", tiny_target, *sources, "--device", "cpu", "--target-layers", "0,2,4"),
            *("--max-length", "600", "--too-long", "drop", "--on-bad-row", "skip", "--shard-size", "256KiB"),
            *("--out", out),
        )

    return once("hostile", make)


def report_of(cli: Any, *arguments: object) -> dict[str, Any]:
    code, out, err = cli("report", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


# -- the command ------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_cache(cli, made):
    report, cache = report_of(cli, made), FeatureCache.open(made)
    assert report["samples"]["samples"] == len(cache) == report["states"]["samples"]
    assert report["samples"]["tokens"] == int(cache.index.num_tokens.sum())
    assert report["samples"]["learned"] == int(cache.index.num_loss_tokens.sum())
    assert sum(report["samples"]["sources"][0]["lengths"]) == len(cache)
    assert report["looked_at_shards"] == sorted(set(cache.index.shard.tolist()))
    norms, firsts = [], []
    for sample in cache:
        places = torch.from_numpy(choose_tokens(sample.input_ids.shape[1]))
        states = sample.hidden_states[0, places].double().unflatten(1, (len(cache.target_layer_ids), -1))
        norms.append(states[1:].norm(dim=2))
        firsts.append(states[0].norm(dim=1))
    all_norms, all_firsts = torch.cat(norms).numpy(), torch.stack(firsts).numpy()
    for at, layer in enumerate(report["states"]["layers"]):
        assert layer["layer"] == cache.target_layer_ids[at]
        expected = np.quantile(all_norms[:, at], [0.05, 0.25, 0.5, 0.75, 0.95])
        assert layer["norms"] == pytest.approx(expected.tolist(), rel=1e-4)
        assert layer["first_norm"] == pytest.approx(float(np.median(all_firsts[:, at])), rel=1e-4)
    raw, fp8, zbits, quant, fine = report["codecs"]
    assert raw["total_bytes"] == raw["token_bytes"] * report["samples"]["tokens"]
    assert raw["is_used"]
    assert fp8["token_bytes"] == (64 + 4) * 3
    assert zbits["token_bytes"] < raw["token_bytes"]
    assert (quant["codec"], fine["codec"]) == ("quant", "quant:fine")
    assert quant["token_bytes"] < fine["token_bytes"] < raw["token_bytes"]
    assert 0 <= report["job"]["padding"] < 0.1
    assert report["job"]["bytes"] == sum(path.stat().st_size for path in (made / "shards").iterdir())
    assert report["verified"]["whole"]


def test_the_summary_says_the_same_and_nothing_a_terminal_obeys(cli, hostile):
    code, out, _ = cli("report", hostile)
    assert code == 0
    assert not [c for c in out if not c.isprintable() and c != "\n"]
    report = report_of(cli, hostile)
    assert f"{report['samples']['samples']:,} samples, {report['samples']['tokens']:,} tokens" in out
    assert "bad_row: is not JSON" in out
    assert re.search(r"^look:  .*rows gave no sample|^  \d+ too_long, such as .*row \d+$", out, re.MULTILINE)
    for layer in report["target_layer_ids"]:
        assert re.search(rf"^ +{layer} +[\d.]", out, re.MULTILINE)


def test_sources_are_told_apart(cli, hostile):
    report = report_of(cli, hostile)
    first, second = report["samples"]["sources"]
    assert "img src=x" in first["name"]
    assert second["name"].endswith("second.jsonl")
    assert first["samples"] + second["samples"] == report["samples"]["samples"]
    share = {one["name"]: one["learned"] / one["tokens"] for one in (first, second)}
    assert share[second["name"]] > 0.8 > share[first["name"]]
    reasons = {one["reason"]: one for one in report["dropped"]}
    assert reasons["bad_row: is not JSON"]["rows"] == 2
    assert reasons["too_long"]["rows"] == sum(one["rows"] for one in report["dropped"]) - 2 > 0


def test_some_samples_of_many(cli, made):
    report = report_of(cli, made, "--samples", "20")
    assert report["states"]["samples"] == 20
    assert 5 < len(report["browsed"]) <= 20
    assert report["samples"]["samples"] == len(FeatureCache.open(made))
    assert report_of(cli, made, "--samples", "20") == report


def test_text_to_browse_has_bounds(cli, made, monkeypatch):
    """The page stays below 2 MB whatever the text."""
    all_of_them = report_of(cli, made)["browsed"]
    monkeypatch.setattr("extractor.report.browsed_rows.MOST_CHARACTERS", 5000)
    some = report_of(cli, made)["browsed"]
    assert 0 < len(some) < 20 < len(all_of_them)
    assert some == all_of_them[: len(some)]


def test_an_unfinished_cache_says_so(cli, tmp_path):
    synthetic_cache.write_cache(
        tmp_path / "c",
        [8 + n % 40 for n in range(60)],
        dtype="float32",
        hidden=64,
        target_layer_ids=[1, 3],
        shard_bytes=256 << 10,
        states=lambda i, n: torch.randn(n, 128, generator=torch.Generator().manual_seed(i)),
        only_shards=[0, 2],
    )
    report = report_of(cli, tmp_path / "c")
    assert report["looked_at_shards"] == [0, 2]
    wrong = [one["text"] for one in report["findings"] if one["level"] == "wrong"]
    assert wrong == [f"unfinished: 2 of {report['job']['planned_shards']} shards; all figures are of what is there"]
    code, out, _ = cli("report", tmp_path / "c", "--html", tmp_path / "r.html")
    assert code == 0
    assert "wrong: unfinished: 2 of " in out
    assert "<b>Unfinished:</b> 2 of " in (tmp_path / "r.html").read_text()
    for shard in (0, 2):
        (tmp_path / "c" / shard_name(shard)).unlink()
    assert report_of(cli, tmp_path / "c")["states"] is None
    code, out, _ = cli("report", tmp_path / "c", "--html", tmp_path / "r.html")
    assert (code, "no shard is finished" in out) == (0, True)


def test_damage_is_said_and_passed_over(cli, made, tmp_path):
    shutil.copytree(made, tmp_path / "c")
    shard = tmp_path / "c" / shard_name(3)
    shard.write_bytes(shard.read_bytes()[:-100])
    (tmp_path / "c" / "target" / "tokenizer.json").write_text("{}")
    (tmp_path / "c" / "samples" / "samples-00000.arrow").write_bytes(b"x")
    report = report_of(cli, tmp_path / "c", "--html", tmp_path / "r.html")
    wrong = [one["text"] for one in report["findings"] if one["level"] == "wrong"]
    assert any(shard_name(3) in text and "cannot be read" in text for text in wrong)
    assert any("verify found" in text for text in wrong)
    assert 3 not in report["looked_at_shards"]
    assert "tokenizer.json" in report["no_text"]
    assert "Token ids stand for text" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("column", "value"),
    [("num_tokens", 0), ("num_tokens", -5), ("num_loss_tokens", 9999), ("shard", -1), ("shard", 2**31 - 1)],
)
def test_an_index_that_cannot_be_is_refused(column, value, cli, made, tmp_path):
    shutil.copytree(made, tmp_path / "c")
    index, fingerprint = FeatureCache.open(made).index, FeatureCache.open(made).fingerprint
    columns = {field: getattr(index, field).copy() for field in index.__dataclass_fields__}
    columns[column][7] = value
    write_index(tmp_path / "c" / INDEX_NAME, Index(**columns), fingerprint)
    code, out, err = cli("report", tmp_path / "c")
    assert (code, out) == (2, "")
    assert f"{INDEX_NAME}: row 7 cannot be" in err


def test_a_manifest_that_claims_too_much_takes_no_memory(cli, made, tmp_path):
    shutil.copytree(made, tmp_path / "c")
    manifest = Manifest.read(made)
    totals = replace(manifest.totals, shards=2**60, samples=2**60, parts=2**60)
    replace(manifest, state="extracting", totals=totals, measured=None).write(tmp_path / "c")
    assert "unfinished" in cli("report", tmp_path / "c")[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("lengths", "value", "quarantined", "wrong"),
    [
        ([1, 1, 1], 1.0, (), []),
        ([9] * 5, 0.0, (), ["are all zero", "is constant"]),
        ([9] * 5, torch.nan, (), ["45 of 45 tokens have NaN or Inf"]),
        ([5, 6], 1.0, (0, 1), []),
    ],
)
def test_odd_states_make_a_page_too(lengths, value, quarantined, wrong, tmp_path):
    synthetic_cache.write_cache(
        tmp_path / "c",
        lengths,
        dtype="float32",
        hidden=8,
        target_layer_ids=[1],
        shard_bytes=64 << 10,
        states=lambda i, n: torch.full((n, 8), value),
        quarantined=quarantined,
    )
    report = make_report(tmp_path / "c", 2000)
    found = [one.text for one in report.findings if one.level == "wrong"]
    assert [words for words in wrong if any(words in text for text in found)] == wrong
    assert len(found) == len(wrong)
    assert "</html>" in page(report)
    json.dumps(to_dict(report), allow_nan=False)


@pytest.mark.parametrize("codec", ["fp8", "quant"])
def test_of_a_lossy_cache_only_what_was_measured_is_told(codec, cli):
    cache = Path(__file__).parent / "golden" / f"{codec}-bfloat16"
    measured = FeatureCache.open(cache).manifest.measured
    report = report_of(cli, cache)
    [used] = report["codecs"]
    assert (used["codec"], used["is_used"]) == (codec, True)
    assert used["snr_db"] == (measured.median_snr_db or measured.snr_db) != []
    assert used["worst_db"] == measured.worst_snr_db
    assert report["codecs_tried_on"] == 0
    assert used["token_bytes"] == measured.ratio * 3 * 16 * 2


@pytest.mark.parametrize("problem", ["absent", "preparing", "manifest"])
def test_what_is_no_cache_is_refused(problem, cli, made, tmp_path):
    cache = tmp_path / "c"
    if problem != "absent":
        shutil.copytree(made, cache)
    if problem == "manifest":
        (cache / "manifest.json").write_text("{}")
    if problem == "preparing":
        (cache / "manifest.json").unlink()
    code, out, err = cli("report", cache, "--html", tmp_path / "r.html")
    assert (code, out) == (2, "")
    assert str(cache) in err
    assert not (tmp_path / "r.html").exists()


def test_a_place_for_the_page_that_cannot_be_is_refused_at_once(cli, made, tmp_path, monkeypatch):
    for place in (tmp_path, tmp_path / "none" / "r.html", made / "r.html", made / "shards" / ".." / "r.html"):
        code, _, err = cli("report", made, "--html", place)
        assert (code, "--html" in err) == (2, True), err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = cli("report", made, "--html", tmp_path / "r.html")
    assert (code, "pip install 'dflash-cache[report]'" in err) == (2, True)
    assert cli("report", made, "--samples", "5")[0] == 0


def test_what_extract_and_verify_said(cli, made, hostile, tmp_path):
    cache = FeatureCache.open(made)
    run = {"shards": 3, "samples": 1, "tokens": 9000, "padded_tokens": 10000, "bytes": 1, "seconds": 100.0}
    run |= {"seconds_waiting_for_disk": 25.0, "seconds_writing": 50.0, "seconds_to_first_batch": 7.0}
    (tmp_path / "run.json").write_text(json.dumps({"fingerprint": cache.fingerprint, "run": run}))
    (tmp_path / "verify.json").write_text(cli("verify", made, "--json")[1])
    given = ["--with", tmp_path / "run.json", "--with", tmp_path / "verify.json"]
    code, out, _ = cli("report", made, *given)
    assert code == 0
    assert "the target waited 25s for the disk (25 %)" in out
    assert "10.0 % padding" in out
    assert f"whole: full check of {len(set(cache.index.shard.tolist()))} shards" in out
    (tmp_path / "part.json").write_text(cli("verify", made, "--shards", "0-1", "--json")[1])
    code, out, _ = cli("report", made, "--with", tmp_path / "part.json")
    assert f"look:  verified in part: 2 of {len(set(cache.index.shard.tolist()))} shards" in out
    code, _, err = cli("report", hostile, *given)
    assert (code, "is of another cache" in err) == (2, True)
    for content in ("[]", "x", '{"run": 1}', json.dumps({"fingerprint": cache.fingerprint, "run": {"tokens": "x"}})):
        (tmp_path / "run.json").write_text(content)
        code, _, err = cli("report", made, "--with", tmp_path / "run.json")
        assert (code, "is not what `extract --json` or `verify --json` prints" in err) == (2, True), err
    assert cli("report", made, "--with", tmp_path / "none.json")[0] == 2


def test_a_cache_at_a_url(cli, bucket, s3, made):
    upload_folder(s3, bucket, made)
    there, here = report_of(cli, bucket, "--samples", "30"), report_of(cli, made, "--samples", "30")
    for name in ("states", "samples", "codecs", "browsed", "dropped", "identity", "looked_at_shards"):
        assert there[name] == here[name], name
    assert there["verified"]["whole"]
    assert there["job"]["planned_shards"] == here["job"]["planned_shards"]
    times = Store(bucket).times()
    assert set(times) == set(contents(made))
    assert all(abs(time.time() - when) < 600 for when in times.values())
    assert there["job"]["throughput"] or "of one moment" in there["job"]["why_no_throughput"]


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile_page(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    commands.made("report", hostile, "--html", path)
    return path


def test_the_page_holds_everything(hostile_page):
    text = hostile_page.read_text()
    assert len(text.encode()) < 2_000_000
    assert all(link.startswith(("#", "data:")) for link in re.findall(r' (?:xlink:)?(?:href|src)="([^"]*)"', text))
    assert not re.findall(r"url\((?!#)", text)
    assert text.count("<script") == 1
    assert "<img" not in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def opened(browser: Any, hostile_page: Path) -> Iterator[Any]:
    """The page, with all that the browser complained of or asked the network for."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: page.complaints.append(dialog.message))
    page.on(
        "request", lambda request: page.complaints.append(request.url) if "report.html" not in request.url else None
    )
    page.goto(hostile_page.as_uri())
    yield page
    page.close()


def test_it_opens_without_complaints_and_runs_nothing_of_the_rows(opened):
    assert opened.complaints == []
    assert opened.evaluate("window.hacked") is None
    assert opened.evaluate("document.querySelectorAll('img').length") == 0
    assert opened.evaluate("document.querySelectorAll('figure svg').length") >= 10
    for text in HOSTILE[:4]:
        shown = opened.evaluate("[...document.querySelectorAll('pre')].map(pre => pre.textContent).join('')")
        assert text in shown
    assert r"\x1b[31m \u202e" in shown
    # Markup that gets into the page in spite of all would not run either.
    opened.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hacked=9>')")
    opened.evaluate(
        "{ const s = document.createElement('script'); s.text = 'window.hacked = 9'; document.body.append(s) }"
    )
    opened.wait_for_timeout(100)
    assert opened.evaluate("window.hacked") is None
    opened.complaints.clear()


@pytest.mark.parametrize(
    "query", ["needle in a", "NEEDLE", "<script>window.hacked = 1", "row 3", "second.jsonl row 12"]
)
def test_the_search_finds_rows(query, opened, hostile):
    opened.fill("#search", query)
    visible = opened.locator("details.row:visible")
    assert 0 < visible.count() < opened.locator("details.row").count()
    for row in visible.all():
        found = row.evaluate("row => row.textContent").lower()
        assert query.lower() in found
        if re.search(r"row \d+$", query):
            assert row.get_attribute("data-source").endswith(query)
    assert (
        opened.locator("#found").inner_text() == f"{visible.count()} of {opened.locator('details.row').count()} samples"
    )
    assert visible.first.get_attribute("open") is not None


def test_the_search_finds_a_sample_by_its_id(opened, hostile):
    opened.fill("#search", "#7")
    visible = opened.locator("details.row:visible")
    assert [row.get_attribute("data-sample") for row in visible.all()] == ["7"]
    cache = FeatureCache.open(hostile)
    i = int(np.searchsorted(cache.index.sample_id, 7))
    learned = visible.locator(".learned").all_inner_texts()
    mask = cache[i].loss_mask[0].numpy()
    assert len(learned) == int((np.diff(mask, prepend=0) == 1).sum())
    opened.fill("#search", "7")
    ids = {(row.get_attribute("data-sample"), row.get_attribute("data-row")) for row in visible.all()}
    assert all("7" in pair for pair in ids)
    assert len(ids) > 1
    opened.fill("#search", "nothing has this")
    assert visible.count() == 0
    opened.fill("#search", "")
    assert visible.count() == opened.locator("details.row").count()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_runs_over_the_edge(width, opened, tmp_path):
    opened.set_viewport_size({"width": width, "height": 900})
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    over = opened.evaluate(
        """[...document.querySelectorAll('figure svg')].filter(svg => {
            const box = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].some(text => {
                const one = text.getBoundingClientRect();
                return one.left < box.left - 1 || one.right > box.right + 1
                    || one.top < box.top - 1 || one.bottom > box.bottom + 1;
            });
        }).map(svg => svg.getAttribute('aria-label'))"""
    )
    assert over == []
    opened.screenshot(path=tmp_path / "shot.png", full_page=True)
    assert Image.open(tmp_path / "shot.png").size[0] == width
    assert opened.complaints == []
