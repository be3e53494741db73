"""What every reader yields: rows that fit the table, column by column.

Belongs here: the one shape between readers (`json_lines.py`, `delimited.py`, `parquet.py`) and the loader, and the
limit of a record of text.
Does not belong here: reading, schema decisions, Dagster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

#: The longest record of text that is read, in bytes without its line end. A file with a longer one is quarantined.
MAX_RECORD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of one file, brought into the target schema.

    Attributes:
        table: The rows; its schema equals the target schema that the reader was given.
        rescued_rows: Rows whose rescued data column is not null.
        corrupt_rows: Rows whose corrupt record column is not null.
    """

    table: pa.Table
    rescued_rows: int = 0
    corrupt_rows: int = 0


class RecordTooLongError(Exception):
    """Raised inside a reader when a record is too long; `record` counts from the first that was not yielded yet."""

    def __init__(self, record: int = 0) -> None:
        super().__init__(record)
        self.record = record
