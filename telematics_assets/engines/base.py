"""The engine protocol and its reports.

Belongs here: what every engine can do, and the plain frozen data that it answers with. Reports can cross a process
and a network: they hold numbers, texts and tuples only, never an open file or a session.
Does not belong here: any engine, Dagster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

from telematics_assets.catalog import Column, FileStream, Names, ReplicatedTable, TableName
from telematics_assets.errors import SettingsError, SupabaseError, SupabaseUnavailableError

if TYPE_CHECKING:
    import pyarrow as pa

FileState = Literal["DISCOVERED", "INGESTED", "SKIPPED_CORRUPTED", "SKIPPED_MISSING", "SKIPPED_EXISTING", "CHANGED"]
FILE_STATES: tuple[FileState, ...] = get_args(FileState)


Operation = Literal["load", "full_refresh", "retry", "backfill"]


@dataclass(frozen=True, slots=True)
class Backfill:
    """Which files a backfill loads: those that every given limit lets pass.

    Attributes:
        folder: Only files below this folder: relative to the Volume or to the stream's folder, or a `/Volumes/…` path.
        modified_after: ISO timestamp; only files modified strictly after it.
        modified_before: ISO timestamp; only files modified strictly before it.
    """

    folder: str | None = None
    modified_after: str | None = None
    modified_before: str | None = None


@dataclass(frozen=True, slots=True)
class IngestRequest:
    """What of a stream to load. At most one of full refresh, retry and backfill.

    Attributes:
        max_files: Stop after about this many files (whole batches are cut to it); None drains all that is available.
        list_whole: List the whole folder even where `use_incremental_listing` allows a part: for files that a look
            called late.
        full_refresh: First rewrite the table from all files that are there, in one commit; then go on as usual.
        force: Let a full refresh take away rows whose files are gone or can't be read any more.
        retry_files: Read only these files again, which were skipped as corrupted or missing: paths relative to the
            Volume or to the stream's folder, or `/Volumes/…` paths.
        backfill: Load only these files, also those that were left out because they were there before the stream began.
    """

    max_files: int | None = None
    list_whole: bool = False
    full_refresh: bool = False
    force: bool = False
    retry_files: tuple[str, ...] = ()
    backfill: Backfill | None = None

    @property
    def operation(self) -> Operation:
        """What is asked for."""
        if self.full_refresh:
            return "full_refresh"
        if self.retry_files:
            return "retry"
        return "load" if self.backfill is None else "backfill"


@dataclass(frozen=True, slots=True)
class Progress:
    """Something happened in a long operation.

    Attributes:
        phase: `list`, `plan`, `read`, `commit` or `done`.
        message: One readable line.
        done: Files read so far in this batch.
        total: Files of this batch.
        rows: Rows read so far in this batch.
    """

    phase: str
    message: str
    done: int = 0
    total: int = 0
    rows: int = 0


ProgressListener = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file of a batch that brought no rows.

    Attributes:
        path: Path relative to the Volume.
        state: `SKIPPED_CORRUPTED` or `SKIPPED_MISSING`.
        reason: Why, in one line.
    """

    path: str
    state: FileState
    reason: str


@dataclass(frozen=True, slots=True)
class SchemaChange:
    """A column that a batch added to the table, or widened.

    Attributes:
        column: Its name.
        type: Its Delta type in SQL spelling.
        previous: The type that it had; None if it is new.
    """

    column: str
    type: str
    previous: str | None = None


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One committed batch.

    Attributes:
        batch_id: Its number; also the Delta transaction version.
        table_version: Delta version of its commit; None if it had no rows and needed no commit.
        files_ingested: Files whose rows are in the table now.
        bytes_ingested: Their size.
        rows: Rows added.
        rows_rescued: Rows with something in the rescued data column.
        rows_corrupt: Rows whose record could not be parsed.
        skipped: Files that brought no rows.
        schema_changes: Columns added or widened.
        recovered: Whether an earlier process had committed it and this one only published that.
    """

    batch_id: int
    table_version: int | None
    files_ingested: int
    bytes_ingested: int
    rows: int
    rows_rescued: int
    rows_corrupt: int
    skipped: tuple[SkippedFile, ...] = ()
    schema_changes: tuple[SchemaChange, ...] = ()
    recovered: bool = False


@dataclass(frozen=True, slots=True)
class RetriedFile:
    """What a retry made of one file that it was asked to read again.

    Attributes:
        path: Path relative to the Volume.
        before: Its state before.
        after: Its state after.
        reason: Why it is in that state, or why it was left as it is; None if it was ingested.
        batch_id: Batch that decided its state, or None.
    """

    path: str
    before: FileState
    after: FileState
    reason: str | None
    batch_id: int | None


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What one `ingest` did: its batches, and the stream as it stands afterwards.

    Attributes:
        stream: Name of the stream.
        table: Full table name.
        batches: The batches committed, in order.
        table_version: Delta version of the table afterwards; None if there is no table yet.
        table_rows: Rows of the whole table afterwards.
        files_changed: Known files that have another size or modification time now; their new content is not loaded.
        files_waiting: New files that may still be being written; a later run takes them.
        yielded: Whether another loader of the same stream was faster; it holds the rest, nothing was doubled.
        seconds: How long it took.
        operation: What was asked for.
        retried: The files that were asked to be read again, as given.
        files_cleaned: Source files that `clean_source` moved or deleted.
        cleaning_problem: What kept `clean_source` from its work; the load itself is whole, and the next one goes on.
    """

    stream: str
    table: str
    batches: tuple[BatchReport, ...]
    table_version: int | None
    table_rows: int
    files_changed: int
    files_waiting: int
    yielded: bool
    seconds: float
    operation: Operation = "load"
    retried: tuple[RetriedFile, ...] = ()
    files_cleaned: int = 0
    cleaning_problem: str | None = None

    @property
    def files_ingested(self) -> int:
        """Files whose rows were added."""
        return sum(batch.files_ingested for batch in self.batches)

    @property
    def files_skipped(self) -> int:
        """Files that brought no rows."""
        return sum(len(batch.skipped) for batch in self.batches)

    @property
    def rows(self) -> int:
        """Rows added."""
        return sum(batch.rows for batch in self.batches)

    @property
    def rows_rescued(self) -> int:
        """Rows added with rescued data."""
        return sum(batch.rows_rescued for batch in self.batches)

    @property
    def rows_corrupt(self) -> int:
        """Rows added whose record could not be parsed."""
        return sum(batch.rows_corrupt for batch in self.batches)

    @property
    def bytes_ingested(self) -> int:
        """Bytes of the files whose rows were added."""
        return sum(batch.bytes_ingested for batch in self.batches)


@dataclass(frozen=True, slots=True)
class PendingFiles:
    """What a sensor asks: is there anything to load, and how much.

    Attributes:
        stream: Name of the stream.
        files: Files that a load would take now (a pending plan's files included).
        bytes: Their size.
        fingerprint: Changes when the set of these files (path, size, modification time) changes; "" if there are none.
        waiting: New files that may still be being written.
        changed: Known files with another size or modification time.
        known: Files in the ledger.
        data_version: Hash of the whole listing: the version of the landing folder.
        oldest_modified_ns: Modification time of the oldest of `files`, nanoseconds since the epoch, or None.
        late: How many of `files` an incremental listing does not see: load with `list_whole` to take them at once.
    """

    stream: str
    files: int
    bytes: int
    fingerprint: str
    waiting: int
    changed: int
    known: int
    data_version: str
    oldest_modified_ns: int | None = None
    late: int = 0


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a stream and its state (as in Auto Loader's `cloud_files_state`).

    Attributes:
        path: Path relative to the Volume.
        state: One of `FILE_STATES`.
        reason: Why it was skipped, or is waiting; None otherwise.
        size: Bytes; None if it is not known any more.
        modified_ns: Modification time, nanoseconds since the epoch (UTC), or None.
        batch_id: Batch that decided its state, or None.
        rows: Rows that it brought, or None.
    """

    path: str
    state: FileState
    reason: str | None
    size: int | None
    modified_ns: int | None
    batch_id: int | None
    rows: int | None


@dataclass(frozen=True, slots=True)
class ColumnState:
    """A column of a table as it is: name, Delta type in SQL spelling, comment."""

    name: str
    type: str
    comment: str | None


@dataclass(frozen=True, slots=True)
class TableState:
    """A table as its log describes it; no data is read.

    Attributes:
        table: Full table name.
        uri: Where it is.
        version: Delta version.
        rows: Rows of the whole table.
        files: Data files.
        bytes: Bytes of the data files.
        columns: Its columns.
        comment: The table's comment.
    """

    table: str
    uri: str
    version: int
    rows: int
    files: int
    bytes: int
    columns: tuple[ColumnState, ...]
    comment: str | None


@dataclass(frozen=True, slots=True)
class BatchBalance:
    """One batch's books: what its files brought against what its commit added.

    Attributes:
        batch_id: The batch.
        table_version: Delta version of its commit.
        expected_rows: Sum of the rows of the batch's files, from the checkpoint.
        added_rows: Rows that the Delta commit added, from the log.
    """

    batch_id: int
    table_version: int
    expected_rows: int
    added_rows: int


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """What one `maintain` did to a stream's table, its checkpoint and its landing folder.

    Attributes:
        stream: Name of the stream.
        table: Full table name.
        table_version: Delta version of the table afterwards; None if there is no table yet.
        files_before: Data files of the table.
        files_after: Data files after compaction.
        bytes_before: Their bytes.
        bytes_after: Their bytes after compaction.
        files_removed: Files that no version of the last days needs, and that are deleted now.
        bytes_removed: Their bytes.
        log_entries_removed: Entries of the table's log that have expired and are deleted now.
        ledger_parts_before: Files that the checkpoint's ledger was read from.
        ledger_parts_after: The same, merged.
        sources_moved: Files of the landing folder that `clean_source` moved.
        sources_deleted: Files of the landing folder that `clean_source` deleted.
        notes: What was left for the next time, and why.
        seconds: How long it took.
    """

    stream: str
    table: str
    table_version: int | None = None
    files_before: int = 0
    files_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    files_removed: int = 0
    bytes_removed: int = 0
    log_entries_removed: int = 0
    ledger_parts_before: int = 0
    ledger_parts_after: int = 0
    sources_moved: int = 0
    sources_deleted: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Violations:
    """How many rows of the asked batches have an implausible value in one column.

    Attributes:
        column: The column.
        checked: Rows with a value.
        outside: Rows whose value is below the minimum, above the maximum, or no number.
        example: One such value as text, or None.
    """

    column: str
    checked: int
    outside: int
    example: str | None


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A loaded file whose bytes are those of another loaded file; the rows of both are in the table.

    Attributes:
        path: Path relative to the Volume.
        same_as: The file that was loaded before it.
        batch_id: Batch that loaded it.
    """

    path: str
    same_as: str
    batch_id: int


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Files that were loaded twice under two names.

    Attributes:
        files: By path.
        passed_over: Files of equal size and rows that could not be compared: they are gone, changed, or too many.
    """

    files: tuple[Duplicate, ...]
    passed_over: int


@dataclass(frozen=True, slots=True)
class ReplicateRequest:
    """How to replicate a table.

    Attributes:
        full: Take a new snapshot of the whole table, whatever the position says.
        sweep: Compare the keys now, whether or not it is due.
    """

    full: bool = False
    sweep: bool = False


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Values of a source column that the bronze type can't show; what arrived instead is said by `kind`.

    Attributes:
        column: The column.
        kind: What they are, such as `infinity` or `BC date`.
        rows: How many of them this replication met.
        example: One of them as text, or None.
    """

    column: str
    kind: str
    rows: int
    example: str | None = None


@dataclass(frozen=True, slots=True)
class Blocker:
    """An open transaction that keeps the cut from moving on.

    Attributes:
        kind: `transaction` or `prepared transaction`.
        who: Process id, user and application, or the prepared transaction's name; no query text.
        age_seconds: How long it is open.
    """

    kind: str
    who: str
    age_seconds: float


@dataclass(frozen=True, slots=True)
class ReplicateReport:
    """What one `replicate` did, and the table as it stands afterwards.

    Attributes:
        source: Schema and table in PostgreSQL.
        table: Full name of the bronze table.
        mode: The table's `ReplicationMode`.
        inserted: Rows added.
        updated: Rows replaced.
        deleted: Rows removed.
        batches: Commits made; 0 if nothing had changed.
        position: What the table holds the source up to: every change below it is in; None in mode `snapshot`.
        lag_seconds: Age of the state that the table shows, by the source's clock.
        snapshot: Why a whole snapshot was taken (`first`, `asked for`, `another database`, …), or None.
        swept: Whether keys were compared.
        schema_changes: Columns added.
        notes: What else a reader should know, one line each: columns that are gone upstream, retyped ones, ….
        anomalies: Values that the bronze types can't show.
        blocker: What holds the cut back, or None.
        table_version: Delta version of the table afterwards; None if there is no table yet.
        table_rows: Rows of the whole table afterwards.
        yielded: Whether another process was replicating the table; nothing was doubled.
        seconds: How long it took.
    """

    source: str
    table: str
    mode: str
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    batches: int = 0
    position: int | None = None
    lag_seconds: float | None = None
    snapshot: str | None = None
    swept: bool = False
    schema_changes: tuple[SchemaChange, ...] = ()
    notes: tuple[str, ...] = ()
    anomalies: tuple[Anomaly, ...] = ()
    blocker: Blocker | None = None
    table_version: int | None = None
    table_rows: int = 0
    yielded: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """Keys of a source table against those of its bronze table, as far as both must agree.

    Attributes:
        source_rows: Keys of the source with a position below the table's.
        table_rows: Keys of the bronze table that no later change touched.
        missing: Keys of the source that bronze lacks.
        extra: Keys of bronze that the source lacks.
        examples: Some of them as text.
    """

    source_rows: int
    table_rows: int
    missing: int
    extra: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """Whether the source of the replicated tables can be asked.

    Attributes:
        state: `ready`; `not configured`; `unreachable`: it did not answer this time; `refused`: it refused for good.
        message: One readable line: what is there, or what is wrong and what to do; no secrets.
    """

    state: Literal["ready", "not configured", "unreachable", "refused"]
    message: str

    def require(self) -> None:
        """Let only a source pass that answers.

        Raises:
            SettingsError: It is not configured.
            SupabaseError: It refused for good.
            SupabaseUnavailableError: It did not answer.
        """
        if self.state == "not configured":
            raise SettingsError(self.message)
        if self.state == "refused":
            raise SupabaseError(self.message)
        if self.state == "unreachable":
            raise SupabaseUnavailableError(self.message)


@dataclass(frozen=True, slots=True)
class SourcePosition:
    """How far a source table is ahead of its bronze table, as far as positions tell.

    Attributes:
        source: Schema and table in PostgreSQL.
        highest: The highest position of a row or of a tombstone; None if there is none.
        replicated: What the bronze table holds the source up to; None if it has no position.
    """

    source: str
    highest: int | None
    replicated: int | None

    @property
    def pending(self) -> bool:
        """Whether a replication would find something."""
        return self.replicated is None or (self.highest is not None and self.highest >= self.replicated)


@dataclass(frozen=True, slots=True)
class SourceDrift:
    """One way in which the source and the declarations have drifted apart.

    Attributes:
        source: Schema and table in PostgreSQL.
        kind: `undeclared` for a table that nobody declared; else what of a declared one: `missing`, `column`, `key`, ….
        message: What was found, and what to do about it.
    """

    source: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class RepeatedKeys:
    """Primary keys that a bronze table holds more than once.

    Attributes:
        columns: The key.
        rows: Rows that were looked at.
        keys: How many keys are there twice or more.
        examples: Some of them as text.
    """

    columns: tuple[str, ...]
    rows: int
    keys: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `telematics doctor`.

    Attributes:
        level: `ok`, `warning` or `error`.
        subject: What was looked at.
        message: What was found.
        fix: What to do about it, or None.
    """

    level: Literal["ok", "warning", "error"]
    subject: str
    message: str
    fix: str | None = None


@runtime_checkable
class Engine(Protocol):
    """Executes streams and answers questions about tables. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """The engine's name, as `TELEMATICS_ENGINE` gives it."""
        ...

    @property
    def names(self) -> Names:
        """The deployment's catalog, schemas and Volume."""
        ...

    def ingest(
        self, stream: FileStream, request: IngestRequest | None = None, progress: ProgressListener | None = None
    ) -> IngestReport:
        """Load what is available into the stream's table, exactly once, batch by batch.

        Raises:
            CheckpointError: The checkpoint can't be trusted; the message gives the choices.
            TableError: The table is not this stream's, or was changed by somebody else.
            RowsAtRiskError: A full refresh would lose rows, and was not forced.
            UnknownNameError: A file to retry is not one of the stream's.
            TransientError: Something did not answer; the same call may go through later.
        """
        ...

    def look(self, stream: FileStream) -> PendingFiles:
        """What a load would find now. Cheap, and writes nothing."""
        ...

    def files(self, stream: FileStream, state: FileState | None = None) -> Sequence[FileRecord]:
        """Every file of the stream with its state, by path; only those in `state` if given."""
        ...

    def file_table(self, stream: FileStream, state: FileState | None = None, limit: int | None = None) -> pa.Table:
        """The same in columns, for many files: the fields of `FileRecord`, at most `limit` of them."""
        ...

    def tables(self) -> Sequence[TableState]:
        """All tables of the bronze schema, by name."""
        ...

    def state(self, table: TableName) -> TableState | None:
        """The table as its log describes it, or None if there is none."""
        ...

    def read(
        self,
        table: TableName,
        columns: Sequence[str] | None = None,
        limit: int | None = None,
        since_batch: int | None = None,
    ) -> pa.Table:
        """Rows of a table, newest batches first where a limit cuts.

        Args:
            table: Which table.
            columns: Only these columns; all if None. Unknown ones are left out.
            limit: At most this many rows; all if None.
            since_batch: Only rows whose `_batch_id` is at least this.

        Raises:
            TableNotFoundError: If there is no such table.
        """
        ...

    def balance(self, stream: FileStream, since_batch: int) -> Sequence[BatchBalance]:
        """The books of every committed batch from `since_batch` on that has a Delta commit."""
        ...

    def violations(self, table: TableName, columns: Sequence[Column], since_batch: int) -> Sequence[Violations]:
        """Count implausible values (by the columns' `minimum` and `maximum`) in batches from `since_batch` on."""
        ...

    def duplicates(self, stream: FileStream, since_batch: int) -> Duplicates:
        """Files of batches from `since_batch` on that have the same bytes as another file that was ever loaded.

        Files are compared as they stand in the Volume now; the work is bounded by how many look alike.
        """
        ...

    def reset(self, stream: FileStream, *, rebuild: bool = False, drop_table: bool = False) -> str:
        """Make checkpoint and table agree again after one of them was lost, restored or changed by hand.

        Args:
            stream: The stream.
            rebuild: Make a new ledger from the table's rows, and go on from there.
            drop_table: Drop the table and forget the checkpoint; the next load takes everything that is there.

        Returns:
            What was done, as one line.

        Raises:
            OptionError: If neither is asked for while the table is there, or both are.
        """
        ...

    def maintain(
        self, stream: FileStream | ReplicatedTable, progress: ProgressListener | None = None
    ) -> MaintenanceReport:
        """Keep a stream's table, checkpoint and landing folder small; its rows and what is known of it stay the same.

        Compacts small data files, deletes those that no version of the last days needs, writes a log checkpoint and
        deletes expired log entries, merges the ledger, and lets `clean_source` do all that is due. Of a replicated
        table the first three. Safe at any time, while loads run, and when killed.

        Raises:
            CheckpointError: As `ingest` does.
            TableError: As `ingest` does.
            TransientError: Something did not answer; what was done before is done.
        """
        ...

    def source_session(self) -> AbstractContextManager[None]:
        """A block in which this thread asks the source through one connection, instead of one for each question.

        The first question opens it; lost, it is opened anew by the next one. Within another such block it is that
        block's.
        """
        ...

    def source_status(self) -> SourceStatus:
        """Whether the source of the replicated tables is configured and answers; asks it once, and raises nothing."""
        ...

    def source_positions(self, tables: Sequence[ReplicatedTable]) -> Sequence[SourcePosition]:
        """How far the sources of tables of mode `row_xid` are ahead; one short transaction for all of them.

        Raises:
            PermanentError: The source is not configured, or refuses for good.
            TransientError: It did not answer.
        """
        ...

    def source_drift(self, tables: Sequence[ReplicatedTable]) -> Sequence[SourceDrift]:
        """Where the source and these declarations have drifted apart. Raises as `source_positions` does."""
        ...

    def replicate(
        self, table: ReplicatedTable, request: ReplicateRequest | None = None, progress: ProgressListener | None = None
    ) -> ReplicateReport:
        """Bring a bronze table up to its source table: what changed since the last time, or the whole of it.

        Nothing is lost or repeated, wherever it is killed; run again, it goes on.

        Raises:
            ReplicationError: The table can't be replicated as it is declared.
            TableError: The bronze table is not this source's, or was changed by somebody else.
            SchemaError: A column's type is another one now; a full replication rewrites the table.
            SupabaseError: The database refuses for good.
            TransientError: Something did not answer; the same call may go through later.
        """
        ...

    def reconcile(self, table: ReplicatedTable) -> Reconciliation:
        """Compare the keys of a source table with those of its bronze table, as far as both must agree.

        Raises:
            ReplicationError: There is no whole snapshot yet.
            TransientError: Something did not answer.
        """
        ...

    def repeated_keys(self, table: ReplicatedTable) -> RepeatedKeys | None:
        """Primary keys that the bronze table holds more than once; None if there is no table yet.

        Raises as `source_positions` does: the source says which columns are the key.
        """
        ...

    def doctor(self, streams: Sequence[FileStream] = ()) -> Sequence[Finding]:
        """Look at everything this engine and these streams need; say what is wrong and how to mend it."""
        ...
