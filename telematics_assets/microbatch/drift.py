"""The source's columns against bronze's: what came, went, or became something else since the last batch.

Belongs here: telling so, and what follows from it.
Does not belong here: which type becomes which (`types.py`), reading rows, Dagster.

A column that is added without a default is null in every row, and is simply added. Whatever may have changed rows
without their being written (a default, a type, a column of the same name that is another one) takes a new snapshot,
which compares all rows. A column that is hidden now, left out or hashed, is cleared first. One that is gone
stays in bronze: its values stay until their rows change, then they are null.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from telematics_assets.lakehouse.types import delta_type
from telematics_assets.microbatch.rescue import RESCUED_FIELD
from telematics_assets.microbatch.source import SourceTable
from telematics_assets.microbatch.types import ColumnPlan, arrow_schema

#: Column of every replicated table: when its row last changed here, by the source's clock.
REPLICATED_AT = "_replicated_at"
REPLICATED_AT_FIELD = pa.field(
    REPLICATED_AT,
    pa.timestamp("us", "UTC"),
    metadata={"comment": "When the batch that last changed the row began, by the source's clock."},
)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a table as they travel, and what tells them from others of the same name."""

    plans: tuple[ColumnPlan, ...]
    facts: Mapping[str, Sequence[str]]

    @property
    def schema(self) -> pa.Schema:
        """The bronze schema."""
        return arrow_schema(self.plans).append(RESCUED_FIELD).append(REPLICATED_AT_FIELD)

    @property
    def fingerprint(self) -> int:
        """Another number for other columns, small enough for a position."""
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).digest()
        return int.from_bytes(digest[:7], "big")


#: Which of a column's facts says how its bronze value is made: for hashed ones with which key.
_HOW = 4


def columns_of(plans: Sequence[ColumnPlan], source: SourceTable) -> Columns:
    """The columns of a table that is read by these plans."""
    facts = {}
    by_name = {column.name: column for column in source.columns}
    for plan in plans:
        column = by_name[plan.source]
        how = plan.form if plan.fingerprint is None else f"{plan.form} {plan.fingerprint}"
        facts[plan.name] = (
            *(str(column.number), column.type, plan.expression, delta_type(plan.arrow), how),
            *(column.generated or "", column.members or ""),
        )
    return Columns(tuple(plans), facts)


@dataclass(frozen=True, slots=True)
class Drift:
    """How the columns differ from bronze's.

    Attributes:
        added: Columns that bronze has not.
        gone: Columns of bronze that the source has not, or that are left out now.
        retyped: Columns whose bronze type is another one now: name, type in bronze, type now.
        altered: Columns that are not what they were, in a type that bronze can hold; None if that is not known.
    """

    added: tuple[str, ...]
    gone: tuple[str, ...]
    retyped: tuple[tuple[str, str, str], ...]
    altered: tuple[str, ...] | None

    def notes(self, source: str) -> tuple[str, ...]:
        """What a reader should know, one line each."""
        return tuple(
            f"Column {name} is gone from {source}, or left out: bronze keeps its values until their rows change."
            for name in self.gone
        )


def drift(columns: Columns, bronze: pa.Schema, before: Mapping[str, Sequence[str]] | None) -> Drift:
    """Compare columns with bronze.

    Args:
        columns: The source's columns now.
        bronze: The schema of the bronze table.
        before: The facts of the last batch; None if they are not known.
    """
    # Once each: both are made anew whenever they are asked for.
    now = columns.schema
    there, here = {field.name: field.type for field in bronze}, set(now.names)
    own = {name.lower(): name for name in there}
    added = tuple(field.name for field in now if field.name not in there)
    gone = tuple(name for name in there if name not in here)
    retyped = [
        (field.name, delta_type(there[field.name]), delta_type(field.type))
        for field in now
        if field.name in there and there[field.name] != field.type
    ]
    # Delta does not tell names apart by case.
    retyped += [(name, own[name.lower()], name) for name in added if name.lower() in own]
    altered = None
    if before is not None:
        altered = tuple(
            name for name, facts in columns.facts.items() if name in before and _is_altered(before[name], facts)
        )
    return Drift(added, gone, tuple(retyped), altered)


def in_plain(
    columns: Columns, bronze: pa.Schema, before: Mapping[str, Sequence[str]], excluded: Sequence[str]
) -> dict[str, pa.Field | None]:
    """Columns of bronze whose values must not stay: such as are left out now, or hashed now, or with another key.

    Args:
        columns: The source's columns now.
        bronze: The schema of the bronze table.
        before: The facts of the last batch.
        excluded: Names in bronze of columns that are left out.

    Returns:
        For each the field that takes its place, all null; None if it goes.
    """
    there, schema = set(bronze.names), columns.schema
    found: dict[str, pa.Field | None] = {name: None for name in excluded if name in there}
    for plan in columns.plans:
        if plan.form == "hash" and plan.name in there:
            now = columns.facts[plan.name][_HOW]
            if [*before.get(plan.name, ())][_HOW : _HOW + 1] != [now]:
                found[plan.name] = schema.field(plan.name)
    return found


def facts_without(
    columns: Columns, before: Mapping[str, Sequence[str]], cleared: Mapping[str, pa.Field | None]
) -> dict[str, Sequence[str]]:
    """What a table knows of its columns once some were cleared: those that stay count as altered, whatever they are."""
    facts = {name: known for name, known in before.items() if name not in cleared}
    for name, field in cleared.items():
        if field is not None:
            now = columns.facts[name]
            facts[name] = ["" if place != _HOW else fact for place, fact in enumerate(now)]
    return facts


def _is_altered(before: Sequence[str], now: Sequence[str]) -> bool:
    if [*before[:-1]] != [*now[:-1]]:
        return True
    if before[-1] == now[-1]:
        return False
    was, members = (json.loads(text or "null") for text in (before[-1], now[-1]))
    # Labels that were added to an enum are in no row that has not been written since.
    return not (isinstance(was, dict) and isinstance(members, dict) and was.items() <= members.items())
