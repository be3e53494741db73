"""Replicated tables in Dagster: what a run does, says and survives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from telematics_assets.assets.boundary import PERMANENT_FAILURE_TAG
from telematics_assets.assets.files import PROCESS_TAG
from telematics_assets.assets.supabase import DATABASE_KEY, POOL, replica_assets, replica_key, source_key
from telematics_assets.catalog import Names, ReplicatedTable
from telematics_assets.engines.base import (
    Anomaly,
    Blocker,
    Progress,
    ProgressListener,
    ReplicateReport,
    ReplicateRequest,
    SchemaChange,
    SourceStatus,
)
from telematics_assets.errors import ReplicationError, SupabaseError, SupabaseUnavailableError
from telematics_assets.testing import MemoryEngine, MemorySource
from telematics_assets_tests.orchestra import (
    CLAIMS,
    POLICIES,
    definitions_of,
    insurer,
    parquet_points,
    replicas_of,
    replicate,
    replicated,
)

BOTH = [replica_key(POLICIES), replica_key(CLAIMS)]


class Failing(MemoryEngine):
    """Raises errors for some sources, one per call, before it works."""

    def __init__(self, source: MemorySource, **errors: list[Exception]) -> None:
        super().__init__(source=source)
        self.errors = errors
        self.requests: list[tuple[str, ReplicateRequest | None]] = []
        self.statuses = 0

    def source_status(self) -> SourceStatus:
        self.statuses += 1
        return super().source_status()

    def replicate(
        self, table: ReplicatedTable, request: ReplicateRequest | None = None, progress: ProgressListener | None = None
    ) -> ReplicateReport:
        self.requests.append((table.source.removeprefix("public."), request))
        if left := self.errors.get(table.source.removeprefix("public.")):
            raise left.pop(0)
        return super().replicate(table, request, progress)


def failing(**errors: list[Exception]) -> Failing:
    """The insurer's database, with errors by table."""
    source = insurer().source
    assert source is not None
    return Failing(source, **errors)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def values(event: dg.AssetMaterialization | dg.AssetObservation) -> dict[str, Any]:
    return {name: entry.value for name, entry in event.metadata.items()}


def failure(result: dg.ExecuteInProcessResult) -> str:
    """What the run's failed step says."""
    (event,) = [event for event in result.all_events if event.is_step_failure]
    told = event.step_failure_data.user_failure_data
    assert event.step_failure_data.error is not None
    return str(told.description) if told else str(event.step_failure_data.error.to_string())


def test_one_run_brings_all_tables_up_and_says_what_it_did(instance: dg.DagsterInstance) -> None:
    engine = insurer()
    result = replicate(engine, instance)
    assert result.success
    events = replicated(result)
    assert {name: values(event)["dagster/row_count"] for name, event in events.items()} == {
        "supabase_policies": 3,
        "supabase_claims": 2,
    }
    metadata = values(events["supabase_policies"])
    assert metadata["inserted"] == 3
    assert metadata["updated"] == metadata["deleted"] == 0
    assert metadata["mode"] == "row_xid"
    assert metadata["snapshot"] == "first"
    assert metadata["lag_seconds"] == 0.0
    assert metadata["source"] == "public.policies"
    assert metadata["dagster/uri"] == "memory:workspace.01_bronze.supabase_policies"
    assert [column.name for column in metadata["dagster/column_schema"].columns] == ["id", "holder"]
    assert "| 0 | holder-0 |" in metadata["preview"]
    assert all(check.passed for check in result.get_asset_check_evaluations())


def test_changes_and_deletes_are_counted_and_an_empty_batch_wakes_nobody(instance: dg.DagsterInstance) -> None:
    engine = insurer()
    assert engine.source is not None
    versions = [version(replicate(engine, instance)) for _ in range(2)]
    engine.source.put("public.policies", {"id": [0, 1, 7], "holder": ["holder-0", "somebody else", "new"]})
    result = replicate(engine, instance)
    metadata = values(replicated(result)["supabase_policies"])
    assert (metadata["inserted"], metadata["updated"], metadata["deleted"]) == (1, 1, 1)
    versions.append(version(result))
    assert versions[0] == versions[1] != versions[2]


def test_a_subset_can_be_chosen(instance: dg.DagsterInstance) -> None:
    engine = insurer()
    assert set(replicated(replicate(engine, instance, only=[replica_key(CLAIMS)]))) == {"supabase_claims"}
    assert [table.table for table in engine.tables()] == ["workspace.01_bronze.supabase_claims"]


def test_one_table_that_fails_keeps_no_other_from_its_rows_and_checks(instance: dg.DagsterInstance) -> None:
    engine = failing(policies=[ReplicationError("It has no primary key. Add one.")] * 9)
    result = replicate(engine, instance)
    assert not result.success
    assert set(replicated(result)) == {"supabase_claims"}
    assert {check.asset_key for check in result.get_asset_check_evaluations()} >= {replica_key(CLAIMS)}
    assert all(check.passed for check in result.get_asset_check_evaluations())
    assert "public.policies: It has no primary key. Add one." in failure(result)
    assert "claims" not in failure(result)
    assert [source for source, _ in engine.requests] == ["policies", "claims"], "for good: not tried again"
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.tags[PERMANENT_FAILURE_TAG] == run.run_id


def test_a_transient_failure_is_tried_again_and_what_is_done_stays_done(instance: dg.DagsterInstance) -> None:
    engine = failing(claims=[SupabaseUnavailableError("no answer")])
    result = replicate(engine, instance, full=True, sweep=True)
    assert result.success
    full = ReplicateRequest(full=True, sweep=True)
    assert engine.requests == [
        ("policies", full),
        ("claims", full),
        ("policies", ReplicateRequest()),
        ("claims", full),
    ]


def test_a_mixed_failure_is_tried_again_and_names_all_tables(instance: dg.DagsterInstance) -> None:
    engine = failing(policies=[ReplicationError("no key")] * 9, claims=[SupabaseUnavailableError("no answer")] * 9)
    result = replicate(engine, instance)
    assert not result.success
    assert len(engine.requests) == 4
    assert "public.policies: no key" in failure(result)
    assert "public.claims: no answer" in failure(result)


def test_a_database_that_refuses_is_asked_once(instance: dg.DagsterInstance) -> None:
    """Ten refused logins lock the user out."""
    engine = failing()
    assert engine.source is not None
    engine.source.status = SourceStatus("refused", "The password of user reader is wrong. Set it.")
    result = replicate(engine, instance, only=BOTH)
    assert not result.success
    assert "The password of user reader is wrong. Set it." in failure(result)
    assert (engine.statuses, engine.requests) == (1, [])


def test_a_database_that_begins_to_refuse_is_not_asked_for_every_table(instance: dg.DagsterInstance) -> None:
    engine = failing()
    status = SourceStatus("refused", "The password of user reader is wrong. Set it.")

    class Turning(Failing):
        def replicate(self, *args: Any, **kwargs: Any) -> ReplicateReport:
            assert self.source is not None
            self.source.status = status
            return super().replicate(*args, **kwargs)

    assert engine.source is not None
    turning = Turning(engine.source, policies=[SupabaseError("no")])
    result = replicate(turning, instance, only=BOTH)
    assert not result.success
    assert [source for source, _ in turning.requests] == ["policies"]
    assert turning.statuses == 2
    assert "not tried" in failure(result)


def test_without_a_database_the_run_says_what_to_set(instance: dg.DagsterInstance) -> None:
    result = replicate(MemoryEngine(), instance)
    assert not result.success
    assert "SUPABASE_DB_URL" in failure(result)


def test_without_a_database_a_run_of_everything_loads_the_files_and_stays_green(instance: dg.DagsterInstance) -> None:
    engine = MemoryEngine()
    engine.volume.put("parquet/a.parquet", parquet_points())
    everything = definitions_of(engine).resolve_implicit_global_asset_job_def()
    result = everything.execute_in_process(instance=instance, raise_on_error=False)
    assert result.success
    assert {event.asset_key for event in result.get_asset_materialization_events() if event.asset_key} == {
        dg.AssetKey(["bronze", "telematics"]),
        dg.AssetKey(["bronze", "telematics_test"]),
    }
    said = [entry.user_message for entry in instance.all_logs(result.run_id)]
    assert [line for line in said if "left as they are" in line and "SUPABASE_DB_URL" in line]


def test_the_tables_of_the_database_are_seen(instance: dg.DagsterInstance) -> None:
    result = replicate(insurer(), instance)
    seen = {event.asset_key: values(event) for event in result.asset_observations_for_node("replicate_supabase")}
    assert set(seen) == {DATABASE_KEY, source_key(POLICIES), source_key(CLAIMS)}
    assert seen[DATABASE_KEY]["database"] == "A database in memory."
    assert seen[source_key(POLICIES)]["lag_seconds"] == 0.0


def observe(engine: MemoryEngine, instance: dg.DagsterInstance, *keys: dg.AssetKey) -> dg.ExecuteInProcessResult:
    job = dg.define_asset_job("look", selection=dg.AssetSelection.assets(*keys))
    definitions = dg.Definitions.merge(replicas_of(engine), dg.Definitions(jobs=[job]))
    return definitions.resolve_job_def("look").execute_in_process(instance=instance, raise_on_error=False)


def test_the_database_and_its_tables_can_be_observed_by_themselves(instance: dg.DagsterInstance) -> None:
    definitions = replicas_of(insurer())
    graph = definitions.resolve_asset_graph()
    # What can't be observed is counted as missing in the UI, however often it was seen.
    assert all(graph.get(key).is_observable for key in (DATABASE_KEY, source_key(POLICIES), source_key(CLAIMS)))

    result = observe(insurer(), instance, DATABASE_KEY, source_key(POLICIES))
    seen = {event.asset_key: values(event) for event in result.asset_observations_for_node("observe_supabase")}
    assert set(seen) == {DATABASE_KEY, source_key(POLICIES)}
    assert seen[source_key(POLICIES)]["database"] == "A database in memory."


def test_without_a_database_there_is_nothing_to_observe(instance: dg.DagsterInstance) -> None:
    result = observe(MemoryEngine(), instance, DATABASE_KEY)
    assert not result.success
    (record,) = instance.all_logs(result.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    assert record.dagster_event is not None
    assert "SUPABASE_DB_URL" in str(record.dagster_event.event_specific_data)


def test_a_database_that_does_not_answer_is_tried_again(instance: dg.DagsterInstance) -> None:
    engine = failing()
    assert engine.source is not None
    engine.source.status = SourceStatus("unreachable", "Nothing answers at 127.0.0.1:6543.")
    result = replicate(engine, instance, only=BOTH)
    assert not result.success
    assert "Nothing answers at 127.0.0.1:6543." in failure(result)
    assert [source for source, _ in engine.requests] == ["policies", "policies"], "one table for each attempt"
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert PERMANENT_FAILURE_TAG not in run.tags


def test_a_bug_is_named_as_one_and_stops_no_other_table(instance: dg.DagsterInstance) -> None:
    engine = failing(policies=[ZeroDivisionError("a bug")])
    result = replicate(engine, instance)
    assert not result.success
    assert set(replicated(result)) == {"supabase_claims"}
    assert "ZeroDivisionError: a bug. This is a fault of the program" in failure(result)


@pytest.mark.parametrize("name", ["public.claims", "supabase_claims", "claims"])
def test_run_config_is_for_all_tables_or_for_named_ones(instance: dg.DagsterInstance, name: str) -> None:
    engine = failing()
    replicate(engine, instance, sweep=True)
    replicate(engine, instance, full=True, tables=[name])
    assert engine.requests == [
        ("policies", ReplicateRequest(sweep=True)),
        ("claims", ReplicateRequest(sweep=True)),
        ("policies", ReplicateRequest()),
        ("claims", ReplicateRequest(full=True)),
    ]


def test_run_config_that_names_no_table_of_the_run_is_refused(instance: dg.DagsterInstance) -> None:
    engine = failing()
    result = replicate(engine, instance, full=True, tables=["public.claim"])
    assert "Tables: public.policies, public.claims." in failure(result)
    assert not engine.requests


def test_everything_a_report_holds_reaches_the_metadata(instance: dg.DagsterInstance) -> None:
    class Telling(MemoryEngine):
        def replicate(
            self,
            table: ReplicatedTable,
            request: ReplicateRequest | None = None,
            progress: ProgressListener | None = None,
        ) -> ReplicateReport:
            assert progress is not None
            progress(Progress("read", "reading rows of the table"))
            return replace(
                super().replicate(table, request, progress),
                position=4_711,
                lag_seconds=12.3456,
                schema_changes=(SchemaChange("premium", "DECIMAL(12,2)"),),
                notes=("column old is gone upstream",),
                anomalies=(Anomaly("valid_to", "infinity", 2, "infinity"),),
                blocker=Blocker("transaction", "4242 postgres psql", 601.0),
                yielded=True,
            )

    result = replicate(Telling(source=insurer().source), instance, POLICIES)
    metadata = values(replicated(result)["supabase_policies"])
    assert metadata["position"] == 4_711
    assert metadata["lag_seconds"] == 12.346
    assert metadata["columns_added"].__class__ is not str
    assert metadata["notes"] == "column old is gone upstream"
    assert [line.data["rows"] for line in metadata["anomalies"].records] == [2]
    assert metadata["blocker"] == "transaction 4242 postgres psql"
    assert metadata["blocker_seconds"] == 601.0
    assert "yielded" in metadata
    messages = [entry.user_message for entry in instance.all_logs(result.run_id)]
    assert "reading rows of the table" in messages
    assert any("3 inserted, 0 updated, 0 deleted, whole snapshot (first)" in message for message in messages)


def test_a_table_that_cannot_be_shown_is_replicated_all_the_same(instance: dg.DagsterInstance) -> None:
    class Blind(MemoryEngine):
        def read(self, *args: Any, **kwargs: Any) -> pa.Table:
            raise SupabaseError("a file is missing")

    result = replicate(Blind(source=insurer().source), instance, CLAIMS)
    assert result.success
    assert values(replicated(result)["supabase_claims"])["not_shown"] == "a file is missing"


def test_a_run_notes_its_process(instance: dg.DagsterInstance) -> None:
    run = instance.get_run_by_id(replicate(insurer(), instance).run_id)
    assert run is not None
    assert run.tags[PROCESS_TAG].startswith(run.run_id)


def test_the_graph_leads_from_the_database_to_the_bronze_tables() -> None:
    specs = {spec.key: spec for spec in replicas_of(insurer()).resolve_all_asset_specs()}
    assert [dep.asset_key for dep in specs[replica_key(POLICIES)].deps] == [source_key(POLICIES)]
    assert [dep.asset_key for dep in specs[source_key(POLICIES)].deps] == [DATABASE_KEY]
    assert source_key(POLICIES).path == ["supabase_data", "public", "policies"]
    assert replica_key(POLICIES).path == ["bronze", "supabase_policies"]


def test_a_table_is_overdue_only_if_it_says_when() -> None:
    table = replace(POLICIES, fresh_within_minutes=30)
    (fresh,) = replica_assets([table], Names()).specs
    assert fresh.freshness_policy == dg.FreshnessPolicy.time_window(fail_window=timedelta(minutes=30))
    (never,) = replica_assets([POLICIES], Names()).specs
    assert never.freshness_policy is None


def test_two_runs_do_not_wait_for_each_others_commit() -> None:
    assert replica_assets([POLICIES], Names()).op.pool == POOL


def test_without_tables_there_is_nothing_of_the_database(instance: dg.DagsterInstance) -> None:
    from telematics_assets.definitions import build_definitions
    from telematics_assets.settings import Settings

    definitions = build_definitions(settings=Settings(), tables=())
    assert not [key for key in definitions.resolve_all_asset_keys() if "supabase" in key.to_user_string()]
    assert not definitions.resolve_asset_graph().asset_check_keys & {
        dg.AssetCheckKey(DATABASE_KEY, "undeclared_tables")
    }


def version(result: dg.ExecuteInProcessResult) -> str:
    """The data version of the policies after a run."""
    return str((replicated(result)["supabase_policies"].tags or {})["dagster/data_version"])
