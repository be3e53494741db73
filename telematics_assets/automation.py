"""When files are loaded: the sensors of the landing folders and the jobs that they start.

Belongs here: noticing, deciding whether a run is due, and saying why not.
Does not belong here: loading (a run does that), what a listing means (`engines/`), what the records of runs say
(`runs.py`), when tables are replicated (`replication.py`).

A sensor writes no checkpoint and keeps no state but the last data version that it reported.

https://docs.dagster.io/guides/automate/sensors
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import dagster as dg

from telematics_assets.assets.files import LIST_WHOLE_TAG, bronze_key
from telematics_assets.assets.landing import landing_key
from telematics_assets.catalog import FileStream
from telematics_assets.engines.base import Engine, PendingFiles
from telematics_assets.errors import TelematicsError
from telematics_assets.metadata import pending_metadata
from telematics_assets.runs import (
    ATTEMPT_TAG,
    FINGERPRINT_TAG,
    LOOK_SECONDS,
    MAX_RUNTIME_TAG,
    Asking,
    Work,
    in_flight,
    next_attempt,
)

if TYPE_CHECKING:
    # Dagster's name for what `define_asset_job` returns is not public.
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

STREAM_TAG = "telematics/stream"
DATA_VERSION_TAG = "dagster/data_version"


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
    looking = Asking(f"look_{stream.name}", lambda engine: engine.look(stream), look_seconds)
    work = Work(
        tag=STREAM_TAG,
        name=stream.name,
        job=f"load_{stream.name}",
        keys=frozenset([bronze_key(stream)]),
        step=bronze_key(stream).to_python_identifier(),
        left="files",
        cure="change the files",
    )

    @dg.sensor(
        name=f"{stream.name}_files",
        job_name=f"load_{stream.name}",
        description=f"Looks for new files of {stream.name} and starts one run that loads all of them.",
        # Dagster asks every 5 s which sensors are due; one that is due a moment later would wait for the next time.
        minimum_interval_seconds=max(1, interval_seconds - 1),
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    def sensor(context: dg.SensorEvaluationContext, engine: dg.ResourceParam[Engine]) -> dg.SensorResult:
        busy = in_flight(context.instance, work, max_run_seconds, clock())
        cursor = context.cursor
        observations: list[dg.AssetObservation] = []
        late = False
        try:
            pending = looking.answer(engine)
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
            next_attempt(context.instance, work, fingerprint, interval_seconds, max_run_seconds, clock())
            if fingerprint
            else (0, "Nothing new.")
        )
        if hold := busy or hold:
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
