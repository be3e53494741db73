"""The sensors: what they notice, when they start a run, and what they say when they don't."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Iterator

import dagster as dg
import pytest
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from telematics_assets.assets.boundary import PERMANENT_FAILURE_TAG
from telematics_assets.assets.files import LIST_WHOLE_TAG, PROCESS_TAG
from telematics_assets.automation import STREAM_TAG, landing_sensor
from telematics_assets.catalog import TELEMATICS, FileStream
from telematics_assets.engines.base import IngestReport, IngestRequest, PendingFiles, ProgressListener
from telematics_assets.errors import CheckpointCorruptError, SchemaError, TelematicsError, VolumeUnavailableError
from telematics_assets.processes import process_identity
from telematics_assets.runs import ATTEMPT_TAG, FINGERPRINT_TAG, LAUNCH_SECONDS, MAX_RUNTIME_TAG
from telematics_assets.testing import MemoryEngine
from telematics_assets_tests.orchestra import definitions_of, load, parquet_points

MAX_RUN_SECONDS = 3600


class Stage:
    """One sensor over one engine and one Dagster instance, with a clock that can be put forward."""

    def __init__(self, engine: MemoryEngine, instance: dg.DagsterInstance, look_seconds: float = 10.0) -> None:
        self.engine = engine
        self.instance = instance
        self.ahead = 0.0
        self.cursor: str | None = None
        self._sensor = landing_sensor(
            TELEMATICS, 5, MAX_RUN_SECONDS, look_seconds, clock=lambda: time.time() + self.ahead
        )

    def tick(self) -> dg.SensorResult:
        context = dg.build_sensor_context(self.instance, self.cursor, resources={"engine": self.engine})
        result = self._sensor(context)
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor or self.cursor
        return result

    def request(self) -> dg.RunRequest:
        (request,) = self.tick().run_requests or ()
        return request

    def skip(self) -> str:
        result = self.tick()
        assert not result.run_requests
        assert isinstance(result.skip_reason, dg.SkipReason)
        assert result.skip_reason.skip_message
        return result.skip_reason.skip_message

    def land(self, *names: str) -> None:
        for name in names:
            self.engine.volume.put(f"parquet/{name}.parquet", parquet_points())

    def run(self, request: dg.RunRequest) -> dg.DagsterRun:
        """Execute a request as the daemon would."""
        result = load(self.engine, self.instance, tags=dict(request.tags))
        run = self.instance.get_run_by_id(result.run_id)
        assert run is not None
        return run

    def unfinished(self, status: dg.DagsterRunStatus, **tags: str) -> dg.DagsterRun:
        """A run that another process has started, or will."""
        location = RegisteredCodeLocationOrigin("telematics_assets")
        return self.instance.create_run_for_job(
            definitions_of(self.engine).resolve_job_def("load_telematics"),
            status=status,
            tags=tags,
            remote_job_origin=RemoteJobOrigin(RemoteRepositoryOrigin(location, "repository"), "load_telematics"),
        )


class Breaking(MemoryEngine):
    """Fails to load with the errors that are put into it."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[TelematicsError] = []

    def ingest(
        self, stream: FileStream, request: IngestRequest | None = None, progress: ProgressListener | None = None
    ) -> IngestReport:
        if self.errors:
            raise self.errors.pop()
        return super().ingest(stream, request, progress)


class Late(MemoryEngine):
    """Calls files late, and notes what a load is told."""

    def __init__(self) -> None:
        super().__init__()
        self.late = 0
        self.told: list[bool] = []

    def look(self, stream: FileStream) -> PendingFiles:
        return dataclasses.replace(super().look(stream), late=self.late)

    def ingest(
        self, stream: FileStream, request: IngestRequest | None = None, progress: ProgressListener | None = None
    ) -> IngestReport:
        assert request is not None
        self.told.append(request.list_whole)
        return super().ingest(stream, request, progress)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def stage(instance: dg.DagsterInstance) -> Stage:
    return Stage(MemoryEngine(), instance)


@pytest.fixture
def broken(instance: dg.DagsterInstance) -> tuple[Stage, Breaking]:
    engine = Breaking()
    stage = Stage(engine, instance)
    stage.land("a")
    return stage, engine


def test_nothing_new_is_said_with_figures(stage: Stage) -> None:
    assert stage.skip() == "Nothing new. Files: 0 known."


def test_all_new_files_become_one_run(stage: Stage) -> None:
    stage.land("a", "b", "c")
    request = stage.request()
    assert request.tags[STREAM_TAG] == "telematics"
    assert request.tags[ATTEMPT_TAG] == "1"
    assert request.tags[MAX_RUNTIME_TAG] == f"{MAX_RUN_SECONDS}"
    assert request.run_key == f"telematics-{request.tags[FINGERPRINT_TAG]}-1"
    assert stage.run(request).status == dg.DagsterRunStatus.SUCCESS
    assert stage.skip() == "Nothing new. Files: 3 known."


def test_a_run_for_a_late_file_is_told_to_list_the_whole_folder(instance: dg.DagsterInstance) -> None:
    engine = Late()
    stage = Stage(engine, instance)
    for number, name in enumerate(("in_order", "late")):
        engine.late = number
        stage.land(name)
        request = stage.request()
        assert (LIST_WHOLE_TAG in request.tags) == bool(number)
        assert stage.run(request).status == dg.DagsterRunStatus.SUCCESS
    assert engine.told == [False, True]


def test_the_same_files_are_the_same_request_so_that_dagster_starts_it_once(stage: Stage) -> None:
    stage.land("a")
    assert stage.request().run_key == stage.request().run_key
    stage.land("b")
    assert len({stage.request().run_key, stage.request().run_key}) == 1


def test_a_changed_listing_is_observed_once(stage: Stage) -> None:
    stage.land("a")
    (event,) = stage.tick().asset_events
    assert isinstance(event, dg.AssetObservation)
    assert event.asset_key == dg.AssetKey(["landing", "telematics"])
    assert event.tags == {"dagster/data_version": stage.engine.look(TELEMATICS).data_version}
    assert event.metadata["files_pending"].value == 1
    assert not stage.tick().asset_events
    stage.land("b")
    assert len(stage.tick().asset_events) == 1


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTED])
def test_a_run_in_flight_holds_the_next_one_back(stage: Stage, status: dg.DagsterRunStatus) -> None:
    run = stage.unfinished(status, **{STREAM_TAG: "telematics"})
    stage.land("a")
    assert f"/runs/{run.run_id}) is in flight" in stage.skip()


def test_a_run_that_a_person_started_holds_the_next_one_back(stage: Stage) -> None:
    job = definitions_of(stage.engine).resolve_implicit_global_asset_job_def()
    key = dg.AssetKey(["bronze", "telematics"])
    stage.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, asset_selection=frozenset([key]))
    stage.land("a")
    assert "in flight" in stage.skip()


def test_a_run_of_another_stream_is_no_hindrance(stage: Stage) -> None:
    job = definitions_of(stage.engine).resolve_job_def("load_telematics_test")
    stage.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    stage.land("a")
    assert stage.request()


def test_a_run_older_than_its_limit_no_longer_counts(stage: Stage) -> None:
    run = stage.unfinished(dg.DagsterRunStatus.STARTED, **{STREAM_TAG: "telematics", MAX_RUNTIME_TAG: "600"})
    stage.instance.add_run_tags(run.run_id, {PROCESS_TAG: f"{run.run_id} {process_identity()}"})
    stage.land("a")
    stage.ahead = 590
    assert "in flight" in stage.skip()
    stage.ahead = 610
    assert stage.request().tags[ATTEMPT_TAG] == "1"


def test_a_queued_run_counts_however_long_it_waits(stage: Stage) -> None:
    stage.unfinished(dg.DagsterRunStatus.QUEUED, **{STREAM_TAG: "telematics", MAX_RUNTIME_TAG: "60"})
    stage.land("a")
    stage.ahead = 7200
    assert "in flight" in stage.skip()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system does not tell when a process started")
def test_a_run_whose_process_was_killed_is_ended_and_the_next_one_starts(stage: Stage) -> None:
    stage.land("a")
    request = stage.request()
    run = stage.unfinished(dg.DagsterRunStatus.STARTED, **request.tags)
    with subprocess.Popen(["sleep", "60"]) as process:
        here = process_identity()
        there = f"{here.partition('/')[0]}/{process.pid}/1"
        process.kill()
    stage.instance.add_run_tags(run.run_id, {PROCESS_TAG: f"{run.run_id} {there}"})
    assert "ended as FAILURE" in stage.skip()
    ended = stage.instance.get_run_by_id(run.run_id)
    assert ended is not None
    assert ended.status == dg.DagsterRunStatus.FAILURE
    stage.ahead = 11
    assert stage.request().tags[ATTEMPT_TAG] == "2"


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
def test_a_run_that_was_killed_before_it_could_note_its_process_is_ended(
    stage: Stage, status: dg.DagsterRunStatus
) -> None:
    stage.land("a")
    run = stage.unfinished(status, **stage.request().tags)
    stage.ahead = LAUNCH_SECONDS - 10
    assert "in flight" in stage.skip()
    stage.ahead = LAUNCH_SECONDS + 10
    stage.tick()
    ended = stage.instance.get_run_by_id(run.run_id)
    assert ended is not None
    assert ended.status == dg.DagsterRunStatus.FAILURE


def test_a_larger_run_may_do_something_else_before_it_loads(stage: Stage) -> None:
    job = definitions_of(stage.engine).resolve_implicit_global_asset_job_def()
    keys = frozenset([dg.AssetKey(["bronze", "telematics"]), dg.AssetKey(["bronze", "telematics_test"])])
    stage.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, asset_selection=keys)
    stage.land("a")
    stage.ahead = LAUNCH_SECONDS + 10
    assert "in flight" in stage.skip()


def test_a_run_that_is_alive_or_inherited_its_note_is_left_alone(stage: Stage) -> None:
    gone = f"{process_identity().partition('/')[0]}/1/1"
    alive = stage.unfinished(dg.DagsterRunStatus.STARTED, **{STREAM_TAG: "telematics"})
    stage.instance.add_run_tags(alive.run_id, {PROCESS_TAG: f"{alive.run_id} {process_identity()}"})
    again = stage.unfinished(dg.DagsterRunStatus.STARTED, **{STREAM_TAG: "telematics"})
    stage.instance.add_run_tags(again.run_id, {PROCESS_TAG: f"{alive.run_id} {gone}"})
    stage.land("a")
    assert "in flight" in stage.skip()
    statuses = {record.dagster_run.status for record in stage.instance.get_run_records()}
    assert statuses == {dg.DagsterRunStatus.STARTED}


def test_transient_failures_back_off(broken: tuple[Stage, Breaking]) -> None:
    stage, engine = broken
    waits = []
    for attempt in range(1, 4):
        request = stage.request()
        assert request.tags[ATTEMPT_TAG] == f"{attempt}"
        engine.errors = [VolumeUnavailableError("no answer")] * 2
        run = stage.run(request)
        assert run.status == dg.DagsterRunStatus.FAILURE
        reason = stage.skip()
        assert f"/runs/{run.run_id}) ended as FAILURE" in reason
        waits.append(_seconds(reason))
        # The clock ran ahead of the run's own times: wait from there.
        stage.ahead += waits[-1] + 1
    assert waits[0] > 5
    stage.run(stage.request())
    assert "Nothing new" in stage.skip()


def test_a_permanent_failure_stops_until_something_changes(broken: tuple[Stage, Breaking]) -> None:
    stage, engine = broken
    engine.errors = [SchemaError("put the column back")]
    run = stage.run(stage.request())
    stage.ahead = 100_000
    assert f"/runs/{run.run_id}) failed for good" in stage.skip()
    stage.land("b")
    assert stage.request().tags[ATTEMPT_TAG] == "1"


def test_a_permanent_failure_may_be_retried_by_a_person(broken: tuple[Stage, Breaking]) -> None:
    stage, engine = broken
    engine.errors = [SchemaError("put the column back")]
    request = stage.request()
    failed = stage.run(request)
    # Re-executing a run in the UI copies its tags.
    inherited = {key: value for key, value in failed.tags.items() if key.startswith("telematics/")}
    assert PERMANENT_FAILURE_TAG in inherited
    engine.errors = [VolumeUnavailableError("no answer")] * 2
    again = load(engine, stage.instance, tags=inherited)
    assert not again.success
    assert f"/runs/{again.run_id}) ended as FAILURE" in stage.skip(), "its own failure is not for good"
    stage.ahead = 11
    assert stage.request().tags[ATTEMPT_TAG] == "2"


def test_files_that_a_successful_run_left_are_tried_again_later(stage: Stage) -> None:
    stage.land("a")
    request = stage.request()
    stage.run(request)
    fingerprint = request.tags[FINGERPRINT_TAG]

    class Sticky(MemoryEngine):
        def look(self, stream: FileStream) -> PendingFiles:
            return PendingFiles("telematics", 1, 1, fingerprint, 0, 0, 0, "v")

    stage = Stage(Sticky(), stage.instance)
    assert "ended as SUCCESS and left these files" in stage.skip()
    stage.ahead = 11
    assert stage.request().run_key == f"telematics-{fingerprint}-2"


@pytest.mark.parametrize(("limit", "starts"), [("60", False), ("0", True)])
def test_a_canceled_run_is_started_again_only_if_it_outlived_its_limit(stage: Stage, limit: str, starts: bool) -> None:
    stage.land("a")
    request = stage.request()
    run = stage.unfinished(dg.DagsterRunStatus.STARTED, **request.tags)
    stage.instance.add_run_tags(run.run_id, {MAX_RUNTIME_TAG: limit})
    stage.instance.report_run_canceled(run)
    stage.ahead = 100
    if starts:
        assert stage.request().tags[ATTEMPT_TAG] == "2"
    else:
        assert "was canceled" in stage.skip()


def test_an_attempt_is_never_numbered_like_an_older_one(stage: Stage) -> None:
    """Dagster would ignore a request whose key it has seen."""
    stage.land("a")
    request = stage.request()
    for attempt in ("3", "1"):
        run = stage.unfinished(dg.DagsterRunStatus.STARTED, **{**request.tags, ATTEMPT_TAG: attempt})
        stage.instance.report_run_failed(run)
    stage.ahead = 1000
    assert stage.request().tags[ATTEMPT_TAG] == "4"


class Blind(MemoryEngine):
    """Can't look."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def look(self, stream: FileStream) -> PendingFiles:
        raise self.error

    def ingest(
        self, stream: FileStream, request: IngestRequest | None = None, progress: ProgressListener | None = None
    ) -> IngestReport:
        raise self.error


def test_a_folder_that_does_not_answer_is_a_skipped_tick(instance: dg.DagsterInstance) -> None:
    stage = Stage(Blind(VolumeUnavailableError("stale file handle")), instance)
    assert stage.skip() == "The landing folder did not answer: stale file handle"


def test_a_broken_checkpoint_is_shown_once_at_the_asset(instance: dg.DagsterInstance) -> None:
    stage = Stage(Blind(CheckpointCorruptError("offsets/3 is cut short: rebuild")), instance)
    run = stage.run(stage.request())
    assert run.status == dg.DagsterRunStatus.FAILURE
    stage.ahead = 100_000
    reason = stage.skip()
    assert f"/runs/{run.run_id}) failed for good" in reason
    assert reason.endswith("offsets/3 is cut short: rebuild")


def test_a_bug_is_not_hidden(instance: dg.DagsterInstance) -> None:
    stage = Stage(Blind(ZeroDivisionError("a bug")), instance)
    with pytest.raises(ZeroDivisionError):
        stage.tick()


def test_a_slow_listing_ends_the_tick_and_serves_the_next_one(instance: dg.DagsterInstance) -> None:
    class Slow(MemoryEngine):
        def __init__(self) -> None:
            super().__init__()
            self.listed = threading.Event()
            self.looks = 0

        def look(self, stream: FileStream) -> PendingFiles:
            self.looks += 1
            assert self.listed.wait(10)
            return super().look(stream)

    engine = Slow()
    stage = Stage(engine, instance, look_seconds=0.05)
    stage.land("a")
    assert stage.skip() == stage.skip() == "Still listing after 0.05 s; the next tick goes on."
    engine.listed.set()
    assert _eventually(stage)
    assert engine.looks == 1


def _eventually(stage: Stage) -> dg.RunRequest:
    for _ in range(100):
        if requests := stage.tick().run_requests:
            return requests[0]
    raise AssertionError(stage.skip())


def _seconds(reason: str) -> float:
    return float(reason.partition("Next attempt in ")[2].partition(" s.")[0])
