"""The triggers of the replicated tables: when a run starts, what it is asked, and what a tick says when none does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from telematics_assets.assets.supabase import DATABASE_KEY, replica_key
from telematics_assets.catalog import ReplicatedTable
from telematics_assets.engines.base import Engine, SourceStatus
from telematics_assets.errors import SettingsError
from telematics_assets.replication import SOURCE_TAG, replication_schedule, replication_sensor
from telematics_assets.runs import ATTEMPT_TAG, FINGERPRINT_TAG, LAUNCH_SECONDS, MAX_RUNTIME_TAG
from telematics_assets.settings import load_settings
from telematics_assets.testing import MemoryEngine
from telematics_assets_tests.orchestra import CLAIMS, POLICIES, insurer, replicas_of, replicate

TABLES = (POLICIES, CLAIMS)
CHEAP = {"contract", "lag", "blocked_cut", "anomalies"}
COSTLY = {"drift", "reconciliation", "primary_key"}


class ContextInMemory(dg.ScheduleEvaluationContext):
    """Dagster's own would open an instance on disk, where every run takes seconds."""

    records: dg.DagsterInstance

    @property
    def instance(self) -> dg.DagsterInstance:
        return self.records


class Clockwork:
    """The triggers over one engine and one Dagster instance, with a clock that can be put forward."""

    def __init__(self, engine: Engine, instance: dg.DagsterInstance, look_seconds: float = 10.0) -> None:
        self.engine = engine
        self.instance = instance
        self.ahead = 0.0

        def clock() -> float:
            return time.time() + self.ahead

        self.schedule = replication_schedule(TABLES, 5, 3600, look_seconds, clock)
        self.sensor = replication_sensor(TABLES, 5, 3600, look_seconds, clock)

    def tick(self) -> dg.RunRequest | str:
        """What the schedule asks for, or why it skips."""
        resources: Any = {"engine": self.engine}
        context = ContextInMemory(None, None, resources=resources)
        context.records = self.instance
        return _answer(self.schedule.evaluate_tick(context))

    def look(self) -> dg.RunRequest | str:
        """What the sensor asks for, or why it skips."""
        context = dg.build_sensor_context(self.instance, resources={"engine": self.engine})
        return _answer(self.sensor.evaluate_tick(context))

    def request(self) -> dg.RunRequest:
        found = self.tick()
        assert isinstance(found, dg.RunRequest), found
        return found

    def skip(self) -> str:
        found = self.tick()
        assert isinstance(found, str), found
        return found

    def run(self, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
        """Do what Dagster does with a request."""
        job = replicas_of(self.engine, retries=0).resolve_job_def("replicate")
        checks = None if request.asset_check_keys is None else {*request.asset_check_keys}
        subset = job.get_subset(asset_selection={*(request.asset_selection or ())}, asset_check_selection=checks)
        return subset.execute_in_process(instance=self.instance, tags=request.tags, raise_on_error=False)

    def unfinished(self, status: dg.DagsterRunStatus, **tags: str) -> dg.DagsterRun:
        job = replicas_of(self.engine).resolve_job_def("replicate")
        repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("telematics_assets"), "repository")
        origin = RemoteJobOrigin(repository, "replicate")
        return self.instance.create_run_for_job(job, status=status, tags=tags, remote_job_origin=origin)


def _answer(tick: Any) -> dg.RunRequest | str:
    if tick.run_requests:
        (request,) = tick.run_requests
        assert isinstance(request, dg.RunRequest)
        return request
    assert tick.skip_message
    return str(tick.skip_message)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def clockwork(instance: dg.DagsterInstance) -> Clockwork:
    return Clockwork(insurer(), instance)


def say(clockwork: Clockwork, state: Any, message: str) -> None:
    """Let the database be in some state."""
    assert isinstance(clockwork.engine, MemoryEngine)
    assert clockwork.engine.source is not None
    clockwork.engine.source.status = SourceStatus(state, message)


def check_names(request: dg.RunRequest, table: ReplicatedTable = POLICIES) -> set[str]:
    return {key.name for key in request.asset_check_keys or () if key.asset_key == replica_key(table)}


def test_a_tick_asks_for_one_run_of_all_tables(clockwork: Clockwork) -> None:
    request = clockwork.request()
    assert set(request.asset_selection or ()) == {replica_key(POLICIES), replica_key(CLAIMS)}
    assert request.tags[MAX_RUNTIME_TAG] == "3600"
    result = clockwork.run(request)
    assert result.success
    assert len(result.asset_materializations_for_node("replicate_supabase")) == 2


def test_costly_checks_are_asked_when_they_are_due(clockwork: Clockwork) -> None:
    first = clockwork.request()
    assert check_names(first) == CHEAP | COSTLY
    assert dg.AssetCheckKey(DATABASE_KEY, "undeclared_tables") in (first.asset_check_keys or ())
    result = clockwork.run(first)
    assert {each.check_name for each in result.get_asset_check_evaluations()} == CHEAP | COSTLY | {"undeclared_tables"}
    second = clockwork.request()
    assert check_names(second) == CHEAP
    assert check_names(second, CLAIMS) == CHEAP - {"contract"}
    result = clockwork.run(second)
    assert result.success
    assert {each.check_name for each in result.get_asset_check_evaluations()} == CHEAP
    clockwork.ahead = POLICIES.sweep_hours * 3600 + 1
    assert check_names(clockwork.request()) == CHEAP | COSTLY


def test_a_costly_check_that_could_not_be_answered_is_not_asked_with_every_run(instance: dg.DagsterInstance) -> None:
    class Mute(MemoryEngine):
        def replicate(self, *args: Any, **kwargs: Any) -> Any:
            raise SettingsError("the table is declared wrongly")

    clockwork = Clockwork(Mute(source=insurer().source), instance)
    clockwork.run(clockwork.request())
    assert check_names(clockwork.request()) == CHEAP


def test_without_a_database_a_tick_skips_and_says_what_to_set(instance: dg.DagsterInstance) -> None:
    clockwork = Clockwork(MemoryEngine(), instance)
    assert clockwork.skip().startswith("No Supabase database is configured. Set SUPABASE_DB_URL")
    assert clockwork.look() == clockwork.skip()


def test_a_database_that_does_not_answer_is_a_skipped_tick(clockwork: Clockwork) -> None:
    say(clockwork, "unreachable", "Nothing answers at 127.0.0.1:6543. Start it.")
    assert clockwork.skip() == clockwork.look() == "Nothing answers at 127.0.0.1:6543. Start it."


def test_a_database_that_refuses_for_good_is_shown_once_at_the_assets(clockwork: Clockwork) -> None:
    message = "The password of user reader is wrong. Set it."
    say(clockwork, "refused", message)
    assert clockwork.look() == message
    run = clockwork.run(clockwork.request())
    assert not run.success
    clockwork.ahead = 100_000
    reason = clockwork.skip()
    assert f"/runs/{run.run_id}) failed for good" in reason
    assert reason.endswith(message)
    say(clockwork, "refused", "The project is paused. Restore it.")
    assert clockwork.request()
    say(clockwork, "ready", "there")
    assert clockwork.request()


def test_a_slow_answer_ends_the_tick_and_serves_the_next_one(instance: dg.DagsterInstance) -> None:
    class Slow(MemoryEngine):
        answered = threading.Event()
        asked = 0

        def source_status(self) -> SourceStatus:
            self.asked += 1
            assert self.answered.wait(10)
            return super().source_status()

    engine = Slow(source=insurer().source)
    clockwork = Clockwork(engine, instance, look_seconds=0.05)
    assert clockwork.skip() == clockwork.skip()
    assert clockwork.skip() == "The database has not answered within 0.05 s; the next tick goes on."
    engine.answered.set()
    for _ in range(100):
        if not isinstance(clockwork.tick(), str):
            break
    else:
        raise AssertionError(clockwork.tick())
    assert engine.asked == 1


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTED])
def test_no_second_run_while_one_is_in_flight(clockwork: Clockwork, status: dg.DagsterRunStatus) -> None:
    clockwork.unfinished(status, **{SOURCE_TAG: "supabase"})
    assert "in flight" in clockwork.skip()
    assert "in flight" in str(clockwork.look())


def test_a_run_that_a_person_started_for_one_table_counts_as_well(clockwork: Clockwork) -> None:
    job = replicas_of(clockwork.engine).resolve_implicit_global_asset_job_def()
    keys = frozenset([replica_key(CLAIMS)])
    clockwork.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, asset_selection=keys)
    assert "in flight" in clockwork.skip()


def test_a_run_that_was_killed_before_it_could_note_its_process_is_ended(clockwork: Clockwork) -> None:
    run = clockwork.unfinished(dg.DagsterRunStatus.STARTED, **{SOURCE_TAG: "supabase"})
    clockwork.ahead = LAUNCH_SECONDS + 10
    assert clockwork.request()
    ended = clockwork.instance.get_run_by_id(run.run_id)
    assert ended is not None
    assert ended.status == dg.DagsterRunStatus.FAILURE


def test_the_job_bears_the_tag_that_the_triggers_look_for(clockwork: Clockwork) -> None:
    run = clockwork.instance.get_run_by_id(replicate(clockwork.engine, clockwork.instance).run_id)
    assert run is not None
    assert run.tags[SOURCE_TAG] == "supabase"


def test_the_sensor_asks_for_the_tables_that_moved_on(clockwork: Clockwork) -> None:
    replicate(clockwork.engine, clockwork.instance)
    assert clockwork.look() == "Nothing new in 2 tables."
    assert isinstance(clockwork.engine, MemoryEngine)
    assert clockwork.engine.source is not None
    clockwork.engine.source.put("public.claims", {"id": [5], "amount": [0.5]})
    request = clockwork.look()
    assert isinstance(request, dg.RunRequest)
    assert request.asset_selection == [replica_key(CLAIMS)]
    assert check_names(request, CLAIMS) == CHEAP - {"contract"}
    assert not check_names(request)
    assert clockwork.run(request).success
    assert clockwork.look() == "Nothing new in 2 tables."


def test_changes_that_a_run_could_not_take_yet_are_tried_again_later(instance: dg.DagsterInstance) -> None:
    """An open transaction holds the cut."""

    class Held(MemoryEngine):
        held = False

        def replicate(self, table: ReplicatedTable, *args: Any) -> Any:
            return super().replicate(POLICIES if self.held else table, *args)

    engine = Held(source=insurer().source)
    clockwork = Clockwork(engine, instance)
    replicate(engine, instance)
    engine.held = True
    assert engine.source is not None
    engine.source.put("public.claims", {"id": [5], "amount": [0.5]})
    request = clockwork.look()
    assert isinstance(request, dg.RunRequest)
    assert request.tags[ATTEMPT_TAG] == "1"
    clockwork.run(request)
    held = str(clockwork.look())
    assert "Next attempt in" in held
    assert held.endswith("Changed: public.claims.")
    clockwork.ahead = 700
    again = clockwork.look()
    assert isinstance(again, dg.RunRequest)
    assert (again.tags[ATTEMPT_TAG], again.tags[FINGERPRINT_TAG]) == ("2", request.tags[FINGERPRINT_TAG])


def test_the_schedule_is_on_and_the_sensor_is_off() -> None:
    schedule, sensor = replication_schedule(TABLES), replication_sensor(TABLES)
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    assert schedule.cron_schedule == "*/5 * * * *"
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED


@pytest.mark.parametrize(
    ("minutes", "cron"), [("1", "*/1 * * * *"), ("60", "0 */1 * * *"), ("240", "0 */4 * * *"), ("1440", "0 0 * * *")]
)
def test_the_interval_is_a_setting(minutes: str, cron: str) -> None:
    settings = load_settings({"TELEMATICS_REPLICATE_MINUTES": minutes})
    assert replication_schedule(TABLES, settings.replicate_minutes).cron_schedule == cron


@pytest.mark.parametrize("minutes", ["0", "7", "often", "2.5", "90"])
def test_an_interval_that_divides_no_hour_is_refused(minutes: str) -> None:
    with pytest.raises(SettingsError, match=r"TELEMATICS_REPLICATE_MINUTES=.* 1, 2, 3, 4, 5, 6, 10"):
        load_settings({"TELEMATICS_REPLICATE_MINUTES": minutes})
