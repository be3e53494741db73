"""Debian's PgBouncer in transaction mode, where it is installed.

Belongs here: finding it, and running it for as long as a block lasts.
Does not belong here: test cases; the server behind it, certificates (`microbatch/test_tls.py`).
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from telematics_assets.testing.postgres import ordinary_user

LOG = "pgbouncer.log"
#: How long it may take to listen, seconds.
PATIENCE = 120.0
# It ends with the pipe that this process holds open, however the process ends.
_UNTIL_EOF = '"$@" <&- & server=$!; cat > /dev/null; kill -9 $server'


def pgbouncer() -> str | None:
    """The program, or None where it is not installed."""
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


@contextmanager
def bouncing(
    program: str, folder: Path, server_port: int, passwords: Mapping[str, str], settings: Mapping[str, object]
) -> Iterator[int]:
    """Run it on loopback, and give its port.

    Args:
        program: What `pgbouncer` found.
        folder: Where its files may lie; its log is `LOG`.
        server_port: Where the server listens on 127.0.0.1.
        passwords: Of each user.
        settings: Of the section `[pgbouncer]`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    fixed = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "pool_mode": "transaction",
        "auth_file": folder / "users",
    }
    lines = ["[databases]", f"* = host=127.0.0.1 port={server_port}", "[pgbouncer]"]
    lines += [f"{key} = {value}" for key, value in {**fixed, **settings}.items()]
    (folder / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
    (folder / "users").write_text("".join(f'"{user}" "{password}"\n' for user, password in passwords.items()))
    log = folder / LOG
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["sh", "-c", _UNTIL_EOF, "sh", *ordinary_user(), program, str(folder / "pgbouncer.ini")],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while "process up" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield port
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
