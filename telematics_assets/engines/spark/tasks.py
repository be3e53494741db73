"""What Spark's tasks do: read some of a plan's files, by the code that every engine reads with.

Belongs here: functions that are shipped to executors, and what they are shipped with.
Does not belong here: Spark's session and its writer (`writer.py`), formats and readers (`autoloader/`).

They run in Python workers, so nothing here may import pyspark. Rows leave as Arrow batches; what speaks against a file,
or a column that the table lacks, ends the pass: nothing of it is committed, and the files are looked through (`look`)
before the next one.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import pyarrow as pa

from telematics_assets import errors
from telematics_assets.errors import PermanentError, SchemaError, TableMovedError, TelematicsError, TransientError
from telematics_assets.lakehouse.base import POSITIONS_INFO

if TYPE_CHECKING:
    from telematics_assets.autoloader.checkpoint import FileResult
    from telematics_assets.autoloader.formats import Columns
    from telematics_assets.catalog import FileStream
    from telematics_assets.volumes.base import FileEntry, Volume

#: What a pass says that knows too little to go on.
SURPRISED = "telematics: this pass met a file that it can't go on with"
#: What a task says before an error that is not about one file, as `told` reads it.
FAILED = "telematics: this task failed: "
#: What a pass says that must not commit behind another writer.
OVERTAKEN = "telematics: another writer committed first"

#: What a task is given: one row for each, with a pickled part of the plan.
PART_SCHEMA = pa.schema([pa.field("part", pa.binary())])
#: What looking through a part brings: pickled `Look`s.
LOOK_SCHEMA = pa.schema([pa.field("look", pa.binary())])


class SurpriseError(Exception):
    """Raised in a task when its pass can't be committed."""


@contextmanager
def telling() -> Iterator[None]:
    """Errors of ours in words that find their way to the driver: of a task's errors it gets the text only."""
    try:
        yield
    except TelematicsError as error:
        raise SurpriseError(FAILED + json.dumps([type(error).__name__, error.transient, str(error)])) from None


def told(text: str) -> TelematicsError | None:
    """The error that a task told of, or None.

    Args:
        text: What Spark says of the failure.
    """
    _, found, rest = text.partition(FAILED)
    if not found:
        return None
    try:
        name, transient, message = json.JSONDecoder().raw_decode(rest)[0]
    except ValueError:
        return None
    kind = getattr(errors, str(name), None)
    if isinstance(kind, type) and issubclass(kind, TelematicsError) and kind.__init__ is Exception.__init__:
        return kind(message)
    return (TransientError if transient else PermanentError)(message)


@dataclass(frozen=True)
class Look:
    """What looking through a file brought.

    Attributes:
        path: The file.
        verdict: What speaks against it, or None.
        columns: The columns that it shows, as often as they changed on the way.
    """

    path: str
    verdict: FileResult | None
    columns: tuple[Columns, ...]


@dataclass(frozen=True)
class Pass:
    """One pass over a plan, as tasks are told of it.

    Attributes:
        volume: The landing Volume.
        stream: The stream.
        table: Columns of the table as it is.
        schema: Columns that it will have.
        batch_id: Number of the batch.
        ingested_ns: The moment that its rows name, nanoseconds since the epoch.
        verdicts: What is known to speak against files, by path.
        new_fields: Columns that the table gets.
        unless: A file that must not exist; it is the log entry of a version that this pass wants to become.
        beside: A file that must exist; it is the log entry of the version that this pass was made for.
        app_id: The application whose position this pass sets; it does not go behind a commit that sets one, too, or
            that took rows away. Spark itself looks for one position of a commit only, and a commit can have more.
    """

    volume: Volume
    stream: FileStream
    table: pa.Schema
    schema: pa.Schema
    batch_id: int
    ingested_ns: int
    verdicts: Mapping[str, FileResult]
    new_fields: Sequence[pa.Field]
    unless: str | None = None
    beside: str | None = None
    app_id: str | None = None

    def rows(self) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
        """The function that turns parts of the plan into rows."""

        def read(parts: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for files in _parts(parts):
                with telling():
                    yield from self._read(files)

        return read

    def looks(self) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
        """The function that looks through parts of the plan."""

        def look(parts: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for files in _parts(parts):
                with telling():
                    looks = [pickle.dumps(self._look(file)) for file in files]
                yield pa.record_batch([pa.array(looks, pa.binary())], schema=LOOK_SCHEMA)

        return look

    def _read(self, files: Sequence[FileEntry]) -> Iterator[pa.RecordBatch]:
        from telematics_assets.autoloader.checkpoint import Plan, Result
        from telematics_assets.autoloader.reading import Attempt, PlanRows, RestartError

        if self.unless is not None and os.path.exists(self.unless):
            raise SurpriseError(OVERTAKEN)
        if self.beside is not None and self.app_id is not None and _is_overtaken(self.beside, self.app_id):
            raise SurpriseError(OVERTAKEN)
        if self.beside is not None and not os.path.exists(self.beside):
            # Spark would begin another table in its place.
            raise TableMovedError(
                f"The table lost its log while rows were read: {self.beside} is not there any more. Nothing was "
                "committed. Restore it, or start the stream anew (telematics reset)."
            )
        results: list[Result] = []
        rows = PlanRows(
            self.volume,
            self.stream,
            self.table,
            self.schema,
            Plan(self.batch_id, "", tuple(files)),
            "",
            Attempt(dict(self.verdicts), list(self.new_fields)),
            results.append,
            _ignore,
            _ignore,
            self.ingested_ns,
        )
        plain = pa.schema([pa.field(field.name, field.type) for field in self.schema])
        try:
            for batch in rows:
                yield pa.RecordBatch.from_arrays(batch.columns, schema=plain)
        except (RestartError, SchemaError):
            # What is wrong with the columns is said when all files are known: of many, the plan's first is named.
            raise SurpriseError(SURPRISED) from None
        (result,) = results
        if any(file.state != "INGESTED" and file.path not in self.verdicts for file in result.files):
            raise SurpriseError(SURPRISED)

    def _look(self, file: FileEntry) -> Look:
        from telematics_assets.autoloader.reading import looked_through

        if (known := self.verdicts.get(file.path)) is not None:
            return Look(file.path, known, ())
        verdict, columns = looked_through(self.volume, self.stream, self.schema, file)
        return Look(file.path, verdict, tuple(columns))


def unless_there(entry: str) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The function that hands rows on as they are, unless another writer committed.

    Args:
        entry: The log entry of the version that their commit wants to become.
    """

    def passed(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        if os.path.exists(entry):
            raise SurpriseError(OVERTAKEN)
        yield from batches

    return passed


def dealt(files: Sequence[FileEntry], tasks: int) -> pa.Table:
    """A plan in parts of about as many bytes each, in the plan's order: one row for a task.

    Args:
        files: The plan's files.
        tasks: How many parts at most.
    """
    # An empty file costs a look, too.
    weights = [file.size + (64 << 10) for file in files]
    share = max(sum(weights) / max(tasks, 1), 1)
    parts: list[list[FileEntry]] = []
    passed = 0
    for file, weight in zip(files, weights, strict=True):
        if int(passed / share) >= len(parts):
            parts.append([])
        parts[-1].append(file)
        passed += weight
    return pa.table([pa.array([pickle.dumps(part) for part in parts], pa.binary())], schema=PART_SCHEMA)


def _is_overtaken(entry: str, app_id: str) -> bool:
    """Whether a log entry behind this one took rows away, or set the application's position."""
    folder, name = os.path.split(entry)
    for version in count(int(name.partition(".")[0]) + 1):
        try:
            with open(os.path.join(folder, f"{version:020d}.json"), encoding="utf-8") as source:
                actions = [json.loads(line) for line in source if line.strip()]
        except FileNotFoundError:
            return False
        for action in actions:
            if action.get("remove", {}).get("dataChange") or action.get("txn", {}).get("appId") == app_id:
                return True
            positions = _json(action.get("commitInfo", {}).get("userMetadata")).get(POSITIONS_INFO)
            if app_id in _json(positions):
                return True
    raise AssertionError


def _json(text: object) -> dict[str, object]:
    """A JSON object; others' remarks are none."""
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _parts(batches: Iterator[pa.RecordBatch]) -> Iterator[list[FileEntry]]:
    for batch in batches:
        for part in batch.column(0).to_pylist():
            # Made by the driver of this run.
            yield pickle.loads(part)


def _ignore(_: object) -> None:
    return None
