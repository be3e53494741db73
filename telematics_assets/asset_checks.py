"""Checks of the bronze tables, generated from their streams.

Belongs here: what is asked of every table that is filled from files, and how bad a "no" is.
Does not belong here: how the answers are computed (`engines/`), metadata of loads (`metadata.py`).

A check judges what was loaded since the load before the last one. Started alone from the UI, it therefore judges the
last load again; of a table whose loads Dagster has not recorded, everything.

https://docs.dagster.io/guides/test/asset-checks
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from telematics_assets import metadata
from telematics_assets.assets.boundary import failures_for_dagster
from telematics_assets.assets.files import RETRY_POLICY, bronze_key
from telematics_assets.catalog import FileStream
from telematics_assets.engines.base import Engine
from telematics_assets.errors import SchemaError, TelematicsError

#: Share of a load's rows that may have rescued data or an unreadable record before somebody should look.
RESCUED_RATIO_LIMIT = 0.05

#: How many recorded loads a check looks at to find the last two that were not empty.
_LOOK_BACK = 10


@dataclass(frozen=True, slots=True)
class _LastLoad:
    """What Dagster recorded about the newest load that was not empty; zeros if there is none."""

    since_batch: int = 0
    rows: int = 0
    rows_rescued: int = 0
    rows_corrupt: int = 0


_Judge = Callable[[Engine, FileStream, _LastLoad], dg.AssetCheckResult]


def file_stream_checks(
    stream: FileStream, retry_policy: dg.RetryPolicy | None = RETRY_POLICY
) -> Sequence[dg.AssetChecksDefinition]:
    """The checks of a stream's bronze table.

    Args:
        stream: Any file stream.
        retry_policy: For transient errors of the engine.
    """
    key = bronze_key(stream)

    @dg.asset_check(
        asset=key,
        name="contract",
        description="Every column of the contract is there, with its type.",
        blocking=True,
        retry_policy=retry_policy,
    )
    def contract(context: dg.AssetCheckExecutionContext, engine: dg.ResourceParam[Engine]) -> dg.AssetCheckResult:
        with failures_for_dagster(context):
            return _contract(engine, stream)

    judges: dict[str, tuple[_Judge, str]] = {
        "reconciliation": (_reconciliation, "Every batch added as many rows as its files brought."),
        "corrupt_files": (_corrupt_files, "No file of the last load was quarantined as unreadable."),
        "changed_files": (_changed_files, "No file was changed after it had been loaded."),
        "duplicate_files": (_duplicate_files, "No file of the last load has the same bytes as another loaded file."),
        "rescued_ratio": (
            _rescued_ratio,
            f"At most {RESCUED_RATIO_LIMIT:.0%} of the last load's rows have rescued data or an unreadable record.",
        ),
    }
    if any(column.minimum is not None or column.maximum is not None for column in stream.contract.columns):
        judges["plausible_values"] = (_plausible_values, "The last load's values lie within the contract's limits.")

    # One step for all of them: each step of a run costs more than these checks do.
    @dg.multi_asset_check(
        name=f"{stream.name}_quality",
        specs=[
            dg.AssetCheckSpec(name, asset=key, description=description) for name, (_, description) in judges.items()
        ],
        can_subset=True,
        retry_policy=retry_policy,
    )
    def quality(
        context: dg.AssetCheckExecutionContext, engine: dg.ResourceParam[Engine]
    ) -> Iterator[dg.AssetCheckResult]:
        selected = {check.name for check in context.selected_asset_check_keys}
        with failures_for_dagster(context):
            last = _last_load(context.instance, key)
            unanswered: list[TelematicsError] = []
            for name, (judge, _) in judges.items():
                if name not in selected:
                    continue
                try:
                    result = judge(engine, stream, last)
                except TelematicsError as error:
                    # The other checks can still answer.
                    unanswered.append(error)
                else:
                    yield result._replace(check_name=name, asset_key=key)
            if unanswered:
                raise unanswered[0]

    return [contract, quality]


def _last_load(instance: dg.DagsterInstance, key: dg.AssetKey) -> _LastLoad:
    recorded = [
        {name: entry.value for name, entry in record.asset_materialization.metadata.items()}
        for record in instance.fetch_materializations(key, limit=_LOOK_BACK).records
        if record.asset_materialization
    ]
    loads: list[dict[str, Any]] = [values for values in recorded if metadata.FIRST_BATCH in values]
    if not loads:
        return _LastLoad()
    # Between two recorded loads may lie batches of a run that failed after some commits, or of a load outside Dagster.
    # Batch numbers start again where a stream was reset.
    before = loads[1][metadata.LAST_BATCH] + 1 if len(loads) > 1 else 0
    return _LastLoad(
        since_batch=min(before, loads[0][metadata.FIRST_BATCH]),
        rows=loads[0][metadata.ROWS],
        rows_rescued=loads[0][metadata.ROWS_RESCUED],
        rows_corrupt=loads[0][metadata.ROWS_CORRUPT],
    )


def _contract(engine: Engine, stream: FileStream) -> dg.AssetCheckResult:
    state = engine.state(engine.names.bronze(stream.table))
    if state is None:
        return dg.AssetCheckResult(passed=True, description="There is no table yet: no file has been loaded.")
    found = {column.name: column.type for column in state.columns}
    broken = [
        {"column": column.name, "promised": column.type, "found": found.get(column.name, "nothing")}
        for column in stream.contract.columns
        if not _as_promised(stream, column.type, found.get(column.name))
    ]
    if not broken:
        return dg.AssetCheckResult(passed=True, metadata={"columns": len(stream.contract.columns)})
    return dg.AssetCheckResult(
        passed=False,
        description=f"{len(broken)} of {len(stream.contract.columns)} promised columns are not as promised. "
        "Readers of this table may break: rebuild the table, or change the contract.",
        metadata={"broken": metadata.listing(broken)},
    )


def _as_promised(stream: FileStream, promised: str, found: str | None) -> bool:
    if found is None or found == promised:
        return found == promised
    from telematics_assets.lakehouse.types import arrow_type, wider

    try:
        # One type has several spellings: `DECIMAL(10, 2)`, `decimal(10,2)`.
        is_type, was_type = arrow_type(found), arrow_type(promised)
    except SchemaError:
        return False
    widens = stream.options.schema_evolution_mode == "addNewColumnsWithTypeWidening"
    return is_type == was_type or (widens and wider(was_type, is_type) == is_type)


def _reconciliation(engine: Engine, stream: FileStream, last: _LastLoad) -> dg.AssetCheckResult:
    books = engine.balance(stream, last.since_batch)
    wrong = [
        {
            "batch": book.batch_id,
            "table_version": book.table_version,
            "rows_of_its_files": book.expected_rows,
            "rows_added": book.added_rows,
        }
        for book in books
        if book.expected_rows != book.added_rows
    ]
    return dg.AssetCheckResult(
        passed=not wrong,
        description=f"{len(wrong)} of {len(books)} batches added another number of rows than their files brought."
        if wrong
        else None,
        metadata={
            "batches": len(books),
            "rows_of_the_files": sum(book.expected_rows for book in books),
            "rows_added": sum(book.added_rows for book in books),
        }
        | ({"wrong": metadata.listing(wrong)} if wrong else {}),
    )


def _corrupt_files(engine: Engine, stream: FileStream, last: _LastLoad) -> dg.AssetCheckResult:
    quarantined = engine.files(stream, "SKIPPED_CORRUPTED")
    files = [
        {"path": file.path, "reason": file.reason or ""}
        for file in quarantined
        if file.batch_id is not None and file.batch_id >= last.since_batch
    ]
    return _warning(
        f"{len(files)} files could not be read and brought no rows. Land them again, mended." if files else None,
        {"files": len(files), "files_of_all_loads": len(quarantined)}
        | ({"quarantined": metadata.listing(files)} if files else {}),
    )


def _changed_files(engine: Engine, stream: FileStream, last: _LastLoad) -> dg.AssetCheckResult:
    files = [{"path": file.path, "reason": file.reason or ""} for file in engine.files(stream, "CHANGED")]
    return _warning(
        f"{len(files)} loaded files have another size or modification time now. Their new content is not in the table; "
        "land it under new names."
        if files
        else None,
        {"files": len(files)} | ({"changed": metadata.listing(files)} if files else {}),
    )


def _duplicate_files(engine: Engine, stream: FileStream, last: _LastLoad) -> dg.AssetCheckResult:
    found = engine.duplicates(stream, last.since_batch)
    files = [{"path": file.path, "same_as": file.same_as} for file in found.files]
    return _warning(
        f"{len(files)} files have the same bytes as another loaded file: their rows are in the table twice, and "
        "_source_file tells them apart."
        if files
        else None,
        {"files": len(files), "files_not_compared": found.passed_over}
        | ({"duplicates": metadata.listing(files)} if files else {}),
    )


def _rescued_ratio(engine: Engine, stream: FileStream, last: _LastLoad) -> dg.AssetCheckResult:
    ratio = (last.rows_rescued + last.rows_corrupt) / max(last.rows, 1)
    return _warning(
        f"{ratio:.1%} of the rows have values that fit no column. "
        f"Look into {stream.options.rescued_data_column}: the senders' schema may have changed."
        if ratio > RESCUED_RATIO_LIMIT
        else None,
        {"ratio": ratio, "rows": last.rows, "rows_rescued": last.rows_rescued, "rows_corrupt": last.rows_corrupt},
    )


def _plausible_values(engine: Engine, stream: FileStream, last: _LastLoad) -> dg.AssetCheckResult:
    table = engine.names.bronze(stream.table)
    if engine.state(table) is None:
        return _warning(None, {})
    columns = [column for column in stream.contract.columns if column.minimum is not None or column.maximum is not None]
    counts = engine.violations(table, columns, last.since_batch)
    limits = {column.name: f"{_limit(column.minimum)} to {_limit(column.maximum)}" for column in columns}
    outside: list[dict[str, str | int]] = [
        {
            "column": count.column,
            "limits": limits[count.column],
            "outside": count.outside,
            "of": count.checked,
            "example": count.example or "",
        }
        for count in counts
        if count.outside
    ]
    return _warning(
        f"{len(outside)} columns have values outside the contract's limits. They are kept as they came."
        if outside
        else None,
        {"values_checked": sum(count.checked for count in counts)}
        | ({"outside": metadata.listing(outside)} if outside else {}),
    )


def _limit(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"


def _warning(found: str | None, values: dict[str, Any]) -> dg.AssetCheckResult:
    """A result that warns if something was found: the rows are right, but somebody should look."""
    return dg.AssetCheckResult(
        passed=found is None, severity=dg.AssetCheckSeverity.WARN, description=found, metadata=values
    )
