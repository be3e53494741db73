"""The cut of a batch: up to where the source is looked at, which rows lie below it, and what keeps it from moving on.

Belongs here: locking the table, reading cut and clock, the conditions that rows of a range fulfil, and naming blockers.
Does not belong here: where the last batch ended (`position.py`), deleted rows (`deletes.py`), Dagster.

Every transaction that was still open when the snapshot was taken has an id at or above the cut: what lies below it is
there for good, and is seen whole. A position is therefore a transaction id (modes `row_xid`, `xmin` and `snapshot`), or
microseconds since 1970 (mode `updated_at`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from telematics_assets.catalog import ReplicatedTable
from telematics_assets.engines.base import Blocker
from telematics_assets.errors import ReplicationError
from telematics_assets.microbatch.session import Session
from telematics_assets.microbatch.source import SourceTable, quoted
from telematics_assets.microbatch.sql import SCHEMA

_OF_DELETES = (f"{SCHEMA}.tombstones", f"{SCHEMA}.pruned")
#: Transaction ids that a row can be told by: beyond, the 32 bits that it carries have come around.
WRAP = 1 << 31
_EPOCH = 1 << 32
_US = 1_000_000

#: What is to be asked of the source for its cut (see `taken`) and its triggers, along with its description.
QUESTIONS: Mapping[str, str] = {
    "oldest": "pg_snapshot_xmin(pg_current_snapshot())::text::int8",
    "next": "pg_snapshot_xmax(pg_current_snapshot())::text::int8",
    "begun_us": f"(extract(epoch FROM now()) * {_US})::int8",
    "clock_us": f"(extract(epoch FROM clock_timestamp()) * {_US})::int8",
    "started_us": f"(extract(epoch FROM pg_postmaster_start_time()) * {_US})::int8",
    "is_replica": "pg_is_in_recovery()",
    # Bits of a trigger: for each row 1, before 2, at INSERT 4, at UPDATE 16. Whose it is does not matter.
    "is_filled": "(SELECT coalesce(bit_or(tgtype::int4) & 20 = 20, false) FROM pg_trigger "
    "WHERE tgrelid = c.oid AND tgenabled IN ('A', 'O') AND tgtype::int4 & 3 = 3)",
}
# The holder of the snapshot's oldest id; others see its id, but not since when it is open.
_BLOCKERS = """
SELECT 'prepared transaction' AS kind, format('%s (database %s)', gid, database) AS who,
       extract(epoch FROM clock_timestamp() - prepared)::float8 AS age
FROM pg_prepared_xacts WHERE transaction::text::int8 = {low}
UNION ALL
SELECT 'transaction', format('process %s, user %s, %s, database %s', pid, coalesce(usename, '?'),
       coalesce(nullif(application_name, ''), 'no application name'), coalesce(datname, '?')),
       extract(epoch FROM clock_timestamp() - xact_start)::float8
FROM pg_stat_activity WHERE backend_xid::text::int8 = {low}
"""


@dataclass(frozen=True, slots=True)
class Cut:
    """A moment of the source.

    Attributes:
        oldest: Oldest transaction id that was open; everything below is finished.
        next: First transaction id that was not given yet.
        begun_us: When the transaction that reads began, microseconds since 1970 by the source's clock.
        clock_us: When this was read.
        started_us: When the server started.
        is_replica: Whether the server is a standby.
    """

    oldest: int
    next: int
    begun_us: int
    clock_us: int
    started_us: int
    is_replica: bool

    def position(self, declared: ReplicatedTable) -> int:
        """Where a batch of the table ends."""
        if declared.mode == "updated_at":
            return self.begun_us - int(declared.lag_seconds * _US)
        return self.oldest


def locking(source: str, *, tombstones: bool = False) -> str:
    """What keeps the table from being rewritten, emptied or dropped while it is read: the transaction's first word.

    A lock takes no snapshot. Without one, an ALTER that rewrites the table between cut and reading shows no rows,
    and the position would move on.
    """
    names = [".".join(map(quoted, source.split("."))), *(_OF_DELETES if tombstones else ())]
    return f"LOCK TABLE {', '.join(names)} IN ACCESS SHARE MODE"


def taken(answers: Mapping[str, Any]) -> Cut:
    """The cut of a transaction's snapshot, by its answers to `QUESTIONS`."""
    return Cut(**{part.name: answers[part.name] for part in fields(Cut)})


class Rows:
    """Conditions that rows of a table fulfil, as SQL."""

    def __init__(self, declared: ReplicatedTable, source: SourceTable, cut: Cut, *, is_filled: bool) -> None:
        """Tie them to a moment of the source.

        Args:
            declared: The table.
            source: What it is in the source.
            cut: The moment.
            is_filled: Whether a trigger fills columns at every INSERT and UPDATE.

        Raises:
            ReplicationError: If the mode can't be had of this table.
        """
        self._declared = declared
        self._cut = cut
        self._rows_sql = source.rows_sql
        self._kind = ""
        name = f"{source.schema}.{source.name}"
        if declared.mode in ("row_xid", "xmin") and source.kind not in ("table", "partitioned table"):
            raise ReplicationError(
                f"{name} is a {source.kind}, whose rows have no transaction. Declare it with mode='updated_at' or "
                "mode='snapshot', or replicate the tables behind it."
            )
        if declared.position is None:
            return
        column = source.column(declared.position)
        accepted = ("timestamptz", "timestamp") if declared.mode == "updated_at" else ("xid8", "int8")
        advice = (
            "Declare position_column, or another mode."
            if declared.mode == "updated_at"
            else "`telematics supabase sql` prints what adds and fills it; or declare mode='xmin'."
        )
        if column is None:
            raise ReplicationError(f"{name} has no column {declared.position}, its position. {advice}")
        if column.base not in accepted:
            raise ReplicationError(
                f"Column {declared.position} of {name} is {column.type}; a position in mode {declared.mode} is "
                f"{' or '.join(accepted)}. {advice}"
            )
        if declared.mode == "row_xid" and not is_filled:
            raise ReplicationError(
                f"No trigger fills {declared.position} of {name} at every INSERT and UPDATE, so changes would be missed"
                ". Nothing was read. Run what `telematics supabase sql` prints as the table's owner; or declare "
                "mode='xmin'."
            )
        self._column = quoted(column.name)
        self._kind = column.base

    @property
    def writer(self) -> str:
        """The id of the transaction that wrote a row, in 64 bits relative to the snapshot; 0 for those long frozen.

        What is seen was written before `next`: so ids that seem to be later are of the epoch before.
        """
        raw = "xmin::text::int8"
        top = self._cut.next // _EPOCH * _EPOCH
        return (
            f"(CASE WHEN {raw} < 3 THEN 0 WHEN {raw} + {top} < {self._cut.next} THEN {raw} + {top} "
            f"ELSE {raw} + {top - _EPOCH} END)"
        )

    def between(self, start: int, end: int | None) -> str:
        """Rows with a position from `start` on and below `end`, if there is one.

        In mode `row_xid` also those that another database's positions came with: they lie in the future, and count by
        the transaction that brought them.
        """
        if self._declared.mode in ("xmin", "snapshot"):
            return f"({self._within(self.writer, str(start), None if end is None else str(end))})"
        column = self._column
        inside = self._within(column, self._literal(start), None if end is None else self._literal(end))
        if self._declared.mode == "updated_at":
            return f"({inside})"
        brought = self._within(self.writer, str(start), None if end is None else str(end))
        # Both are of one range, which is said first: for the alternatives alone all of the index may be read.
        return (
            f"({column} >= {self._literal(min(start, self._cut.next))} "
            f"AND (({inside}) OR ({column} >= {self._literal(self._cut.next)} AND {brought})))"
        )

    def any_between(self, start: int, end: int) -> str:
        """Whether there are rows that `between` tells, as one value.

        In mode `row_xid` the first by position is asked for, which is found by the index. The planner would rather go
        through the whole table for just any row, where its statistics tell of many or are old.
        """
        rows = f"FROM {self._rows_sql} WHERE {self.between(start, end)}"
        if self._declared.mode == "row_xid":
            return f"((SELECT true {rows} ORDER BY {self._column} LIMIT 1) IS NOT NULL)"
        return f"EXISTS (SELECT {rows})"

    def strangers(self, start: int) -> str:
        """Mode `row_xid`: rows written from `start` on whose position says something else, or nothing.

        Restored rows keep what they were saved with, where no trigger fires.
        """
        number = f"{self._column}::text::int8"
        return f"({self.writer} >= {start} AND {number} IS DISTINCT FROM {self.writer})"

    @staticmethod
    def _within(value: str, start: str, end: str | None) -> str:
        return f"{value} >= {start}" + ("" if end is None else f" AND {value} < {end}")

    def _literal(self, position: int) -> str:
        if self._kind == "xid8":
            return f"'{position}'::xid8"
        if self._kind == "int8":
            return f"{position}::int8"
        zone = "" if self._kind == "timestamptz" else " AT TIME ZONE 'UTC'"
        # In whole microseconds: a floating-point number of seconds has not enough digits.
        return f"(timestamptz 'epoch' + {position} * interval '1 microsecond'){zone}"


def blocker(session: Session, cut: Cut, known_age_seconds: float = 0.0) -> Blocker | None:
    """What holds the cut back, or None if nothing does.

    Args:
        session: The transaction that took the cut.
        cut: The cut.
        known_age_seconds: Since when the cut is known to be where it is; stands in where the role may not see since
            when another's transaction is open.
    """
    if cut.oldest >= cut.next:
        return None
    found = session.rows(_BLOCKERS.format(low=cut.oldest % _EPOCH))
    if not found:
        return None
    worst = max(found, key=lambda row: row["age"] or 0.0)
    hidden = "" if worst["age"] is not None else "; its age is a lower bound (GRANT pg_read_all_stats shows it)"
    return Blocker(worst["kind"], worst["who"] + hidden, float(worst["age"] or known_age_seconds))
