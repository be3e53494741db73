"""The one map from PostgreSQL types to Delta types: what becomes of each column, and how it travels.

Belongs here: the fate of every type, the expression that a column is selected by, its bronze type and comment.
Does not belong here: reading and converting rows (`extract.py`), introspection (`source.py`), Dagster.

A value arrives exactly, or as null and counted as an anomaly; never as another value. Few types travel in binary form,
those that ADBC reads exactly; all others as the text that the server itself writes. docs/supabase-types.md has the same
table for people.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import pyarrow as pa

from telematics_assets.errors import ReplicationError, SettingsError
from telematics_assets.lakehouse.ddl import MAX_DIGITS, holdable
from telematics_assets.lakehouse.ddl import quoted as delta_quoted
from telematics_assets.microbatch.source import SourceColumn, SourceTable, quoted

#: How `extract.py` makes the bronze value: `plain` needs nothing, `bounded` are dates and times within a range.
Form = Literal["plain", "bounded", "decimal", "uuid", "xid8", "hash"]

_SHORTEST_KEY = 16
#: Columns that bronze has of its own, and those that its change data feed adds.
_TAKEN_NAMES = ("_replicated_at", "_rescued_data", "_change_type", "_commit_version", "_commit_timestamp")
#: PostgreSQL's own limit of a SELECT list.
_MOST_SELECTED = 1664
_FORBIDDEN_IN_NAMES = str.maketrans(dict.fromkeys((*map(chr, range(33)), "\x7f", *",;{}()="), "_"))


class Fate(NamedTuple):
    """What becomes of a type.

    Attributes:
        expression: How a value is selected; `{}` is the column.
        arrow: Its type in bronze; None if that depends on the column's precision and scale.
        form: How the bronze value is made of what arrives.
    """

    expression: str
    arrow: pa.DataType | None
    form: Form


_TEXT = Fate("{}::text", pa.string(), "plain")
_NUMBER = "{}::text::int8"

#: Types with a fate of their own, by their name in `pg_catalog`. Every other type, of extensions too, arrives as text.
FATES: dict[str, Fate] = {
    "bool": Fate("{}", pa.bool_(), "plain"),
    "int2": Fate("{}", pa.int16(), "plain"),
    "int4": Fate("{}", pa.int32(), "plain"),
    "int8": Fate("{}", pa.int64(), "plain"),
    "float4": Fate("{}", pa.float32(), "plain"),
    "float8": Fate("{}", pa.float64(), "plain"),
    # Half as expensive as ADBC's own reading of the binary form, and exact as well.
    "numeric": Fate("{}::text", None, "decimal"),
    "text": Fate("{}", pa.string(), "plain"),
    "varchar": Fate("{}", pa.string(), "plain"),
    # A cast to text would take the padding away.
    "bpchar": Fate("{}", pa.string(), "plain"),
    "name": Fate("{}", pa.string(), "plain"),
    "bytea": Fate("{}", pa.binary(), "plain"),
    "date": Fate("{}", pa.date32(), "bounded"),
    "timestamp": Fate("{}", pa.timestamp("us"), "bounded"),
    "timestamptz": Fate("{}", pa.timestamp("us", "UTC"), "bounded"),
    "uuid": Fate("{}", pa.string(), "uuid"),
    "json": Fate("{}", pa.string(), "plain"),
    "jsonb": Fate("{}", pa.string(), "plain"),
    "oid": Fate("{}::int8", pa.int64(), "plain"),
    "xid": Fate(_NUMBER, pa.int64(), "plain"),
    "cid": Fate(_NUMBER, pa.int64(), "plain"),
    "xid8": Fate("{}", pa.int64(), "xid8"),
    # The number, not its spelling: that depends on the server's lc_monetary.
    "money": Fate("{}::numeric::text", pa.string(), "plain"),
    # A cast to text would add the /32 that the value is not shown with.
    "inet": Fate("textin(inet_out({}))", pa.string(), "plain"),
}

#: Element types whose one-dimensional arrays travel as they are, element by element; others as arrays of text.
_ELEMENTS_AS_THEY_ARE = frozenset(
    {
        *("bool", "int2", "int4", "int8", "float4", "float8", "text", "varchar", "bpchar", "name", "bytea"),
        *("date", "timestamp", "timestamptz"),
    }
)


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """How a column travels.

    Attributes:
        name: Its name in bronze: the source's, with `_` for each character that Delta can't hold in a name.
        source: Its name in PostgreSQL.
        expression: The SQL expression that is selected.
        arrow: Its type in bronze; every column may be null.
        comment: Its comment in bronze: the source's, and what it is there.
        form: How the bronze value is made of what arrives.
        check: For arrays, the expression of a text that is null unless the value has more than one dimension or does
            not start at 1; else None.
        required: Whether the column is part of the key, where null would lose the row: an anomaly is an error there.
        hash_key: The key of a hashed column.
    """

    name: str
    source: str
    expression: str
    arrow: pa.DataType
    comment: str
    form: Form = "plain"
    check: str | None = None
    required: bool = False
    hash_key: bytes | None = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str | None:
        """What tells a hashed column's key from others, and does not tell the key."""
        if self.hash_key is None:
            return None
        return hmac.digest(self.hash_key, b"telematics_assets: which key", hashlib.sha256).hex()[:8]

    @property
    def leaf(self) -> pa.DataType:
        """The bronze type of a value, or of an array's elements."""
        return self.arrow.value_type if pa.types.is_list(self.arrow) else self.arrow


def fate_of(column: SourceColumn) -> Fate:
    """What becomes of a column's type, with the bronze type in it."""
    if column.element is not None and column.dimensions <= 1:
        return _fate_of_array(column)
    fate = FATES.get(column.base, _TEXT)
    return fate if fate.arrow is not None else _fate_of_numeric(column.modifier)


def _fate_of_numeric(modifier: int) -> Fate:
    digits = numeric_digits(modifier)
    return _TEXT if digits is None else FATES["numeric"]._replace(arrow=pa.decimal128(*digits))


def _fate_of_array(column: SourceColumn) -> Fate:
    element = str(column.element)
    if element in _ELEMENTS_AS_THEY_ARE:
        fate = FATES[element]
    elif element == "numeric":
        fate = _fate_of_numeric(column.modifier)._replace(expression="{}::text[]")
    elif element == "oid":
        fate = FATES["oid"]._replace(expression="{}::int8[]")
    elif element == "inet":
        fate = _TEXT._replace(expression="{}::text::text[]")
    else:
        fate = _TEXT._replace(expression="{}::text[]")
    return fate._replace(arrow=pa.list_(pa.field("element", fate.arrow)))


def numeric_digits(modifier: int) -> tuple[int, int] | None:
    """Digits and scale of the DECIMAL that holds every number of a `numeric`, or None if there is none.

    PostgreSQL knows scales from -1000 to 1000 and up to 1000 digits; Delta knows 38 digits and a scale within them.

    Args:
        modifier: `atttypmod` of the column.
    """
    if modifier < 4:
        return None
    packed = modifier - 4
    precision = packed >> 16 & 0xFFFF
    scale = (packed & 0x7FF ^ 1024) - 1024
    digits = max(precision - scale, 0) + max(scale, 0)
    return (digits, max(scale, 0)) if digits <= MAX_DIGITS else None


def plan_columns(
    table: SourceTable,
    exclude: Sequence[str] = (),
    hashed: Sequence[str] = (),
    hash_key: str | None = None,
    key: Sequence[str] | None = None,
) -> tuple[ColumnPlan, ...]:
    """Say how each column of a table travels. A column that is left out is never selected.

    Args:
        table: The table as it is now.
        exclude: Columns that are left out.
        hashed: Columns of which only a keyed hash arrives: HMAC-SHA-256 of the value's text, as 64 hex digits. The same
            text has the same hash in every table; null stays null.
        hash_key: The key of the hashes; needed if `hashed` has any.
        key: Columns that identify a row; the primary key if None.

    Raises:
        ReplicationError: If a named column is not there (it may have been renamed, and would arrive in clear), or if
            the bronze table can't have these columns.
        SettingsError: If a key is needed and none is there, or it is too short.
    """
    for option, names in (("exclude", exclude), ("hash", hashed)):
        if unknown := [name for name in names if table.column(name) is None]:
            raise ReplicationError(
                f"{table.schema}.{table.name} has no column {', '.join(unknown)}, which its declaration lists under "
                f"{option}. If it was renamed upstream it would arrive as it is, so nothing was read: correct {option}."
            )
    secret = _checked_hash_key(hash_key, table) if hashed else None
    identity = table.key if key is None else key
    plans = tuple(
        replace(_plan(column, secret if column.name in hashed else None), required=column.name in identity)
        for column in table.columns
        if column.name not in exclude
    )
    if not plans:
        raise ReplicationError(
            f"No column of {table.schema}.{table.name} is left to replicate. Take some out of exclude."
        )
    _check_names(table, plans)
    if (selected := len(plans) + sum(plan.check is not None for plan in plans)) > _MOST_SELECTED:
        raise ReplicationError(
            f"{table.schema}.{table.name} has {len(plans)} columns, and an array counts twice: that makes {selected}, "
            f"and PostgreSQL selects no more than {_MOST_SELECTED} at once. List some under exclude."
        )
    return plans


def arrow_schema(plans: Iterable[ColumnPlan]) -> pa.Schema:
    """The schema of the bronze columns, with their comments."""
    return pa.schema([pa.field(plan.name, plan.arrow, metadata={"comment": plan.comment}) for plan in plans])


def select_list(plans: Sequence[ColumnPlan]) -> str:
    """What is selected: an expression for each plan, then the checks of those that have one."""
    values = [f"{plan.expression} AS c{number}" for number, plan in enumerate(plans)]
    checks = [f"{plan.check} AS k{number}" for number, plan in enumerate(plans) if plan.check]
    return ", ".join(values + checks)


def bronze_name(name: str) -> str:
    """What a column is called in bronze: with `_` for each character that Delta can't hold in a name."""
    return name.translate(_FORBIDDEN_IN_NAMES)


def _plan(column: SourceColumn, hash_key: bytes | None) -> ColumnPlan:
    name, sql = bronze_name(column.name), quoted(column.name)
    said = f"{column.comment.rstrip('. ')}. " if column.comment else ""
    if hash_key is not None:
        plan = ColumnPlan(name, column.name, f"{sql}::text", pa.string(), "", "hash", hash_key=hash_key)
        return replace(plan, comment=f"{said}Keyed hash (HMAC-SHA-256, key {plan.fingerprint}) of {column.type}.")
    fate = fate_of(column)
    assert fate.arrow is not None
    expression, check = fate.expression.format(sql), None
    if pa.types.is_list(fate.arrow):
        expression = f"CASE WHEN array_ndims({sql}) > 1 THEN NULL ELSE {expression} END"
        check = f"CASE WHEN array_ndims({sql}) > 1 OR array_lower({sql}, 1) <> 1 THEN {sql}::text END"
    comment = f"{said}PostgreSQL: {column.type}."
    return ColumnPlan(name, column.name, expression, fate.arrow, comment, fate.form, check)


def _checked_hash_key(hash_key: str | None, table: SourceTable) -> bytes:
    if not hash_key or len(hash_key) < _SHORTEST_KEY:
        raise SettingsError(
            f"Columns of {table.schema}.{table.name} are hashed, and SUPABASE_HASH_KEY is "
            f"{'too short' if hash_key else 'not set'}. Set it to {_SHORTEST_KEY} random characters or more, the same "
            "for all tables and for ever: with another key the same value has another hash."
        )
    return hash_key.encode()


def _check_names(table: SourceTable, plans: Sequence[ColumnPlan]) -> None:
    seen: dict[str, ColumnPlan] = {}
    for plan in plans:
        other = seen.setdefault(plan.name.lower(), plan)
        if other is not plan:
            raise ReplicationError(
                f"Columns {delta_quoted(other.source)} and {delta_quoted(plan.source)} of {table.schema}.{table.name} "
                f"would both be {delta_quoted(plan.name)} in bronze, where case does not tell names apart. "
                "List one of them under exclude."
            )
        if plan.name.lower() in _TAKEN_NAMES:
            raise ReplicationError(
                f"Column {delta_quoted(plan.source)} of {table.schema}.{table.name} has a name that bronze keeps for a "
                "column of its own. List it under exclude, or replicate a view that names it otherwise."
            )
        if plan.name != plan.source and plan.required:
            raise ReplicationError(
                f"Column {delta_quoted(plan.source)} of {table.schema}.{table.name} is part of the key, and a Delta "
                "table can't hold its name. Rename it upstream, or replicate a view that names it otherwise."
            )
        assert holdable(plan.name), plan.name
