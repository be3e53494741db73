"""The checks of a replicated table and of its database: what each catches, how bad it is, what it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from telematics_assets.assets.supabase import DATABASE_KEY, replica_key
from telematics_assets.catalog import Column, ReplicatedTable, TableContract
from telematics_assets.engines.base import (
    Anomaly,
    Blocker,
    ProgressListener,
    Reconciliation,
    RepeatedKeys,
    ReplicateReport,
    ReplicateRequest,
    SourceDrift,
    SourceStatus,
)
from telematics_assets.errors import SupabaseUnavailableError, TableError
from telematics_assets.replica_checks import BLOCKER_LIMIT_SECONDS, LAG_LIMIT_MINUTES, last_batch
from telematics_assets.testing import MemoryEngine
from telematics_assets_tests.orchestra import CLAIMS, POLICIES, insurer, replicas_of, replicate

ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


class Telling(MemoryEngine):
    """Replicates, and says something more about it."""

    def __init__(self, **more: Any) -> None:
        super().__init__(source=insurer().source)
        self.more = more

    def replicate(
        self, table: ReplicatedTable, request: ReplicateRequest | None = None, progress: ProgressListener | None = None
    ) -> ReplicateReport:
        return replace(super().replicate(table, request, progress), **self.more)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def checked(engine: MemoryEngine, instance: dg.DagsterInstance, *tables: ReplicatedTable) -> dg.ExecuteInProcessResult:
    """Run the checks alone, as from the UI."""
    keys = [replica_key(table) for table in tables or (POLICIES, CLAIMS)]
    selection = dg.AssetSelection.checks_for_assets(*keys, DATABASE_KEY)
    job = dg.Definitions(jobs=[dg.define_asset_job("check", selection=selection)])
    merged = dg.Definitions.merge(replicas_of(engine, *tables), job)
    return merged.resolve_job_def("check").execute_in_process(instance=instance, raise_on_error=False)


def evaluations(result: dg.ExecuteInProcessResult, table: ReplicatedTable = POLICIES) -> dict[str, Any]:
    """The evaluations of a table's checks, and of the database's."""
    keys = (replica_key(table), DATABASE_KEY)
    return {each.check_name: each for each in result.get_asset_check_evaluations() if each.asset_key in keys}


def failed(result: dg.ExecuteInProcessResult, table: ReplicatedTable = POLICIES) -> dict[str, Any]:
    return {name: each for name, each in evaluations(result, table).items() if not each.passed}


def lines(evaluation: dg.AssetCheckEvaluation, name: str) -> list[Any]:
    value = evaluation.metadata[name]
    assert isinstance(value, dg.TableMetadataValue)
    return [record.data for record in value.records]


def test_a_sound_table_passes_every_check(instance: dg.DagsterInstance) -> None:
    result = replicate(insurer(), instance)
    assert set(evaluations(result)) == {
        "contract",
        "lag",
        "blocked_cut",
        "anomalies",
        "drift",
        "reconciliation",
        "primary_key",
        "undeclared_tables",
    }
    assert "contract" not in evaluations(result, CLAIMS), "it promises no columns"
    assert not failed(result)


def test_checks_of_tables_that_do_not_exist_yet_pass(instance: dg.DagsterInstance) -> None:
    result = checked(insurer(), instance)
    assert result.success
    assert not failed(result)


def test_without_a_database_the_checks_say_so_and_are_not_red(instance: dg.DagsterInstance) -> None:
    result = checked(MemoryEngine(), instance)
    assert result.success
    assert not failed(result)
    for name in ("drift", "reconciliation", "undeclared_tables"):
        told = evaluations(result)[name].description
        assert told.startswith("Not checked: No Supabase database is configured.")
        assert "SUPABASE_DB_URL" in told


def test_a_database_that_does_not_answer_fails_the_questions_to_it_alone(instance: dg.DagsterInstance) -> None:
    engine = insurer()
    replicate(engine, instance)
    assert engine.source is not None
    engine.source.status = SourceStatus("unreachable", "Nothing answers.")
    result = checked(engine, instance)
    assert not result.success
    assert set(evaluations(result)) == {"contract", "lag", "blocked_cut", "anomalies"}


def test_a_broken_contract_is_an_error_and_stops_what_depends_on_the_table(instance: dg.DagsterInstance) -> None:
    engine = insurer()
    assert engine.source is not None
    engine.source.put("public.policies", {"id": ["a"], "name": ["x"]})
    result = replicate(engine, instance)
    assert not result.success
    contract = failed(result)["contract"]
    assert contract.severity == ERROR
    assert lines(contract, "broken") == [
        {"column": "id", "promised": "BIGINT", "found": "STRING"},
        {"column": "holder", "promised": "STRING", "found": "nothing"},
    ]
    assert set(evaluations(result, CLAIMS)) >= {"lag"}, "the other tables are done all the same"


def test_a_contract_may_spell_its_types_as_it_likes(instance: dg.DagsterInstance) -> None:
    table = ReplicatedTable(
        "public.policies", contract=TableContract("Some.", (Column("price", "decimal(10, 2)", "A price."),))
    )
    engine = insurer()
    assert engine.source is not None
    prices = pa.array([None], pa.decimal128(10, 2))
    engine.source.put("public.policies", pa.table({"id": [1], "price": prices}))
    assert "contract" not in failed(replicate(engine, instance, table))


@pytest.mark.parametrize(
    ("fresh", "lag", "warns"),
    [
        (None, LAG_LIMIT_MINUTES * 60 - 9, False),
        (None, LAG_LIMIT_MINUTES * 60 + 9, True),
        (5, 290, False),
        (5, 310, True),
    ],
)
def test_a_lag_above_the_limit_warns(
    instance: dg.DagsterInstance, fresh: float | None, lag: float, warns: bool
) -> None:
    table = replace(POLICIES, fresh_within_minutes=fresh)
    found = failed(replicate(Telling(lag_seconds=lag), instance, table))
    assert ("lag" in found) == warns
    if warns:
        assert found["lag"].severity == WARN
        assert "limit" in found["lag"].description


def test_a_check_of_the_lag_alone_counts_the_time_since_the_last_batch(
    instance: dg.DagsterInstance,
) -> None:
    engine = Telling(lag_seconds=10.0)
    replicate(engine, instance)
    before = evaluations(checked(engine, instance))["lag"].metadata["lag_seconds"].value
    assert 10.0 <= before < 70.0
    event = instance.get_latest_materialization_event(replica_key(POLICIES))
    assert event is not None
    batch = last_batch(instance, replica_key(POLICIES), now=event.timestamp + 3600)
    assert batch.lag_seconds == pytest.approx(3610.0)


@pytest.mark.parametrize(("seconds", "warns"), [(BLOCKER_LIMIT_SECONDS - 1, False), (BLOCKER_LIMIT_SECONDS + 1, True)])
def test_a_transaction_that_holds_the_cut_for_long_warns_by_name(
    instance: dg.DagsterInstance, seconds: float, warns: bool
) -> None:
    engine = Telling(blocker=Blocker("prepared transaction", "'nightly' of postgres", seconds))
    run = replicate(engine, instance)
    for result in (run, checked(engine, instance)):
        blocked = evaluations(result)["blocked_cut"]
        assert blocked.passed != warns
        assert blocked.severity == WARN
        assert blocked.metadata["blocker"].value == "prepared transaction 'nightly' of postgres"
        assert ("prepared transaction 'nightly' of postgres" in (blocked.description or "")) == warns


def test_values_that_cannot_be_shown_warn_with_what_stands_for_them(instance: dg.DagsterInstance) -> None:
    engine = Telling(anomalies=(Anomaly("valid_to", "infinity", 2, "infinity"), Anomaly("born", "BC date", 1)))
    run = replicate(engine, instance)
    for result in (run, checked(engine, instance)):
        anomalies = failed(result)["anomalies"]
        assert anomalies.severity == WARN
        assert anomalies.metadata["values"].value == 3
        assert lines(anomalies, "anomalies") == [
            {"column": "valid_to", "kind": "infinity", "rows": 2, "example": "infinity"},
            {"column": "born", "kind": "BC date", "rows": 1, "example": ""},
        ]
    assert run.success


def test_a_declaration_that_its_table_no_longer_fits_warns(instance: dg.DagsterInstance) -> None:
    table = replace(CLAIMS, exclude=("phone",))
    result = replicate(insurer(), instance, POLICIES, table)
    drift = failed(result, table)["drift"]
    assert drift.severity == WARN
    assert lines(drift, "drift") == [{"what": "column", "found": "phone is not there."}]
    assert "drift" not in failed(result)


def test_a_table_that_nobody_declared_warns_at_the_database(instance: dg.DagsterInstance) -> None:
    result = replicate(insurer(), instance, POLICIES)
    undeclared = failed(result)["undeclared_tables"]
    assert undeclared.asset_key == DATABASE_KEY
    assert undeclared.severity == WARN
    assert lines(undeclared, "undeclared") == [{"table": "public.claims"}]
    assert "telematics supabase discover" in undeclared.description


def test_keys_that_the_table_lacks_or_has_too_many_are_an_error(instance: dg.DagsterInstance) -> None:
    class Leaking(MemoryEngine):
        def reconcile(self, table: ReplicatedTable) -> Reconciliation:
            return Reconciliation(3, 2, 2, 1, ("7", "8"))

    wrong = failed(replicate(Leaking(source=insurer().source), instance))["reconciliation"]
    assert wrong.severity == ERROR
    assert {name: wrong.metadata[name].value for name in ("source_rows", "table_rows", "missing", "extra")} == {
        "source_rows": 3,
        "table_rows": 2,
        "missing": 2,
        "extra": 1,
    }
    assert lines(wrong, "examples") == [{"key": "7"}, {"key": "8"}]


def test_a_reconciliation_sees_what_was_not_replicated(instance: dg.DagsterInstance) -> None:
    engine = insurer()
    replicate(engine, instance)
    assert engine.source is not None
    engine.source.put("public.policies", {"id": [0, 1, 9], "holder": ["a", "b", "c"]})
    wrong = failed(checked(engine, instance))["reconciliation"]
    assert (wrong.metadata["missing"].value, wrong.metadata["extra"].value) == (1, 1)


def test_a_key_that_is_there_twice_is_an_error(instance: dg.DagsterInstance) -> None:
    class Doubling(MemoryEngine):
        def repeated_keys(self, table: ReplicatedTable) -> RepeatedKeys | None:
            return RepeatedKeys(("id",), 4, 1, ("7",))

    twice = failed(replicate(Doubling(source=insurer().source), instance))["primary_key"]
    assert twice.severity == ERROR
    assert "(id)" in twice.description
    assert lines(twice, "examples") == [{"key": "7"}]


def test_a_check_that_cannot_answer_fails_the_run_but_no_other_check(instance: dg.DagsterInstance) -> None:
    class Forgetful(MemoryEngine):
        def reconcile(self, table: ReplicatedTable) -> Reconciliation:
            raise TableError("a file is missing: restore it")

    result = replicate(Forgetful(source=insurer().source), instance)
    assert not result.success
    assert "reconciliation" not in evaluations(result)
    assert {"primary_key", "drift"} <= set(evaluations(result, CLAIMS))


def test_a_check_tries_again_when_the_database_does_not_answer(instance: dg.DagsterInstance) -> None:
    class Flaky(MemoryEngine):
        asked = 0

        def source_drift(self, tables: Sequence[ReplicatedTable]) -> Sequence[SourceDrift]:
            self.asked += 1
            if self.asked == 1:
                raise SupabaseUnavailableError("no answer")
            return super().source_drift(tables)

    result = checked(Flaky(source=insurer().source), instance)
    assert result.success
    assert not failed(result)
