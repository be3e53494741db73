"""What users have in hand, and the connection that comes of it; or an error that says what to put in its place."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import psycopg.conninfo
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.errors import SettingsError
from telematics_assets.microbatch.connection import PARTS, Supabase, resolve

REF = "abcdefghijklmnopqrst"
POOLER = "aws-1-eu-central-1.pooler.supabase.com"
HUSH = "hush-hush"
LOCAL = {"host": "127.0.0.1", "user": "reader.local", "password": HUSH, "sslmode": "disable"}
PRINTABLE = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Cf", "Zl", "Zp", "Zs", "Cn", "Co")), min_size=1)


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    file = tmp_path / "prod-ca.crt"
    file.write_text("a certificate")
    return file


def test_the_url_of_the_projects_page_is_enough_beside_the_ca(ca: Path) -> None:
    url = f"postgresql://postgres.{REF}:{HUSH}@{POOLER}:6543/postgres"

    assert resolve({"url": url, "ca": str(ca)}) == Supabase(
        POOLER, f"postgres.{REF}", HUSH, 6543, "postgres", "verify-full", ca
    )


def test_port_database_and_strictness_have_defaults(ca: Path) -> None:
    found = resolve({"host": POOLER, "user": f"reader.{REF}", "password": HUSH, "ca": str(ca)})

    assert found is not None
    assert (found.port, found.database, found.sslmode, found.role) == (6543, "postgres", "verify-full", "reader")


@pytest.mark.parametrize("parts", [{}, dict.fromkeys(PARTS, ""), dict.fromkeys(PARTS, " \n")])
def test_nothing_given_is_no_connection_and_no_error(parts: dict[str, str]) -> None:
    assert resolve(parts) is None


@pytest.mark.parametrize(
    "password", ["p%w", "50%", "%41", "a b", "a:b", "a@b", "a/b", "a?b#c", "ü€", "'\"\\", "=&;", "$PW", "{}", "[x]"]
)
def test_a_password_may_be_odd(password: str) -> None:
    url = f"postgresql://reader.local:{quote(password, safe='')}@127.0.0.1:6543/postgres?sslmode=disable"

    for parts in ({"url": url}, {**LOCAL, "password": password}):
        found = resolve(parts)
        assert found is not None
        assert found.password == password
        assert psycopg.conninfo.conninfo_to_dict(found.uri())["password"] == password
        assert password not in repr(found).replace(repr(found.user), "")


@given(password=PRINTABLE, user=PRINTABLE, database=PRINTABLE)
def test_whatever_is_percent_encoded_arrives_as_it_was(password: str, user: str, database: str) -> None:
    login = f"{quote(user, safe='')}:{quote(password, safe='')}"
    found = resolve({"url": f"postgres://{login}@[::1]:1/{quote(database, safe='')}", "sslmode": "disable"})

    assert found is not None
    told = psycopg.conninfo.conninfo_to_dict(found.uri())
    assert (told["user"], told["password"], told["dbname"]) == (user, password, database)
    assert (told["host"], told["port"]) == ("::1", "1")


@pytest.mark.parametrize("password", ["a@b", "a/b", "a#b", "a?b", "a:b", "@@", "a@b:c/d?e#f"])
def test_signs_that_nobody_encodes_are_taken_as_they_are(password: str) -> None:
    found = resolve({"url": f"postgresql://reader.local:{password}@127.0.0.1:6543/postgres?sslmode=disable"})

    assert found is not None
    assert (found.password, found.host) == (password, "127.0.0.1")


@pytest.mark.parametrize("url", ["50%", "100%zz", "%e4%"])
def test_a_percent_sign_that_begins_no_code_is_refused_with_the_way_out(url: str) -> None:
    with pytest.raises(SettingsError, match="write it as %25"):
        resolve({"url": f"postgresql://reader.local:{url}@127.0.0.1/postgres?sslmode=disable"})


@pytest.mark.parametrize(
    ("location", "host", "port"),
    [
        ("[2001:db8::7]:6543", "[2001:db8::7]", 6543),
        ("[::1]", "[::1]", 6543),
        ("LOCALHOST:7000", "localhost", 7000),
    ],
)
def test_a_host_may_be_an_address(location: str, host: str, port: int) -> None:
    found = resolve({"url": f"postgresql://reader:{HUSH}@{location}/postgres?sslmode=require"})

    assert found is not None
    assert (found.host, found.port) == (host, port)
    assert psycopg.conninfo.conninfo_to_dict(found.uri())["host"] == host.strip("[]")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_may_go_without_tls(host: str) -> None:
    found = resolve({**LOCAL, "host": host})

    assert found is not None
    assert found.is_loopback


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"host": f"{REF}.supabase.co"}, "is the address of project abcdefghijklmnopqrst's API"),
        ({"host": f"https://{REF}.supabase.co"}, "is the address of project abcdefghijklmnopqrst's API"),
        ({"host": f"https://{REF}.supabase.co/rest/v1/"}, "is the address of project abcdefghijklmnopqrst's API"),
        ({"host": f"db.{REF}.supabase.co"}, "direct address .* IPv6 only"),
        ({"host": "https://example.com"}, "is no host name"),
        ({"host": "postgresql://x"}, "is no host name"),
        ({"host": "two words"}, "is no host name"),
        ({"host": POOLER, "user": "postgres"}, "lacks the project reference"),
        ({"host": POOLER, "user": "postgres."}, "lacks the project reference"),
        ({"host": POOLER, "port": "5432"}, "is the session pooler.*SUPABASE_PORT=6543.*Federation"),
        ({"host": POOLER, "sslmode": "verify-full"}, "Download the certificate .*SUPABASE_SSLMODE=require"),
        ({"port": "x"}, "SUPABASE_PORT is no number. The transaction pooler has 6543"),
        ({"port": "0"}, "SUPABASE_PORT=0 is no port"),
        ({"port": "65536"}, "SUPABASE_PORT=65536 is no port"),
        ({"sslmode": "prefer"}, "Use one of: verify-full, verify-ca, require, disable"),
        ({"host": "db.example.com"}, "'disable' is accepted on loopback only"),
        ({"sslmode": "verify-full", "ca": "/nowhere/ca.crt"}, "SUPABASE_CA='/nowhere/ca.crt' is no file"),
        ({"password": "[YOUR-PASSWORD]"}, "placeholder"),
        ({"user": ""}, "lacks SUPABASE_USER"),
        ({"password": ""}, "lacks SUPABASE_PASSWORD"),
        ({"host": ""}, "lacks SUPABASE_HOST"),
        ({"password": "a\x00b"}, "control character"),
        ({"user": "a\nb"}, "control character"),
    ],
)
def test_what_is_no_way_to_the_database_is_told_with_the_way(changed: dict[str, str], words: str) -> None:
    parts = {**LOCAL, "user": f"postgres.{REF}", **changed}
    if parts["host"] == POOLER and "sslmode" not in changed:
        parts["sslmode"] = "require"

    with pytest.raises(SettingsError, match=words) as refused:
        resolve(parts)

    assert HUSH not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"https://{REF}.supabase.co", "web address"),
        (f"mysql://u:{HUSH}@h/d", "does not begin with postgresql://"),
        (HUSH, "does not begin with postgresql://"),
        (f"u:{HUSH}@127.0.0.1:6543/postgres", "does not begin with postgresql://"),
        (f"postgresql://u:{HUSH}", "no host after an @"),
        (f"postgresql://{HUSH}", "no host after an @"),
        (f"postgresql://u:{HUSH}@", "lacks SUPABASE_HOST"),
        (f"postgresql://u:{HUSH}@[::1", "no host after an @"),
        (f"postgresql://u:{HUSH}@h1:1,h2:2/d", "is no number"),
        (f"postgresql://u:x@127.0.0.1:{HUSH}/d", "is no number"),
        (f"postgresql://u:{HUSH}@{POOLER}/d?options=reference%3D{REF}", "holds options="),
        (f"postgresql://u:{HUSH}@127.0.0.1/d?hush=1", "holds the option 'hush'"),
        (f"postgresql://u:[YOUR-PASSWORD]@127.0.0.1/{HUSH}?sslmode=disable", "placeholder"),
        (f"postgresql://u:{HUSH}@db.{REF}.supabase.co:5432/postgres", "direct address"),
    ],
)
def test_a_wrong_url_is_told_without_repeating_it(url: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as refused:
        resolve({"url": url})

    assert HUSH not in str(refused.value)


def test_what_other_tools_add_to_the_url_does_no_harm() -> None:
    url = f"postgresql://reader:{HUSH}@127.0.0.1/postgres?pgbouncer=true&connection_limit=1&sslmode=disable"

    assert resolve({"url": url}) == Supabase("127.0.0.1", "reader", HUSH, sslmode="disable")


def test_url_and_parts_complete_each_other_and_must_not_contradict() -> None:
    url = "postgresql://reader@127.0.0.1:6543/postgres"
    parts = {"url": url, "password": "p@%41", "sslmode": "disable", "port": "6543"}

    assert resolve(parts) == Supabase("127.0.0.1", "reader", "p@%41", sslmode="disable")
    with pytest.raises(SettingsError, match="SUPABASE_DB_URL and SUPABASE_PORT say different things"):
        resolve({**parts, "port": "7000"})
    with pytest.raises(SettingsError, match="SUPABASE_DB_URL and SUPABASE_PASSWORD say") as refused:
        resolve({**parts, "url": f"postgresql://reader:{HUSH}@127.0.0.1:6543/postgres"})
    assert HUSH not in str(refused.value)


def test_the_line_end_of_a_password_from_a_file_is_dropped_its_blanks_are_not() -> None:
    found = resolve({**LOCAL, "password": " a b \r\n"})

    assert found is not None
    assert found.password == " a b "


def test_a_check_without_a_ca_of_its_own_uses_the_machines_and_is_the_strictest() -> None:
    given = Supabase("db.example.com", "reader", HUSH, sslmode="verify-ca").parameters()

    assert (given["sslmode"], given["sslrootcert"]) == ("verify-full", "system")


def test_no_start_up_option_reaches_the_pooler_from_the_users_environment() -> None:
    assert psycopg.conninfo.conninfo_to_dict(Supabase("h", "u", HUSH, sslmode="require").uri())["options"] == ""
