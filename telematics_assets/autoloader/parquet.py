"""Reading Parquet files into a table's schema, exactly.

Belongs here: telling a complete Parquet file from others, its columns, and its rows as chunks of the target schema,
with everything that does not fit in the rescued data column.
Does not belong here: which columns a table gets (`schema.py`), what fits (`lakehouse/types.py`), finding files,
Dagster.

Limits: a row may take 32 MiB on the average of its row group, with the longest value of each of its dictionaries, and a
page must fit in memory; a file beyond that is unreadable. A chunk holds about 16 MiB or one row, and a row group of any
size is read piece by piece. Columns whose names differ in case only are different columns. A file is unreadable as a
whole if its footer or a page is damaged, if it is encrypted, or if two columns have the same name (there would be no
telling them apart). INT96 timestamps are instants in UTC, as Spark reads them. Checksums of pages are verified where
the writer left some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.parquet_sizes import dictionary_bytes
from telematics_assets.autoloader.rescue import rescued_json
from telematics_assets.autoloader.watched import Watched
from telematics_assets.errors import TelematicsError, UnreadableFileError, VolumeUnavailableError
from telematics_assets.lakehouse.types import fits, is_always_exact, lossless_cast, plain

_MAGIC, _MAGIC_ENCRYPTED = b"PAR1", b"PARE"
_MIN_SIZE = 12
#: A file up to this size is read into memory at once.
_WHOLE_BYTES = 8 * 1024 * 1024
#: A file up to this size is decoded by one thread: handing it to several costs more than it saves.
_THREADS_BYTES = 256 * 1024
_CHUNK_BYTES = 16 * 1024 * 1024
_MAX_ROW_BYTES = 32 * 1024 * 1024
_BATCH_ROWS = 65_536
#: What a value costs at least when it is decoded (a string's offset and characters, an eight-byte number).
_VALUE_BYTES = 16
#: How much larger than in the file rows are taken to be in memory.
_EXPANSION = 4
_REASON_CHARS = 200
#: The columns of a row group are read whole up to this size in the file, larger ones through buffers.
_GROUP_BYTES = 64 * 1024 * 1024
#: All buffers together, and one of them at most.
_BUFFERS_BYTES, _BUFFER_BYTES = 64 * 1024 * 1024, 4 * 1024 * 1024
_NS_RANGE_US = 2**63 // 1000 - 1


def is_complete_parquet(source: BinaryIO, size: int) -> bool:
    """Whether a file starts and ends as a finished Parquet file does; it may still be damaged in between.

    Args:
        source: The file.
        size: Its size in bytes.
    """
    return size >= _MIN_SIZE and _ends(source, size) in ((_MAGIC, _MAGIC), (_MAGIC_ENCRYPTED, _MAGIC_ENCRYPTED))


def parquet_schema(source: BinaryIO) -> pa.Schema:
    """The columns of a Parquet file, from its footer.

    Args:
        source: The file; it can seek, and stays open.

    Raises:
        UnreadableFileError: If this is no Parquet file that can be read.
        VolumeUnavailableError: If the source failed.
    """
    watched = Watched(source)
    with _decoding(watched):
        return _open(watched).layout.schema


def read_parquet(
    source: BinaryIO,
    target: pa.Schema | Callable[[pa.Schema], pa.Schema],
    *,
    rescued_column: str,
    file_path: str,
    batch_rows: int = _BATCH_ROWS,
    on_columns: Callable[[Sequence[tuple[str, pa.DataType]]], None] | None = None,
) -> Iterator[Chunk]:
    """The rows of a Parquet file, in order, as chunks of the target schema.

    Args:
        source: The file; it can seek, and stays open.
        target: The schema of the chunks, or what makes it of the file's own. Columns that the file lacks are null.
        rescued_column: The column of `target` for everything that fits no other one.
        file_path: The path that the rescued data names.
        batch_rows: Rows of a chunk at most.
        on_columns: Called with the file's columns before its first row is read.

    Raises:
        UnreadableFileError: If any part of the file can't be read. Chunks that came before it must be dropped.
        VolumeUnavailableError: If the source failed.
    """
    watched = Watched(source)
    with _decoding(watched):
        file = _open(watched)
        if on_columns is not None:
            on_columns(file.layout.columns)
        if not isinstance(target, pa.Schema):
            target = target(file.layout.schema)
        placing = file.layout.placing(target, rescued_column)
        rows = 0
        chunk_rows = _rows_per_chunk(file, target, batch_rows)
        for columns in _batches(file, chunk_rows):
            chunk = placing.place(columns, file_path)
            rows += chunk.table.num_rows
            yield chunk
        _check_counts(file, rows)


@contextmanager
def _decoding(watched: Watched) -> Iterator[None]:
    """Turn the many exceptions of a decoder into one; the source's own errors pass."""
    try:
        yield
    except TelematicsError:
        raise
    except (pa.ArrowException, OSError, ValueError, RuntimeError, MemoryError, LookupError, ArithmeticError) as error:
        failed = watched.error
        if isinstance(failed, OSError):
            raise VolumeUnavailableError(f"The file could not be read this time: {failed}. Try again.") from error
        if failed is not None:
            raise failed from error
        if isinstance(error, UnicodeDecodeError):
            raise UnreadableFileError("Parquet with a column name that is no UTF-8") from error
        if isinstance(error, MemoryError):
            raise UnreadableFileError(
                f"Parquet file that does not fit into memory: {_one_line(error)}. Write it with smaller pages"
            ) from error
        kind = "encrypted" if "decrypt" in str(error) else "damaged"
        raise UnreadableFileError(f"{kind} Parquet file: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _REASON_CHARS else text[: _REASON_CHARS - 1] + "…"


def _ends(source: BinaryIO | Watched, size: int) -> tuple[bytes, bytes]:
    source.seek(0)
    first = source.read(4)
    source.seek(max(size - 4, 0))
    return first, source.read(4)


@dataclass(frozen=True)
class _File:
    reader: Any
    content: Any
    size: int
    #: What a row takes unpacked where rows are largest.
    row_bytes: int
    #: How large the buffers are through which columns are read; 0 if columns are read whole.
    buffer: int
    layout: Layout


def _open(watched: Watched) -> _File:
    size = watched.seek(0, 2)
    if size == 0:
        raise UnreadableFileError("not Parquet: the file is empty (0 bytes)")
    first, last = _ends(watched, size)
    if first == _MAGIC_ENCRYPTED:
        raise UnreadableFileError("encrypted Parquet file: it must be readable without keys")
    if first != _MAGIC:
        raise UnreadableFileError("not Parquet: the file does not start with PAR1")
    if size < _MIN_SIZE or last != _MAGIC:
        raise UnreadableFileError("cut short: the file starts as Parquet but does not end with PAR1")
    content: Any = watched
    if size <= _WHOLE_BYTES:
        # One read instead of a few per column: for small files the calls cost more than the bytes.
        watched.seek(0)
        content = pa.py_buffer(watched.read())
    reader = open_reader(content, "us")
    layout = layout_of(reader)
    row_bytes, buffer = _sizes(reader.metadata, size)
    _refuse_long_rows(row_bytes)
    row_bytes += dictionary_bytes(
        reader.metadata, _BATCH_ROWS, lambda paths: open_reader(content, "us", dictionaries=paths), _leaves
    )
    _refuse_long_rows(row_bytes)
    if buffer:
        reader = open_reader(content, "us", buffer)
    return _File(reader, content, size, row_bytes, buffer, layout)


def _sizes(metadata: Any, size: int) -> tuple[int, int]:
    """What a row takes unpacked where rows are largest, on the average of a row group, and how large buffers must be.

    More than these two numbers of a row group is not asked for: see `_check_counts`.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    unpacked = sum(group.total_byte_size for group in groups)
    row_bytes = largest = 0
    for group in groups:
        row_bytes = max(row_bytes, group.total_byte_size // max(group.num_rows, 1))
        largest = max(largest, size * group.total_byte_size // max(unpacked, 1))
    return row_bytes, min(_BUFFERS_BYTES // metadata.num_columns, _BUFFER_BYTES) if largest > _GROUP_BYTES else 0


def _refuse_long_rows(row_bytes: int) -> None:
    if row_bytes > _MAX_ROW_BYTES:
        raise UnreadableFileError(
            f"Parquet file whose rows take {row_bytes} bytes on the average of a row group, with the longest values of "
            f"its dictionaries, more than the {_MAX_ROW_BYTES} that are read"
        )


def open_reader(content: Any, int96_unit: str, buffer: int = 0, dictionaries: list[str] | None = None) -> Any:
    """A decoder that verifies checksums.

    Args:
        content: The file, or its bytes.
        int96_unit: What INT96 timestamps are read as.
        buffer: How large the buffers are through which columns are read; 0 reads them whole.
        dictionaries: Leaves that keep their dictionaries.
    """
    # Without pre-buffering a row group is read column by column: the whole of it never waits in memory twice.
    return pq.ParquetFile(
        pa.PythonFile(content, mode="r") if isinstance(content, Watched) else pa.BufferReader(content),
        pre_buffer=False,
        buffer_size=buffer,
        read_dictionary=dictionaries,
        page_checksum_verification=True,
        coerce_int96_timestamp_unit=int96_unit,
    )


def _check_counts(file: _File, rows: int) -> None:
    """Compare the rows that were read with every count of the footer.

    A row group that counts fewer rows than its columns hold is cut by the decoder without a word. Only after decoding:
    pyarrow ends the process when it is asked for details of damaged row groups that no decoder has refused yet.
    """
    metadata = file.reader.metadata
    if rows != metadata.num_rows:
        raise UnreadableFileError(f"damaged Parquet file: its footer counts {metadata.num_rows} rows, {rows} were read")
    total = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        total += group.num_rows
        for index in file.layout.flat if group.num_rows else ():
            values = group.column(index).num_values
            if values != group.num_rows:
                raise UnreadableFileError(
                    f"damaged Parquet file: row group {number} counts {group.num_rows} rows, its columns {values}"
                )
    if total != rows:
        raise UnreadableFileError(f"damaged Parquet file: its row groups count {total} rows, {rows} were read")


def _rows_per_chunk(file: _File, target: pa.Schema, batch_rows: int) -> int:
    decoded = _VALUE_BYTES * max(len(file.layout.schema), len(target))
    encoded = _EXPANSION * file.size // max(file.reader.metadata.num_rows, 1)
    return int(max(1, min(batch_rows, _CHUNK_BYTES // max(decoded, encoded, file.row_bytes))))


def _batches(file: _File, rows: int) -> Iterator[list[pa.Array]]:
    int96 = file.layout.int96
    batches = _decoded(file, file.reader, rows)
    if not int96:
        for batch in batches:
            yield batch.columns
        return
    # Microseconds cut digits off, nanoseconds overflow before 1677 and after 2262, both silently: one proves the other.
    names = file.layout.schema.names
    fine = _decoded(file, open_reader(file.content, "ns", file.buffer), rows, list(int96))
    for batch, exact in zip(batches, fine, strict=True):
        columns = batch.columns
        for name, kinds in int96.items():
            at = names.index(name)
            columns[at] = _instants(name, columns[at], exact.column(exact.schema.get_field_index(name)), kinds)
        yield columns


def _decoded(file: _File, reader: Any, rows: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    use_threads = file.size > _THREADS_BYTES
    metadata = reader.metadata
    counts = [metadata.num_rows, *(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))]
    # Of a damaged count the whole would be allocated at once.
    if sum(counts[1:]) > rows or not all(0 <= count <= rows for count in counts):
        yield from reader.iter_batches(batch_size=rows, columns=columns, use_threads=use_threads)
    else:
        # One call costs a third less than a stream of one batch.
        yield from reader.read(columns=columns, use_threads=use_threads).to_batches()


def _instants(name: str, micro: pa.Array, nano: pa.Array, kinds: list[bool]) -> pa.Array:
    pairs = [
        (us.view(pa.int64()), ns.view(pa.int64()))
        for us, ns, int96 in zip(_leaves(micro), _leaves(nano), kinds, strict=True)
        if int96
    ]
    same = all(_all(pc.equal(pc.multiply(us, 1000), ns)) for us, ns in pairs)
    if not same and not all(_all(pc.less_equal(pc.abs(us), _NS_RANGE_US)) for us, _ in pairs):
        raise UnreadableFileError(
            f"INT96 timestamps of column {name!r} have nanoseconds and years beyond 1677 to 2262: no type holds both"
        )
    chosen = micro if same else nano
    return chosen.cast(_with_instants(chosen.type, iter(kinds)))


def _all(condition: pa.Array) -> bool:
    return pc.all(condition).as_py() is not False


def _count_leaves(kind: Any) -> int:
    return sum(_count_leaves(child) for child in _children(kind)) if pa.types.is_nested(kind) else 1


def _children(kind: Any) -> list[Any]:
    if pa.types.is_map(kind):
        return [kind.key_type, kind.item_type]
    return [kind.field(index).type for index in range(kind.num_fields)]


def _leaves(array: Any) -> Iterator[Any]:
    """The leaf arrays of a column, in the order of the Parquet file's columns."""
    if isinstance(array, pa.MapArray):
        yield from _leaves(array.keys)
        yield from _leaves(array.items)
    elif pa.types.is_struct(array.type):
        for index in range(array.type.num_fields):
            yield from _leaves(array.field(index))
    elif pa.types.is_nested(array.type):
        yield from _leaves(array.values)
    else:
        yield array


def _with_instants(kind: Any, int96: Iterator[bool]) -> Any:
    """The type with its INT96 leaves in UTC."""
    if pa.types.is_map(kind):
        return pa.map_(_with_instants(kind.key_type, int96), _with_instants(kind.item_type, int96))
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return pa.struct([field.with_type(_with_instants(field.type, int96)) for field in fields])
    if pa.types.is_nested(kind):
        return pa.list_(pa.field("element", _with_instants(kind.value_type, int96)))
    return pa.timestamp(kind.unit, "UTC") if next(int96) else kind


class Layout:
    """What files with one schema have in common. Of thousands of small files it is found out once.

    Attributes:
        schema: The columns.
        columns: Their names and types.
        int96: Columns with INT96 timestamps: name -> which leaves, in order.
        flat: Which leaves have one value per row.
    """

    def __init__(self, reader: Any) -> None:
        self._parquet, self._extra = reader.metadata.schema, reader.metadata.metadata
        self._paths = _paths(self._parquet)
        self._placing: Placing | None = None
        leaves = range(len(self._paths))
        if not leaves:
            raise UnreadableFileError("Parquet without columns")
        schema = self._arrow = reader.schema_arrow
        names = schema.names
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            shown = ", ".join(map(repr, repeated[:3]))
            raise UnreadableFileError(f"Parquet with two columns of the same name: {shown}")
        fields, self.int96, leaf = [], {}, 0
        for field in schema:
            count = _count_leaves(field.type)
            kinds = [self._parquet.column(index).physical_type == "INT96" for index in range(leaf, leaf + count)]
            leaf += count
            if any(kinds):
                self.int96[field.name] = kinds
                field = field.with_type(_with_instants(field.type, iter(kinds)))
            fields.append(pa.field(field.name, field.type))
        if leaf != len(leaves):
            raise UnreadableFileError("damaged Parquet file: its columns do not match their types")
        self.schema = pa.schema(fields)
        self.columns = [(field.name, field.type) for field in fields]
        self.flat = [index for index in leaves if self._parquet.column(index).max_repetition_level == 0]

    def is_of(self, reader: Any) -> bool:
        """Whether another file has this layout: the same schema, and the same notes of its writer on it."""
        other = reader.metadata.schema
        if reader.metadata.metadata != self._extra or not self._parquet.equals(other) or self._paths != _paths(other):
            return False
        # Parquet's equality looks at leaves, not at the groups around them. Without a dot in a path there are none.
        return not any("." in path for path in self._paths) or bool(reader.schema_arrow == self._arrow)

    def placing(self, target: pa.Schema, rescued_column: str) -> Placing:
        """Where the columns go; kept for the next file."""
        placing = self._placing
        if placing is None or not placing.is_into(target, rescued_column):
            placing = self._placing = Placing(self.schema, target, rescued_column)
        return placing


def _paths(schema: Any) -> list[str]:
    return [schema.column(index).path for index in range(len(schema))]


_recent_layout: Layout | None = None


def layout_of(reader: Any) -> Layout:
    """The layout of a file; that of the file before, if it is the same."""
    # Threads share it: which file's layout is kept changes speed, never rows.
    global _recent_layout
    layout = _recent_layout
    if layout is None or not layout.is_of(reader):
        layout = _recent_layout = Layout(reader)
    return layout


class Placing:
    """Where each column of files goes: into its column, or into the rescued data."""

    def __init__(self, schema: pa.Schema, target: pa.Schema, rescued_column: str) -> None:
        self._target, self._rescued_column = target, rescued_column
        self._fields = list(target)
        places = {field.name: at for at, field in enumerate(self._fields) if field.name != rescued_column}
        self._rescued_at = target.get_field_index(rescued_column)
        #: By column of the file: its name, its place or None, and whether each of its values fits without a look.
        self._places: list[tuple[str, int | None, bool]] = []
        for field in schema:
            at = places.get(field.name)
            if at is not None and not fits(field.type, self._fields[at].type):
                at = None
            same = at is not None and is_always_exact(field.type, self._fields[at].type)
            self._places.append((field.name, at, same))

    @property
    def is_whole(self) -> bool:
        """Whether every column of the files has its place."""
        return all(at is not None for _, at, _ in self._places)

    def is_into(self, target: pa.Schema, rescued_column: str) -> bool:
        """Whether this is for such chunks."""
        return rescued_column == self._rescued_column and (target is self._target or target == self._target)

    def place(self, columns: list[pa.Array], file_path: str) -> Chunk:
        """Bring one batch of a file's columns into the target schema."""
        rows = len(columns[0])
        placed: list[pa.Array | None] = [None] * len(self._fields)
        rescued: dict[str, pa.Array] = {}
        for (name, at, same), values in zip(self._places, columns, strict=True):
            if at is None:
                rescued[name] = values
            elif same:
                placed[at] = values
            else:
                placed[at], misfits = lossless_cast(values, self._fields[at].type)
                if misfits is not None:
                    rescued[name] = _only(values, misfits)
        left_over = placed[self._rescued_at] = rescued_json(rescued, file_path, rows)
        arrays = [
            pa.nulls(rows, field.type) if values is None else values
            for field, values in zip(self._fields, placed, strict=True)
        ]
        return Chunk(pa.Table.from_arrays(arrays, schema=self._target), rescued_rows=rows - left_over.null_count)


def _only(values: pa.Array, mask: pa.Array) -> pa.Array:
    values = plain(values)
    return pc.if_else(mask, values, pa.scalar(None, values.type))
