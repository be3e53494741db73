"""A Supabase of one's own: PostgreSQL and a transaction pooler on loopback, with the insurer's database in it.

Belongs here: starting and stopping both as one, and letting the business go on meanwhile.
Does not belong here: what is in the database (`insurer.py`), the server and the pooler themselves (`testing/`), how
others find it (`microbatch/local.py`), Dagster.
"""

from __future__ import annotations

import importlib.util
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

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
_PROJECT = "localproject"


class LocalSupabase:
    """The insurer's database behind a transaction pooler, on Supabase's terms, while this object is open.

    Where another process has it open already, it is shared, and stays when this object is closed.
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
        self._pooler = TransactionPooler(lambda: self._server.port, project=_PROJECT)
        self._shared: int | None = None
        self._supabase: Supabase | None = None
        self.is_new = False

    @property
    def supabase(self) -> Supabase:
        """The way in through the pooler, as the role that only reads."""
        assert self._supabase is not None, "it is not started"
        return self._supabase

    @property
    def is_shared(self) -> bool:
        """Whether another process has it open, and keeps it when this object is closed."""
        return self._shared is not None

    @contextmanager
    def owner(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection of the database's owner, past the pooler, in autocommit."""
        import psycopg

        with psycopg.connect(
            host=self._server.host,
            port=self._shared or self._server.port,
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
        file = self._folder / CONNECTION_FILE
        found = read_connection(file)
        if found is not None:
            self._shared, self._supabase = found.server_port, found.supabase
            return self
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        self._server.start()
        try:
            password = secrets.token_urlsafe(24)
            with self.owner() as connection:
                if not insurer.is_seeded(connection):
                    # Whoever dies in between has made nothing.
                    with connection.transaction():
                        insurer.create(connection)
                        insurer.fill(connection, customers=self._customers)
                    self.is_new = True
                connection.execute(f"ALTER ROLE {quoted(READER)} PASSWORD {literal(password)}".encode())
            self._pooler.start()
            self._supabase = Supabase(
                self._pooler.host, self._pooler.user(READER), password, self._pooler.port, sslmode="disable"
            )
            write_connection(file, LocalConnection(self._supabase, self._hash_key(), self._server.port))
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop both, unless another process keeps them open."""
        if self._shared is None:
            (self._folder / CONNECTION_FILE).unlink(missing_ok=True)
            self._pooler.stop()
            self._server.stop()
        self._shared = self._supabase = None

    def __enter__(self) -> LocalSupabase:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @contextmanager
    def going_on(self, seconds: float) -> Iterator[None]:
        """Let the business go on while the block lasts: a few rows change, again and again.

        Args:
            seconds: Time between two changes.
        """
        import psycopg

        over = threading.Event()

        def go_on() -> None:
            while not over.wait(seconds):
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
    with local, local.going_on(seconds) if seconds and not local.is_shared else nullcontext():
        if local.is_shared:
            say("The demo's database runs already, for another process of this home, and ends with that.")
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
