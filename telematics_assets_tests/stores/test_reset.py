"""A reset in an object store, where nothing can be dropped in one step: it may die before any single deletion."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from telematics_assets.catalog import Names
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.errors import PermanentError
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.volumes import objects
from telematics_assets.volumes.objects import ObjectVolume, open_store
from telematics_assets_tests.exactly_once.dying import Death, DyingVolume
from telematics_assets_tests.exactly_once.test_kills import Killed
from telematics_assets_tests.stores import servers
from telematics_assets_tests.stores.books import LOCATION, STREAM, books, engine_of, land


class DyingStore:
    """An object store whose process dies; of a bulk deletion any part may be done by then."""

    def __init__(self, death: Death, chance: random.Random, url: str) -> None:
        self._store = open_store(url)
        self._death = death
        self._chance = chance

    def put(self, *arguments: Any, **more: Any) -> Any:
        self._death()
        return self._store.put(*arguments, **more)

    def delete(self, keys: list[str]) -> None:
        for key in self._chance.sample(keys, len(keys)):
            self._death()
            self._store.delete([key])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def rows_seen(place: str) -> int | None:
    """How many rows any other reader sees; None if it is refused."""
    try:
        rows: int = DeltaTable(f"{place}/tables/workspace/01_bronze/s").to_pyarrow_table().num_rows
    except DeltaError:
        return None
    return rows


@pytest.mark.parametrize("store", ["azure", pytest.param("s3", marks=pytest.mark.soak)])
def test_a_reset_that_dies_at_any_deletion_shows_no_table_with_holes_and_can_be_run_again(
    store: str, monkeypatch: pytest.MonkeyPatch, soak_factor: int
) -> None:
    place = servers.PLACES[store]()
    land(place, 0, files=2, rows=2)
    after, died, refused = 0, True, 0
    while died:
        engine_of(place).ingest(STREAM)
        table = DeltaTable(f"{place}/tables/workspace/01_bronze/s")
        # Entries without their beginning still open, for there are new properties and a new protocol behind it; the
        # data files of the versions before are gone.
        table.alter.set_table_properties({"delta.enableChangeDataFeed": "true"})
        table.optimize.compact()
        table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
        death = Death(after)
        monkeypatch.setattr(objects, "open_store", partial(DyingStore, death, random.Random(after)))
        lakehouse = DeltaLakehouse(f"{place}/tables")
        monkeypatch.undo()
        volume = DyingVolume(ObjectVolume(f"{place}{LOCATION}", LOCATION), death)
        dying = EmbeddedEngine(volume, lakehouse, Names(), settle_seconds=0, incomplete_seconds=0)
        try:
            dying.reset(STREAM, drop_table=True)
            died = False
        except Killed:
            # The first deaths come around the log's end, the others at deletions that are all alike.
            after += 1 if after < 4 else 6 if soak_factor > 1 else 12
        assert rows_seen(place) in (4, None)
        try:
            engine_of(place).ingest(STREAM)
        except PermanentError as error:
            refused += "telematics reset" in str(error)
            engine_of(place).reset(STREAM, drop_table=True)
            assert rows_seen(place) is None
            engine_of(place).ingest(STREAM)
        landed, loaded = books(place)
        assert landed == loaded
        engine_of(place).reset(STREAM, drop_table=True)
    assert refused > 3
