"""Landing and reconciliation by plain obstore, json and deltalake, and the engine that is held against them."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable

import obstore
from deltalake import DeltaTable

from telematics_assets.catalog import FileStream, Names, TableContract
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.volumes.objects import PATIENCE_SECONDS, ObjectVolume, open_store

NAMES = Names()
LOCATION = NAMES.volume_location
#: Batches are small, so that one load has several.
STREAM = FileStream("s", "json", "json", "s", TableContract("Rows."), {"max_files_per_trigger": 4})  # type: ignore[arg-type]


def engine_of(
    place: str, *, patience_seconds: float = PATIENCE_SECONDS, on_step: Callable[[str], None] | None = None
) -> EmbeddedEngine:
    """The embedded engine over a place."""
    return EmbeddedEngine(
        ObjectVolume(f"{place}{LOCATION}", LOCATION, patience_seconds=patience_seconds),
        DeltaLakehouse(f"{place}/tables"),
        NAMES,
        settle_seconds=0,
        incomplete_seconds=0,
        on_step=on_step,
    )


def land(place: str, wave: int, files: int = 6, rows: int = 5) -> None:
    """Land files whose rows carry a number that is unique over all waves; one has a column of its own."""
    store = open_store(place)
    for number in range(files):
        values = [wave * 1_000_000 + number * 1000 + row for row in range(rows)]
        extra = {"later": "x"} if number == 5 else {}
        data = "".join(json.dumps({"n": value, **extra}) + "\n" for value in values).encode()
        obstore.put(store, f"{LOCATION[1:]}/json/w{wave}-{number}.json", data)


def books(place: str) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Every number that was landed, and every number that the table holds."""
    store = open_store(place)
    landed: collections.Counter[str] = collections.Counter()
    for entry in store.list(f"{LOCATION[1:]}/json").collect():
        lines = bytes(store.get(entry["path"]).bytes()).splitlines()
        landed.update(str(json.loads(line)["n"]) for line in lines)
    table = DeltaTable(f"{place}/tables/workspace/01_bronze/s")
    return landed, collections.Counter(table.to_pyarrow_table(columns=["n"])["n"].to_pylist())
