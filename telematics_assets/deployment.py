"""Which engine a deployment's settings mean.

Belongs here: the one place where an engine is chosen and made. Does not belong here: reading settings (`settings.py`),
what engines do (`engines/`), Dagster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from telematics_assets.engines.checkpointed import CheckpointEngine
    from telematics_assets.settings import Settings


def open_engine(settings: Settings) -> CheckpointEngine:
    """The engine of a deployment. It connects to nothing and starts nothing yet.

    Args:
        settings: The deployment.
    """
    # Readers and writers are heavy: what only names them must not import them.
    if settings.engine == "spark":
        from telematics_assets.engines.spark.engine import open_engine as open_spark

        return open_spark(settings)
    from telematics_assets.engines.embedded import open_engine as open_embedded

    return open_embedded(settings)
