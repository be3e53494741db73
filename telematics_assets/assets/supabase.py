"""Bronze tables that mirror the tables of a Supabase database.

Belongs here: the database and its tables as assets that are observed, never made; the one asset definition that
replicates all of them, its run config, retries and pool.
Does not belong here: replicating (`engines/`), what the checks ask (`replica_checks.py`), when it runs
(`replication.py`).

One step does all tables, because a step costs more than a batch. A table's failure is its own: the others are
replicated and checked, and the run fails at its end, by name.

https://docs.dagster.io/guides/build/assets/defining-assets#multi-asset
"""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import timedelta
from types import TracebackType

import dagster as dg
from pydantic import Field

from telematics_assets.assets.boundary import failures_for_dagster
from telematics_assets.assets.files import PROCESS_TAG, RETRY_POLICY, ProgressLog
from telematics_assets.catalog import Names, ReplicatedTable, find_table
from telematics_assets.engines.base import Engine, ReplicateReport, ReplicateRequest, SourceStatus
from telematics_assets.errors import (
    PermanentError,
    SupabaseError,
    SupabaseUnavailableError,
    TelematicsError,
    TransientError,
)
from telematics_assets.metadata import contract_schema, replication_metadata
from telematics_assets.processes import process_identity
from telematics_assets.replica_checks import REPLICA_CHECKS, Batch, last_batch, replica_check_specs

#: Version of what a replication makes of a row. Raise it when the same row would become another one.
CODE_VERSION = "1"

#: Name of the asset definition, of its step, and of the pool that keeps two runs from waiting for each other.
STEP = "replicate_supabase"
POOL = "replicate_supabase"

#: The asset key of the database as a whole.
DATABASE_KEY = dg.AssetKey(["supabase_data"])


class ReplicateConfig(dg.Config):
    """Run config of the replicated tables."""

    full: bool = Field(
        default=False, description="Take a new snapshot of the whole table, whatever its position says; no row is lost."
    )
    sweep: bool = Field(default=False, description="Compare all keys with the source's now, whether or not it is due.")
    tables: list[str] = Field(
        default=[],
        description="The tables that full and sweep are meant for, such as public.policies or supabase_policies; all "
        "that the run replicates if empty.",
    )

    def requests(self, tables: Sequence[ReplicatedTable]) -> Mapping[str, ReplicateRequest]:
        """What the run asks of the engine, by source.

        Args:
            tables: The tables that the run replicates.

        Raises:
            UnknownNameError: If a named table is none of them.
        """
        named = {find_table(tables, name).source for name in self.tables}
        asked = ReplicateRequest(full=self.full, sweep=self.sweep)
        return {table.source: asked if not named or table.source in named else ReplicateRequest() for table in tables}


def source_key(table: ReplicatedTable) -> dg.AssetKey:
    """The asset key of a table of the database."""
    return dg.AssetKey([*DATABASE_KEY.path, *table.source.split(".")])


def replica_key(table: ReplicatedTable) -> dg.AssetKey:
    """The asset key of the bronze table that mirrors it."""
    return dg.AssetKey(["bronze", table.target])


def source_assets(tables: Sequence[ReplicatedTable]) -> dg.AssetsDefinition:
    """The database and its declared tables, as assets that are made elsewhere; any of them can be observed on demand.

    A replication says what it saw of them too. The UI shows that only for assets which can be observed, and counts all
    others as missing.

    Args:
        tables: The replicated tables.
    """
    by_key = {source_key(table): table for table in tables}

    def observe(context: dg.AssetExecutionContext, engine: dg.ResourceParam[Engine]) -> Iterator[dg.ObserveResult]:
        asked = [table for key, table in by_key.items() if key in context.selected_asset_keys]
        with failures_for_dagster(context), engine.source_session():
            status = engine.source_status()
            if _is_left_alone(context, status, {DATABASE_KEY, *by_key}):
                return
            status.require()
            positions = engine.source_positions([table for table in asked if table.mode == "row_xid"])
        highest = {position.source: position.highest for position in positions}
        if DATABASE_KEY in context.selected_asset_keys:
            yield dg.ObserveResult(asset_key=DATABASE_KEY, metadata={"database": status.message})
        for table in asked:
            said = {"database": status.message, "highest_position": highest.get(table.source)}
            yield dg.ObserveResult(
                asset_key=source_key(table), metadata={k: v for k, v in said.items() if v is not None}
            )

    with warnings.catch_warnings():
        # Marked as beta, like that of the landing folders.
        warnings.simplefilter("ignore", dg.BetaWarning)
        assets: dg.AssetsDefinition = dg.multi_observable_source_asset(
            specs=_source_specs(tables), name="observe_supabase", can_subset=True
        )(observe)
    return assets


def _source_specs(tables: Sequence[ReplicatedTable]) -> Sequence[dg.AssetSpec]:
    owners = list(dict.fromkeys(owner for table in tables for owner in table.contract.owners))
    database = dg.AssetSpec(
        key=DATABASE_KEY,
        description="The Supabase database (PostgreSQL) whose tables are replicated. With `make dev`, and nothing "
        "configured, it is the demo's: a few of its rows change every minute.",
        group_name="supabase",
        kinds={"postgres", "supabase"},
        owners=owners,
        code_version="1",
    )
    return [database, *map(_source_spec, tables)]


def replica_assets(
    tables: Sequence[ReplicatedTable], names: Names, retry_policy: dg.RetryPolicy | None = RETRY_POLICY
) -> dg.AssetsDefinition:
    """The bronze tables that mirror the database, with their checks; any of them can be selected.

    Args:
        tables: The replicated tables.
        names: The deployment's catalog, schemas and Volume.
        retry_policy: For transient errors inside the run.
    """
    by_key = {replica_key(table): table for table in tables}

    @dg.multi_asset(
        name=STEP,
        specs=[_replica_spec(table, names) for table in tables],
        check_specs=[spec for key, table in by_key.items() for spec in replica_check_specs(table, key)],
        description="Brings the bronze tables up to the Supabase database.",
        can_subset=True,
        pool=POOL,
        retry_policy=retry_policy,
    )
    def replicate(
        context: dg.AssetExecutionContext, config: ReplicateConfig, engine: dg.ResourceParam[Engine]
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
        run_id = context.run.run_id
        context.instance.add_run_tags(run_id, {PROCESS_TAG: f"{run_id} {process_identity()}"})
        # One login for the whole run.
        with failures_for_dagster(context), engine.source_session():
            yield from _replicated(context, config, engine, by_key)

    return replicate


def _replicated(
    context: dg.AssetExecutionContext,
    config: ReplicateConfig,
    engine: Engine,
    by_key: Mapping[dg.AssetKey, ReplicatedTable],
) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    selected = {key: table for key, table in by_key.items() if key in context.selected_asset_keys}
    requests = config.requests(list(selected.values()))
    done = _materialized_before(context)
    # Asked once, before any table: of ten refused logins the database locks the user out.
    status = engine.source_status()
    if _is_left_alone(context, status, by_key.keys()):
        return
    if selected and status.state != "unreachable":
        # One that does not answer is tried again with the first table, for longer.
        status.require()
        context.log_event(dg.AssetObservation(DATABASE_KEY, metadata={"database": status.message}))
    failures = _Failures()
    for key, table in by_key.items():
        report: ReplicateReport | None = None
        with failures.of(table.source) as failed:
            if key in selected:
                # What an earlier attempt of this run did is not done over again.
                request = ReplicateRequest() if key in done else requests[table.source]
                context.log.info(f"{table.source}: replicating into {engine.names.bronze(table.target)}")
                report = engine.replicate(table, request, ProgressLog(context.log))
                context.log.info(_in_words(report))
                context.log_event(_observation(table, report))
                yield dg.MaterializeResult(
                    asset_key=key,
                    metadata=replication_metadata(engine, table, report),
                    # An empty batch keeps the version, so that it wakes nobody downstream.
                    data_version=dg.DataVersion(f"{report.table_version}"),
                )
        if failed:
            context.log.error(f"{table.source}: {failed[0]}")
            if isinstance(failed[0], SupabaseError | SupabaseUnavailableError):
                status = engine.source_status()
                if status.state != "ready":
                    # Neither wait for every other table in vain nor log in again where that is refused.
                    with failures.of("The tables behind it were not tried"):
                        status.require()
                    break
            continue
        batch: Batch | None = None
        for name, check in REPLICA_CHECKS.items():
            if dg.AssetCheckKey(key, name) not in context.selected_asset_check_keys:
                continue
            batch = batch or (last_batch(context.instance, key, time.time()) if report is None else Batch.of(report))
            # The other checks can still answer.
            with failures.of(f"{table.source}, check {name}"):
                yield check.judge(engine, table, batch, status)._replace(check_name=name, asset_key=key)
    failures.raise_together()


def _is_left_alone(context: dg.AssetExecutionContext, status: SourceStatus, own: Set[dg.AssetKey]) -> bool:
    """Whoever runs all there is, without a database, did not ask for this: the rest is done, the run stays green."""
    if status.state != "not configured" or not context.job_def.asset_layer.selected_asset_keys - own:
        return False
    context.log.warning(f"The replicated tables are left as they are. {status.message}")
    return True


class _Failures:
    """Collects what went wrong, each with its subject, while the rest goes on."""

    def __init__(self) -> None:
        self._all: list[tuple[str, Exception]] = []

    def of(self, subject: str) -> "_Attempt":
        """A block whose failure is noted, and does not go further."""
        return _Attempt(subject, self._all)

    def raise_together(self) -> None:
        """Raise one error for all, if there is any: tried again if that can help one of them."""
        if not self._all:
            return
        told = "\n".join(f"{subject}: {_told(error)}" for subject, error in self._all)
        transient = any(isinstance(error, TransientError) for _, error in self._all)
        kind = TransientError if transient else PermanentError
        raise kind(f"What is not named here is done.\n{told}") from self._all[0][1]


class _Attempt:
    def __init__(self, subject: str, failures: list[tuple[str, Exception]]) -> None:
        self._subject = subject
        self._failures = failures
        self._mine: list[Exception] = []

    def __enter__(self) -> list[Exception]:
        return self._mine

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            # An interrupt ends the run.
            return False
        self._mine.append(error)
        self._failures.append((self._subject, error))
        return True


def _materialized_before(context: dg.AssetExecutionContext) -> set[dg.AssetKey | None]:
    if not context.retry_number:
        return set()
    events = context.instance.all_logs(context.run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    return {event.asset_materialization.asset_key for event in events if event.asset_materialization}


def _told(error: Exception) -> str:
    if isinstance(error, TelematicsError):
        return str(error)
    return f"{type(error).__name__}: {error}. This is a fault of the program, or of what it runs on: report it."


def _observation(table: ReplicatedTable, report: ReplicateReport) -> dg.AssetObservation:
    """What a batch saw of the table in the database: the UI then shows when it was last looked at."""
    metadata = {"position": report.position, "lag_seconds": report.lag_seconds and round(report.lag_seconds, 3)}
    return dg.AssetObservation(source_key(table), metadata={k: v for k, v in metadata.items() if v is not None})


def _in_words(report: ReplicateReport) -> str:
    snapshot = f", whole snapshot ({report.snapshot})" if report.snapshot else ""
    return (
        f"{report.source}: {report.inserted:,} inserted, {report.updated:,} updated, {report.deleted:,} deleted"
        f"{snapshot}; version {report.table_version}, {report.seconds:.1f} s"
    )


def _source_spec(table: ReplicatedTable) -> dg.AssetSpec:
    return dg.AssetSpec(
        key=source_key(table),
        deps=[DATABASE_KEY],
        description=f"Table `{table.source}` of the Supabase database. {table.contract.comment}".strip(),
        group_name="supabase",
        kinds={"postgres", "table"},
        owners=list(table.contract.owners),
        tags=dict(table.contract.tags) | {"layer": "source"},
        code_version="1",
        metadata={"source": table.source, "mode": table.mode},
    )


def _replica_spec(table: ReplicatedTable, names: Names) -> dg.AssetSpec:
    columns = {"dagster/column_schema": contract_schema(table.contract)} if table.contract.columns else {}
    return dg.AssetSpec(
        key=replica_key(table),
        deps=[source_key(table)],
        description=table.contract.comment or f"The current rows of `{table.source}`.",
        group_name="bronze",
        kinds={"postgres", "deltalake"},
        owners=list(table.contract.owners),
        tags=dict(table.contract.tags),
        code_version=CODE_VERSION,
        freshness_policy=_freshness(table),
        metadata={
            "dagster/table_name": str(names.bronze(table.target)),
            "source": table.source,
            "mode": table.mode,
            **columns,
        },
    )


def _freshness(table: ReplicatedTable) -> dg.FreshnessPolicy | None:
    if table.fresh_within_minutes is None:
        return None
    return dg.FreshnessPolicy.time_window(fail_window=timedelta(minutes=table.fresh_within_minutes))
