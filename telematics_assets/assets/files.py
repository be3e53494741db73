"""Bronze tables that are filled from files.

Belongs here: the asset of any `FileStream`, its run config, retries and pool.
Does not belong here: loading (`engines/`), the checks behind it (`asset_checks.py`).

The assets are not partitioned: the stream's checkpoint is the position, so that Materialize drains what is available.

https://docs.dagster.io/guides/build/assets
"""

import time
from dataclasses import replace
from datetime import timedelta

import dagster as dg
from pydantic import Field

from telematics_assets.assets.boundary import failures_for_dagster
from telematics_assets.assets.landing import landing_key
from telematics_assets.catalog import FileStream, Names
from telematics_assets.engines.base import Backfill, Engine, IngestRequest, Progress
from telematics_assets.metadata import contract_schema, load_metadata
from telematics_assets.processes import process_identity

#: Version of what a load makes of a file. Raise it when the same file would become other rows.
CODE_VERSION = "1"

#: Set by a run when it starts to load: its own id and its process. See `processes.py`. The prefix hides it in the UI,
#: where it took a line of its own for each run.
PROCESS_TAG = ".dagster/telematics_process"

#: Set by the sensor: the run loads files that only a listing of the whole folder finds.
LIST_WHOLE_TAG = "telematics/list_whole"

#: Transient errors are tried again inside the run; what outlasts this is the sensor's business.
RETRY_POLICY = dg.RetryPolicy(max_retries=3, delay=2, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)

_LOG_SECONDS = 2.0


class LoadConfig(dg.Config):
    """Run config of a bronze asset."""

    max_files: int | None = Field(
        default=None, ge=1, description="Stop after about this many files; empty loads all that is available."
    )
    full_refresh: bool = Field(
        default=False,
        description="First rewrite the table from all files that are in the landing folder now, in one commit; readers "
        "see the old rows or the new ones. Refused if rows would be lost, unless force is set.",
    )
    force: bool = Field(
        default=False,
        description="With full_refresh: let the rows of files go that were loaded but are gone or unreadable now.",
    )
    retry_files: list[str] = Field(
        default=[],
        description="Read only these files again, which were skipped as corrupted or missing: paths as the landing "
        "Volume or the stream's folder has them.",
    )
    backfill_folder: str | None = Field(
        default=None,
        description="Load only files below this folder, also those that were left out as the stream began "
        "(include_existing_files off); what is loaded already is not loaded again.",
    )
    backfill_modified_after: str | None = Field(
        default=None, description="The same for files modified strictly after this ISO timestamp (UTC unless it says)."
    )
    backfill_modified_before: str | None = Field(
        default=None, description="The same for files modified strictly before this ISO timestamp (UTC unless it says)."
    )

    def request(self) -> IngestRequest:
        """What the run asks of the engine."""
        backfill = Backfill(self.backfill_folder, self.backfill_modified_after, self.backfill_modified_before)
        return IngestRequest(
            max_files=self.max_files,
            full_refresh=self.full_refresh,
            force=self.force,
            retry_files=tuple(self.retry_files),
            backfill=None if backfill == Backfill() else backfill,
        )


def bronze_key(stream: FileStream) -> dg.AssetKey:
    """The asset key of a stream's bronze table."""
    return dg.AssetKey(["bronze", stream.table])


def pool_name(stream: FileStream) -> str:
    """The pool that keeps two runs of one stream from waiting for each other's commit."""
    return f"load_{stream.name}"


def bronze_asset(
    stream: FileStream, names: Names, retry_policy: dg.RetryPolicy | None = RETRY_POLICY
) -> dg.AssetsDefinition:
    """The bronze table of a stream.

    Args:
        stream: Any file stream.
        names: The deployment's catalog, schemas and Volume.
        retry_policy: For transient errors inside the run.
    """

    @dg.asset(
        key=bronze_key(stream),
        deps=[landing_key(stream)],
        description=stream.contract.comment,
        group_name="bronze",
        kinds={stream.format, "deltalake"},
        owners=list(stream.contract.owners),
        tags=dict(stream.contract.tags),
        code_version=CODE_VERSION,
        freshness_policy=_freshness(stream),
        metadata={
            "dagster/table_name": str(names.bronze(stream.table)),
            "dagster/column_schema": contract_schema(stream.contract),
        },
        pool=pool_name(stream),
        retry_policy=retry_policy,
    )
    def bronze(
        context: dg.AssetExecutionContext, config: LoadConfig, engine: dg.ResourceParam[Engine]
    ) -> dg.MaterializeResult[None]:
        run_id = context.run.run_id
        context.instance.add_run_tags(run_id, {PROCESS_TAG: f"{run_id} {process_identity()}"})
        with failures_for_dagster(context):
            request = replace(config.request(), list_whole=LIST_WHOLE_TAG in context.run.tags)
            report = engine.ingest(stream, request, ProgressLog(context.log))
            return dg.MaterializeResult(
                metadata=load_metadata(engine, stream, report),
                # An empty run keeps the version, so that it wakes nobody downstream.
                data_version=dg.DataVersion(f"{report.table_version}"),
            )

    return bronze


def _freshness(stream: FileStream) -> dg.FreshnessPolicy | None:
    if stream.fresh_within_hours is None:
        return None
    return dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=stream.fresh_within_hours))


class ProgressLog:
    """Writes progress to a run's log, one line in a while: every line is a row of Dagster's database."""

    def __init__(self, log: dg.DagsterLogManager) -> None:
        self._log = log
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        """Write it, if the last line is some time ago."""
        now = time.monotonic()
        if now >= self._next or progress.phase == "done":
            self._next = now + _LOG_SECONDS
            self._log.info(progress.message)
