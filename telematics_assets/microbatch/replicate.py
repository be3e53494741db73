"""One replication of one table: cut, extract, merge with the position in the same commit, until bronze is up to date.

Belongs here: the order of the steps, when a whole snapshot is taken and keys are compared, and recovery.
Does not belong here: the cut (`cut.py`), the position's form (`position.py`), how rows travel (`extract.py`), SQL of
each question, Dagster.

One batch is one transaction in the database that only reads: (1) open the bronze table ONCE; (2) lock the source
table, then take the cut; (3) read rows from the position up to the cut, and what was deleted; (4) ONE merge through the
handle of step 1 carries them and the new position. A batch of more than `PART_BYTES` is merged in parts of the same
snapshot, and only the last carries the position: killed in between, the same range is read again, and what is already
there is left alone. A snapshot goes by ranges of the key, each a transaction and a commit that says how far it came.
Killed anywhere, the next run goes on from what the table's own log says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import pyarrow as pa

from telematics_assets.catalog import ReplicatedTable, TableName
from telematics_assets.engines.base import (
    Anomaly,
    Blocker,
    Progress,
    ProgressListener,
    Reconciliation,
    ReplicateReport,
    ReplicateRequest,
    SchemaChange,
)
from telematics_assets.errors import (
    CommitConflictError,
    ReplicaLagsError,
    ReplicationError,
    SchemaError,
)
from telematics_assets.lakehouse.base import Commit, Lakehouse, Table
from telematics_assets.lakehouse.types import STATISTICS_PROPERTY, delta_type, statistics_columns
from telematics_assets.microbatch import cut as cuts
from telematics_assets.microbatch.cut import WRAP, Cut, Rows
from telematics_assets.microbatch.deletes import Tombstones, key_plans, source_keys
from telematics_assets.microbatch.drift import (
    REPLICATED_AT,
    Columns,
    Drift,
    columns_of,
    drift,
    facts_without,
    in_plain,
)
from telematics_assets.microbatch.extract import Anomalies, extract
from telematics_assets.microbatch.keys import Keys, Wanted, differences, marked, parts_of
from telematics_assets.microbatch.lengths import are_short, refuse_long_rows
from telematics_assets.microbatch.parallel import read_together
from telematics_assets.microbatch.position import (
    NOTE_INFO,
    SOURCE_PROPERTY,
    Standing,
    at,
    generation,
    identity_of,
    last_note,
    make_durable,
    newest_note,
    refuse_foreign,
    refuse_moved,
    standing,
)
from telematics_assets.microbatch.session import BeginningRefusedError, Connection, Session
from telematics_assets.microbatch.snapshot import Heap, heap_of, next_piece
from telematics_assets.microbatch.source import (
    IDENTITY_QUESTIONS,
    SourceTable,
    checked_key,
    database_identity,
    describe,
    described,
    partitions,
    quoted,
)
from telematics_assets.microbatch.sql import SCHEMA
from telematics_assets.microbatch.types import ColumnPlan, bronze_name, plan_columns

#: Steps of a replication, in order, as they are announced to `on_step`; a test can stop a process at each of them.
STEPS = ("opened", "table_created", "cut_taken", "reading", "extracted", "committed", "made_durable")

#: Rows of one range of a first snapshot: what a kill loses at most.
PIECE_ROWS = 2_000_000
#: Bytes of rows that are merged at once; delta-rs takes several times as much for it.
PART_BYTES = 64 << 20
#: A position that nothing was found behind is written down all the same once it lies so far back.
STALE_IDS = 1 << 28
#: Columns with statistics in the log, as many as Delta's own default.
_STATISTICS_COLUMNS = 32
_TRIES = 5
_US = 1_000_000
_ANOTHER = ("another server", "another timeline", "another database", "the table was created anew", "another mode")


@dataclass
class _Books:
    """What one call has done so far."""

    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    batches: int = 0
    snapshot: str | None = None
    swept: bool = False
    full_begun: bool = False
    sweep_done: bool = False
    position: int | None = None
    lag_us: int | None = None
    read_at: float = 0.0
    blocker: Blocker | None = None
    notes: tuple[str, ...] = ()
    schema_changes: list[SchemaChange] = field(default_factory=list)
    anomalies: dict[tuple[str, str], Anomaly] = field(default_factory=dict)
    yielded: bool = False
    table: Table | None = None
    #: Where the table was found standing, by a commit that may not be on disk yet.
    unsynced: Standing | None = None


@dataclass(frozen=True)
class _Batch:
    """All there is to know in one transaction."""

    session: Session
    table: Table
    source: SourceTable
    identity: str
    key: tuple[str, ...]
    cut: Cut
    rows: Rows
    columns: Columns
    drift: Drift
    stands: Standing | None
    anomalies: Anomalies

    @property
    def key_plans(self) -> tuple[ColumnPlan, ...]:
        return key_plans(self.columns.plans, self.key)

    @cached_property
    def partitions(self) -> int:
        return partitions(self.session, self.source)

    @cached_property
    def heap(self) -> Heap | None:
        """The table's blocks, if several connections may read it."""
        return heap_of(self.session, self.source) if self.session.connections > 1 else None

    @property
    def parts(self) -> tuple[str, ...]:
        """Conditions that divide all rows; empty if one connection is to read them."""
        return self.heap.parts() if self.heap else ()


@dataclass(frozen=True)
class _Part:
    """What one merge brings."""

    rows: pa.Table
    gone: pa.Table


class Replicator:
    """Replicates one table. Keeps no state that matters beyond a call."""

    def __init__(
        self,
        declared: ReplicatedTable,
        name: TableName,
        lakehouse: Lakehouse,
        connection: Connection,
        *,
        hash_key: str | None = None,
        on_step: Callable[[str], None] | None = None,
        piece_rows: int = PIECE_ROWS,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """Tie a declared table to its bronze table and the database.

        Args:
            declared: The table.
            name: Full name of its bronze table.
            lakehouse: Where that is.
            connection: The way to the database.
            hash_key: The key of hashed columns.
            on_step: Called with each name of `STEPS` as it is passed.
            piece_rows: Rows of one range of a snapshot.
            part_bytes: Bytes of rows that are merged at once.
        """
        self._declared = declared
        self._name = name
        self._lakehouse = lakehouse
        self._connection = connection
        self._hash_key = hash_key
        self._step = on_step or _ignore
        self._piece_rows = piece_rows
        self._part_bytes = part_bytes
        self._with_tombstones = declared.delete_handling == "tombstones"

    def replicate(
        self, request: ReplicateRequest | None = None, progress: ProgressListener | None = None
    ) -> ReplicateReport:
        """See `Engine.replicate`."""
        began = time.monotonic()
        request, tell = request or ReplicateRequest(), progress or _ignore
        books = _Books()
        for left in reversed(range(_TRIES)):
            try:
                while self._transaction(request, books, tell):
                    pass
                break
            except _YieldedError:
                books.yielded = True
                break
            except CommitConflictError:
                # Somebody compacted the table, say: nothing of this batch is in it, so that it is simply read again.
                if not left:
                    raise
        tell(Progress("done", f"{self._name}: {books.inserted} new, {books.updated} changed, {books.deleted} gone"))
        return self._report(books, began)

    def reconcile(self) -> Reconciliation:
        """See `Engine.reconcile`."""
        from telematics_assets.microbatch.reconcile import reconcile

        with self._opened() as (session, table):
            opened = self._described(session, table)
            stands = opened.stands
            if table is None or stands is None or not stands.complete:
                raise ReplicationError(
                    f"{self._name} has no whole snapshot of {self._declared.source} yet. Run `telematics replicate`."
                )
            tombstones = Tombstones(session, opened.source, opened.key) if self._with_tombstones else None
            return reconcile(session, table, opened.source, opened.rows, opened.key_plans, stands.position, tombstones)

    # One transaction -------------------------------------------------------------------------------------------------

    def _transaction(self, request: ReplicateRequest, books: _Books, tell: ProgressListener) -> bool:
        """Do what one transaction can; say whether another one is needed."""
        with self._opened() as (session, table):
            batch = self._described(session, table)
            if table is None:
                batch = self._created(batch)
            books.table = batch.table
            refuse_foreign(batch.table, self._declared)
            again = self._decided(batch, request, books, tell)
            books.read_at = books.read_at or time.monotonic()
        for anomaly in batch.anomalies.found:
            known = books.anomalies.get((anomaly.column, anomaly.kind))
            books.anomalies[anomaly.column, anomaly.kind] = (
                anomaly if known is None else replace(known, rows=known.rows + anomaly.rows)
            )
        return again

    @contextmanager
    def _opened(self) -> Iterator[tuple[Session, Table | None]]:
        # Before the snapshot: what another process commits later is a conflict then, and never a cut that goes back.
        table = self._lakehouse.open(self._name)
        self._step("opened")
        lock = cuts.locking(self._declared.source, tombstones=self._with_tombstones)
        try:
            with self._connection.transaction(lock) as session:
                yield session, table
        except BeginningRefusedError:
            self._explain_lock()
            raise

    def _explain_lock(self) -> None:
        """Say what is wrong with the table that could not be locked, if that can be seen."""
        with self._connection.transaction() as session:
            source = describe(session, self._declared.source)
            if self._with_tombstones and session.value(f"SELECT to_regclass('{SCHEMA}.tombstones') IS NULL"):
                raise ReplicationError(
                    f"There is no table {SCHEMA}.tombstones in the database, where deletes of "
                    f"{self._declared.source} are noted. Run what `telematics supabase sql` prints as the tables' "
                    "owner, or declare deletes='sweep'."
                )
            if source.kind not in ("table", "partitioned table", "view"):
                raise ReplicationError(
                    f"{self._declared.source} is a {source.kind}, which can't be locked while it is read. Declare a "
                    "view of it."
                )

    def _described(self, session: Session, table: Table | None) -> _Batch:
        source, answers = described(session, self._declared.source, {**cuts.QUESTIONS, **IDENTITY_QUESTIONS})
        cut = cuts.taken(answers)
        self._step("cut_taken")
        key = self._key(session, source)
        rows = Rows(self._declared, source, cut, is_filled=answers["is_filled"])
        plans = plan_columns(source, self._declared.exclude, self._declared.hash, self._hash_key, key)
        plans = tuple(self._as_position(plan, source) for plan in plans)
        if lost := [name for name in key if name not in {plan.source for plan in plans if plan.form != "hash"}]:
            raise ReplicationError(
                f"{', '.join(lost)} of {self._declared.source} is part of its key and can't be left out or hashed."
            )
        columns = columns_of(plans, source)
        identity = identity_of(database_identity(session, answers), source.oid, self._declared.mode)
        stands = None if table is None else standing(table, identity)
        changed = table is not None and (stands is None or stands.columns != columns.fingerprint)
        before = None
        if table is not None and stands is not None:
            note = last_note(table, stands) if changed else {"columns": columns.facts}
            before = None if note is None else note.get("columns")
        differs = drift(columns, columns.schema if table is None else table.schema, before)  # type: ignore[arg-type]
        return _Batch(session, table, source, identity, key, cut, rows, columns, differs, stands, Anomalies())  # type: ignore[arg-type]

    def _key(self, session: Session, source: SourceTable) -> tuple[str, ...]:
        key = checked_key(source, self._declared.key)
        if {*key} == {*source.key}:
            return source.key
        if self._with_tombstones:
            raise ReplicationError(
                f"Deletes of {self._declared.source} are noted by its primary key ({', '.join(source.key) or 'none'}), "
                f"and the declared key is {', '.join(key)}. Leave key out, or declare deletes='sweep'."
            )
        if source.kind == "view":
            names = ", ".join(map(quoted, key))
            nulls = " OR ".join(f"{quoted(name)} IS NULL" for name in key)
            if session.rows(
                f"SELECT 1 AS one FROM {source.sql} GROUP BY {names} HAVING count(*) > 1 OR {nulls} LIMIT 1"
            ):
                raise ReplicationError(
                    f"Several rows of {self._declared.source} have the same {', '.join(key)}, or none. Declare the "
                    "columns that identify a row."
                )
        return key

    def _as_position(self, plan: ColumnPlan, source: SourceTable) -> ColumnPlan:
        if self._declared.mode != "row_xid" or plan.source != self._declared.position:
            return plan
        return replace(plan, comment="Transaction that wrote the row in the source.")

    def _created(self, batch: _Batch) -> _Batch:
        schema = batch.columns.schema
        fields = [*list(schema)[:_STATISTICS_COLUMNS], schema.field(REPLICATED_AT)]
        table = self._lakehouse.create(
            self._name,
            schema,
            self._declared.contract.comment or batch.source.comment or f"Mirror of {self._declared.source}.",
            {
                SOURCE_PROPERTY: self._declared.source,
                "delta.enableChangeDataFeed": "true",
                STATISTICS_PROPERTY: statistics_columns(dict.fromkeys(fields)),
            },
        )
        self._step("table_created")
        if generation(table):
            # Its position may be beyond this cut already: whoever made it is ahead.
            raise _YieldedError(f"Another replication made {self._name}.")
        return replace(batch, table=table, drift=drift(batch.columns, table.schema, None))

    def _decided(self, batch: _Batch, request: ReplicateRequest, books: _Books, tell: ProgressListener) -> bool:
        stands = batch.stands
        books.notes = batch.drift.notes(self._declared.source)
        full = request.full and not books.full_begun
        if stands is not None and not full:
            refuse_moved(batch.table, stands)
            books.unsynced = stands
        if self._cleared(batch, books, tell):
            return True
        if full:
            books.full_begun = True
            return self._snapshot(batch, None, "asked for", books, tell)
        if batch.drift.retyped:
            name, was, now = batch.drift.retyped[0]
            raise SchemaError(
                f"Column {name} of {self._declared.source} was {was} in bronze and is {now} now, which does not fit. "
                f"Nothing was changed. `telematics replicate {self._declared.source} --full` rewrites {self._name} "
                "with the new type; or list the column under exclude."
            )
        if stands is None:
            reason = self._why_anew(batch) if generation(batch.table) else "first"
            return self._snapshot(batch, None, reason, books, tell)
        if not stands.complete:
            unchanged = stands.columns == batch.columns.fingerprint
            note = last_note(batch.table, stands) if unchanged else None
            if note is None:
                return self._snapshot(batch, None, "the columns changed during the last one", books, tell)
            return self._snapshot(batch, note, str(note["reason"]), books, tell)
        if whole := self._why_whole(batch, stands):
            return self._snapshot(batch, None, whole, books, tell)
        if self._declared.mode == "snapshot":
            return self._again(batch, stands, books, tell)
        return self._batch(batch, stands, request, books, tell)

    def _cleared(self, batch: _Batch, books: _Books, tell: ProgressListener) -> bool:
        """Take what shall not be read any more out of all rows, also such as only bronze has; say if there was any."""
        table, stands = batch.table, batch.stands
        if stands is not None and stands.columns == batch.columns.fingerprint:
            return False
        note = {**((newest_note(table) if stands is None else last_note(table, stands)) or {"identity": ""})}
        known = note.get("columns")
        before = known if isinstance(known, dict) else {}
        excluded = [bronze_name(name) for name in self._declared.exclude]
        cleared = in_plain(batch.columns, table.schema, before, excluded)
        if not cleared or not table.count():
            return False
        tell(Progress("write", f"{self._name}: taking {', '.join(cleared)} out of all rows"))
        there = [name for name in table.schema.names if name not in cleared]
        fields = [cleared.get(mine.name, mine) for mine in table.schema]
        schema = pa.schema([each for each in fields if each is not None])

        def rows() -> Iterator[pa.RecordBatch]:
            for part in table.stream(there):
                columns = [
                    part[each.name] if each.name in there else pa.chunked_array([pa.nulls(len(part), each.type)])
                    for each in schema
                ]
                yield from pa.table(columns, schema=schema).to_batches()

        note["columns"] = facts_without(batch.columns, before, cleared)
        # Of the version where it stood: what others did since is still to be seen.
        positions = {} if stands is None else replace(stands, columns=0).transactions()
        with self._committing(table, books):
            commit = table.overwrite(schema, rows(), positions, {NOTE_INFO: json.dumps(note)})
        self._committed(table, commit, books)
        return True

    def _why_anew(self, batch: _Batch) -> str:
        note = newest_note(batch.table)
        was = str(note["identity"]).split("-") if note is not None else []
        now = batch.identity.split("-")
        if len(was) == len(now) == len(_ANOTHER):
            return next((what for what, a, b in zip(_ANOTHER, was, now, strict=True) if a != b), "another source")
        return "another source"

    def _why_whole(self, batch: _Batch, stands: Standing) -> str | None:
        """Why changes alone would not do, or None."""
        end = batch.cut.position(self._declared)
        if self._declared.mode != "updated_at":
            if end < stands.position:
                what = "is a standby, which lags behind" if batch.cut.is_replica else "has gone back"
                raise ReplicaLagsError(
                    f"{self._name} holds {self._declared.source} up to transaction {stands.position}, and the server "
                    f"that answers {what}: it has finished those below {end}. Nothing was read. Connect to the "
                    "primary, or wait; if the server was restored to an earlier time, run `telematics replicate "
                    f"{self._declared.source} --full`."
                )
            if self._declared.mode == "xmin" and batch.cut.next - stands.start >= WRAP:
                return "more than 2^31 transactions since the last batch"
        if stands.columns == batch.columns.fingerprint:
            return None
        if batch.drift.altered is None:
            return "the columns changed"
        if batch.drift.altered:
            return f"column {', '.join(batch.drift.altered)} is not what it was"
        sources = {plan.name: plan.source for plan in batch.columns.plans}
        if added := [quoted(sources[name]) for name in batch.drift.added if name in sources]:
            there = " OR ".join(f"{name} IS NOT NULL" for name in added)
            start = self._start(batch, stands)
            late = "" if self._declared.mode == "snapshot" else f" AND {batch.rows.between(start, end)} IS NOT TRUE"
            if batch.session.value(f"SELECT EXISTS (SELECT FROM {batch.source.rows_sql} WHERE ({there}){late})"):
                return f"column {', '.join(batch.drift.added)} was added with values"
        return None

    def _start(self, batch: _Batch, stands: Standing) -> int:
        # A server that crashed may have lost what it said was committed, and gives the same ids again.
        return stands.position if stands.started_us == batch.cut.started_us else stands.start

    # Kinds of batches ------------------------------------------------------------------------------------------------

    def _batch(
        self, batch: _Batch, stands: Standing, request: ReplicateRequest, books: _Books, tell: ProgressListener
    ) -> bool:
        """The rows that changed, and those that went."""
        start, end = self._start(batch, stands), max(batch.cut.position(self._declared), stands.position)
        tell(Progress("read", f"{self._declared.source}: changes from {start} to {end}"))
        self._step("reading")
        changed = batch.rows.between(start, end)
        sweep = self._sweep_due(batch, stands, request, books)
        tombstones = noted = None
        if self._with_tombstones:
            tombstones = Tombstones(batch.session, batch.source, batch.key)
            noted = tombstones.noted(start, end, stands.position, batch.rows.any_between(start, end))
            sweep = sweep or noted.nameless or noted.pruned
        if sweep and self._declared.mode == "row_xid":
            changed = f"({changed} OR {batch.rows.strangers(stands.swept_to)})"
        columns_changed = stands.columns != batch.columns.fingerprint
        stale = self._declared.mode != "updated_at" and end - stands.position > STALE_IDS
        after = replace(
            stands,
            position=end,
            start=stands.position,
            started_us=batch.cut.started_us,
            clock_us=self._state_of_us(batch, stands, books),
            columns=batch.columns.fingerprint,
        )
        if sweep:
            after = replace(after, swept_us=batch.cut.clock_us, swept_to=end, partitions=batch.partitions)
        must = sweep or columns_changed or stale
        rows: Iterable[pa.RecordBatch] = ()
        gone: Iterable[pa.RecordBatch] = ()
        late = Wanted([plan.name for plan in batch.key_plans])
        with self._keys(batch) as lost:
            if sweep or noted is None or noted.changed:
                rows = self._extracted(batch, changed)
            if sweep:
                self._swept(batch, late, lost)
                rows, gone = chain(rows, self._wanted(batch, late, changed)), lost.batches()
            elif tombstones is not None and noted is not None and noted.any:
                gone = tombstones.keys(start, end, batch.key_plans)
            self._merged(batch, rows, gone, stands, after, self._note(batch), books, must=must)
        books.position, books.swept = end, books.swept or sweep
        books.sweep_done = books.sweep_done or sweep
        return False

    def _again(self, batch: _Batch, stands: Standing, books: _Books, tell: ProgressListener) -> bool:
        """Mode `snapshot`: all rows, and a commit only if some differ."""
        tell(Progress("read", f"{self._declared.source}: comparing all rows"))
        end = batch.cut.position(self._declared)
        after = replace(
            stands,
            position=end,
            start=end,
            started_us=batch.cut.started_us,
            clock_us=self._state_of_us(batch, stands, books),
            swept_us=batch.cut.clock_us,
            swept_to=end,
            columns=batch.columns.fingerprint,
        )
        must = stands.columns != batch.columns.fingerprint or end - stands.position > STALE_IDS
        self._compared(batch, stands, after, self._note(batch), books, must=must)
        return False

    def _snapshot(
        self, batch: _Batch, note: Mapping[str, object] | None, reason: str, books: _Books, tell: ProgressListener
    ) -> bool:
        """A whole snapshot, or a range of one; say whether there is more to do.

        Args:
            batch: The batch.
            note: What the last commit of an unfinished snapshot noted; None for a new one.
            reason: Why it is taken.
            books: Where it is counted.
            tell: Told what happens.
        """
        books.snapshot = books.snapshot or reason
        end = batch.cut.position(self._declared)
        clock = self._state_of_us(batch, None, books)
        pieces, start = 0, None
        if note is None or batch.stands is None:
            stands = Standing(
                identity=batch.identity,
                generation=generation(batch.table) + 1,
                position=end,
                start=end,
                started_us=batch.cut.started_us,
                clock_us=clock,
                swept_us=0,
                swept_to=end,
                columns=batch.columns.fingerprint,
                complete=0,
                partitions=batch.partitions,
            )
        else:
            stands = batch.stands
            last = note.get("next")
            pieces, start = int(str(note["pieces"])), [str(text) for text in last] if isinstance(last, list) else None
        books.position = stands.position
        if batch.drift.retyped:
            self._rewritten(batch, stands, reason, books, tell)
            return False
        if start is None and batch.table.count():
            # Where rows are, readers must never miss any, and the change data feed shows what differs.
            tell(Progress("read", f"{self._declared.source}: snapshot ({reason}), comparing all rows"))
            after = replace(
                stands,
                position=end,
                start=end,
                started_us=batch.cut.started_us,
                clock_us=clock,
                swept_us=batch.cut.clock_us,
                swept_to=end,
                complete=1,
            )
            note = self._note(batch, reason=reason, pieces=0, next=None)
            self._compared(batch, stands, after, note, books, must=True)
            books.swept, books.position = True, end
            return False
        tell(Progress("read", f"{self._declared.source}: snapshot ({reason}), piece {pieces + 1}", pieces))
        self._step("reading")
        piece = next_piece(batch.session, batch.source, batch.key, start, self._piece_rows, batch.heap)
        after = stands
        if piece.end is None:
            # Ranges are of several moments: what went in between is found by its tombstones, or by a sweep.
            seen = pieces == 0 or self._with_tombstones
            after = replace(stands, complete=1, swept_us=batch.cut.clock_us if seen else 0)
        following = None if piece.end is None else list(piece.end)
        note = self._note(batch, reason=reason, pieces=pieces + 1, next=following)
        self._appended(batch, self._extracted(batch, piece.where, parts=piece.parts), after, note, books)
        # What changed while it went on is there to be had at once.
        return piece.end is not None or pieces > 0

    def _compared(
        self, batch: _Batch, before: Standing, after: Standing, note: dict[str, object], books: _Books, *, must: bool
    ) -> None:
        """Compare all rows of both sides, and merge those that differ.

        What is not there any more goes, except where deleted rows are to stay.
        """
        self._step("reading")
        schema = batch.columns.schema.remove(batch.columns.schema.get_field_index(REPLICATED_AT))
        bronze = set(batch.table.schema.names)
        there = [name for name in schema.names if name in bronze]
        key = [plan.name for plan in batch.key_plans]
        changed = Wanted(key)
        with self._keys(batch) as lost:
            with self._keys(batch) as ours, self._keys(batch) as theirs:
                for rows in self._read(batch, None, batch.anomalies, batch.parts):
                    self._require_keys(rows, batch)
                    ours.add(marked(pa.Table.from_batches([rows]), key))
                for held in batch.table.stream(there):
                    columns = [
                        held[field.name]
                        if field.name in bronze
                        else pa.chunked_array([pa.nulls(len(held), field.type)])
                        for field in schema
                    ]
                    theirs.add(marked(pa.table(columns, schema=schema), key))
                for difference in differences(ours, theirs):
                    changed.add(difference.left.select(key))
                    lost.add(difference.right)
            gone = () if self._declared.deletes == "none" else lost.batches()
            self._merged(batch, self._wanted(batch, changed, None), gone, before, after, note, books, must=must)

    def _rewritten(self, batch: _Batch, stands: Standing, reason: str, books: _Books, tell: ProgressListener) -> None:
        """A snapshot in one commit that also sets the schema: types can't be changed otherwise."""
        before = batch.table.count()
        if before and self._declared.deletes == "none":
            raise SchemaError(
                f"Rows that are gone from {self._declared.source} stay in {self._name} (deletes='none'), and would be "
                "lost if it were rewritten with the new type. Nothing was changed. List the column under exclude, or "
                "declare another table (table=…)."
            )
        tell(Progress("read", f"{self._declared.source}: snapshot ({reason}) that rewrites the table"))
        self._step("reading")
        after = at(replace(stands, complete=1, swept_us=batch.cut.clock_us), batch.table)
        info = {NOTE_INFO: json.dumps(self._note(batch, reason=reason, pieces=0, next=None))}
        with self._committing(batch.table, books):
            commit = batch.table.overwrite(
                batch.columns.schema, self._extracted(batch, None, parts=batch.parts), after.transactions(), info
            )
        self._committed(batch.table, commit, books)
        books.inserted += commit.rows
        books.deleted += before
        books.position = stands.position

    # Rows ------------------------------------------------------------------------------------------------------------

    def _extracted(
        self,
        batch: _Batch,
        where: str | None,
        anomalies: Anomalies | None = None,
        *,
        parts: Sequence[str] = (),
        checked: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        schema = batch.columns.schema
        counted = batch.anomalies if anomalies is None else anomalies
        for rows in self._read(batch, where, counted, parts, checked=checked):
            moment = pa.repeat(pa.scalar(batch.cut.begun_us, schema.field(REPLICATED_AT).type), rows.num_rows)
            yield pa.RecordBatch.from_arrays([*rows.columns, moment], schema=schema)

    def _read(
        self,
        batch: _Batch,
        where: str | None,
        anomalies: Anomalies,
        parts: Sequence[str] = (),
        *,
        checked: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        """Rows of the source as they arrive.

        Args:
            batch: The batch.
            where: Which ones; None for all.
            anomalies: Collects what bronze can't show.
            parts: Conditions that divide them, so that several connections may read.
            checked: Whether it is known that none of them is too long.
        """
        source, plans = batch.source, batch.columns.plans

        def read(session: Session, which: str | None) -> Generator[pa.RecordBatch, None, None]:
            return extract(session, source.rows_sql, plans, anomalies=anomalies, where=which, rescued=True)

        # Each connection holds some rows at once: long ones are read by one only.
        if parts and are_short(batch.session, source, plans, where):
            return read_together(batch.session, parts, read, lock=f"{cuts.locking(self._declared.source)} NOWAIT")
        if not checked:
            refuse_long_rows(batch.session, source, plans, batch.key, where)
        return read(batch.session, where)

    def _keys(self, batch: _Batch) -> Keys:
        return Keys([plan.name for plan in batch.key_plans], parts_of(max(batch.source.rows, batch.table.count())))

    def _swept(self, batch: _Batch, late: Wanted, lost: Keys) -> None:
        """Compare all keys.

        Args:
            batch: The batch.
            late: Where keys are gathered that bronze lacks.
            lost: Where keys are gathered that the source lacks.
        """
        with self._keys(batch) as ours, self._keys(batch) as theirs:
            for rows in source_keys(batch.session, batch.source, batch.key_plans):
                ours.add(pa.Table.from_batches([rows]))
            for there in batch.table.stream(ours.key):
                theirs.add(there)
            for difference in differences(ours, theirs):
                late.add(difference.left.select(ours.key))
                if self._declared.deletes != "none":
                    lost.add(difference.right)

    def _wanted(self, batch: _Batch, wanted: Wanted, but: str | None) -> Iterator[pa.RecordBatch]:
        """The rows that are wanted, without those of a condition."""
        if not wanted:
            return
        # All rows are looked at for a few: what bronze can't show was counted before, or is not new.
        for rows in self._extracted(
            batch,
            None if but is None else f"({but}) IS NOT TRUE",
            Anomalies(),
            parts=batch.parts if but is None else (),
            checked=but is None,
        ):
            chosen = wanted.among(rows)
            if chosen.num_rows:
                yield chosen

    def _parts(self, rows: Iterable[pa.RecordBatch], gone: Iterable[pa.RecordBatch], batch: _Batch) -> Iterator[_Part]:
        """All of it in parts of bounded size; at least one."""
        schema = batch.columns.schema
        key_schema = pa.schema([schema.field(plan.name) for plan in batch.key_plans])
        held: tuple[list[pa.RecordBatch], list[pa.RecordBatch]] = ([], [])
        size = 0

        def part() -> _Part:
            return _Part(pa.Table.from_batches(held[0], schema), pa.Table.from_batches(held[1], key_schema))

        for number, batches in enumerate((rows, gone)):
            for each in batches:
                held[number].append(each if number == 0 else each.cast(key_schema))
                size += each.nbytes
                if size >= self._part_bytes:
                    yield part()
                    held, size = ([], []), 0
        yield part()

    # Commits ---------------------------------------------------------------------------------------------------------

    def _merged(
        self,
        batch: _Batch,
        rows: Iterable[pa.RecordBatch],
        gone: Iterable[pa.RecordBatch],
        before: Standing,
        after: Standing,
        note: dict[str, object],
        books: _Books,
        *,
        must: bool,
    ) -> None:
        """Merge, part by part; the last part leaves the table standing at `after`.

        Args:
            batch: The batch.
            rows: New and changed rows.
            gone: Keys to take out.
            before: Where the table stands until then.
            after: Where it stands then.
            note: What the last commit notes.
            books: Where it is counted.
            must: Whether to commit although there is nothing to merge.
        """
        parts = self._parts(rows, gone, batch)
        part = next(parts)
        self._step("extracted")
        self._require_keys(part.rows, batch)
        if not must and not part.rows.num_rows and not part.gone.num_rows:
            return
        before = replace(before, columns=after.columns)
        self._note_columns(batch, books)
        while True:
            following = next(parts, None)
            standing_then = at(before if following else after, batch.table)
            key = [plan.name for plan in batch.key_plans]
            with self._committing(batch.table, books):
                merged = batch.table.merge(
                    part.rows,
                    part.gone,
                    key,
                    standing_then.transactions(),
                    {NOTE_INFO: json.dumps(note)},
                    [REPLICATED_AT],
                )
            books.inserted += merged.inserted
            books.updated += merged.updated
            books.deleted += merged.deleted
            self._committed(batch.table, merged.commit, books)
            if following is None:
                return
            part = following
            self._require_keys(part.rows, batch)

    def _appended(
        self, batch: _Batch, rows: Iterable[pa.RecordBatch], after: Standing, note: dict[str, object], books: _Books
    ) -> None:
        after = at(after, batch.table)
        rest = after.transactions()
        position = rest.pop(after.app_id)

        def checked() -> Iterator[pa.RecordBatch]:
            for each in rows:
                self._require_keys(each, batch)
                yield each
            self._step("extracted")

        with self._committing(batch.table, books):
            commit = batch.table.append(
                batch.columns.schema, checked(), after.app_id, position, {NOTE_INFO: json.dumps(note)}, rest
            )
        books.inserted += commit.rows
        self._committed(batch.table, commit, books)

    @contextmanager
    def _committing(self, table: Table, books: _Books) -> Iterator[None]:
        """Commit in this block: a conflict with another replication is told from one with anybody else."""
        if books.unsynced is not None:
            # A log entry on disk behind one that is not would be a table that nobody can open. Without one of ours
            # there is no hurry: where the last is lost, so is its position, and its rows are read again.
            make_durable(table, books.unsynced)
            books.unsynced = None
        version = table.version
        try:
            yield
        except CommitConflictError as error:
            newest = self._lakehouse.open(self._name)
            if newest is not None and any(NOTE_INFO in commit.info for commit in newest.commits(version, held=True)):
                raise _YieldedError(str(error)) from error
            raise

    def _committed(self, table: Table, commit: Commit, books: _Books) -> None:
        books.batches += 1
        self._step("committed")
        table.make_durable(commit)
        self._step("made_durable")

    def _require_keys(self, rows: pa.Table | pa.RecordBatch, batch: _Batch) -> None:
        for plan in batch.key_plans:
            if rows.column(plan.name).null_count:
                raise ReplicationError(
                    f"Column {plan.source} of {self._declared.source} is part of its key and null in some rows. "
                    "Declare the columns that identify every row."
                )

    def _note(self, batch: _Batch, **more: object) -> dict[str, object]:
        return {"identity": batch.identity, "columns": batch.columns.facts, **more}

    def _note_columns(self, batch: _Batch, books: _Books) -> None:
        known = {change.column for change in books.schema_changes}
        for name in batch.drift.added:
            if name not in known:
                books.schema_changes.append(SchemaChange(name, delta_type(batch.columns.schema.field(name).type)))

    # What is due, and what is told -----------------------------------------------------------------------------------

    def _sweep_due(self, batch: _Batch, stands: Standing, request: ReplicateRequest, books: _Books) -> bool:
        if (request.sweep and not books.sweep_done) or batch.partitions != stands.partitions:
            return True
        if self._declared.delete_handling == "none":
            return False
        return batch.cut.clock_us - stands.swept_us >= self._declared.sweep_hours * 3600 * _US

    def _state_of_us(self, batch: _Batch, stands: Standing | None, books: _Books) -> int:
        """The source's clock at the moment that the table shows after this batch; also names what holds it back."""
        cut = batch.cut
        if self._declared.mode == "updated_at":
            books.blocker, moment = None, cut.position(self._declared)
        else:
            known = 0.0
            if stands is not None and stands.position == cut.oldest:
                known = (cut.clock_us - stands.clock_us) / _US
            books.blocker = cuts.blocker(batch.session, cut, known)
            moment = cut.clock_us - int((books.blocker.age_seconds if books.blocker else 0.0) * _US)
        books.lag_us, books.read_at = cut.clock_us - moment, time.monotonic()
        return moment

    def _report(self, books: _Books, began: float) -> ReplicateReport:
        table = self._lakehouse.open(self._name) if books.yielded else books.table
        lag = None if books.lag_us is None else books.lag_us / _US + time.monotonic() - books.read_at
        return ReplicateReport(
            source=self._declared.source,
            table=str(self._name),
            mode=self._declared.mode,
            inserted=books.inserted,
            updated=books.updated,
            deleted=books.deleted,
            batches=books.batches,
            position=None if self._declared.mode == "snapshot" else books.position,
            lag_seconds=None if books.yielded else lag,
            snapshot=books.snapshot,
            swept=books.swept,
            schema_changes=tuple(books.schema_changes),
            notes=books.notes,
            anomalies=tuple(books.anomalies.values()),
            blocker=books.blocker,
            table_version=None if table is None else table.version,
            table_rows=0 if table is None else table.count(),
            yielded=books.yielded,
            seconds=time.monotonic() - began,
        )


class _YieldedError(Exception):
    """Another replication of the table was first."""


def _ignore(_: object) -> None:
    """Nobody listens."""
