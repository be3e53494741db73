"""How many rows a batch's files brought, told by the table's own rows.

Belongs here: results of engines that learn of their rows only by committing them.
Does not belong here: when it is asked (`loader.py`, `refresh.py`), how a table counts (`lakehouse/`), Dagster.

A result is published before the commit: whoever finds the commit after a crash must find it. Where rows stream from
many machines straight into the table, nobody has their number by then: such a result says `UNCOUNTED`, and the rows
with the batch's number say the rest, at once or after a crash.
"""

from __future__ import annotations

from dataclasses import replace

from telematics_assets.autoloader.checkpoint import FileResult, Result
from telematics_assets.catalog import CORRUPT_RECORD, SOURCE_FILE, FileStream
from telematics_assets.lakehouse.base import Table

#: Rows of a file whose number its result does not know.
UNCOUNTED = -1


def counted(result: Result, stream: FileStream, table: Table, location: str) -> Result:
    """The result with the rows of its files; the same if it knows them.

    Args:
        result: What an attempt published before its commit.
        stream: The stream.
        table: Its table, with the commit.
        location: The Volume's name as a path, before each file's path.

    Returns:
        A result by another attempt's name: published ones never change.
    """
    if not any(file.rows == UNCOUNTED for file in result.files):
        return result
    marks = (stream.options.rescued_data_column, CORRUPT_RECORD)
    rows = table.brought(result.batch_id, marks)
    columns = [rows[name].to_pylist() for name in (SOURCE_FILE, "rows", *marks)]
    found = {path.removeprefix(f"{location}/"): counts for path, *counts in zip(*columns, strict=True)}
    files = tuple(
        FileResult(file.path, file.state, file.reason, *found.get(file.path, (0, 0, 0)))
        if file.rows == UNCOUNTED
        else file
        for file in result.files
    )
    return replace(result, attempt=f"{result.attempt}-counted", files=files)
