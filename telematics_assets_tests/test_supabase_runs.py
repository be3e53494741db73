"""The shipped definitions on a real database behind a pooler: runs, checks, triggers, and secrets that stay secret."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import dagster as dg
import pytest

from telematics_assets.assets.supabase import replica_key
from telematics_assets.catalog import Column, ReplicatedTable, TableContract
from telematics_assets.definitions import build_definitions
from telematics_assets.engines.base import Engine
from telematics_assets.microbatch.sql import TableSetup, setup_sql
from telematics_assets.settings import load_settings
from telematics_assets_tests.databases import Database
from telematics_assets_tests.test_resources import everything_kept

CONTRACT = TableContract(
    "One row per policy.",
    (
        Column("id", "BIGINT", "Number of the policy."),
        Column("holder", "STRING", "Hash of who holds it."),
        Column("premium", "DECIMAL(12,2)", "Premium, EUR."),
        Column("valid_to", "DATE", "Last day."),
    ),
    owners=("team:insurance",),
)
POLICIES = ReplicatedTable("public.policies", hash=("holder",), contract=CONTRACT)
CLAIMS = ReplicatedTable("public.claims", "xmin", contract=TableContract("One row per claim."))
HASH_KEY = "kept-from-everybody-0123456789"


class House:
    """A code location that is configured by its environment, and Dagster's records on disk."""

    def __init__(self, database: Database, home: Path, instance: dg.DagsterInstance) -> None:
        self.database = database
        self.instance = instance
        self.home = home

    def definitions(self, *tables: ReplicatedTable) -> dg.Definitions:
        settings = load_settings({**os.environ, "TELEMATICS_HOME": str(self.home)})
        policy = dg.RetryPolicy(max_retries=1, delay=0)
        return build_definitions((), settings, retry_policy=policy, tables=tables or (POLICIES, CLAIMS))

    def replicate(self, *tables: ReplicatedTable, **config: Any) -> dg.ExecuteInProcessResult:
        job = self.definitions(*tables).resolve_job_def("replicate")
        run_config = {"ops": {"replicate_supabase": {"config": config}}} if config else {}
        return job.execute_in_process(run_config=run_config, instance=self.instance, raise_on_error=False)

    def tick(self) -> str:
        """What the schedule's tick says."""
        definitions = self.definitions()
        schedule = definitions.resolve_schedule_def("supabase_replication")
        resources = {"engine": definitions.get_repository_def().get_top_level_resources()["engine"]}
        with dg.build_schedule_context(self.instance, resources=resources) as context:
            found = schedule.evaluate_tick(context)
        return found.skip_message or f"{len(found.run_requests or ())} runs"


@pytest.fixture
def house(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    database.run(
        "CREATE TABLE public.policies (id int8 PRIMARY KEY, holder text, premium numeric(12,2), valid_to date)",
        "CREATE TABLE public.claims (id int8 PRIMARY KEY, amount float8)",
        setup_sql([TableSetup("public", "policies", ("id",))], role=database.role),
        "INSERT INTO policies SELECT n, 'holder ' || n, n * 1.5, '2030-01-01' FROM generate_series(1, 100) AS n",
        "INSERT INTO claims SELECT n, n / 2.0 FROM generate_series(1, 10) AS n",
    )
    at = database.supabase
    monkeypatch.setenv(
        "SUPABASE_DB_URL", f"postgresql://{at.user}:{quote(at.password)}@{at.host}:{at.port}/{at.database}"
    )
    monkeypatch.setenv("SUPABASE_SSLMODE", "disable")
    monkeypatch.setenv("SUPABASE_HASH_KEY", HASH_KEY)
    records = tmp_path / "dagster"
    records.mkdir()
    # Only an instance that is kept can be handed to a schedule.
    with dg.DagsterInstance.local_temp(str(records)) as instance:
        yield House(database, tmp_path / "lake", instance)


def metadata(result: dg.ExecuteInProcessResult, table: ReplicatedTable) -> dict[str, Any]:
    events = result.asset_materializations_for_node("replicate_supabase")
    (event,) = [event for event in events if event.asset_key == replica_key(table)]
    return {name: entry.value for name, entry in event.metadata.items()}


def failed(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    evaluations = result.get_asset_check_evaluations()
    return {each.check_name: each.description or "" for each in evaluations if not each.passed}


def test_the_whole_way_from_the_database_to_green_checks(house: House, capfd: pytest.CaptureFixture[str]) -> None:
    pooler = house.database.pooler
    assert house.tick() == "1 runs"
    once, pooler.logins = pooler.logins, 0
    result = house.replicate()
    assert result.success
    assert pooler.logins == 2 * once, "one for the tables and their checks, one for the check of the database"
    assert not failed(result)
    assert len(result.get_asset_check_evaluations()) == 7 + 6 + 1
    first = metadata(result, POLICIES)
    assert (first["inserted"], first["dagster/row_count"], first["snapshot"], first["mode"]) == (
        100,
        100,
        "first",
        "row_xid",
    )
    assert first["position"] > 0
    assert first["lag_seconds"] < 60
    assert "supabase_policies" in first["dagster/uri"]
    assert "premium" in [column.name for column in first["dagster/column_schema"].columns]
    assert "holder 1" not in first["preview"]

    house.database.run(
        "UPDATE policies SET premium = 9.99 WHERE id <= 3",
        "DELETE FROM policies WHERE id = 100",
        "INSERT INTO policies VALUES (101, 'new', 1, 'infinity')",
    )
    result = house.replicate()
    assert result.success
    second = metadata(result, POLICIES)
    assert (second["inserted"], second["updated"], second["deleted"]) == (1, 3, 1)
    assert second["position"] > first["position"]
    assert set(failed(result)) == {"anomalies"}
    assert "1 values can't be shown" in failed(result)["anomalies"]

    everything = everything_kept(house.instance) + "".join(capfd.readouterr())
    password = house.database.password
    assert "public.policies" in everything
    for secret in (password, quote(password), HASH_KEY):
        assert secret not in everything


def test_no_secret_is_in_the_records_of_a_refused_login(
    house: House, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    url = os.environ["SUPABASE_DB_URL"]
    monkeypatch.setenv("SUPABASE_DB_URL", url.replace(quote(house.database.password), "not-the-password"))
    result = house.replicate()
    assert not result.success
    everything = everything_kept(house.instance) + "".join(capfd.readouterr())
    assert "is wrong. It was tried once" in everything
    assert "not-the-password" not in everything
    assert HASH_KEY not in everything
    assert house.tick().startswith("1 runs")


def test_a_table_that_cannot_be_replicated_is_named_and_the_other_one_is_done(house: House) -> None:
    house.database.run("CREATE TABLE public.keyless (id int8)")
    keyless = ReplicatedTable("public.keyless", "xmin")
    result = house.replicate(keyless, POLICIES)
    assert not result.success
    assert metadata(result, POLICIES)["inserted"] == 100
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert "public.keyless (table) has no primary key" in str(failure.step_failure_data.user_failure_data)
    assert not [event for event in result.all_events if event.is_step_up_for_retry]


def test_a_new_snapshot_is_run_config(house: House) -> None:
    house.replicate()
    result = house.replicate(full=True, tables=["public.policies"])
    assert result.success
    assert metadata(result, POLICIES)["snapshot"] == "asked for"
    assert "snapshot" not in metadata(result, CLAIMS)
    assert metadata(house.replicate(sweep=True), POLICIES)["swept"]


def test_drift_and_tables_of_nobody_are_told(house: House) -> None:
    house.database.run("CREATE TABLE public.invoices (id int8 PRIMARY KEY)")
    result = house.replicate(replace(POLICIES, contract=replace(CONTRACT, columns=CONTRACT.columns[:3])), CLAIMS)
    assert result.success
    assert set(failed(result)) == {"drift", "undeclared_tables"}
    assert "valid_to" in failed(result)["drift"]


def test_the_schedule_starts_a_run_where_the_database_answers_and_skips_where_it_does_not(house: House) -> None:
    assert house.tick() == "1 runs"
    house.database.pooler.stop()
    assert "127.0.0.1" in house.tick()
    assert not house.instance.get_run_records()


def test_without_settings_the_house_is_quiet(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SUPABASE_"):
            monkeypatch.delenv(name)
    assert house.tick().startswith("No Supabase database is configured. Set SUPABASE_DB_URL")


def test_settings_that_describe_no_database_do_not_keep_files_from_loading(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUPABASE_DB_URL")
    monkeypatch.setenv("SUPABASE_HOST", "127.0.0.1")
    definitions = house.definitions()
    with dg.build_resources({"engine": (definitions.resources or {})["engine"]}) as resources:
        engine: Engine = resources.engine
        assert engine.tables() == []
        status = engine.source_status()
    assert status.state == "refused"
    assert "SUPABASE_USER" in status.message
    assert house.tick() == "1 runs"


def test_an_engine_is_told_its_database_by_code_as_well(database: Database, tmp_path: Path) -> None:
    settings = load_settings({"TELEMATICS_HOME": str(tmp_path)})
    definitions = build_definitions((), settings, supabase=database.supabase, tables=(CLAIMS,))
    with dg.build_resources(dict(definitions.resources or {})) as resources:
        assert resources.engine.source_status().state == "ready"
        assert resources.supabase == database.supabase
