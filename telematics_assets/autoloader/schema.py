"""Which columns a table gets: names, limits, and evolution.

Belongs here: the decision which columns of new files become columns of the table, and the schemas of tables and
readers.
Does not belong here: reading files, casting, writing; the JSON reader's own rules for keys.

What is decided against here is not lost: readers put it into the rescued data column.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from telematics_assets.catalog import (
    BATCH_ID,
    CORRUPT_RECORD,
    INGESTED_AT,
    SOURCE_FILE,
    SOURCE_FILE_MODIFIED_AT,
    FileStream,
)
from telematics_assets.errors import SchemaError
from telematics_assets.lakehouse.types import arrow_type, delta_type, holdable, storable

#: Columns of one table, the loader's own included. Files may have more: those beyond are rescued.
MAX_COLUMNS = 2_000

_TIMESTAMP = pa.timestamp("us", "UTC")
#: Columns that a refusal names.
_SHOWN = 20


def resolve(
    stream: FileStream,
    table_schema: pa.Schema | None,
    found: Sequence[tuple[str, pa.DataType | None]],
    file: str | None = None,
) -> list[pa.Field]:
    """The columns that the table gets before new files are read.

    A found column becomes one of the table's if its name and type can be held exactly, nothing else has that name in
    any case, the table has room, and the stream's mode allows it. Of several with one name the first that can be held
    decides.

    Args:
        stream: The stream; `addNewColumns` evolves an existing table, `rescue` and `none` never do, and
            `failOnNewColumns` adds what the contract declares by now and refuses the rest.
        table_schema: The table as it is, or None if it is to be created.
        found: Names and types of the files' columns, in the order of files; the type is None in text files.
        file: The file that they are from, for a refusal.

    Returns:
        For a table to be created all its data columns: the contract's in order, then found ones. For an existing table
        the columns to add to it.

    Raises:
        SchemaError: In mode `failOnNewColumns`, if an existing table would need a column that is not declared.
    """
    mode = stream.options.schema_evolution_mode
    declared = {column.name: column for column in stream.contract.columns}
    if table_schema is None:
        columns = [_field(column.name, arrow_type(column.type), column.comment) for column in stream.contract.columns]
        taken = {name.lower() for name in (*stream.own_columns, *(column.name for column in columns))}
        if columns and mode in ("failOnNewColumns", "none"):
            return columns
    elif mode in ("addNewColumns", "failOnNewColumns"):
        columns = []
        taken = {name.lower() for name in (*stream.own_columns, *table_schema.names)}
    else:
        return []
    for name, file_type in found:
        if len(taken) >= MAX_COLUMNS:
            break
        if name.lower() in taken or not holdable(name):
            continue
        held = pa.string() if file_type is None else storable(file_type)
        if held is not None:
            columns.append(pa.field(name, held))
            taken.add(name.lower())
    if table_schema is None or mode != "failOnNewColumns":
        return columns
    unknown = [column for column in columns if column.name not in declared]
    if unknown:
        raise SchemaError(
            f"{file or 'A file'} has columns that table {stream.table!r} lacks: "
            f"{', '.join(f'{column.name} {delta_type(column.type)}' for column in unknown[:_SHOWN])}"
            f"{f' and {len(unknown) - _SHOWN} more' if len(unknown) > _SHOWN else ''}. Stream {stream.name!r} has "
            "schema_evolution_mode='failOnNewColumns', so nothing of this batch is loaded. Declare them in the "
            "stream's contract, use mode addNewColumns, rescue or none, or replace or remove the file; then load again."
        )
    return [_field(c.name, arrow_type(c.type), c.comment) for c in (declared[column.name] for column in columns)]


def table_schema(stream: FileStream, data_fields: Sequence[pa.Field]) -> pa.Schema:
    """The schema of a new table: its data columns, then the loader's own, all with their comments.

    Args:
        stream: The stream that fills it.
        data_fields: What `resolve` gave.
    """
    return pa.schema([*data_fields, *_own_fields(stream)])


def reader_schema(stream: FileStream, schema: pa.Schema) -> pa.Schema:
    """What readers produce for a table: its data columns, then corrupt record, raw record and rescued data.

    Args:
        stream: The stream.
        schema: The table's schema; columns that were added later stand behind the loader's own.
    """
    own = _own_fields(stream)
    names = {field.name for field in own}
    filled_by_loader = (SOURCE_FILE, SOURCE_FILE_MODIFIED_AT, BATCH_ID, INGESTED_AT)
    return pa.schema(
        [field for field in schema if field.name not in names]
        + [field for field in own if field.name not in filled_by_loader]
    )


def _own_fields(stream: FileStream) -> list[pa.Field]:
    described = {
        CORRUPT_RECORD: (pa.string(), "The record as it stands in the file if it can't be read, else null."),
        stream.options.raw_record_column: (pa.string(), "The record as it stands in the file."),
        stream.options.rescued_data_column: (pa.string(), "What fits no other column, as JSON, else null."),
        SOURCE_FILE: (pa.string(), "The file that the row comes from."),
        SOURCE_FILE_MODIFIED_AT: (_TIMESTAMP, "When that file was last modified, UTC."),
        BATCH_ID: (pa.int64(), "The batch that loaded the row."),
        INGESTED_AT: (_TIMESTAMP, "When that batch was loaded, UTC."),
    }
    return [_field(name, *described[name]) for name in stream.own_columns]


def _field(name: str, kind: pa.DataType, comment: str) -> pa.Field:
    return pa.field(name, kind, metadata={"comment": comment})


__all__ = ["MAX_COLUMNS", "holdable", "reader_schema", "resolve", "table_schema"]
