"""The manifest: strict, self-checking, and its fingerprint is that of everything that can change a byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import write_cache

from cache_format.errors import CacheError, MismatchError
from cache_format.layout.manifest import Manifest, fingerprint, require_same_identity


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "c", [4, 5, 6])
    return tmp_path / "c"


def test_it_reads_back_as_written(cache):
    manifest = Manifest.read(cache)
    manifest.write(cache)
    assert Manifest.read(cache) == manifest
    assert (cache / "manifest.json").read_bytes() == manifest.to_bytes()


def test_an_edited_manifest_is_refused(cache):
    path = cache / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 3', '"samples": 2'))
    with pytest.raises(CacheError, match="checksum"):
        Manifest.read(cache)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(format_version=2), "version 2"),
        (lambda m: m.update(format="other"), "format"),
        (lambda m: m.update(state="finished"), "finished"),
        (lambda m: m.update(codec={"name": "zip"}), "zip"),
        (lambda m: m.update(dtype="int8"), "int8"),
        (lambda m: m.update(target_layer_ids=[99]), "99"),
        (lambda m: m.update(target_layer_ids="0"), "target_layer_ids"),
        (lambda m: m["identity"].update(extra=1), "fingerprint"),
        (lambda m: m.update(unknown=1), "fields"),
        (lambda m: m["totals"].update(samples=-1), "totals"),
        (lambda m: m["totals"].update(samples="3"), "samples"),
    ],
)
def test_every_rule_is_checked_even_if_the_checksum_is_right(cache, change, named):
    from cache_format.layout.manifest import _checksum

    content = json.loads((cache / "manifest.json").read_text())
    del content["checksum"]
    change(content)
    content["checksum"] = _checksum(content)
    (cache / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CacheError, match=named):
        Manifest.read(cache)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"])
def test_garbage_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(CacheError, match=r"manifest\.json"):
        Manifest.read(tmp_path)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), min_size=1), st.data())
def test_any_changed_field_changes_the_fingerprint_and_is_named(identity, data):
    field = data.draw(st.sampled_from(sorted(identity)))
    other = {**identity, field: ["changed"]}
    assert fingerprint(identity) == fingerprint(dict(reversed(identity.items())))
    assert fingerprint(identity) != fingerprint(other)
    with pytest.raises(MismatchError) as error:
        require_same_identity("cache", identity, other)
    assert error.value.fields == {field: (identity[field], ["changed"])}
