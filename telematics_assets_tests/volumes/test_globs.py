"""Globs on file names: what they match, held against examples and against `fnmatch`; and what is no glob."""

from __future__ import annotations

import contextlib
import fnmatch
import re

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telematics_assets.volumes.globs import name_pattern


def matches(glob: str, name: str) -> bool:
    """What both users of the pattern say: polars (Rust) and Python."""
    pattern = name_pattern(glob)
    by_polars = bool(pl.Series([name]).str.contains(pattern)[0])
    assert by_polars == (re.search(pattern, name) is not None)
    return by_polars


@pytest.mark.parametrize(
    ("glob", "matching", "other"),
    [
        ("*", ["a", "a.json", "two words", "line\nbreak", "ü", ""], []),
        ("*.json", ["a.json", ".json"], ["a.json.gz", "ajson", "a.JSON", "a.json\nx"]),
        ("trip-??.csv", ["trip-01.csv", "trip-üß.csv"], ["trip-1.csv", "trip-001.csv"]),
        ("[a-c]x", ["ax", "cx"], ["dx", "x", "-x"]),
        ("[!a-c]x", ["dx", "^x"], ["ax", "x"]),
        ("[^a]x", ["bx", "^x"], ["ax"]),
        ("[]a]x", ["]x", "ax"], ["x"]),
        ("[a-]x", ["ax", "-x"], ["bx"]),
        ("[a&&b]x", ["ax", "&x", "bx"], ["cx"]),
        ("[[:alpha:]", ["[", ":", "a"], ["b", "z"]),
        ("*.{json,csv}", ["a.json", "a.csv"], ["a.{json,csv}", "a.jsoncsv"]),
        ("{a,b{c,d}}e", ["ae", "bce", "bde"], ["abcde", "be"]),
        ("{,a}b", ["b", "ab"], ["aab"]),
        ("a,b}", ["a,b}"], ["a"]),
        (r"\*.json", ["*.json"], ["a.json"]),
        (r"\{a\}", ["{a}"], ["a"]),
        ("a.b+c(d)|e^f$g#h&i~j-k", ["a.b+c(d)|e^f$g#h&i~j-k"], ["aXb+c(d)|e^f$g#h&i~j-k", "a.b"]),
        ("a b", ["a b"], ["ab"]),
    ],
)
def test_a_glob_matches_whole_names(glob: str, matching: list[str], other: list[str]) -> None:
    assert [name for name in matching if not matches(glob, name)] == []
    assert [name for name in other if matches(glob, name)] == []


@given(st.text("ab*?-.[]!^&", min_size=1, max_size=8), st.text("ab*?-.[]!^&", max_size=8))
def test_a_glob_without_braces_says_what_fnmatch_says(glob: str, name: str) -> None:
    try:
        name_pattern(glob)
    except ValueError:
        return
    # `[^a]` negates here and not there; an empty range matches nothing there and is refused here.
    assert matches(glob, name) == fnmatch.fnmatchcase(name, glob.replace("[^", "[!"))


@given(st.text(st.characters(exclude_characters="/", codec="utf-8"), min_size=1, max_size=12))
def test_any_text_is_a_glob_or_is_refused_by_our_own_words(text: str) -> None:
    with contextlib.suppress(ValueError):
        matches(text, "name.json")
    escaped = "".join(f"\\{char}" for char in text)
    assert matches(escaped, text)


@pytest.mark.parametrize(
    ("glob", "why"),
    [
        ("", "not empty"),
        ("day/*.json", "no '/'"),
        ("[ab", r"a '\[' is not closed"),
        ("[]", r"a '\[' is not closed"),
        ("[b-a]", "the range b-a is empty"),
        ("{a,b", "a '{' is not closed"),
        ("a\\", "nothing stands behind"),
    ],
)
def test_what_is_no_glob_is_refused_with_the_reason(glob: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        name_pattern(glob)
