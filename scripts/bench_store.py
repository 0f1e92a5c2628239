"""obstore (a store client in Rust) against fsspec and s3fs under the store seam: ranges read, a file put, in turns.

    pip install obstore 'moto[server]'
    python scripts/bench_store.py --nginx /usr/sbin/nginx [--rounds 3]

Ranges of a file of 512 MiB come from nginx on loopback, which no client is faster than; a file goes to moto's S3 server
in parts of 16 MiB. Told are the client's processor seconds a GB (the servers are processes of their own), medians: on a
shared machine they mean more than its wall time. What was put is not checked afterwards, by neither.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cache_format.storage.store import PART_BYTES, Store

FILE_BYTES = 512 << 20
NGINX = """daemon off; worker_processes 1; user root; pid {root}/pid; error_log {root}/errors;
events {{ worker_connections 256; }}
http {{ access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000;
  client_body_temp_path {root}/1; proxy_temp_path {root}/2; fastcgi_temp_path {root}/3; uwsgi_temp_path {root}/4;
  scgi_temp_path {root}/5; server {{ listen 127.0.0.1:{port}; root {root}; }} }}
"""
KEYS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def servers(root: Path, nginx: str) -> Iterator[tuple[str, str]]:
    """URLs of nginx, which has bench/c/file, and of moto."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (root / "nginx.conf").write_text(NGINX.format(root=root, port=port))
    (root / "bench" / "c").mkdir(parents=True)
    (root / "bench" / "c" / "file").write_bytes(np.random.default_rng(0).bytes(FILE_BYTES))
    with open(root / "log", "wb") as log:
        moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        commands = ([nginx, "-p", str(root), "-c", str(root / "nginx.conf")], moto)
        running = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
    try:
        while not (found := re.search(rb"http://127\.0\.0\.1:\d+", (root / "log").read_bytes())):
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", found[0].decode()
    finally:
        for process in running:
            process.terminate()
            process.wait()


class Ours:
    """The seam's own calls."""

    def __init__(self, url: str):
        os.environ["AWS_ENDPOINT_URL_S3"] = url
        self.store = Store("s3://bench/c")
        self.filesystem: Any = self.store._filesystem

    def read_into(self, at: int, out: np.ndarray) -> None:
        self.store.read_into("file", at, out)

    def put(self, path: Path) -> None:
        self.filesystem.put_file(str(path), "bench/c/ours", chunksize=PART_BYTES, max_concurrency=4)


class Obstore:
    """The same through obstore."""

    def __init__(self, url: str):
        import obstore
        from obstore.store import S3Store

        self.obstore: Any = obstore
        self.store = S3Store(
            "bench", endpoint=url, client_options={"allow_http": True}, virtual_hosted_style_request=False
        )

    def read_into(self, at: int, out: np.ndarray) -> None:
        out[:] = np.frombuffer(self.obstore.get_range(self.store, "c/file", start=at, end=at + len(out)), np.uint8)

    def put(self, path: Path) -> None:
        self.obstore.put(self.store, "c/theirs", path, chunk_size=PART_BYTES, max_concurrency=4)


def ranges(client: Any, size: int, threads: int) -> int:
    """Read ranges of ``size`` bytes from anywhere; how many bytes."""
    count = min(FILE_BYTES, 1024 * size) // size
    starts = np.random.default_rng(1).integers(0, FILE_BYTES - size, count).tolist()
    kept = threading.local()

    def one(start: int) -> None:
        if not hasattr(kept, "memory"):
            kept.memory = np.empty(size, np.uint8)
        client.read_into(start, kept.memory)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, starts))
    return count * size


def compare(name: str, rounds: int, run: Callable[[str], int]) -> None:
    """Run both in turns, once more than told; a line."""
    seconds: dict[str, list[float]] = {"ours": [], "obstore": []}
    for number in range(rounds + 1):
        for which in sorted(seconds, reverse=bool(number % 2)):
            before = os.times()
            num_bytes, after = run(which), os.times()
            seconds[which].append((after.user + after.system - before.user - before.system) / num_bytes * 1e9)
    ours, theirs = (statistics.median(of[1:]) for of in seconds.values())
    print(f"{name}: {ours:.2f} and {theirs:.2f} processor s/GB, {ours / theirs:.1f} times", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nginx", default="nginx", help="its program")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="for 1 GB of files")
    args = parser.parse_args()
    os.environ.update(KEYS)
    root = Path(tempfile.mkdtemp(dir=args.folder))
    root.chmod(0o755)
    try:
        with servers(root, args.nginx) as (nginx, moto):
            readers = {"ours": Ours(nginx), "obstore": Obstore(nginx)}
            readers["ours"].read_into(0, np.empty(1, np.uint8))
            for size in (64 << 10, 1 << 20, 4 << 20, PART_BYTES):
                for threads in (1, 8):
                    what = f"ranges of {size >> 10:,} KiB, {threads} threads"
                    compare(what, args.rounds, lambda which, s=size, t=threads: ranges(readers[which], s, t))
            writers = {"ours": Ours(moto), "obstore": Obstore(moto)}
            writers["ours"].filesystem.mkdir("bench")
            (root / "put").write_bytes(np.random.default_rng(0).bytes(48 << 20))
            compare("a put of 48 MiB", args.rounds, lambda which: writers[which].put(root / "put") or 48 << 20)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
