"""Which columns a table gets: names, limits, and evolution.

Belongs here: the decision which columns of new files become columns of the table, contract and schema hints as columns,
and the schemas of tables and readers.
Does not belong here: reading files, casting, writing; guessing types (`inference.py`); the JSON reader's own rules for
keys.

What is decided against here is not lost: readers put it into the rescued data column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from telematics_assets.lakehouse.ddl import Hint, holdable
from telematics_assets.lakehouse.types import arrow_of, arrow_type, delta_type, storable, wider

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
    any case, the table has room, and the stream's mode allows it. It has the type of the stream's contract or hints if
    they name it; else, of several with one name, the first that can be held decides.

    Args:
        stream: The stream; `addNewColumns` evolves an existing table, `rescue` and `none` never do,
            `failOnNewColumns` adds what the contract declares or a hint names by now, and refuses the rest, and
            `addNewColumnsWithTypeWidening` also widens columns that can't hold a file's.
        table_schema: The table as it is, or None if it is to be created.
        found: Names and types of the files' columns, in the order of files; the type is None in text files of which
            no types are inferred.
        file: The file that they are from, for a refusal.

    Returns:
        For a table to be created all its data columns: the contract's in order, then hinted, partition and found ones.
        For an existing table the columns to add to it, and the ones that get a wider type (see `evolved`).

    Raises:
        SchemaError: In mode `failOnNewColumns`, if an existing table would need a column that is not declared.
    """
    mode = stream.options.schema_evolution_mode
    widens = mode == "addNewColumnsWithTypeWidening"
    types: dict[str, pa.DataType] = {}
    for name, file_type in found:
        held = pa.string() if file_type is None else storable(file_type)
        if held is not None:
            types.setdefault(name, held)
    declared = declared_fields(stream, types)
    if table_schema is None:
        columns = list(declared.values())
        taken = {name.lower() for name in (*stream.own_columns, *declared)}
        if stream.contract.columns and mode in ("failOnNewColumns", "none"):
            return columns
    elif widens or mode in ("addNewColumns", "failOnNewColumns"):
        columns = []
        taken = {name.lower() for name in (*stream.own_columns, *table_schema.names)}
    else:
        return []
    known = {field.name: field for field in (columns if table_schema is None else table_schema)}
    chosen = {field.name: field for field in columns}
    filled = {*stream.own_columns, *stream.options.partition_names}
    for name, file_type in found:
        if widens and file_type is not None and name in known and name not in filled:
            wide = wider(known[name].type, file_type)
            if wide is not None:
                chosen[name] = known[name] = known[name].with_type(wide)
            continue
        if len(taken) >= MAX_COLUMNS:
            break
        if name.lower() in taken or not holdable(name):
            continue
        field = declared.get(name) or (pa.field(name, types[name]) if name in types else None)
        if field is not None:
            chosen[name] = known[name] = field
            taken.add(name.lower())
    columns = list(chosen.values())
    if table_schema is None or mode != "failOnNewColumns":
        return columns
    unknown = [column for column in columns if column.name not in declared]
    if unknown:
        raise SchemaError(
            f"{file or 'A file'} has columns that table {stream.table!r} lacks: "
            f"{', '.join(f'{column.name} {delta_type(column.type)}' for column in unknown[:_SHOWN])}"
            f"{f' and {len(unknown) - _SHOWN} more' if len(unknown) > _SHOWN else ''}. Stream {stream.name!r} has "
            "schema_evolution_mode='failOnNewColumns', so nothing of this batch is loaded. Declare them in the "
            "stream's contract or schema_hints, use mode addNewColumns, rescue or none, or replace or remove the file; "
            "then load again."
        )
    return columns


def declared_fields(stream: FileStream, types: Mapping[str, pa.DataType]) -> dict[str, pa.Field]:
    """The columns that a stream declares, by name: its contract's, those with schema hints, its partition columns.

    Args:
        stream: The stream.
        types: Types of the files' columns: fields of a STRUCT join those that are hinted by path.
    """
    declared = {c.name: _field(c.name, arrow_type(c.type), c.comment) for c in stream.contract.columns}
    hints: dict[str, list[Hint]] = {}
    for hint in stream.options.hints:
        hints.setdefault(hint.path[0], []).append(Hint(hint.path[1:], hint.type))
    for name, inside in hints.items():
        declared.setdefault(name, pa.field(name, _hinted(inside, types.get(name))))
    for name in stream.options.partition_names:
        declared.setdefault(name, _field(name, pa.string(), f"The folder {name}=… that the row's file is in."))
    return declared


def _hinted(hints: Sequence[Hint], given: pa.DataType | None) -> pa.DataType:
    """The type of a column or field, by its hints and by what files have there."""
    if not hints[0].path:
        return arrow_of(hints[0].type)
    inside: dict[str, list[Hint]] = {}
    for hint in hints:
        inside.setdefault(hint.path[0], []).append(Hint(hint.path[1:], hint.type))
    lowered = {name.lower() for name in inside}
    children = (
        [given.field(index) for index in range(given.num_fields)]
        if given is not None and pa.types.is_struct(given)
        else []
    )
    known = {child.name: child.type for child in children if child.name in inside or child.name.lower() not in lowered}
    types = {**known, **{name: _hinted(deeper, known.get(name)) for name, deeper in inside.items()}}
    return pa.struct([pa.field(name, kind) for name, kind in types.items()])


def evolved(schema: pa.Schema, fields: Sequence[pa.Field]) -> pa.Schema:
    """A schema with other columns: in place of the one with their name, or behind all."""
    columns = {field.name: field for field in (*schema, *fields)}
    return pa.schema(list(columns.values()), schema.metadata)


def changes(before: pa.Schema, after: pa.Schema) -> tuple[tuple[str, ...], ...]:
    """What evolved: name and Delta type of each new column, and of each wider one, with the type that it had."""
    found: list[tuple[str, ...]] = []
    for field in after:
        at = before.get_field_index(field.name)
        if at < 0:
            found.append((field.name, delta_type(field.type)))
        elif field.type != before.field(at).type:
            found.append((field.name, delta_type(field.type), delta_type(before.field(at).type)))
    return tuple(found)


def widens(before: pa.Schema, after: pa.Schema) -> bool:
    """Whether a schema has columns of the one before with a wider type."""
    return any(had for _, _, *had in changes(before, after))


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


def lost_own_fields(stream: FileStream, schema: pa.Schema) -> list[pa.Field]:
    """The loader's own columns that a table lacks: an option named one since, or somebody dropped it.

    They are added again, whatever the mode: without them a corrupt record or what was rescued would be lost.

    Args:
        stream: The stream.
        schema: The table as it is.

    Raises:
        SchemaError: If one is there with another type.
    """
    own = _own_fields(stream)
    for field in own:
        at = schema.get_field_index(field.name)
        if at >= 0 and schema.field(at).type != field.type:
            raise SchemaError(
                f"Column {field.name!r} of table {stream.table!r} is {delta_type(schema.field(at).type)}, and stream "
                f"{stream.name!r} fills it with {delta_type(field.type)}: somebody changed it. Restore the table, or "
                f"run `telematics reset {stream.name} --drop-table` to start anew."
            )
    there = set(schema.names)
    return [field for field in own if field.name not in there]


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


__all__ = [
    "MAX_COLUMNS",
    "changes",
    "evolved",
    "holdable",
    "lost_own_fields",
    "reader_schema",
    "resolve",
    "table_schema",
]
