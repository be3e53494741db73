"""A full refresh: the table rewritten from all files that are there, in one commit, by a new generation of the stream.

Belongs here: the steps of a refresh, what may not be lost by it, and its end after a crash.
Does not belong here: batches (`loader.py`), the form of the checkpoint's files (`checkpoint.py`), how rows are written.

(1) The intent is published: new generation, new stream id, plan, and the table version that it is based on. (2) The
files are read, the result is published, and ONE overwrite commit holds all rows, the schema, and the positions of the
new stream id and of the old one. It becomes the version right after the one it is based on, or nothing: so the table's
log alone says whether a refresh came to pass, and a loader of the old generation finds its own position taken. (3) The
table is told its new stream id, all is made durable, and the new generation is published with its first batch
committed.

Killed before the commit, a refresh changed nothing and is forgotten: ask again. Killed behind it, the next load brings
it to its end.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import polars as pl

from telematics_assets.autoloader.checkpoint import (
    ATTEMPT_INFO,
    Checkpoint,
    Metadata,
    Plan,
    Refresh,
    RefreshName,
    Result,
    choices,
)
from telematics_assets.autoloader.counting import counted
from telematics_assets.autoloader.discovery import Discovered
from telematics_assets.catalog import FileStream, TableName
from telematics_assets.engines.base import Progress, ProgressListener
from telematics_assets.errors import (
    BasisMovedError,
    CheckpointCorruptError,
    CommitConflictError,
    FileMissingError,
    RowsAtRiskError,
    TableMovedError,
)
from telematics_assets.lakehouse.base import STREAM_ID_PROPERTY, Commit, Lakehouse, Table
from telematics_assets.volumes.base import as_files

#: Steps of a full refresh, in order, as they are announced to `on_step`.
REFRESH_STEPS = (
    "refresh_listed",
    "refresh_planned",
    "reading",
    "file_read",
    "results_published",
    "table_committed",
    "identity_set",
    "made_durable",
    "refresh_published",
)

#: States of files whose rows a refresh would take away.
_LOST = ("SKIPPED_CORRUPTED", "SKIPPED_MISSING", "DENIED")
_SHOWN = 5
_TRIES = 5


class RefreshWriter(Protocol):
    """How an engine rewrites a table. Part of `autoloader.loader.BatchWriter`."""

    def rewrite(
        self,
        stream: FileStream,
        table: Table,
        plan: Plan,
        attempt: str,
        positions: dict[str, int],
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
    ) -> Commit:
        """Read the plan's files, call `publish` with the result, and replace all rows and the schema by ONE commit.

        Raises:
            CommitConflictError: Another writer was first; nothing of this attempt is in the table.
        """
        ...


@dataclass(frozen=True)
class Basis:
    """What a refresh starts from.

    Attributes:
        table: The open table.
        batch_id: Number of its batch, beyond the next one: no loader of the old generation publishes anything by it.
        known: Paths of files whose rows may be in the table; None if nobody minds what becomes of them.
        left_out: Files that were there before the stream began and stay left out (`LEDGER_SCHEMA`).
    """

    table: Table
    batch_id: int
    known: pl.Series | None
    left_out: pl.DataFrame


@dataclass(frozen=True)
class Refreshed:
    """A refresh that came to its end."""

    plan: Plan
    result: Result
    table_version: int


class Refresher:
    """Makes full refreshes of one stream, and ends those of processes that died."""

    def __init__(
        self,
        stream: FileStream,
        name: TableName,
        lakehouse: Lakehouse,
        writer: RefreshWriter,
        checkpoint: Checkpoint,
        step: Callable[[str], None],
    ) -> None:
        """Tie it to a stream, its table and its checkpoint."""
        self._stream = stream
        self._name = name
        self._lakehouse = lakehouse
        self._writer = writer
        self._checkpoint = checkpoint
        self._step = step

    def run(self, basis: Basis, found: Discovered, planner: str, tell: ProgressListener) -> Refreshed:
        """Rewrite the table.

        Args:
            basis: What it starts from.
            found: All files that are there, compared with those that are left out.
            planner: Id of this process.
            tell: Told what happens.

        Raises:
            RowsAtRiskError: If rows would be lost.
            CommitConflictError: If somebody committed meanwhile.
        """
        self._refuse_loss(basis, found)
        plan = Plan(basis.batch_id, planner, tuple(as_files(found.ready)))
        while True:
            try:
                return self._once(basis, plan, tell)
            except BasisMovedError:
                # The intent names the version that it is based on. Each time fewer columns have statistics.
                continue

    def _once(self, basis: Basis, plan: Plan, tell: ProgressListener) -> Refreshed:
        table = basis.table
        name = RefreshName(self._checkpoint.generation() + 1, table.version, uuid.uuid4().hex)
        refresh = Refresh(name, table.properties.get(STREAM_ID_PROPERTY), uuid.uuid4().hex[:12], plan)
        tell(Progress("plan", f"full refresh as batch {plan.batch_id}: {len(plan.files)} files", 0, len(plan.files)))
        self._checkpoint.publish_refresh(refresh)
        self._step("refresh_planned")

        def publish(result: Result) -> None:
            self._refuse_unread(basis, result)
            self._checkpoint.publish_result(result)
            self._step("results_published")

        # With the old stream's position taken, a loader that still holds a plan of it can't add its rows a second time.
        replaced = {} if refresh.replaces is None else {refresh.replaces: plan.batch_id}
        positions = {name.stream_id: plan.batch_id, **replaced}
        try:
            self._writer.rewrite(self._stream, table, plan, refresh.attempt, positions, publish, self._step, tell)
        except BasisMovedError:
            self._checkpoint.forget_refresh(name)
            raise
        except CommitConflictError as error:
            raise CommitConflictError(
                f"Somebody committed to {self._name} while its files were read for the full refresh, so it was not "
                "made; nothing was changed. Run it again while nothing else loads or maintains the table "
                f"(`telematics load {self._stream.name} --full-refresh`)."
            ) from error
        self._step("table_committed")
        return self._finish(refresh)

    def settle(self) -> Refreshed | None:
        """End a refresh whose commit was made but not published, and forget those that can't be made any more."""
        refresh = self.unfinished(forget=True)
        return None if refresh is None else self._finish(refresh)

    def unfinished(self, *, forget: bool = False) -> Refresh | None:
        """A refresh whose commit is in the table, but whose generation is not published yet.

        Args:
            forget: Whether to delete intents that came to an end, or never can.
        """
        names = self._checkpoint.refreshes()
        if not names:
            return None
        # The table is opened last: what it lacks then at a later version, it will never get.
        next_generation = self._checkpoint.generation() + 1
        table = self._lakehouse.open(self._name)
        version = -1 if table is None else table.version
        made: list[RefreshName] = []
        for name in names:
            if name.generation < next_generation:
                dead = True
            elif table is not None and table.position(name.stream_id) is not None:
                made.append(name)
                dead = False
            else:
                dead = table is None or version > name.table_version
            if dead and forget:
                self._checkpoint.forget_refresh(name)
        try:
            return self._checkpoint.refresh(max(made)) if made else None
        except FileMissingError:
            # Another loader came to its end with it.
            return None

    def _finish(self, refresh: Refresh) -> Refreshed:
        name, plan = refresh.name, refresh.plan
        table = self._named(refresh)
        self._step("identity_set")
        version = name.table_version + 1
        commits = table.commits(name.table_version)
        for commit in commits:
            table.make_durable(commit)
        self._step("made_durable")
        try:
            result = self._checkpoint.result(plan.batch_id, commits[0].info.get(ATTEMPT_INFO, refresh.attempt))
        except FileMissingError as error:
            raise CheckpointCorruptError(
                f"{self._name} version {version} was made by a full refresh, but its result is lost: {error} Restore "
                f"the folder from a copy, or {choices(self._stream.name)}"
            ) from None
        result = counted(result, self._stream, table, self._checkpoint.volume_location)
        self._checkpoint.finish_refresh(refresh, Metadata(name.stream_id, table.id, plan.batch_id, version), result)
        self._step("refresh_published")
        return Refreshed(plan, result, version)

    def _named(self, refresh: Refresh) -> Table:
        """The table, once it names the new stream."""
        for _ in range(_TRIES):
            table = self._lakehouse.open(self._name)
            if table is None:
                raise TableMovedError(
                    f"{self._name} went away while its full refresh was made. Restore it, or run "
                    f"`telematics reset {self._stream.name}`."
                )
            # Any other name than the replaced one is a later refresh's, or a rebuild's.
            if table.properties.get(STREAM_ID_PROPERTY) != refresh.replaces:
                return table
            try:
                table.set_property(STREAM_ID_PROPERTY, refresh.name.stream_id)
            except CommitConflictError:
                # Another loader may have done it.
                continue
        raise CommitConflictError(
            f"The full refresh of {self._name} is in the table, but others keep changing its properties. The next "
            "load brings it to its end."
        )

    def _refuse_loss(self, basis: Basis, found: Discovered) -> None:
        if basis.known is None:
            return
        young = found.young.filter(pl.col("path").is_in(basis.known.implode()))["path"].to_list()
        if young:
            raise self._at_risk(young, "may still be being written: wait until they are whole")
        there = pl.concat([found.ready["path"], found.changed["path"]])
        gone = basis.known.filter(~basis.known.is_in(there.implode())).sort().to_list()
        if gone:
            raise self._at_risk(
                gone, f"are no longer in {self._stream.folder}, or the stream's options leave them out by now"
            )

    def _refuse_unread(self, basis: Basis, result: Result) -> None:
        if basis.known is None:
            return
        unread = pl.DataFrame(
            [(file.path, file.reason) for file in result.files if file.state in _LOST],
            schema={"path": pl.String, "reason": pl.String},
            orient="row",
        ).filter(pl.col("path").is_in(basis.known.implode()))
        if not unread.is_empty():
            raise self._at_risk(unread["path"].to_list(), f"can't be read now ({unread['reason'][0]})")

    def _at_risk(self, paths: list[str], what: str) -> RowsAtRiskError:
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        return RowsAtRiskError(
            f"{len(paths)} files that stream {self._stream.name!r} has ingested {what}: {', '.join(paths[:_SHOWN])}"
            f"{more}. A full refresh would take their rows out of {self._name}; nothing was changed. Bring the files "
            "back, or say --force (run config: force) to let their rows go. Earlier table versions keep them until "
            "VACUUM."
        )
