"""A Supabase of one's own: PostgreSQL and a transaction pooler on loopback, with the insurer's database in it.

Belongs here: starting and stopping both as one, and letting the business go on meanwhile.
Does not belong here: what is in the database (`insurer.py`), the server and the pooler themselves (`testing/`), how
others find it (`microbatch/local.py`), Dagster.
"""

from __future__ import annotations

import fcntl
import importlib.util
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from telematics_assets.demo import insurer
from telematics_assets.errors import MissingExtraError, PostgresStartError
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.local import (
    CONNECTION_FILE,
    LocalConnection,
    read_connection,
    write_connection,
    write_private,
)
from telematics_assets.microbatch.source import literal, quoted
from telematics_assets.microbatch.sql import READER
from telematics_assets.testing.pooler import TransactionPooler
from telematics_assets.testing.postgres import LocalPostgres

if TYPE_CHECKING:
    import psycopg

    from telematics_assets.settings import Settings

_HASH_KEY = "hash.key"
_LOCK = "lock"
# How often one that shares it looks whether it is still there, and how long one waits that finds it starting or ending.
_LOOK_SECONDS = 0.2
_PATIENCE_SECONDS = 60.0
_PROJECT = "localproject"


class LocalSupabase:
    """The insurer's database behind a transaction pooler, on Supabase's terms, while this object is open.

    Where another process has it open already, it is shared. One process keeps it; when that leaves, or dies, one of
    those who share it goes on with it at the same address, so that the last one to leave ends it.
    """

    def __init__(self, folder: Path, *, customers: int = 200) -> None:
        """Use a folder; nothing is started yet.

        Args:
            folder: Where the cluster is, or is made; only its owner may enter it.
            customers: How many customers a new database has.

        Raises:
            MissingExtraError: If there are no PostgreSQL binaries, or nothing to talk to them with.
        """
        if importlib.util.find_spec("psycopg") is None:
            raise MissingExtraError("The demo's database", "supabase")
        self._folder = folder.absolute()
        self._customers = customers
        self._server = LocalPostgres(self._folder / "postgres", settings=["max_prepared_transactions=8"])
        self._pooler = self._pooler_at(0)
        self._lock: TextIO | None = None
        self._found: LocalConnection | None = None
        self._supabase: Supabase | None = None
        self._leaving = threading.Event()
        self._heir: threading.Thread | None = None
        self.is_new = False

    @property
    def supabase(self) -> Supabase:
        """The way in through the pooler, as the role that only reads."""
        assert self._supabase is not None, "it is not started"
        return self._supabase

    @property
    def is_shared(self) -> bool:
        """Whether another process keeps it now."""
        return self._found is not None

    @contextmanager
    def owner(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection of the database's owner, past the pooler, in autocommit."""
        import psycopg

        with psycopg.connect(
            host=self._server.host,
            port=found.server_port if (found := self._found) else self._server.port,
            user="postgres",
            password=self._server.password,
            dbname="postgres",
            autocommit=True,
        ) as connection:
            yield connection

    def start(self) -> LocalSupabase:
        """Start both, prepare and fill the database if that is not done yet, and say where they are.

        Raises:
            PostgresStartError: If the server does not start.
        """
        if self._supabase is not None:
            return self
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._join() and not self._keep():
            if time.monotonic() > deadline:
                raise PostgresStartError(
                    f"Another process has been starting or ending the database in {self._folder} for "
                    f"{_PATIENCE_SECONDS:g} s. End it, or take another TELEMATICS_HOME."
                )
            time.sleep(_LOOK_SECONDS)
        if self._found:
            self._leaving.clear()
            self._heir = threading.Thread(target=self._inherit, name="heir", daemon=True)
            self._heir.start()
        return self

    def stop(self) -> None:
        """Leave it: it ends, unless another process shares it and goes on."""
        self._leaving.set()
        if self._heir is not None:
            self._heir.join()
        self._end()
        self._heir = self._found = self._supabase = None

    def _join(self) -> bool:
        """Share what another process keeps, if one does."""
        found = read_connection(self._folder / CONNECTION_FILE)
        if found is None:
            return False
        self._found, self._supabase = found, found.supabase
        return True

    def _keep(self, like: Supabase | None = None) -> bool:
        """Start both, unless another process is at it.

        Args:
            like: Where those who know it already look for it, and with which password.
        """
        lock = (self._folder / _LOCK).open("a")
        try:
            # Let go of by the system, however this process ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            return False
        self._lock = lock
        try:
            self._server.start()
            password = like.password if like else secrets.token_urlsafe(24)
            # Now, because the business of one that shared it goes on.
            self._found = None
            with self.owner() as connection:
                if not insurer.is_seeded(connection):
                    # Whoever dies in between has made nothing.
                    with connection.transaction():
                        insurer.create(connection)
                        insurer.fill(connection, customers=self._customers)
                    self.is_new = True
                connection.execute(f"ALTER ROLE {quoted(READER)} PASSWORD {literal(password)}".encode())
            self._open_pooler(like.port if like else 0)
            self._supabase = Supabase(
                self._pooler.host, self._pooler.user(READER), password, self._pooler.port, sslmode="disable"
            )
            connection_now = LocalConnection(self._supabase, self._hash_key(), self._server.port)
            write_connection(self._folder / CONNECTION_FILE, connection_now)
        except BaseException:
            self._end()
            raise
        return True

    def _inherit(self) -> None:
        """While another process keeps it: see that it goes on when that one leaves."""
        while not self._leaving.wait(_LOOK_SECONDS):
            known = self._supabase
            if self._join():
                continue
            try:
                if self._keep(known):
                    return
            except PostgresStartError:
                # Then there is none any more, and whoever asks for it is told so.
                return

    def _end(self) -> None:
        if self._lock is not None:
            (self._folder / CONNECTION_FILE).unlink(missing_ok=True)
            self._pooler.stop()
            self._server.stop()
            self._lock.close()
            self._lock = None

    def _pooler_at(self, port: int) -> TransactionPooler:
        return TransactionPooler(lambda: self._server.port, project=_PROJECT, port=port)

    def _open_pooler(self, port: int) -> None:
        self._pooler = self._pooler_at(port)
        try:
            self._pooler.start()
        except OSError:
            # Somebody else has got it meanwhile.
            self._pooler = self._pooler_at(0).start()

    def __enter__(self) -> LocalSupabase:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @contextmanager
    def going_on(self, seconds: float) -> Iterator[None]:
        """Let the business go on while the block lasts, and this process keeps it: a few rows change, again and again.

        Args:
            seconds: Time between two changes.
        """
        import psycopg

        over = threading.Event()

        def go_on() -> None:
            while not over.wait(seconds):
                if self.is_shared:
                    continue
                # A server that was killed, or is asked for too much, is left alone until the next time.
                with suppress(psycopg.Error), self.owner() as connection:
                    insurer.change_a_little(connection)

        thread = threading.Thread(target=go_on, name="business", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _hash_key(self) -> str:
        """The key of hashed columns: the same for as long as the folder is there."""
        file = self._folder / _HASH_KEY
        if not file.exists():
            write_private(file, secrets.token_urlsafe(24))
        return file.read_text()


def is_configured(settings: Settings) -> bool:
    """Whether a database of the user's own is named, rightly or wrongly: then there is none of the demo's."""
    return bool(settings.supabase_parts.keys() - {"hash_key"})


def run_beside(command: Sequence[str], settings: Settings, say: Callable[[str], None]) -> int:
    """Run a command while the demo's database runs and its business goes on; all end together.

    Args:
        command: The command with its arguments.
        settings: The deployment. Where it names a database of its own, or wrongly, only the command is run.
        say: Takes what is to be known about the database.

    Returns:
        The command's exit code.
    """
    if is_configured(settings):
        return _run(command)
    try:
        local = LocalSupabase(settings.local_supabase).start()
    except (MissingExtraError, PostgresStartError) as error:
        say(f"There is no database of the demo's: {error}")
        return _run(command)
    seconds = settings.demo_change_seconds
    with local, local.going_on(seconds) if seconds else nullcontext():
        if local.is_shared:
            say("The demo's database runs already, for another process of this home; it ends with the last of them.")
        elif seconds:
            say(
                f"The demo's database runs, and a few of its rows change every {seconds:g} s "
                "(TELEMATICS_DEMO_CHANGE_SECONDS=0: none do)."
            )
        return _run(command)


def _run(command: Sequence[str]) -> int:
    """Run a command to its end; what would end us meanwhile is passed on to it."""
    process = subprocess.Popen(command)

    def pass_on(number: int, frame: object) -> None:
        # A Ctrl-C in the terminal reaches the whole group by itself.
        if number != signal.SIGINT or not sys.stdin.isatty():
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
        # As a shell says it of a command that a signal ended.
        return code if code >= 0 else 128 - code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
