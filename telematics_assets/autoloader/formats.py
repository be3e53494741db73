"""Which reader a stream's files take, with which arguments.

Belongs here: a stream's format and options as calls of the readers: rows, columns, completeness.
Does not belong here: reading itself (`json_lines.py`, `delimited.py`, `parquet.py`), what becomes of rows, Dagster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import BinaryIO

import pyarrow as pa

from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.delimited import csv_keys, is_complete_csv, read_csv
from telematics_assets.autoloader.delimited_exact import Dialect
from telematics_assets.autoloader.json_lines import is_complete_json, json_keys, read_json
from telematics_assets.autoloader.parquet import is_complete_parquet, parquet_schema, read_parquet
from telematics_assets.catalog import FileFormat, FileStream, FileStreamOptions

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
        return [(field.name, field.type) for field in parquet_schema(source)]
    if stream.format == "csv":
        keys = csv_keys(source, dialect=dialect(stream.options), names=_names(stream))
    else:
        keys = json_keys(source, SAMPLE_BYTES, multi_line=bool(stream.options.multi_line))
    return [(key, None) for key in keys]


def read_file(
    source: BinaryIO,
    stream: FileStream,
    target: pa.Schema,
    file_path: str,
    on_columns: Callable[[Columns], None] | None = None,
) -> Iterator[Chunk]:
    """The rows of a file, in order, as chunks of the target schema.

    Args:
        source: The file; it can seek.
        stream: What it belongs to.
        target: The columns to yield (`schema.reader_schema`).
        file_path: How the rescued data names the file.
        on_columns: Called with columns of the file, those at least that `target` lacks, before a chunk that needs them.

    Raises:
        UnreadableFileError: If any part of the file can't be read. Chunks that came before it must be dropped.
        VolumeUnavailableError: If the source failed.
    """
    options = stream.options

    def learn(keys: Sequence[str]) -> None:
        if on_columns is not None:
            on_columns([(key, None) for key in keys])

    if stream.format == "parquet":
        return read_parquet(
            source,
            target,
            rescued_column=options.rescued_data_column,
            file_path=file_path,
            on_schema=lambda schema: on_columns([(f.name, f.type) for f in schema]) if on_columns else None,
        )
    if stream.format == "csv":
        return read_csv(
            source,
            target,
            dialect=dialect(options),
            names=_names(stream),
            rescued_column=options.rescued_data_column,
            raw_column=options.raw_record_column,
            file_path=file_path,
            on_unknown=learn,
        )
    return read_json(
        source,
        target,
        rescued_column=options.rescued_data_column,
        raw_column=options.raw_record_column,
        file_path=file_path,
        multi_line=bool(options.multi_line),
        on_unknown=learn,
    )


def dialect(options: FileStreamOptions) -> Dialect:
    """How the delimited files of a stream are written."""
    return Dialect(options.sep, options.quote, options.header, options.multi_line is not False)


def _names(stream: FileStream) -> list[str]:
    return [column.name for column in stream.contract.columns]
