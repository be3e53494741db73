"""The exactly-once protocol: verify, plan, read, commit, publish.

Belongs here: the order of the steps of a batch, recovery after a crash, and every refusal that protects the promise.
Does not belong here: checkpoint formats (`checkpoint.py`), listing (`discovery.py`), how rows are read and written (the
engine's `BatchWriter`), Dagster.

One batch: (1) open the table ONCE and verify that table and checkpoint tell the same story; (2) publish the plan, or
take up
the pending one; (3) read the plan's files; (4) publish the result, then ONE table commit with rows, columns and
position; (5) publish the commit. Killed anywhere, the next run finds out from the table's own log how far it came.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import polars as pl

from telematics_assets.autoloader.checkpoint import (
    ATTEMPT_INFO,
    DIGEST_INFO,
    BatchCommit,
    Checkpoint,
    FileResult,
    Metadata,
    Plan,
    Result,
    WholeListing,
    choices,
)
from telematics_assets.autoloader.cleaning import Cleaned, SourceCleaner
from telematics_assets.autoloader.counting import counted
from telematics_assets.autoloader.discovery import LOOK_OPENS, Discovered, Discovery, choice_of, fingerprint
from telematics_assets.autoloader.duplicates import find_duplicates
from telematics_assets.autoloader.incremental import RECENT_FILES, lower_bound
from telematics_assets.autoloader.known import file_table
from telematics_assets.autoloader.refresh import Basis, Refreshed, Refresher, RefreshWriter
from telematics_assets.autoloader.selection import checked, left_alone, named, select
from telematics_assets.autoloader.upkeep import maintain
from telematics_assets.catalog import BATCH_ID, SOURCE_FILE, SOURCE_FILE_MODIFIED_AT, FileStream, TableName
from telematics_assets.engines.base import (
    BatchBalance,
    BatchReport,
    Duplicates,
    FileRecord,
    FileState,
    IngestReport,
    IngestRequest,
    MaintenanceReport,
    PendingFiles,
    Progress,
    ProgressListener,
    RetriedFile,
    SchemaChange,
    SkippedFile,
)
from telematics_assets.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointRolledBackError,
    CheckpointTooNewError,
    CommitConflictError,
    FileMissingError,
    OptionError,
    RowsAtRiskError,
    TableError,
    TableMovedError,
    TableNotOursError,
    TableUnsupportedError,
    TelematicsError,
    VolumeError,
)
from telematics_assets.lakehouse.base import STREAM_ID_PROPERTY, STREAM_NAME_PROPERTY, Commit, Lakehouse, Table
from telematics_assets.volumes.base import FileEntry, Volume, as_files

if TYPE_CHECKING:
    import pyarrow as pa

#: How often checkpoint and table are read again when they contradict each other because another loader goes on.
_READS = 5
#: A load gives `clean_source` this time; what is due beyond is left to the next load, or to maintenance.
CLEAN_SECONDS = 10.0
_RETENTION = "delta.setTransactionRetentionDuration"

#: Steps of a batch, in order, as they are announced to `on_step`; a test can stop a process at each of them.
STEPS = (
    "opened",
    "listed",
    "table_created",
    "metadata_published",
    "planned",
    "reading",
    "file_read",
    "results_published",
    "table_committed",
    "made_durable",
    "commit_published",
    "compacted",
)


class BatchWriter(RefreshWriter, Protocol):
    """How an engine reads a plan's files and writes their rows. The order of steps is the loader's."""

    def create_table(
        self, stream: FileStream, name: TableName, files: tuple[FileEntry, ...], properties: dict[str, str]
    ) -> Table:
        """Create the stream's table with the columns of its contract and of the first plan's files."""
        ...

    def write(
        self,
        stream: FileStream,
        table: Table,
        plan: Plan,
        attempt: str,
        stream_id: str,
        publish: Callable[[Result], None],
        on_step: Callable[[str], None],
        progress: ProgressListener,
    ) -> Commit:
        """Read the plan's files, call `publish` with the result, and commit once.

        Raises:
            CommitConflictError: Another loader was first; nothing of this attempt is in the table.
        """
        ...


@dataclass(frozen=True)
class _Session:
    metadata: Metadata
    table: Table
    last: BatchCommit | None
    plan: Plan | None
    recovered: BatchCommit | None = None

    @property
    def next_batch(self) -> int:
        return self.metadata.first_batch if self.last is None else self.last.batch_id + 1


class StreamLoader:
    """Loads one stream into its table. Keeps no state that matters beyond a call."""

    def __init__(
        self,
        stream: FileStream,
        table: TableName,
        volume: Volume,
        lakehouse: Lakehouse,
        writer: BatchWriter,
        *,
        settle_seconds: float = 1.0,
        incomplete_seconds: float = 300.0,
        on_step: Callable[[str], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
        recent_files: int = RECENT_FILES,
    ) -> None:
        """Tie a stream to its Volume, its table and a writer.

        Args:
            stream: The stream.
            table: Full name of its table.
            volume: The landing Volume; the checkpoint is in it too.
            lakehouse: Where the table is.
            writer: How rows are read and written.
            settle_seconds: See `Discovery`.
            incomplete_seconds: See `Discovery`.
            on_step: Called with each name of `STEPS` as it is passed.
            sleep: Waits for young files to settle, seconds.
            clock: Wall clock of listings, commits and `clean_source`, nanoseconds.
            monotonic: See `Discovery`.
            recent_files: See `incremental.RECENT_FILES`.
        """
        self._stream = stream
        self._name = table
        self._volume = volume
        self._lakehouse = lakehouse
        self._writer = writer
        self._settle = settle_seconds
        self._step = on_step or _ignore
        self._sleep = sleep
        self._checkpoint = Checkpoint(volume, stream.name, clock)
        self._discovery = Discovery(
            volume,
            stream.folder,
            stream.format,
            settle_seconds,
            incomplete_seconds,
            clock,
            monotonic,
            stream.options,
        )
        self._recent_files = recent_files
        self._refresher = Refresher(stream, table, lakehouse, writer, self._checkpoint, self._step)
        self._clock = clock
        self._cleaner = SourceCleaner(stream, volume, self._checkpoint.location, clock, self._step)
        self._planner = uuid.uuid4().hex[:12]

    # -- loading ---------------------------------------------------------------------------------------------------

    def ingest(self, request: IngestRequest | None = None, progress: ProgressListener | None = None) -> IngestReport:
        """Drain what is available, batch by batch. See `Engine.ingest`."""
        request = checked(request or IngestRequest(), self._stream, self._volume.location)
        tell = progress or _ignore
        denied: list[FileResult] = []
        started = time.monotonic()
        batches: list[BatchReport] = []
        refreshed = self._full_refresh(request.force, batches, tell) if request.full_refresh else None
        if not request.full_refresh and (ended := self._refresher.settle()) is not None:
            tell(Progress("plan", f"finished the full refresh of an earlier process, batch {ended.plan.batch_id}"))
            batches.append(_batch_report(ended.plan, ended.result, ended.table_version, recovered=True))
        if refreshed is not None:
            batches.append(_batch_report(refreshed.plan, refreshed.result, refreshed.table_version, recovered=False))
        records = {record.path: record for record in self.files()} if request.retry_files else {}
        again = named(request.retry_files, self._stream, self._volume.location, records)
        request = replace(request, retry_files=again)
        named_only = request.operation in ("retry", "backfill")
        handled: set[str] = set()
        yielded = waited = False
        session: _Session | None = None
        budget = request.max_files
        discovered: Discovered | None = None
        bound: str | None = None
        left: pl.DataFrame | None = None
        ours: int | None = None
        while budget is None or budget > 0:
            session = self._open()
            if session is not None and session.recovered is not None:
                tell(Progress("plan", f"finished batch {session.recovered.batch_id} of an earlier process"))
                batches.append(self._recover(session, session.recovered))
                continue
            self._step("opened")
            plan = None if session is None else session.plan
            if plan is None:
                last = None if session is None else session.last
                if left is None or left.is_empty() or last is None or last.batch_id != ours:
                    if bound is None:
                        # What is asked for by name may lie anywhere.
                        whole = request.list_whole or named_only
                        bound = "" if whole else self._bound(session)
                    tell(Progress("list", f"listing {self._stream.folder}{f' from {bound} on' if bound else ''}"))
                    try:
                        known, superseded = self._versions(None if session is None else session.metadata)
                    except CheckpointError:
                        if session is None or not self._replaced(session.metadata):
                            raise
                        bound = None
                        continue
                    chosen = select(request, self._stream, self._volume.location, known)
                    discovered = self._discovery.run(chosen.ledger, superseded, bound=bound)
                    self._step("listed")
                    # A file that left its batch because it changed is not chased within one call.
                    left = discovered.ready.filter(~pl.col("path").is_in(list(handled)) & chosen.wanted)
                # Else nobody but this call committed since the listing: what no batch took yet is still to be taken.
                assert discovered is not None
                if session is None and not self._stream.options.include_existing_files:
                    there = discovered.ready.height
                    tell(Progress("plan", f"{there} files were there before the stream began: they are left out"))
                    self._checkpoint.record_existing(discovered.ready)
                    self._begin(())
                    continue
                if left.is_empty():
                    young = discovered.young.filter(chosen.wanted).height
                    if young and not waited:
                        waited = True
                        tell(Progress("list", f"{young} young files: waiting {self._settle:g} s for them"))
                        self._sleep(self._settle)
                        continue
                    if session is not None and not discovered.bound and not named_only:
                        self._note(session.metadata, discovered, known)
                    break
                size = min(self._stream.options.max_files_per_trigger, budget or left.height)
                files = tuple(as_files(self._within_bytes(left.head(size))))
                if session is None:
                    # Listed again afterwards: another loader may have begun the stream with the same files.
                    self._begin(files)
                    continue
                plan = self._checkpoint.publish_plan(Plan(session.next_batch, self._planner, files))
                self._step("planned")
            assert session is not None
            tell(Progress("plan", f"batch {plan.batch_id}: {len(plan.files)} files", 0, len(plan.files)))
            paths = [file.path for file in plan.files]
            handled.update(paths)
            left = None if left is None else left.filter(~pl.col("path").is_in(paths))
            if budget is not None:
                budget -= len(plan.files)
            try:
                report, result = self._run(session, plan, tell)
            except CommitConflictError:
                if not self._lost_race(session, plan):
                    raise
                yielded = True
                tell(Progress("done", f"another loader committed batch {plan.batch_id}; it goes on with the rest"))
                break
            ours = plan.batch_id
            batches.append(report)
            denied += [file for file in result.files if file.state == "DENIED"]
        if denied:
            raise VolumeError(
                f"{len(denied)} files of stream {self._stream.name!r} could not be opened; all others are "
                "loaded. The first is "
                f"{denied[0].path}: {denied[0].reason} Then load again."
            )
        retried = self._retried([records[path] for path in again], handled) if again else ()
        cleaned, problem = Cleaned(), None
        if self._stream.options.clean_source != "OFF" and session is not None and not yielded:
            try:
                tell(Progress("clean", "clean_source looks for files that are due"))
                cleaned = self.clean(CLEAN_SECONDS)
            except TelematicsError as error:
                # The rows are in the table: a load does not fail for what can be cleaned later.
                problem = str(error)
        done = self._report(batches, discovered, yielded, time.monotonic() - started)
        return replace(
            done,
            operation=request.operation,
            retried=retried,
            files_cleaned=cleaned.moved + cleaned.deleted,
            cleaning_problem=problem,
        )

    def clean(self, seconds: float | None = None) -> Cleaned:
        """Let `clean_source` do what is due. See `SourceCleaner.clean`."""
        metadata = self._checkpoint.metadata()
        return Cleaned() if metadata is None else self._cleaner.clean(self._checkpoint.ledger(metadata), seconds)

    def maintain(self, progress: ProgressListener | None = None) -> MaintenanceReport:
        """Keep table, checkpoint and landing folder small. See `Engine.maintain`."""
        return maintain(self._stream, self._name, self._checkpoint, self._settled, self.clean, progress or _ignore)

    def _settled(self) -> tuple[Metadata, Table] | None:
        """Identity and table, with no commit that the checkpoint does not know of yet; None if it never began."""
        while (session := self._open()) is not None and session.recovered is not None:
            self._recover(session, session.recovered)
        return None if session is None else (session.metadata, session.table)

    def _retried(self, before: list[FileRecord], handled: set[str]) -> tuple[RetriedFile, ...]:
        now = {record.path: record for record in self.files()}
        return tuple(
            RetriedFile(
                file.path,
                file.state,
                (after := now.get(file.path, file)).state,
                after.reason if file.path in handled else left_alone(self._stream, file, after),
                after.batch_id,
            )
            for file in before
        )

    def _full_refresh(self, force: bool, batches: list[BatchReport], tell: ProgressListener) -> Refreshed | None:
        basis = self._basis(force, batches)
        if basis is None:
            # The stream never began: its first load is all that is wanted.
            return None
        tell(Progress("list", f"listing {self._stream.folder} for a full refresh"))
        found = self._discovery.run(basis.left_out)
        if found.waiting:
            self._sleep(self._settle)
            found = self._discovery.run(basis.left_out)
        self._step("refresh_listed")
        return self._refresher.run(basis, found, self._planner, tell)

    def _bound(self, session: _Session | None) -> str:
        """From which path on the listings of a load look; "" if they must be whole."""
        record = None if session is None else self._record(session.metadata)
        if record is None or self._discovery.sees_late_files or self._discovery.is_due(record, self._interval):
            return ""
        return record.bound

    def _record(self, metadata: Metadata | None) -> WholeListing | None:
        """The last listing of the whole folder, if listings may be partial after it."""
        if metadata is None or self._stream.options.use_incremental_listing == "false":
            return None
        record = self._checkpoint.whole_listing()
        counts = record is not None and (record.stream_id, record.chosen) == (metadata.stream_id, self._chosen)
        return record if counts else None

    def _note(self, metadata: Metadata, discovered: Discovered, known: pl.DataFrame) -> None:
        """Record a listing of the whole folder once nothing of it is left below a bound."""
        mode = self._stream.options.use_incremental_listing
        if mode == "false":
            return
        bound = lower_bound(known, self._stream.folder, proven=mode == "auto", recent=self._recent_files)
        before = self._record(metadata)
        if not bound and mode == "true" and before is not None:
            bound = before.bound
        if bound:
            bound = min(bound, discovered.first_left() or bound)
            listing = WholeListing(metadata.stream_id, self._chosen, discovered.listed_at_ns, bound)
            self._checkpoint.publish_whole_listing(listing)

    @property
    def _interval(self) -> float:
        return self._stream.options.backfill_ns / 1e9

    @property
    def _chosen(self) -> str:
        return choice_of(self._stream.folder, self._stream.options)

    def _run(self, session: _Session, plan: Plan, tell: ProgressListener) -> tuple[BatchReport, Result]:
        attempt = uuid.uuid4().hex[:12]
        results: list[Result] = []

        def publish(result: Result) -> None:
            self._checkpoint.publish_result(result)
            results[:] = [result]
            self._step("results_published")

        commit = self._writer.write(
            self._stream, session.table, plan, attempt, session.metadata.stream_id, publish, self._step, tell
        )
        self._step("table_committed")
        result = self._counted(session.table, results[0])
        self._finish(session, BatchCommit(plan.batch_id, result.attempt, commit.version), commit)
        return _batch_report(plan, result, commit.version, recovered=False), result

    def _counted(self, table: Table, result: Result) -> Result:
        """The result with the rows of all its files, published."""
        whole = counted(result, self._stream, table, self._volume.location)
        if whole is not result:
            self._checkpoint.publish_result(whole)
        return whole

    def _finish(self, session: _Session, end: BatchCommit, commit: Commit) -> None:
        session.table.make_durable(commit)
        self._step("made_durable")
        # A clock that goes back makes nothing look older than it is.
        before = 0 if session.last is None else session.last.committed_ns or 0
        self._checkpoint.publish_commit(replace(end, committed_ns=max(before, self._clock())))
        self._step("commit_published")
        self._checkpoint.compact(session.metadata)
        self._step("compacted")

    def _recover(self, session: _Session, end: BatchCommit) -> BatchReport:
        plan = session.plan
        assert plan is not None
        try:
            result = self._checkpoint.result(end.batch_id, end.attempt)
        except FileMissingError as error:
            raise CheckpointCorruptError(
                f"{self._name} version {end.table_version} was committed by attempt {end.attempt} of batch "
                f"{end.batch_id}, but "
                f"its result is lost: {error} Restore the folder from a copy, or {choices(self._stream.name)}"
            ) from None
        result = self._counted(session.table, result)
        end = replace(end, attempt=result.attempt)
        (commit,) = [c for c in session.table.commits(end.table_version - 1) if c.version == end.table_version]
        self._finish(session, end, commit)
        return _batch_report(plan, result, end.table_version, recovered=True)

    def _lost_race(self, session: _Session, plan: Plan) -> bool:
        table = self._lakehouse.open(self._name)
        position = None if table is None else table.position(session.metadata.stream_id)
        return position is not None and position >= plan.batch_id

    # -- verification ----------------------------------------------------------------------------------------------

    def _basis(self, force: bool, batches: list[BatchReport]) -> Basis | None:
        """What a full refresh starts from; None if the stream never began."""
        try:
            session = self._open()
            while session is not None and session.recovered is not None:
                batches.append(self._recover(session, session.recovered))
                session = self._open()
        except (TableNotOursError, TableUnsupportedError, CheckpointTooNewError):
            raise
        except (TableError, CheckpointError):
            # What contradicts itself can't be gone on with, but it can be replaced.
            return self._damaged_basis(force)
        if session is None:
            return None
        ledger, superseded = self._versions(session.metadata)
        known = None if force else _loaded(ledger, superseded)
        left_out = ledger.filter(pl.col("state") == "SKIPPED_EXISTING")
        return Basis(session.table, self._checkpoint.next_free_batch() + 1, known, left_out)

    def _damaged_basis(self, force: bool) -> Basis:
        table = self._lakehouse.open(self._name)
        if table is not None and table.properties.get(STREAM_NAME_PROPERTY) != self._stream.name:
            raise TableNotOursError(
                f"{self._name} was not filled by stream {self._stream.name!r}: give the stream another table, or "
                "rename the one that is there."
            )
        try:
            metadata = self._checkpoint.metadata()
            known, existing = _loaded(*self._versions(metadata)), self._checkpoint.existing()
        except CheckpointError:
            metadata, known, existing = None, self._checkpoint.no_files()["path"], None
        if not force and existing is None and metadata is None and not self._stream.options.include_existing_files:
            raise RowsAtRiskError(
                f"Which files stream {self._stream.name!r} leaves out, because they were there before it began, can't "
                "be told any more: its checkpoint is damaged or gone. A full refresh would load them too. Restore the "
                f"folder {self._checkpoint.location}, or say --force (run config: force) if they shall be loaded."
            )
        if not force and table is not None:
            if SOURCE_FILE in table.schema.names:
                # The ledger may be an older copy: the rows know better.
                known = pl.concat([known, self._within_volume(pl.DataFrame(table.sources()))[SOURCE_FILE]]).unique()
            elif metadata is None:
                raise RowsAtRiskError(
                    f"Neither the rows of {self._name} nor the checkpoint tell which files were loaded, so a full "
                    "refresh may lose rows whose files are gone. Say --force (run config: force) if that is right."
                )
        left_out = self._checkpoint.no_files() if existing is None else existing
        batch_id = self._checkpoint.next_free_batch() + 1
        if table is None:
            table = self._begin(())
        elif (replaced := table.properties.get(STREAM_ID_PROPERTY)) is not None:
            batch_id = max(batch_id, (table.position(replaced) or 0) + 1)
        unknown = left_out.filter(~pl.col("path").is_in(known.implode()))
        return Basis(table, batch_id, None if force else known, unknown)

    def _begin(self, files: tuple[FileEntry, ...]) -> Table:
        properties = {STREAM_ID_PROPERTY: uuid.uuid4().hex, STREAM_NAME_PROPERTY: self._stream.name}
        table = self._writer.create_table(self._stream, self._name, files, properties)
        self._step("table_created")
        return table

    def _open(self) -> _Session | None:
        """Open the table and prove that it and the checkpoint tell the same story; None if the stream never began."""
        for _ in range(_READS):
            metadata = self._checkpoint.metadata()
            try:
                last = None if metadata is None else self._checkpoint.last_commit(metadata)
            except CheckpointError:
                if not self._replaced(metadata):
                    raise
                continue
            try:
                return self._session(metadata, last)
            except (TableError, CheckpointError):
                if self._refresher.settle() is not None:
                    continue
                # Another loader may have gone on between reading the checkpoint and opening the table: read both again.
                now = self._checkpoint.metadata()
                if now == metadata and (now is None or self._checkpoint.last_commit(now) == last):
                    raise
        raise CommitConflictError(
            f"Other loaders of stream {self._stream.name!r} commit faster than this one can look. Nothing was "
            "changed; run again."
        )

    def _replaced(self, metadata: Metadata | None) -> bool:
        """Whether another generation took the place of this one, by a full refresh or a reset."""
        return self._refresher.settle() is not None or self._checkpoint.metadata() != metadata

    def _session(self, metadata: Metadata | None, last: BatchCommit | None) -> _Session | None:
        # The checkpoint was read before the table is opened: what it calls committed must be in this snapshot.
        table = self._lakehouse.open(self._name)
        if metadata is None:
            if table is None:
                return None
            metadata = self._adopt(table)
            self._step("metadata_published")
        if table is None:
            raise TableMovedError(
                f"{self._name} is gone ({self._lakehouse.uri}), but stream {self._stream.name!r} has loaded "
                "files into it. "
                f"Restore the table, or run `telematics reset {self._stream.name}` or `telematics load "
                f"{self._stream.name} --full-refresh` to load everything that is there anew."
            )
        if table.id != metadata.table_id or table.properties.get(STREAM_ID_PROPERTY) != metadata.stream_id:
            raise TableMovedError(
                f"{self._name} is another table than the one that stream {self._stream.name!r} filled: it was "
                "dropped and "
                f"created again, or belongs to another checkpoint. Restore it, or {choices(self._stream.name)}"
            )
        if _RETENTION in table.properties:
            raise TableUnsupportedError(
                f"{self._name} has the property {_RETENTION}: with it, Delta forgets how far a stream has come, "
                "and files "
                f"would be loaded twice. Unset it, on an engine with SQL: ALTER TABLE {self._name.sql} UNSET "
                "TBLPROPERTIES "
                f"('{_RETENTION}'); or `telematics reset {self._stream.name} --drop-table` drops it and starts anew."
            )
        plan = self._checkpoint.plan(_Session(metadata, table, last, None).next_batch)
        return self._verified(_Session(metadata, table, last, plan))

    def _verified(self, session: _Session) -> _Session:
        metadata, table, last = session.metadata, session.table, session.last
        name = self._stream.name
        recorded = metadata.table_version if last is None else last.table_version
        if table.version < recorded:
            raise TableMovedError(
                f"{self._name} is at version {table.version}, but stream {name!r} committed version {recorded}: "
                "the table was "
                f"replaced by an older copy. Restore the newer one, or {choices(name)}"
            )
        try:
            since = table.commits(recorded)
        except TableMovedError:
            # Maintenance proved the entries before it let them go.
            verified = self._checkpoint.verified(metadata)
            if verified <= recorded:
                raise
            since = table.commits(verified)
        for commit in since:
            # Rows that a widening of this stream wrote anew went nowhere.
            widening = commit.rewritten is not None and metadata.stream_id in commit.transactions
            if commit.removes_data and not widening:
                raise TableMovedError(
                    f"Rows of {self._name} were removed by somebody else: version {commit.version}, operation "
                    f"{commit.operation}. The stream's ledger no longer describes the table. If that is what you want, "
                    f"{choices(name)}"
                )
        position = table.position(metadata.stream_id)
        committed = session.next_batch - 1
        if position is None:
            position = metadata.first_batch - 1
        if position == committed:
            return session
        if position == committed + 1 and session.plan is not None:
            for commit in since:
                if commit.transactions.get(metadata.stream_id) == position:
                    if commit.info.get(DIGEST_INFO) != session.plan.digest:
                        break
                    end = BatchCommit(position, commit.info[ATTEMPT_INFO], commit.version)
                    return _Session(metadata, table, last, session.plan, end)
        if position < committed:
            raise TableMovedError(
                f"{self._name} holds batches up to {position}, but stream {name!r} committed batch {committed}: "
                "the table was "
                f"replaced by an older copy. Restore the newer one, or {choices(name)}"
            )
        raise CheckpointRolledBackError(
            f"{self._name} holds batches up to {position}, but the checkpoint of stream {name!r} knows them up "
            f"to {committed}: "
            f"it was restored from an older copy, or parts of it are lost. Restore the newer one, or {choices(name)}"
        )

    def _adopt(self, table: Table) -> Metadata:
        stream_id = table.properties.get(STREAM_ID_PROPERTY)
        name = self._stream.name
        if stream_id is None or table.properties.get(STREAM_NAME_PROPERTY) != name:
            owner = table.properties.get(STREAM_NAME_PROPERTY)
            by = f"belongs to stream {owner!r}" if owner else "was not made by this project"
            raise TableNotOursError(
                f"{self._name} exists already and {by}. Give stream {name!r} another table, or rename the one "
                "that is there."
            )
        if table.position(stream_id) is not None:
            raise CheckpointRolledBackError(
                f"{self._name} holds rows of stream {name!r}, but its checkpoint {self._checkpoint.location} in "
                f"{self._volume.uri} is gone. Restore the folder from a copy, or {choices(name)}"
            )
        # What a broken-off reset left behind has lower numbers, so it means nothing.
        first_batch = self._checkpoint.next_free_batch()
        return self._checkpoint.begin(Metadata(stream_id, table.id, first_batch, table.version))

    def _versions(self, metadata: Metadata | None) -> tuple[pl.DataFrame, pl.DataFrame]:
        if metadata is None:
            return self._checkpoint.no_files(), self._checkpoint.no_files()
        return self._checkpoint.versions(metadata)

    def _within_bytes(self, files: pl.DataFrame) -> pl.DataFrame:
        limit = self._stream.options.batch_bytes
        if limit is None:
            return files
        # Soft, as in Auto Loader: the file that passes the limit is still taken.
        return files.filter(pl.col("size").cum_sum() - pl.col("size") < min(limit, 2**62))

    # -- repair ----------------------------------------------------------------------------------------------------

    def reset(self, *, rebuild: bool = False, drop_table: bool = False) -> str:
        """Make checkpoint and table agree again. See `Engine.reset`."""
        if rebuild and drop_table:
            raise OptionError(
                "rebuild and drop_table exclude each other. Keep the table's rows (rebuild), or drop them."
            )
        try:
            table = self._lakehouse.open(self._name)
        except TableError:
            # A drop that died half-way, in an object store, leaves what nobody can open; the checkpoint goes after it,
            # so while it is there the table was this stream's.
            if not drop_table or self._checkpoint.generation() < 0:
                raise
            self._lakehouse.drop(self._name)
            table = None
        if table is not None and not (rebuild or drop_table):
            raise OptionError(
                f"{self._name} is there with {table.count():,} rows: without its checkpoint its files would be "
                f"loaded twice. Choose: `telematics reset {self._stream.name} --rebuild` keeps the rows and makes a "
                f"ledger from them, `telematics reset {self._stream.name} --drop-table` starts anew from the files."
            )
        if rebuild:
            if table is None:
                raise OptionError(f"{self._name} does not exist: no ledger can be made from it. Reset without rebuild.")
            return self._rebuild(table)
        if table is not None:
            if table.properties.get(STREAM_NAME_PROPERTY) != self._stream.name:
                raise TableNotOursError(
                    f"{self._name} was not filled by stream {self._stream.name!r}: drop it yourself if you mean it."
                )
            self._lakehouse.drop(self._name)
        self._checkpoint.forget()
        return f"stream {self._stream.name!r} starts anew: the next load takes every file that is there"

    def _rebuild(self, table: Table) -> str:
        if table.properties.get(STREAM_NAME_PROPERTY) != self._stream.name:
            raise TableNotOursError(
                f"{self._name} was not filled by stream {self._stream.name!r}, so its rows tell nothing about "
                "that stream's files."
            )
        lost = [name for name in (SOURCE_FILE, SOURCE_FILE_MODIFIED_AT, BATCH_ID) if name not in table.schema.names]
        if lost:
            raise TableMovedError(
                f"{self._name} no longer has {', '.join(lost)}, so its rows don't tell which files they came "
                "from. Restore an "
                f"older version of the table, or run `telematics reset {self._stream.name} --drop-table` to start anew."
            )
        sources = pl.DataFrame(table.sources())
        batch = max(self._checkpoint.next_free_batch(), _whole(sources[BATCH_ID].max() or 0) + 1)
        stream_id = uuid.uuid4().hex
        table.set_property(STREAM_ID_PROPERTY, stream_id)
        table = self._lakehouse.open(self._name) or table
        attempt = uuid.uuid4().hex[:12]
        commit = table.append(table.schema, iter(()), stream_id, batch, {ATTEMPT_INFO: attempt})
        table.make_durable(commit)
        files = self._within_volume(sources).select(
            path=SOURCE_FILE,
            size=pl.lit(None, pl.Int64),
            modified_ns=pl.col(SOURCE_FILE_MODIFIED_AT).dt.timestamp("us") * 1000,
            state=pl.lit("INGESTED"),
            reason=pl.lit(None, pl.String),
            rows="rows",
            batch_id=pl.lit(batch, pl.Int64),
            table_version=pl.lit(commit.version, pl.Int64),
        )
        self._checkpoint.begin_from(
            Metadata(stream_id, table.id, batch, commit.version), files, BatchCommit(batch, attempt, commit.version)
        )
        return f"stream {self._stream.name!r} goes on from the {files.height} files whose rows are in {self._name}"

    def _within_volume(self, sources: pl.DataFrame) -> pl.DataFrame:
        """Of the files that rows came from those of this Volume, by their paths in it."""
        prefix = f"{self._volume.location}/"
        inside = sources.filter(pl.col(SOURCE_FILE).str.starts_with(prefix))
        return inside.with_columns(pl.col(SOURCE_FILE).str.strip_prefix(prefix))

    # -- questions -------------------------------------------------------------------------------------------------

    def look(self) -> PendingFiles:
        """What a load would find now. See `Engine.look`."""
        metadata, ledger, superseded, plan = self._known()
        record = self._record(metadata)
        if record is None:
            found = self._discovery.run(ledger, superseded, LOOK_OPENS)
        else:
            found = self._discovery.look(ledger, superseded, record, self._interval)
        pending = found.ready
        if plan is not None:
            rows = [(f.path, f.size, f.modified_ns, f.etag) for f in plan.files]
            pending = pl.concat([pending, pl.DataFrame(rows, schema=pending.schema, orient="row")]).unique("path")
        return PendingFiles(
            stream=self._stream.name,
            files=pending.height,
            bytes=int(pending["size"].sum()),
            fingerprint=fingerprint(pending),
            waiting=len(found.waiting),
            changed=found.changed.height,
            known=found.known,
            data_version=found.data_version,
            oldest_modified_ns=None if pending.is_empty() else _whole(pending["modified_ns"].min()),
            late=found.late,
        )

    def files(self, state: FileState | None = None) -> list[FileRecord]:
        """Every file with its state, by path. See `Engine.files`."""
        return [FileRecord(*row) for row in pl.DataFrame(self.file_table(state)).iter_rows()]

    def file_table(self, state: FileState | None = None, limit: int | None = None) -> pa.Table:
        """The same in columns. See `Engine.file_table`."""
        _, ledger, superseded, plan = self._known()
        found = self._discovery.run(ledger, superseded)
        return file_table(ledger, found, plan, self._cleaner.reasons(), state, limit)

    def balance(self, since_batch: int) -> list[BatchBalance]:
        """Rows of each batch's files against rows of its commit. See `Engine.balance`."""
        metadata, ledger, superseded, _ = self._known()
        table = self._lakehouse.open(self._name)
        if metadata is None or table is None:
            return []
        expected = (
            pl.concat([ledger, superseded])
            .filter((pl.col("batch_id") >= since_batch) & (pl.col("state") == "INGESTED"))
            .filter(pl.col("size").is_not_null())  # a rebuilt ledger knows files, not what each batch brought
            .group_by("batch_id")
            .agg(pl.col("rows").sum(), pl.col("table_version").first())
            .sort("batch_id")
        )
        if expected.is_empty():
            return []
        held = table.commits(_whole(expected["table_version"].min()) - 1, held=True)
        added = {
            commit.transactions[metadata.stream_id]: commit
            for commit in held
            if metadata.stream_id in commit.transactions
        }
        oldest = held[0].version if held else table.version + 1
        return [
            BatchBalance(batch, version, rows, added[batch].rows if batch in added else 0)
            for batch, rows, version in expected.iter_rows()
            if version >= oldest
        ]

    def duplicates(self, since_batch: int) -> Duplicates:
        """Files that were loaded twice under two names. See `Engine.duplicates`."""
        return find_duplicates(self._volume, self._known()[1], since_batch)

    def check(self) -> None:
        """Prove that table and checkpoint agree, as every load does first; raise what a load would raise."""
        if self._checkpoint.metadata() is not None or self._lakehouse.open(self._name) is not None:
            self._open()

    def _known(self) -> tuple[Metadata | None, pl.DataFrame, pl.DataFrame, Plan | None]:
        for _ in range(_READS):
            before = self._checkpoint.generation()
            refresh = self._refresher.unfinished()
            if refresh is not None:
                # The ledger no longer describes the table; the next load ends the refresh, so it counts as pending.
                left_out = self._checkpoint.existing()
                none = self._checkpoint.no_files()
                return None, none if left_out is None else left_out, none, refresh.plan
            try:
                return self._known_now()
            except CheckpointError:
                # Another loader may be publishing the generation that its refresh began.
                if self._checkpoint.generation() == before and self._refresher.unfinished() is None:
                    raise
        raise CommitConflictError(f"Stream {self._stream.name!r} begins anew faster than one can look. Ask again.")

    def _known_now(self) -> tuple[Metadata | None, pl.DataFrame, pl.DataFrame, Plan | None]:
        metadata = self._checkpoint.metadata()
        if metadata is None:
            return None, *self._versions(None), None
        last = self._checkpoint.last_commit(metadata)
        number = metadata.first_batch if last is None else last.batch_id + 1
        return metadata, *self._versions(metadata), self._checkpoint.plan(number)

    def _report(
        self, batches: list[BatchReport], discovered: Discovered | None, yielded: bool, seconds: float
    ) -> IngestReport:
        table = self._lakehouse.open(self._name)
        return IngestReport(
            stream=self._stream.name,
            table=str(self._name),
            batches=tuple(batches),
            table_version=None if table is None else table.version,
            table_rows=0 if table is None else table.count(),
            files_changed=0 if discovered is None else discovered.changed.height,
            files_waiting=0 if discovered is None else len(discovered.waiting),
            yielded=yielded,
            seconds=seconds,
        )


def _batch_report(plan: Plan, result: Result, table_version: int, recovered: bool) -> BatchReport:
    sizes = {file.path: file.size for file in plan.files}
    ingested = [file for file in result.files if file.state == "INGESTED"]
    return BatchReport(
        batch_id=plan.batch_id,
        table_version=table_version,
        files_ingested=len(ingested),
        bytes_ingested=sum(sizes[file.path] for file in ingested),
        rows=sum(file.rows for file in ingested),
        rows_rescued=sum(file.rescued for file in ingested),
        rows_corrupt=sum(file.corrupt for file in ingested),
        skipped=tuple(
            SkippedFile(file.path, file.state, file.reason or "")  # type: ignore[arg-type]
            for file in result.files
            if file.state in ("SKIPPED_CORRUPTED", "SKIPPED_MISSING")
        ),
        schema_changes=tuple(SchemaChange(*change) for change in result.added),
        recovered=recovered,
    )


def _loaded(ledger: pl.DataFrame, superseded: pl.DataFrame) -> pl.Series:
    """Paths of the files of which any version was ingested: the newest may have been unreadable, or gone."""
    return pl.concat([ledger.filter(pl.col("state") == "INGESTED")["path"], superseded["path"]]).unique()


def _whole(value: object) -> int:
    assert isinstance(value, int)
    return value


def _ignore(_: object) -> None:
    return None
