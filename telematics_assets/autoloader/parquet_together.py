"""Many small Parquet files read at once.

Belongs here: putting the pages of files that are built alike under one footer, so that one call decodes them all, and
telling which rows are whose.
Does not belong here: where pages are (`parquet_pages.py`), reading a single file and saying what is wrong with one
(`parquet.py`), Dagster.

Opening a file costs several times what its hundred rows cost to decode. Whatever is not plain here, and every file with
which anything is wrong, is left out, and is to be read alone: only there is said why. Pages of Zstandard are unpacked
in one call: as frames that stand one behind the other are one stream, and a page of its own costs a new context.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from telematics_assets.autoloader.lockstep import Marks, Numbers, padded
from telematics_assets.autoloader.parquet import Layout, Placing, layout_of, open_reader
from telematics_assets.autoloader.parquet_pages import (
    DATA_PAGE,
    DELTA_BYTE_ARRAY,
    DICTIONARY_PAGE,
    MAGIC,
    Family,
    Group,
    Pages,
)
from telematics_assets.errors import TelematicsError

#: What is decoded at once may take so much memory at most: it is copied a few times, and the writer holds some of it.
#: More of it is hardly faster. ...
_WINDOW_BYTES = 24 << 20
#: ... and a file may that is not read alone.
_FILE_BYTES = 16 << 20
#: What a value costs at least when it is decoded.
_VALUE_BYTES = 16
_INT96, _BYTE_ARRAYS = 3, (6, 7)
#: Physical types and codecs that there are; others are nothing to put into a footer.
_KINDS, _CODECS = range(8), range(8)
_PLAIN, _ZSTD = 0, 6
_ZSTD_MAGIC = np.frombuffer(b"\x28\xb5\x2f\xfd", np.uint8)

#: A page header with the type, both sizes, and the structure of its kind; numbers are filled in behind their marks.
_DATA_HEADER = bytes.fromhex("1500 150000000000 150000000000 2c 150000000000 1500 1500 1500 00 00")
_DICTIONARY_HEADER = bytes.fromhex("1504 150000000000 150000000000 4c 150000000000 158080808000 00 00")
_HEADER_BYTES = len(_DATA_HEADER)
#: The same as a frame of Zstandard: one segment, its size, one last raw block.
_FRAME = bytes([0x28, 0xB5, 0x2F, 0xFD, 0x20, _HEADER_BYTES, *((_HEADER_BYTES << 3) | 1).to_bytes(3, "little")])
_UNPACKED_AT, _PACKED_AT, _VALUES_AT, _ENCODING_AT, _DEFINITION_AT, _REPETITION_AT = 3, 9, 16, 22, 24, 26


@dataclass(frozen=True)
class Run:
    """The rows of files that follow each other and have the same columns.

    Attributes:
        first: The first of the files.
        rows: Rows by file; each has some.
        rescued: How many of them have rescued data, by file.
        columns: Names and types of the columns of each file.
        table: All rows in the target schema.
    """

    first: int
    rows: list[int]
    rescued: list[int]
    columns: list[tuple[str, pa.DataType]]
    table: pa.Table


def first_of_each(contents: Sequence[bytes]) -> set[int]:
    """The files whose columns are the columns of all.

    Args:
        contents: Small files, whole; one without any byte is none.
    """
    others = {int(member) for family in Group(contents).families() for member in family.members[1:]}
    return set(range(len(contents))) - others


class SmallFiles:
    """Small Parquet files of which those that are alike are decoded together."""

    def __init__(self, contents: Sequence[bytes]) -> None:
        """Look at footers and page headers; nothing is decoded yet.

        Args:
            contents: The files, whole; one without any byte is none.
        """
        group = Group(contents)
        self._families = [found for family in group.families() if (found := _sources(group, family)) is not None]
        self._costs = np.zeros(len(contents), np.int64)
        for sources in self._families:
            self._costs[sources.family.members] = sources.costs

    def __bool__(self) -> bool:
        """Whether any of the files are alike."""
        return bool(self._families)

    def runs(self, target: pa.Schema, *, rescued_column: str, file_paths: Sequence[str]) -> Iterator[Run]:
        """The rows of the files as chunks of the target schema, in order.

        Args:
            target: The schema of the rows.
            rescued_column: The column of `target` for everything that fits no other one.
            file_paths: The paths that the rescued data names, by file.

        Yields:
            Runs of files. Files that are in none are to be read alone.
        """
        if not self:
            return
        spent = np.cumsum(self._costs)
        count = int(spent[-1]) // _WINDOW_BYTES + 1
        windows = (spent - self._costs) * count // (spent[-1] + 1)
        for window in range(count):
            runs: list[Run] = []
            for sources in self._families:
                chosen = np.flatnonzero(windows[sources.family.members] == window)
                for found in _decoded(sources, chosen, target, rescued_column, file_paths):
                    runs += found
            yield from sorted(runs, key=lambda run: run.first)


@dataclass
class _Sources:
    """A family and its pages.

    Attributes:
        group: The bytes.
        family: Files that are built alike.
        pages: Their pages.
        unpacked: Which of the columns are unpacked here.
        good: Which files can be read with others.
        costs: What the decoded files take at most.
    """

    group: Group
    family: Family
    pages: Pages
    unpacked: Marks
    good: Marks
    costs: Numbers
    #: Where the pages of each file begin.
    begins: npt.NDArray[np.intp]


def _sources(group: Group, family: Family) -> _Sources | None:
    if any(leaf.kind == _INT96 or leaf.kind not in _KINDS or leaf.codec not in _CODECS for leaf in family.leaves):
        return None
    pages, good = group.pages(family)
    count, width = len(family.members), len(family.leaves)
    zstd = np.array([leaf.codec == _ZSTD for leaf in family.leaves])
    frames = _is_frame(group.data, pages)
    # Later versions of pages are packed in part only: their columns stay as they are.
    unpacked = zstd & (np.bincount(pages.leaf, frames & (pages.kind == DATA_PAGE), width) > 0)
    good[pages.file[unpacked[pages.leaf] & ~frames]] = False
    for page in np.flatnonzero((pages.checksum >= 0) & unpacked[pages.leaf] & good[pages.file]).tolist():
        begin = int(pages.body[page])
        if zlib.crc32(group.joined[begin : begin + int(pages.packed[page])]) != pages.checksum[page]:
            good[pages.file[page]] = False
    costs = family.rows * (width * _VALUE_BYTES) + np.bincount(pages.file, pages.unpacked, count).astype(np.int64)
    texts = np.array([leaf.kind in _BYTE_ARRAYS for leaf in family.leaves])
    # Each row may repeat a value of a dictionary, or what the value before it begins with.
    repeating = texts[pages.leaf] & ((pages.kind == DICTIONARY_PAGE) | (pages.encoding == DELTA_BYTE_ARRAY))
    repeated = np.bincount(pages.file[repeating], pages.unpacked[repeating], count).astype(np.int64)
    costs += family.rows * repeated
    good &= (costs >= 0) & (costs <= _FILE_BYTES)
    begins = np.searchsorted(pages.file, np.arange(count + 1))
    return _Sources(group, family, pages, unpacked, good, np.where(good, costs, 0), begins)


def _is_frame(data: npt.NDArray[np.uint8], pages: Pages) -> Marks:
    """Which pages are one frame of Zstandard that tells how much it holds, and tells what the page tells."""
    at = np.clip(pages.body, 0, len(data) - 16)
    said = [data[at + place].astype(np.int64) for place in range(10)]
    flags = said[4]
    whole = np.all([said[place] == _ZSTD_MAGIC[place] for place in range(4)], axis=0)
    one_segment = (flags & 0x20) != 0
    whole &= (flags & 0x0B) == 0
    shift = np.where(one_segment, 0, 1)
    sizes = [np.where(shift == 0, said[5 + place], said[6 + place]) for place in range(4)]
    short = sizes[0]
    middle = sizes[0] + (sizes[1] << 8) + 256
    long = sizes[0] + (sizes[1] << 8) + (sizes[2] << 16) + (sizes[3] << 24)
    kind = flags >> 6
    size = np.select([(kind == 0) & one_segment, kind == 1, kind == 2], [short, middle, long], -1)
    whole &= size == pages.unpacked
    data_page = (pages.kind == DATA_PAGE) & (pages.definition >= 0) & (pages.repetition >= 0)
    whole &= data_page | (pages.kind == DICTIONARY_PAGE)
    for encoding in (pages.encoding, pages.definition, pages.repetition):
        whole &= encoding < 64
    return np.asarray(whole & (pages.encoding >= 0))


def _decoded(
    sources: _Sources,
    chosen: npt.NDArray[np.intp],
    target: pa.Schema,
    rescued_column: str,
    file_paths: Sequence[str],
) -> Iterator[list[Run]]:
    """The rows of some of a family's files; where that fails, of the halves of them, so that the others are found."""
    chosen = chosen[sources.good[chosen]]
    if not len(chosen):
        return
    try:
        reader = open_reader(_one_file(sources, chosen), "us")
        layout = layout_of(reader)
        if len(layout.flat) != len(sources.family.leaves) or layout.int96:
            return
        if any(map(_has_dictionary, layout.schema.types)):
            return
        table = reader.read(use_threads=len(chosen) > 1)
        table.validate()
        if table.num_rows != sources.family.rows[chosen].sum():
            raise ValueError("rows are missing")
        placing = layout.placing(target, rescued_column)
        runs = _runs(sources.family, chosen, table.combine_chunks(), layout, placing, file_paths)
    except (
        TelematicsError,
        pa.ArrowException,
        OSError,
        ValueError,
        RuntimeError,
        MemoryError,
        LookupError,
        ArithmeticError,
    ):
        middle = len(chosen) // 2
        if middle:
            for half in (chosen[:middle], chosen[middle:]):
                yield from _decoded(sources, half, target, rescued_column, file_paths)
        return
    yield runs


def _has_dictionary(kind: Any) -> bool:
    """Whether Arrow keeps dictionaries of a column: an index beyond its own would be a value of another file."""
    if isinstance(kind, pa.BaseExtensionType):
        return _has_dictionary(kind.storage_type)
    if pa.types.is_struct(kind):
        return any(_has_dictionary(kind.field(index).type) for index in range(kind.num_fields))
    return bool(pa.types.is_dictionary(kind))


def _one_file(sources: _Sources, chosen: npt.NDArray[np.intp]) -> pa.Buffer:
    """A Parquet file with a row group of each of some files."""
    family, pages, width = sources.family, sources.pages, len(sources.family.leaves)
    ours = np.concatenate([np.arange(*sources.begins[file : file + 2]) for file in chosen])
    pages = pages.take(ours[sources.unpacked[pages.leaf[ours]]])
    #: By row group and column: where it begins, and how large it is.
    starts = np.zeros((len(chosen), width), np.int64)
    sizes = np.zeros((len(chosen), width), np.int64)
    #: How large the dictionary is, header included.
    firsts = np.zeros((len(chosen), width), np.int64)
    parts: list[bytes | pa.Buffer] = [MAGIC]
    filled = len(MAGIC)
    if len(pages.file):
        body = _unpacked(sources.group, pages)
        parts.append(body)
        place = np.searchsorted(chosen, pages.file) * width + pages.leaf
        page_sizes = pages.unpacked + _HEADER_BYTES
        page_starts = np.cumsum(page_sizes) - page_sizes + filled
        filled += len(body)
        begins = np.flatnonzero(np.diff(place, prepend=-1))
        starts.ravel()[place[begins]] = page_starts[begins]
        firsts.ravel()[place[begins]] = page_sizes[begins]
        sizes.ravel()[:] = np.bincount(place, page_sizes, starts.size).astype(np.int64)
    for number, leaf in enumerate(family.leaves):
        if sources.unpacked[number]:
            continue
        begins, packed = leaf.start[chosen], leaf.packed[chosen]
        parts += [sources.group.joined[b : b + n] for b, n in zip(begins.tolist(), packed.tolist(), strict=True)]
        starts[:, number] = np.cumsum(packed) - packed + filled
        sizes[:, number] = packed
        firsts[:, number] = 0 if leaf.dictionary_at is None else leaf.data_at[chosen] - begins
        filled += int(packed.sum())
    footer = _footer(family, sources.unpacked, family.rows[chosen], starts, sizes, firsts)
    return pa.py_buffer(b"".join([*parts, footer, len(footer).to_bytes(4, "little"), MAGIC]))


def _unpacked(group: Group, pages: Pages) -> pa.Buffer:
    """The pages unpacked, each behind a new header."""
    count = len(pages.file)
    headers = np.empty((count, len(_FRAME) + _HEADER_BYTES), np.uint8)
    headers[:, : len(_FRAME)] = np.frombuffer(_FRAME, np.uint8)
    new = headers[:, len(_FRAME) :]
    new[:] = np.frombuffer(_DATA_HEADER, np.uint8)
    new[:, _UNPACKED_AT : _UNPACKED_AT + 5] = new[:, _PACKED_AT : _PACKED_AT + 5] = padded(pages.unpacked)
    for at, numbers in (
        (_ENCODING_AT, pages.encoding),
        (_DEFINITION_AT, pages.definition),
        (_REPETITION_AT, pages.repetition),
    ):
        new[:, at] = numbers << 1
    dictionaries = pages.kind == DICTIONARY_PAGE
    new[dictionaries, :2] = np.frombuffer(_DICTIONARY_HEADER[:2], np.uint8)
    new[dictionaries, 14:] = np.frombuffer(_DICTIONARY_HEADER[14:], np.uint8)
    new[dictionaries, _ENCODING_AT] = pages.encoding[dictionaries] << 1 | 0x80
    new[:, _VALUES_AT : _VALUES_AT + 5] = padded(pages.values)
    said, width = headers.tobytes(), headers.shape[1]
    frames: list[bytes] = [b""] * (2 * count)
    frames[::2] = [said[at : at + width] for at in range(0, len(said), width)]
    ends = (pages.body + pages.packed).tolist()
    frames[1::2] = [group.joined[at:end] for at, end in zip(pages.body.tolist(), ends, strict=True)]
    size = int(pages.unpacked.sum()) + count * _HEADER_BYTES
    return pa.decompress(b"".join(frames), size, codec="zstd")


def _footer(family: Family, unpacked: Marks, rows: Numbers, starts: Numbers, sizes: Numbers, firsts: Numbers) -> bytes:
    """A footer with a row group per file; all else is as in the first file."""
    record = bytearray(b"\x19" + _list_head(len(family.leaves)))
    places: list[int] = []
    numbers: list[Numbers] = []

    def add(before: bytes, values: Numbers) -> None:
        record.extend(before)
        places.append(len(record))
        numbers.append(values)
        record.extend(bytes(5))

    for number, leaf in enumerate(family.leaves):
        codec = _PLAIN if unpacked[number] else leaf.codec
        # A column chunk: no offset, and its metadata: type, encodings, path, codec, values, sizes, offsets.
        record += bytes([0x26, 0x00, 0x1C, 0x15, leaf.kind << 1, 0x19]) + leaf.encodings + b"\x19" + leaf.path
        add(bytes([0x15, codec << 1, 0x16]), rows)
        add(b"\x16", sizes[:, number])
        add(b"\x16", sizes[:, number])
        add(b"\x26", starts[:, number] + (0 if leaf.dictionary_at is None else firsts[:, number]))
        if leaf.dictionary_at is not None:
            add(b"\x26", starts[:, number])
        record += b"\x00\x00"
    add(b"\x16", sizes.sum(axis=1))
    add(b"\x16", rows)
    record += b"\x00"
    records = np.tile(np.frombuffer(record, np.uint8), (len(rows), 1))
    records[:, np.array(places)[:, None] + np.arange(5)] = padded(np.stack(numbers, axis=1))
    total = padded(rows.sum(keepdims=True)).tobytes()
    return family.head + total + b"\x19" + _list_head(len(rows)) + records.tobytes() + family.tail


def _list_head(count: int) -> bytes:
    """The head of a list of structures."""
    size = bytearray([0xFC])
    while count > 0x7F:
        size.append(count & 0x7F | 0x80)
        count >>= 7
    return bytes([*size, count])


def _runs(
    family: Family,
    members: npt.NDArray[np.intp],
    table: pa.Table,
    layout: Layout,
    placing: Placing,
    file_paths: Sequence[str],
) -> list[Run]:
    files, rows = family.members[members], family.rows[members]
    columns = [column.chunk(0) for column in table.columns]
    ends = np.cumsum(rows)
    rescued = np.zeros(len(files), np.int64)
    placed = placing.place(columns, "") if placing.is_whole else None
    if placed is None or placed.rescued_rows:
        tables = []
        for number, (end, count) in enumerate(zip(ends.tolist(), rows.tolist(), strict=True)):
            chunk = placing.place([column.slice(end - count, count) for column in columns], file_paths[files[number]])
            tables.append(chunk.table)
            rescued[number] = chunk.rescued_rows
        whole = pa.concat_tables(tables)
    else:
        whole = placed.table
    begins = [*np.flatnonzero(np.diff(files, prepend=-2) != 1).tolist(), len(files)]
    return [
        Run(
            int(files[begin]),
            rows[begin:end].tolist(),
            rescued[begin:end].tolist(),
            layout.columns,
            whole.slice(int(ends[begin] - rows[begin]), int(rows[begin:end].sum())),
        )
        for begin, end in pairwise(begins)
    ]
