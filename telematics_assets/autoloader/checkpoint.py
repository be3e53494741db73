"""A stream's checkpoint: what was planned, what came of it, what is committed, and which files are known.

Belongs here: the files below `_checkpoints/<stream>/`, their formats and versions, and the ledger.
Does not belong here: the order of steps (`loader.py`), listing and reading data files, tables, Dagster.

    metadata/<g>            identity: stream id and table id; a new generation g starts the stream anew
    offsets/<n>             the plan of batch n: its files with size, modification time and ETag
    results/<n>.<attempt>   what one attempt made of every file of the plan, and the schema it wrote
    commits/<n>             which attempt counts, and the table version that holds it
    refreshes/<g>.<v>.<s>   intent of a full refresh: generation g, table version v that it replaces, new stream id s
    ledger/<a>-<b>          the files decided by batches a to b, in columns (Parquet)
    ledger/existing         the files that were there when a stream began that was to leave them out, the same columns
    listings/<n>            when a load listed the whole folder and left nothing behind below a path; the newest counts
    verified/<id>.<v>       nobody else removed rows up to table version v: its log may have lost the entries since
    cleaning/               what `clean_source` did (`cleaning.py`)

Every file is published by write-if-absent and never changed. Ledger segments merge results in tiers of `FANOUT`, so
that a
batch costs what it adds; what a segment covers is deleted behind it, except the newest batch. Batch numbers are 20
digits.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import polars as pl

from telematics_assets.errors import CheckpointCorruptError, CheckpointTooNewError, FileMissingError
from telematics_assets.volumes.base import FileEntry, Volume

#: Version of the file formats below. A checkpoint with a higher one was written by a newer version of the package.
FORMAT = 2
#: Results, or segments of equal size, that are merged into one segment.
FANOUT = 8
#: States of files that leave their batch undecided.
NOT_TAKEN = ("LEFT", "DENIED")
_FIELDS = {
    "metadata": {"stream_id", "table_id", "first_batch", "table_version"},
    "offsets": {"batch_id", "planner", "files"},
    "results": {"batch_id", "attempt", "files", "added", "schema"},
    "commits": {"batch_id", "attempt", "table_version"},
    "listings": {"stream_id", "chosen", "listed_at_ns", "bound"},
    "refreshes": {"generation", "table_version", "stream_id", "replaces", "attempt", "plan"},
}
#: Fields that files of format 1 lack.
_LATER_FIELDS = {"commits": {"committed_ns"}}
_EXISTING = "existing"
#: How often a listing is repeated when another process merges and deletes under it.
_READS = 4

#: Temporary files of publications that were killed are deleted when they are older than this.
#: Keys of the commit info that tie a table commit to the checkpoint.
ATTEMPT_INFO = "telematics.attempt"
DIGEST_INFO = "telematics.planDigest"
_LEFTOVER_NS = 86_400_000_000_000

#: Columns of the ledger; times in nanoseconds since the epoch (UTC). `size` is null where it is not known, `etag` and
#: `committed_ns` (when the batch was known to be committed) also in what format 1 wrote.
LEDGER_SCHEMA = {
    "path": pl.String,
    "size": pl.Int64,
    "modified_ns": pl.Int64,
    "state": pl.String,
    "reason": pl.String,
    "rows": pl.Int64,
    "batch_id": pl.Int64,
    "table_version": pl.Int64,
    "etag": pl.String,
    "committed_ns": pl.Int64,
}
_LATER_COLUMNS = ("etag", "committed_ns")


@dataclass(frozen=True, slots=True)
class Metadata:
    """Identity of a stream's checkpoint.

    Attributes:
        stream_id: Application id of the stream's Delta transactions.
        table_id: Id of the table that it fills.
        first_batch: Number of this generation's first batch.
        table_version: Table version at which the generation began.
    """

    stream_id: str
    table_id: str
    first_batch: int = 0
    table_version: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The files of one batch.

    Attributes:
        batch_id: Its number.
        planner: Id of the process that made it.
        files: The files, in the order in which they are read.
    """

    batch_id: int
    planner: str
    files: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        """Hash of number, planner and files: two plans with one digest are the same plan."""
        # By hand: `asdict` copies every value.
        files = [{"path": f.path, "size": f.size, "modified_ns": f.modified_ns, "etag": f.etag} for f in self.files]
        text = json.dumps([self.batch_id, self.planner, files])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class FileResult:
    """What an attempt made of one file.

    Attributes:
        path: The file.
        state: `INGESTED`, `SKIPPED_CORRUPTED`, `SKIPPED_MISSING`, or one of `NOT_TAKEN`: it changed meanwhile
            (`LEFT`) or could not be opened (`DENIED`); the ledger does not know it, so it is discovered again.
        reason: Why it was not ingested.
        rows: Rows that it brought.
        rescued: Rows of them with rescued data.
        corrupt: Rows of them whose record could not be parsed.
    """

    path: str
    state: str
    reason: str | None = None
    rows: int = 0
    rescued: int = 0
    corrupt: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What one attempt at a batch made.

    Attributes:
        batch_id: The batch.
        attempt: Id of the attempt.
        files: One entry per file of the plan.
        added: Columns that the attempt added to the table: name and Delta type; of one that it widened, its former type
            too.
        schema: Columns of the table as the attempt wrote it: name and Delta type.
    """

    batch_id: int
    attempt: str
    files: tuple[FileResult, ...]
    added: tuple[tuple[str, ...], ...]
    schema: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class BatchCommit:
    """The end of a batch.

    Attributes:
        batch_id: The batch.
        attempt: The attempt that counts.
        table_version: Table version that holds its rows.
        committed_ns: When that was known, nanoseconds since the epoch (UTC), never before the batch in front of it;
            None: format 1 did not say.
    """

    batch_id: int
    attempt: str
    table_version: int
    committed_ns: int | None = None


@dataclass(frozen=True, slots=True)
class WholeListing:
    """A listing of the whole folder after which every file below `bound` was in the ledger.

    Attributes:
        stream_id: The generation that it is of.
        chosen: Folder and options that chose the files.
        listed_at_ns: When it began, nanoseconds since the epoch.
        bound: Path from which on later listings must look.
    """

    stream_id: str
    chosen: str
    listed_at_ns: int
    bound: str


@dataclass(frozen=True, slots=True, order=True)
class RefreshName:
    """What the name of a full refresh's intent says.

    Attributes:
        generation: The generation that it begins, if its commit is made.
        table_version: Version of the table that it is based on: its commit is the next one, or none.
        stream_id: The new stream id.
    """

    generation: int
    table_version: int
    stream_id: str

    def __str__(self) -> str:
        """The file's name."""
        return f"{self.generation}.{self.table_version}.{self.stream_id}"


@dataclass(frozen=True, slots=True)
class Refresh:
    """The intent of a full refresh.

    Attributes:
        name: Generation, table version and stream id.
        replaces: The stream id that the table named before, or None.
        attempt: The one attempt at it.
        plan: The files that become the table, as one batch.
    """

    name: RefreshName
    replaces: str | None
    attempt: str
    plan: Plan


class Checkpoint:
    """Reads and publishes the files of one stream's checkpoint. Keeps no state but the ledger it read last."""

    def __init__(self, volume: Volume, stream: str, clock: Callable[[], int] = time.time_ns) -> None:
        """Use `_checkpoints/<stream>` of a Volume.

        Args:
            volume: The landing Volume.
            stream: Name of the stream.
            clock: Wall clock of the commits of refreshes, nanoseconds.
        """
        self._clock = clock
        self._volume = volume
        self._stream = stream
        self._root = f"_checkpoints/{stream}"
        self._cached: tuple[Metadata, int, pl.DataFrame, pl.DataFrame] | None = None

    @property
    def volume_location(self) -> str:
        """The Volume's name as a path."""
        return self._volume.location

    @property
    def location(self) -> str:
        """Where it is, inside the Volume."""
        return self._root

    def metadata(self) -> Metadata | None:
        """The newest generation, or None if the stream never began."""
        generation = self._generation()
        if generation < 0:
            return None
        return Metadata(**self._read("metadata", str(generation)))

    def begin(self, metadata: Metadata) -> Metadata:
        """Publish the first generation, or return the one that another process published first."""
        if not self._publish("metadata", "0", asdict(metadata)):
            return Metadata(**self._read("metadata", "0"))
        return metadata

    def last_commit(self, metadata: Metadata) -> BatchCommit | None:
        """The newest committed batch of this generation, or None.

        Raises:
            CheckpointCorruptError: If a commit between the ledger and the newest one is missing.
        """
        for _ in range(_READS):
            try:
                return self._last_commit(metadata)
            except (FileMissingError, CheckpointCorruptError) as error:
                # Another process may have merged and deleted between the listings: list again.
                failure = error
        if isinstance(failure, CheckpointCorruptError):
            raise failure
        raise self._corrupt("commits", f"a file is missing ({failure})")

    def _last_commit(self, metadata: Metadata) -> BatchCommit | None:
        numbers = [n for n in self._numbers("commits") if n >= metadata.first_batch]
        segments = self._segments(metadata.first_batch)
        if not numbers:
            if segments:
                raise self._corrupt("commits", "the newest commit is missing, but the ledger knows batches")
            return None
        covered = segments[-1][1] if segments else metadata.first_batch - 1
        missing = set(range(covered + 1, numbers[-1] + 1)).difference(numbers)
        if missing or numbers[-1] < covered:
            raise self._corrupt(f"commits/{_number(min(missing, default=covered))}", "it is missing")
        return BatchCommit(**self._read("commits", _number(numbers[-1])))

    def plan(self, batch_id: int) -> Plan | None:
        """The plan of a batch, or None if there is none yet."""
        try:
            document = self._read("offsets", _number(batch_id))
        except FileMissingError:
            return None
        return _as_plan(document)

    def publish_plan(self, plan: Plan) -> Plan:
        """Publish the plan of a batch, or return the one that another loader published first."""
        if self._publish("offsets", _number(plan.batch_id), _from_plan(plan)):
            return plan
        other = self.plan(plan.batch_id)
        if other is None:
            raise self._corrupt(f"offsets/{_number(plan.batch_id)}", "it vanished")
        return other

    def publish_result(self, result: Result) -> None:
        """Publish what an attempt made."""
        document = asdict(replace(result, files=()))
        document["files"] = [[f.path, f.state, f.reason, f.rows, f.rescued, f.corrupt] for f in result.files]
        self._publish("results", f"{_number(result.batch_id)}.{result.attempt}", document)

    def result(self, batch_id: int, attempt: str) -> Result:
        """What an attempt made.

        Raises:
            FileMissingError: If it is not there.
        """
        document = self._read("results", f"{_number(batch_id)}.{attempt}")
        return Result(
            document["batch_id"],
            document["attempt"],
            tuple(FileResult(*entry) for entry in document["files"]),
            tuple(tuple(change) for change in document["added"]),
            tuple((name, type_) for name, type_ in document["schema"]),
        )

    def publish_commit(self, commit: BatchCommit) -> None:
        """Publish the end of a batch."""
        self._publish("commits", _number(commit.batch_id), asdict(commit))

    def no_files(self) -> pl.DataFrame:
        """The ledger of a stream that never began."""
        return pl.DataFrame(schema=LEDGER_SCHEMA)

    def ledger(self, metadata: Metadata) -> pl.DataFrame:
        """Every known file with its newest state: `LEDGER_SCHEMA`, one row per path."""
        return self.versions(metadata)[0]

    def versions(self, metadata: Metadata) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The ledger, and the versions of its files that were ingested before the ones that it tells of."""
        for _ in range(_READS):
            try:
                return self._ledger(metadata)
            except FileMissingError as error:
                missing = error
        raise self._corrupt("ledger", f"a file of it is missing ({missing})")

    def record_existing(self, files: pl.DataFrame) -> None:
        """Publish the files that are there before the stream begins; what another loader published first stays.

        It comes before the table and the identity: a stream that began has it, and a crash in between leaves a record
        that the next beginning takes up.

        Args:
            files: Columns of a listing.
        """
        frame = files.select(
            "path",
            "size",
            "modified_ns",
            state=pl.lit("SKIPPED_EXISTING"),
            reason=pl.lit("it was there before the stream began"),
            rows=pl.lit(None, pl.Int64),
            batch_id=pl.lit(None, pl.Int64),
            table_version=pl.lit(None, pl.Int64),
        )
        self._publish_frame(_EXISTING, frame)

    def existing(self) -> pl.DataFrame | None:
        """The files that were there before the stream began, or None if it was not to leave them out."""
        if _EXISTING not in self._volume.names(f"{self._root}/ledger"):
            return None
        return self._frame(_EXISTING)

    def generation(self) -> int:
        """Number of the newest generation, -1 if the stream never began."""
        return self._generation()

    def publish_refresh(self, refresh: Refresh) -> None:
        """Publish the intent of a full refresh."""
        document = asdict(refresh.name) | {
            "replaces": refresh.replaces,
            "attempt": refresh.attempt,
            "plan": _from_plan(refresh.plan),
        }
        self._publish("refreshes", str(refresh.name), document)

    def refreshes(self) -> list[RefreshName]:
        """The intents that are there, whatever became of them."""
        parts = [name.split(".") for name in self._volume.names(f"{self._root}/refreshes")]
        return sorted(
            RefreshName(int(p[0]), int(p[1]), p[2]) for p in parts if len(p) == 3 and p[0].isdigit() and p[1].isdigit()
        )

    def refresh(self, name: RefreshName) -> Refresh:
        """An intent.

        Raises:
            FileMissingError: If it is not there.
        """
        document = self._read("refreshes", str(name))
        return Refresh(name, document["replaces"], document["attempt"], _as_plan(document["plan"]))

    def _not_before(self, now: int) -> int:
        """This time, or the newest commit's if that is later: a clock that goes back makes nothing look older."""
        try:
            newest = BatchCommit(**self._read("commits", _number(self._numbers("commits")[-1])))
        except (IndexError, FileMissingError, CheckpointCorruptError):
            # A refresh also mends a checkpoint that is damaged or gone.
            return now
        return max(now, newest.committed_ns or 0)

    def forget_refresh(self, name: RefreshName) -> None:
        """Delete an intent that can come to nothing any more, or came to its end."""
        self._volume.delete(f"{self._root}/refreshes/{name}")

    def finish_refresh(self, refresh: Refresh, metadata: Metadata, result: Result) -> None:
        """Publish the generation that a committed refresh began; what another process published first stays."""
        commit = BatchCommit(result.batch_id, refresh.attempt, metadata.table_version, self._not_before(self._clock()))
        files = _decided(refresh.plan, result, commit)
        self.begin_from(metadata, files, commit, refresh.name.generation)
        self.forget_refresh(refresh.name)

    def compact(self, metadata: Metadata) -> None:
        """Merge results and segments that are due, and delete what a published segment covers."""
        try:
            self._compact(metadata)
        except FileMissingError:
            # Another loader merged the same batches and deleted them already.
            return

    def _compact(self, metadata: Metadata) -> None:
        segments = self._segments(metadata.first_batch)
        committed = [n for n in self._numbers("commits") if n >= metadata.first_batch]
        start = segments[-1][1] + 1 if segments else metadata.first_batch
        if not committed or committed[-1] - start + 1 < FANOUT:
            return
        end = start + FANOUT - 1
        parts = [self._results_frame(metadata, n) for n in range(start, end + 1)]
        merged_from = start
        span = FANOUT
        while len(segments) >= FANOUT - 1 and all(b - a + 1 == span for a, b in segments[-(FANOUT - 1) :]):
            group = segments[-(FANOUT - 1) :]
            parts = [self._segment(a, b) for a, b in group] + parts
            merged_from = group[0][0]
            segments = segments[: -(FANOUT - 1)]
            span *= FANOUT
        newest, superseded = _split(pl.concat(parts))
        self._publish_frame(f"{_number(merged_from)}-{_number(end)}", pl.concat([superseded, newest]))
        self._clean(metadata, committed[-1])

    def merge(self, metadata: Metadata) -> tuple[int, int]:
        """Merge all that is committed into one segment, and delete what that leaves without a use.

        Returns:
            Files that the ledger was made of, before and after.
        """
        before = self._parts(metadata)
        # A loader that merges at the same time deletes what is to be read; the next maintenance goes on.
        with suppress(FileMissingError):
            self._merge(metadata)
        return before, self._parts(metadata)

    def _parts(self, metadata: Metadata) -> int:
        segments = self._segments(metadata.first_batch)
        start = segments[-1][1] + 1 if segments else metadata.first_batch
        return len(segments) + sum(n >= start for n in self._numbers("commits"))

    def _merge(self, metadata: Metadata) -> None:
        segments = self._segments(metadata.first_batch)
        committed = [n for n in self._numbers("commits") if n >= metadata.first_batch]
        if not committed:
            return
        newest = committed[-1]
        start = segments[-1][1] + 1 if segments else metadata.first_batch
        if len(segments) > 1 or newest >= start:
            parts = [self._segment(a, b) for a, b in segments]
            parts += [self._results_frame(metadata, n) for n in range(start, newest + 1)]
            known, superseded = _split(pl.concat(parts))
            name = f"{_number(metadata.first_batch)}-{_number(max(newest, start - 1))}"
            self._publish_frame(name, pl.concat([superseded, known]))
        self._clean(metadata, newest)
        won = BatchCommit(**self._read("commits", _number(newest))).attempt
        for name in self._volume.names(f"{self._root}/results"):
            number, _, attempt = name.partition(".")
            if number == _number(newest) and attempt != won:
                self._volume.delete(f"{self._root}/results/{name}")
        self._sweep()

    def _sweep(self) -> None:
        """Delete temporary files that killed processes left behind."""
        for folder in (*_FIELDS, "ledger", "verified", "cleaning"):
            for name in self._volume.names(f"{self._root}/{folder}"):
                path = f"{self._root}/{folder}/{name}"
                left = self._volume.stat(path) if name.startswith(".") else None
                if left is not None and time.time_ns() - left.modified_ns > _LEFTOVER_NS:
                    self._volume.delete(path)

    def publish_verified(self, metadata: Metadata, table_version: int) -> None:
        """Note that nobody removed rows of the table up to this version, before entries of its log go."""
        folder = f"{self._root}/verified"
        name = f"{metadata.stream_id}.{_number(table_version)}"
        self._volume.create(f"{folder}/{name}", b"")
        for other in self._volume.names(folder):
            # Hidden ones are being published.
            if other[0] != "." and (other < name or not other.startswith(f"{metadata.stream_id}.")):
                self._volume.delete(f"{folder}/{other}")

    def verified(self, metadata: Metadata) -> int:
        """The newest table version that was noted for this stream id, or -1."""
        names = [name.rpartition(".") for name in self._volume.names(f"{self._root}/verified")]
        return max((int(number) for stream, _, number in names if stream == metadata.stream_id), default=-1)

    def forget(self) -> None:
        """Delete the whole checkpoint; the identity goes first, so that what a crash leaves behind means nothing."""
        # Without an identity this one would still count for the stream that begins next.
        self._volume.delete(f"{self._root}/ledger/{_EXISTING}")
        self.forget_listings()
        for folder in ("refreshes", "metadata", "commits", "offsets", "results", "ledger", "verified", "cleaning"):
            for name in self._volume.names(f"{self._root}/{folder}"):
                self._volume.delete(f"{self._root}/{folder}/{name}")

    def whole_listing(self) -> WholeListing | None:
        """The newest listing of the whole folder, or None: then the next one must be whole."""
        numbers = self._numbers("listings")
        try:
            return WholeListing(**self._read("listings", _number(numbers[-1]))) if numbers else None
        except (FileMissingError, CheckpointCorruptError):
            # Another loader published a newer one and deleted this; or it is damaged. It only saves work.
            return None

    def publish_whole_listing(self, listing: WholeListing) -> None:
        """Publish a listing of the whole folder and delete older ones; of two at once, one is kept."""
        numbers = self._numbers("listings")
        self._publish("listings", _number(numbers[-1] + 1 if numbers else 0), asdict(listing))
        for number in numbers:
            self._volume.delete(f"{self._root}/listings/{_number(number)}")

    def forget_listings(self) -> None:
        """Let the next listing, of every process, be whole."""
        for name in self._volume.names(f"{self._root}/listings"):
            self._volume.delete(f"{self._root}/listings/{name}")

    def next_free_batch(self) -> int:
        """A batch number above all that any generation used."""
        numbers = [*self._numbers("offsets"), *self._numbers("commits"), -1]
        spans = [span for name in self._volume.names(f"{self._root}/ledger") if (span := _span(name)) is not None]
        return max(numbers + [b for _, b in spans]) + 1

    def begin_from(
        self, metadata: Metadata, files: pl.DataFrame, commit: BatchCommit, generation: int | None = None
    ) -> None:
        """Publish a new generation whose first batch is already committed and knows these files (`LEDGER_SCHEMA`)."""
        generation = self._generation() + 1 if generation is None else generation
        number = _number(commit.batch_id)
        self._publish_frame(f"{number}-{number}", files)
        self.publish_commit(commit)
        self._publish("metadata", str(generation), asdict(metadata))

    def _clean(self, metadata: Metadata, newest: int) -> None:
        segments = self._segments(metadata.first_batch)
        for name in self._volume.names(f"{self._root}/ledger"):
            # Only what a segment seen here covers: another loader may have published a larger one since.
            span = _span(name)
            if span is not None and (span[1] < metadata.first_batch or _covered(span, segments)):
                self._volume.delete(f"{self._root}/ledger/{name}")
        covered = min(segments[-1][1], newest - 1)
        for folder in ("offsets", "results", "commits"):
            for name in self._volume.names(f"{self._root}/{folder}"):
                number = name.split(".")[0]
                if number.isdigit() and int(number) <= covered:
                    self._volume.delete(f"{self._root}/{folder}/{name}")

    def _ledger(self, metadata: Metadata) -> tuple[pl.DataFrame, pl.DataFrame]:
        segments = self._segments(metadata.first_batch)
        last = self.last_commit(metadata)
        newest = metadata.first_batch - 1 if last is None else last.batch_id
        cached = self._cached
        if cached is not None and cached[0] == metadata and cached[1] <= newest:
            if cached[1] == newest:
                return cached[2], cached[3]
            start = cached[1] + 1
            parts = [cached[3], cached[2]]
            if segments and segments[-1][1] >= start:
                parts += [self._segment(a, b) for a, b in segments if b >= start]
                start = segments[-1][1] + 1
        else:
            existing = self.existing()
            parts = [] if existing is None else [existing]
            parts += [self._segment(a, b) for a, b in segments]
            start = segments[-1][1] + 1 if segments else metadata.first_batch
        parts += [self._results_frame(metadata, n) for n in range(start, newest + 1)]
        frame, superseded = _split(pl.concat(parts) if parts else self.no_files())
        self._cached = (metadata, newest, frame, superseded)
        return frame, superseded

    def _results_frame(self, metadata: Metadata, batch_id: int) -> pl.DataFrame:
        commit = BatchCommit(**self._read("commits", _number(batch_id)))
        result = self.result(batch_id, commit.attempt)
        plan = self.plan(batch_id)
        if plan is None:
            raise FileMissingError(f"offsets/{_number(batch_id)} does not exist")
        return _decided(plan, result, commit)

    def _segments(self, first_batch: int) -> list[tuple[int, int]]:
        spans = [span for name in self._volume.names(f"{self._root}/ledger") if (span := _span(name)) is not None]
        chain: list[tuple[int, int]] = []
        position = first_batch
        # Two that merge at once may publish segments that overlap: what both hold, both hold alike.
        while reaching := [(b, a) for a, b in spans if first_batch <= a <= position <= b]:
            end, start = max(reaching)
            chain.append((start, end))
            position = end + 1
        return chain

    def _segment(self, a: int, b: int) -> pl.DataFrame:
        return self._frame(f"{_number(a)}-{_number(b)}")

    def _publish_frame(self, name: str, frame: pl.DataFrame) -> None:
        buffer = io.BytesIO()
        _complete(frame).write_parquet(buffer, compression="zstd", metadata={"telematics.format": str(FORMAT)})
        self._volume.create(f"{self._root}/ledger/{name}", buffer.getvalue())

    def _frame(self, segment: str) -> pl.DataFrame:
        name = f"ledger/{segment}"
        data = self._volume.read(f"{self._root}/{name}")
        try:
            version = pl.read_parquet_metadata(io.BytesIO(data)).get("telematics.format", "0")
            if int(version) > FORMAT:
                raise self._too_new(name, int(version))
            frame = pl.read_parquet(io.BytesIO(data))
        except pl.exceptions.PolarsError as error:
            raise self._corrupt(name, f"it is cut short or changed ({' '.join(str(error).split())[:120]})") from None
        frame = _complete(frame) if version == "1" else frame
        if dict(frame.schema) != LEDGER_SCHEMA:
            raise self._corrupt(name, "its columns are not a ledger's")
        return frame

    def _generation(self) -> int:
        numbers = [int(name) for name in self._volume.names(f"{self._root}/metadata") if name.isdigit()]
        return max(numbers, default=-1)

    def _numbers(self, folder: str) -> list[int]:
        names = self._volume.names(f"{self._root}/{folder}")
        return sorted(int(name) for name in names if name.isdigit())

    def _publish(self, folder: str, name: str, document: dict[str, Any]) -> bool:
        text = json.dumps({"format": FORMAT, "kind": folder, **document}, separators=(",", ":"))
        return self._volume.create(f"{self._root}/{folder}/{name}", text.encode())

    def _read(self, folder: str, name: str) -> dict[str, Any]:
        data = self._volume.read(f"{self._root}/{folder}/{name}")
        try:
            document = json.loads(data)
        except ValueError:
            raise self._corrupt(f"{folder}/{name}", f"it is cut short or changed ({len(data)} bytes)") from None
        if not isinstance(document, dict) or document.pop("kind", None) != folder:
            raise self._corrupt(f"{folder}/{name}", "it is not what its name says")
        version = document.pop("format", None)
        if not isinstance(version, int):
            raise self._corrupt(f"{folder}/{name}", "it has no format version")
        if version > FORMAT:
            raise self._too_new(f"{folder}/{name}", version)
        later = _LATER_FIELDS.get(folder, set())
        if set(document) | later != _FIELDS[folder] | later:
            raise self._corrupt(f"{folder}/{name}", "it lacks fields, or has others")
        return document

    def _corrupt(self, name: str, what: str) -> CheckpointCorruptError:
        return CheckpointCorruptError(
            f"The checkpoint file {self._volume.uri}/{self._root}/{name} can't be trusted: {what}. Restore the folder "
            f"{self._root} from a copy, or {choices(self._stream)}"
        )

    def _too_new(self, name: str, version: int) -> CheckpointTooNewError:
        return CheckpointTooNewError(
            f"The checkpoint file {self._volume.uri}/{self._root}/{name} has format {version}; this version of "
            f"telematics_assets reads up to {FORMAT}. Upgrade the package; nothing was changed."
        )


def choices(stream: str) -> str:
    """The ways out of a checkpoint and a table that contradict each other, as the end of an error message."""
    return (
        f"choose: `telematics reset {stream} --rebuild` makes a new ledger from the table's rows (nothing is "
        "loaded twice); "
        f"`telematics load {stream} --full-refresh` rewrites the table from the files that are there, in one commit; "
        f"`telematics reset {stream} --drop-table` drops it and starts anew."
    )


def _decided(plan: Plan, result: Result, commit: BatchCommit) -> pl.DataFrame:
    """What a committed batch says of its files, as rows of the ledger."""
    planned = {file.path: file for file in plan.files}
    rows = [
        (
            file.path,
            planned[file.path].size,
            planned[file.path].modified_ns,
            file.state,
            file.reason,
            file.rows,
            commit.batch_id,
            commit.table_version,
            planned[file.path].etag,
            commit.committed_ns,
        )
        for file in result.files
        if file.state not in NOT_TAKEN
    ]
    return pl.DataFrame(rows, schema=LEDGER_SCHEMA, orient="row")


def _from_plan(plan: Plan) -> dict[str, Any]:
    return {
        "batch_id": plan.batch_id,
        "planner": plan.planner,
        "files": [[f.path, f.size, f.modified_ns, f.etag] for f in plan.files],
    }


def _as_plan(document: dict[str, Any]) -> Plan:
    files = tuple(FileEntry(*entry) for entry in document["files"])
    return Plan(document["batch_id"], document["planner"], files)


def _complete(frame: pl.DataFrame) -> pl.DataFrame:
    """A ledger's columns in order; those that came later are null where they are not known."""
    lacking = [pl.lit(None, LEDGER_SCHEMA[name]).alias(name) for name in _LATER_COLUMNS if name not in frame.columns]
    whole = frame.with_columns(lacking)
    return whole.select(list(LEDGER_SCHEMA)) if set(whole.columns) == set(LEDGER_SCHEMA) else frame


def _split(frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The newest row of each path, and the rows of versions that were ingested before it."""
    newest = frame.unique("path", keep="last", maintain_order=True)
    if newest.height == frame.height:
        return newest, frame.clear()
    version = ["path", "batch_id"]
    older = frame.filter(pl.col("state") == "INGESTED").join(newest, on=version, how="anti", maintain_order="left")
    return newest, older.unique(version, keep="last", maintain_order=True)


def _number(batch_id: int) -> str:
    return f"{batch_id:020d}"


def _covered(span: tuple[int, int], segments: Sequence[tuple[int, int]]) -> bool:
    return any(a <= span[0] and span[1] <= b and (a, b) != span for a, b in segments)


def _span(name: str) -> tuple[int, int] | None:
    a, _, b = name.partition("-")
    return (int(a), int(b)) if a.isdigit() and b.isdigit() else None
