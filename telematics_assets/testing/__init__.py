"""Resources for tests: the real loader in memory, and a real PostgreSQL behind a transaction pooler on loopback.

Belongs here: what users import into their own tests. Does not belong here: our own test cases.

    engine = MemoryEngine()
    engine.volume.put("parquet/a.parquet", parquet_bytes({"vehicle_id": ["v1"]}))
    report = engine.ingest(stream)

    with LocalPostgres(folder) as server, TransactionPooler(lambda: server.port) as pooler:
        supabase = Supabase(pooler.host, pooler.user("postgres"), server.password, pooler.port, sslmode="disable")
"""

from telematics_assets.testing.memory import MemoryEngine, MemoryLakehouse, json_bytes, parquet_bytes
from telematics_assets.testing.pooler import TransactionPooler
from telematics_assets.testing.postgres import LocalPostgres
from telematics_assets.testing.source import MemorySource
from telematics_assets.volumes.memory import MemoryVolume

__all__ = [
    "LocalPostgres",
    "MemoryEngine",
    "MemoryLakehouse",
    "MemorySource",
    "MemoryVolume",
    "TransactionPooler",
    "json_bytes",
    "parquet_bytes",
]
