"""The demo's database: started and stopped as one, found by the processes of its home while it runs, and private."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from telematics_assets.demo.insurer import change
from telematics_assets.demo.local_supabase import LocalSupabase, run_beside
from telematics_assets.errors import SupabaseUnavailableError
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.microbatch.local import read_connection
from telematics_assets.microbatch.session import transaction
from telematics_assets.resources import SupabaseResource
from telematics_assets.settings import Settings, load_settings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def local(home: Path) -> Iterator[LocalSupabase]:
    with LocalSupabase(home / "supabase", customers=10) as local:
        yield local


# Dies when the tables are there and nothing is in them.
_DIES = """
import os, sys
from pathlib import Path
from telematics_assets.demo import insurer
from telematics_assets.demo.local_supabase import LocalSupabase

insurer.fill = lambda *args, **kwargs: os._exit(9)
LocalSupabase(Path(sys.argv[1])).start()
"""


# Has it open until it is told to go on.
_OPENS = """
import sys
from pathlib import Path
from telematics_assets.demo.local_supabase import LocalSupabase

with LocalSupabase(Path(sys.argv[1]), customers=3) as local:
    print("shares" if local.is_shared else "keeps", flush=True)
    sys.stdin.readline()
"""


def settings_of(home: Path, **variables: str) -> Settings:
    return load_settings({"TELEMATICS_HOME": str(home), **variables})


def resource_of(settings: Settings) -> Supabase | None:
    context = dg.build_init_resource_context()
    found: Supabase | None = SupabaseResource.from_settings(settings).create_resource(context)
    return found


def count(supabase: Supabase, table: str) -> int:
    with transaction(supabase) as session:
        return int(session.value(f"SELECT count(*) FROM public.{table}"))


def test_it_is_filled_prepared_and_readable_through_its_pooler(local: LocalSupabase) -> None:
    assert local.is_new
    assert local.supabase.user == "telematics_reader.localproject"
    assert count(local.supabase, "policies") == 10
    with local.owner() as connection:
        change(connection)
    assert count(local.supabase, "vehicles") == 15
    with transaction(local.supabase) as session:
        assert session.value("SELECT count(*) > 0 FROM telematics.tombstones")


def test_settings_and_resources_find_it_where_nothing_else_is_configured(home: Path, local: LocalSupabase) -> None:
    settings = settings_of(home)
    assert settings.supabase == local.supabase
    assert resource_of(settings) == local.supabase

    other = settings_of(home, SUPABASE_DB_URL="postgresql://me.project:secret@127.0.0.1:1/db?sslmode=disable")
    assert other.supabase is not None
    assert other.supabase.user == "me.project"
    wrong = settings_of(home, SUPABASE_HOST="127.0.0.1")
    assert wrong.supabase is None
    assert wrong.supabase_problem is not None


def test_nobody_else_may_look_into_it_and_no_text_shows_its_secrets(home: Path, local: LocalSupabase) -> None:
    folder = home / "supabase"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    file = folder / "connection.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    secrets = [value for key, value in json.loads(file.read_text()).items() if key in ("password", "hash_key")]
    assert len(secrets) == 2
    settings = settings_of(home)
    shown = f"{settings!r} {SupabaseResource.from_settings(settings)!r} {local.supabase!r}"
    assert not [secret for secret in secrets if secret in shown]


def test_a_second_user_shares_it_and_does_not_stop_it(home: Path, local: LocalSupabase) -> None:
    with LocalSupabase(home / "supabase") as second:
        assert not second.is_new
        assert second.supabase == local.supabase
        with second.owner() as connection:
            connection.execute("SELECT FROM public.policies")
    assert count(local.supabase, "customers") > 0


@contextmanager
def another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that opens it."""
    command = [sys.executable, "-c", _OPENS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def role_of(process: subprocess.Popen[str]) -> str:
    """What it does with it, as soon as it is open: it keeps or shares it."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 3000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_whoever_leaves_last_ends_it_and_those_who_stay_find_it_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "supabase"
    with another(folder) as first:
        assert role_of(first) == "keeps"
        ours = LocalSupabase(folder).start()
        known = ours.supabase
        assert ours.is_shared
    # It was killed.
    wait_until(lambda: not ours.is_shared)
    assert not ours.is_new
    assert (ours.supabase, count(known, "customers")) == (known, 3)

    with another(folder) as second:
        assert role_of(second) == "shares"
        ours.stop()
        wait_until(lambda: read_connection(folder / "connection.json") is not None)
        assert count(known, "customers") == 3
        assert second.communicate("\n")[0] == ""
        assert second.returncode == 0
    with pytest.raises(SupabaseUnavailableError), transaction(known, pauses=()):
        pass
    assert not (folder / "postgres" / "data" / "postmaster.pid").exists()


def test_two_that_begin_at_once_have_one_database(tmp_path: Path) -> None:
    folder = tmp_path / "supabase"
    with another(folder) as one, another(folder) as two:
        assert sorted((role_of(one), role_of(two))) == ["keeps", "shares"]


def test_its_business_goes_on_while_somebody_wants_it_to(local: LocalSupabase) -> None:
    newest = "SELECT max(id) FROM public.vehicles"

    def highest() -> int:
        with transaction(local.supabase) as session:
            return int(session.value(newest))

    before = highest()
    with local.going_on(0.05):
        deadline = time.monotonic() + 300
        while highest() < before + 2:
            assert time.monotonic() < deadline
    after = highest()
    time.sleep(0.2)
    assert highest() == after


def test_a_command_beside_it_hears_of_it_and_ends_it(home: Path, local: LocalSupabase, tmp_path: Path) -> None:
    said: list[str] = []

    def beside(home: Path, **variables: str) -> bool:
        look = "import pathlib, sys; sys.exit(3 + pathlib.Path(sys.argv[1]).exists())"
        command = [sys.executable, "-c", look, str(home / "supabase" / "connection.json")]
        return run_beside(command, settings_of(home, **variables), said.append) == 4

    assert beside(tmp_path)
    assert "every 60 s (TELEMATICS_DEMO_CHANGE_SECONDS=0" in said.pop()
    assert not (tmp_path / "supabase" / "connection.json").exists()
    assert not beside(tmp_path, SUPABASE_HOST="127.0.0.1")
    assert said == []
    assert beside(home)
    assert "another process" in said.pop()
    assert count(local.supabase, "customers") > 0


def test_stopped_it_is_not_found_and_started_again_it_has_its_rows(tmp_path: Path) -> None:
    folder = tmp_path / "supabase"
    with LocalSupabase(folder, customers=3) as first:
        before = first.supabase
        key = json.loads((folder / "connection.json").read_text())["hash_key"]
        file = (folder / "connection.json").read_text()
    assert settings_of(tmp_path).supabase is None
    assert resource_of(settings_of(tmp_path)) is None
    with pytest.raises(SupabaseUnavailableError), transaction(before, pauses=()):
        pass

    # A process that was killed could not take its file away.
    dead = json.loads(file) | {"process": file and json.loads(file)["process"].rpartition("/")[0] + "/1"}
    (folder / "connection.json").write_text(json.dumps(dead))
    assert settings_of(tmp_path).supabase is None
    with LocalSupabase(folder, customers=3) as again:
        assert not again.is_new
        assert again.supabase.password != before.password
        assert count(again.supabase, "customers") == 3
        assert json.loads((folder / "connection.json").read_text())["hash_key"] == key


@pytest.mark.parametrize("text", ["", "{}", '{"process": 3}', "[]", '{"process": "here/1/2", "host": "127.0.0.1"}'])
def test_a_file_that_is_none_of_ours_configures_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "supabase").mkdir()
    (tmp_path / "supabase" / "connection.json").write_text(text)
    assert settings_of(tmp_path).supabase is None
    assert settings_of(tmp_path).supabase_problem is None


def test_one_that_dies_while_it_fills_it_leaves_nothing_half_done(tmp_path: Path) -> None:
    folder = tmp_path / "supabase"
    assert subprocess.run([sys.executable, "-c", _DIES, str(folder)]).returncode == 9
    with LocalSupabase(folder, customers=3) as local:
        assert local.is_new
        assert count(local.supabase, "customers") == 3
