"""Sets of keys, compared in bounded memory: what the source has and bronze lacks, and the other way round.

Belongs here: gathering keys, with a mark of each row if wanted, and the differences of two gatherings.
Does not belong here: where keys come from, what is done about a difference, Dagster.

Beyond half a million, keys are dealt out to files by their hash, the same on both sides; then two files at a time are
compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from telematics_assets.errors import VolumeUnavailableError

#: Keys of one side that are in memory at once.
KEYS_IN_MEMORY = 500_000
_MAX_PARTS = 256
#: Rows that are picked out by their keys; of more, all are read.
MOST_WANTED = 10_000_000
_SEEDS = (0x7E1E3A71C5, 0x5AFE)
_DEAL = 1
_OLDEST = pl.CompatLevel.oldest()


@dataclass(frozen=True, slots=True)
class Difference:
    """What two gatherings differ in, for some of their keys.

    Attributes:
        left: Rows of the left that the right has not, or has with another mark.
        right: Keys of the right that the left has not.
    """

    left: pa.Table
    right: pa.Table


class Keys:
    """One side of a comparison. A context manager: its files go with it."""

    def __init__(self, key: Sequence[str], parts: int) -> None:
        """Gather nothing yet.

        Args:
            key: Columns that identify a row.
            parts: Into how many files to deal them out; the same for both sides. 1: none, all in memory.
        """
        self.key = list(key)
        self.rows = 0
        self._held: list[list[pl.DataFrame]] = [[] for _ in range(parts)]
        self._sizes = [0] * parts
        # Made when it is needed: a batch that compares nothing needs no room for it.
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._writers: dict[int, tuple[pa.OSFile, pa.RecordBatchStreamWriter]] = {}

    def __enter__(self) -> Keys:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in list(self._writers):
            # They are thrown away, whether all of them could be written or not.
            with suppress(OSError):
                self._end(number)
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, table: pa.Table) -> None:
        """Take some rows in: the key's columns, and any mark beside them.

        Raises:
            VolumeUnavailableError: If the temporary files do not take them.
        """
        # A copy: a column of a batch keeps all of the batch in memory.
        frame = pl.DataFrame(table.take(pa.array(np.arange(table.num_rows))))
        self.rows += frame.height
        if len(self) == 1:
            self._held[0].append(frame)
            return
        part = frame.select(self.key).hash_rows(_DEAL) % len(self._held)
        for (number,), rows in frame.with_columns(__part=part).partition_by("__part", as_dict=True).items():
            self._held[int(number)].append(rows.drop("__part"))
            self._sizes[int(number)] += rows.height
            if self._sizes[int(number)] * len(self._held) > KEYS_IN_MEMORY:
                self._spill(int(number))

    def part(self, number: int) -> pl.DataFrame | None:
        """The rows of one part, or None if there are none."""
        frames = list(self._held[number])
        if self._folder is not None:
            path = self._path(self._folder, number)
            with _on_disk():
                self._end(number)
                if path.exists():
                    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
                        frames.append(pl.DataFrame(reader.read_all()))
        return pl.concat(frames) if frames else None

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All of them, part by part."""
        for number in range(len(self)):
            part = self.part(number)
            if part is not None:
                yield from part.to_arrow(compat_level=_OLDEST).to_batches()

    def __len__(self) -> int:
        """Into how many parts they are dealt out."""
        return len(self._held)

    def _spill(self, number: int) -> None:
        held, self._held[number], self._sizes[number] = self._held[number], [], 0
        table = pl.concat(held).to_arrow(compat_level=_OLDEST)
        with _on_disk():
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="telematics-keys-")
            if number not in self._writers:
                file = pa.OSFile(str(self._path(self._folder, number)), "wb")
                self._writers[number] = file, pa.ipc.new_stream(file, table.schema)
            self._writers[number][1].write_table(table)

    def _end(self, number: int) -> None:
        for each in reversed(self._writers.pop(number, ())):
            each.close()

    @staticmethod
    def _path(folder: tempfile.TemporaryDirectory[str], number: int) -> Path:
        return Path(folder.name) / f"{number}.arrows"


class Wanted:
    """Rows to be read, by the hash of their key: a few that were not wanted may be among them."""

    def __init__(self, key: Sequence[str]) -> None:
        """Want nothing yet."""
        self._key = list(key)
        self._held: list[npt.NDArray[np.uint64]] = []
        self._count = 0
        self._sorted: npt.NDArray[np.uint64] | None = None

    def __bool__(self) -> bool:
        """Whether any are wanted."""
        return self._count > 0

    def add(self, table: pa.Table) -> None:
        """Want the rows of these keys."""
        self._count += table.num_rows
        if self._count > MOST_WANTED:
            # More than memory should hold: then every row is.
            self._held.clear()
        elif table.num_rows:
            self._held.append(self._hashes(table))

    def among(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Those that are wanted."""
        if self._count > MOST_WANTED:
            return rows
        if self._sorted is None:
            self._sorted = np.sort(np.concatenate(self._held))
        hashes = self._hashes(pa.Table.from_batches([rows]))
        places = np.searchsorted(self._sorted, hashes)
        found = self._sorted[np.minimum(places, len(self._sorted) - 1)] == hashes
        return rows.filter(pa.array(found))

    def _hashes(self, table: pa.Table) -> npt.NDArray[np.uint64]:
        return pl.DataFrame(table.select(self._key)).hash_rows(_DEAL).to_numpy()


def parts_of(rows: int) -> int:
    """Into how many parts so many keys are dealt out."""
    return min(rows // KEYS_IN_MEMORY + 1, _MAX_PARTS)


def differences(left: Keys, right: Keys) -> Iterator[Difference]:
    """What the two differ in, part by part; parts without a difference are left out."""
    for number in range(len(left)):
        ours, theirs = left.part(number), right.part(number)
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None:
            there = theirs if ours is None else ours
            assert there is not None
            ours, theirs = (there.clear() if ours is None else ours), (there.clear() if theirs is None else theirs)
        marks = [name for name in ours.columns if name in theirs.columns]
        only = ours.join(theirs, on=marks, how="anti", nulls_equal=True)
        extra = theirs.join(ours, on=left.key, how="anti", nulls_equal=True).select(left.key)
        if only.height or extra.height:
            yield Difference(only.to_arrow(compat_level=_OLDEST), extra.to_arrow(compat_level=_OLDEST))


def without(table: pa.Table, keys: Keys) -> pa.Table:
    """The rows of a table whose keys are not among these."""
    frame = pl.DataFrame(table)
    for number in range(len(keys)):
        part = keys.part(number)
        if part is not None:
            frame = frame.join(part, on=keys.key, how="anti", nulls_equal=True)
    return frame.to_arrow(compat_level=_OLDEST)


def marked(table: pa.Table, key: Sequence[str]) -> pa.Table:
    """The key's columns, and 128 bits that tell whether two rows of a key are the same."""
    hashed = pl.DataFrame(pa.table([_exact(column) for column in table.columns], names=table.schema.names))
    marks = pl.DataFrame({f"__mark{seed}": hashed.hash_rows(seed) for seed in _SEEDS}).to_arrow(compat_level=_OLDEST)
    columns = [*(table[name] for name in key), *marks.columns]
    return pa.table(columns, names=[*key, *marks.schema.names])


def _exact(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # As numbers, 0.0 and -0.0 would be the same.
    bits = {pa.float64(): pa.int64(), pa.float32(): pa.int32()}.get(column.type)
    return column if bits is None else pa.chunked_array([chunk.view(bits) for chunk in column.chunks], bits)


@contextmanager
def _on_disk() -> Iterator[None]:
    """Temporary files: what the disk refuses is told by name."""
    try:
        yield
    except OSError as error:
        raise VolumeUnavailableError(
            f"Keys are compared in temporary files, which can't be written: {error}. Nothing was changed. Make room "
            "there, or set TMPDIR to a folder on another disk; then run again."
        ) from error
