"""Which reader a stream's files take, with which arguments.

Belongs here: a stream's format and options as calls of the readers: rows, columns, their types, completeness.
Does not belong here: reading itself (`json_lines.py`, `delimited.py`, `parquet.py`), what fits a type (`typed.py`),
what becomes of rows, Dagster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import BinaryIO, cast

import pyarrow as pa

from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.delimited import csv_keys, is_complete_csv, read_csv
from telematics_assets.autoloader.delimited_exact import Dialect
from telematics_assets.autoloader.inference import JSON_TARGET, RAW_COLUMN, RESCUED_COLUMN, Sample, seen_rescued
from telematics_assets.autoloader.json_lines import is_complete_json, json_keys, read_json
from telematics_assets.autoloader.ordered import in_order
from telematics_assets.autoloader.parquet import is_complete_parquet, parquet_schema, read_parquet
from telematics_assets.autoloader.partitions import filled, partition_values
from telematics_assets.autoloader.typed import Typing
from telematics_assets.catalog import CORRUPT_RECORD, FileFormat, FileStream, FileStreamOptions

#: JSON keys for the first schema are taken from this much of a file; later keys evolve the table.
SAMPLE_BYTES = 1 << 20

#: Columns of a file: names and types; the type is None if the values are text.
Columns = Sequence[tuple[str, pa.DataType | None]]


def completeness(format: FileFormat, options: FileStreamOptions) -> Callable[[BinaryIO, int], bool]:
    """What says of a file and its size whether a file that may still be being written has its end."""
    if format == "parquet":
        return is_complete_parquet
    if format == "csv":
        return partial(is_complete_csv, dialect=dialect(options))
    return partial(is_complete_json, multi_line=bool(options.multi_line))


def file_columns(source: BinaryIO, stream: FileStream) -> Columns:
    """The columns of a file as far as its start or its footer tells them.

    Raises:
        UnreadableFileError: If this can't be told.
    """
    if stream.format == "parquet":
        schema = parquet_schema(source)
        return list(zip(schema.names, schema.types, strict=True))
    if stream.format == "csv":
        keys = csv_keys(source, dialect=dialect(stream.options), names=_names(stream))
    else:
        keys = json_keys(source, SAMPLE_BYTES, multi_line=bool(stream.options.multi_line))
    return [(key, None) for key in keys]


def reads_together(stream: FileStream) -> bool:
    """Whether small files of a stream may be read together: Parquet, of which folders say nothing."""
    return stream.format == "parquet" and not stream.options.partition_names


def sample_file(sample: Sample, source: BinaryIO, stream: FileStream) -> None:
    """Add a file to a sample of the values of a stream's columns, for `infer_column_types`.

    Raises:
        UnreadableFileError: If the file, as far as the sample takes it, can't be read; the sample is as it was.
    """
    if stream.format == "json":
        head = sample.head(source)
        records = read_json(
            cast(BinaryIO, head),
            JSON_TARGET,
            rescued_column=RESCUED_COLUMN,
            raw_column=RAW_COLUMN,
            file_path="",
            multi_line=bool(stream.options.multi_line),
        )
        sample.add_json(head, records)
        return
    names = [name for name, _ in file_columns(source, stream)]
    source.seek(0)
    head = sample.head(source)
    own = [CORRUPT_RECORD, stream.options.rescued_data_column]
    target = pa.schema([(name, pa.string()) for name in (*(name for name in names if name not in own), *own)])
    records = read_csv(
        cast(BinaryIO, head),
        target,
        dialect=dialect(stream.options),
        names=_names(stream),
        rescued_column=stream.options.rescued_data_column,
        raw_column=None,
        file_path="",
    )
    sample.add_csv(head, names, records)


def read_file(
    source: BinaryIO,
    stream: FileStream,
    target: pa.Schema,
    file_path: str,
    on_columns: Callable[[Columns], None] | None = None,
    path: str = "",
) -> Iterator[Chunk]:
    """The rows of a file, in order, as chunks of the target schema.

    Args:
        source: The file; it can seek.
        stream: What it belongs to.
        target: The columns to yield (`schema.reader_schema`).
        file_path: How the rescued data names the file.
        on_columns: Called with columns of the file, those at least that `target` lacks, before a chunk that needs them.
        path: The file's path relative to the Volume, whose folders fill the stream's partition columns.

    Raises:
        UnreadableFileError: If any part of the file can't be read. Chunks that came before it must be dropped.
        VolumeUnavailableError: If the source failed.
    """
    values = partition_values(stream, path)
    if not values:
        return _read(source, stream, target, file_path, on_columns)
    if on_columns is not None:
        on_columns([(name, None) for name in values if name in stream.options.partition_names])
    return filled(values, stream, target, file_path, lambda inner: _read(source, stream, inner, file_path, on_columns))


def _read(
    source: BinaryIO,
    stream: FileStream,
    target: pa.Schema | Callable[[pa.Schema], pa.Schema],
    file_path: str,
    on_columns: Callable[[Columns], None] | None,
) -> Iterator[Chunk]:
    options = stream.options
    if stream.format == "parquet":
        return read_parquet(
            source,
            target,
            rescued_column=options.rescued_data_column,
            file_path=file_path,
            on_columns=on_columns,
        )
    assert isinstance(target, pa.Schema)
    return _read_text(source, stream, target, file_path, on_columns)


def _read_text(
    source: BinaryIO,
    stream: FileStream,
    target: pa.Schema,
    file_path: str,
    on_columns: Callable[[Columns], None] | None,
) -> Iterator[Chunk]:
    options = stream.options
    is_json = stream.format == "json"
    typing = Typing(target, options.rescued_data_column, file_path, is_json=is_json)
    guesses = options.infer_column_types and options.schema_evolution_mode not in ("rescue", "none")
    known: set[str] = set()
    unknown: list[str] = []

    def learn(keys: Sequence[str]) -> None:
        if on_columns is None:
            return
        if guesses:
            unknown.extend(key for key in keys if key not in known)
            known.update(keys)
        else:
            on_columns([(key, None) for key in keys])

    chunks: Iterator[Chunk]
    if is_json:
        chunks = read_json(
            source,
            typing.reader_target,
            rescued_column=options.rescued_data_column,
            raw_column=options.raw_record_column,
            file_path=file_path,
            multi_line=bool(options.multi_line),
            verbatim=typing.columns,
            on_unknown=learn,
        )
    else:
        chunks = read_csv(
            source,
            typing.reader_target,
            dialect=dialect(options),
            names=_names(stream),
            rescued_column=options.rescued_data_column,
            raw_column=options.raw_record_column,
            file_path=file_path,
            on_unknown=learn,
        )

    def learnt(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            if unknown and on_columns is not None:
                # The values of new columns are in the rescued data of the chunk that brought them.
                rescued = chunk.table[options.rescued_data_column].combine_chunks()
                on_columns(seen_rescued(rescued, unknown, is_json=is_json))
                unknown.clear()
            yield chunk
        if unknown and on_columns is not None:
            on_columns([(key, None) for key in unknown])

    if typing.columns and not typing.is_nested:
        return in_order(typing.apply, learnt(chunks))
    return map(typing.apply, learnt(chunks))


def dialect(options: FileStreamOptions) -> Dialect:
    """How the delimited files of a stream are written."""
    return Dialect(options.sep, options.quote, options.header, options.multi_line is not False)


def _names(stream: FileStream) -> list[str]:
    """The columns of a file without a header: what its folders name is not in it."""
    return [c.name for c in stream.contract.columns if c.name not in stream.options.partition_names]
