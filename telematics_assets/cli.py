"""The command line: `telematics …`.

Belongs here: arguments, what is printed, exit codes. Each command asks one function of another room and shows what it
answers.
Does not belong here: work of its own; Dagster and the data libraries before a command needs them (`--help` is quick).

With `--json` stdout holds exactly one JSON document; everything meant for eyes goes to stderr. Exit codes: 0 done (also
when there was nothing to do), 1 failed for good, 2 wrong usage or settings, 75 transient: the same command may go
through later.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from telematics_assets.catalog import (
    FILE_STREAMS,
    REPLICATED_TABLES,
    FileStream,
    ReplicatedTable,
    TableName,
    find_stream,
    find_table,
)
from telematics_assets.engines.base import (
    FILE_STATES,
    Backfill,
    FileState,
    Finding,
    IngestReport,
    IngestRequest,
    Progress,
    ProgressListener,
    ReplicateReport,
    ReplicateRequest,
)
from telematics_assets.errors import (
    DbfsDisabledError,
    MissingExtraError,
    OptionError,
    QueryError,
    RunLimitError,
    SettingsError,
    SupabaseError,
    SupabaseUnavailableError,
    TableNotFoundError,
    TelematicsError,
    TransientError,
    UnknownNameError,
)
from telematics_assets.microbatch.connection import NOT_CONFIGURED
from telematics_assets.settings import Settings, load_settings

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from pyspark.sql import SparkSession
    from rich.progress import TaskID

    from telematics_assets.demo.fleet import FleetPlan
    from telematics_assets.engines.base import Engine
    from telematics_assets.microbatch.discover import FoundTable
    from telematics_assets.volumes.base import Volume

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_TRANSIENT = 75

_USAGE_ERRORS = (SettingsError, OptionError, UnknownNameError, DbfsDisabledError, TableNotFoundError)
_LEVELS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}
_JSON_ASKED = "telematics.json"
#: Files that are shown to eyes when no limit is given.
_SHOWN = 1_000


def exit_code(error: TelematicsError) -> int:
    """What the process says about an error: 2 usage or settings, 75 transient, 1 failed for good."""
    if isinstance(error, _USAGE_ERRORS):
        return EXIT_USAGE
    return EXIT_TRANSIENT if isinstance(error, TransientError) else EXIT_FAILED


class _Group(TyperGroup):
    """Turns an error of ours into one line and an exit code; any other is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TelematicsError as error:
            _fail(error, ctx.meta.get(_JSON_ASKED, False))
            raise typer.Exit(exit_code(error)) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Vehicle files that land in a Volume become exactly-once bronze Delta tables.\n\n"
    "Start with [bold]telematics demo[/]. Settings are environment variables (TELEMATICS_HOME, TELEMATICS_ENGINE, …); "
    "[bold]telematics doctor[/] checks them.\n\n"
    "Exit codes: 0 done, 1 failed for good, 2 wrong usage or settings, 75 transient, try again.",
)


def _remember_json(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[_JSON_ASKED] = value
    return value


Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document on stdout, nothing else.", callback=_remember_json, is_eager=True
    ),
]
StreamName = Annotated[str, typer.Argument(metavar="STREAM", help="Name of the stream, such as telematics_test.")]


@app.command(
    epilog="Examples:\n\n"
    "  telematics demo                  three waves; again adds three more\n\n"
    "  telematics demo --json           the summary for a script"
)
def demo(
    timeout: Annotated[float, typer.Option(help="Give up after this many seconds, and say what it was doing.")] = 120.0,
    as_json: Json = False,
) -> None:
    """Land three waves of a simulated fleet, mirror a database that changes, and let the real Dagster jobs do it."""
    from telematics_assets.demo.story import tell

    try:
        summary = tell(load_settings(), timeout_s=timeout, console=_console(stderr=as_json))
    except RunLimitError as error:
        _fail(error, as_json)
        # What took too long may hang in a library: leaving in the usual way would wait for it.
        sys.stdout.flush()
        os._exit(exit_code(error))
    if as_json:
        _print_json(asdict(summary))


@app.command(
    epilog="Examples:\n\n"
    "  telematics simulate                                    a small clean wave\n\n"
    "  telematics simulate --drift --dirty                    with new columns and broken records\n\n"
    "  telematics simulate --vehicles 200 --files 40 --rows 2000000 --seed 7\n\n"
    "  telematics simulate --feed 30 --drift --dirty          30 files a minute for each stream, until Ctrl-C\n\n"
    "  telematics simulate --feed 60 --for 10                 one a second, for ten seconds"
)
def simulate(
    vehicles: Annotated[int, typer.Option(help="Vehicles of the fleet.")] = 20,
    files: Annotated[int, typer.Option(help="Sound files for each stream.")] = 4,
    rows: Annotated[int, typer.Option(help="Points for each stream, over all its files.")] = 4000,
    drift: Annotated[bool, typer.Option("--drift", help="Schemas that differ from the contract.")] = False,
    dirty: Annotated[bool, typer.Option("--dirty", help="Damaged records, and files that can't be read.")] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed lands the same bytes; the next unused one if not given.", show_default=False),
    ] = None,
    feed: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="Keep landing so many files a minute for each stream, wave after wave, until Ctrl-C.",
            show_default=False,
        ),
    ] = None,
    for_seconds: Annotated[
        float | None,
        typer.Option(
            "--for",
            metavar="SECONDS",
            help="End the feed once all that falls due in this time has landed.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Land files of a simulated fleet in the landing Volume.

    A feed's points are of now, and its seeds go on above all that are there; with --drift or --dirty every second wave
    is so. Ctrl-C ends it when the files on their way have landed, with a summary and exit code 0.
    """
    from telematics_assets.demo.fleet import FleetPlan, next_seed
    from telematics_assets.demo.fleet import simulate as land
    from telematics_assets.engines.checkpointed import open_volume

    if for_seconds is not None and feed is None:
        raise OptionError("--for is the length of a feed. Give it together with --feed RATE.")
    volume = open_volume(load_settings())
    plan = FleetPlan(
        vehicles=vehicles,
        files=files,
        rows=rows,
        drift=drift,
        dirty=dirty,
        seed=seed if seed is not None else 0 if feed is not None else next_seed(volume),
    )
    if feed is not None:
        _feed(plan, volume, feed, for_seconds, seed, as_json)
        return
    with _counting("landing") as count:
        report = land(plan, volume, progress=count)
    if as_json:
        listed = {stream.stream: [asdict(file) for file in stream.files] for stream in report.streams}
        _print_json({"seed": report.seed, "rows": report.rows, "files": listed})
        return
    table = _table("stream", "files", "rows", "bytes", "broken files")
    for stream in report.streams:
        broken = sum(file.fault is not None for file in stream.files)
        _row(table, stream.stream, len(stream.files), stream.rows, stream.bytes, broken)
    _titled(f"Landed in {volume.location} (seed {report.seed})", table)
    _console().print("Next: telematics load")


@app.command(
    epilog="Examples:\n\n"
    "  telematics stage ./samples --stream telematics         a folder, with everything below it\n\n"
    "  telematics stage a.json b.json.gz -s telematics_test   some files\n\n"
    "  telematics stage https://host/points/ -s telematics    all files that a page links to\n\n"
    "  telematics stage github://owner:repo@ref/folder -s telematics"
)
def stage(
    source: Annotated[
        list[str], typer.Argument(metavar="SOURCE", help="Files or folders: local paths, and URLs that fsspec knows.")
    ],
    stream: Annotated[str, typer.Option("--stream", "-s", help="Stream that the files are for.")],
    as_json: Json = False,
) -> None:
    """Check sample files against a stream's contract and upload those that match into its landing folder.

    What doesn't match is refused by name with the reason; nothing is overwritten. Exit code 1 if any was refused, 75 if
    those were only such as may go through later.
    """
    from telematics_assets.engines.checkpointed import open_volume
    from telematics_assets.staging import stage as stage_files

    target = find_stream(FILE_STREAMS, stream)
    volume = open_volume(load_settings())
    with _counting("staging") as count:
        report = stage_files(source, target, volume, progress=count)
    if as_json:
        _print_json(asdict(report))
    else:
        console = _console()
        for file in report.staged:
            console.print(f"[green]{'there already' if file.already_there else 'staged'}[/] {escape(file.path)}")
        console.print(f"{len(report.staged)} staged, {len(report.refused)} refused. Next: telematics load {stream}")
    for refusal in report.refused:
        _console(stderr=True).print(f"[red]refused[/] {escape(refusal.source)}: {escape(refusal.reason)}")
    if report.refused:
        raise typer.Exit(EXIT_TRANSIENT if all(refusal.transient for refusal in report.refused) else EXIT_FAILED)


@app.command(
    epilog="Examples:\n\n"
    "  telematics load                          all streams, until nothing is left\n\n"
    "  telematics load telematics --max-files 100\n\n"
    "  telematics load telematics --full-refresh     rewrite the table from the files that are there"
)
def load(
    stream: Annotated[
        list[str] | None,
        typer.Argument(metavar="STREAM", help="Streams to load; all if none is given.", show_default=False),
    ] = None,
    max_files: Annotated[
        int | None, typer.Option(min=1, help="Stop each stream after about this many files.", show_default=False)
    ] = None,
    full_refresh: Annotated[
        bool,
        typer.Option("--full-refresh", help="Rewrite the named streams' tables from the files there, in one commit."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --full-refresh: let rows go whose files are gone or unreadable.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Load what has landed into the bronze tables, each file exactly once.

    One stream's failure doesn't keep the others from loading.
    """
    if full_refresh and not stream:
        raise OptionError("--full-refresh rewrites whole tables: name the streams that it is meant for.")
    if force and not full_refresh:
        raise OptionError("--force is for --full-refresh alone.")
    if full_refresh and max_files is not None:
        raise OptionError("--full-refresh takes all files in one commit: leave --max-files out.")
    request = IngestRequest(max_files=max_files, full_refresh=full_refresh, force=force)
    streams = [find_stream(FILE_STREAMS, name) for name in dict.fromkeys(stream or ())] or list(FILE_STREAMS)
    engine = _engine(load_settings())
    reports, errors = [], []
    for each in streams:
        try:
            with _progress_of(each.name) as listener:
                reports.append(engine.ingest(each, request, listener))
        except TelematicsError as error:
            _complain(error, each.name)
            errors.append(error)
    for report in reports:
        if report.files_skipped:
            _note(
                f"{report.stream}: {report.files_skipped} files were skipped. Which, and why: telematics files "
                f"{report.stream} --state SKIPPED_CORRUPTED (or SKIPPED_MISSING)"
            )
        if report.yielded:
            _note(f"{report.stream}: another loader was faster and holds the rest; nothing was doubled.")
        if report.files_waiting:
            _note(f"{report.stream}: {report.files_waiting} files may still be written; a later load takes them.")
        if report.files_cleaned:
            _note(f"{report.stream}: clean_source moved or deleted {report.files_cleaned} source files.")
        if report.cleaning_problem:
            _note(f"{report.stream}: the load is done, but clean_source stopped: {report.cleaning_problem}")
    listed = [_loaded(report) for report in reports]
    _show(listed, as_json, "Loaded")
    if errors:
        raise typer.Exit(max(map(exit_code, errors)) if all(e.transient for e in errors) else EXIT_FAILED)


@app.command(
    epilog="Examples:\n\n"
    "  telematics backfill telematics --folder 2025            files below parquet/2025\n\n"
    "  telematics backfill telematics --modified-after 2025-12-01 --modified-before 2026-01-01"
)
def backfill(
    stream: StreamName,
    folder: Annotated[
        str | None, typer.Option(help="Only files below this folder of the stream's folder.", show_default=False)
    ] = None,
    modified_after: Annotated[
        str | None, typer.Option(help="Only files modified strictly after this ISO timestamp.", show_default=False)
    ] = None,
    modified_before: Annotated[
        str | None, typer.Option(help="Only files modified strictly before this ISO timestamp.", show_default=False)
    ] = None,
    max_files: Annotated[
        int | None, typer.Option(min=1, help="Stop after about this many files.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Load only the files of a folder or a time range, also those that were left out when the stream began.

    What is loaded already is not loaded again; other files stay pending.
    """
    target = find_stream(FILE_STREAMS, stream)
    request = IngestRequest(max_files=max_files, backfill=Backfill(folder, modified_after, modified_before))
    with _progress_of(stream) as listener:
        report = _engine(load_settings()).ingest(target, request, listener)
    if not report.batches:
        _note(f"{stream}: there is nothing to load in that folder or time range.")
    _show([_loaded(report)], as_json, "Loaded")


@app.command(
    epilog="Examples:\n\n"
    "  telematics retry telematics_test broken.json\n\n"
    "  telematics retry telematics_test /Volumes/workspace/00_landing/telematics/json/broken.json --json"
)
def retry(
    stream: StreamName,
    path: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Files, as `telematics files` lists them.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Read skipped files again, although they did not change; say what became of each.

    It takes files in state SKIPPED_CORRUPTED or SKIPPED_MISSING; `telematics files STREAM --state …` lists them.
    """
    target = find_stream(FILE_STREAMS, stream)
    with _progress_of(stream) as listener:
        report = _engine(load_settings()).ingest(target, IngestRequest(retry_files=tuple(path)), listener)
    if report.yielded:
        _note(f"{stream}: another loader was faster; nothing was doubled. Run it again.")
    _show([asdict(file) for file in report.retried], as_json, "Retried")


@app.command(
    epilog="Examples:\n\n"
    "  telematics files telematics\n\n"
    "  telematics files telematics_test --state SKIPPED_CORRUPTED\n\n"
    "  telematics files telematics --limit 100 --json"
)
def files(
    stream: StreamName,
    state: Annotated[
        str | None, typer.Option(help=f"Only files in this state: {', '.join(FILE_STATES)}.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many, the first by path.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List a stream's files with their states, and why a file was skipped or waits, or where it went."""
    import polars as pl

    target = find_stream(FILE_STREAMS, stream)
    wanted = _file_state(state)
    # Without a limit, one row more than is shown tells that there are more.
    asked = limit if as_json or limit else _SHOWN + 1
    listed = pl.DataFrame(_engine(load_settings()).file_table(target, wanted, asked))
    if as_json:
        print_files(listed)
        return
    _show(_file_rows(listed.head(limit or _SHOWN)).to_dicts(), False, f"Files of {stream}")
    if limit is None and listed.height > _SHOWN:
        _note(f"only the first {_SHOWN:,} are shown. --limit shows more, --state fewer, --json all.")


@app.command(
    epilog="Examples:\n\n"
    "  telematics maintain                  all streams and replicated tables\n\n"
    "  telematics maintain telematics --json\n\n"
    "  telematics maintain public.policies"
)
def maintain(
    stream: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STREAM", help="Streams or replicated tables to maintain; all if none is given.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compact the tables, delete what they no longer need, merge the checkpoints, and clean the landing folders.

    Safe while loads run. One stream's failure doesn't keep the others from it.
    """
    engine = _engine(load_settings())
    targets = [_stream_or_table(name) for name in dict.fromkeys(stream or ())]
    targets = targets or [*FILE_STREAMS, *(table for table in REPLICATED_TABLES if _is_there(engine, table))]
    reports, errors = [], []
    for each in targets:
        name = each.name if isinstance(each, FileStream) else each.source
        try:
            with _progress_of(name) as listener:
                reports.append(engine.maintain(each, listener))
        except TelematicsError as error:
            _complain(error, name)
            errors.append(error)
    for report in reports:
        for note in report.notes:
            _note(f"{report.stream}: {note}")
    listed = [asdict(report) for report in reports]
    if not as_json:
        listed = [
            {
                "stream": r.stream,
                "files": f"{r.files_before:,} -> {r.files_after:,}",
                "bytes": f"{r.bytes_before:,} -> {r.bytes_after:,}",
                "removed": r.files_removed,
                "bytes removed": r.bytes_removed,
                "log entries removed": r.log_entries_removed,
                "ledger": f"{r.ledger_parts_before:,} -> {r.ledger_parts_after:,}",
                "sources moved": r.sources_moved,
                "deleted": r.sources_deleted,
            }
            for r in reports
        ]
    _show(listed, as_json, "Maintained")
    if errors:
        raise typer.Exit(max(map(exit_code, errors)) if all(e.transient for e in errors) else EXIT_FAILED)


@app.command(
    epilog="Examples:\n\n"
    "  telematics replicate                          all declared tables\n\n"
    "  telematics replicate public.policies --full   take a new snapshot of the whole table\n\n"
    "  telematics replicate --sweep --json           compare all keys now, for deletes that left no trace"
)
def replicate(
    table: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TABLE",
            help="Tables, such as public.policies or supabase_policies; all declared ones if none is given.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Take a new snapshot of each table, whatever its position says.")
    ] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Compare all keys now, whether or not it is due.")] = False,
    as_json: Json = False,
) -> None:
    """Bring the bronze tables up to the Supabase database (SUPABASE_DB_URL), in exactly-once micro-batches.

    One table's failure doesn't keep the others from it.
    """
    tables = [find_table(REPLICATED_TABLES, name) for name in dict.fromkeys(table or ())] or list(REPLICATED_TABLES)
    engine = _engine(load_settings())
    with engine.source_session():
        reports, errors = _replicate_all(engine, tables, ReplicateRequest(full=full, sweep=sweep))
    for report in reports:
        _tell_of(report)
    _show([_replicated(report) for report in reports], as_json, "Replicated")
    if errors:
        raise typer.Exit(max(map(exit_code, errors)) if all(e.transient for e in errors) else EXIT_FAILED)


@app.command(epilog="Example:\n\n  telematics tables --json")
def tables(as_json: Json = False) -> None:
    """List the bronze tables with rows, files, bytes and version, from their logs."""
    listed = [
        {"table": t.table, "rows": t.rows, "files": t.files, "bytes": t.bytes, "version": t.version}
        for t in _engine(load_settings()).tables()
    ]
    _show(listed, as_json, "Tables")


@app.command(
    epilog="Examples:\n\n"
    "  telematics show telematics --limit 5\n\n"
    "  telematics show workspace.01_bronze.telematics_test --json"
)
def show(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="Table name, of one level or of three.")],
    limit: Annotated[int, typer.Option(min=1, help="At most this many rows, newest batches first.")] = 20,
    as_json: Json = False,
) -> None:
    """Show rows of a table."""
    settings = load_settings()
    name = TableName.parse(table) if "." in table else settings.names.bronze(table)
    rows = _engine(settings).read(name, limit=limit)
    _show_rows(rows, as_json, str(name))


@app.command(
    epilog="Examples:\n\n"
    "  telematics sql 'SELECT * FROM workspace.`01_bronze`.telematics LIMIT 5'\n\n"
    "  telematics sql 'SELECT count(*) AS policies FROM supabase_data.public.policies' --json\n\n"
    "  telematics sql - < report.sql"
)
def sql(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="One statement of Spark SQL; - reads it from stdin.")],
    limit: Annotated[int, typer.Option(min=1, help="At most this many rows.")] = 100,
    as_json: Json = False,
) -> None:
    """Ask Spark in SQL, with the names that the tables have on Databricks (TELEMATICS_ENGINE=spark)."""
    settings = load_settings()
    if settings.engine != "spark":
        raise SettingsError(f"The engine {settings.engine} knows no SQL. Set TELEMATICS_ENGINE=spark.")
    from telematics_assets.engines.spark.queries import ask

    spark = _spark_session(settings)
    rows = ask(spark, sys.stdin.read() if query == "-" else query, settings.names, limit + 1)
    if rows.num_rows > limit:
        _note(f"There are more rows than {limit}: --limit shows more.")
        rows = rows.slice(0, limit)
    if rows.num_columns or as_json:
        _show_rows(rows, as_json, "Answer")
    else:
        _console().print("Done.")


@app.command(
    "spark-shell",
    epilog="Examples:\n\n"
    "  telematics spark-shell\n\n"
    "  telematics spark-shell -c 'spark.sql(\"SHOW TABLES IN workspace.`01_bronze`\").show()'",
)
def spark_shell(
    command: Annotated[str | None, typer.Option("-c", "--command", help="Run this Python, and exit.")] = None,
) -> None:
    """Open a Python shell with `spark`, a session that knows the lake's tables and the database."""
    settings = load_settings()
    spark = _spark_session(settings)
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    from telematics_assets.engines.spark.queries import explain
    from telematics_assets.engines.spark.shell import interact, run

    if command is None:
        interact(spark, settings.names, supabase=settings.supabase is not None)
        return
    try:
        run(spark, command)
    except (PySparkException, Py4JError) as error:
        raise QueryError(explain(error, settings.names)) from None


@app.command(
    epilog="Examples:\n\n"
    "  telematics reset telematics --rebuild       keep the rows, make a new ledger from them\n\n"
    "  telematics reset telematics --drop-table    start anew from the files that are there\n\n"
    "  telematics reset telematics --drop-table --yes --json"
)
def reset(
    stream: StreamName,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make a new ledger from the table's rows.")] = False,
    drop_table: Annotated[bool, typer.Option("--drop-table", help="Drop the table, forget what was loaded.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask before dropping.")] = False,
    as_json: Json = False,
) -> None:
    """Make a stream's checkpoint and its table agree again, after one of them was lost, restored or changed by hand."""
    settings = load_settings()
    found = find_stream(FILE_STREAMS, stream)
    table = settings.names.bronze(found.table)
    if drop_table and not yes and not _confirmed(f"Drop {table} with all its rows?"):
        raise OptionError(f"{table} was not dropped. Say --yes to drop it without being asked.")
    done = _engine(settings).reset(found, rebuild=rebuild, drop_table=drop_table)
    if as_json:
        _print_json({"stream": stream, "table": str(table), "done": done})
    else:
        _console().print(escape(done))


@app.command(epilog="Example:\n\n  telematics doctor --json")
def doctor(as_json: Json = False) -> None:
    """Look at settings, engine, Volume, checkpoints, tables and database; say what is wrong and how to mend it.

    Exit code 1 if there is an error among the findings.
    """
    settings = load_settings()
    findings = [*_settings_findings(settings), *_engine(settings).doctor(FILE_STREAMS), *_supabase_findings(settings)]
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        console = _console()
        for finding in findings:
            console.print(f"{_LEVELS[finding.level]} [bold]{escape(finding.subject)}[/]: {escape(finding.message)}")
            if finding.fix:
                console.print(f"    {escape(finding.fix)}", highlight=False)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


spark_app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Prepare the engine spark (TELEMATICS_ENGINE=spark).",
)
app.add_typer(spark_app, name="spark")


@spark_app.command(
    "jars",
    epilog="Examples:\n\n"
    "  telematics spark jars /opt/spark-jars         then, offline: export TELEMATICS_SPARK_JARS=/opt/spark-jars\n\n"
    "  telematics spark jars                         into the folder that a first session would fill",
)
def spark_jars(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Where to put them; made if need be.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch the jars that Spark needs, those that are not there yet, from Maven Central or your mirror."""
    from telematics_assets.engines.spark.jars import default_folder, fetch
    from telematics_assets.engines.spark.java import find_java

    options = load_settings().spark
    place = (folder or options.jars or default_folder()).absolute()
    ivy_settings = options.conf.get("spark.jars.ivySettings")
    files = fetch(place, find_java(options.java_home), options.repository, ivy_settings)
    if as_json:
        _print_json([str(file) for file in files])
    else:
        _console().print(f"{len(files)} jars are in {escape(str(place))}.", highlight=False)


supabase_app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look at the Supabase database (SUPABASE_DB_URL), and prepare it.",
)
app.add_typer(supabase_app, name="supabase")


@supabase_app.command(
    epilog="Examples:\n\n  telematics supabase discover > my_tables.py\n\n  telematics supabase discover --json"
)
def discover(as_json: Json = False) -> None:
    """Print declarations for the tables that the database has; what can't be replicated, with the reason.

    Where the shipped declarations and the database have drifted apart, that is said on stderr.
    """
    from telematics_assets.microbatch.discover import declarations, drift, suggest

    found = _found_tables(load_settings())
    suggestions = suggest(found)
    known = {table.source for table in REPLICATED_TABLES}
    if as_json:
        _print_json([{**asdict(each), "declared": each.source in known} for each in suggestions])
    else:
        typer.echo(declarations(suggestions))
    there = {table.source for table in found}
    for each in drift(REPLICATED_TABLES, found):
        if each.kind != "undeclared" and (each.kind != "missing" or known & there):
            _note(f"{each.source}: {each.message}")


@supabase_app.command(
    "sql",
    epilog="Examples:\n\n"
    "  telematics supabase sql                          for all declared tables\n\n"
    "  telematics supabase sql public.orders | psql …   for a table of yours\n\n"
    "  telematics supabase sql --undo                   what takes it all back",
)
def supabase_sql(
    table: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TABLE", help="Tables, declared or not; all declared ones if none is given.", show_default=False
        ),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Print what takes it back.")] = False,
    role: Annotated[
        str | None, typer.Option(help="The role that reads; telematics_reader if not given.", show_default=False)
    ] = None,
    bigint: Annotated[bool, typer.Option("--bigint", help="New position columns are bigint, not xid8.")] = False,
    as_json: Json = False,
) -> None:
    """Print the SQL that mode row_xid needs: columns, triggers, indexes, tombstones, and a role that only reads.

    Nothing is changed: run it as the owner of the tables, in Supabase's SQL editor or with psql. It may be run again.
    """
    from telematics_assets.microbatch.discover import table_setup
    from telematics_assets.microbatch.sql import READER, setup_sql, undo_sql

    if undo and bigint:
        raise OptionError("--bigint is for new columns; with --undo there are none.")
    found = _found_tables(load_settings())
    there = {each.source for each in found}
    declared = [_declared_or_new(name, there) for name in dict.fromkeys(table or ())] or [
        each for each in REPLICATED_TABLES if not undo or each.source in there
    ]
    setups = [table_setup(each, found) for each in declared]
    reader = role or READER
    text = (
        undo_sql(setups, role=reader, everything=not table) if undo else setup_sql(setups, role=reader, bigint=bigint)
    )
    if as_json:
        _print_json({"tables": [each.source for each in declared], "role": reader, "sql": text})
    else:
        typer.echo(text, nl=False)


@app.command(hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def beside(context: typer.Context) -> None:
    """Run a command while the demo's database runs; if another database is configured, just the command."""
    from telematics_assets.demo.local_supabase import run_beside

    raise typer.Exit(run_beside(context.args, load_settings(), _note))


@app.command(hidden=True)
def home() -> None:
    """Prepare Dagster's folder and print its path."""
    from telematics_assets.assets.files import pool_name
    from telematics_assets.assets.supabase import POOL
    from telematics_assets.dagster_home import prepare_dagster_home

    settings = load_settings()
    folder = settings.dagster_home or settings.default_dagster_home
    typer.echo(str(prepare_dagster_home(folder, [*(pool_name(stream) for stream in FILE_STREAMS), POOL])))


def main() -> None:
    """Run the command line."""
    app()


def export_line(settings: Settings) -> str:
    """The shell line that lets bare `dagster dev` and `dg` find the history."""
    return f"export DAGSTER_HOME={shlex.quote(str(settings.default_dagster_home))}"


def _feed(
    plan: FleetPlan, volume: Volume, per_minute: float, seconds: float | None, seed: int | None, as_json: bool
) -> None:
    from telematics_assets.demo.feed import feed

    with _stopped_by_signals() as stop, _counting("feeding") as count:
        report = feed(plan, volume, per_minute, stop, seconds=seconds, first_seed=seed, progress=count)
    if as_json:
        _print_json(asdict(report))
        return
    title = f"Fed {volume.location} for {report.seconds:.0f} s at {per_minute:g} files a minute"
    table = _table("stream", "files", "rows", "bytes", "broken files", "seeds")
    for stream in report.streams:
        seeds = f"{stream.first_seed} to {stream.last_seed}"
        _row(table, stream.stream, stream.files, stream.rows, stream.bytes, stream.broken, seeds)
    _titled(title, table)
    _console().print("Next: telematics load")
    if report.abandoned:
        _note(f"{report.abandoned} files had not landed: the Volume did not answer.")


def _replicate_all(
    engine: Engine, tables: Sequence[ReplicatedTable], request: ReplicateRequest
) -> tuple[list[ReplicateReport], list[TelematicsError]]:
    # Asked once, before any table: of ten refused logins the database locks the user out.
    status = engine.source_status()
    if status.state != "unreachable":
        # One that does not answer is tried again with the first table, for longer.
        status.require()
    reports: list[ReplicateReport] = []
    errors: list[TelematicsError] = []
    for each in tables:
        try:
            with _progress_of(each.source) as listener:
                reports.append(engine.replicate(each, request, listener))
        except TelematicsError as error:
            _complain(error, each.source)
            errors.append(error)
            lost = isinstance(error, SupabaseError | SupabaseUnavailableError) and each is not tables[-1]
            if lost and engine.source_status().state != "ready":
                _note(f"the tables behind {each.source} were not tried.")
                break
    return reports, errors


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a SIGTERM sets; a second one ends the process in the usual way."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:
        stop.set()
        put_back()

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        put_back()


def _engine(settings: Settings) -> Engine:
    from telematics_assets.deployment import open_engine

    return open_engine(settings)


def _spark_session(settings: Settings) -> SparkSession:
    from telematics_assets.engines.spark.queries import open_session

    spark = open_session(settings.spark, settings.home, settings.names, settings.supabase)
    # What the loader needs is not what people type: names have no case on Databricks.
    spark.conf.set("spark.sql.caseSensitive", "false")
    return spark


def _found_tables(settings: Settings) -> Sequence[FoundTable]:
    supabase = settings.require_supabase()
    if importlib.util.find_spec("adbc_driver_postgresql") is None:
        raise MissingExtraError("Supabase", "supabase")
    from telematics_assets.microbatch.discover import find_tables
    from telematics_assets.microbatch.session import transaction

    with transaction(supabase) as session:
        return find_tables(session)


def _declared_or_new(name: str, there: Container[str]) -> ReplicatedTable:
    """The declared table of that name; a table of the user's own, which the SQL is for before it is declared."""
    try:
        return find_table(REPLICATED_TABLES, name)
    except UnknownNameError:
        if "." not in name:
            raise
    table = ReplicatedTable(name)
    if name not in there:
        raise UnknownNameError(
            f"There is no table {name} in the database. `telematics supabase discover` lists those there are."
        )
    return table


def _stream_or_table(name: str) -> FileStream | ReplicatedTable:
    with suppress(UnknownNameError):
        return find_table(REPLICATED_TABLES, name)
    try:
        return find_stream(FILE_STREAMS, name)
    except UnknownNameError as error:
        tables = ", ".join(table.source for table in REPLICATED_TABLES)
        raise UnknownNameError(f"{error} Replicated tables: {tables}.") from None


def _is_there(engine: Engine, table: ReplicatedTable) -> bool:
    try:
        return engine.state(engine.names.bronze(table.target)) is not None
    except TelematicsError:
        # Its own maintenance says what is wrong with it.
        return True


def _loaded(report: IngestReport) -> dict[str, Any]:
    return {
        "stream": report.stream,
        "table": report.table,
        "batches": len(report.batches),
        "files_ingested": report.files_ingested,
        "files_skipped": report.files_skipped,
        "rows": report.rows,
        "rows_rescued": report.rows_rescued,
        "rows_corrupt": report.rows_corrupt,
        "table_version": report.table_version,
    }


def _replicated(report: ReplicateReport) -> dict[str, Any]:
    return {
        "table": report.table,
        "mode": report.mode,
        "inserted": report.inserted,
        "updated": report.updated,
        "deleted": report.deleted,
        "position": report.position,
        "table_version": report.table_version,
    }


def _tell_of(report: ReplicateReport) -> None:
    if report.snapshot is not None:
        _note(f"{report.source}: took a whole snapshot ({report.snapshot}).")
    for note in report.notes:
        _note(f"{report.source}: {note}")
    for anomaly in report.anomalies:
        _note(
            f"{report.source}: {anomaly.rows} values of {anomaly.column} can't be shown as they are ({anomaly.kind})."
        )
    if report.blocker is not None:
        blocker = report.blocker
        _note(f"{report.source}: {blocker.kind} {blocker.who} holds the cut back for {blocker.age_seconds:.0f} s.")
    if report.yielded:
        _note(f"{report.source}: another process was replicating it; nothing was doubled.")


def _settings_findings(settings: Settings) -> Iterator[Finding]:
    if settings.dagster_home is None:
        yield Finding(
            "warning",
            "DAGSTER_HOME",
            "It is not set: a bare `dagster dev` or `dg` starts without the history.",
            export_line(settings),
        )
    elif not settings.dagster_home.is_absolute():
        fix = f"export DAGSTER_HOME={shlex.quote(str(settings.dagster_home.absolute()))}"
        yield Finding(
            "error", "DAGSTER_HOME", f"{str(settings.dagster_home)!r} is not absolute; Dagster refuses it.", fix
        )
    else:
        yield Finding("ok", "DAGSTER_HOME", str(settings.dagster_home))
    for name, near in settings.unknown.items():
        yield Finding(
            "warning",
            name,
            "There is no such setting; it has no effect.",
            f"Did you mean {near}?" if near else f"unset {name}",
        )
    if importlib.util.find_spec("matplotlib") is None:
        yield Finding(
            "warning",
            "matplotlib",
            "It is not installed: runs bring no pictures.",
            'pip install "telematics_assets[plots]"',
        )


def _supabase_findings(settings: Settings) -> Sequence[Finding]:
    if settings.supabase_problem is not None:
        return [Finding("error", "Supabase", settings.supabase_problem)]
    if settings.supabase is None:
        return [Finding("ok", "Supabase", f"not configured, and not needed for files. {NOT_CONFIGURED}")]
    if importlib.util.find_spec("adbc_driver_postgresql") is None:
        return [Finding("error", "Supabase", str(MissingExtraError("Supabase", "supabase")))]
    from telematics_assets.microbatch.doctor import examine

    return examine(settings.supabase)


def _confirmed(question: str) -> bool:
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        # There is nobody to answer (a script, a closed terminal): the caller's message says what to do then.
        _console(stderr=True).print()
        return False


def _file_state(text: str | None) -> FileState | None:
    if text is None:
        return None
    for state in FILE_STATES:
        if state == text.upper():
            return state
    raise UnknownNameError(f"There is no file state {text!r}. States: {', '.join(FILE_STATES)}.")


def _plain(value: Any) -> Any:
    """A value as JSON can hold it without losing any of it."""
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Decimal) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # Without a terminal there is no width to keep to: one row stays one line, for grep and for logs.
    return Console(file=stream, width=None if stream.isatty() else 10_000)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_files(found: pl.DataFrame) -> None:
    """Files as one JSON list on stdout, written part by part.

    Args:
        found: As `Engine.file_table` gives them.
    """
    typer.echo("[", nl=False)
    for number, part in enumerate(found.iter_slices(100_000)):
        if part.height:
            # A line for each: a line end within a value is escaped.
            rows = _file_rows(part).write_ndjson().rstrip("\n").replace("\n", ",\n")
            typer.echo((",\n" if number else "") + rows, nl=False)
    typer.echo("]")


def _file_rows(found: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    # Whole microseconds.
    moment = pl.from_epoch(pl.col("modified_ns") // 1000, "us").dt.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")
    return found.select("path", "state", "reason", "size", modified_at=moment, batch_id="batch_id")


def _fail(error: TelematicsError, as_json: bool) -> None:
    _complain(error)
    if as_json:
        _print_json({"error": str(error), "transient": error.transient})


def _complain(error: TelematicsError, subject: str | None = None) -> None:
    prefix = f"{subject}: " if subject else ""
    message = " ".join(str(error).split())
    _console(stderr=True).print(f"[red]Error:[/] {escape(prefix + message)}", highlight=False, soft_wrap=True)


def _note(text: str) -> None:
    _console(stderr=True).print(f"[yellow]Note:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _titled(title: str, table: Table) -> None:
    # A title of the table's own would be wrapped at the table's width.
    console = _console()
    console.print(escape(title), style="italic", highlight=False, soft_wrap=True)
    console.print(table)


def _row(table: Table, *values: Any) -> None:
    table.add_row(*(f"{v:,}" if isinstance(v, int) else escape("" if v is None else str(v)) for v in values))


def _show(rows: Sequence[Mapping[str, Any]], as_json: bool, title: str) -> None:
    """The same list for a script, or for eyes."""
    if as_json:
        _print_json(rows)
    elif not rows:
        _console().print(f"{title}: none.")
    else:
        table = _table(*rows[0])
        for row in rows:
            _row(table, *row.values())
        _titled(title, table)


def _show_rows(rows: pa.Table, as_json: bool, title: str) -> None:
    """Rows of any table, for a script or for eyes."""
    if as_json:
        _print_json([{key: _plain(value) for key, value in row.items()} for row in rows.to_pylist()])
        return
    import polars as pl

    console = _console()
    with pl.Config(
        tbl_rows=rows.num_rows,
        tbl_cols=max(4, console.width // 16),
        tbl_width_chars=console.width,
        tbl_hide_dataframe_shape=True,
    ):
        console.print(f"{title}: {rows.num_rows} rows, {rows.num_columns} columns", highlight=False)
        console.out(str(pl.from_arrow(rows)), highlight=False)


@contextmanager
def _counting(label: str) -> Iterator[Any]:
    """A counter on a terminal's stderr; nothing elsewhere."""
    from rich.progress import MofNCompleteColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (SpinnerColumn(), TextColumn(f"{label} {{task.description}}", markup=False), MofNCompleteColumn())
    with Bar(*columns, console=_console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield lambda path: bar.update(task, advance=1, description=path)


@contextmanager
def _progress_of(stream: str) -> Iterator[ProgressListener]:
    """A bar over the files of each batch on a terminal's stderr; nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, console=_console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task: TaskID = bar.add_task(stream, total=None)

        def listen(progress: Progress) -> None:
            bar.update(
                task,
                description=f"{stream}: {progress.message}",
                completed=progress.done,
                total=progress.total or None,
            )

        yield listen
