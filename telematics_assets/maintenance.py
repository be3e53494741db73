"""Maintenance in Dagster: a job with one op for each table, and its schedule, which is off until somebody turns it on.

Belongs here: the job, its ops and its schedule.
Does not belong here: what maintenance does (`Engine.maintain`), what its metadata looks like (`metadata.py`).

https://docs.dagster.io/guides/build/jobs/op-jobs
"""

from collections.abc import Sequence

import dagster as dg

from telematics_assets.assets.boundary import failures_for_dagster
from telematics_assets.assets.files import RETRY_POLICY, ProgressLog
from telematics_assets.catalog import FileStream, ReplicatedTable
from telematics_assets.engines.base import Engine
from telematics_assets.metadata import maintenance_metadata

JOB_NAME = "maintenance"

#: Once a day, at night (UTC).
CRON = "30 2 * * *"


def maintenance_job(
    streams: Sequence[FileStream | ReplicatedTable], retry_policy: dg.RetryPolicy | None = RETRY_POLICY
) -> dg.JobDefinition:
    """The job that keeps the tables, checkpoints and landing folders of all streams small.

    Args:
        streams: The file streams and the replicated tables; each becomes an op, and one that fails doesn't keep the
            others from it.
        retry_policy: For transient errors inside the run.
    """
    ops = [_maintain_op(stream, retry_policy) for stream in streams]

    @dg.job(
        name=JOB_NAME,
        description="Compact tables, delete what they no longer need, merge checkpoints, let clean_source work.",
    )
    def maintenance() -> None:
        for op in ops:
            op()

    return maintenance


def maintenance_schedule(job: dg.JobDefinition) -> dg.ScheduleDefinition:
    """Runs the job daily once it is turned on in the UI."""
    return dg.ScheduleDefinition(
        name=f"{JOB_NAME}_daily",
        job=job,
        description="Runs the job maintenance once a day. It is off until you turn it on.",
        cron_schedule=CRON,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
    )


def _maintain_op(stream: FileStream | ReplicatedTable, retry_policy: dg.RetryPolicy | None) -> dg.OpDefinition:
    name, table = (stream.name, stream.table) if isinstance(stream, FileStream) else (stream.target, stream.target)

    @dg.op(
        # A bronze table may have a name that an op can't have.
        name=f"maintain_{dg.AssetKey(name).to_python_identifier()}",
        description=f"Maintains {table} and what belongs to it. Loads may run meanwhile.",
        out=dg.Out(dg.Nothing),
        retry_policy=retry_policy,
    )
    def maintain(context: dg.OpExecutionContext, engine: dg.ResourceParam[Engine]) -> None:
        with failures_for_dagster(context):
            report = engine.maintain(stream, ProgressLog(context.log))
        context.add_output_metadata(maintenance_metadata(report))

    return maintain
