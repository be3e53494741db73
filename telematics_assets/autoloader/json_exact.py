"""One record, exactly: what a line of a JSON file says, by RFC 8259 and to the last byte.

Belongs here: the one parser that decides what a record is, and how a line is shown as text. Every engine uses this one.
Does not belong here: files, many lines at once (`json_lines.py`), what may skip this parser (`json_shapes.py`).

The work is done by the scanner of the standard library, which is exact about numbers, escapes, control characters and
white space; its lenient side (NaN, lone surrogates, repeated keys, recursion) is closed here.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import NamedTuple, NoReturn

#: How deep a record may nest, the record itself being the first level. A deeper one is a corrupt record.
MAX_DEPTH = 256

#: What RFC 8259 calls white space.
WHITE_SPACE = b" \t\r\n"

#: Marks a line that is shown in base64.
BASE64 = "base64:"

_SPACES = re.compile(r"[ \t\r\n]*")
# One plain key with one plain scalar and what follows: most of what there is, in one step. Escapes take more steps.
_PLAIN_PAIR = re.compile(
    r'[ \t\r\n]*"([^"\\\x00-\x1f]*)"[ \t\r\n]*:[ \t\r\n]*'
    r'("[^"\\\x00-\x1f]*"|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null)[ \t\r\n]*([,}])'
)
_NULL: dict[str, None] = {"null": None}
_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


# The hooks throw values away: only where a value ends is asked for, so a number of any length costs nothing.
_scan_value = json.JSONDecoder(
    parse_float=bool, parse_int=bool, parse_constant=_refuse, object_pairs_hook=bool, strict=True
).scan_once  # type: ignore[attr-defined]


class Value(NamedTuple):
    """One value of a record.

    Attributes:
        text: What a column shows: a string decoded, None for null, everything else as it stands in the file.
        start: Where its source text starts in the line.
        end: Where its source text ends.
    """

    text: str | None
    start: int
    end: int


def parse_record(text: str) -> dict[str, Value] | None:
    """Read a line as one JSON object.

    Args:
        text: The whole line.

    Returns:
        Its values by key, in order; None if the line is not exactly one JSON object, nests deeper than `MAX_DEPTH`,
        repeats a key, or has a key or string that is no text (a lone surrogate).
    """
    if _too_deep(text):
        return None
    try:
        return _parse_object(text)
    except (ValueError, StopIteration):
        return None


def is_json_value(text: str) -> bool:
    """Whether a line is one whole JSON value of any kind."""
    if _too_deep(text):
        return False
    try:
        _, end = _scan_value(text, _skip(text, 0))
    except (ValueError, StopIteration):
        return False
    return _skip(text, end) == len(text)


def line_text(line: bytes) -> str:
    """Show a line that is no record: verbatim, or `base64:…` if it is no UTF-8.

    A line that itself starts with `base64:` is encoded too, so that text with this start can always be decoded.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError:
        pass
    else:
        if not text.startswith(BASE64):
            return text
    return BASE64 + base64.b64encode(line).decode()


def decode_string(inside: str) -> str:
    """Decode what stands between the quotes of a JSON string that is known to be valid."""
    decoded: str = scanstring(inside + '"', 0, True)[0]
    return decoded


def rescued_keys(keys: Sequence[str], file_path_key: str) -> list[str]:
    """The names that unknown keys get beside the file path in the rescued data column.

    Args:
        keys: The unknown keys of one record.
        file_path_key: The name that is taken.

    Returns:
        The same keys in the same order; one that equals the taken name gets underscores in front until it is unique.
    """
    if file_path_key not in keys:
        return list(keys)
    renamed = f"_{file_path_key}"
    while renamed in keys:
        renamed = f"_{renamed}"
    return [renamed if key == file_path_key else key for key in keys]


def _parse_object(text: str) -> dict[str, Value] | None:
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        return None
    values: dict[str, Value] = {}
    at = _skip(text, at + 1)
    if text[at : at + 1] == "}":
        return values if _skip(text, at + 1) == len(text) else None
    after = ","
    while after == ",":
        if plain := _PLAIN_PAIR.match(text, at):
            key, source, after = plain.groups()
            shown = source[1:-1] if source[0] == '"' else _NULL.get(source, source)
            value = Value(shown, *plain.span(2))
            at = plain.end()
        else:
            key, value, at = _parse_pair(text, _skip(text, at))
            after = text[at : at + 1]
            at += 1
        if key in values:
            return None
        values[key] = value
    return values if after == "}" and _skip(text, at) == len(text) else None


def _parse_pair(text: str, at: int) -> tuple[str, Value, int]:
    if text[at : at + 1] != '"':
        raise ValueError("no key")
    key, at = scanstring(text, at + 1, True)
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise ValueError("no colon")
    start = _skip(text, at + 1)
    first = text[start : start + 1]
    shown: str | None
    if first == '"':
        shown, end = scanstring(text, start + 1, True)
        _check_text(shown)
    else:
        _, end = _scan_value(text, start)
        shown = None if first == "n" else text[start:end]
    _check_text(key)
    return key, Value(shown, start, end), _skip(text, end)


def _skip(text: str, at: int) -> int:
    found = _SPACES.match(text, at)
    return found.end() if found else at


def _check_text(decoded: str | None) -> None:
    if decoded is not None and not decoded.isascii():
        decoded.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError


def _too_deep(text: str) -> bool:
    # Asked before the scanner runs, because that one recurses.
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return False
    depth = 0
    for token in _STRUCTURE.finditer(text):
        first = text[token.start()]
        if first in "{[":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif first in "}]":
            depth -= 1
    return False
