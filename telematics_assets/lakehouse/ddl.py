"""Delta types and schema hints as text.

Belongs here: the grammar of column types in SQL spelling, of schema hints, and of the names that a Delta column may
have; plain Python, because the catalog is loaded where no Arrow is.
Does not belong here: Arrow types (`types.py`), which columns a table gets (`autoloader/schema.py`), Dagster.

A type is a scalar, `DECIMAL(p,s)`, `ARRAY<type>`, `MAP<type, type>` or `STRUCT<name: type, …>`; the colon may be left
out, case does not matter. A name stands as it is or in backticks, where it may hold anything and a doubled backtick is
one. Schema hints are `path type` or `path: type`, comma by comma; dots outside of backticks lead into structs.
"""

from __future__ import annotations

import re
from typing import NamedTuple

#: Spellings of scalar types, and the name that each is known by.
_SCALARS = {
    "STRING": "STRING",
    "BIGINT": "BIGINT",
    "INT": "INT",
    "SMALLINT": "SMALLINT",
    "TINYINT": "TINYINT",
    "DOUBLE": "DOUBLE",
    "FLOAT": "FLOAT",
    "BOOLEAN": "BOOLEAN",
    "TIMESTAMP": "TIMESTAMP",
    "TIMESTAMP_NTZ": "TIMESTAMP_NTZ",
    "DATE": "DATE",
    "BINARY": "BINARY",
    "LONG": "BIGINT",
    "INTEGER": "INT",
    "SHORT": "SMALLINT",
    "BYTE": "TINYINT",
    "REAL": "FLOAT",
}
SCALARS = tuple(dict.fromkeys(_SCALARS.values()))
MAX_DIGITS = 38
#: How deep a type may nest.
_MAX_DEPTH = 32

_TOKEN = re.compile(r"\s*(?:`((?:[^`]|``)+)`|([^\s`.,:<>()]+)|([.,:<>()]))")
_PLAIN = re.compile(r"[^\W\d]\w*")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f,;{}()=]")
_MAX_NAME = 255

ACCEPTED = (
    f"Use one of: {', '.join(SCALARS)}, ARRAY<type>, MAP<type, type>, STRUCT<name: type, ...> or "
    f"DECIMAL(precision,scale) with 1 to {MAX_DIGITS} digits and a scale up to the precision."
)


class DeltaType(NamedTuple):
    """A Delta type. As text it is in SQL spelling, and reads back as the same type.

    Attributes:
        name: A scalar's name, or DECIMAL, ARRAY, MAP, STRUCT.
        digits: Precision and scale of a DECIMAL, else None.
        parts: The types inside, with names: `element`; `key` and `value`; or the fields of a STRUCT.
    """

    name: str
    digits: tuple[int, int] | None = None
    parts: tuple[tuple[str, DeltaType], ...] = ()

    def __str__(self) -> str:
        if self.digits is not None:
            return f"{self.name}({self.digits[0]},{self.digits[1]})"
        if self.name == "STRUCT":
            return f"STRUCT<{', '.join(f'{quoted(name)}: {kind}' for name, kind in self.parts)}>"
        return f"{self.name}<{', '.join(str(kind) for _, kind in self.parts)}>" if self.parts else self.name


class Hint(NamedTuple):
    """The type of one column, or of one field inside of it.

    Attributes:
        path: The column's name, then those of the structs' fields.
        type: Its type.
    """

    path: tuple[str, ...]
    type: DeltaType

    def __str__(self) -> str:
        return f"{'.'.join(map(quoted, self.path))} {self.type}"


def parse_type(text: str) -> DeltaType:
    """Read a type.

    Raises:
        ValueError: If there is no such type.
    """
    parser = _Parser(text)
    kind = parser.type()
    parser.end()
    return kind


def parse_hints(text: str) -> tuple[Hint, ...]:
    """Read schema hints; each column or field may be hinted once, also in another case, or as part of a larger one.

    Raises:
        ValueError: If the text is no list of hints.
    """
    parser = _Parser(text)
    hints = [parser.hint()]
    while parser.take(","):
        hints.append(parser.hint())
    parser.end()
    lowered = [tuple(name.lower() for name in hint.path) for hint in hints]
    for number, path in enumerate(lowered):
        for before, other in zip(hints, lowered[:number], strict=False):
            shared = min(len(path), len(other))
            if path[:shared] == other[:shared]:
                raise ValueError(f"'{before}' and '{hints[number]}' speak of the same column")
            if not _same_case(hints[number].path, before.path):
                raise ValueError(f"'{before}' and '{hints[number]}' name a column in two cases")
    return tuple(hints)


def quoted(name: str) -> str:
    """A name as hints and types spell it: in backticks if it is not plain."""
    return name if _PLAIN.fullmatch(name) else f"`{name.replace('`', '``')}`"


def holdable(name: str) -> bool:
    """Whether a Delta table can have a column of this name without column mapping.

    Refused: the empty name, more than 255 characters, blanks and control characters, any of `,;{}()=`, lone surrogates.
    """
    if not 0 < len(name) <= _MAX_NAME or _FORBIDDEN.search(name):
        return False
    return not any("\ud800" <= char <= "\udfff" for char in name)


def _same_case(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two paths spell what they share in the same way."""
    for mine, theirs in zip(one, other, strict=False):
        if mine.lower() != theirs.lower():
            return True
        if mine != theirs:
            return False
    return True


class _Parser:
    """Reads a text token by token."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def hint(self) -> Hint:
        path = [self._name()]
        while self.take("."):
            path.append(self._name())
        self.take(":")
        return Hint(tuple(path), self.type())

    def type(self) -> DeltaType:
        start = self._at
        word = (self._next(2) or "").upper()
        if word in _SCALARS:
            return DeltaType(_SCALARS[word])
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError(f"it nests deeper than {_MAX_DEPTH} types")
        if word == "DECIMAL":
            kind = DeltaType(word, self._digits())
        elif word == "ARRAY":
            self._need("<")
            kind = DeltaType(word, parts=(("element", self.type()),))
            self._need(">")
        elif word == "MAP":
            self._need("<")
            key = self.type()
            self._need(",")
            kind = DeltaType(word, parts=(("key", key), ("value", self.type())))
            self._need(">")
        elif word == "STRUCT":
            self._need("<")
            fields = [self._field()]
            while self.take(","):
                fields.append(self._field())
            self._need(">")
            if len({name.lower() for name, _ in fields}) < len(fields):
                raise ValueError("a STRUCT names a field twice")
            kind = DeltaType(word, parts=tuple(fields))
        else:
            raise ValueError(f"there is no type at {self._rest(start)}")
        self._depth -= 1
        return kind

    def take(self, mark: str) -> bool:
        """Pass over a mark if it is next."""
        found = _TOKEN.match(self._text, self._at)
        if found is None or found[3] != mark:
            return False
        self._at = found.end()
        return True

    def end(self) -> None:
        if self._text[self._at :].strip():
            raise ValueError(f"nothing is expected at {self._rest(self._at)}")

    def _field(self) -> tuple[str, DeltaType]:
        name = self._name()
        self.take(":")
        return name, self.type()

    def _digits(self) -> tuple[int, int]:
        self._need("(")
        precision = self._number()
        scale = self._number() if self.take(",") else 0
        self._need(")")
        if not (1 <= precision <= MAX_DIGITS and scale <= precision):
            raise ValueError(f"there is no DECIMAL({precision},{scale})")
        return precision, scale

    def _number(self) -> int:
        start = self._at
        word = self._next(2) or ""
        if not (word.isascii() and word.isdigit() and len(word) <= 2):
            raise ValueError(f"a number of digits is missing at {self._rest(start)}")
        return int(word)

    def _name(self) -> str:
        start = self._at
        in_backticks = self._next(1)
        name = in_backticks.replace("``", "`") if in_backticks else self._next(2)
        if name is None:
            raise ValueError(f"a name is missing at {self._rest(start)}")
        if not holdable(name):
            raise ValueError(f"{name!r} is a name that a Delta table can't hold")
        return name

    def _need(self, mark: str) -> None:
        if not self.take(mark):
            raise ValueError(f"{mark!r} is missing at {self._rest(self._at)}")

    def _next(self, group: int) -> str | None:
        """The next token, if it is of that group."""
        found = _TOKEN.match(self._text, self._at)
        if found is None or found[group] is None:
            return None
        self._at = found.end()
        return found[group]

    def _rest(self, at: int) -> str:
        rest = self._text[at:].strip()
        return repr(rest if len(rest) <= 40 else f"{rest[:40]}…") if rest else "its end"
