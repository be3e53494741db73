"""A loader as a process of its own, which kills itself at a step.

`python -m … HOME FORMAT [--full-refresh] [STEP OCCURRENCE]`
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
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


def load_and_perhaps_die(load: Callable[[Callable[[str], None]], int], fate: Sequence[str]) -> None:
    """Say so, load, and say how many rows; SIGKILL at the named step for the nth time if one is given.

    Args:
        load: Loads, calls what it is given with each step, and says how many rows.
        fate: Nothing, or a step and a number.
    """
    left = int(fate[1]) if fate else -1

    def on_step(step: str) -> None:
        nonlocal left
        if fate and step == fate[0]:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    rows = load(on_step)
    sys.stdout.write(f"{rows}\n")
    sys.stdout.flush()


def main() -> None:
    """Load once; SIGKILL at the named step if one is given."""
    request = IngestRequest(full_refresh="--full-refresh" in sys.argv)
    home, format, *fate = [argument for argument in sys.argv[1:] if argument != "--full-refresh"]
    load_and_perhaps_die(lambda on_step: engine_of(Path(home), on_step).ingest(stream_of(format), request).rows, fate)


if __name__ == "__main__":
    main()
