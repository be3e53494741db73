"""A loader as a process of its own, which kills itself at a step.

`python -m … HOME FORMAT [--full-refresh] [STEP OCCURRENCE]`
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from telematics_assets.catalog import FileStream, Names, TableContract
from telematics_assets.engines.base import IngestRequest
from telematics_assets.engines.embedded import EmbeddedEngine
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.volumes.local import LocalVolume

LOCATION = Names().volume_location


def stream_of(format: str) -> FileStream:
    """The stream that the kill tests load; small batches, so that one load has several."""
    name = f"kill_{format}"
    contract = TableContract("Rows for kill tests.")
    return FileStream(name, format, format, name, contract, {"max_files_per_trigger": 3})  # type: ignore[arg-type]


def engine_of(home: Path, on_step: object = None) -> EmbeddedEngine:
    """The embedded engine over a home folder."""
    volume = LocalVolume(home / LOCATION.lstrip("/"), LOCATION)
    return EmbeddedEngine(
        volume,
        DeltaLakehouse(home / "tables"),
        Names(),
        settle_seconds=0,
        incomplete_seconds=0,
        on_step=on_step,  # type: ignore[arg-type]
    )


def main() -> None:
    """Load once; SIGKILL at the named step if one is given."""
    refresh = "--full-refresh" in sys.argv
    home, format, *rest = [argument for argument in sys.argv[1:] if argument != "--full-refresh"]
    left = int(rest[1]) if rest else -1

    def on_step(step: str) -> None:
        nonlocal left
        if rest and step == rest[0]:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    report = engine_of(Path(home), on_step).ingest(stream_of(format), IngestRequest(full_refresh=refresh))
    sys.stdout.write(f"{report.rows}\n")


if __name__ == "__main__":
    main()
