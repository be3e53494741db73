"""Shapes: what the lines of one writer have in common, learned from a line and proven of others.

Belongs here: turning one exactly parsed record into a pattern and the places of its values.
Does not belong here: deciding what a record is (`json_exact.py`), reading files (`json_lines.py`).

A shape is a record with its scalars taken out. A line that matches its pattern is that record with other scalars put
in, so it is valid, has the same keys, and repeats none: nothing that the exact parser checks has to be checked again.
A line that matches no shape takes the exact parser.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass

from telematics_assets.autoloader.json_exact import Value

# Strings whose escapes are a character for sure: a lone surrogate never matches. Only explicit ASCII classes, because
# the engine's \d and \s know other alphabets.
STRING = (
    r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u(?:[0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    r'|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})))*"'
)
NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+\-]?[0-9]+)?"
_SCALAR = rf"(?:{STRING}|{NUMBER}|true|false|null|\{{\}}|\[\])"

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|\{\}|\[\]|[{}\[\]:,]|[^ \t\r\n"{}\[\]:,]+', re.DOTALL)

#: A record with more scalars, or with more text around them, is not worth a pattern.
_PATTERN_SCALARS = 256
_PATTERN_LITERAL = 16_384
#: One with more than these is not worth a shape either.
_MAX_SCALARS = 4_096
_MAX_LITERAL = 262_144


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands in every line of a shape: so many bytes from a separating comma.

    Attributes:
        comma: Which comma of the line, from 0; -1 is the line's start, the shape's number of commas is its end.
        distance: Bytes between the two.
    """

    comma: int
    distance: int


@dataclass(frozen=True, slots=True)
class Field:
    """One top-level value of a shape: its key, and where its source text starts and ends."""

    key: str
    start: Place
    end: Place


@dataclass(frozen=True, slots=True)
class Shape:
    """What the lines of one writer have in common.

    Attributes:
        pattern: A regular expression (Rust) that matches such a line as a whole, with or without its line end; empty if
            the record is too wide for one.
        commas: Separating commas in such a line, at any depth.
        fields: The top-level values, in order.
        around: By scalar, what stands between the comma before it and it, and between it and the comma behind it; empty
            if there is not one comma between each two scalars.
    """

    pattern: str
    commas: int
    fields: tuple[Field, ...]
    around: tuple[tuple[bytes, bytes], ...]


def learn(text: str, record: dict[str, Value]) -> Shape | None:
    """The shape of a record.

    Args:
        text: The line.
        record: The same line as the exact parser read it.

    Returns:
        None if the record is of a kind that no shape is made for: of thousands of values, wide and with values that no
        comma parts, without any scalar in a nested value, or with a comma in a key.
    """
    if text.endswith("\r"):
        return None  # before a line feed it would belong to the line end
    scalars: list[tuple[int, int]] = []
    for value in record.values():
        inner = _scalars(text, value.start, value.end)
        if not inner:
            return None
        scalars += inner
    ends = [0, *(end for _, end in scalars)]
    starts = [*(start for start, _ in scalars), len(text)]
    literals = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    joined = "".join(literals)
    if len(scalars) > _MAX_SCALARS or len(joined) > _MAX_LITERAL or _comma_in_key(joined):
        return None
    around = _around(literals)
    is_wide = len(scalars) > _PATTERN_SCALARS or len(joined) > _PATTERN_LITERAL
    if is_wide and not around:
        return None
    commas = [at for end, start in zip(ends, starts, strict=True) for at in range(end, start) if text[at] == ","]
    fields = []
    for key, value in record.items():
        last, following = bisect_left(commas, value.start) - 1, bisect_left(commas, value.end)
        before = text[commas[last] + 1 if last >= 0 else 0 : value.start]
        after = text[value.end : commas[following] if following < len(commas) else len(text)]
        fields.append(Field(key, Place(last, len(before.encode())), Place(following, len(after.encode()))))
    pattern = "" if is_wide else f"^{_SCALAR.join(map(_quote, literals))}(?:\\r?\\n)?$"
    return Shape(pattern, len(commas), tuple(fields), around)


def _around(literals: list[str]) -> tuple[tuple[bytes, bytes], ...]:
    """What stands around each scalar, up to the commas; nothing if commas do not separate the scalars one by one."""
    between = literals[1:-1]
    outer = literals[:1] + literals[-1:]
    if len(literals) < 2 or any("," in text for text in outer) or any(text.count(",") != 1 for text in between):
        return ()
    parts = [outer[0], *(part for text in between for part in text.split(",")), outer[1]]
    return tuple((before.encode(), after.encode()) for before, after in zip(parts[::2], parts[1::2], strict=True))


def _scalars(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Where the scalars of one value stand; `{}` and `[]` count as scalars, keys do not."""
    if text[start] not in "{[":
        return [(start, end)]
    found: list[tuple[int, int]] = []
    for token in _TOKEN.finditer(text, start, end):
        first = token[0]
        if first == ":":
            found.pop()  # the string before a colon is a key
        elif first not in ("{", "}", "[", "]", ","):
            found.append(token.span())
    return found


def _comma_in_key(literals: str) -> bool:
    return any("," in token[0] for token in _TOKEN.finditer(literals) if token[0][0] == '"')


def _quote(literal: str) -> str:
    # Python's re.escape and Rust's parser do not agree on what may be escaped.
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in literal)
