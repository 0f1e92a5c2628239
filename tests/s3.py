"""A real S3 server on loopback (moto's) with a faulty proxy in front of it, and an empty bucket for each test."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from faulty_proxy import FaultyProxy
from jobs import without_command

SECRET = "a-secret-that-nobody-may-see-0123456789"
_numbers = count()


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory) -> Iterator[int]:
    """Port of the server, a process of its own."""
    log = tmp_path_factory.mktemp("s3") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with open(log, "wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(rb"http://127\.0\.0\.1:(\d+)", log.read_bytes())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        yield int(found[1])
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def _proxy(s3_port) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_port)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(_proxy, monkeypatch) -> FaultyProxy:
    """What stands between the client and the server; clients are led to it by the environment."""
    _proxy.reset()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", _proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return _proxy


@pytest.fixture
def s3(s3_port, proxy):
    """A plain client of the server, past the proxy: what is really there."""
    url = f"http://127.0.0.1:{s3_port}"
    return boto3.client("s3", endpoint_url=url, config=Config(max_pool_connections=4))


@pytest.fixture
def bucket(s3) -> str:
    """URL of an empty folder in a bucket of this test."""
    name = f"bucket-{next(_numbers)}"
    s3.create_bucket(Bucket=name)
    return f"s3://{name}/caches/one"


def objects(s3, url: str) -> dict[str, bytes]:
    """Every object below ``url`` by its name there, as :func:`jobs.contents`."""
    name, _, prefix = url.removeprefix("s3://").partition("/")
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=f"{prefix}/")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    found = {key.removeprefix(f"{prefix}/"): s3.get_object(Bucket=name, Key=key)["Body"].read() for key in sorted(keys)}
    return {name: without_command(name, data) for name, data in found.items()}


def put(s3, url: str, name: str, data: bytes) -> None:
    """Write an object behind everybody's back."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    s3.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=data)


def upload_folder(s3, url: str, folder: Path) -> None:
    """Copy a cache there, file by file."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            put(s3, url, path.relative_to(folder).as_posix(), path.read_bytes())
