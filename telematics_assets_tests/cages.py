"""Processes that are killed when they take more than 1 GiB of memory.

Belongs here: the fixture that tests of memory begin their commands with.
Does not belong here: test cases.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

LIMIT_MIB = 1024


@pytest.fixture
def caged() -> Iterator[list[str]]:
    """What a command begins with to be killed when it takes more than the limit; nothing if that is not to be had."""
    for root, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup", root, f"telematics-{uuid.uuid4().hex}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(LIMIT_MIB << 20))
            yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
            return
        except FileNotFoundError:
            continue
        finally:
            with suppress(OSError):
                group.rmdir()
    yield []
