"""When tables are replicated: the job, its schedule, and an optional sensor.

Belongs here: deciding whether a run is due, what it asks, and saying why not.
Does not belong here: replicating (a run does that), what the records of runs say (`runs.py`), files (`automation.py`).

With no database configured, or one that does not answer, a tick skips and says so. A database that refuses for good
gets one run, which shows the error where people look for it, at the assets; the next one starts when that error is
gone.

https://docs.dagster.io/guides/automate/schedules
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import dagster as dg

from telematics_assets.assets.supabase import DATABASE_KEY, STEP, replica_key
from telematics_assets.catalog import ReplicatedTable
from telematics_assets.engines.base import Engine, SourcePosition, SourceStatus
from telematics_assets.errors import TelematicsError
from telematics_assets.replica_checks import DATABASE_CHECK_HOURS, REPLICA_CHECKS
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

JOB_NAME = "replicate"
SOURCE_TAG = "telematics/source"

#: Pause before a run is started again for what the last one left, seconds.
_PAUSE_SECONDS = 30


def replication_job(tables: Sequence[ReplicatedTable]) -> "UnresolvedAssetJobDefinition":
    """The job that replicates all tables and checks them.

    Args:
        tables: The replicated tables.
    """
    keys = [replica_key(table) for table in tables]
    return dg.define_asset_job(
        name=JOB_NAME,
        selection=dg.AssetSelection.assets(*keys) | dg.AssetSelection.checks_for_assets(DATABASE_KEY),
        description="Bring the bronze tables up to the Supabase database and check them.",
        tags={SOURCE_TAG: "supabase"},
    )


def replication_schedule(
    tables: Sequence[ReplicatedTable],
    minutes: int = 5,
    max_run_seconds: int = 3600,
    look_seconds: float = LOOK_SECONDS,
    clock: Callable[[], float] = time.time,
) -> dg.ScheduleDefinition:
    """The schedule that replicates all tables in one run.

    Args:
        tables: The replicated tables.
        minutes: Time between two ticks; a divisor of an hour, or whole hours that divide a day.
        max_run_seconds: Longest time that a run may take; an older one no longer counts as in flight.
        look_seconds: Longest time that one tick waits for the database.
        clock: Seconds since the epoch.
    """
    work = _work(tables)
    asking = Asking("ask_supabase", lambda engine: engine.source_status(), look_seconds)

    @dg.schedule(
        name="supabase_replication",
        job_name=JOB_NAME,
        cron_schedule=_cron(minutes),
        execution_timezone="UTC",
        description="Replicates all tables of the Supabase database in one run; says why if it doesn't. The run asks "
        "the cheap checks, and the costly ones when they are due: their descriptions say when.",
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )
    def schedule(
        context: dg.ScheduleEvaluationContext, engine: dg.ResourceParam[Engine]
    ) -> dg.RunRequest | dg.SkipReason:
        if busy := in_flight(context.instance, work, max_run_seconds, clock()):
            return dg.SkipReason(busy)
        status = asking.answer(engine)
        if status is None:
            return dg.SkipReason(f"The database has not answered within {look_seconds:g} s; the next tick goes on.")
        if status.state in ("not configured", "unreachable"):
            return dg.SkipReason(status.message)
        tags = {MAX_RUNTIME_TAG: f"{max_run_seconds}"}
        if status.state == "refused":
            attempt = _attempt(context.instance, work, status.message, max_run_seconds, clock())
            if attempt.hold:
                return dg.SkipReason(f"{attempt.hold} {status.message}")
            tags |= attempt.tags
        return dg.RunRequest(
            tags=tags,
            # Checks that are chosen without assets are all that a run does.
            asset_selection=[replica_key(table) for table in tables],
            asset_check_keys=_due_checks(context.instance, tables, clock()),
        )

    return schedule


def replication_sensor(
    tables: Sequence[ReplicatedTable],
    interval_seconds: int = 5,
    max_run_seconds: int = 3600,
    look_seconds: float = LOOK_SECONDS,
    clock: Callable[[], float] = time.time,
) -> dg.SensorDefinition:
    """The sensor that replicates tables of mode `row_xid` as soon as they change, once it is turned on.

    It asks for the highest positions only: a transaction that commits after a later one is found by the schedule.

    Args:
        tables: The replicated tables.
        interval_seconds: Time between two ticks.
        max_run_seconds: Longest time that a run may take; an older one no longer counts as in flight.
        look_seconds: Longest time that one tick waits for the database.
        clock: Seconds since the epoch.
    """
    work = _work(tables)
    watched = [table for table in tables if table.mode == "row_xid"]
    asking = Asking("ask_supabase_positions", lambda engine: _positions(engine, watched), look_seconds)

    @dg.sensor(
        name="supabase_changes",
        job_name=JOB_NAME,
        description="Asks each table of mode row_xid for its highest position and replicates those that moved on. It "
        "is off until you turn it on.",
        minimum_interval_seconds=max(1, interval_seconds - 1),
        default_status=dg.DefaultSensorStatus.STOPPED,
    )
    def sensor(context: dg.SensorEvaluationContext, engine: dg.ResourceParam[Engine]) -> dg.RunRequest | dg.SkipReason:
        if busy := in_flight(context.instance, work, max_run_seconds, clock()):
            return dg.SkipReason(busy)
        try:
            found = asking.answer(engine)
        except TelematicsError as error:
            # The schedule shows it at the assets.
            return dg.SkipReason(str(error))
        if found is None:
            return dg.SkipReason(f"The database has not answered within {look_seconds:g} s; the next tick goes on.")
        if isinstance(found, SourceStatus):
            return dg.SkipReason(found.message)
        pending = [position for position in found if position.pending]
        if not pending:
            return dg.SkipReason(f"Nothing new in {len(found)} tables.")
        told = ", ".join(position.source for position in pending)
        attempt = _attempt(context.instance, work, repr(pending), max_run_seconds, clock())
        if attempt.hold:
            return dg.SkipReason(f"{attempt.hold} Changed: {told}.")
        sources = {position.source for position in pending}
        moved = [table for table in watched if table.source in sources]
        return dg.RunRequest(
            tags={MAX_RUNTIME_TAG: f"{max_run_seconds}", **attempt.tags},
            asset_selection=[replica_key(table) for table in moved],
            asset_check_keys=[key for key, costly in _check_keys(moved).items() if not costly],
        )

    return sensor


class _Attempt(NamedTuple):
    tags: Mapping[str, str]
    hold: str | None


def _work(tables: Sequence[ReplicatedTable]) -> Work:
    return Work(
        tag=SOURCE_TAG,
        name="supabase",
        job=JOB_NAME,
        keys=frozenset(replica_key(table) for table in tables),
        step=STEP,
        left="changes",
        cure="mend what it names",
    )


def _attempt(instance: dg.DagsterInstance, work: Work, what: str, max_run_seconds: int, now: float) -> _Attempt:
    fingerprint = hashlib.sha256(what.encode()).hexdigest()[:16]
    number, hold = next_attempt(instance, work, fingerprint, _PAUSE_SECONDS, max_run_seconds, now)
    return _Attempt({FINGERPRINT_TAG: fingerprint, ATTEMPT_TAG: f"{number}"}, hold)


def _positions(engine: Engine, tables: Sequence[ReplicatedTable]) -> Sequence[SourcePosition] | SourceStatus:
    with engine.source_session():
        status = engine.source_status()
        return engine.source_positions(tables) if status.state == "ready" else status


def _check_keys(tables: Sequence[ReplicatedTable]) -> dict[dg.AssetCheckKey, bool]:
    """The checks of some tables, and whether they are costly."""
    return {
        dg.AssetCheckKey(replica_key(table), name): check.costly
        for table in tables
        for name, check in REPLICA_CHECKS.items()
        if table.contract.columns or name != "contract"
    }


def _due_checks(
    instance: dg.DagsterInstance, tables: Sequence[ReplicatedTable], now: float
) -> Sequence[dg.AssetCheckKey]:
    """The cheap checks, and the costly ones whose last answer is as old as the table's sweeps may be."""
    hours = {
        key: table.sweep_hours if costly else 0.0 for table in tables for key, costly in _check_keys([table]).items()
    }
    hours[dg.AssetCheckKey(DATABASE_KEY, "undeclared_tables")] = DATABASE_CHECK_HOURS
    costly_keys = [key for key, limit in hours.items() if limit]
    # Planned counts as asked: a check that can't be answered is not asked again with every run.
    asked = instance.event_log_storage.get_latest_asset_check_execution_by_key(costly_keys)
    return [
        key for key, limit in hours.items() if key not in asked or now - asked[key].create_timestamp >= limit * 3600
    ]


def _cron(minutes: int) -> str:
    if minutes < 60:
        return f"*/{minutes} * * * *"
    return f"0 */{minutes // 60} * * *" if minutes < 1440 else "0 0 * * *"
