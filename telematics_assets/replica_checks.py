"""Checks of the replicated tables, generated from their declarations.

Belongs here: what is asked of every table that mirrors a table of the database, and of the database itself; how bad a
"no" is; which questions are costly.
Does not belong here: how the answers are computed (`engines/`), the step that asks (`assets/supabase.py`).

The cheap checks judge the batch of their own run; started alone from the UI, the last recorded one. The costly ones
read all keys, or the database's catalog: a run that somebody starts asks them, the schedule only when they are due.
Without a connection a check says so, and is not red.

https://docs.dagster.io/guides/test/asset-checks
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from telematics_assets import metadata
from telematics_assets.assets.boundary import failures_for_dagster
from telematics_assets.assets.files import RETRY_POLICY
from telematics_assets.catalog import ReplicatedTable
from telematics_assets.engines.base import Engine, ReplicateReport, SourceStatus
from telematics_assets.errors import SchemaError

#: Age of the state that a table shows after which somebody should look, minutes, unless the table says how fresh it is.
LAG_LIMIT_MINUTES = 60.0

#: Age of an open transaction after which it counts as blocking: every writer holds the cut for a moment.
BLOCKER_LIMIT_SECONDS = 300.0

#: Hours between two answers of the check that looks for tables which nobody declared, where the schedule asks.
DATABASE_CHECK_HOURS = 24.0

_UNDECLARED = "undeclared"
_ERROR, _WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


@dataclass(frozen=True, slots=True)
class Batch:
    """What a check needs to know of the newest batch.

    Attributes:
        recorded: Whether there was one at all.
        lag_seconds: Age of the state that the table shows, by now.
        blocker: What held the cut back, or None.
        blocker_seconds: How long that was open.
        anomalies: Lines about values that the bronze types can't show.
    """

    recorded: bool = False
    lag_seconds: float | None = None
    blocker: str | None = None
    blocker_seconds: float = 0.0
    anomalies: tuple[Mapping[str, str | int], ...] = ()

    @classmethod
    def of(cls, report: ReplicateReport) -> "Batch":
        """The batch that a report tells of."""
        blocker = report.blocker
        return cls(
            True,
            report.lag_seconds,
            None if blocker is None else f"{blocker.kind} {blocker.who}",
            0.0 if blocker is None else blocker.age_seconds,
            tuple(metadata.anomaly_lines(report.anomalies)),
        )


def last_batch(instance: dg.DagsterInstance, key: dg.AssetKey, now: float) -> Batch:
    """The newest batch that Dagster recorded.

    Args:
        instance: Dagster's records.
        key: Asset key of the table.
        now: Seconds since the epoch: the state that the table shows grows old.
    """
    event = instance.get_latest_materialization_event(key)
    if event is None or event.asset_materialization is None:
        return Batch()
    values: dict[str, Any] = {name: entry.value for name, entry in event.asset_materialization.metadata.items()}
    lag = values.get(metadata.LAG_SECONDS)
    lines = getattr(event.asset_materialization.metadata.get(metadata.ANOMALIES), "records", ())
    return Batch(
        True,
        None if lag is None else lag + max(now - event.timestamp, 0.0),
        values.get(metadata.BLOCKER),
        values.get(metadata.BLOCKER_SECONDS, 0.0),
        tuple(line.data for line in lines),
    )


def _contract(engine: Engine, table: ReplicatedTable, batch: Batch, status: SourceStatus) -> dg.AssetCheckResult:
    state = engine.state(engine.names.bronze(table.target))
    if state is None:
        return _result(None, "There is no table yet: nothing has been replicated.")
    found = {column.name: column.type for column in state.columns}
    broken = [
        {"column": column.name, "promised": column.type, "found": found.get(column.name, "nothing")}
        for column in table.contract.columns
        if not _same_type(column.type, found.get(column.name))
    ]
    return _result(
        f"{len(broken)} of {len(table.contract.columns)} promised columns are not as promised. Readers of this table "
        "may break: change the source back, or the contract."
        if broken
        else None,
        severity=_ERROR,
        columns=len(table.contract.columns),
        broken=broken,
    )


def _same_type(promised: str, found: str | None) -> bool:
    if found is None or found == promised:
        return found == promised
    from telematics_assets.lakehouse.types import arrow_type

    try:
        # One type has several spellings: `DECIMAL(10, 2)`, `decimal(10,2)`.
        return bool(arrow_type(found) == arrow_type(promised))
    except SchemaError:
        return False


def _lag(engine: Engine, table: ReplicatedTable, batch: Batch, status: SourceStatus) -> dg.AssetCheckResult:
    if batch.lag_seconds is None:
        return _result(None, "No batch has been recorded that says how old its state is.")
    limit = (table.fresh_within_minutes or LAG_LIMIT_MINUTES) * 60
    return _result(
        f"The table shows the source as it was {batch.lag_seconds / 60:,.0f} minutes ago; the limit is {limit / 60:g}. "
        "See whether the schedule is on, whether its runs succeed, and what the check blocked_cut says."
        if batch.lag_seconds > limit
        else None,
        lag_seconds=round(batch.lag_seconds, 3),
        limit_seconds=limit,
    )


def _blocked_cut(engine: Engine, table: ReplicatedTable, batch: Batch, status: SourceStatus) -> dg.AssetCheckResult:
    blocker: dict[str, Any] = (
        {} if batch.blocker is None else {"blocker": batch.blocker, "open_seconds": batch.blocker_seconds}
    )
    return _result(
        f"The {batch.blocker} has been open for {batch.blocker_seconds / 60:,.0f} minutes. Changes made since wait for "
        "it: commit it, roll it back, or end its session."
        if batch.blocker is not None and batch.blocker_seconds > BLOCKER_LIMIT_SECONDS
        else None,
        **blocker,
    )


def _anomalies(engine: Engine, table: ReplicatedTable, batch: Batch, status: SourceStatus) -> dg.AssetCheckResult:
    rows = sum(int(line["rows"]) for line in batch.anomalies)
    return _result(
        f"{rows:,} values can't be shown as they are; _rescued_data has them. docs/supabase-types.md says what "
        "stands for them."
        if batch.anomalies
        else None,
        values=rows,
        anomalies=batch.anomalies,
    )


def _drift(engine: Engine, table: ReplicatedTable, batch: Batch, status: SourceStatus) -> dg.AssetCheckResult:
    if unasked := _not_asked(status):
        return unasked
    found = [drift for drift in engine.source_drift([table]) if drift.kind != _UNDECLARED]
    return _result(
        f"{table.source} in the database is not as it is declared or was. {found[0].message}" if found else None,
        drift=[{"what": drift.kind, "found": drift.message} for drift in found],
    )


def _reconciliation(engine: Engine, table: ReplicatedTable, batch: Batch, status: SourceStatus) -> dg.AssetCheckResult:
    if unasked := _not_asked(status):
        return unasked
    if engine.state(engine.names.bronze(table.target)) is None:
        return _result(None, "There is no table yet: nothing has been replicated.")
    books = engine.reconcile(table)
    wrong = books.missing or books.extra
    return _result(
        f"{books.missing:,} keys of the source are missing in the table, and {books.extra:,} of the table are not in "
        "the source. Run it again with sweep, or with full."
        if wrong
        else None,
        severity=_ERROR,
        source_rows=books.source_rows,
        table_rows=books.table_rows,
        missing=books.missing,
        extra=books.extra,
        examples=[{"key": example} for example in books.examples],
    )


def _primary_key(engine: Engine, table: ReplicatedTable, batch: Batch, status: SourceStatus) -> dg.AssetCheckResult:
    if unasked := _not_asked(status):
        return unasked
    found = engine.repeated_keys(table)
    if found is None:
        return _result(None, "There is no table yet: nothing has been replicated.")
    return _result(
        f"{found.keys:,} keys ({', '.join(found.columns)}) are in the table more than once. Replicate it with full, "
        "and report this."
        if found.keys
        else None,
        severity=_ERROR,
        rows=found.rows,
        keys=found.keys,
        examples=[{"key": example} for example in found.examples],
    )


@dataclass(frozen=True, slots=True)
class ReplicaCheck:
    """A question to every replicated table.

    Attributes:
        description: What holds if it passes.
        judge: Answers it.
        blocking: Whether what depends on the table must not run in the same run if it fails.
        costly: Whether it reads all keys, or asks the source for its columns.
    """

    description: str
    judge: Callable[[Engine, ReplicatedTable, Batch, SourceStatus], dg.AssetCheckResult]
    blocking: bool = False
    costly: bool = False


#: The checks of every replicated table, by name.
REPLICA_CHECKS: Mapping[str, ReplicaCheck] = {
    "contract": ReplicaCheck("Every column of the contract is there, with its type.", _contract, blocking=True),
    "lag": ReplicaCheck("The table shows a state of the source that is not too old.", _lag),
    "blocked_cut": ReplicaCheck(
        f"No transaction in the database has been open for more than {BLOCKER_LIMIT_SECONDS / 60:g} minutes, so that "
        "changes would wait for it.",
        _blocked_cut,
    ),
    "anomalies": ReplicaCheck("The last batch had no value that its column can't show.", _anomalies),
    "drift": ReplicaCheck("The table in the database is as it is declared.", _drift, costly=True),
    "reconciliation": ReplicaCheck(
        "The table has exactly the keys that the source has, as far as both must agree.", _reconciliation, costly=True
    ),
    "primary_key": ReplicaCheck("No primary key is in the table more than once.", _primary_key, costly=True),
}


def replica_check_specs(table: ReplicatedTable, key: dg.AssetKey) -> Sequence[dg.AssetCheckSpec]:
    """The checks of one table; `assets/supabase.py` answers them.

    Args:
        table: The table.
        key: Its asset key.
    """
    return [
        dg.AssetCheckSpec(name, asset=key, description=_described(check, table), blocking=check.blocking)
        for name, check in REPLICA_CHECKS.items()
        if table.contract.columns or name != "contract"
    ]


def _described(check: ReplicaCheck, table: ReplicatedTable) -> str:
    return f"{check.description} {not_each_time(table.sweep_hours)}" if check.costly else check.description


def not_each_time(hours: float) -> str:
    """What the UI says of a costly question, which it shows as not evaluated after most runs.

    Args:
        hours: Age of its last answer at which the schedule asks it again.
    """
    return (
        f"The schedule asks this when its last answer is {hours:g} hours old, a run that somebody starts at once. In "
        "between it is not evaluated for the newest materialization; the execution history has the last answer."
    )


def database_check(
    tables: Sequence[ReplicatedTable], key: dg.AssetKey, retry_policy: dg.RetryPolicy | None = RETRY_POLICY
) -> dg.AssetChecksDefinition:
    """The check of the database: whether it has tables that nobody declared.

    Args:
        tables: The declared tables.
        key: Asset key of the database.
        retry_policy: For transient errors.
    """

    @dg.asset_check(
        asset=key,
        name="undeclared_tables",
        description=f"Every table of the database is declared. {not_each_time(DATABASE_CHECK_HOURS)}",
        retry_policy=retry_policy,
    )
    def undeclared_tables(
        context: dg.AssetCheckExecutionContext, engine: dg.ResourceParam[Engine]
    ) -> dg.AssetCheckResult:
        with failures_for_dagster(context), engine.source_session():
            if unasked := _not_asked(engine.source_status()):
                return unasked
            found = [drift.source for drift in engine.source_drift(tables) if drift.kind == _UNDECLARED]
        return _result(
            f"{len(found)} tables of the database are not replicated. `telematics supabase discover` prints "
            "their declarations."
            if found
            else None,
            tables=len(found),
            undeclared=[{"table": name} for name in found],
        )

    return undeclared_tables


def _not_asked(status: SourceStatus) -> dg.AssetCheckResult | None:
    if status.state == "not configured":
        return _result(None, f"Not checked: {status.message}")
    status.require()
    return None


def _result(
    found: str | None, told: str | None = None, *, severity: dg.AssetCheckSeverity = _WARN, **values: Any
) -> dg.AssetCheckResult:
    """A result that fails if something was found; lists become listings, and empty ones are left out."""
    shown = {
        name: metadata.listing(value) if isinstance(value, list | tuple) else value
        for name, value in values.items()
        if not isinstance(value, list | tuple) or value
    }
    return dg.AssetCheckResult(passed=found is None, severity=severity, description=found or told, metadata=shown)
