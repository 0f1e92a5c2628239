"""An HTTP proxy in front of a store that does what networks and stores do: errors, silence, slowness, cut connections.

``faults`` looks at each request and names one of the faults below, or none; ``requests`` are those that came.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR, SILENCE, SLOW, CUT_UPLOAD, CUT_ANSWER = "error", "silence", "slow", "cut upload", "cut answer"

_ERROR_BODY = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We made a mistake</Message></Error>"


class FaultyProxy:
    """Listens on loopback; ``url`` is what a client is given as the store's endpoint."""

    def __init__(self, port: int):
        self.faults: Callable[[str, str], str | None] = lambda method, path: None
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.met: list[str] = []
        proxy = self

        class Handler(_Handler):
            upstream, owner = port, proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def once(self, fault: str, method: str, part: str, times: int = 1) -> None:
        """Do ``fault`` to the next ``times`` requests of that method whose path has ``part`` in it."""
        left, lock = times, threading.Lock()

        def chosen(found: str, path: str) -> str | None:
            nonlocal left
            with lock:
                if found != method or part not in path or not left:
                    return None
                left -= 1
            return fault

        self.faults = chosen

    def reset(self) -> None:
        """No more faults, nothing seen."""
        self.faults, self.requests, self.met = (lambda method, path: None), [], []

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients are killed in the midst of a request: no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: int
    owner: FaultyProxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _relay(self) -> None:
        self.owner.requests.append((self.command, self.path, dict(self.headers)))
        fault = self.owner.faults(self.command, self.path)
        if fault:
            self.owner.met.append(fault)
        length = int(self.headers.get("Content-Length", 0))
        if fault == CUT_UPLOAD:
            self.rfile.read(length // 2)
            self._cut()
            return
        body = self.rfile.read(length)
        if fault == SILENCE:
            time.sleep(4)
            self._cut()
            return
        if fault == ERROR:
            self._answer(500, {"Content-Type": "application/xml"}, _ERROR_BODY)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")}
        self._answer(answer.status, headers, data, fault)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD" and not any(name.lower() == "content-length" for name in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == CUT_ANSWER:
            self.wfile.write(data[: len(data) // 2])
            self._cut()
            return
        if fault == SLOW:
            step = max(1, len(data) // 20)
            for at in range(0, len(data), step):
                self.wfile.write(data[at : at + step])
                time.sleep(0.05)
            return
        self.wfile.write(data)

    def _cut(self) -> None:
        # A reset, as of a machine that has gone, not an orderly end.
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _relay
