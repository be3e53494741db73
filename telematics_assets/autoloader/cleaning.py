"""`clean_source`: what becomes of source files whose rows are safely in the table.

Belongs here: which files are due, moving and deleting them, and the record of it in the checkpoint.
Does not belong here: the options (`catalog.py`), when it runs (`loader.py`), the ledger (`checkpoint.py`), Dagster.

    cleaning/<n>.intent     what is going to be done with which files
    cleaning/<a>-<b>.end    what became of the files of intents a to b, in columns (Parquet)

An intent is published by write-if-absent before any file is touched, and is always finished before the next one is
made. Finishing it twice, by two processes or after a kill, does the same once: a copy is written if absent and compared
byte by byte, and a source is removed only while it still is the version that was ingested.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO, cast

import polars as pl

from telematics_assets.catalog import FileStream
from telematics_assets.errors import (
    CheckpointCorruptError,
    CheckpointTooNewError,
    FileChangedError,
    FileMissingError,
    VolumeError,
)
from telematics_assets.volumes.base import FileEntry, Volume

#: Version of the formats in this folder.
FORMAT = 1
#: Files of one intent.
FILES_AT_ONCE = 500
#: Files that are worked on at the same time.
WORKERS = 8
#: A file that could not be moved or deleted is tried again after this time.
REFUSED_NS = 86_400_000_000_000

#: Moments at which a test can stop a process.
CLEANING_STEPS = ("cleaning_planned", "source_copied", "source_removed", "cleaned", "cleaning_ended")

#: Columns of an end. `outcome` is MOVED, DELETED, GONE, CHANGED, REFUSED or LEFT; `detail` where to, or why not.
_ENDS = {
    "path": pl.String,
    "batch_id": pl.Int64,
    "modified_ns": pl.Int64,
    "outcome": pl.String,
    "detail": pl.String,
    "at_ns": pl.Int64,
}
_VERSION = ["path", "batch_id"]
_ATTEMPTS = 3
_NAMES = 100
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What one call did.

    Attributes:
        moved: Files moved.
        deleted: Files deleted.
    """

    moved: int = 0
    deleted: int = 0


@dataclass(frozen=True, slots=True)
class _Source:
    """A file of an intent: the version that was ingested, its batch, and whether it was there when it was planned."""

    path: str
    size: int
    modified_ns: int
    etag: str | None
    batch_id: int
    there: bool

    @property
    def file(self) -> FileEntry:
        return FileEntry(self.path, self.size, self.modified_ns, self.etag)


@dataclass(frozen=True, slots=True)
class _Intent:
    number: int
    cleaner: str
    action: str
    folder: str
    destination: str | None
    files: tuple[_Source, ...]


class SourceCleaner:
    """Moves or deletes the files of one stream that are due."""

    def __init__(
        self,
        stream: FileStream,
        volume: Volume,
        checkpoint: str,
        clock: Callable[[], int] = time.time_ns,
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Tie it to a stream.

        Args:
            stream: The stream, with its options.
            volume: The landing Volume.
            checkpoint: Where the stream's checkpoint is, inside the Volume.
            clock: Wall clock, nanoseconds.
            on_step: Called with each of `CLEANING_STEPS`, from several threads.
        """
        self._stream = stream
        self._volume = volume
        self._clock = clock
        self._step = on_step
        self._records = _Records(volume, f"{checkpoint}/cleaning")

    def clean(self, ledger: pl.DataFrame, seconds: float | None = None) -> Cleaned:
        """Finish what an earlier process began, then do what is due.

        Args:
            ledger: Every known file with its newest state.
            seconds: Begin nothing new after this time; all that is due if None.

        Raises:
            TransientError: The Volume did not answer; the next call goes on.
        """
        began = time.monotonic()
        done = Cleaned()
        while True:
            intent = self._records.pending()
            if intent is None:
                if self._stream.options.clean_source == "OFF":
                    return done
                due = self._due(ledger).head(FILES_AT_ONCE)
                if due.is_empty():
                    return done
                intent = self._records.begin(self._intent(due))
                self._step("cleaning_planned")
            ends = self._carry_out(intent)
            self._step("cleaned")
            if self._records.end(intent.number, ends):
                outcomes = ends["outcome"]
                moved, deleted = int((outcomes == "MOVED").sum()), int((outcomes == "DELETED").sum())
                done = Cleaned(done.moved + moved, done.deleted + deleted)
            self._step("cleaning_ended")
            if seconds is not None and time.monotonic() - began >= seconds:
                return done

    def reasons(self) -> pl.DataFrame:
        """What was done with which version of which file: `path`, `batch_id`, `modified_ns` and `cleaned` (a text)."""
        ends = self._records.ends().filter(pl.col("outcome").is_in(["MOVED", "DELETED", "GONE", "REFUSED"]))
        day = pl.from_epoch(pl.col("at_ns") // 1000, "us").dt.strftime("%Y-%m-%d")
        outcome = pl.col("outcome")
        text = (
            pl.when(outcome == "MOVED")
            .then(pl.format("moved to {} by clean_source on {}", "detail", day))
            .when(outcome == "DELETED")
            .then(pl.format("deleted by clean_source on {}", day))
            .when(outcome == "GONE")
            .then(pl.format("gone when clean_source looked for it on {}", day))
            .otherwise(pl.format("clean_source could not clean it on {}: {}", day, "detail"))
        )
        return ends.select("path", "batch_id", "modified_ns", cleaned=text)

    def _due(self, ledger: pl.DataFrame) -> pl.DataFrame:
        now = self._clock()
        # The file's own time counts too: where a clock was wrong at the commit, a file from its future shows it.
        since = pl.max_horizontal("committed_ns", "modified_ns")
        old = ledger.filter(
            (pl.col("state") == "INGESTED")
            & pl.col("committed_ns").is_not_null()
            & pl.col("size").is_not_null()
            & (since <= now - self._stream.options.clean_source_retention_ns)
        )
        if old.is_empty():
            return old
        refused = (pl.col("outcome") == "REFUSED") & (pl.col("at_ns") <= now - REFUSED_NS)
        decided = self._records.ends().filter((pl.col("outcome") != "LEFT") & ~refused)
        return old.join(decided, on=_VERSION, how="anti").sort("committed_ns", "path")

    def _intent(self, due: pl.DataFrame) -> _Intent:
        options = self._stream.options
        columns = ["path", "size", "modified_ns", "etag", "batch_id"]
        rows = due.select(columns, there=pl.lit(False)).iter_rows()
        sources = [_Source(*row) for row in rows]
        with ThreadPoolExecutor(WORKERS) as pool:
            there = list(pool.map(lambda source: self._stat(source.path) == source.file, sources))
        return _Intent(
            self._records.next_number(),
            uuid.uuid4().hex[:12],
            options.clean_source,
            self._stream.folder,
            options.clean_source_move_destination if options.clean_source == "MOVE" else None,
            tuple(replace(source, there=found) for source, found in zip(sources, there, strict=True)),
        )

    def _stat(self, path: str) -> FileEntry | None:
        try:
            return self._volume.stat(path)
        except VolumeError:
            # Working on it will say why, by name.
            return None

    def _carry_out(self, intent: _Intent) -> pl.DataFrame:
        with ThreadPoolExecutor(WORKERS) as pool:
            rows = list(pool.map(lambda source: self._work(intent, source), intent.files))
        return pl.DataFrame(rows, schema=_ENDS, orient="row")

    def _work(self, intent: _Intent, source: _Source) -> tuple[str, int, int, str, str | None, int]:
        outcome, detail = "CHANGED", None
        for _ in range(_ATTEMPTS):
            try:
                found = self._try(intent, source)
            except (FileMissingError, FileChangedError):
                # Somebody touched it meanwhile: look again.
                continue
            except VolumeError as error:
                found = "REFUSED", str(error)
            if found is not None:
                outcome, detail = found
                break
        return source.path, source.batch_id, source.modified_ns, outcome, detail, self._clock()

    def _try(self, intent: _Intent, source: _Source) -> tuple[str, str | None] | None:
        """What became of the file, or None if it changed under the attempt."""
        now = self._volume.stat(source.path)
        if now is None:
            # A process that died while it removed the file may have left it half removed.
            self._volume.remove(source.file)
            now = self._volume.stat(source.path)
        if now is None:
            if intent.action == "DELETE":
                return ("DELETED" if source.there else "GONE"), None
            archived = self._archived(intent, source)
            return ("GONE", None) if archived is None else ("MOVED", archived)
        if now != source.file:
            return "CHANGED", None
        if intent.action != self._stream.options.clean_source:
            return "LEFT", None
        detail = None
        if intent.action == "MOVE":
            detail = self._copy(intent, source)
            self._step("source_copied")
        if not self._volume.remove(source.file):
            return None
        self._step("source_removed")
        return ("MOVED" if intent.action == "MOVE" else "DELETED"), detail

    def _copy(self, intent: _Intent, source: _Source) -> str:
        for target in _targets(intent, source):
            with self._volume.open(source.path) as opened:
                hashed = _Hashed(opened)
                ours = self._volume.upload(target, cast(BinaryIO, hashed), modified_ns=source.modified_ns)
                digest = hashed.rest()
            if self._digest(target) == digest:
                return target
            if ours:
                self._volume.delete(target)
                raise FileChangedError(f"{source.path} changed while it was copied. It stays where it is.")
        raise VolumeError(
            f"{source.path} can't be moved: {_NAMES} other files have its names in {intent.destination}. Empty that "
            "folder, or name another one as clean_source_move_destination."
        )

    def _archived(self, intent: _Intent, source: _Source) -> str | None:
        for target in _targets(intent, source):
            there = self._volume.stat(target)
            if there is None:
                return None
            if there.size == source.size:
                return target
        return None

    def _digest(self, path: str) -> bytes:
        with self._volume.open(path) as opened:
            return _Hashed(opened).rest()


class _Hashed:
    """A source that is hashed while it is read."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._hash.update(data)
        return data

    def rest(self) -> bytes:
        """Read what is left; the hash of the whole."""
        while self.read(_CHUNK):
            pass
        return self._hash.digest()


def _targets(intent: _Intent, source: _Source) -> Iterator[str]:
    """Names in the destination: the path below the stream's folder, then the same with a number."""
    name = f"{intent.destination}/{source.path.removeprefix(f'{intent.folder}/')}"
    yield name
    folder, _, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    for number in range(1, _NAMES):
        yield f"{folder}/{stem}~{number}{dot}{suffix}"


class _Records:
    """The files of the folder `cleaning/`. Every one is published by write-if-absent and never changed."""

    def __init__(self, volume: Volume, root: str) -> None:
        self._volume = volume
        self._root = root
        self._cached: tuple[list[tuple[int, int]], pl.DataFrame] | None = None

    def pending(self) -> _Intent | None:
        """The intent that is not finished, or None."""
        number = self.next_number()
        try:
            return self._read_intent(number)
        except FileMissingError:
            return None

    def next_number(self) -> int:
        spans = self._spans()
        return spans[-1][1] + 1 if spans else 0

    def begin(self, intent: _Intent) -> _Intent:
        """Publish an intent, or return the one that another process published first."""
        document = {"format": FORMAT, **asdict(intent)}
        if self._volume.create(self._intent_path(intent.number), json.dumps(document).encode()):
            return intent
        try:
            return self._read_intent(intent.number)
        except FileMissingError:
            # Another process has finished it already: there is nothing to do for this one.
            return replace(intent, files=())

    def end(self, number: int, frame: pl.DataFrame) -> bool:
        """Publish what became of an intent; whether it was this call that did."""
        spans = self._spans()
        if spans and spans[-1][1] >= number:
            return False
        first, parts = number, [frame]
        # Merged like the digits of a binary counter: a stream that is cleaned for ever has few files here.
        try:
            for a, b in reversed(spans):
                if b - a > number - first:
                    break
                parts.insert(0, self._read_end(a, b))
                first = a
        except FileMissingError:
            return False
        merged = pl.concat(parts).unique(_VERSION, keep="last", maintain_order=True)
        buffer = io.BytesIO()
        merged.write_parquet(buffer, compression="zstd", metadata={"telematics.format": str(FORMAT)})
        ours = self._volume.create(f"{self._root}/{_number(first)}-{_number(number)}.end", buffer.getvalue())
        for name in self._volume.names(self._root):
            intent, span = _intent_number(name), _span(name)
            merged_into = span is not None and first <= span[0] <= span[1] <= number and span != (first, number)
            if merged_into or (intent is not None and intent <= number):
                self._volume.delete(f"{self._root}/{name}")
        return ours

    def ends(self) -> pl.DataFrame:
        """What became of every version of every file that was looked at, the newest record of each."""
        for _ in range(_ATTEMPTS):
            spans = self._spans()
            if self._cached is not None and self._cached[0] == spans:
                return self._cached[1]
            try:
                parts = [self._read_end(a, b) for a, b in spans]
            except FileMissingError:
                # Another process merged it: list again.
                continue
            whole = pl.concat(parts) if parts else pl.DataFrame(schema=_ENDS)
            whole = whole.unique(_VERSION, keep="last", maintain_order=True)
            self._cached = (spans, whole)
            return whole
        raise self._corrupt("", "files of it vanish while it is read")

    def _spans(self) -> list[tuple[int, int]]:
        found = [span for name in self._volume.names(self._root) if (span := _span(name)) is not None]
        chain: list[tuple[int, int]] = []
        position = 0
        while reaching := [(b, a) for a, b in found if a <= position <= b]:
            end, start = max(reaching)
            chain.append((start, end))
            position = end + 1
        return chain

    def _intent_path(self, number: int) -> str:
        return f"{self._root}/{_number(number)}.intent"

    def _read_intent(self, number: int) -> _Intent:
        path = self._intent_path(number)
        data = self._volume.read(path)
        try:
            document: dict[str, Any] = json.loads(data)
            version = document.pop("format")
            if version > FORMAT:
                raise self._too_new(path, version)
            files = tuple(_Source(**source) for source in document.pop("files"))
            return _Intent(**document, files=files)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise self._corrupt(path.removeprefix(self._root), "it is cut short or changed") from None

    def _read_end(self, a: int, b: int) -> pl.DataFrame:
        name = f"/{_number(a)}-{_number(b)}.end"
        data = self._volume.read(self._root + name)
        try:
            version = int(pl.read_parquet_metadata(io.BytesIO(data)).get("telematics.format", "0"))
            if version > FORMAT:
                raise self._too_new(self._root + name, version)
            frame = pl.read_parquet(io.BytesIO(data))
        except pl.exceptions.PolarsError:
            raise self._corrupt(name, "it is cut short or changed") from None
        if dict(frame.schema) != _ENDS:
            raise self._corrupt(name, "its columns are others")
        return frame

    def _corrupt(self, name: str, what: str) -> CheckpointCorruptError:
        return CheckpointCorruptError(
            f"{self._volume.uri}/{self._root}{name}, the record of clean_source, can't be trusted: {what}. Restore the "
            f"folder {self._root} from a copy, or move it away: nothing is loaded twice without it, but nobody knows "
            "any more where the files went."
        )

    def _too_new(self, path: str, version: int) -> CheckpointTooNewError:
        return CheckpointTooNewError(
            f"The checkpoint file {self._volume.uri}/{path} has format {version}; this version of telematics_assets "
            f"reads up to {FORMAT}. Upgrade the package; nothing was changed."
        )


def _number(number: int) -> str:
    return f"{number:020d}"


def _intent_number(name: str) -> int | None:
    number, _, kind = name.partition(".")
    return int(number) if kind == "intent" and number.isdigit() else None


def _span(name: str) -> tuple[int, int] | None:
    a, _, b = name.removesuffix(".end").partition("-")
    return (int(a), int(b)) if name.endswith(".end") and a.isdigit() and b.isdigit() else None
