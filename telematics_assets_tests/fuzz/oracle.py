"""What must hold of the rows of any bytes at all, told by Python's own json and little else.

Belongs here: the second opinion on a file, written apart from the readers, and comparing them with it.
Does not belong here: where the bytes come from (`target.py`), examples (`autoloader/`).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa

from telematics_assets.autoloader.chunks import Chunk
from telematics_assets.autoloader.codecs import codec
from telematics_assets.autoloader.delimited import read_csv
from telematics_assets.autoloader.delimited_exact import Dialect
from telematics_assets.autoloader.json_exact import MAX_DEPTH
from telematics_assets.autoloader.json_lines import is_complete_json, json_keys, read_json
from telematics_assets.errors import UnreadableFileError

BOM = b"\xef\xbb\xbf"
FILE = "json/a.json"
COLUMNS = ("a", "b", "device")
#: So few lines are read again so many times, so that shapes are learned from them.
FEW, MANY = 12, 70
_OWN = ("_corrupt_record", "_raw_record", "_rescued_data")
_TARGET = pa.schema([(name, pa.string()) for name in (*COLUMNS, *_OWN)])
_SPACES = " \t\r\n"


class _Text(NamedTuple):
    """A number as it is written, told from a string."""

    source: str


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


_DECODER = json.JSONDecoder(
    parse_float=_Text, parse_int=_Text, parse_constant=_refuse, object_pairs_hook=tuple, strict=True
)


def lines_of(content: bytes) -> list[bytes]:
    """The lines of a file that are not blank, without their line ends."""
    *ended, last = content.removeprefix(BOM).split(b"\n")
    lines = [line.removesuffix(b"\r") for line in ended] + [last]
    return [line for line in lines if line.strip(b" \t\r")]


def members(line: bytes) -> list[tuple[str, Any, str]] | None:
    """Key, value and source text of each member of a record; None if the line is no record."""
    try:
        text = line.decode()
        if _depth(text) > MAX_DEPTH:
            return None
        whole = _DECODER.decode(text)
        if not text.strip(_SPACES).startswith("{") or len(dict(whole)) < len(whole):
            return None
        for key, value in whole:
            key.encode()
            if isinstance(value, str):
                value.encode()
    except (ValueError, RecursionError):
        return None
    found: list[tuple[str, Any, str]] = []
    at = text.index("{") + 1
    for _ in whole:
        key, at = _DECODER.raw_decode(text, _after(text, at, "," if found else ""))
        start = _after(text, at, ":")
        value, at = _DECODER.raw_decode(text, start)
        found.append((key, value, text[start:at]))
    return found


def expected(line: bytes) -> dict[str, str | None]:
    """The row of a line."""
    row: dict[str, str | None] = dict.fromkeys((*COLUMNS, *_OWN))
    record = members(line)
    if record is None:
        row["_raw_record"] = row["_corrupt_record"] = shown(line)
        return row
    row["_raw_record"] = line.decode()
    rescued = {}
    for key, value, source in record:
        if key in COLUMNS:
            row[key] = None if value is None else value if isinstance(value, str) else source
        else:
            rescued[key] = source
    if rescued:
        names = {key: key for key in rescued}
        if "_file_path" in rescued:
            renamed = "__file_path"
            while renamed in rescued:
                renamed = f"_{renamed}"
            names["_file_path"] = renamed
        parts = [f"{json.dumps(names[key], ensure_ascii=False)}:{source}" for key, source in rescued.items()]
        row["_rescued_data"] = "{" + ",".join([*parts, f'"_file_path":{json.dumps(FILE)}']) + "}"
    return row


def shown(line: bytes) -> str:
    """A line that is no record, as text."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text = "base64:"
    return "base64:" + base64.b64encode(line).decode() if text.startswith("base64:") else text


def verbatim(row: dict[str, str | None]) -> bytes:
    """The bytes of a row's record."""
    text = str(row["_raw_record"])
    encoded = row["_corrupt_record"] is not None and text.startswith("base64:")
    return base64.b64decode(text[7:]) if encoded else text.encode()


def check_json_lines(content: bytes) -> None:
    """Every line is one row or blank; a record's columns hold its own tokens, everything else is kept verbatim."""
    if codec(io.BytesIO(content)) is not None:
        _readable(read_json(io.BytesIO(content), _TARGET, **_names()))
        return
    lines = lines_of(content)
    rows = [expected(line) for line in lines]
    for chunk_bytes in (1 << 20, 1 + len(content) // 3):
        heard: list[str] = []
        chunks = read_json(io.BytesIO(content), _TARGET, chunk_bytes=chunk_bytes, on_unknown=heard.extend, **_names())
        same(_rows(chunks), rows)
        known = [key for line in lines for key, _, _ in members(line) or ()]
        assert list(dict.fromkeys(heard)) == list(dict.fromkeys(key for key in known if key not in _TARGET.names))
    assert json_keys(io.BytesIO(content), len(content) + 1) == list(dict.fromkeys(known))
    is_complete_json(io.BytesIO(content), len(content))
    few = content.removeprefix(BOM) + b"\n"
    if len(lines) <= FEW and codec(io.BytesIO(few)) is None and not few.startswith(BOM):
        rows = [expected(line) for line in lines_of(few)]
        # The last of them may be cut anywhere.
        last = [expected(line) for line in lines_of(few[:-1])]
        same(_rows(read_json(io.BytesIO(few * MANY + few[:-1]), _TARGET, **_names())), rows * MANY + last)


def check_json_document(content: bytes) -> None:
    """Every byte of a document is white space, a comma or bracket around elements, or within exactly one element."""
    chunks = read_json(io.BytesIO(content), _TARGET, multi_line=True, **_names())
    rows = _readable(chunks)
    is_complete_json(io.BytesIO(content), len(content), multi_line=True)
    if rows is None or codec(io.BytesIO(content)) is not None:
        return
    _in_order(content.removeprefix(BOM), [verbatim(row) for row in rows], b" \t\r\n,[]")
    for row in rows:
        same([row], [expected(verbatim(row))])
    again = read_json(io.BytesIO(content), _TARGET, multi_line=True, chunk_bytes=1 + len(content) // 3, **_names())
    same(_rows(again), rows)


def check_csv(content: bytes) -> None:
    """Every byte of a delimited file is a line end or within exactly one record, however it is cut."""
    for multi_line in (True, False):
        dialect = Dialect(header=False, multi_line=multi_line)
        rows: list[dict[str, str | None]] | None = None
        for chunk_bytes in (1 << 20, 1 + len(content) // 3):
            chunks = read_csv(
                io.BytesIO(content), _TARGET, dialect=dialect, names=COLUMNS, chunk_bytes=chunk_bytes, **_names()
            )
            found = _readable(chunks)
            if rows is not None:
                assert found is not None
                same(found, rows)
            rows = found
        if rows is not None and codec(io.BytesIO(content)) is None:
            records = [verbatim(row) for row in rows]
            _in_order(content.removeprefix(BOM), records, b"\r\n")


def _names() -> dict[str, Any]:
    return {"rescued_column": "_rescued_data", "raw_column": "_raw_record", "file_path": FILE}


def _rows(chunks: Iterable[Chunk]) -> list[dict[str, str | None]]:
    found: list[dict[str, str | None]] = []
    for chunk in chunks:
        chunk.table.validate(full=True)
        rows = chunk.table.to_pylist()
        assert chunk.corrupt_rows == sum(row["_corrupt_record"] is not None for row in rows)
        assert chunk.rescued_rows == sum(row["_rescued_data"] is not None for row in rows)
        found += rows
    return found


def _readable(chunks: Iterator[Chunk]) -> list[dict[str, str | None]] | None:
    try:
        return _rows(chunks)
    except UnreadableFileError:
        return None


def same(found: list[dict[str, str | None]], rows: list[dict[str, str | None]]) -> None:
    """Compare rows, and show the first that differs."""
    for number, (one, other) in enumerate(zip(found, rows, strict=False)):
        assert one == other, f"row {number} is {one}, not {other}"
    assert len(found) == len(rows)


def _in_order(content: bytes, parts: Iterable[bytes], between: bytes) -> None:
    at = 0
    for part in parts:
        start = content.find(part, at)
        assert start >= 0, f"{part!r} is not there behind byte {at}"
        assert not content[at:start].strip(between), f"{content[at:start]!r} is no row"
        at = start + len(part)
    assert not content[at:].strip(between), f"{content[at:]!r} is no row"


def _after(text: str, at: int, mark: str) -> int:
    """Behind white space, a mark, and white space again."""
    at = len(text) - len(text[at:].lstrip(_SPACES))
    assert text.startswith(mark, at)
    at += len(mark)
    return len(text) - len(text[at:].lstrip(_SPACES))


def _depth(text: str) -> int:
    depth = deepest = 0
    quoted = escaped = False
    for char in text:
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest
