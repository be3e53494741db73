"""Prepares the folder that holds Dagster's own state.

Belongs here: creating `DAGSTER_HOME` once, completely, by one process.
Does not belong here: what Dagster does with it, starting Dagster (`cli.py`, the Makefile).

Two processes that open a fresh folder at once leave it broken for good: whoever starts Dagster calls this first.

https://docs.dagster.io/deployment/oss/oss-instance-configuration
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from telematics_assets.errors import SettingsError

_RUNS_PER_POOL = 1


def prepare_dagster_home(home: Path, pools: Iterable[str] = ()) -> Path:
    """Make a folder usable as `DAGSTER_HOME`; one that is usable already keeps what it has.

    Args:
        home: The folder; its parents are created as well.
        pools: Pools to give their limit of one run. Dagster doesn't enforce its default limit in a pool's first runs.

    Returns:
        The absolute path to export as `DAGSTER_HOME`.

    Raises:
        SettingsError: If the folder can't be created or written.
    """
    from dagster import DagsterInstance

    home = Path(os.path.abspath(home))
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _alone(home):
            config = home / "dagster.yaml"
            if not config.exists():
                template = files("telematics_assets").joinpath("dagster.yaml").read_text(encoding="utf-8")
                # Another process must never read half of it.
                written = config.with_suffix(".yaml.tmp")
                written.write_text(template, encoding="utf-8")
                written.replace(config)
            with DagsterInstance.from_config(str(home)) as instance:
                # Each store makes its database when it is first asked something.
                instance.get_runs_count()
                instance.all_instigator_state()
                known = {limit.name for limit in instance.event_log_storage.get_pool_limits() if not limit.from_default}
                for pool in pools:
                    if pool not in known:
                        instance.event_log_storage.set_concurrency_slots(pool, _RUNS_PER_POOL)
    except OSError as error:
        raise SettingsError(
            f"DAGSTER_HOME={str(home)!r} can't be used: {error}. Give a folder on a local disk that you may write to."
        ) from error
    return home


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        # Not on Windows; there, too, one process prepares before others open.
        yield
        return
    with (home / ".prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
