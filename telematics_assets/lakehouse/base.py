"""What the loaders need of a table: one handle, an append that carries its position, and the log.

Belongs here: the protocol and its plain data. Does not belong here: a table format (`delta.py`), streams, Dagster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from telematics_assets.catalog import TableName

if TYPE_CHECKING:
    import pyarrow as pa

#: Table properties that tie a table to the stream that fills it.
STREAM_ID_PROPERTY = "telematics.streamId"
STREAM_NAME_PROPERTY = "telematics.stream"
#: Text of the commit info: how many rows a commit wrote anew beside those that it added.
REWRITTEN_INFO = "telematics.rewrittenRows"
#: The same: positions of a commit by a writer that can set only one transaction, JSON by application.
POSITIONS_INFO = "telematics.positions"


@dataclass(frozen=True, slots=True)
class Commit:
    """One entry of a table's log.

    Attributes:
        version: Table version that it made.
        operation: As the writer named it (`WRITE`, `RESTORE`, `OPTIMIZE`, …).
        info: The writer's own texts in the commit info.
        transactions: Application transactions (`txn`): application id to version.
        rows: Rows added.
        files: Data files added.
        bytes: Bytes added.
        removes_data: Whether rows went away (delete, overwrite, restore, merge; not compaction).
        rewritten: Rows that `Table.widen` wrote anew; they aren't among `rows`. None for every other commit.
    """

    version: int
    operation: str
    info: Mapping[str, str] = field(default_factory=dict)
    transactions: Mapping[str, int] = field(default_factory=dict)
    rows: int = 0
    files: int = 0
    bytes: int = 0
    removes_data: bool = False
    rewritten: int | None = None


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did.

    Attributes:
        commit: Its entry of the log.
        inserted: Rows that had no row of their key in the table.
        updated: Rows that replaced one that was not the same.
        deleted: Rows that went away.
    """

    commit: Commit
    inserted: int
    updated: int
    deleted: int


class Table(Protocol):
    """ONE open handle on a table: position, schema and commit are of the same snapshot.

    A commit made through it is refused if the same application committed since the handle was opened.
    """

    @property
    def name(self) -> TableName:
        """Full name."""
        ...

    @property
    def uri(self) -> str:
        """Where it is."""
        ...

    @property
    def id(self) -> str:
        """Identity of the table; another one after it was dropped and created again."""
        ...

    @property
    def version(self) -> int:
        """Version of this snapshot; after `append`, the version that it committed."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """Columns with their comments in the field metadata (`comment`)."""
        ...

    @property
    def comment(self) -> str | None:
        """The table's comment."""
        ...

    @property
    def properties(self) -> Mapping[str, str]:
        """Table properties."""
        ...

    def position(self, app_id: str) -> int | None:
        """The last transaction version that the application committed, or None."""
        ...

    def commits(self, after: int, *, held: bool = False) -> Sequence[Commit]:
        """The log's entries from version `after + 1` to this snapshot's, in order.

        Args:
            after: Version before the first.
            held: Whether to begin later where the log no longer reaches back that far.

        Raises:
            TableMovedError: If the log does not reach back that far, unless `held`.
        """
        ...

    def append(
        self,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        app_id: str,
        version: int,
        info: Mapping[str, str],
        also: Mapping[str, int] | None = None,
    ) -> Commit:
        """Append rows, added columns and the application's new position in ONE commit.

        Args:
            schema: Schema of the batches: the table's columns and, behind them, columns to add. Types are not
            converted.
            batches: The rows; pulled one by one. An exception raised by them passes through, and nothing is committed.
            app_id: The application.
            version: Its new position.
            info: Texts for the commit info.
            also: Positions of further applications.

        Raises:
            CommitConflictError: If another writer was first; nothing of this commit is in the table.
        """
        ...

    def merge(
        self,
        rows: pa.Table,
        gone: pa.Table,
        key: Sequence[str],
        positions: Mapping[str, int],
        info: Mapping[str, str],
        unseen: Sequence[str] = (),
    ) -> Merged:
        """Bring rows in by their key, take others out, add columns and set positions, in ONE commit.

        It becomes this handle's next version or nothing. Rows that are in the table as they are given are left alone,
        so that the table's change data feed shows changes only; columns of the table that are not given become null in
        rows that change. Both tables are held in memory.

        Args:
            rows: New and changed rows, one for a key: columns of the table and, behind them, columns to add. Types are
                not converted.
            gone: Keys of rows to take out, none of them in `rows`; keys that the table does not have are no error.
            key: Columns that identify a row; never null.
            positions: Applications with their new positions. The first must be higher than it ever was: a writer that
                can set only one sets this one, notes all of them in the same commit (`POSITIONS_INFO`) and sets them in
                a second one right behind it.
            info: Texts for the commit info.
            unseen: Columns that don't count when rows are compared.

        Raises:
            CommitConflictError: If anybody committed since the handle was opened; nothing of it is in the table.
            TableUnsupportedError: If the table refuses to lose rows (`delta.appendOnly`).
        """
        ...

    def overwrite(
        self,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        positions: Mapping[str, int],
        info: Mapping[str, str],
    ) -> Commit:
        """Replace all rows and the schema, and set the positions of some applications, in ONE commit.

        It becomes this handle's next version or nothing: whatever anybody committed since makes it a conflict. Readers
        see the rows before or the rows after; the versions before can still be read.

        Args:
            schema: Schema of the batches, and the table's new one. Types are not converted.
            batches: The rows; pulled one by one. An exception raised by them passes through, and nothing is committed.
            positions: Applications with their new positions; of any other writer with one of them, one commits.
            info: Texts for the commit info.

        Raises:
            BasisMovedError: If a property of the table had to change first. Call it again: it becomes the version after
                that.
            CommitConflictError: If another writer was first; nothing of this commit is in the table.
            TableUnsupportedError: If the table refuses to lose rows (`delta.appendOnly`).
        """
        ...

    def widen(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], app_id: str, version: int, info: Mapping[str, str]
    ) -> Commit:
        """Append as `append` does, and widen columns, in ONE commit: the rows that are there are written anew.

        Readers see the table before or after it, and older versions as they were. Identity, properties and comments
        stay.

        Args:
            schema: As for `append`; columns may have a wider type (`types.wider`).
            batches: The new rows, in these types.
            app_id: The application.
            version: Its new position.
            info: Texts for the commit info.

        Raises:
            CommitConflictError: If anybody committed since the handle was opened.
        """
        ...

    def set_property(self, key: str, value: str) -> None:
        """Set one table property, in a commit of its own."""
        ...

    def sources(self) -> pa.Table:
        """The files that the table's rows came from.

        Returns:
            `_source_file` (STRING), `_source_file_modified_at` (TIMESTAMP), `rows` (BIGINT) and the newest `_batch_id`
            (BIGINT) of each.
        """
        ...

    def brought(self, batch_id: int, marks: Sequence[str]) -> pa.Table:
        """What one batch brought, by file.

        Args:
            batch_id: Number of the batch.
            marks: Columns whose values are counted; those that the table lacks count as null.

        Returns:
            `_source_file` (STRING) and `rows` (BIGINT), and for each of `marks` how many have a value there (BIGINT).
        """
        ...

    def make_durable(self, commit: Commit) -> None:
        """Bring a commit's data files, log entry and folders safely to disk."""
        ...

    def compact(self) -> bool:
        """Write small data files together, in a commit that changes no row; the handle then shows the newest version.

        Returns:
            Whether there was anything to do.

        Raises:
            CommitConflictError: If another writer took one of the files out first; nothing was changed.
            TableUnsupportedError: If the table has a feature that this can't be done with.
        """
        ...

    def vacuum(self) -> tuple[int, int]:
        """Delete files that no version of the last days needs, also those of writers that were killed.

        Returns:
            How many, and their bytes.
        """
        ...

    def trim_log(self) -> int:
        """Write a log checkpoint at this version, and delete expired entries before it; how many."""
        ...

    def count(self) -> int:
        """Rows of the whole table, from the log."""
        ...

    def size(self) -> tuple[int, int]:
        """Data files and their bytes, from the log."""
        ...

    def read(
        self, columns: Sequence[str] | None = None, limit: int | None = None, since_batch: int | None = None
    ) -> pa.Table:
        """See `engines.base.Engine.read`."""
        ...

    def stream(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of all rows, piece by piece in bounded memory, in no order."""
        ...

    def out_of_range(
        self, column: str, minimum: float | None, maximum: float | None, since_batch: int
    ) -> tuple[int, int, str | None]:
        """Values of one column in batches from `since_batch` on: how many, how many outside the range, an example.

        Text is read as a number; what is no number counts as outside. Null counts as nothing.
        """
        ...


class Lakehouse(Protocol):
    """All tables of a deployment."""

    @property
    def uri(self) -> str:
        """Where the tables are."""
        ...

    def tables(self, catalog: str, schema: str) -> Sequence[TableName]:
        """The tables of a schema, by name."""
        ...

    def open(self, name: TableName) -> Table | None:
        """Open a table at its newest version, or None if there is none."""
        ...

    def drop(self, name: TableName) -> None:
        """Drop a table and its data; none there is no error."""
        ...

    def create(self, name: TableName, schema: pa.Schema, comment: str, properties: Mapping[str, str]) -> Table:
        """Create an empty table; if another process was first, open that one.

        Args:
            name: Full name.
            schema: Columns; comments in the field metadata (`comment`).
            comment: The table's comment.
            properties: Table properties.
        """
        ...
