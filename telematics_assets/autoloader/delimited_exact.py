"""One record of a delimited file, exactly: where it ends, and what its fields are.

Belongs here: the one parser that decides what a record is. Every engine uses this one.
Does not belong here: files, headers, many records at once (`delimited.py`), Dagster.

A record ends at a line feed (a carriage return before it belongs to the line end), or at the end of the file. A field
that starts with a quote ends at its closing quote; in it a doubled quote is one quote, separators are text, and so are
line ends if the dialect is `multi_line`. A quote within a field that does not start with one is text. Nothing is
trimmed. An empty field is null; `""` is an empty text. A record is corrupt if something else than a separator or a line
end follows a closing quote, if a quote is not closed, if it is no UTF-8, or if it has more than `MAX_FIELDS` fields.
A corrupt record reaches to the end of its line, one with an open quote in a `multi_line` file to the end of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

#: Fields of one record. A record with more is corrupt, a header with more makes its file unreadable.
MAX_FIELDS = 20_480


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a delimited file is written.

    Attributes:
        sep: The separator, one ASCII character.
        quote: The quote, one ASCII character, or "" if there is none.
        header: Whether the first record names the columns.
        multi_line: Whether line ends may stand within quotes.
    """

    sep: str = ","
    quote: str = '"'
    header: bool = True
    multi_line: bool = True


class Record(NamedTuple):
    """One record.

    Attributes:
        fields: Its values, null where a field is empty; None if the record is corrupt.
        stop: Where it ends, without its line end.
        end: Where the next one starts.
        ended: Whether a line feed ends it; if not, it reaches to the end of the data.
    """

    fields: tuple[str | None, ...] | None
    stop: int
    end: int
    ended: bool


def parse_record(data: bytes, start: int, dialect: Dialect) -> Record:
    """Read the record that starts at a position.

    Args:
        data: Bytes of the file.
        start: Where the record starts.
        dialect: How the file is written.
    """
    sep, quote = dialect.sep.encode(), dialect.quote.encode()
    line_end = _line_end(data, start)
    limit = len(data) if dialect.multi_line else line_end
    fields: list[bytes | None] = []
    count = 0
    at = start
    while True:
        value: bytes | None
        if quote and at < limit and data.startswith(quote, at):
            close = _closing(data, at + 1, limit, quote)
            if close < 0:
                return _record(data, start, limit, None)
            if close >= line_end:
                line_end = _line_end(data, close)
            value = data[at + 1 : close].replace(quote * 2, quote)
            stop = close + 1
            if not data.startswith(sep, stop) and stop != _stop(data, start, line_end):
                return _record(data, start, line_end, None)
        else:
            found = data.find(sep, at, line_end)
            stop = _stop(data, at, line_end) if found < 0 else found
            value = data[at:stop] or None
        count += 1
        if count <= MAX_FIELDS:
            fields.append(value)
        if not data.startswith(sep, stop) or stop >= line_end:
            return _record(data, start, line_end, fields if count <= MAX_FIELDS else None)
        at = stop + 1


def _line_end(data: bytes, at: int) -> int:
    """Where the line feed stands, or the data ends."""
    found = data.find(b"\n", at)
    return len(data) if found < 0 else found


def _stop(data: bytes, start: int, line_end: int) -> int:
    """Where a line's text ends that is ended there."""
    return line_end - (start < line_end < len(data) and data.startswith(b"\r", line_end - 1))


def _closing(data: bytes, at: int, limit: int, quote: bytes) -> int:
    """Where the closing quote stands, or -1."""
    while (found := data.find(quote, at, limit)) >= 0:
        if found + 1 >= limit or not data.startswith(quote, found + 1):
            return found
        at = found + 2
    return -1


def _record(data: bytes, start: int, line_end: int, fields: list[bytes | None] | None) -> Record:
    stop, ended = _stop(data, start, line_end), line_end < len(data)
    texts: tuple[str | None, ...] | None = None
    if fields is not None:
        try:
            data[start:stop].decode()
        except UnicodeDecodeError:
            pass
        else:
            texts = tuple(None if field is None else field.decode() for field in fields)
    return Record(texts, stop, line_end + ended, ended)
