"""The way to the database: what a connection needs, and what is no way to it.

Belongs here: the connection's parameters, from whatever users have in hand, checked before anything connects.
Does not belong here: the environment (`settings.py`), what goes wrong afterwards (`hurdles.py`), the connection itself
(`session.py`), Dagster.

https://supabase.com/docs/guides/database/connecting-to-postgres
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import parse_qsl, quote, unquote

from telematics_assets.errors import SettingsError

SslMode = Literal["disable", "require", "verify-ca", "verify-full"]

#: Ports of Supabase's pooler.
TRANSACTION_PORT = 6543
SESSION_PORT = 5432
#: The variables that describe the connection, by the part that they give.
PARTS: Mapping[str, str] = {
    "url": "SUPABASE_DB_URL",
    "host": "SUPABASE_HOST",
    "port": "SUPABASE_PORT",
    "user": "SUPABASE_USER",
    "password": "SUPABASE_PASSWORD",
    "database": "SUPABASE_DATABASE",
    "sslmode": "SUPABASE_SSLMODE",
    "ca": "SUPABASE_CA",
    "connections": "SUPABASE_CONNECTIONS",
}
#: The parts that hold a secret.
SECRET_PARTS = ("url", "password")
_OPTIONAL = {"port": str(TRANSACTION_PORT), "database": "postgres", "sslmode": "verify-full", "ca": ""}
#: Connections that read a large table together: as many if nothing is said, and more than there are processors would
#: only wait for them; and as many at most.
_CONNECTIONS, _MOST_CONNECTIONS = 4, 32

PASTE = "Copy it from the project's page: Connect, Transaction pooler (aws-<N>-<region>.pooler.supabase.com)."
GET_CA = "Download the certificate from the project's page (Database Settings, SSL Configuration) and set SUPABASE_CA."
#: What to do where nothing is configured.
NOT_CONFIGURED = (
    "Set SUPABASE_DB_URL (postgresql://<role>.<project-ref>:<password>@<pooler host>:6543/postgres) and SUPABASE_CA to "
    "replicate a Supabase database."
)

_API_HOST = re.compile(r"(?:https?://)?([a-z0-9]{15,25})\.supabase\.(?:co|in)(?:[:/].*)?", re.IGNORECASE)
_DIRECT_HOST = re.compile(r"db\.([a-z0-9]{15,25})\.supabase\.(?:co|in)", re.IGNORECASE)
_POOLER_HOST = re.compile(r"[a-z0-9-]+\.pooler\.supabase\.com", re.IGNORECASE)
_HOST = re.compile(r"[\w.-]+", re.ASCII)
_LOCATION = re.compile(r"(\[[^\[\]]*\]|[^:/?#\[\]]*)(?::([^/?#]*))?(?:/([^?#]*))?(?:\?([^#]*))?")
_BAD_CODE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PLACEHOLDER = re.compile(r"\[?YOUR-PASSWORD\]?|\[YOUR-[A-Z-]+\]|\[PASSWORD\]", re.IGNORECASE)
#: What other tools add to the URL; it means nothing to us and does no harm.
_FOREIGN_OPTIONS = {"pgbouncer", "connection_limit", "pool_timeout", "connect_timeout", "application_name", "schema"}


@dataclass(frozen=True, slots=True)
class Supabase:
    """Where the database is and who we are there.

    Attributes:
        host: Host of the pooler.
        user: `role.project-ref` at a pooler of Supabase.
        password: Never shown.
        port: 6543 is the transaction pooler.
        database: The database.
        sslmode: `verify-full` with the project's CA; `require` at least. On loopback `disable` is accepted.
        ca: File with the CA's certificate; the machine's own CAs if None.
        connect_seconds: How long one address of the host may take to answer.
        silence_seconds: How long an answer may take before it is looked whether the server is still at work for it.
        connections: How many connections of the pooler a batch may take; more than one for large tables only.
    """

    host: str
    user: str
    password: str = field(repr=False)
    port: int = TRANSACTION_PORT
    database: str = "postgres"
    sslmode: SslMode = "verify-full"
    ca: Path | None = None
    connect_seconds: int = 10
    silence_seconds: float = 300.0
    connections: int = field(default_factory=lambda: _usual_connections())

    def __post_init__(self) -> None:
        if not 1 <= self.connections <= _MOST_CONNECTIONS:
            raise SettingsError(
                f"SUPABASE_CONNECTIONS={self.connections} is not accepted. Give a number from 1 to "
                f"{_MOST_CONNECTIONS}: how many connections of the pooler a batch may take."
            )
        self._check_host()
        self._check_login()
        self._check_tls()

    def _check_host(self) -> None:
        host = self.host
        if api := _API_HOST.fullmatch(host):
            raise SettingsError(
                f"SUPABASE_HOST={host!r} is the address of project {api[1]}'s API, where no database answers. "
                f"Give the pooler's host. {PASTE}"
            )
        if direct := _DIRECT_HOST.fullmatch(host):
            raise SettingsError(
                f"SUPABASE_HOST={host!r} is the direct address of project {direct[1]}'s database, which has IPv6 only "
                f"and no shared pooler. Give the pooler's host. {PASTE}"
            )
        if not _HOST.fullmatch(host) and not _is_address(host):
            raise SettingsError(f"SUPABASE_HOST={host!r} is no host name. Give the pooler's host. {PASTE}")
        if not 0 < self.port < 65536:
            raise SettingsError(f"SUPABASE_PORT={self.port} is no port. The transaction pooler has {TRANSACTION_PORT}.")
        if _POOLER_HOST.fullmatch(host) and self.port == SESSION_PORT:
            raise SettingsError(
                f"SUPABASE_PORT={SESSION_PORT} of {host} is the session pooler, which keeps a connection of the "
                f"database for as long as a client is there. Micro-batches use the transaction pooler: "
                f"SUPABASE_PORT={TRANSACTION_PORT}. (Lakehouse Federation is what needs {SESSION_PORT}.)"
            )

    def _check_login(self) -> None:
        for part in ("user", "password", "database"):
            text = getattr(self, part)
            if not text:
                raise SettingsError(f"The Supabase connection lacks {PARTS[part]}. {NOT_CONFIGURED}")
            if not text.isprintable():
                raise SettingsError(f"{PARTS[part]} holds a control character. Set it again, on one line.")
        if _PLACEHOLDER.search(self.password) or _PLACEHOLDER.search(self.user):
            raise SettingsError(
                "The Supabase connection still holds a placeholder such as [YOUR-PASSWORD]. Put the database's "
                "password in its place; the project's page (Database Settings) resets a forgotten one."
            )
        if _POOLER_HOST.fullmatch(self.host):
            role, dot, project = self.user.rpartition(".")
            if not dot or not role or not project:
                raise SettingsError(
                    f"SUPABASE_USER={self.user!r} lacks the project reference that the pooler needs: "
                    f"<role>.<project-ref>, such as {self.user.strip('.')}.abcdefghijklmnopqrst. {PASTE}"
                )

    def _check_tls(self) -> None:
        accepted = get_args(SslMode)
        if self.sslmode not in accepted:
            raise SettingsError(
                f"SUPABASE_SSLMODE={self.sslmode!r} is not accepted. Use one of: {', '.join(reversed(accepted))}; "
                "disable on loopback only."
            )
        if self.sslmode == "disable" and not self.is_loopback:
            raise SettingsError(
                f"SUPABASE_SSLMODE='disable' is accepted on loopback only, and {self.host} is not. Use verify-full "
                "with the project's CA (SUPABASE_CA), or require."
            )
        if self.ca is not None and not self.ca.is_file():
            raise SettingsError(f"SUPABASE_CA={str(self.ca)!r} is no file. {GET_CA}")
        if self.ca is None and self.sslmode.startswith("verify") and _POOLER_HOST.fullmatch(self.host):
            raise SettingsError(
                f"SUPABASE_SSLMODE={self.sslmode!r} needs the CA of Supabase, which no machine knows by itself. "
                f"{GET_CA} SUPABASE_SSLMODE=require encrypts without knowing who answers."
            )

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine."""
        return self.host == "localhost" or (_is_address(self.host) and ip_address(self.host.strip("[]")).is_loopback)

    @property
    def role(self) -> str:
        """The role in the database: the user without the project reference."""
        return self.user.rpartition(".")[0] or self.user

    @property
    def place(self) -> str:
        """Host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host.strip("[]") else f"{self.host}:{self.port}"

    def parameters(self) -> dict[str, str]:
        """Libpq's parameters; what its own environment variables would change is said as well."""
        given = {
            "host": self.host.strip("[]"),
            "port": str(self.port),
            "user": self.user,
            "password": self.password,
            "dbname": self.database,
            "sslmode": self.sslmode,
            "connect_timeout": str(self.connect_seconds),
            "application_name": "telematics_assets",
            "client_encoding": "UTF8",
            "target_session_attrs": "any",
            # A pooler refuses start-up options, and knows nothing of Kerberos.
            "options": "",
            "gssencmode": "disable",
            # A network that died without a word is noticed within two minutes, also in the middle of a COPY.
            "keepalives_idle": "30",
            "keepalives_interval": "15",
            "keepalives_count": "4",
            "tcp_user_timeout": "90000",
        }
        if self.sslmode.startswith("verify"):
            given["sslrootcert"] = "system" if self.ca is None else str(self.ca)
            if self.ca is None:
                # libpq has it that the machine's own CAs are only used for the strictest check.
                given["sslmode"] = "verify-full"
        return given

    def uri(self) -> str:
        """The same as one text, for ADBC. It holds the password: never show it."""
        # All as query: a password in the place of a password must not be empty, a host may be an address.
        return "postgresql://?" + "&".join(f"{key}={quote(value, safe='')}" for key, value in self.parameters().items())


def resolve(parts: Mapping[str, str]) -> Supabase | None:
    """The connection that the parts describe, or None if nothing is given.

    A part may stand in the URL or by itself; in both only if they say the same.

    Args:
        parts: Texts by the keys of `PARTS`; empty or absent is not given.

    Raises:
        SettingsError: If they describe no connection. The message holds neither the URL nor the password.
    """
    given = {key: text for key in PARTS if (text := _trimmed(key, parts.get(key, "")))}
    url = given.pop("url", "")
    for key, text in (_url_parts(url) if url else {}).items():
        if given.setdefault(key, text) != text:
            raise SettingsError(
                f"{PARTS['url']} and {PARTS[key]} say different things. Set one of them, or the same in both."
            )
    if not given.keys() - {"connections"}:
        return None
    missing = [PARTS[key] for key in ("host", "user", "password") if key not in given]
    if missing:
        raise SettingsError(f"The Supabase connection lacks {' and '.join(missing)}. {NOT_CONFIGURED}")
    given = _OPTIONAL | {"connections": str(_usual_connections())} | given
    try:
        port = int(given["port"])
    except ValueError:
        raise SettingsError(f"SUPABASE_PORT is no number. The transaction pooler has {TRANSACTION_PORT}.") from None
    try:
        connections = int(given["connections"])
    except ValueError:
        raise SettingsError(
            f"SUPABASE_CONNECTIONS={given['connections']!r} is no number. Give one from 1 to {_MOST_CONNECTIONS}."
        ) from None
    return Supabase(
        host=given["host"],
        user=given["user"],
        password=given["password"],
        port=port,
        database=given["database"],
        sslmode=cast(SslMode, given["sslmode"]),
        ca=Path(given["ca"]).expanduser().absolute() if given["ca"] else None,
        connections=connections,
    )


def _usual_connections() -> int:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_CONNECTIONS, here)


def _trimmed(key: str, text: str) -> str:
    # A password may begin or end with a blank; the end of a line comes from the file that it was kept in.
    return text.strip("\r\n") if key == "password" and text.strip() else text.strip()


def _url_parts(url: str) -> dict[str, str]:
    """The parts that a URL gives. Errors never repeat it: wherever it is cut, a piece may hold the password."""
    name = PARTS["url"]
    form = "postgresql://<role>.<project-ref>:<password>@<pooler host>:6543/postgres"
    scheme, separator, rest = url.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        raise SettingsError(
            f"{name} is a web address: that of the project's API or page, where no database answers. Give {form}. "
            f"{PASTE}"
        )
    if not separator or scheme.lower() not in ("postgres", "postgresql"):
        raise SettingsError(f"{name} is not accepted: it does not begin with postgresql://. Give {form}. {PASTE}")
    # Passwords with a raw @, / or # are common; the last @ is the one that counts.
    login, at, location = rest.rpartition("@")
    found = _LOCATION.fullmatch(location)
    if not at or found is None:
        raise SettingsError(f"{name} is not accepted: there is no host after an @. Give {form}. {PASTE}")
    user, _, password = login.partition(":")
    host, port, database, query = found.groups(default="")
    parts = {
        "host": host.lower(),
        "port": port,
        "user": _decoded(user),
        "password": _decoded(password),
        "database": _decoded(database),
    }
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key in ("sslmode", "sslrootcert"):
            parts["sslmode" if key == "sslmode" else "ca"] = text
        elif key == "options":
            raise SettingsError(
                f"{name} holds options=, which the transaction pooler refuses. Take it out; the project reference "
                "belongs to the user: <role>.<project-ref>."
            )
        elif key not in _FOREIGN_OPTIONS:
            raise SettingsError(f"{name} holds the option {key!r}. Accepted are sslmode and sslrootcert.")
    return {key: text for key, text in parts.items() if text}


def _decoded(text: str) -> str:
    """A piece of a URL without percent codes."""
    try:
        if not _BAD_CODE.search(text):
            return unquote(text, errors="strict")
    except UnicodeDecodeError:
        pass
    raise SettingsError(
        f"{PARTS['url']} holds a '%' that begins no code. In a URL write it as %25, or give the password by itself in "
        f"{PARTS['password']}, as it is."
    )


def _is_address(host: str) -> bool:
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
