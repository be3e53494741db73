"""A reconciliation written apart from the loader: what the landed files hold against what the table holds.

It reads the files with plain `json` and `pyarrow`, and the table with plain `deltalake`; it shares no code with the
loader.
"""

from __future__ import annotations

import collections
import gzip
import json
from pathlib import Path
from typing import Any

import deltalake
import pyarrow.parquet as pq

LOCATION = "/Volumes/workspace/00_landing/telematics"


def landed(home: Path, folder: str) -> collections.Counter[tuple[str, str]]:
    """Every record of every landed file: (logical path, its `n` value as text)."""
    root = home / LOCATION.lstrip("/")
    books: collections.Counter[tuple[str, str]] = collections.Counter()
    for path in sorted((root / folder).rglob("*")):
        if not path.is_file() or path.name.startswith((".", "_")):
            continue
        name = f"{LOCATION}/{path.relative_to(root)}"
        for value in _values(path):
            books[name, str(value)] += 1
    return books


def loaded(home: Path, table: str) -> collections.Counter[tuple[str, str]]:
    """Every row of a table: (its source file, its `n` value as text)."""
    location = home / "tables/workspace/01_bronze" / table
    rows = deltalake.DeltaTable(str(location)).to_pyarrow_table(columns=["_source_file", "n"])
    return collections.Counter(
        (file, str(value)) for file, value in zip(rows["_source_file"].to_pylist(), rows["n"].to_pylist(), strict=True)
    )


def _values(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        return list(pq.read_table(path)["n"].to_pylist())
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    return [json.loads(line)["n"] for line in data.splitlines()]
