"""In-memory resources for tests: the real loader, assets and sensors without a disk.

Belongs here: what users import into their own tests. Does not belong here: our own test cases.

    engine = MemoryEngine()
    engine.volume.put("parquet/a.parquet", parquet_bytes({"vehicle_id": ["v1"]}))
    report = engine.ingest(stream)
"""

from telematics_assets.testing.memory import MemoryEngine, MemoryLakehouse, json_bytes, parquet_bytes
from telematics_assets.volumes.memory import MemoryVolume

__all__ = ["MemoryEngine", "MemoryLakehouse", "MemoryVolume", "json_bytes", "parquet_bytes"]
