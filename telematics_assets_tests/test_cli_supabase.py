"""`telematics supabase …`: declarations and SQL on stdout, all else on stderr; a database of the demo on request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from telematics_assets.catalog import ReplicatedTable
from telematics_assets.cli import app
from telematics_assets.demo.insurer import create, fill
from telematics_assets.errors import SupabaseUnavailableError
from telematics_assets.microbatch.session import transaction
from telematics_assets.settings import load_settings
from telematics_assets_tests.databases import Connection, Database

Telematics = Callable[..., Result]


@pytest.fixture
def telematics(tmp_path: Path, database: Database) -> Telematics:
    """The command line with the test's database configured."""

    def run(*arguments: str, **environment: str) -> Result:
        url = database.pooler.url(database.role, database.password, database.name)
        env = {"TELEMATICS_HOME": str(tmp_path), "SUPABASE_DB_URL": f"{url}?sslmode=disable", **environment}
        result = CliRunner().invoke(app, ["supabase", *arguments], env=env)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def test_discovered_tables_are_printed_as_python_and_as_one_json_document(
    telematics: Telematics, database: Database
) -> None:
    database.run("CREATE TABLE public.orders (id int PRIMARY KEY)", "CREATE TABLE public.policies (id int PRIMARY KEY)")
    printed = telematics("discover")
    made: dict[str, tuple[ReplicatedTable, ...]] = {}
    exec(printed.stdout, {}, made)
    assert [table.source for table in made["REPLICATED_TABLES"]] == ["public.orders", "public.policies"]
    # Something of the shipped declarations is there, so that the rest is missing.
    assert "public.customers: It is declared and not in the database." in printed.stderr

    listed = json.loads(telematics("discover", "--json").stdout)
    assert [(each["source"], each["mode"], each["declared"]) for each in listed] == [
        ("public.orders", "xmin", False),
        ("public.policies", "xmin", True),
    ]


def test_the_printed_sql_prepares_tables_and_takes_it_back(telematics: Telematics, database: Database) -> None:
    database.run("CREATE TABLE public.orders (id int PRIMARY KEY)")
    asked = ("public.orders", "--role", database.role)
    database.run(telematics("sql", *asked, "--bigint").stdout)
    (listed,) = json.loads(telematics("discover", "--json").stdout)
    assert listed["mode"] == "row_xid"

    said = json.loads(telematics("sql", *asked, "--undo", "--json").stdout)
    assert (said["tables"], said["role"]) == (["public.orders"], database.role)
    database.run(said["sql"])
    (listed,) = json.loads(telematics("discover", "--json").stdout)
    assert listed["mode"] == "xmin"


def test_without_names_the_sql_is_for_all_declared_tables(
    telematics: Telematics, database: Database, admin: Connection
) -> None:
    create(admin, role=database.role)
    fill(admin, customers=2)
    assert json.loads(telematics("sql", "--json").stdout)["tables"] == [
        f"public.{name}" for name in ("customers", "vehicles", "policies", "claims", "drivers")
    ]
    database.run(telematics("sql", "--undo", "--role", "nobody_at_all").stdout)
    assert admin.execute("SELECT to_regnamespace('telematics') IS NULL").fetchone() == (True,)
    assert admin.execute("SELECT count(*) FROM policies").fetchone() == (2,)


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("sql", "orders"), "no replicated table", 2),
        (("sql", "public.orders"), "no table public.orders", 2),
        (("sql", "--undo", "public.orders"), "no table public.orders", 2),
        (("sql", "public.policies"), "no table public.policies", 1),
        (("sql", "a.b.c"), "source='a.b.c' is not accepted", 2),
        (("sql", "--undo", "--bigint"), "--bigint", 2),
    ],
)
def test_what_cannot_be_printed_is_refused_with_the_reason(
    telematics: Telematics, arguments: tuple[str, ...], said: str, code: int
) -> None:
    refused = telematics(*arguments, "--json")
    assert refused.exit_code == code
    assert said in json.loads(refused.stdout)["error"]
    assert said in refused.stderr


def test_without_a_database_it_is_said_what_to_set(telematics: Telematics) -> None:
    refused = telematics("discover", SUPABASE_DB_URL="")
    assert refused.exit_code == 2
    assert "SUPABASE_DB_URL" in refused.stderr


def test_a_command_runs_beside_the_demos_database_and_gives_its_exit_code(tmp_path: Path) -> None:
    code = (
        "import sys; from telematics_assets.settings import load_settings\n"
        "from telematics_assets.microbatch.session import transaction\n"
        "supabase = load_settings().require_supabase()\n"
        "with transaction(supabase) as session:\n"
        "    sys.exit(40 + (session.value('SELECT count(*) FROM public.customers') > 0))"
    )
    env = {"TELEMATICS_HOME": str(tmp_path)}
    assert CliRunner().invoke(app, ["beside", sys.executable, "-c", code], env=env).exit_code == 41
    assert not (tmp_path / "supabase" / "connection.json").exists()

    configured = env | {"SUPABASE_DB_URL": "postgresql://me.project:secret@127.0.0.1:1/db?sslmode=disable"}
    only = CliRunner().invoke(app, ["beside", sys.executable, "-c", "import sys; sys.exit(7)"], env=configured)
    assert only.exit_code == 7


def test_whoever_is_told_to_end_ends_the_command_and_the_database_with_it(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    sleeper = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(300)"
    telematics = [sys.executable, "-c", "from telematics_assets.cli import main; main()"]
    command = [*telematics, "beside", sys.executable, "-c", sleeper]
    env = {**os.environ, "TELEMATICS_HOME": str(tmp_path)}
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not begun.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        local = load_settings(env).require_supabase()
        with transaction(local) as session:
            assert session.value("SELECT count(*) FROM public.policies") == 200
        process.terminate()
        assert process.wait(timeout=300) == 128 + signal.SIGTERM
    assert load_settings(env).supabase is None
    with pytest.raises(SupabaseUnavailableError), transaction(local, pauses=()):
        pass
