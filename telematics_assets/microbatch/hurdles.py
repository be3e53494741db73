"""What stands between us and the database: from a driver's error to its cause and its cure.

Belongs here: the list of hurdles, which of them pass by themselves, and trying again.
Does not belong here: wrong settings, which are seen before anything connects (`connection.py`), Dagster.

Ten failed logins within 150 seconds lock a user out for two minutes: a refused login is never tried again.

https://supabase.com/docs/guides/troubleshooting
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote, quote_plus

from telematics_assets.errors import SupabaseError, SupabaseUnavailableError
from telematics_assets.microbatch.connection import GET_CA, PASTE, Supabase

#: Pauses before another try, seconds.
RETRY_PAUSES = (0.5, 1.0, 2.0, 4.0)
#: No further try is begun after this many seconds.
RETRY_SECONDS = 60.0

_T = TypeVar("_T")
_LONGEST = 300
_NOISE = re.compile(r"^[A-Z_]+: |\[libpq\] |\. SQLSTATE: \w+$")
# What was asked is often longer than what is wrong with it, and stands before that.
_QUERY = re.compile(r"Failed to execute query '.*': (?=\w+:  )", re.DOTALL)
_ADDRESS = re.compile(r"allow_list: \{(\d+), (\d+), (\d+), (\d+)\}")
#: SQLSTATE classes and states that pass: connection, transaction rolled back, resources, operator, system.
_PASSING = ("08", "40", "53", "57", "58", "25P03", "25P04", "55P03")
_PAUSED = "A project that is paused must be restored on its page first"


@dataclass(frozen=True)
class _Hurdle:
    """One entry of the list.

    Attributes:
        words: What the server, the pooler or libpq says.
        cause: What that means; may name {user}, {role}, {place}, {host}, {database}, {ca}, {address}.
        fix: What to do.
        passes: Whether it may go through later.
        soon: Whether it may go through within seconds.
    """

    words: re.Pattern[str]
    cause: str
    fix: str
    passes: bool = False
    soon: bool = False


def _hurdle(words: str, cause: str, fix: str, *, passes: bool = False, soon: bool = False) -> _Hurdle:
    return _Hurdle(re.compile(words, re.IGNORECASE), cause, fix, passes or soon, soon)


#: The first that fits counts.
_HURDLES = (
    _hurdle(
        r"ECIRCUITBREAKER|too many authentication (errors|failures)",
        "The pooler has locked user {user} out after too many failed logins.",
        "Correct SUPABASE_PASSWORD or SUPABASE_DB_URL wherever it is used, wait two minutes, then try again.",
        passes=True,
    ),
    _hurdle(
        r"password authentication failed|EWRONGPASSWORD|SASL authentication failed|SQLSTATE: 28P01",
        "The password of user {user} is wrong. It was tried once: ten failed logins would lock the user out.",
        "Set the database's password (not the account's) in SUPABASE_PASSWORD or, percent-encoded, in SUPABASE_DB_URL; "
        "the project's page (Database Settings) resets a forgotten one.",
    ),
    _hurdle(
        r'EAUTHQUERY\) user not found|role "[^"]*" does not exist|no such user|is not permitted to log in',
        "There is no role {role} that may log in to the database.",
        "Correct SUPABASE_USER, or create the role: `telematics supabase sql` prints the statements.",
    ),
    _hurdle(
        r"ENOIDENTIFIER|no tenant identifier",
        "User {user} lacks the project reference that the pooler needs.",
        f"Set SUPABASE_USER to <role>.<project-ref>. {PASTE}",
    ),
    _hurdle(
        r"Tenant or user not found|ENOTFOUND|ETENANTNOTFOUND|tenant/user .* not found",
        "The pooler at {host} knows no project of user {user}: the host is another region's or cluster's, the project "
        "reference or the role is misspelt, or the project is paused.",
        f"Set SUPABASE_HOST and SUPABASE_USER. {PASTE} {_PAUSED}.",
    ),
    _hurdle(
        r"EBANNED|tenant is banned|project (is|has been) paused",
        "The project is paused or suspended.",
        "Restore it on its page, and look there for what was the reason.",
    ),
    _hurdle(
        r"EADDRNOTALLOWED|not in tenant allow_list",
        "The project's network restrictions do not let this machine in{address}.",
        "Add its address on the project's page: Database Settings, Network Restrictions.",
    ),
    _hurdle(
        r"ESSLREQUIRED|SSL connection is required|no pg_hba\.conf entry .*(SSL off|no encryption)|SSL required",
        "The project enforces SSL, and the connection was in clear.",
        "Set SUPABASE_SSLMODE=verify-full and SUPABASE_CA (or SUPABASE_SSLMODE=require).",
    ),
    _hurdle(
        r"no pg_hba\.conf entry|pg_hba\.conf rejects",
        "The server admits no such login: user {user}, database {database}, from this address.",
        "Correct SUPABASE_USER and SUPABASE_DATABASE, or let this address in: Database Settings, Network Restrictions.",
    ),
    _hurdle(
        r"does not support SSL",
        "What answers at {place} does not speak TLS.",
        "Correct SUPABASE_HOST and SUPABASE_PORT. A server on loopback may go without: SUPABASE_SSLMODE=disable.",
    ),
    _hurdle(
        r"does not match host name",
        "The certificate that {place} shows is another host's.",
        f"Set SUPABASE_HOST as the project's page has it: no address, no alias of your own. {PASTE}",
    ),
    _hurdle(
        r"certificate verify failed|self.signed certificate|unable to get (local )?issuer",
        "The certificate that {place} shows is not signed by {ca}: it is the wrong CA, or somebody stands in between.",
        GET_CA,
    ),
    _hurdle(
        r"root certificate (file|store)|could not read root certificate|no certificate or crl found",
        "The CA's certificate can't be read: {ca}.",
        GET_CA,
    ),
    _hurdle(
        r"invalid response to SSL negotiation|expected authentication request|invalid length of startup",
        "What answers at {place} is no PostgreSQL: a web server, or a firewall that answers in its place.",
        f"Correct SUPABASE_HOST and SUPABASE_PORT, and let this machine out to that port. {PASTE}",
    ),
    _hurdle(
        r"Temporary failure in name resolution|EAI_AGAIN|Try again",
        "The name {host} can't be looked up at the moment.",
        "Look at this machine's network and DNS.",
        soon=True,
    ),
    _hurdle(
        r"could not translate host name|failed to resolve host|Name or service not known|nodename nor servname",
        "There is no address of {host}: it is misspelt, or has IPv6 only and this machine has not.",
        f"Set SUPABASE_HOST. {PASTE}",
    ),
    _hurdle(
        r"connection refused",
        "Nothing listens at {place}.",
        "Correct SUPABASE_HOST and SUPABASE_PORT (6543 is the transaction pooler), or wait until the server is up.",
        soon=True,
    ),
    _hurdle(
        r"timeout expired|connection timed out|connection timeout",
        "{place} does not answer: a firewall drops the connection, or the project is restarting.",
        "Let this machine out to that host and port (TCP), and look at the project's page. " + _PAUSED + ".",
        passes=True,
    ),
    _hurdle(
        r"no route to host|network is unreachable|cannot assign requested address",
        "This machine's network has no way to {place}.",
        "Look at its network; an IPv6 address needs IPv6, which the pooler's host does not.",
        passes=True,
    ),
    _hurdle(
        r"EMAXCONN|EMAXCLIENT|EMAXPROXYCONN|ECHECKOUTTIMEOUT|MaxClientsInSessionMode|max pools count"
        r"|max client connections|unable to check ?out|remaining connection slots|too many (clients|connections)"
        r"|no more connections allowed|query_wait_timeout",
        "The pool of connections is exhausted: others hold them all.",
        "Close clients that idle in transactions, or raise the pool size on the project's page (Database Settings, "
        "Connection pooling).",
        soon=True,
    ),
    _hurdle(
        r"statement timeout",
        "The server cancelled a statement that ran longer than it allows.",
        "Raise the limit of the role: ALTER ROLE {role} SET statement_timeout = '10min'.",
        passes=True,
    ),
    _hurdle(
        r"query[ _]timeout",
        "The pooler ended a query that ran longer than it allows.",
        "Raise the pooler's own query_timeout (PgBouncer's setting; no ALTER ROLE changes it).",
        passes=True,
    ),
    _hurdle(
        r"lock timeout|could not obtain lock",
        "Another transaction holds a lock on the table, as ALTER TABLE and TRUNCATE do until they commit.",
        "Wait until it ends, or end it.",
        passes=True,
    ),
    _hurdle(
        r"conflict with recovery|due to user request|deadlock detected|could not serialize|out of memory|No space left",
        "The server cancelled the batch: it is short of memory or disk, or was told to.",
        "Look at the project's page (Reports), and try again.",
        passes=True,
    ),
    _hurdle(
        r"row.level security policy",
        "Policies (row level security) would hide rows from role {role}, so that they look deleted.",
        "Run as the database's owner: ALTER ROLE {role} BYPASSRLS. `telematics supabase sql` prints it.",
    ),
    _hurdle(
        r"permission denied",
        "Role {role} may not do that.",
        "`telematics supabase sql` prints the grants that it needs; run them as the database's owner.",
    ),
    _hurdle(
        r'database "[^"]*" does not exist',
        "There is no database {database}.",
        "Set SUPABASE_DATABASE, which is postgres at Supabase.",
    ),
    _hurdle(
        r"EDBHANDLEREXITED|DbHandler exited|connection to database closed|Failed to connect to database|EAUTHQUERY"
        r"|server closed the connection|terminating connection|server conn(ection)? crashed|connection.*lost"
        r"|no connection to the server|SSL connection has been closed|SSL SYSCALL|could not (receive|send) data"
        r"|the database system is|server_login_retry|connection reset|broken pipe|unexpected EOF|insufficient data"
        r"|pooler (is|error).*(shut|down)|the connection is closed|consuming input failed",
        "The connection to {place} was lost: the server or the pooler restarted, or the network failed.",
        f"Nothing was committed; the next run goes on where this one began. {_PAUSED}.",
        soon=True,
    ),
)


def explain(error: BaseException, supabase: Supabase) -> SupabaseError | SupabaseUnavailableError:
    """What a driver's error means, and whether trying again can help.

    Args:
        error: An error of ADBC, psycopg or Arrow.
        supabase: The connection; what it keeps secret is kept out of the message.
    """
    # What was asked may have words of any hurdle.
    message = _QUERY.sub("", str(error))
    said = _scrubbed(message, supabase)
    state = getattr(error, "sqlstate", None) or ""
    address = _ADDRESS.search(said)
    words = {
        "user": supabase.user,
        "role": supabase.role,
        "host": supabase.host,
        "place": supabase.place,
        "database": supabase.database,
        "ca": "any CA that this machine knows" if supabase.ca is None else str(supabase.ca),
        "address": f" ({'.'.join(address.groups())})" if address else "",
    }
    for hurdle in _HURDLES:
        # A password may be a word of the message: what is shown is not what is understood.
        if hurdle.words.search(message):
            cause = f"{hurdle.cause.format(**words)} ({_short(said)})"
            fix = hurdle.fix.format(**words)
            return (
                SupabaseUnavailableError(cause, fix, soon=hurdle.soon) if hurdle.passes else SupabaseError(cause, fix)
            )
    cause = f"The database at {supabase.place} refused{f' ({state})' if state else ''}: {_short(said)}"
    # While rows are streamed an error comes without its state: what the server itself complains of stays.
    if state.startswith(_PASSING) or (isinstance(error, OSError) and "ERROR:" not in said):
        return SupabaseUnavailableError(cause, "Try again.")
    return SupabaseError(cause, "`telematics doctor` looks at the connection and the role.")


def retried(
    action: Callable[[], _T], pauses: Sequence[float] = RETRY_PAUSES, sleep: Callable[[float], None] = time.sleep
) -> _T:
    """What an action answers, tried again with growing pauses while that may help within seconds.

    Args:
        action: Opens something; has no effect if it fails.
        pauses: How long to wait before each further try, seconds.
        sleep: Waits.

    Raises:
        SupabaseError: As the action does; a refused login is never tried again.
        SupabaseUnavailableError: If the last try failed as well.
    """
    deadline = time.monotonic() + RETRY_SECONDS
    for tried, pause in enumerate((*pauses, 0.0), 1):
        try:
            return action()
        except SupabaseUnavailableError as error:
            failure = error
        if not failure.soon or tried > len(pauses) or time.monotonic() + pause > deadline:
            break
        sleep(pause)
    if tried > 1:
        failure = SupabaseUnavailableError(f"{failure.cause} It was tried {tried} times.", failure.fix)
    raise failure


def _scrubbed(text: str, supabase: Supabase) -> str:
    secret = supabase.password
    forms = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), repr(secret)[1:-1]}
    # One form may be a piece of another.
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "…")
    return text


def _short(said: str) -> str:
    """The gist of what was said, on one line."""
    text = _NOISE.sub("", _NOISE.sub("", said.partition("\nQuery was:")[0].strip()))
    text = " ".join(text.removeprefix("Failed to connect: ").split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
