"""Landing and bronze assets: what a run does, says and survives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import dagster as dg
import pytest

from telematics_assets.assets.boundary import PERMANENT_FAILURE_TAG
from telematics_assets.assets.files import PROCESS_TAG, bronze_asset
from telematics_assets.catalog import TELEMATICS, FileStream, Names
from telematics_assets.engines.base import IngestReport, IngestRequest, PendingFiles, Progress, ProgressListener
from telematics_assets.errors import SchemaError, VolumeUnavailableError
from telematics_assets.processes import is_gone
from telematics_assets.testing import MemoryEngine
from telematics_assets_tests.orchestra import definitions_of, json_points, load, materialization, parquet_points


class Failing(MemoryEngine):
    """Raises some errors, one per call, before it works."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self._errors = iter(errors)

    def ingest(
        self, stream: FileStream, request: IngestRequest | None = None, progress: ProgressListener | None = None
    ) -> IngestReport:
        for error in self._errors:
            raise error
        return super().ingest(stream, request, progress)


@pytest.fixture
def engine() -> MemoryEngine:
    return MemoryEngine()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.mark.parametrize(
    ("stream", "path", "data"),
    [("telematics", "parquet/a.parquet", parquet_points(3)), ("telematics_test", "json/a.json", json_points(3))],
)
def test_a_run_loads_what_has_landed_and_says_so(
    engine: MemoryEngine, instance: dg.DagsterInstance, stream: str, path: str, data: bytes
) -> None:
    engine.volume.put(path, data)
    result = load(engine, instance, stream)
    assert result.success
    metadata = {name: entry.value for name, entry in materialization(result, stream).metadata.items()}
    assert metadata["dagster/row_count"] == metadata["rows"] == 3
    assert metadata["files_ingested"] == 1
    assert metadata["dagster/uri"] == f"memory:workspace.01_bronze.{stream}"
    assert all(check.passed for check in result.get_asset_check_evaluations())
    assert len(result.get_asset_check_evaluations()) == 7


def test_an_empty_run_keeps_the_data_version_so_that_it_wakes_nobody(
    engine: MemoryEngine, instance: dg.DagsterInstance
) -> None:
    engine.volume.put("parquet/a.parquet", parquet_points())
    versions = [_version(load(engine, instance)) for _ in range(2)]
    engine.volume.put("parquet/b.parquet", parquet_points())
    versions.append(_version(load(engine, instance)))
    assert versions[0] == versions[1] != versions[2]


def test_a_run_before_anything_has_landed_succeeds(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    result = load(engine, instance)
    assert result.success
    assert materialization(result).metadata["dagster/row_count"].value == 0


def test_run_config_limits_the_files(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    for name in "abc":
        engine.volume.put(f"parquet/{name}.parquet", parquet_points())
    assert materialization(load(engine, instance, max_files=2)).metadata["files_ingested"].value == 2
    assert materialization(load(engine, instance)).metadata["files_ingested"].value == 1


def test_run_config_refuses_a_limit_of_no_files(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    engine.volume.put("parquet/a.parquet", parquet_points())
    assert not load(engine, instance, max_files=0).success
    assert engine.look(TELEMATICS).files == 1


def test_run_config_asks_for_a_full_refresh_and_the_metadata_say_so(
    engine: MemoryEngine, instance: dg.DagsterInstance
) -> None:
    for name in "abc":
        engine.volume.put(f"parquet/{name}.parquet", parquet_points(trip_id=[name, name, name]))
    assert materialization(load(engine, instance)).metadata["operation"].value == "load"
    result = load(engine, instance, full_refresh=True)
    assert result.success
    metadata = materialization(result).metadata
    assert metadata["operation"].value == "full_refresh"
    assert metadata["rows"].value == metadata["dagster/row_count"].value == 9
    assert all(check.passed for check in result.get_asset_check_evaluations())
    assert all(check.passed for check in load(engine, instance).get_asset_check_evaluations())
    engine.volume.delete("parquet/a.parquet")
    assert not load(engine, instance, full_refresh=True).success
    assert materialization(load(engine, instance, full_refresh=True, force=True)).metadata["rows"].value == 6


def test_run_config_asks_for_a_retry_and_the_metadata_say_what_became_of_it(
    engine: MemoryEngine, instance: dg.DagsterInstance
) -> None:
    engine.volume.put("parquet/a.parquet", b"PAR1 broken PAR1")
    load(engine, instance)
    metadata = materialization(load(engine, instance, retry_files=["a.parquet"])).metadata
    assert metadata["operation"].value == "retry"
    (record,) = metadata["retried_files"].value.records  # type: ignore[union-attr]
    assert (record.data["path"], record.data["after"]) == ("parquet/a.parquet", "SKIPPED_CORRUPTED")
    assert not load(engine, instance, retry_files=["nope.parquet"]).success


def test_run_config_asks_for_a_back_fill(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    engine.volume.put("parquet/old/a.parquet", parquet_points(), modified_ns=10**9)
    engine.volume.put("parquet/new/b.parquet", parquet_points())
    result = load(engine, instance, backfill_folder="old", backfill_modified_before="2000-01-01")
    metadata = materialization(result).metadata
    assert (metadata["operation"].value, metadata["files_ingested"].value) == ("backfill", 1)
    assert engine.look(TELEMATICS).files == 1
    assert not load(engine, instance, backfill_folder="old", full_refresh=True).success


def test_a_transient_error_is_tried_again_in_the_run(instance: dg.DagsterInstance) -> None:
    engine = Failing(VolumeUnavailableError("no answer"))
    engine.volume.put("parquet/a.parquet", parquet_points())
    result = load(engine, instance)
    assert result.success
    assert len(result.filter_events(lambda event: event.is_step_restarted)) == 1
    assert materialization(result).metadata["rows"].value == 3


def test_a_transient_error_that_stays_fails_the_run_but_not_for_good(instance: dg.DagsterInstance) -> None:
    result = load(Failing(*[VolumeUnavailableError("no answer")] * 2), instance)
    assert not result.success
    assert PERMANENT_FAILURE_TAG not in _tags(instance, result)


def test_a_permanent_error_fails_at_once_with_its_message(instance: dg.DagsterInstance) -> None:
    result = load(Failing(SchemaError("column a is gone: put it back")), instance)
    assert not result.success
    assert not result.filter_events(lambda event: event.is_step_up_for_retry)
    (failure,) = [event for event in result.get_step_failure_events() if event.step_key == "bronze__telematics"]
    data = failure.step_failure_data
    assert data.user_failure_data is not None
    assert data.user_failure_data.description == "column a is gone: put it back"
    assert data.user_failure_data.metadata["error"].value == "SchemaError"
    assert _tags(instance, result)[PERMANENT_FAILURE_TAG] == result.run_id


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyError("column"), ZeroDivisionError("by zero")])
def test_what_nobody_raised_on_purpose_fails_at_once_and_is_not_tried_again(
    instance: dg.DagsterInstance, error: Exception
) -> None:
    engine = Failing(error)
    engine.volume.put("parquet/a.parquet", parquet_points())
    result = load(engine, instance)
    assert not result.success
    assert not result.filter_events(lambda event: event.is_step_up_for_retry)
    (failure,) = [event for event in result.get_step_failure_events() if event.step_key == "bronze__telematics"]
    data = failure.step_failure_data
    assert data.user_failure_data is not None
    assert (data.user_failure_data.description or "").startswith(f"{type(error).__name__}: ")
    assert data.error is not None
    assert "ingest" in str(data.error.cause), "where it came from is shown"
    assert _tags(instance, result)[PERMANENT_FAILURE_TAG] == result.run_id
    assert load(engine, instance).success


def test_a_run_notes_its_process(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    result = load(engine, instance)
    run_id, _, process = _tags(instance, result)[PROCESS_TAG].partition(" ")
    assert run_id == result.run_id
    assert not is_gone(process)


class Chatty(MemoryEngine):
    """Tells about every row."""

    def ingest(
        self, stream: FileStream, request: IngestRequest | None = None, progress: ProgressListener | None = None
    ) -> IngestReport:
        assert progress is not None
        for row in range(1_000):
            progress(Progress("read", f"row {row} of a chatty engine"))
        return super().ingest(stream, request, progress)


def test_progress_is_logged_but_does_not_flood_the_log(instance: dg.DagsterInstance) -> None:
    result = load(Chatty(), instance)
    said = [entry for entry in instance.all_logs(result.run_id) if "of a chatty engine" in entry.user_message]
    assert 1 <= len(said) < 10


def test_observing_the_landing_folder_reports_its_version(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    engine.volume.put("parquet/a.parquet", parquet_points())
    first = _observe(engine, instance)
    assert first.metadata["files_pending"].value == 1
    assert first.metadata["dagster/uri"].value == f"{engine.volume.uri}/parquet"
    same = _observe(engine, instance)
    engine.volume.put("parquet/b.parquet", parquet_points())
    other = _observe(engine, instance)
    versions = [event.tags["dagster/data_version"] for event in (first, same, other)]
    assert versions[0] == versions[1] != versions[2]


class Blind(MemoryEngine):
    """Can't look, for good."""

    def look(self, stream: FileStream) -> PendingFiles:
        raise SchemaError("nothing to see")


def test_observing_what_cannot_be_looked_at_fails_for_good(instance: dg.DagsterInstance) -> None:
    with pytest.raises(dg.Failure, match="nothing to see"):
        _observe(Blind(), instance)


def _version(result: dg.ExecuteInProcessResult) -> str:
    tags = materialization(result).tags
    assert tags is not None
    return tags["dagster/data_version"]


def _tags(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> Any:
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    return run.tags


def _observe(engine: MemoryEngine, instance: dg.DagsterInstance) -> dg.AssetObservation:
    look = dg.define_asset_job("look", selection=dg.AssetSelection.assets(["landing", "telematics"]))
    definitions = dg.Definitions.merge(definitions_of(engine), dg.Definitions(jobs=[look]))
    result = definitions.resolve_job_def("look").execute_in_process(instance=instance)
    (event,) = result.asset_observations_for_node("observe_telematics")
    return event


def test_a_table_is_overdue_only_if_its_stream_says_so() -> None:
    hourly = replace(TELEMATICS, fresh_within_hours=1.5)
    idle, fresh = (bronze_asset(stream, Names()) for stream in (TELEMATICS, hourly))
    assert next(iter(idle.specs)).freshness_policy is None
    policy = next(iter(fresh.specs)).freshness_policy
    assert policy == dg.FreshnessPolicy.time_window(fail_window=timedelta(minutes=90))
