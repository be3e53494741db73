"""Reports as Dagster metadata: counts, schemas, previews, pictures.

Belongs here: everything that a person sees of a load in Dagster's UI, under Dagster's standard keys where there are
some, and small enough for the event log.
Does not belong here: computing figures (`engines/`), judging them (`asset_checks.py`).

https://docs.dagster.io/guides/build/assets/metadata-and-tags
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import dagster as dg

from telematics_assets.errors import MissingExtraError, TelematicsError

if TYPE_CHECKING:
    import pyarrow as pa

    from telematics_assets.catalog import FileStream, ReplicatedTable, TableContract
    from telematics_assets.engines.base import (
        Anomaly,
        Engine,
        IngestReport,
        MaintenanceReport,
        PendingFiles,
        ReplicateReport,
        SchemaChange,
        TableState,
    )

#: Keys that `asset_checks.py` reads again from a materialization.
FIRST_BATCH, LAST_BATCH, ROWS, ROWS_RESCUED, ROWS_CORRUPT = (
    "first_batch",
    "last_batch",
    "rows",
    "rows_rescued",
    "rows_corrupt",
)

#: Keys that `replica_checks.py` reads again from a materialization.
LAG_SECONDS, BLOCKER, BLOCKER_SECONDS, ANOMALIES = ("lag_seconds", "blocker", "blocker_seconds", "anomalies")

_PREVIEW_ROWS = 5
_VALUE_CHARACTERS = 40
_LISTED = 50
_PICTURE_POINTS = 5_000
_PICTURE_COLORS = 32
#: What the picture shows, within these limits: one wild value would squeeze all others into a dot.
_PICTURED = {"longitude": (-180.0, 180.0), "latitude": (-90.0, 90.0), "speed_kmh": (0.0, 300.0)}
_NUMBERS = {"STRING", "DOUBLE", "FLOAT", "DECIMAL", "BIGINT", "INT", "SMALLINT", "TINYINT"}


def contract_schema(contract: TableContract) -> dg.TableSchema:
    """The columns that a contract promises."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(name=column.name, type=column.type.lower(), description=column.comment)
            for column in contract.columns
        ]
    )


def table_schema(state: TableState) -> dg.TableSchema:
    """The columns that a table really has."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(name=column.name, type=column.type.lower(), description=column.comment)
            for column in state.columns
        ]
    )


def pending_metadata(pending: PendingFiles) -> dict[str, Any]:
    """What an observation of a landing folder says."""
    metadata: dict[str, Any] = {
        "files_pending": pending.files,
        "bytes_pending": pending.bytes,
        "files_waiting": pending.waiting,
        "files_changed": pending.changed,
        "files_known": pending.known,
    }
    if pending.oldest_modified_ns is not None:
        metadata["oldest_pending"] = dg.MetadataValue.timestamp(pending.oldest_modified_ns / 1e9)
    return metadata


def load_metadata(engine: Engine, stream: FileStream, report: IngestReport) -> dict[str, Any]:
    """What a materialization of a bronze table says.

    Args:
        engine: Asked for the table's state and for a bounded sample of the new rows.
        stream: The stream that was loaded.
        report: What its load did.
    """
    metadata: dict[str, Any] = {
        "dagster/row_count": report.table_rows,
        "operation": report.operation,
        "batches": len(report.batches),
        "files_ingested": report.files_ingested,
        "files_skipped": report.files_skipped,
        "files_changed": report.files_changed,
        "files_waiting": report.files_waiting,
        "bytes_ingested": report.bytes_ingested,
        ROWS: report.rows,
        ROWS_RESCUED: report.rows_rescued,
        ROWS_CORRUPT: report.rows_corrupt,
        "seconds": round(report.seconds, 3),
    }
    if report.files_cleaned:
        metadata["files_cleaned"] = report.files_cleaned
    if report.cleaning_problem:
        metadata["cleaning_problem"] = report.cleaning_problem
    if report.yielded:
        metadata["yielded"] = "Another loader of this stream was faster and loads the rest."
    if report.retried:
        metadata["retried_files"] = listing(
            [
                {"path": file.path, "before": file.before, "after": file.after, "reason": file.reason or ""}
                for file in report.retried
            ]
        )
    skipped = [file for batch in report.batches for file in batch.skipped]
    if skipped:
        metadata["skipped_files"] = listing(
            [{"path": file.path, "state": file.state, "reason": file.reason} for file in skipped]
        )
    metadata |= _schema_changes([change for batch in report.batches for change in batch.schema_changes])
    table = engine.names.bronze(stream.table)
    if report.table_version is not None:
        metadata["delta_version"] = report.table_version
    if report.batches:
        metadata[FIRST_BATCH] = report.batches[0].batch_id
        metadata[LAST_BATCH] = report.batches[-1].batch_id
    try:
        state = engine.state(table)
        if state is None:
            return metadata
        metadata["dagster/uri"] = state.uri
        metadata["dagster/column_schema"] = table_schema(state)
        metadata["preview"] = dg.MetadataValue.md(preview(engine.read(table, limit=_PREVIEW_ROWS)))
        types = {column.name: column.type.partition("(")[0].upper() for column in state.columns}
        if report.rows and all(types.get(name) in _NUMBERS for name in _PICTURED):
            points = engine.read(table, list(_PICTURED), _PICTURE_POINTS, report.batches[0].batch_id)
            metadata["picture"] = dg.MetadataValue.md(picture(points))
    except TelematicsError as error:
        # The rows are committed: a load must not fail, and be tried again, for what it can't show.
        metadata["not_shown"] = str(error)
    return metadata


def _schema_changes(changes: Sequence[SchemaChange]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    added = [change for change in changes if change.previous is None]
    if added:
        metadata["columns_added"] = listing([{"column": change.column, "type": change.type} for change in added])
    widened = [
        {"column": change.column, "from": change.previous, "to": change.type}
        for change in changes
        if change.previous is not None
    ]
    if widened:
        metadata["columns_widened"] = listing(widened)
    return metadata


def replication_metadata(engine: Engine, table: ReplicatedTable, report: ReplicateReport) -> dict[str, Any]:
    """What a materialization of a replicated table says.

    Args:
        engine: Asked for the table's state and for a few of its rows.
        table: The table.
        report: What its replication did.
    """
    metadata: dict[str, Any] = {
        "dagster/row_count": report.table_rows,
        "source": report.source,
        "mode": report.mode,
        "inserted": report.inserted,
        "updated": report.updated,
        "deleted": report.deleted,
        "batches": report.batches,
        "swept": report.swept,
        "seconds": round(report.seconds, 3),
    }
    if report.position is not None:
        metadata["position"] = report.position
    if report.lag_seconds is not None:
        metadata[LAG_SECONDS] = round(report.lag_seconds, 3)
    if report.snapshot is not None:
        metadata["snapshot"] = report.snapshot
    if report.table_version is not None:
        metadata["delta_version"] = report.table_version
    if report.yielded:
        metadata["yielded"] = "Another process was replicating this table; nothing was doubled."
    if report.notes:
        metadata["notes"] = "\n".join(report.notes)
    metadata |= _schema_changes(report.schema_changes)
    if report.anomalies:
        metadata[ANOMALIES] = listing(anomaly_lines(report.anomalies))
    if report.blocker is not None:
        metadata[BLOCKER] = f"{report.blocker.kind} {report.blocker.who}"
        metadata[BLOCKER_SECONDS] = round(report.blocker.age_seconds, 3)
    name = engine.names.bronze(table.target)
    try:
        state = engine.state(name)
        if state is None:
            return metadata
        metadata["dagster/uri"] = state.uri
        metadata["dagster/column_schema"] = table_schema(state)
        metadata["preview"] = dg.MetadataValue.md(preview(engine.read(name, limit=_PREVIEW_ROWS)))
    except TelematicsError as error:
        # The rows are committed: a replication must not fail, and be tried again, for what it can't show.
        metadata["not_shown"] = str(error)
    return metadata


def anomaly_lines(anomalies: Sequence[Anomaly]) -> list[dict[str, str | int]]:
    """Anomalies as the lines of a listing."""
    return [{"column": a.column, "kind": a.kind, "rows": a.rows, "example": a.example or ""} for a in anomalies]


def maintenance_metadata(report: MaintenanceReport) -> dict[str, Any]:
    """What a maintenance of a table says."""
    counts: dict[str, Any] = {name: value for name, value in asdict(report).items() if isinstance(value, int)}
    named = {"dagster/table_name": report.table, **counts, "seconds": round(report.seconds, 3)}
    return named | ({"notes": "\n".join(report.notes)} if report.notes else {})


def listing(lines: Sequence[Mapping[str, str | int]]) -> dg.TableMetadataValue:
    """A table of at least one line; of many lines only the first are shown, and a last one counts the others.

    Args:
        lines: All lines, all with the same keys.
    """
    shown = list(lines[:_LISTED])
    columns = list(shown[0])
    if len(lines) > len(shown):
        shown.append(dict.fromkeys(columns, "") | {columns[0]: f"… and {len(lines) - len(shown)} more"})
    return dg.MetadataValue.table(
        records=[dg.TableRecord(line) for line in shown],
        schema=dg.TableSchema(columns=[dg.TableColumn(name=column) for column in columns]),
    )


def preview(table: pa.Table) -> str:
    """A few rows as a Markdown table; long values are cut."""
    columns = [_values(column) for column in table.columns]
    lines = [table.column_names, ["---"] * table.num_columns, *zip(*columns, strict=True)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _values(column: pa.ChunkedArray) -> Sequence[object]:
    import pyarrow as pa

    # Python knows no time before year 1 and none after 9999; devices do.
    values = column.cast(pa.string()) if pa.types.is_temporal(column.type) else column
    try:
        return values.to_pylist()  # type: ignore[no-any-return]
    except (OverflowError, ValueError):
        return ["(not shown)"] * len(column)


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    if len(text) > _VALUE_CHARACTERS:
        text = text[: _VALUE_CHARACTERS - 1] + "…"
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`").replace("<", "&lt;").translate(_BLANKS)


#: Line ends and other control characters would break the table.
_BLANKS = dict.fromkeys((*range(0x20), 0x7F, 0x85, 0x2028, 0x2029), " ")


def picture(points: pa.Table) -> str:
    """Positions and speeds as one small image in Markdown, or what to install to get it.

    Args:
        points: Some rows with the columns longitude, latitude and speed_kmh, as numbers or as their text.
    """
    try:
        image = base64.b64encode(_draw(points)).decode()
    except MissingExtraError as error:
        return str(error)
    return f"![Positions and speeds](data:image/png;base64,{image})"


def _draw(points: pa.Table) -> bytes:
    try:
        # The classes, not pyplot: that one keeps figures in the process and picks a window system.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image
    except ImportError:
        raise MissingExtraError("The picture of a load", "plots") from None
    import polars as pl

    numbers = [pl.col(name).cast(pl.Float64, strict=False) for name in _PICTURED]
    within = [pl.col(name).is_between(*limits) for name, limits in _PICTURED.items()]
    sample = pl.DataFrame(pl.from_arrow(points)).select(numbers).filter(within)

    # Fixed margins and heights of titles: a layout that measures every label takes as long as loading a small file.
    figure = Figure(figsize=(8, 3.2), dpi=80)
    canvas: Any = FigureCanvasAgg(figure)
    places, speeds = figure.subplots(
        1, 2, gridspec_kw={"left": 0.1, "right": 0.98, "bottom": 0.16, "top": 0.9, "wspace": 0.26}
    )
    places.scatter(sample["longitude"], sample["latitude"], s=2, linewidths=0, color="#2a6f97")
    places.set(xlabel="longitude, °", ylabel="latitude, °")
    # One outline is drawn sooner than forty bars.
    speeds.hist(sample["speed_kmh"], bins=40, histtype="stepfilled", color="#e07a5f")
    speeds.set(xlabel="km/h", ylabel="points")
    for axes, title in ((places, f"Positions ({sample.height:,} points)"), (speeds, "Speed")):
        axes.set_title(title, y=1.0)
    canvas.draw()
    image = io.BytesIO()
    # Few colours make a few kilobytes: the image stays in the event log with every load.
    full = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    full.convert("RGB").quantize(_PICTURE_COLORS).save(image, "PNG", optimize=True)
    return image.getvalue()
