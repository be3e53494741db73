"""What a tick needs to decide: which runs are under way, which are dead, when the next attempt is due.

Belongs here: what Dagster's records say of the runs that do one piece of work, whatever starts them, and asking an
engine for a bounded time.
Does not belong here: what is asked and what follows from it (`automation.py`, `replication.py`).

Nothing is kept beside the runs' own tags, so that a restart, a deleted run or a run that a person started leave nothing
out of step.

https://docs.dagster.io/deployment/execution/run-monitoring
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

import dagster as dg

from telematics_assets.assets.boundary import PERMANENT_FAILURE_TAG
from telematics_assets.assets.files import PROCESS_TAG
from telematics_assets.engines.base import Engine
from telematics_assets.processes import is_gone

_T = TypeVar("_T")

FINGERPRINT_TAG = "telematics/fingerprint"
ATTEMPT_TAG = "telematics/attempt"
MAX_RUNTIME_TAG = "dagster/max_runtime"

#: Dagster ends a tick after 60 s.
LOOK_SECONDS = 40.0
#: A run notes its process within seconds of its launch. One that is silent for longer was killed before it could.
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


@dataclass(frozen=True, slots=True)
class Work:
    """What must not run twice at once.

    Attributes:
        tag: Name of the tag that the runs which do it bear.
        name: That tag's value.
        job: The job that does it.
        keys: The assets that it makes.
        step: The step that makes them.
        left: What a run that ended without having done it left behind.
        cure: What else than a retry lets a run that failed for good begin again.
    """

    tag: str
    name: str
    job: str
    keys: frozenset[dg.AssetKey]
    step: str
    left: str
    cure: str


class Asking(Generic[_T]):
    """Asks an engine something for a bounded time; what takes longer goes on for the next tick."""

    def __init__(self, name: str, question: Callable[[Engine], _T], seconds: float) -> None:
        """Prepare the question.

        Args:
            name: Name of the thread that asks.
            question: What to ask.
            seconds: Longest time that one tick waits.
        """
        self._question = question
        self._seconds = seconds
        self._worker = ThreadPoolExecutor(1, name)
        self._answer: Future[_T] | None = None

    def answer(self, engine: Engine) -> _T | None:
        """The answer, or None if it is still to come; an error of the question passes through."""
        answer = self._answer = self._answer or self._worker.submit(self._question, engine)
        wait([answer], self._seconds)
        if not answer.done():
            return None
        self._answer = None
        return answer.result()


def in_flight(instance: dg.DagsterInstance, work: Work, max_run_seconds: int, now: float) -> str | None:
    """Why to wait for an unfinished run of the work, or None; runs whose process is gone are ended on the way.

    Args:
        instance: Dagster's records.
        work: Which work.
        max_run_seconds: Age at which a run without a limit of its own no longer counts, seconds.
        now: Seconds since the epoch.
    """
    hold = None
    for record in instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED), limit=_RUNS_LOOKED_AT):
        run = record.dagster_run
        if run.tags.get(work.tag) != work.name and not work.keys.intersection(run.asset_selection or ()):
            continue
        if _left_behind(run):
            instance.report_run_failed(run, "The process of this run is gone: it was killed, or its machine went down.")
        elif _never_began(record, work, now):
            instance.report_run_failed(
                run,
                f"This run was launched and did not begin its work within {LAUNCH_SECONDS:g} s: it was killed before.",
            )
        elif run.status == dg.DagsterRunStatus.QUEUED or now - _begin(record) < _limit(run, max_run_seconds):
            hold = f"{_link(run)} is in flight."
    return hold


def next_attempt(
    instance: dg.DagsterInstance,
    work: Work,
    fingerprint: str,
    interval_seconds: int,
    max_run_seconds: int,
    now: float,
) -> tuple[int, str | None]:
    """The number of the next attempt to do exactly this, and why to hold it back, or None.

    Args:
        instance: Dagster's records.
        work: Which work.
        fingerprint: What exactly there is to do.
        interval_seconds: Pause after the first attempt, seconds; it is doubled with each.
        max_run_seconds: Age at which a run without a limit of its own counts as over, seconds.
        now: Seconds since the epoch.
    """
    tried = instance.get_run_records(
        dg.RunsFilter(tags={work.tag: work.name, FINGERPRINT_TAG: fingerprint}), limit=_RUNS_LOOKED_AT
    )
    if not tried:
        return 1, None
    attempt = max(int(record.dagster_run.tags.get(ATTEMPT_TAG, 0)) for record in tried) + 1
    last, begin, end = tried[0].dagster_run, _begin(tried[0]), _end(tried[0])
    if last.tags.get(PERMANENT_FAILURE_TAG) == last.run_id:
        said = f"{_link(last)} failed for good and its error says what to do."
        return attempt, f"{said} Retry it, or {work.cure}."
    # Dagster cancels a run that outlives its limit, too; that one is tried again.
    if last.status == dg.DagsterRunStatus.CANCELED and end - begin < _limit(last, max_run_seconds):
        return attempt, f"{_link(last)} was canceled. Retry it, or {work.cure}."
    due = end + min(interval_seconds * 2.0 ** min(attempt - 1, 20), _LONGEST_WAIT) - now
    if due > 0:
        ended = f"{_link(last)} ended as {last.status.value} and left these {work.left}."
        return attempt, f"{ended} Next attempt in {due:.0f} s."
    return attempt, None


def _left_behind(run: dg.DagsterRun) -> bool:
    # A run that is started again inherits tags: the note counts only for the run that wrote it.
    run_id, _, process = run.tags.get(PROCESS_TAG, "").partition(" ")
    return run_id == run.run_id and is_gone(process)


def _never_began(record: dg.RunRecord, work: Work, now: float) -> bool:
    run = record.dagster_run
    # What else a run may have to do first, or instead, can take its time.
    nothing_else = run.job_name == work.job or (run.asset_selection is not None and run.asset_selection <= work.keys)
    does_it = run.step_keys_to_execute is None or work.step in run.step_keys_to_execute
    launched = run.status in (dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED)
    silent = now - record.update_timestamp.timestamp() > LAUNCH_SECONDS
    return nothing_else and does_it and launched and silent and not run.tags.get(PROCESS_TAG, "").startswith(run.run_id)


def _limit(run: dg.DagsterRun, max_run_seconds: int) -> float:
    return float(run.tags.get(MAX_RUNTIME_TAG, max_run_seconds))


def _link(run: dg.DagsterRun) -> str:
    return f"Run {run.run_id[:8]} (/runs/{run.run_id})"


def _begin(record: dg.RunRecord) -> float:
    return record.start_time or record.create_timestamp.timestamp()


def _end(record: dg.RunRecord) -> float:
    return record.end_time or _begin(record)
