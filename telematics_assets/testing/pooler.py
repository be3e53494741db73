"""A transaction pooler in front of PostgreSQL, on Supabase's terms, for tests and demos.

Belongs here: the pooler's side of the PostgreSQL protocol: a server connection belongs to a client from the first
message of a transaction to its end, and to whoever comes next afterwards, with whatever was left in it.
Does not belong here: the server (`postgres.py`), our own client (`microbatch/`), Dagster.

As with Supabase's pooler a user is `role.project-ref`, session state leaks from one client to the next, and named
prepared statements meet another server connection. It can be told to refuse, to cut connections, and to hang.

https://www.postgresql.org/docs/current/protocol-flow.html
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType

_PROTOCOL_3 = 3 << 16
_CANCEL, _TLS, _GSS = 80877102, 80877103, 80877104
_ANSWERED = b"QSF"  # each of these brings one ReadyForQuery
_EXTENDED = b"PBDEC"  # these wait for a Sync
_CHUNK = 1 << 18
_MAX_STARTUP = 10_000
_AT_ONCE = struct.pack("ii", 1, 0)
_ROWS = b"dD"
#: Type, length and first byte of a message.
_BEGINNING = struct.Struct("!BIB")


class _RefusedError(Exception):
    """The client is told so and sent away."""

    def __init__(self, sqlstate: str, message: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.message = message


@dataclass
class _Server:
    """One connection to the database."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    key: bytes = b""
    parameters: list[bytes] = field(default_factory=list)
    watch: asyncio.Task[bytes] | None = None


class _Walk:
    """Follows the messages of one direction through chunks of any size, without keeping their bodies."""

    def __init__(self, untold: bytes = b"") -> None:
        """Begin between two messages.

        Args:
            untold: Types of messages that are passed over: there may be millions of them.
        """
        self._untold = untold
        self._head = b""
        self._skip = 0

    @property
    def between(self) -> bool:
        """Whether the last chunk ended with a whole message."""
        return not self._head and not self._skip

    def feed(self, chunk: bytes) -> list[tuple[int, int]]:
        """The messages that begin and whose first byte of content is in this chunk: type and that byte (or 0)."""
        found: list[tuple[int, int]] = []
        data = self._head + chunk if self._head else chunk
        at, end, untold, begin = self._skip, len(data), self._untold, _BEGINNING.unpack_from
        # This is where a table's rows go by: nothing may be made for each of them.
        for_sure = end - _BEGINNING.size
        while at <= for_sure:
            kind, length, first = begin(data, at)
            at += 1 + length
            if kind not in untold:
                found.append((kind, first if length > 4 else 0))
        if end - at == 5 and data[at + 1 :] == b"\0\0\0\4":
            found.append((data[at], 0))
            at = end
        self._head = data[at:] if at < end else b""
        self._skip = max(at - end, 0)
        return found


class TransactionPooler:
    """Listens on loopback and shares few server connections among many clients, transaction by transaction.

    Attributes:
        refusal: SQLSTATE and message with which every login is refused, or None.
        cut_after: Close a client's connection after this many bytes of answers, or None.
        cut_hard: Cut by a reset instead of a goodbye.
        silent_after: Pass no answers on any more after this many bytes, or None; connections stay open.
        hanging: Accept connections and say nothing.
        logins: Logins that were tried.
        server_connections: Connections to the database that are open now.
    """

    def __init__(
        self,
        server_port: Callable[[], int],
        *,
        project: str | None = "localproject",
        size: int = 15,
        max_clients: int = 200,
        checkout_seconds: float = 15.0,
        tls: ssl.SSLContext | None = None,
        require_tls: bool = False,
        port: int = 0,
    ) -> None:
        """Describe a pooler; `start` opens it.

        Args:
            server_port: Where the server listens on 127.0.0.1, asked at every new connection.
            project: Project reference that users must carry (`role.project`); None takes plain users.
            size: Server connections of one user and database.
            max_clients: Clients at the same time.
            checkout_seconds: How long a client waits for a server connection.
            tls: Certificate to offer, or None for connections in clear.
            require_tls: Refuse connections in clear.
            port: Port to listen on; a free one if 0.
        """
        self._server_port = server_port
        self._project = project
        self._size = size
        self._max_clients = max_clients
        self._checkout_seconds = checkout_seconds
        self._tls = tls
        self._require_tls = require_tls
        self.host = "127.0.0.1"
        self.port = port
        self.refusal: tuple[str, str] | None = None
        self.cut_after: int | None = None
        self.cut_hard = False
        self.silent_after: int | None = None
        self.hanging = False
        self.logins = 0
        self.server_connections = 0
        self._clients: dict[bytes, _Client] = {}
        self._idle: dict[tuple[str, str, str], list[_Server]] = {}
        self._open: dict[tuple[str, str, str], int] = {}
        self._freed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def user(self, role: str) -> str:
        """How a role is called at this pooler."""
        return role if self._project is None else f"{role}.{self._project}"

    def url(self, role: str, password: str, database: str = "postgres") -> str:
        """The URL of a database through this pooler."""
        return f"postgresql://{self.user(role)}:{password}@{self.host}:{self.port}/{database}"

    def start(self) -> TransactionPooler:
        """Listen, in a thread of its own."""
        ready = threading.Event()
        failure: list[BaseException] = []

        async def serve() -> None:
            try:
                server = await asyncio.start_server(self._accept, self.host, self.port)
            except OSError as error:
                failure.append(error)
                ready.set()
                return
            self.port = server.sockets[0].getsockname()[1]
            self._loop = asyncio.get_running_loop()
            self._stopping = asyncio.Event()
            ready.set()
            async with server:
                await self._stopping.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._drop_idle()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name="pooler", daemon=True)
        self._thread.start()
        ready.wait()
        if failure:
            raise failure[0]
        return self

    def stop(self) -> None:
        """Close all connections and stop listening."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
            self._loop = self._thread = None

    def restart(self) -> None:
        """Stop and listen again on the same port."""
        self.stop()
        self.start()

    def __enter__(self) -> TransactionPooler:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- clients ---------------------------------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client: _Client | None = None
        try:
            startup = await self._startup(reader, writer)
            if startup is None:
                return
            while self.hanging:
                await asyncio.sleep(0.05)
            client = await self._login(startup, reader, writer)
            await client.run()
        except _RefusedError as refused:
            writer.write(_error(refused.sqlstate, refused.message))
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            if client is not None:
                self._clients.pop(client.key, None)
                await client.leave()
            await _closed(writer)

    async def _startup(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> dict[str, str] | None:
        encrypted = False
        while True:
            length = int.from_bytes(await reader.readexactly(4), "big")
            if not 8 <= length <= _MAX_STARTUP:
                return None
            body = await reader.readexactly(length - 4)
            code = int.from_bytes(body[:4], "big")
            if code == _TLS and self._tls is not None and not encrypted:
                writer.write(b"S")
                await writer.drain()
                await writer.start_tls(self._tls)
                encrypted = True
            elif code in (_TLS, _GSS):
                writer.write(b"N")
            elif code == _CANCEL:
                await self._cancel(body[4:])
                return None
            elif code >> 16 == 3:
                if self._require_tls and not encrypted:
                    raise _RefusedError("XX000", "(ESSLREQUIRED) SSL connection is required")
                words = body[4:].split(b"\0")
                if code != _PROTOCOL_3:
                    writer.write(_message(b"v", struct.pack("!ii", _PROTOCOL_3, 0)))
                return {k.decode(): v.decode() for k, v in zip(words[::2], words[1::2], strict=False) if k}
            else:
                raise _RefusedError("0A000", f"unsupported frontend protocol {code >> 16}.{code & 0xFFFF}")

    async def _login(
        self, startup: dict[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> _Client:
        self.logins += 1
        if self.refusal is not None:
            raise _RefusedError(*self.refusal)
        if len(self._clients) >= self._max_clients:
            raise _RefusedError("XX000", "(EMAXCONN) max client connections reached")
        if "options" in startup:
            raise _RefusedError("XX000", "unsupported startup parameter: options")
        role, dot, project = startup.get("user", "").rpartition(".")
        if self._project is None:
            role = startup.get("user", "")
        elif not dot:
            raise _RefusedError("XX000", "(ENOIDENTIFIER) no tenant identifier provided (external_id or sni_hostname)")
        elif project != self._project:
            raise _RefusedError("XX000", "Tenant or user not found")
        writer.write(_message(b"R", struct.pack("!i", 3)))
        head = await reader.readexactly(5)
        length = int.from_bytes(head[1:], "big")
        if head[:1] != b"p" or length > _MAX_STARTUP:
            raise _RefusedError("08P01", "expected a password")
        password = (await reader.readexactly(length - 4)).rstrip(b"\0").decode()
        client = _Client(self, (role, startup.get("database", role), password), reader, writer)
        # The server itself says whether the password is right.
        server = await self.checkout(client.who)
        self._clients[client.key] = client
        ready = _message(b"K", client.key) + _message(b"Z", b"I")
        writer.write(_message(b"R", struct.pack("!i", 0)) + b"".join(server.parameters) + ready)
        await self.give_back(client.who, server)
        return client

    async def _cancel(self, key: bytes) -> None:
        client = self._clients.get(key)
        if client is not None and client.server is not None:
            _, writer = await asyncio.open_connection(self.host, self._server_port())
            writer.write(struct.pack("!ii", 16, _CANCEL) + client.server.key)
            await _closed(writer)

    # -- server connections ----------------------------------------------------------------------------------------

    async def checkout(self, who: tuple[str, str, str]) -> _Server:
        """A server connection that nobody uses."""
        try:
            async with asyncio.timeout(self._checkout_seconds), self._freed:
                while True:
                    idle = self._idle.setdefault(who, [])
                    while idle:
                        server = idle.pop()
                        assert server.watch is not None
                        if not server.watch.done():
                            server.watch.cancel()
                            await asyncio.gather(server.watch, return_exceptions=True)
                            return server
                        self._count(who, -1)
                        server.writer.close()
                    if self._open.get(who, 0) < self._size:
                        self._count(who, 1)
                        break
                    await self._freed.wait()
        except TimeoutError:
            raise _RefusedError(
                "XX000", "(ECHECKOUTTIMEOUT) unable to check out connection from the pool due to timeout"
            ) from None
        try:
            return await self._connect(*who)
        except BaseException:
            self._count(who, -1)
            raise

    async def give_back(self, who: tuple[str, str, str], server: _Server, *, usable: bool = True) -> None:
        """Let the next client have a connection, or end it."""
        if usable:
            # A server that speaks to nobody says goodbye: the connection is of no use any more.
            server.watch = asyncio.create_task(server.reader.read(1))
            self._idle.setdefault(who, []).append(server)
        else:
            self._count(who, -1)
            await _closed(server.writer)
        async with self._freed:
            self._freed.notify()

    async def _connect(self, role: str, database: str, password: str) -> _Server:
        try:
            reader, writer = await asyncio.open_connection(self.host, self._server_port(), limit=_CHUNK)
        except OSError:
            raise _RefusedError("XX000", "(EDBHANDLEREXITED) connection to database closed") from None
        words = b"".join(text.encode() + b"\0" for text in ("user", role, "database", database))
        writer.write(struct.pack("!ii", len(words) + 9, _PROTOCOL_3) + words + b"\0")
        server = _Server(reader, writer)
        try:
            while True:
                head = await reader.readexactly(5)
                body = await reader.readexactly(int.from_bytes(head[1:], "big") - 4)
                kind = head[:1]
                if kind == b"R" and body[:4] == b"\0\0\0\3":
                    writer.write(_message(b"p", password.encode() + b"\0"))
                elif kind == b"R" and body[:4] != b"\0\0\0\0":
                    raise _RefusedError("28000", "the server behind this pooler must take logins by `password`")
                elif kind == b"S":
                    server.parameters.append(head + body)
                elif kind == b"K":
                    server.key = body
                elif kind == b"E":
                    fields = {part[:1]: part[1:].decode() for part in body.split(b"\0") if part}
                    raise _RefusedError(fields.get(b"C", "XX000"), fields.get(b"M", "login failed"))
                elif kind == b"Z":
                    return server
        except asyncio.IncompleteReadError:
            raise _RefusedError("XX000", "(EDBHANDLEREXITED) connection to database closed") from None
        except BaseException:
            writer.close()
            raise

    def _count(self, who: tuple[str, str, str], change: int) -> None:
        self._open[who] = self._open.get(who, 0) + change
        self.server_connections += change

    def _drop_idle(self) -> None:
        for who, servers in self._idle.items():
            for server in servers:
                if server.watch is not None:
                    server.watch.cancel()
                server.writer.close()
                self._count(who, -1)
        self._idle.clear()


class _Client:
    """One client's way through the pooler."""

    def __init__(
        self,
        pooler: TransactionPooler,
        who: tuple[str, str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.who = who
        self.key = secrets.token_bytes(8)
        self.server: _Server | None = None
        self._pooler = pooler
        self._reader = reader
        self._writer = writer
        self._asked = _Walk()
        self._awaited = 0
        self._unsynced = False
        self._answers: asyncio.Task[None] | None = None
        self._sent = 0

    async def run(self) -> None:
        """Pass on what the client says until it says goodbye."""
        while chunk := await self._reader.read(_CHUNK):
            said = self._asked.feed(chunk)
            for kind, _ in said:
                if kind == ord("X"):
                    return
                self._awaited += kind in _ANSWERED
                self._unsynced = kind in _EXTENDED or (self._unsynced and kind != ord("S"))
            if self.server is None:
                if said and self._asked.between and all(kind == ord("H") for kind, _ in said):
                    # A Flush after everything was answered: there is nothing to flush, and nothing would end its turn.
                    continue
                self.server = await self._pooler.checkout(self.who)
                self._answers = asyncio.create_task(self._pass_answers(self.server))
            self.server.writer.write(chunk)
            await self.server.writer.drain()

    async def leave(self) -> None:
        """Give up the server connection; one in the middle of a transaction is of no use to anybody."""
        server, self.server = self.server, None
        if self._answers is not None:
            self._answers.cancel()
        if server is not None:
            await self._pooler.give_back(self.who, server, usable=False)

    async def _pass_answers(self, server: _Server) -> None:
        walk = _Walk(_ROWS)
        try:
            while True:
                chunk = await server.reader.read(_CHUNK)
                limit = self._pooler.cut_after
                self._sent += len(chunk)
                while self._pooler.silent_after is not None and self._sent > self._pooler.silent_after:
                    await asyncio.sleep(0.05)
                if not chunk or (limit is not None and self._sent > limit):
                    break
                self._writer.write(chunk)
                status = None
                for kind, first in walk.feed(chunk):
                    if kind == ord("Z"):
                        self._awaited -= 1
                        status = first
                done = status == ord("I") and not self._awaited and not self._unsynced
                if done and walk.between and self._asked.between:
                    # Before anything else runs: the client's next message must find no server here.
                    self.server = None
                    await self._pooler.give_back(self.who, server)
                    return
                await self._writer.drain()
        except ConnectionError:
            pass
        if self._pooler.cut_hard:
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            self._writer.transport.abort()
        self._writer.close()


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def _error(sqlstate: str, message: str) -> bytes:
    parts = ("SFATAL", "VFATAL", f"C{sqlstate}", f"M{message}")
    return _message(b"E", b"".join(part.encode() + b"\0" for part in parts) + b"\0")


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    closing: Awaitable[None] = writer.wait_closed()
    try:
        await asyncio.wait_for(closing, 1.0)
    except (OSError, TimeoutError, ssl.SSLError):
        return
