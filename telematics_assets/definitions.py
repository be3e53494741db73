"""The code location: everything that Dagster loads, put together.

Belongs here: the one place where an engine is chosen, and the factories that make all definitions of a file stream and
of replicated tables.
Does not belong here: anything that assets, checks, sensors and resources do.

Loading connects to nothing. A stream of your own is a few lines in a module that Dagster loads instead of this one:

    from telematics_assets.catalog import FILE_STREAMS, Column, FileStream, TableContract
    from telematics_assets.definitions import build_definitions

    trips = FileStream(
        name="trips", format="json", folder="trips", table="trips",
        contract=TableContract("One row per trip.", (Column("trip_id", "STRING", "Number of the trip."),)),
    )
    defs = build_definitions(streams=(*FILE_STREAMS, trips))

So is a table of your own database:

    from telematics_assets.catalog import REPLICATED_TABLES, ReplicatedTable

    defs = build_definitions(tables=(*REPLICATED_TABLES, ReplicatedTable("public.invoices")))

https://docs.dagster.io/guides/build/projects
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from telematics_assets.asset_checks import file_stream_checks
from telematics_assets.assets.files import RETRY_POLICY, bronze_asset
from telematics_assets.assets.landing import landing_asset
from telematics_assets.assets.supabase import DATABASE_KEY, replica_assets, source_assets
from telematics_assets.automation import landing_sensor, load_job
from telematics_assets.catalog import FILE_STREAMS, REPLICATED_TABLES, FileStream, Names, ReplicatedTable
from telematics_assets.engines.base import Engine
from telematics_assets.maintenance import maintenance_job, maintenance_schedule
from telematics_assets.microbatch.connection import Supabase
from telematics_assets.replica_checks import database_check
from telematics_assets.replication import replication_job, replication_schedule, replication_sensor
from telematics_assets.resources import (
    EmbeddedEngineResource,
    EmbeddedLandingResource,
    SparkEngineResource,
    SparkLandingResource,
    SupabaseResource,
)
from telematics_assets.settings import EngineName, Settings, load_settings
from telematics_assets.volumes.base import Volume

#: What stands behind the keys `engine` and `landing`.
_RESOURCES: Mapping[EngineName, tuple[Any, Any]] = {
    "embedded": (EmbeddedEngineResource, EmbeddedLandingResource),
    "spark": (SparkEngineResource, SparkLandingResource),
}


def file_stream_definitions(
    stream: FileStream,
    settings: Settings,
    names: Names | None = None,
    retry_policy: dg.RetryPolicy | None = RETRY_POLICY,
) -> dg.Definitions:
    """All definitions of one file stream: landing asset, bronze asset, checks, job and sensor.

    They need resources behind the keys `engine` and `landing`; `build_definitions` adds them.

    Args:
        stream: Any file stream.
        settings: Intervals, limits and names.
        names: Catalog, schemas and Volume; those of `settings` if None.
        retry_policy: For transient errors inside a run.
    """
    names = names or settings.names
    return dg.Definitions(
        assets=[landing_asset(stream, names), bronze_asset(stream, names, retry_policy)],
        asset_checks=file_stream_checks(stream, retry_policy),
        jobs=[load_job(stream)],
        sensors=[landing_sensor(stream, settings.sensor_seconds, settings.max_run_seconds)],
    )


def replicated_table_definitions(
    tables: Sequence[ReplicatedTable],
    settings: Settings,
    names: Names | None = None,
    retry_policy: dg.RetryPolicy | None = RETRY_POLICY,
) -> dg.Definitions:
    """All definitions of the replicated tables: the database's assets, bronze assets, checks, job, schedule and sensor.

    They need a resource behind the key `engine`; `build_definitions` adds it. One set of tables has one database.

    Args:
        tables: The replicated tables; none make no definitions.
        settings: Intervals, limits and names.
        names: Catalog, schemas and Volume; those of `settings` if None.
        retry_policy: For transient errors inside a run.
    """
    if not tables:
        return dg.Definitions()
    limit = settings.max_run_seconds
    return dg.Definitions(
        assets=[source_assets(tables), replica_assets(tables, names or settings.names, retry_policy)],
        asset_checks=[database_check(tables, DATABASE_KEY, retry_policy)],
        jobs=[replication_job(tables)],
        schedules=[replication_schedule(tables, settings.replicate_minutes, limit)],
        sensors=[replication_sensor(tables, settings.sensor_seconds, limit)],
    )


def build_definitions(
    streams: Sequence[FileStream] = FILE_STREAMS,
    settings: Settings | None = None,
    engine: Engine | None = None,
    landing: Volume | None = None,
    supabase: Supabase | None = None,
    executor: dg.ExecutorDefinition = dg.in_process_executor,
    retry_policy: dg.RetryPolicy | None = RETRY_POLICY,
    tables: Sequence[ReplicatedTable] = REPLICATED_TABLES,
) -> dg.Definitions:
    """Put a code location together.

    Args:
        streams: The file streams to define.
        settings: The deployment's choices; read from the environment if None.
        engine: An engine to use instead of the one that the settings name, for example one in memory.
        landing: The landing Volume to use instead of the one that the settings name.
        supabase: The database to replicate instead of the one that the settings name.
        executor: How a run executes its steps. One process is quickest for an asset and its checks.
        retry_policy: For transient errors inside a run; None in tests that shall not wait.
        tables: The replicated tables to define.

    Raises:
        SettingsError: If the environment holds a value that is not accepted.
    """
    settings = settings or load_settings()
    own_engine, own_landing = _RESOURCES[settings.engine]
    resources: dict[str, Any] = {
        "engine": own_engine.from_settings(settings, supabase),
        "landing": own_landing.from_settings(settings, supabase),
        "supabase": supabase or SupabaseResource.from_settings(settings),
    }
    if engine is not None:
        resources["engine"] = engine
    if landing is not None:
        resources["landing"] = landing
    names = None if engine is None else engine.names
    maintenance = maintenance_job([*streams, *tables], retry_policy)
    return dg.Definitions.merge(
        *(file_stream_definitions(stream, settings, names, retry_policy) for stream in streams),
        replicated_table_definitions(tables, settings, names, retry_policy),
        dg.Definitions(
            jobs=[maintenance],
            schedules=[maintenance_schedule(maintenance)],
            resources=resources,
            executor=executor,
        ),
    )


defs = build_definitions()
