"""Which process works on something, and whether it is provably gone.

Belongs here: an identity for a process that survives the re-use of its number, and the proof that its owner is dead.
Does not belong here: what follows from that (`automation.py`), Dagster.

A run whose process was killed stays STARTED: nobody is left to say otherwise. The run therefore notes its process, and
the sensor looks it up. Only a proof counts; everything doubtful (another machine, another container, a system that
can't be asked) is "perhaps alive".
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")


def process_identity(proc: Path = _PROC) -> str:
    """The identity of this process: machine, process namespace, number and start.

    Args:
        proc: Where the kernel describes processes.
    """
    pid = os.getpid()
    return f"{_place(proc)}/{pid}/{_started(pid, proc)}"


def is_gone(identity: str, proc: Path = _PROC) -> bool:
    """Whether the process of that identity is provably dead.

    Args:
        identity: What `process_identity` answered in that process.
        proc: Where the kernel describes processes.
    """
    place, _, rest = identity.partition("/")
    pid, _, started = rest.partition("/")
    if not started or not pid.isdigit() or place != _place(proc):
        return False
    return _started(int(pid), proc) != started


def _place(proc: Path) -> str:
    # Two containers may share a host name; their process numbers mean something only in their own namespace, and only
    # until the machine starts again.
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [os.readlink(proc / "self/ns/pid"), (proc / "sys/kernel/random/boot_id").read_text().strip()]
    return "|".join(parts).replace("/", "_")


def _started(pid: int, proc: Path) -> str:
    """When the process started, as far as the system tells; "gone" if there is none, "" if it can't be asked."""
    if (proc / "self/stat").exists():
        try:
            # The second field is the program's name in parentheses and may hold anything, so count from its end.
            fields = (proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return "gone"
        # A zombie does nothing any more; it only waits for a parent that may be dead as well.
        return "gone" if fields[0] in "ZX" else fields[19]
    if os.name != "posix":
        # Signal 0 is no harmless question there.
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass
    return "there"
