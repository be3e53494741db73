"""A web server on loopback that misbehaves on request, and the few answers of GitHub's API that fsspec asks for.

Belongs here: serving bytes, and faults. Does not belong here: what is expected of whoever asks.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

#: Longer than anybody waits.
FOREVER_SECONDS = 60.0


@dataclass
class Web:
    """What a server has and does.

    Attributes:
        files: Contents by decoded path, without the leading `/`.
        pages: Pages by path, for folders; a folder that has none is listed as most servers do.
        fault: Asked for each request of a method and a path; a name of a fault, or None.
        asked: What was asked for: method, path with query, headers.
        user: If not None, who must be given: `name:password`.
        repository: Files of a repository, by branch and path.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)
    fault: Callable[[str, str], str | None] = lambda method, path: None
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    user: str | None = None
    repository: dict[str, dict[str, bytes]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    port: int = 0

    def url(self, path: str = "", user: str = "") -> str:
        """The URL of a path."""
        return f"http://{user}{'@' if user else ''}127.0.0.1:{self.port}/{path}"

    def fail(self, fault: str, times: int | None, method: str = "GET") -> None:
        """Meet the next requests of a method with a fault."""
        left = times

        def choose(asked: str, path: str) -> str | None:
            nonlocal left
            if asked != method or left == 0:
                return None
            left = None if left is None else left - 1
            return fault

        self.fault = choose


@contextmanager
def serving() -> Iterator[Web]:
    """A server while the block lasts."""
    web = Web()
    stopping = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, format: str, *arguments: Any) -> None:
            return

        def _answer(self) -> None:
            web.asked.append((self.command, self.path, dict(self.headers)))
            fault = web.fault(self.command, self.path)
            parts = urlsplit(self.path)
            path = unquote(parts.path).lstrip("/")
            if web.user is not None:
                wanted = "Basic " + base64.b64encode(web.user.encode()).decode()
                if self.headers.get("Authorization") != wanted:
                    return self._send(401, b"who are you?")
            if fault is not None:
                return self._misbehave(fault, path)
            if path.startswith("repos/"):
                return self._github(path.removeprefix("repos/"), parts.query)
            if path in web.files:
                return self._content(web.files[path], path)
            if path in web.pages:
                return self._send(200, web.pages[path].encode(), kind="text/html")
            inside = [name[len(path) :] for name in web.files if name.startswith(path)]
            if (not path or path.endswith("/")) and inside:
                names = sorted({name.partition("/")[0] + "/" * ("/" in name) for name in inside})
                links = "".join(f'<li><a href="{quote(name)}">{html.escape(name)}</a></li>' for name in names)
                return self._send(
                    200, f'<a href="?C=N;O=D">Name</a><a href="../">Up</a>{links}'.encode(), kind="text/html"
                )
            return self._send(404, b"not here")

        def _content(self, data: bytes, path: str) -> None:
            tag = {"ETag": f'"{web.versions.get(path, 0)}-{len(data)}"'}
            wanted = self.headers.get("Range", "")
            if wanted.startswith("bytes="):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                part = data[int(first) : int(last) + 1]
                place = {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}
                return self._send(206, part, {**tag, **place})
            return self._send(200, data, tag)

        def _send(
            self, status: int, data: bytes, headers: dict[str, str] | None = None, kind: str = "application/x-data"
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                with suppress(OSError):
                    self.wfile.write(data)

        def _misbehave(self, fault: str, path: str) -> None:
            data = web.files.get(path, b"x" * 1000)
            if fault.isdigit():
                return self._send(int(fault), b"no", {"Retry-After": "0"} if fault == "429" else {})
            if fault == "loop":
                return self._send(302, b"", {"Location": self.path})
            if fault.startswith("to "):
                return self._send(302, b"", {"Location": fault[3:]})
            self.close_connection = True
            self.send_response(200)
            if fault == "endless":
                self.end_headers()
                with suppress(OSError):
                    while not stopping.is_set():
                        self.wfile.write(b"x" * 65536)
                return None
            if fault == "huge":
                self.send_header("Content-Length", str(1 << 50))
                return self.end_headers()
            self.send_header("Content-Length", str(len(data) + (10 if fault == "long" else 0)))
            self.end_headers()
            if fault == "hang":
                stopping.wait(FOREVER_SECONDS)
            elif fault == "long":
                self.wfile.write(data)
            elif fault == "cut":
                self.wfile.write(data[: len(data) // 2])
            elif fault == "drip":
                with suppress(OSError):
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.05)
            return None

        def _github(self, path: str, query: str) -> None:
            owner, repo, *rest = path.split("/")
            if (owner, repo) != ("fleet", "samples"):
                return self._send(404, b"{}")
            if rest[:2] == ["git", "trees"]:
                branch, _, folder = "/".join(rest[2:]).partition(":")
                return self._tree(branch, folder)
            branch = query.partition("ref=")[2]
            name = "/".join(rest[1:])
            content = web.repository[branch][name]
            here = content if len(content) < 100_000 else b""
            if content.startswith(b"LFS"):
                here = pointer(content)
            answer = {"content": base64.b64encode(here).decode(), "download_url": web.url(f"raw/{quote(name)}")}
            web.files[f"raw/{name}"] = content
            return self._send(200, json.dumps(answer).encode(), kind="application/json")

        def _tree(self, branch: str, folder: str) -> None:
            if branch not in web.repository:
                return self._send(404, b"{}")
            tree: dict[str, dict[str, Any]] = {}
            for name, content in web.repository[branch].items():
                if not name.startswith(folder):
                    continue
                first, slash, _ = name[len(folder) :].partition("/")
                stored = pointer(content) if content.startswith(b"LFS") else content
                blob = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
                # Its name for a folder tells what to list next.
                tree[first] = (
                    {"path": first, "mode": "040000", "type": "tree", "sha": f"{branch}:{folder}{first}/"}
                    if slash
                    else {"path": first, "mode": "100644", "type": "blob", "size": len(stored), "sha": blob}
                )
            return self._send(200, json.dumps({"sha": branch, "tree": list(tree.values())}).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield web
    finally:
        stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


def pointer(content: bytes) -> bytes:
    """What a repository keeps in place of a large file."""
    digest = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
