"""Streams and files for the cases.

Belongs here: short ways to say a stream and a file's content. Does not belong here: expectations.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from telematics_assets.catalog import Column, FileStream, TableContract


def parquet_stream(*columns: Column, **options: Any) -> FileStream:
    """A stream of the folder `parquet`."""
    contract = TableContract("One row per reading.", columns)
    return FileStream("readings", "parquet", "parquet", "readings", contract, options)  # type: ignore[arg-type]


def json_stream(*columns: str, **options: Any) -> FileStream:
    """A stream of the folder `json` whose contract has these columns."""
    contract = TableContract("One row per line.", tuple(Column(name, "STRING", f"The {name}.") for name in columns))
    return FileStream("events", "json", "json", "events", contract, options)  # type: ignore[arg-type]


def csv_stream(*columns: str, **options: Any) -> FileStream:
    """A stream of the folder `csv` whose contract has these columns."""
    contract = TableContract("One row per record.", tuple(Column(name, "STRING", f"The {name}.") for name in columns))
    return FileStream("records", "csv", "csv", "records", contract, options)  # type: ignore[arg-type]


def parquet(columns: Mapping[str, Any] | None = None, /, **more: Any) -> bytes:
    """A Parquet file from columns: values, or Arrow arrays."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({**(columns or {}), **more}), buffer)
    return buffer.getvalue()


def lines(*records: str | bytes) -> bytes:
    """A file with these lines, each ended by a line feed."""
    return b"".join((r if isinstance(r, bytes) else r.encode()) + b"\n" for r in records)
