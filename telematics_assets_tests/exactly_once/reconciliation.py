"""What must be in the tables, known from the landed bytes alone, held against what is there.

Belongs here: plain readings of files and tables by `json`, `gzip`, `pyarrow` and `deltalake`, and their comparison.
Does not belong here: any code of the loader, not even its parsers; a fault that both shared would not show.

Every line of a JSON file, and every record of a Parquet file, must be one row: with these values in the columns, or
with what fits none of them in `_rescued_data`, or whole in `_corrupt_record`. A file that can't be read is no row.
"""

from __future__ import annotations

import base64
import collections
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq

from telematics_assets.catalog import FileStream, Names

LOCATION = Names().volume_location
_TYPES = {
    "STRING": pa.string(),
    "TIMESTAMP": pa.timestamp("us", "UTC"),
    "DOUBLE": pa.float64(),
    "INT": pa.int32(),
    "BOOLEAN": pa.bool_(),
}
_SPACE = re.compile(r"[ \t\n\r]*")
_OWN = ("_source_file", "_source_file_modified_at", "_batch_id", "_ingested_at")

Row = Mapping[str, Any]


@dataclass
class Account:
    """What was found.

    Attributes:
        files: Files that landed.
        unreadable: Those that nobody can read.
        rows: Rows that must be there.
        corrupt: Those that are whole in `_corrupt_record`.
        rescued: Those with something in `_rescued_data`.
        lost: Records without a row.
        doubled: Rows without a record.
        changed: Rows whose record has other values.
        examples: A few of what is wrong.
    """

    files: int = 0
    unreadable: int = 0
    rows: int = 0
    corrupt: int = 0
    rescued: int = 0
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counted = (f"{each.name}={getattr(self, each.name):,}" for each in fields(self) if each.name != "examples")
        return ", ".join([*counted, *self.examples])

    @property
    def balanced(self) -> bool:
        """Whether nothing is lost, doubled or changed."""
        return not (self.lost or self.doubled or self.changed)


def reconcile(home: Path, stream: FileStream) -> Account:
    """Hold a stream's table against its landed files."""
    account = Account()
    there = _loaded(home, stream)
    root = home / LOCATION.lstrip("/")
    for path in sorted((root / stream.folder).rglob("*")):
        if not path.is_file() or path.name.startswith(("_", ".")):
            continue
        name = f"{LOCATION}/{path.relative_to(root)}"
        rows = _rows(path, name, stream)
        account.files += 1
        account.unreadable += rows is None
        _compare(name, rows or [], there.pop(name, []), account)
    for name, rows in there.items():
        _compare(name, [], rows, account)
    return account


def unreadable_files(home: Path, stream: FileStream) -> set[str]:
    """The files, relative to the Volume, that nobody can read."""
    root = home / LOCATION.lstrip("/")
    paths = [path for path in (root / stream.folder).rglob("*") if path.is_file() and path.name[0] not in "_."]
    return {f"{path.relative_to(root)}" for path in paths if _content(path, stream) is None}


def _compare(name: str, expected: list[Row], found: list[Row], account: Account) -> None:
    must, has = collections.Counter(map(_identity, expected)), collections.Counter(map(_identity, found))
    lost, doubled = must - has, has - must
    wrong = collections.Counter(map(_canonical, expected)) - collections.Counter(map(_canonical, found))
    changed = max(0, wrong.total() - lost.total())
    account.rows += len(expected)
    account.corrupt += sum("_corrupt_record" in row for row in expected)
    account.rescued += sum("_rescued_data" in row for row in expected)
    account.lost += lost.total()
    account.doubled += doubled.total()
    account.changed += changed
    for what, rows in (("lost", lost), ("doubled", doubled), ("changed", wrong if changed else {})):
        account.examples += [f"{what}: {name}: {row}" for row in list(rows)[: max(0, 5 - len(account.examples))]]


def _identity(row: Row) -> str:
    """What tells a record of a file from the others: the line, or whose point it is and of when."""
    return row.get("_raw_record") or f"{row['vehicle_id']} {row['recorded_at']}"


def _canonical(row: Row) -> str:
    return json.dumps(sorted(row.items()), default=repr)


def _loaded(home: Path, stream: FileStream) -> dict[str, list[Row]]:
    """The rows of a table by their file; what is null is left out."""
    table = deltalake.DeltaTable(str(home / "tables" / Names().bronze(stream.table).location))
    rows: dict[str, list[Row]] = collections.defaultdict(list)
    numbers = str if stream.format == "json" else None
    for batch in table.to_pyarrow_dataset().to_batches():
        for row in batch.to_pylist():
            values = {key: value for key, value in row.items() if value is not None and key not in _OWN}
            if "_rescued_data" in values:
                rescued = values["_rescued_data"]
                values["_rescued_data"] = json.loads(rescued, parse_float=numbers, parse_int=numbers)
            rows[row["_source_file"]].append(values)
    return rows


def _content(path: Path, stream: FileStream) -> pa.Table | bytes | None:
    """What a file holds, or None if nobody can read it."""
    try:
        if stream.format == "parquet":
            return pq.read_table(path)
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (pa.ArrowInvalid, EOFError, OSError, zlib.error):
        return None


def _rows(path: Path, name: str, stream: FileStream) -> list[Row] | None:
    """The rows that a file must become, or None if nobody can read it."""
    types = {column.name: _TYPES[column.type] for column in stream.contract.columns}
    content = _content(path, stream)
    if content is None:
        return None
    if isinstance(content, bytes):
        return [_line(line, types, name) for line in content.split(b"\n") if line.strip()]
    fit = {each.name for each in content.schema if each.type == types.get(each.name, each.type)}
    return [_row(record, fit, types, name) for record in content.to_pylist()]


def _row(record: Row, fit: set[str], types: Mapping[str, Any], name: str) -> Row:
    """A record as a row: what fits no column by name, case and type is rescued."""
    lowered = {column.lower() for column in types}
    kept, rescued = {}, {}
    for key, value in record.items():
        if value is None:
            continue
        if key in fit and (key in types or key.lower() not in lowered):
            kept[key] = value
        else:
            rescued[key] = value
    return {**kept, "_rescued_data": {**rescued, "_file_path": name}} if rescued else kept


def _line(line: bytes, types: Mapping[str, Any], name: str) -> Row:
    line = line.removesuffix(b"\r")
    try:
        text = line.decode()
        members = list(_members(text))
    except UnicodeDecodeError:
        text = "base64:" + base64.b64encode(line).decode()
        return {"_corrupt_record": text, "_raw_record": text}
    except (ValueError, IndexError, StopIteration):
        return {"_corrupt_record": text, "_raw_record": text}
    keys = [key for key, _, _ in members]
    if len(set(keys)) < len(keys):
        return {"_corrupt_record": text, "_raw_record": text}
    lowered = {column.lower() for column in types}
    kept: dict[str, Any] = {"_raw_record": text}
    rescued: dict[str, Any] = {}
    for key, source, value in members:
        if source == "null":
            continue
        if key in types or key.lower() not in lowered:
            kept[key] = value if isinstance(value, str) else source
        else:
            rescued[key] = json.loads(source, parse_float=str, parse_int=str)
    return {**kept, "_rescued_data": {**rescued, "_file_path": name}} if rescued else kept


def _members(text: str) -> Iterator[tuple[str, str, Any]]:
    """Key, source text and value of each member of a text that is exactly one JSON object."""
    decoder = json.JSONDecoder(parse_constant=_refuse)

    def skip(position: int) -> int:
        found = _SPACE.match(text, position)
        assert found is not None
        return found.end()

    def take(position: int, char: str) -> int:
        if text[position] != char:
            raise ValueError(position)
        return skip(position + 1)

    position = take(skip(0), "{")
    while text[position] != "}":
        if text[position] != '"':
            raise ValueError(position)
        key, position = decoder.raw_decode(text, position)
        position = take(skip(position), ":")
        value, end = decoder.raw_decode(text, position)
        yield key, text[position:end], value
        position = skip(end)
        if text[position] != "}":
            position = take(position, ",")
            if text[position] == "}":
                raise ValueError(position)
    if skip(position + 1) != len(text):
        raise ValueError(position)


def _refuse(text: str) -> Any:
    raise ValueError(text)
