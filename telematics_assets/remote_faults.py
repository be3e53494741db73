"""What the faults of servers mean, and how much of a URL may be shown.

Belongs here: this package's own errors for those of the libraries behind URLs, and texts that tell no secret.
Does not belong here: asking a server for anything (`remote.py`), what a Volume's store says (`volumes/`).
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Mapping
from urllib.parse import parse_qsl, unquote

from telematics_assets.errors import StagingError, TelematicsError, TransientError

#: Schemes in whose URLs the part before the `@` is a name, and no secret.
_PUBLIC = ("github", "abfss", "abfs", "az", "gs", "s3")
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_LIBRARIES = frozenset({"aiohttp", "requests", "urllib3"})
#: Characters that a terminal would obey.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_IN_TEXT = re.compile(r"(?<=://)[^/\s'\"]*@|\?[^\s'\")]*")


class PassingError(TransientError):
    """Raised when a server may answer next time."""

    def __init__(self, text: str, wait_seconds: float = 0.0) -> None:
        super().__init__(text)
        self.wait_seconds = wait_seconds


def shown(url: str) -> str:
    """A URL without what may be a secret."""
    return "::".join(_shown(part) for part in url.split("::"))


def printable(text: str) -> str:
    """A name that can be shown on any terminal."""
    plain = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", plain)


def _shown(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return printable(url)
    rest, query, _ = rest.partition("?")
    rest, fragment, _ = rest.partition("#")
    place, slash, path = rest.partition("/")
    user, at, host = place.rpartition("@")
    if scheme.lower() not in _PUBLIC:
        port = host.rpartition("]")[2].partition(":")[2]
        if not at and port and not port.isdigit():
            # Half of a password that holds a slash or the like; nobody knows where it ends.
            return f"{scheme}://…"
        user = "…" if at else ""
    hidden = f"{query}…" if query else f"{fragment}…" if fragment else ""
    return printable(f"{scheme}://{user}{at}{host}{slash}{path}{hidden}")


def secrets_of(url: str) -> frozenset[str]:
    """Every text in a URL that must not be shown, as it stands there and decoded."""
    found: set[str] = set()
    for part in url.split("::"):
        scheme, _, rest = part.partition("://")
        rest, _, query = rest.partition("?")
        user = rest.partition("/")[0].rpartition("@")[0]
        if user and scheme.lower() not in _PUBLIC:
            found |= {user, *user.split(":", 1)}
        if query:
            found |= {query, *(value for _, value in parse_qsl(query))}
    return frozenset(found | {unquote(text) for text in found}) - {""}


def _scrubbed(text: str, secrets: frozenset[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "…")
    return printable(" ".join(_IN_TEXT.sub("…", text).split()))[:300]


def told(error: BaseException, secrets: frozenset[str]) -> TelematicsError:
    """This package's own error for what a library said."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        # fsspec calls every web page missing that it can't ask for; what it was is below.
        error = error.__cause__
    answer = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(answer, "status_code", None)
    if isinstance(status, int) and status:
        return _answered(status, getattr(error, "headers", None) or getattr(answer, "headers", None) or {})
    if isinstance(error, FileNotFoundError):
        return StagingError("it does not exist there")
    if type(error).__name__ == "TooManyRedirects":
        return StagingError("it is redirected without end")
    if isinstance(error, PermissionError):
        return StagingError("reading it was refused; give credentials that may read it")
    if isinstance(error, ssl.SSLError | ssl.CertificateError):
        return StagingError(f"the server's certificate is not accepted: {_scrubbed(str(error), secrets)}")
    unknown_host = getattr(error, "os_error", error)
    if isinstance(unknown_host, socket.gaierror) and unknown_host.errno == socket.EAI_NONAME:
        return StagingError("there is no host of that name")
    said = f"{type(error).__name__}: {_scrubbed(str(error), secrets)}".rstrip(": ")
    if isinstance(error, TimeoutError):
        return PassingError("the server did not answer in time")
    of_the_way = {cls.__module__.partition(".")[0] for cls in type(error).__mro__} & _LIBRARIES
    if isinstance(error, ConnectionError | EOFError) or (of_the_way and not isinstance(error, ValueError)):
        return PassingError(f"the connection failed or was cut ({said})")
    return StagingError(f"it can't be read there ({said})")


def _answered(status: int, headers: Mapping[str, str]) -> TelematicsError:
    """What a status means."""
    after = headers.get("Retry-After") or ""
    limited = status == 403 and (after or headers.get("X-RateLimit-Remaining") == "0")
    if status in _PASSING or limited:
        return PassingError(f"the server answered {status}", float(after) if after.isdigit() else 0.0)
    if status in (404, 410):
        return StagingError("it does not exist there")
    if status in (401, 403, 407):
        return StagingError(f"the server refused access ({status}); give credentials that may read it")
    if 300 <= status < 400:
        return StagingError("it is redirected without end")
    return StagingError(f"the server answered {status}")
