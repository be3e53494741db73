"""When things run: the sensors of the landing folders and the jobs that they start.

Belongs here: noticing, deciding whether a run is due, and saying why not.
Does not belong here: loading (a run does that), what a listing means (`engines/`).

A sensor writes no checkpoint and keeps no state but the last data version that it reported: what was tried is read from
the runs' own tags, so that a restart, a deleted run or a run that a person started leave nothing out of step.

https://docs.dagster.io/guides/automate/sensors
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import dagster as dg

from telematics_assets.assets.boundary import PERMANENT_FAILURE_TAG
from telematics_assets.assets.files import LIST_WHOLE_TAG, PROCESS_TAG, bronze_key
from telematics_assets.assets.landing import landing_key
from telematics_assets.catalog import FileStream
from telematics_assets.engines.base import Engine, PendingFiles
from telematics_assets.errors import TelematicsError
from telematics_assets.metadata import pending_metadata
from telematics_assets.processes import is_gone

if TYPE_CHECKING:
    # Dagster's name for what `define_asset_job` returns is not public.
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

STREAM_TAG = "telematics/stream"
FINGERPRINT_TAG = "telematics/fingerprint"
ATTEMPT_TAG = "telematics/attempt"
MAX_RUNTIME_TAG = "dagster/max_runtime"
DATA_VERSION_TAG = "dagster/data_version"

#: Dagster ends a tick after 60 s.
LOOK_SECONDS = 40.0
#: A load notes its process within seconds of its launch. One that is silent for longer was killed before it could.
LAUNCH_SECONDS = 60.0
_LONGEST_WAIT = 600.0
_RUNS_LOOKED_AT = 100

_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def load_job(stream: FileStream) -> "UnresolvedAssetJobDefinition":
    """The job that loads a stream's table and checks it."""
    return dg.define_asset_job(
        name=f"load_{stream.name}",
        selection=dg.AssetSelection.assets(bronze_key(stream)),
        description=f"Load what has landed for {stream.name} and check it.",
        tags={STREAM_TAG: stream.name},
    )


def landing_sensor(
    stream: FileStream,
    interval_seconds: int = 5,
    max_run_seconds: int = 3600,
    look_seconds: float = LOOK_SECONDS,
    clock: Callable[[], float] = time.time,
) -> dg.SensorDefinition:
    """The sensor that sees new files of a stream and starts one run for all of them.

    Args:
        stream: Any file stream.
        interval_seconds: Time between two ticks.
        max_run_seconds: Longest time that a run may take; an older one no longer counts as in flight.
        look_seconds: Longest time that one tick waits for a listing.
        clock: Seconds since the epoch.
    """
    looking = _Looking(stream, look_seconds)

    @dg.sensor(
        name=f"{stream.name}_files",
        job_name=f"load_{stream.name}",
        description=f"Looks for new files of {stream.name} and starts one run that loads all of them.",
        # Dagster asks every 5 s which sensors are due; one that is due a moment later would wait for the next time.
        minimum_interval_seconds=max(1, interval_seconds - 1),
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    def sensor(context: dg.SensorEvaluationContext, engine: dg.ResourceParam[Engine]) -> dg.SensorResult:
        in_flight = _in_flight(context.instance, stream, max_run_seconds, clock())
        cursor = context.cursor
        observations: list[dg.AssetObservation] = []
        late = False
        try:
            pending = looking.look(engine)
        except TelematicsError as error:
            if error.transient:
                return dg.SensorResult(skip_reason=f"The landing folder did not answer: {error}")
            # One run shows the error where people look for it, at the asset; it is not started again until it changes.
            found, fingerprint = str(error), f"error-{hashlib.sha256(repr(error).encode()).hexdigest()[:16]}"
        else:
            if pending is None:
                return dg.SensorResult(skip_reason=f"Still listing after {look_seconds:g} s; the next tick goes on.")
            found, fingerprint, late = _in_words(pending), pending.fingerprint, pending.late > 0
            if pending.data_version != cursor:
                cursor = pending.data_version
                observations.append(_observation(stream, pending))
        attempt, hold = (
            _next_attempt(context.instance, stream, fingerprint, interval_seconds, max_run_seconds, clock())
            if fingerprint
            else (0, "Nothing new.")
        )
        if hold := in_flight or hold:
            return dg.SensorResult(skip_reason=f"{hold} {found}", asset_events=observations, cursor=cursor)
        request = dg.RunRequest(
            run_key=f"{stream.name}-{fingerprint}-{attempt}",
            tags={
                STREAM_TAG: stream.name,
                FINGERPRINT_TAG: fingerprint,
                ATTEMPT_TAG: f"{attempt}",
                MAX_RUNTIME_TAG: f"{max_run_seconds}",
                **({LIST_WHOLE_TAG: "true"} if late else {}),
            },
        )
        return dg.SensorResult(run_requests=[request], asset_events=observations, cursor=cursor)

    return sensor


class _Looking:
    """Asks an engine to look, for a bounded time; a listing that takes longer goes on for the next tick."""

    def __init__(self, stream: FileStream, seconds: float) -> None:
        self._stream = stream
        self._seconds = seconds
        self._worker = ThreadPoolExecutor(1, f"look_{stream.name}")
        self._answer: Future[PendingFiles] | None = None

    def look(self, engine: Engine) -> PendingFiles | None:
        answer = self._answer = self._answer or self._worker.submit(engine.look, self._stream)
        wait([answer], self._seconds)
        if not answer.done():
            return None
        self._answer = None
        return answer.result()


def _in_flight(instance: dg.DagsterInstance, stream: FileStream, max_run_seconds: int, now: float) -> str | None:
    """Why to wait for an unfinished run of the stream, or None; runs whose process is gone are ended on the way."""
    hold = None
    for record in instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED), limit=_RUNS_LOOKED_AT):
        run = record.dagster_run
        if run.tags.get(STREAM_TAG) != stream.name and bronze_key(stream) not in (run.asset_selection or ()):
            continue
        if _left_behind(run):
            instance.report_run_failed(run, "The process of this run is gone: it was killed, or its machine went down.")
        elif _never_began(record, stream, now):
            instance.report_run_failed(
                run,
                f"This run was launched and did not begin to load within {LAUNCH_SECONDS:g} s: it was killed before.",
            )
        elif run.status == dg.DagsterRunStatus.QUEUED or now - _begin(record) < _limit(run, max_run_seconds):
            hold = f"{_link(run)} is in flight."
    return hold


def _next_attempt(
    instance: dg.DagsterInstance,
    stream: FileStream,
    fingerprint: str,
    interval_seconds: int,
    max_run_seconds: int,
    now: float,
) -> tuple[int, str | None]:
    """The number of the next attempt to load exactly these files, and why to hold it back, or None."""
    tried = instance.get_run_records(
        dg.RunsFilter(tags={STREAM_TAG: stream.name, FINGERPRINT_TAG: fingerprint}), limit=_RUNS_LOOKED_AT
    )
    if not tried:
        return 1, None
    attempt = max(int(record.dagster_run.tags.get(ATTEMPT_TAG, 0)) for record in tried) + 1
    last, begin, end = tried[0].dagster_run, _begin(tried[0]), _end(tried[0])
    if last.tags.get(PERMANENT_FAILURE_TAG) == last.run_id:
        return attempt, f"{_link(last)} failed for good and its error says what to do. Retry it, or change the files."
    # Dagster cancels a run that outlives its limit, too; that one is tried again.
    if last.status == dg.DagsterRunStatus.CANCELED and end - begin < _limit(last, max_run_seconds):
        return attempt, f"{_link(last)} was canceled. Retry it, or change the files."
    due = end + min(interval_seconds * 2.0 ** min(attempt - 1, 20), _LONGEST_WAIT) - now
    if due > 0:
        return attempt, f"{_link(last)} ended as {last.status.value} and left these files. Next attempt in {due:.0f} s."
    return attempt, None


def _left_behind(run: dg.DagsterRun) -> bool:
    # A run that is started again inherits tags: the note counts only for the run that wrote it.
    run_id, _, process = run.tags.get(PROCESS_TAG, "").partition(" ")
    return run_id == run.run_id and is_gone(process)


def _never_began(record: dg.RunRecord, stream: FileStream, now: float) -> bool:
    run, key = record.dagster_run, bronze_key(stream)
    # What else a run may have to do first, or instead, can take its time.
    only_loads = run.job_name == f"load_{stream.name}" or run.asset_selection == {key}
    loads = run.step_keys_to_execute is None or key.to_python_identifier() in run.step_keys_to_execute
    launched = run.status in (dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED)
    silent = now - record.update_timestamp.timestamp() > LAUNCH_SECONDS
    return only_loads and loads and launched and silent and not run.tags.get(PROCESS_TAG, "").startswith(run.run_id)


def _limit(run: dg.DagsterRun, max_run_seconds: int) -> float:
    return float(run.tags.get(MAX_RUNTIME_TAG, max_run_seconds))


def _link(run: dg.DagsterRun) -> str:
    return f"Run {run.run_id[:8]} (/runs/{run.run_id})"


def _begin(record: dg.RunRecord) -> float:
    return record.start_time or record.create_timestamp.timestamp()


def _end(record: dg.RunRecord) -> float:
    return record.end_time or _begin(record)


def _observation(stream: FileStream, pending: PendingFiles) -> dg.AssetObservation:
    return dg.AssetObservation(
        asset_key=landing_key(stream),
        metadata=pending_metadata(pending),
        tags={DATA_VERSION_TAG: pending.data_version},
    )


def _in_words(pending: PendingFiles) -> str:
    parts: Sequence[tuple[int, str]] = (
        (pending.files, "to load"),
        (pending.late, "of them late"),
        (pending.waiting, "perhaps still being written"),
        (pending.changed, "changed after loading"),
        (pending.known, "known"),
    )
    return "Files: " + ", ".join(f"{count:,} {what}" for count, what in parts if count or what == "known") + "."
