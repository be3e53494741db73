"""What Spark's tasks do: read some of a plan's files, by the code that every engine reads with.

Belongs here: functions that are shipped to executors, and what they are shipped with.
Does not belong here: Spark's session and its writer (`writer.py`), formats and readers (`autoloader/`).

They run in Python workers, so nothing here may import pyspark. Rows leave as Arrow batches; what speaks against a file,
or a column that the table lacks, ends the pass: nothing of it is committed, and the files are looked through (`look`)
before the next one.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from telematics_assets.autoloader.checkpoint import FileResult
    from telematics_assets.autoloader.formats import Columns
    from telematics_assets.catalog import FileStream
    from telematics_assets.volumes.base import FileEntry, Volume

#: What a pass says that knows too little to go on.
SURPRISED = "telematics: this pass met a file that it can't go on with"
#: What a pass says that must not commit behind another writer.
OVERTAKEN = "telematics: another writer committed first"

#: What a task is given: one row for each, with a pickled part of the plan.
PART_SCHEMA = pa.schema([pa.field("part", pa.binary())])
#: What looking through a part brings: pickled `Look`s.
LOOK_SCHEMA = pa.schema([pa.field("look", pa.binary())])


class SurpriseError(Exception):
    """Raised in a task when its pass can't be committed."""


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
        ingested_at: The moment that its rows name.
        verdicts: What is known to speak against files, by path.
        new_fields: Columns that the table gets.
        unless: A file that must not exist; it is the log entry of a version that this pass wants to become.
    """

    volume: Volume
    stream: FileStream
    table: pa.Schema
    schema: pa.Schema
    batch_id: int
    ingested_at: datetime
    verdicts: Mapping[str, FileResult]
    new_fields: Sequence[pa.Field]
    unless: str | None = None

    def rows(self) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
        """The function that turns parts of the plan into rows."""

        def read(parts: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for files in _parts(parts):
                yield from self._read(files)

        return read

    def looks(self) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
        """The function that looks through parts of the plan."""

        def look(parts: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for files in _parts(parts):
                looks = [pickle.dumps(self._look(file)) for file in files]
                yield pa.record_batch([pa.array(looks, pa.binary())], schema=LOOK_SCHEMA)

        return look

    def _read(self, files: Sequence[FileEntry]) -> Iterator[pa.RecordBatch]:
        from telematics_assets.autoloader.checkpoint import Plan, Result
        from telematics_assets.autoloader.reading import Attempt, PlanRows, RestartError

        if self.unless is not None and os.path.exists(self.unless):
            raise SurpriseError(OVERTAKEN)
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
            self.ingested_at,
        )
        plain = pa.schema([pa.field(field.name, field.type) for field in self.schema])
        try:
            for batch in rows:
                yield pa.RecordBatch.from_arrays(batch.columns, schema=plain)
        except RestartError:
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


def _parts(batches: Iterator[pa.RecordBatch]) -> Iterator[list[FileEntry]]:
    for batch in batches:
        for part in batch.column(0).to_pylist():
            # Made by the driver of this run.
            yield pickle.loads(part)


def _ignore(_: object) -> None:
    return None
