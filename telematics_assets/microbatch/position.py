"""Where replication of a table stands: kept in the bronze table itself, in the commit that brought the rows.

Belongs here: the application transactions that say so, whose they are, and every refusal of a table that was changed by
somebody else.
Does not belong here: what the position means (`cut.py`), reading rows, Dagster.

`telematics.generation` counts snapshots. The position of a generation has an application id of its own, made of system
identifier, timeline, database OID, table OID, mode and generation: another source has none, and so begins anew. Beside
it stand a few numbers with the same id and a suffix. All of them are Delta transactions, which no expiry of the log
takes away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from telematics_assets.catalog import ReplicatedTable
from telematics_assets.errors import TableMovedError, TableNotOursError, TableUnsupportedError
from telematics_assets.lakehouse.base import STREAM_NAME_PROPERTY, Commit, Table

#: Table property that ties a table to its source.
SOURCE_PROPERTY = "telematics.source"
_GENERATION = "telematics.generation"
_VERSION = "telematics.version"
_RETENTION = "delta.setTransactionRetentionDuration"
#: Text of the commit info: what a snapshot and a look at changed columns want to know of the last commit.
NOTE_INFO = "telematics.replication"


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a generation stands.

    Attributes:
        identity: Database, table and mode.
        generation: Number of the snapshot that it began with.
        position: Every change below is in the table.
        start: Where the last range began; it is read again after the server restarted.
        started_us: When the server started that the position was read from.
        clock_us: The source's clock at the cut.
        swept_us: The source's clock when keys were last compared.
        swept_to: Position when keys were last compared.
        columns: Fingerprint of the source's columns.
        complete: 1 once the snapshot is whole.
        partitions: Fingerprint of the source's partitions when keys were last compared.
        version: The table version that this was committed as.
    """

    identity: str
    generation: int
    position: int
    start: int
    started_us: int
    clock_us: int
    swept_us: int
    swept_to: int
    columns: int
    complete: int
    partitions: int = 0
    version: int = -1

    @property
    def app_id(self) -> str:
        """Application id of the position."""
        return _app_id(self.identity, self.generation)

    def transactions(self) -> dict[str, int]:
        """The transactions of a commit that leaves the table standing here."""
        rest = {f"{self.app_id}.{name}": getattr(self, name) for name in _PARTS}
        return {_VERSION: self.version, _GENERATION: self.generation, self.app_id: self.position, **rest}


_PARTS = ("start", "started_us", "clock_us", "swept_us", "swept_to", "columns", "complete", "partitions")


def identity_of(database: str, oid: int, mode: str) -> str:
    """Whose positions a table has.

    Args:
        database: As `source.database_identity` tells.
        oid: The source table's.
        mode: How changed rows are found: the modes' positions are not of one kind.
    """
    return f"{database}-{oid}-{mode}"


def _app_id(identity: str, generation: int) -> str:
    return f"telematics/{identity}/{generation}"


def generation(table: Table) -> int:
    """Number of the last snapshot that was begun; 0 before the first."""
    return _said(table)(_GENERATION) or 0


def standing(table: Table, identity: str) -> Standing | None:
    """Where the table stands for this source, or None if its rows are not of it."""
    said = _said(table)
    number = said(_GENERATION) or 0
    app_id = _app_id(identity, number)
    position = said(app_id)
    if position is None:
        return None
    parts = {name: said(f"{app_id}.{name}") or 0 for name in _PARTS}
    return Standing(identity, number, position, **parts, version=said(_VERSION) or 0)


def _said(table: Table) -> Callable[[str], int | None]:
    """What the last commit of ours says of positions."""
    version = table.position(_VERSION)
    if version is not None and version < table.version:
        # Its transactions may lack all but one: then it notes them, and nobody has set them yet.
        for commit in reversed(table.commits(version - 1, held=True)):
            if _GENERATION in commit.transactions:
                return commit.transactions.get
    return table.position


def at(stands: Standing, table: Table) -> Standing:
    """The same as the commit that the handle will make next."""
    return replace(stands, version=table.version + 1)


def refuse_foreign(table: Table, declared: ReplicatedTable) -> None:
    """Refuse a table that is not this source's.

    Raises:
        TableNotOursError: If somebody else made it.
        TableUnsupportedError: If it forgets positions.
    """
    properties = table.properties
    if properties.get(SOURCE_PROPERTY) != declared.source:
        stream = properties.get(STREAM_NAME_PROPERTY)
        whose = properties.get(SOURCE_PROPERTY) or (f"stream {stream}" if stream else "somebody else")
        raise TableNotOursError(
            f"{table.name} exists and holds rows of {whose}, not of {declared.source}. Move or drop it, or declare "
            "another table (table=…)."
        )
    if _RETENTION in properties:
        raise TableUnsupportedError(
            f"{table.name} has the property {_RETENTION}, by which positions are forgotten. Unset it."
        )


def refuse_moved(table: Table, stands: Standing) -> None:
    """Refuse a table whose rows somebody else changed since the last commit of ours.

    Raises:
        TableMovedError: If so, or if the log no longer tells.
    """
    for commit in table.commits(stands.version):
        if stands.app_id in commit.transactions:
            continue
        if commit.removes_data or commit.rows:
            raise TableMovedError(
                f"{table.name} was changed by somebody else: version {commit.version} is {commit.operation} and "
                f"{'removed' if commit.removes_data else 'added'} rows since version {stands.version}, the last of "
                "ours. Restore that version, or take a new snapshot, which mends every row "
                "(telematics replicate --full)."
            )


def make_durable(table: Table, stands: Standing) -> None:
    """Bring the last commit of ours safely to disk: whoever made it may have been killed before it did.

    An entry that the log no longer has is long on disk.
    """
    held = table.commits(stands.version - 1, held=True)
    if held and held[0].version == stands.version:
        for commit in held:
            if commit is held[0] or stands.app_id in commit.transactions:
                table.make_durable(commit)


def last_note(table: Table, stands: Standing) -> Mapping[str, object] | None:
    """What the last commit of ours noted; None where the log does not reach back so far."""
    commits = table.commits(stands.version - 1, held=True)
    ours = [commit for commit in commits if stands.app_id in commit.transactions]
    return note_of(ours[-1]) if ours else None


def newest_note(table: Table) -> Mapping[str, object] | None:
    """The note of the newest commit that has one, whoever's source it was."""
    notes = [note_of(commit) for commit in table.commits(max(table.version - 100, -1), held=True)]
    return next((note for note in reversed(notes) if note is not None), None)


def note_of(commit: Commit) -> Mapping[str, object] | None:
    """What a commit noted, or None."""
    text = commit.info.get(NOTE_INFO)
    note = json.loads(text) if text else None
    return note if isinstance(note, dict) else None
