"""The demo: three waves of files and three rounds of a business, brought into bronze as they are in earnest.

Belongs here: the order of events, the part of the daemon in this one process, and what is said meanwhile.
Does not belong here: the files (`fleet.py`), the database (`insurer.py`), the sensors' decisions (`automation.py`), how
anything is loaded.

Files are found by the real sensors, the database is asked by the real schedule, and the real jobs do the work. All of
it is recorded in the instance at `DAGSTER_HOME`, so that the UI shows the demo's history.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import DagsterEventType
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from telematics_assets.assets.files import pool_name
from telematics_assets.assets.supabase import POOL, replica_key
from telematics_assets.catalog import FILE_STREAMS, REPLICATED_TABLES, FileStream, Names, ReplicatedTable
from telematics_assets.dagster_home import prepare_dagster_home
from telematics_assets.definitions import build_definitions
from telematics_assets.demo.fleet import FleetPlan, next_seed, simulate
from telematics_assets.deployment import open_engine
from telematics_assets.engines.checkpointed import open_volume
from telematics_assets.errors import MissingExtraError, PermanentError, PostgresStartError, RunLimitError

if TYPE_CHECKING:
    from telematics_assets.demo.local_supabase import LocalSupabase
    from telematics_assets.engines.base import Engine
    from telematics_assets.settings import Settings
    from telematics_assets.volumes.base import Volume

#: The waves: name, drift, dirt.
WAVES = (("clean", False, False), ("drifted", True, False), ("dirty", False, True))

#: The rounds of the demo's database: name, whether its business goes on. A database that is not new has seen the first.
ROUNDS = (("first look", False), ("business goes on", True))

_COUNTED = ("inserted", "updated", "deleted")
_VEHICLES, _FILES, _ROWS = 12, 4, 3000
#: Sensors that find files and start nothing for this long have a reason that waiting won't change.
_PATIENCE_S = 30.0
_ERROR_EVENTS = {DagsterEventType.STEP_FAILURE, DagsterEventType.STEP_UP_FOR_RETRY, DagsterEventType.RUN_FAILURE}
_REPOSITORY_TAG = ".dagster/repository"


@dataclass(frozen=True, slots=True)
class TableSummary:
    """A table after the demo.

    Attributes:
        table: Full table name.
        files: Files whose rows are in it.
        rows: Its rows.
        rows_rescued: Rows with something in the rescued data column.
        rows_corrupt: Rows whose record could not be parsed.
        files_quarantined: Files that could not be read.
        version: Its Delta version.
    """

    table: str
    files: int
    rows: int
    rows_rescued: int
    rows_corrupt: int
    files_quarantined: int
    version: int


@dataclass(frozen=True, slots=True)
class MirrorSummary:
    """A mirrored table after the demo.

    Attributes:
        table: Full table name.
        source: Schema and table in the demo's database.
        rows: Its rows.
        inserted: Rows that came in the demo's rounds.
        updated: Rows that were replaced in them.
        deleted: Rows that went in them.
        version: Its Delta version.
    """

    table: str
    source: str
    rows: int
    inserted: int
    updated: int
    deleted: int
    version: int | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What the demo did.

    Attributes:
        waves: Waves that landed.
        runs: Ids of the Dagster runs, in order.
        tables: The tables of files as they are now.
        mirrors: The tables of the demo's database as they are now; none if it was not started.
        dagster_home: Where the history is.
        export: The shell line that lets bare `dagster dev` and `dg` find it.
        seconds: How long it took.
    """

    waves: int
    runs: tuple[str, ...]
    tables: tuple[TableSummary, ...]
    mirrors: tuple[MirrorSummary, ...]
    dagster_home: str
    export: str
    seconds: float


def tell(
    settings: Settings,
    *,
    console: Console,
    timeout_s: float = 120.0,
    streams: Sequence[FileStream] = FILE_STREAMS,
    replicated: Sequence[ReplicatedTable] = REPLICATED_TABLES,
) -> Summary:
    """Land three waves of files and let Dagster load each; then let the insurer's business go on, and mirror it.

    Args:
        settings: The deployment.
        console: Where each phase is told; it must know its own stream, because standard error is silenced meanwhile.
        timeout_s: Hard time limit.
        streams: The streams to land files for.
        replicated: The tables of the demo's database to mirror; it is not started if there are none.

    Raises:
        RunLimitError: If it takes longer; the message says what it was doing and why. Its thread may still be at work
            then: end the process.
        PermanentError: If a run failed, with that run's own error, or a sensor refused to start one.
    """
    story = _Story(settings, console, streams, replicated)
    # Runs write colored logs of their own to standard error; the instance keeps the same lines for the UI.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A call into a library can't be interrupted, but it can be left behind.
        future = ThreadPoolExecutor(1, thread_name_prefix="demo").submit(story.tell)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.done():
                raise
            reason = story.abandon(f"The demo's time limit of {timeout_s:g} s was over.")
            raise RunLimitError(
                f"The demo took longer than {timeout_s:g} s. It was {story.doing}. {reason or 'No run had failed.'} "
                "Give it more time with --timeout, or look at the run in the UI (make dev)."
            ) from None
        except KeyboardInterrupt:
            story.abandon("The demo was interrupted.")
            raise


class _Story:
    """One telling; `doing` says at any moment what it is busy with."""

    def __init__(
        self,
        settings: Settings,
        console: Console,
        streams: Sequence[FileStream],
        replicated: Sequence[ReplicatedTable] = (),
    ) -> None:
        self._settings = settings
        self._console = console
        self._streams = streams
        self._replicated = replicated
        self._instance: dg.DagsterInstance | None = None
        self._run_id: str | None = None
        self._runs: list[str] = []
        self._abandoned = False
        self.doing = "starting"

    def tell(self) -> Summary:
        began = time.monotonic()
        with self._phase("preparing Dagster"):
            folder = self._settings.dagster_home or self._settings.default_dagster_home
            home = prepare_dagster_home(folder, [*(pool_name(stream) for stream in self._streams), POOL])
            definitions = build_definitions(self._streams, self._settings, tables=self._replicated)
            engine, volume = open_engine(self._settings), open_volume(self._settings)
        with dg.DagsterInstance.from_config(str(home)) as instance, self._database() as database:
            self._instance = instance
            daemon = _Daemon(definitions, instance)
            for number, (name, drift, dirty) in enumerate(WAVES, 1):
                label = f"wave {number}/{len(WAVES)} {name}"
                self._land(label, volume, drift=drift, dirty=dirty)
                self._load(label, engine, daemon)
            mirrors = self._mirror(daemon, database)
        with self._phase("counting what the tables hold"):
            tables = tuple(filter(None, (_table_summary(engine, stream) for stream in self._streams)))
        export = f"export DAGSTER_HOME={shlex.quote(str(home))}"
        seconds = time.monotonic() - began
        summary = Summary(len(WAVES), tuple(self._runs), tables, mirrors, str(home), export, seconds)
        self._conclude(summary)
        return summary

    def abandon(self, reason: str) -> str | None:
        """Stop at the next phase and mark a run in flight as failed, so that nobody waits for it; its last error."""
        self._abandoned = True
        if self._instance is None or self._run_id is None:
            return None
        error = _run_error(self._instance, self._run_id)
        run = self._instance.get_run_by_id(self._run_id)
        if run and not run.is_finished:
            self._instance.report_run_failed(run, reason)
        return error and f"Run {self._run_id[:8]} had failed with: {error}"

    def _land(self, label: str, volume: Volume, *, drift: bool, dirty: bool) -> None:
        with self._phase(f"{label}: landing files"):
            plan = FleetPlan(_VEHICLES, _FILES, _ROWS, drift, dirty, next_seed(volume, self._streams))
            # The files land whole, so nobody needs to wait for them to settle.
            age_s = max(60.0, 2 * self._settings.settle_seconds)
            report = simulate(plan, volume, self._streams, modified_ns=time.time_ns() - int(age_s * 1e9))
        broken = sum(file.fault is not None for stream in report.streams for file in stream.files)
        also = f", {broken} of them broken" if broken else ""
        self._say(f"{label}: {report.files} files with {report.rows:,} records landed{also}")

    def _load(self, label: str, engine: Engine, daemon: _Daemon) -> None:
        """Tick the sensors and run what they ask for until nothing is left to load."""
        patient_until = time.monotonic() + _PATIENCE_S
        while True:
            ran = False
            reasons = []
            for sensor in daemon.sensors:
                with self._phase(f"{label}: waiting for sensor {sensor.name}"):
                    requests, reason = daemon.tick(sensor)
                if reason:
                    reasons.append(f"{sensor.name}: {reason}")
                for request in requests:
                    self._run(label, engine, daemon, sensor, request)
                    ran = True
            looks = [engine.look(stream) for stream in self._streams]
            if not any(look.files or look.waiting for look in looks):
                return
            if ran:
                patient_until = time.monotonic() + _PATIENCE_S
                continue
            if time.monotonic() > patient_until:
                raise PermanentError(f"The sensors start no run for the files of {label}. {' '.join(reasons)}")
            self.doing = f"{label}: waiting for a sensor to start a run ({' '.join(reasons)})"
            time.sleep(0.2)

    def _run(
        self, label: str, engine: Engine, daemon: _Daemon, sensor: dg.SensorDefinition, request: dg.RunRequest
    ) -> None:
        began = time.monotonic()
        before = {state.table: state.rows for state in engine.tables()}
        result = self._execute(label, daemon, sensor, request)
        added = [
            f"{state.rows - before.get(state.table, 0):,} rows added to {state.table.rpartition('.')[2]}, "
            f"version {state.version}"
            for state in engine.tables()
            if state.rows != before.get(state.table, 0)
        ]
        self._say(
            f"{label}: sensor {sensor.name} started run {result.run_id[:8]}: {'; '.join(added) or 'no new rows'}; "
            f"{_checks(result)}; "
            f"{time.monotonic() - began:.1f} s"
        )

    def _execute(
        self,
        label: str,
        daemon: _Daemon,
        cause: dg.SensorDefinition | dg.ScheduleDefinition,
        request: dg.RunRequest,
    ) -> dg.ExecuteInProcessResult:
        """Run what a sensor or a schedule asked for; a run that fails ends the demo."""
        self._run_id = run_id = str(uuid.uuid4())
        job = _job_name(cause, request)
        with self._phase(f"{label}: running job {job} (run {run_id[:8]})"):
            result = daemon.run(cause, request, run_id)
        self._runs.append(run_id)
        if not result.success:
            error = _run_error(daemon.instance, run_id) or "It left no error; its log is in the UI."
            raise PermanentError(f"Run {run_id[:8]} of job {job} failed: {error}")
        self._run_id = None
        return result

    @contextlib.contextmanager
    def _database(self) -> Iterator[Future[LocalSupabase] | None]:
        """The demo's database, which starts while the waves are loaded and is stopped in the end; None without one."""
        if not self._replicated:
            yield None
            return
        from telematics_assets.demo.local_supabase import LocalSupabase, is_configured

        if is_configured(self._settings):
            yield None
            return
        with ThreadPoolExecutor(1, thread_name_prefix="database") as beside:
            starting = beside.submit(lambda: LocalSupabase(self._settings.local_supabase).start())
            try:
                yield starting
            finally:
                if starting.exception() is None:
                    starting.result().stop()

    def _mirror(self, daemon: _Daemon, database: Future[LocalSupabase] | None) -> tuple[MirrorSummary, ...]:
        """Let the business of the demo's database go on, and mirror every round of it."""
        if database is None:
            if self._replicated:
                self._say("supabase: a database of yours is configured; the demo leaves it alone")
            return ()
        try:
            with self._phase("starting the demo's database"):
                local = database.result()
        except (MissingExtraError, PostgresStartError) as error:
            self._say(f"supabase: there is no database of the demo's. {error}")
            return ()
        due = ROUNDS if local.is_new else ROUNDS[1:]
        rounds = [
            self._mirror_round(f"supabase {number}/{len(due)} {name}", local, daemon, changes=changes)
            for number, (name, changes) in enumerate(due, 1)
        ]
        return tuple(
            replace(last, **{kind: sum(getattr(each[number], kind) for each in rounds) for kind in _COUNTED})
            for number, last in enumerate(rounds[-1])
        )

    def _mirror_round(self, label: str, local: LocalSupabase, daemon: _Daemon, *, changes: bool) -> list[MirrorSummary]:
        from telematics_assets.demo.insurer import change

        if changes:
            with self._phase(f"{label}: changing rows"), local.owner() as owner, local.owner() as late:
                change(owner, late=late, add_column=True)
        began = time.monotonic()
        (schedule,) = daemon.schedules
        with self._phase(f"{label}: asking schedule {schedule.name}"):
            requests, reason = daemon.tick_schedule(schedule)
            while not requests:
                # `make dev` beside it may be replicating just now.
                if time.monotonic() > began + _PATIENCE_S:
                    raise PermanentError(f"Schedule {schedule.name} starts no run. {reason}")
                time.sleep(0.5)
                requests, reason = daemon.tick_schedule(schedule)
        result = self._execute(label, daemon, schedule, requests[0])
        tables = [_mirror_summary(result, table, self._settings.names) for table in self._replicated]
        told = ", ".join(f"{sum(getattr(t, kind) for t in tables):,} {kind}" for kind in _COUNTED)
        self._say(
            f"{label}: schedule {schedule.name} started run {result.run_id[:8]}: {told} in {len(tables)} tables; "
            f"{_checks(result)}; {time.monotonic() - began:.1f} s"
        )
        return tables

    def _conclude(self, summary: Summary) -> None:
        table = Table("table", title="The bronze tables", title_justify="left")
        for heading in ("files", "rows", "rescued", "corrupt", "quarantined files", "version"):
            table.add_column(heading, justify="right")
        for row in summary.tables:
            numbers = (row.files, row.rows, row.rows_rescued, row.rows_corrupt, row.files_quarantined, row.version)
            table.add_row(row.table, *(f"{number:,}" for number in numbers))
        say = self._console
        say.print(table)
        if summary.mirrors:
            mirrored = Table("table", "mirrors", title="The mirrored tables", title_justify="left")
            for heading in ("rows", "inserted", "updated", "deleted", "version"):
                mirrored.add_column(heading, justify="right")
            for each in summary.mirrors:
                amounts = (each.rows, each.inserted, each.updated, each.deleted, each.version or 0)
                mirrored.add_row(each.table, each.source, *(f"{amount:,}" for amount in amounts))
            say.print(mirrored)
        say.print(
            f"{len(summary.runs)} runs in {summary.seconds:.1f} s. Broken files stay where they are:", highlight=False
        )
        say.print("  telematics files telematics --state SKIPPED_CORRUPTED", highlight=False)
        say.print(
            "See the runs, checks and pictures in the Dagster UI; bare `dagster dev` and `dg` need the first line:"
        )
        say.print(f"  {summary.export}", highlight=False, markup=False, soft_wrap=True)
        say.print("  make dev", highlight=False)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def _phase(self, doing: str) -> Iterator[None]:
        """Name what goes on; a terminal shows it while it lasts."""
        if self._abandoned:
            raise RunLimitError(f"The demo was abandoned before it began with {doing}.")
        self.doing = doing
        spinner = Spinner("dots", Text(doing))
        # Told to leave the streams alone: it would bring the silenced logs of the runs to the terminal.
        shown = Live(spinner, console=self._console, transient=True, redirect_stdout=False, redirect_stderr=False)
        with shown if self._console.is_terminal else contextlib.nullcontext():
            yield


class _Daemon:
    """What Dagster's daemon does with sensors, in this process and with this instance."""

    def __init__(self, definitions: dg.Definitions, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self._definitions = definitions
        self._repository = definitions.get_repository_def()
        self._resources = self._repository.get_top_level_resources()
        self._cursors: dict[str, str | None] = {}
        self.sensors: Sequence[dg.SensorDefinition] = [
            sensor
            for sensor in self._repository.sensor_defs
            if sensor.default_status == dg.DefaultSensorStatus.RUNNING and sensor.job_name
        ]
        self.schedules: Sequence[dg.ScheduleDefinition] = [
            schedule
            for schedule in self._repository.schedule_defs
            if schedule.default_status == dg.DefaultScheduleStatus.RUNNING
        ]

    def tick(self, sensor: dg.SensorDefinition) -> tuple[Sequence[dg.RunRequest], str | None]:
        """Evaluate a sensor and record what it observed; the runs that are due, and the reason if there are none."""
        context = dg.build_sensor_context(
            instance=self.instance,
            cursor=self._cursors.get(sensor.name),
            repository_def=self._repository,
            sensor_name=sensor.name,
            resources=self._resources,
        )
        with context:
            tick = sensor.evaluate_tick(context)
        for event in tick.asset_events:
            self.instance.report_runless_asset_event(event)
        self._cursors[sensor.name] = tick.cursor
        return [request for request in tick.run_requests or () if not self._known(sensor, request)], tick.skip_message

    def tick_schedule(self, schedule: dg.ScheduleDefinition) -> tuple[Sequence[dg.RunRequest], str | None]:
        """Evaluate a schedule as if its time had come; the runs that are due, and the reason if there are none."""
        context = dg.build_schedule_context(
            instance=self.instance,
            scheduled_execution_time=datetime.now(UTC),
            repository_def=self._repository,
            resources=self._resources,
        )
        with context:
            tick = schedule.evaluate_tick(context)
        return tick.run_requests or (), tick.skip_message

    def run(
        self, cause: dg.SensorDefinition | dg.ScheduleDefinition, request: dg.RunRequest, run_id: str
    ) -> dg.ExecuteInProcessResult:
        """Execute what a sensor or a schedule asked for."""
        # All checks, also those that a schedule would not ask for each time: a demo shows that they hold after changes.
        job = self._definitions.get_job_def(_job_name(cause, request))
        return job.execute_in_process(
            instance=self.instance,
            run_config=request.run_config,
            asset_selection=request.asset_selection,
            tags={**request.tags, **self._tags(cause, request)},
            run_id=run_id,
            raise_on_error=False,
        )

    def _known(self, sensor: dg.SensorDefinition, request: dg.RunRequest) -> bool:
        return request.run_key is not None and bool(
            self.instance.get_runs(dg.RunsFilter(tags=self._tags(sensor, request)), limit=1)
        )

    def _tags(self, cause: dg.SensorDefinition | dg.ScheduleDefinition, request: dg.RunRequest) -> Mapping[str, str]:
        # The names that the daemon itself gives: it then knows these runs, and the UI finds them by cause and job.
        kind = "sensor" if isinstance(cause, dg.SensorDefinition) else "schedule"
        tags = {f"dagster/{kind}_name": cause.name, _REPOSITORY_TAG: f"{self._repository.name}@telematics_assets"}
        return tags | ({"dagster/run_key": request.run_key} if request.run_key else {})


def _job_name(cause: dg.SensorDefinition | dg.ScheduleDefinition, request: dg.RunRequest) -> str:
    name = request.job_name or cause.job_name
    assert name, "sensors without a job are not ticked"
    return name


def _checks(result: dg.ExecuteInProcessResult) -> str:
    evaluations = result.get_asset_check_evaluations()
    unhappy = sorted({evaluation.check_name for evaluation in evaluations if not evaluation.passed})
    return f"{len(evaluations)} checks" + (f" (to look at: {', '.join(unhappy)})" if unhappy else "")


def _mirror_summary(result: dg.ExecuteInProcessResult, table: ReplicatedTable, names: Names) -> MirrorSummary:
    """What a run's own record says of a mirrored table."""
    (event,) = (event for event in result.get_asset_materialization_events() if event.asset_key == replica_key(table))
    said: dict[str, Any] = {key: entry.value for key, entry in event.materialization.metadata.items()}
    return MirrorSummary(
        table=str(names.bronze(table.target)),
        source=table.source,
        rows=said["dagster/row_count"],
        version=said.get("delta_version"),
        **{kind: said[kind] for kind in _COUNTED},
    )


def _run_error(instance: dg.DagsterInstance, run_id: str) -> str | None:
    """The last error of a run in its own words, without the wrapping that each layer adds."""
    for record in reversed(instance.all_logs(run_id, of_type=_ERROR_EVENTS)):
        data = record.dagster_event.event_specific_data if record.dagster_event else None
        failure = getattr(data, "user_failure_data", None)
        if failure and failure.description:
            return str(failure.description)
        error = getattr(data, "error", None)
        if error:
            while error.cause:
                error = error.cause
            return str(error.message).strip()
    return None


def _table_summary(engine: Engine, stream: FileStream) -> TableSummary | None:
    name = engine.names.bronze(stream.table)
    state = engine.state(name)
    if state is None:
        return None
    filled = engine.read(name, [stream.options.rescued_data_column, "_corrupt_record"])
    counts = {column: len(filled[column]) - filled[column].null_count for column in filled.column_names}
    states = [record.state for record in engine.files(stream)]
    return TableSummary(
        table=state.table,
        files=states.count("INGESTED"),
        rows=state.rows,
        rows_rescued=counts.get(stream.options.rescued_data_column, 0),
        rows_corrupt=counts.get("_corrupt_record", 0),
        files_quarantined=states.count("SKIPPED_CORRUPTED"),
        version=state.version,
    )
