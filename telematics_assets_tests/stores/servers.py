"""Object stores on loopback for tests: Azurite and moto's S3, one of each per test process, started when first needed.

`azure()` and `s3()` give a URL that nobody else uses. The environment then holds what obstore, delta-rs and polars
read.
"""

from __future__ import annotations

import base64
import email.utils
import fcntl
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest

AZURITE = "azurite@3.35.0"
ACCOUNT = "devstoreaccount1"
#: The emulator's well-known key; it is no secret.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
CONTAINER = "telematics"

_HELD: list[subprocess.Popen[bytes]] = []
# The server ends with the pipe that this process holds open, however the process ends.
_UNTIL_EOF = '"$@" <&- & server=$!; cat > /dev/null; kill -9 $server'


def azure() -> str:
    """An empty place in Azurite: `abfss://…`."""
    port = _azurite()
    os.environ.update(azure_environment(port))
    return f"abfss://{CONTAINER}@{ACCOUNT}.dfs.core.windows.net/{uuid.uuid4().hex}"


def s3() -> str:
    """An empty place in moto's S3: `s3://…`."""
    port = _moto()
    os.environ.update(s3_environment(port))
    return f"s3://{CONTAINER}/{uuid.uuid4().hex}"


#: What makes an empty place, by the store's name.
PLACES = {"azure": azure, "s3": s3}


def azure_environment(port: int) -> Mapping[str, str]:
    """What the libraries read to reach Azurite at a port."""
    return {
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        "AZURE_ALLOW_HTTP": "true",
        # Azurite passes over the place where a listing is to begin; told that it is there, the libraries do that part.
        "AZURE_STORAGE_USE_EMULATOR": "true",
        "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}",
    }


def s3_environment(port: int) -> Mapping[str, str]:
    """What the libraries read to reach moto at a port."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


def port_of(store: str) -> int:
    """The port of a store's server."""
    return _azurite() if store == "azure" else _moto()


@cache
def _azurite() -> int:
    script = _installed_azurite()
    flags = ["--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence", "--silent"]
    port = _serve(lambda port: ["node", str(script), "--blobHost", "127.0.0.1", "--blobPort", str(port), *flags])
    date = email.utils.formatdate(usegmt=True)
    told = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), ("PUT" + "\n" * 12 + told).encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": "2021-08-06",
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
    }
    _put(f"http://127.0.0.1:{port}/{ACCOUNT}/{CONTAINER}?restype=container", headers)
    return port


@cache
def _moto() -> int:
    port = _serve(lambda port: [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)])
    _put(f"http://127.0.0.1:{port}/{CONTAINER}", {})
    return port


def _put(url: str, headers: Mapping[str, str]) -> None:
    request = urllib.request.Request(url, method="PUT", headers={**headers, "Content-Length": "0"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status in (200, 201)


def _serve(command: Callable[[int], list[str]]) -> int:
    """Start a server at a free port and wait until it answers."""
    for _ in range(5):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        process = subprocess.Popen(
            ["sh", "-c", _UNTIL_EOF, "server", *command(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        _HELD.append(process)
        patience = time.monotonic() + 60
        while time.monotonic() < patience:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return port
        assert process.stdin is not None
        process.stdin.close()
    raise AssertionError(f"{command(0)} does not answer")


@cache
def _installed_azurite() -> Path:
    """Azurite's script; npm installs it beside this environment's packages when it is not there."""
    folder = Path(sys.prefix) / "share" / AZURITE
    script = folder / "node_modules/azurite/dist/src/blob/main.js"
    if script.exists():
        return script
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is missing: tests against Azure need Node.js 20 or newer")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        # Other test processes wait until it is there.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not script.exists():
            made = folder / f"{uuid.uuid4().hex}.new"
            options = ["--no-audit", "--no-fund", "--no-save", "--ignore-scripts", "--omit=dev", "--loglevel=error"]
            subprocess.run([npm, "install", "--prefix", made, *options, AZURITE], check=True, capture_output=True)
            (made / "node_modules").rename(folder / "node_modules")
            shutil.rmtree(made, ignore_errors=True)
    return script
