"""A proxy on loopback that misbehaves as object stores and networks do, and passes everything else on."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["429", "500", "503", "403", "expired", "cut", "cut after", "cut body", "hang", "hang after"]
#: Faults that go away by themselves. `after`: the server did what it was asked, and its answer is lost.
PASSING: tuple[Fault, ...] = ("429", "500", "503", "cut", "cut after", "cut body", "hang", "hang after")

_XML = '<?xml version="1.0" encoding="utf-8"?><Error><Code>{}</Code><Message>{}</Message></Error>'
_ANSWERS = {
    "429": (429, "TooManyRequests"),
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "403": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
}
#: Longer than the patience of the tests.
_HANG_SECONDS = 30.0


class Proxy:
    """Passes requests on to one server; `choose` says which of them meet a fault."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self.choose: Callable[[str, str], Fault | None] = lambda method, path: None
        self.faults = 0
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing."""

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def _answer(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer  # noqa: N815

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop, and let go of everybody who hangs."""
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, fault: Fault, times: int | None = 1, method: str = "", path: str = "") -> None:
        """Let requests with a method, and a text in their path, meet a fault that many times; always if None."""
        left = times

        def choose(asked: str, where: str) -> Fault | None:
            nonlocal left
            if method not in ("", asked) or path not in where or left == 0:
                return None
            left = None if left is None else left - 1
            return fault

        self.choose = choose

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        with self._lock:
            fault = self.choose(request.command, request.path)
            self.faults += fault is not None
        if fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            self._reply(request, status, [], _XML.format(code, "no luck").encode())
            return
        if fault in ("cut", "hang"):
            self._leave(request, fault)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        try:
            upstream.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for key, value in request.headers.items():
                if key.lower() != "connection":
                    upstream.putheader(key, value)
            upstream.endheaders(body)
            reply = upstream.getresponse()
            content = reply.read()
            length = reply.getheader("Content-Length")
        finally:
            upstream.close()
        if fault is not None and fault != "cut body":
            self._leave(request, fault)
            return
        headers = [(k, v) for k, v in reply.getheaders() if k.lower() not in _HOP]
        if fault == "cut body":
            # Half of an answer whose headers promise all of it; of one without a body nothing.
            length = length or str(len(content))
            if content:
                self._reply(request, reply.status, headers, content[: len(content) // 2], length)
            self._leave(request, fault)
            return
        self._reply(request, reply.status, headers, content, length if request.command == "HEAD" else None)

    def _leave(self, request: BaseHTTPRequestHandler, fault: str) -> None:
        if fault.startswith("hang"):
            self.stopped.wait(_HANG_SECONDS)
        request.close_connection = True

    def _reply(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        length: str | None = None,
    ) -> None:
        request.send_response_only(status)
        for key, value in headers:
            request.send_header(key, value)
        request.send_header("Content-Length", length or str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


_HOP = ("connection", "content-length", "transfer-encoding", "keep-alive")


@contextmanager
def proxied(upstream: int) -> Iterator[Proxy]:
    """A proxy before a server's port."""
    proxy = Proxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


def every(nth: int, faults: tuple[Fault, ...]) -> Callable[[str, str], Fault | None]:
    """One fault after the other, at every nth request."""
    count = 0

    def choose(method: str, path: str) -> Fault | None:
        nonlocal count
        count += 1
        return faults[count // nth % len(faults)] if count % nth == 0 else None

    return choose
