"""`telematics replicate`: what it answers to eyes and to scripts, and what its exit code says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner, Result

from telematics_assets.catalog import REPLICATED_TABLES
from telematics_assets.cli import app
from telematics_assets.demo.insurer import change, create, fill
from telematics_assets.testing import TransactionPooler
from telematics_assets_tests.databases import Connection, Database

Telematics = Callable[..., Result]
KEYS = ["table", "mode", "inserted", "updated", "deleted", "position", "table_version"]


@pytest.fixture
def telematics(tmp_path: Path, database: Database) -> Telematics:
    """The command line with the test's database configured."""
    url = f"{database.pooler.url(database.role, database.password, database.name)}?sslmode=disable"

    def run(*arguments: str, **environment: str) -> Result:
        env = {
            "TELEMATICS_HOME": str(tmp_path),
            "SUPABASE_DB_URL": url,
            "SUPABASE_HASH_KEY": "0123456789abcdef",
            **environment,
        }
        result = CliRunner().invoke(app, [*arguments], env=env)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def insurer(database: Database, admin: Connection) -> Connection:
    """The insurer's tables with some rows."""
    create(admin, role=database.role)
    fill(admin, customers=5)
    return admin


def document(result: Result) -> Any:
    return json.loads(result.stdout)


def test_all_declared_tables_are_replicated_and_listed(
    telematics: Telematics, insurer: Connection, database: Database
) -> None:
    pooler = database.pooler
    answer = telematics("replicate", "--json")
    assert answer.exit_code == 0
    for_all = pooler.logins
    listed = document(answer)
    assert [list(each) for each in listed] == [KEYS] * len(REPLICATED_TABLES)
    policies = next(each for each in listed if each["table"].endswith("supabase_policies"))
    assert (policies["mode"], policies["inserted"], policies["deleted"]) == ("row_xid", 5, 0)
    assert policies["position"] > 0
    assert "public.policies: took a whole snapshot (first)" in answer.stderr

    change(insurer)
    again = document(telematics("replicate", "--json"))
    assert sum(each["inserted"] + each["updated"] + each["deleted"] for each in again) > 0
    pooler.logins = 0
    shown = telematics("replicate", "policies")
    assert shown.exit_code == 0
    assert for_all == pooler.logins, "one connection for all tables"
    assert "workspace.01_bronze.supabase_policies" in shown.stdout

    tables = {each["table"]: each["rows"] for each in document(telematics("tables", "--json"))}
    assert len(tables) == len(REPLICATED_TABLES)
    rows = document(telematics("show", "supabase_policies", "--limit", "2", "--json"))
    assert len(rows) == 2
    maintained = document(telematics("maintain", "--json"))
    assert {each["table"] for each in maintained} >= set(tables)
    assert document(telematics("maintain", "public.policies", "--json"))[0]["stream"] == "public.policies"


def test_a_snapshot_and_a_sweep_are_options(telematics: Telematics, insurer: Connection) -> None:
    telematics("replicate", "policies", "claims")
    answer = telematics("replicate", "public.policies", "--full", "--sweep", "--json")
    assert "took a whole snapshot (asked for)" in answer.stderr
    assert len(document(answer)) == 1


def test_one_table_that_fails_keeps_no_other_from_it(telematics: Telematics, insurer: Connection) -> None:
    insurer.execute("DROP TABLE public.claims CASCADE")
    answer = telematics("replicate", "--json")
    assert answer.exit_code == 1
    assert len(document(answer)) == len(REPLICATED_TABLES) - 1
    assert "public.claims: There is no table public.claims" in answer.stderr


def test_a_table_that_nobody_declared_is_a_wrong_usage(telematics: Telematics) -> None:
    answer = telematics("replicate", "policy")
    assert answer.exit_code == 2
    assert "'policy' is no replicated table. Tables: public.customers" in answer.stderr


def test_without_a_database_it_is_said_what_to_set(telematics: Telematics) -> None:
    answer = telematics("replicate", "--json", SUPABASE_DB_URL="")
    assert answer.exit_code == 2
    assert "SUPABASE_DB_URL" in document(answer)["error"]


@pytest.mark.soak
def test_a_pool_that_others_hold_is_tried_several_times_and_then_worth_another_run(
    telematics: Telematics, insurer: Connection, database: Database
) -> None:
    with TransactionPooler(lambda: database.server.port, size=1, checkout_seconds=0.2) as pooler:
        url = pooler.url(database.role, database.password, database.name)
        with psycopg.connect(url, prepare_threshold=None) as other:
            other.execute("SELECT 1")
            tried = pooler.logins
            answer = telematics("replicate", "--json", SUPABASE_DB_URL=f"{url}?sslmode=disable")
            assert answer.exit_code == 75
            assert document(answer) == []
            assert "exhausted" in answer.stderr
            assert "It was tried 5 times" in answer.stderr
            assert pooler.logins >= tried + 5
        assert telematics("replicate", "--json", SUPABASE_DB_URL=f"{url}?sslmode=disable").exit_code == 0


def test_a_database_that_does_not_answer_is_worth_another_try(telematics: Telematics, database: Database) -> None:
    database.pooler.stop()
    answer = telematics("replicate", "--json")
    assert answer.exit_code == 75
    assert document(answer) == []
    assert "public.customers: " in answer.stderr
    assert "the tables behind public.customers were not tried" in answer.stderr


def test_a_refused_login_is_tried_once_and_the_password_not_shown(telematics: Telematics, database: Database) -> None:
    url = database.pooler.url(database.role, "not-the-password", database.name)
    answer = telematics("replicate", SUPABASE_DB_URL=f"{url}?sslmode=disable")
    assert answer.exit_code == 1
    assert answer.stderr.count("is wrong") == 1
    assert "not-the-password" not in answer.output
