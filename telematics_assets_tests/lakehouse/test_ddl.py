"""Column types and schema hints as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.lakehouse.ddl import SCALARS, DeltaType, Hint, holdable, parse_hints, parse_type

SCALAR = st.sampled_from(SCALARS).map(DeltaType)
DECIMAL = st.integers(1, 38).flatmap(lambda p: st.integers(0, p).map(lambda s: DeltaType("DECIMAL", (p, s))))
NAME = st.text(min_size=1, max_size=12).filter(holdable)
PLAIN = st.sampled_from(["km", "speed_kmh", "größe", "x1", "element", "array", "`", "a.b", "1st", "a`b<", "BIGINT"])
NAMES = st.one_of(PLAIN, NAME)


def _nested(inside: st.SearchStrategy[DeltaType]) -> st.SearchStrategy[DeltaType]:
    fields = st.lists(st.tuples(NAMES, inside), min_size=1, max_size=4, unique_by=lambda field: field[0].lower())
    return st.one_of(
        inside.map(lambda kind: DeltaType("ARRAY", parts=(("element", kind),))),
        st.tuples(inside, inside).map(lambda both: DeltaType("MAP", parts=(("key", both[0]), ("value", both[1])))),
        fields.map(lambda parts: DeltaType("STRUCT", parts=tuple(parts))),
    )


TYPES = st.recursive(st.one_of(SCALAR, DECIMAL), _nested, max_leaves=8)
HINTS = st.lists(
    st.tuples(st.lists(NAMES, min_size=1, max_size=3), TYPES),
    min_size=1,
    max_size=5,
    unique_by=lambda h: h[0][0].lower(),
).map(lambda hints: tuple(Hint(tuple(path), kind) for path, kind in hints))


@given(TYPES)
def test_a_type_reads_back_from_its_text(kind: DeltaType) -> None:
    assert parse_type(str(kind)) == kind


@given(HINTS)
def test_hints_read_back_from_their_text(hints: tuple[Hint, ...]) -> None:
    assert parse_hints(", ".join(map(str, hints))) == hints


@given(st.text(alphabet="aB1 .,:<>()`\tSTRINGMAPDECIMAL", max_size=40))
def test_any_text_is_hints_or_says_why_not(text: str) -> None:
    try:
        hints = parse_hints(text)
    except ValueError:
        return
    assert parse_hints(", ".join(map(str, hints))) == hints


def test_hints_are_written_as_spark_and_auto_loader_write_them() -> None:
    text = "speed_kmh DOUBLE, device.model: string,tags MAP<STRING,STRING>, `a.b`.c Decimal(10, 2), n LONG,\n legs "
    text += "ARRAY<STRUCT<km: DOUBLE, `at` TIMESTAMP>>"
    assert [str(hint) for hint in parse_hints(text)] == [
        "speed_kmh DOUBLE",
        "device.model STRING",
        "tags MAP<STRING, STRING>",
        "`a.b`.c DECIMAL(10,2)",
        "n BIGINT",
        "legs ARRAY<STRUCT<km: DOUBLE, at: TIMESTAMP>>",
    ]


@pytest.mark.parametrize(
    ("spelled", "shown"),
    [("integer", "INT"), ("short", "SMALLINT"), ("byte", "TINYINT"), ("real", "FLOAT"), ("decimal(7)", "DECIMAL(7,0)")],
)
def test_other_spellings_mean_the_same_type(spelled: str, shown: str) -> None:
    assert str(parse_type(spelled)) == shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a name is missing at its end"),
        ("speed", "no type at its end"),
        ("speed TEXT", "no type at 'TEXT'"),
        ("speed DOUBLE rpm INT", "nothing is expected at 'rpm INT'"),
        ("speed DOUBLE,", "a name is missing"),
        ("a..b INT", "a name is missing at '.b INT'"),
        ("`two words` INT", "can't hold"),
        ("a DECIMAL(39,0)", r"no DECIMAL\(39,0\)"),
        ("a DECIMAL(5,6)", r"no DECIMAL\(5,6\)"),
        ("a DECIMAL(five)", "number of digits is missing at 'five"),
        ("a ARRAY<INT", "'>' is missing at its end"),
        ("a MAP<STRING>", "',' is missing"),
        ("a STRUCT<>", "a name is missing at '>'"),
        ("a STRUCT<x INT, X INT>", "names a field twice"),
        ("a INT, A INT", "'a INT' and 'A INT' speak of the same column"),
        ("d STRUCT<x INT>, d.y INT", "speak of the same column"),
        ("d.x INT, d.x STRING", "speak of the same column"),
        ("d.x INT, D.y INT", "name a column in two cases"),
        ("a " + "ARRAY<" * 40 + "INT" + ">" * 40, "deeper than 32"),
    ],
)
def test_what_is_no_hint_is_shown_where_it_stops_to_be_one(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_hints(text)
