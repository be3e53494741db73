"""What the tests of the Dagster rooms share: files of the shipped streams, and runs in memory.

Belongs here: builders. Does not belong here: test cases.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pyarrow as pa

from telematics_assets.catalog import FILE_STREAMS, Column, ReplicatedTable, TableContract
from telematics_assets.definitions import build_definitions
from telematics_assets.engines.base import Engine
from telematics_assets.settings import Settings
from telematics_assets.testing import MemoryEngine, MemorySource, json_bytes, parquet_bytes

POLICIES = ReplicatedTable(
    "public.policies",
    contract=TableContract(
        "One row per policy.",
        (Column("id", "BIGINT", "Number of the policy."), Column("holder", "STRING", "Who holds it.")),
        owners=("team:insurance",),
        tags={"layer": "bronze"},
    ),
)
CLAIMS = ReplicatedTable("public.claims", contract=TableContract("One row per claim.", owners=("team:insurance",)))

_ARROW = {
    "STRING": pa.string(),
    "TIMESTAMP": pa.timestamp("us", "UTC"),
    "DOUBLE": pa.float64(),
    "INT": pa.int32(),
    "BOOLEAN": pa.bool_(),
}


def point(number: int) -> dict[str, Any]:
    """One telematics point that fits the contract."""
    return {
        "vehicle_id": f"vehicle-{number % 3}",
        "chassis_no": "WVWZZZ1JZXW000001",
        "trip_id": f"trip-{number % 3}",
        "recorded_at": datetime(2026, 3, 1, 12, number % 60, tzinfo=UTC),
        "latitude": 48.1 + number / 1000,
        "longitude": 11.5 + number / 1000,
        "speed_kmh": 30.0 + number % 60,
        "heading_deg": 90.0,
        "acceleration_ms2": 0.5,
        "odometer_km": 1000.0 + number,
        "engine_rpm": 1500,
        "fuel_level_pct": 50.0,
        "ignition_on": True,
    }


def parquet_points(rows: int = 3, **columns: list[Any]) -> bytes:
    """A Parquet file of the stream `telematics`; some columns may be given."""
    declared = FILE_STREAMS[0].contract.columns
    points = [point(number) for number in range(rows)]
    table = pa.table(
        {
            column.name: pa.array(columns.pop(column.name, [p[column.name] for p in points]), _ARROW[column.type])
            for column in declared
        }
        | columns
    )
    return parquet_bytes(table)


def json_points(rows: int = 3, *extra: Any) -> bytes:
    """A file of the stream `telematics_test`, with more records or lines behind the regular ones."""
    points = [point(number) | {"device": {"model": "M1"}} for number in range(rows)]
    return json_bytes([{**p, "recorded_at": p["recorded_at"].isoformat()} for p in points] + list(extra))


def definitions_of(engine: MemoryEngine) -> dg.Definitions:
    """The shipped code location over an engine in memory, without waiting between retries."""
    return build_definitions(
        settings=Settings(), engine=engine, landing=engine.volume, retry_policy=dg.RetryPolicy(max_retries=1, delay=0)
    )


def load(
    engine: MemoryEngine,
    instance: dg.DagsterInstance,
    stream: str = "telematics",
    tags: dict[str, str] | None = None,
    **config: Any,
) -> dg.ExecuteInProcessResult:
    """Run a stream's job the way a sensor's request does, with run config of its bronze asset if there is any."""
    job = definitions_of(engine).resolve_job_def(f"load_{stream}")
    run_config = {"ops": {f"bronze__{stream}": {"config": config}}} if config else {}
    return job.execute_in_process(run_config=run_config, instance=instance, tags=tags, raise_on_error=False)


def materialization(result: dg.ExecuteInProcessResult, stream: str = "telematics") -> dg.AssetMaterialization:
    """The one materialization of a stream's bronze table in a run."""
    (event,) = result.asset_materializations_for_node(f"bronze__{stream}")
    return event


def insurer(policies: int = 3, claims: int = 2) -> MemoryEngine:
    """An engine in memory with a database of two tables."""
    source = MemorySource()
    source.put("public.policies", {"id": list(range(policies)), "holder": [f"holder-{n}" for n in range(policies)]})
    source.put("public.claims", {"id": list(range(claims)), "amount": [n / 2 for n in range(claims)]})
    return MemoryEngine(source=source)


def replicas_of(engine: Engine, *tables: ReplicatedTable, retries: int = 1) -> dg.Definitions:
    """A code location of replicated tables alone, without waiting between retries."""
    return build_definitions(
        (),
        Settings(),
        engine,
        MemoryEngine().volume,
        retry_policy=dg.RetryPolicy(max_retries=retries, delay=0),
        tables=tables or (POLICIES, CLAIMS),
    )


def replicate(
    engine: Engine,
    instance: dg.DagsterInstance,
    *tables: ReplicatedTable,
    only: list[dg.AssetKey] | None = None,
    tags: dict[str, str] | None = None,
    **config: Any,
) -> dg.ExecuteInProcessResult:
    """Run the job of the replicated tables, or of some of them, with run config if there is any."""
    return (
        replicas_of(engine, *tables)
        .resolve_job_def("replicate")
        .execute_in_process(
            run_config={"ops": {"replicate_supabase": {"config": config}}} if config else {},
            instance=instance,
            asset_selection=only,
            tags=tags,
            raise_on_error=False,
        )
    )


def replicated(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetMaterialization]:
    """What a run materialized, by bronze table; the last one of each."""
    events = result.asset_materializations_for_node("replicate_supabase")
    return {event.asset_key.path[-1]: event for event in events}
