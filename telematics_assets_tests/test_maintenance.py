"""Maintenance in Dagster: one op for each table, its counts in sight, its schedule there and off."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest

from telematics_assets.catalog import FILE_STREAMS, TELEMATICS, TELEMATICS_TEST, FileStream
from telematics_assets.definitions import build_definitions
from telematics_assets.engines.base import MaintenanceReport
from telematics_assets.errors import TableMovedError, VolumeUnavailableError
from telematics_assets.metadata import load_metadata, maintenance_metadata
from telematics_assets.settings import Settings
from telematics_assets.testing import MemoryEngine, json_bytes
from telematics_assets_tests.orchestra import POLICIES, insurer, replicas_of

STREAM = TELEMATICS_TEST.with_options(
    clean_source="MOVE", clean_source_retention_duration="0 days", clean_source_move_destination="_archive"
)


def defined(engine: MemoryEngine, *streams: FileStream) -> dg.Definitions:
    """The code location of some streams, over an engine in memory."""
    return build_definitions(streams, Settings(), engine, engine.volume, retry_policy=None, tables=())


def maintained(engine: MemoryEngine, *streams: FileStream) -> dg.ExecuteInProcessResult:
    """Run the job."""
    job = defined(engine, *streams).get_job_def("maintenance")
    return job.execute_in_process(instance=dg.DagsterInstance.ephemeral(), raise_on_error=False)


def counts(result: dg.ExecuteInProcessResult, op: str) -> dict[str, Any]:
    """What the op's output says in the UI."""
    (event,) = [e for e in result.all_events if e.is_successful_output and e.step_key == op]
    return {name: value.value for name, value in event.step_output_data.metadata.items()}


def test_the_job_maintains_every_table_and_shows_what_it_did() -> None:
    engine = MemoryEngine()
    for number in range(3):
        engine.volume.put(f"json/{number}.json", json_bytes([{"vehicle_id": f"v{number}"}]))
        engine.ingest(TELEMATICS_TEST)
    result = maintained(engine, TELEMATICS, STREAM)
    assert result.success
    seen = counts(result, "maintain_telematics_test")
    assert (seen["sources_moved"], seen["ledger_parts_before"], seen["ledger_parts_after"]) == (3, 3, 1)
    assert seen["dagster/table_name"] == "workspace.01_bronze.telematics_test"
    assert counts(result, "maintain_telematics")["notes"] == "the stream has no table yet"


def test_one_table_that_fails_for_good_keeps_no_other_from_its_maintenance() -> None:
    class Moved(MemoryEngine):
        def maintain(self, stream: Any, progress: Any = None) -> MaintenanceReport:
            if stream.name == "telematics":
                raise TableMovedError("The table was restored. Choose.")
            return super().maintain(stream, progress)

    result = maintained(Moved(), TELEMATICS, TELEMATICS_TEST)
    assert not result.success
    (failure,) = [e for e in result.all_events if e.is_step_failure]
    assert failure.step_key == "maintain_telematics"
    assert "Choose." in str(failure.step_failure_data.user_failure_data)
    assert not any(e.is_step_up_for_retry for e in result.all_events)
    assert "notes" in counts(result, "maintain_telematics_test")


def test_the_schedule_is_there_daily_and_off() -> None:
    (schedule,) = defined(MemoryEngine(), TELEMATICS).schedules or ()
    assert isinstance(schedule, dg.ScheduleDefinition)
    assert schedule.name == "maintenance_daily"
    assert schedule.cron_schedule == "30 2 * * *"
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    assert schedule.job_name == "maintenance"


def test_counts_are_plain_numbers_and_notes_only_stand_where_there_are_some() -> None:
    metadata = maintenance_metadata(MaintenanceReport("s", "a.b.c", 7, files_before=3, seconds=0.12345))
    assert (metadata["table_version"], metadata["files_before"], metadata["seconds"]) == (7, 3, 0.123)
    assert "notes" not in metadata
    assert maintenance_metadata(MaintenanceReport("s", "a.b.c", notes=("one", "two")))["notes"] == "one\ntwo"


@pytest.mark.parametrize("fails", [False, True])
def test_a_load_shows_what_clean_source_did_when_it_did_something(fails: bool) -> None:
    engine = MemoryEngine()
    assert "files_cleaned" not in load_metadata(engine, STREAM, engine.ingest(STREAM))
    engine.volume.put("json/a.json", json_bytes([{"vehicle_id": "v"}]))
    if fails:

        def no_answer(*_: Any, **__: Any) -> bool:
            raise VolumeUnavailableError("time-out. It may go through later.")

        engine.volume.upload = no_answer  # type: ignore[method-assign]
    metadata = load_metadata(engine, STREAM, engine.ingest(STREAM))
    assert metadata["rows"] == 1
    assert metadata.get("files_cleaned") == (None if fails else 1)
    assert ("time-out" in metadata.get("cleaning_problem", "")) == fails


def test_every_stream_has_its_op() -> None:
    job = defined(MemoryEngine(), *FILE_STREAMS).get_job_def("maintenance")
    assert {node.name for node in job.nodes} == {f"maintain_{stream.name}" for stream in FILE_STREAMS}


def test_replicated_tables_have_theirs() -> None:
    engine = insurer()
    engine.replicate(POLICIES)
    job = replicas_of(engine).get_job_def("maintenance")
    result = job.execute_in_process(instance=dg.DagsterInstance.ephemeral())
    seen = counts(result, "maintain_supabase_policies")
    assert seen["dagster/table_name"] == "workspace.01_bronze.supabase_policies"
    assert "notes" not in seen
    assert counts(result, "maintain_supabase_claims")["notes"] == "there is no table yet"
