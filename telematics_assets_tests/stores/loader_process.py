"""A loader of an object store as a process of its own: `python -m … PLACE [STEP OCCURRENCE]`; it may kill itself."""

from __future__ import annotations

import sys

from telematics_assets_tests.exactly_once.loader_process import load_and_perhaps_die
from telematics_assets_tests.stores.books import STREAM, engine_of


def main() -> None:
    """Load once; SIGKILL at the named step if one is given."""
    place, *fate = sys.argv[1:]
    load_and_perhaps_die(lambda on_step: engine_of(place, on_step=on_step).ingest(STREAM).rows, fate)


if __name__ == "__main__":
    main()
