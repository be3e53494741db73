"""The platforms as fixtures. A case asks for the least that it needs.

Belongs here: `platform`, `checkpoint_platform`, `delta_platform`, `replica_platform`. Does not belong here: what they
are (`platforms.py`, `replicas.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from telematics_assets_tests.conformance.platforms import (
    CHECKPOINT_PLATFORMS,
    DELTA_PLATFORMS,
    PLATFORMS,
    CheckpointPlatform,
    DeltaPlatform,
    Platform,
)
from telematics_assets_tests.conformance.replicas import REPLICA_PLATFORMS, ReplicaPlatform
from telematics_assets_tests.databases import Database
from telematics_assets_tests.turns import SPARINGLY


def _each(platforms: Iterable[str]) -> list[object]:
    """The names; a short run takes one variation of each case in memory and on Spark, and all of them on embedded."""
    marks = {"memory": [SPARINGLY], "spark": [pytest.mark.spark, SPARINGLY]}
    return [pytest.param(name, marks=marks.get(name, ())) for name in platforms]


@pytest.fixture(params=_each(PLATFORMS))
def platform(request: pytest.FixtureRequest, tmp_path: Path) -> Platform:
    """Every engine."""
    return PLATFORMS[request.param](tmp_path)


@pytest.fixture(params=_each(CHECKPOINT_PLATFORMS))
def checkpoint_platform(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointPlatform:
    """Engines that share our checkpoint."""
    return CHECKPOINT_PLATFORMS[request.param](tmp_path)


@pytest.fixture(params=_each(DELTA_PLATFORMS))
def delta_platform(request: pytest.FixtureRequest, tmp_path: Path) -> DeltaPlatform:
    """Engines that share our checkpoint and keep Delta tables in a local folder."""
    return DELTA_PLATFORMS[request.param](tmp_path)


@pytest.fixture(params=_each(REPLICA_PLATFORMS))
def replica_platform(request: pytest.FixtureRequest, tmp_path: Path, database: Database) -> ReplicaPlatform:
    """Every engine, beside a real database."""
    return REPLICA_PLATFORMS[request.param](tmp_path, database)
