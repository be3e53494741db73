"""A merge by Spark becomes the table's next version or nothing, and keeps every value; its statement says so.

Belongs here: what only Spark's merge can do wrong. Does not belong here: what every merge does
(`lakehouse/test_merge.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from telematics_assets.catalog import TableName
from telematics_assets.engines.spark.merging import statement
from telematics_assets.engines.spark.tables import SparkLakehouse, SparkTable
from telematics_assets.engines.spark.tasks import OVERTAKEN, SurpriseError, unless_there
from telematics_assets.errors import CommitConflictError
from telematics_assets.lakehouse.base import POSITIONS_INFO
from telematics_assets.lakehouse.delta import DeltaLakehouse
from telematics_assets.lakehouse.merging import Changes, gathered
from telematics_assets_tests.conformance.spark import spark as session

NAME = TableName("workspace", "01_bronze", "merged")
SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string())])
Batches = Iterator[pa.RecordBatch]


def rows(*values: tuple[int, str]) -> pa.Table:
    return pa.Table.from_pylist([{"id": number, "name": name} for number, name in values], SCHEMA)


def keys(*ids: int) -> pa.Table:
    return pa.table({"id": pa.array(ids, pa.int64())})


def made(home: Path) -> None:
    """A table of two files that anybody may write together."""
    table = DeltaLakehouse(home).create(NAME, SCHEMA, "rows", {"delta.enableChangeDataFeed": "true"})
    for position, number in enumerate((1, 2), 1):
        table.append(SCHEMA, rows((number, "as it was")).to_batches(), "x", position, {})


def opened(home: Path) -> SparkTable:
    table = SparkLakehouse(home, session).open(NAME)
    assert isinstance(table, SparkTable)
    return table


def merged(table: SparkTable, name: str) -> None:
    """Replace a row, add one, and take one out."""
    positions = {"version": table.version + 1, "x": 9, "y": 1}
    done = table.merge(rows((1, name), (3, name)), keys(2), ["id"], positions, {"why": "test"})
    assert (done.inserted, done.updated, done.deleted) == (1, 1, 1)
    assert done.commit.transactions == positions
    assert (table.position("y"), table.position("version")) == (1, positions["version"])
    noted, set_behind = table.commits(table.version - 2)
    assert POSITIONS_INFO in noted.info
    assert noted.transactions == set_behind.transactions == positions


def foreign_append(path: str) -> None:
    write_deltalake(path, rows((50, "foreign")), mode="append")


def foreign_optimize(path: str) -> None:
    assert DeltaTable(path).optimize.compact()["numFilesRemoved"] == 2


def test_names_and_columns_that_are_not_given_are_told_to_spark() -> None:
    mine = pa.schema([("a`b", pa.int64()), ("order", pa.float64()), ("old", pa.string())])
    given = pa.schema([mine.field(0), mine.field(1), ("new", pa.string())])
    rows_given = pa.table([[1], [0.5], ["x"]], schema=given)
    changes = Changes(rows_given, keys().rename_columns(["a`b"]), ("a`b",), ())
    source, marker = gathered(changes, mine)
    said = statement("/a`path", changes, mine, source.schema.names, marker, "view")
    assert said.startswith(
        "MERGE WITH SCHEMA EVOLUTION\nINTO delta.`/a``path` AS t USING view AS s ON t.`a``b` = s.`a``b`\n"
    )
    assert "`old` = s.`old`" in said
    assert "THEN DELETE" not in said, "there is nothing to take out"
    assert source["old"].to_pylist() == [None]


@pytest.mark.spark
def test_values_of_every_type_stay_as_they_are(tmp_path: Path) -> None:
    kinds: dict[str, tuple[pa.DataType, list[object]]] = {
        "k": (pa.float64(), [-0.0, float("nan"), 1.5]),
        "decimal": (
            pa.decimal128(38, 10),
            [Decimal("9" * 28 + ".0123456789"), Decimal("-1E-10"), None],
        ),
        "moment": (pa.timestamp("us", "UTC"), [-62135596800000000, 253402300799999999, None]),
        "local": (pa.timestamp("us"), [-62135596800000000, 1711850399123456, None]),
        "day": (pa.date32(), [-719162, 2932896, None]),
        "bytes": (pa.binary(), [b"\x00\xff", b"", None]),
        "texts": (pa.list_(pa.field("element", pa.string())), [["a", None, ""], [], None]),
        "decimals": (pa.list_(pa.field("element", pa.decimal128(20, 5))), [[Decimal("1.00001")], [None], None]),
        "small": (pa.int16(), [-32768, 32767, None]),
        "float": (pa.float32(), [float("inf"), 1e-45, None]),
        "is": (pa.bool_(), [True, False, None]),
        "text": (pa.string(), ["\x00'\\\n", "ü\U0001f600", ""]),
    }
    schema = pa.schema([(name, kind) for name, (kind, _) in kinds.items()])
    given = pa.table([pa.array(values, kind) for kind, values in kinds.values()], schema=schema)
    lakehouse = SparkLakehouse(tmp_path, session)
    table = lakehouse.create(NAME, schema, "rows", {"delta.enableChangeDataFeed": "true"})
    none = given.slice(0, 0).select(["k"])
    assert table.merge(given, none, ["k"], {"x": 1}, {}).inserted == 3
    embedded = DeltaLakehouse(tmp_path).open(NAME)
    assert embedded is not None
    for found in (embedded, lakehouse.open(NAME)):
        assert found is not None
        by_bits = {str(row): row for row in found.read().to_pylist()}
        assert sorted(by_bits) == sorted(map(str, given.to_pylist()))
    # Both kinds of zero are one key, and all that is no number is another.
    again = given.set_column(0, "k", pa.array([0.0, float("nan"), 1.5]))
    assert table.merge(again, none, ["k"], {"x": 2}, {}).updated == 0
    assert embedded.version == 1


@pytest.mark.spark
@pytest.mark.parametrize("foreign", [foreign_append, foreign_optimize])
@pytest.mark.parametrize("moment", ["before", "while"])
def test_whoever_commits_meanwhile_is_a_conflict_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: Callable[[str], None], moment: str
) -> None:
    made(tmp_path)
    table = opened(tmp_path)
    path, once = table.uri, str(tmp_path / "once")

    def looked_then_overtaken(entry: str) -> Callable[[Batches], Batches]:
        look = unless_there(entry)

        def passed(batches: Batches) -> Batches:
            yield from look(batches)
            # There are several tasks.
            with suppress(FileExistsError):
                os.close(os.open(once, os.O_CREAT | os.O_EXCL))
                foreign(path)

        return passed

    if moment == "before":
        foreign(path)
    else:
        monkeypatch.setattr("telematics_assets.engines.spark.merging.unless_there", looked_then_overtaken)
    with pytest.raises(CommitConflictError):
        merged(table, "late")
    monkeypatch.undo()
    table = opened(tmp_path)
    assert {row["name"] for row in table.read().to_pylist()} <= {"as it was", "foreign"}
    merged(table, "again")
    active = session().getActiveSession()
    assert active is not None
    assert active.conf.get("spark.databricks.delta.write.txnAppId", None) is None
    theirs = [(50, "foreign")] if foreign is foreign_append else []
    assert sorted((row["id"], row["name"]) for row in table.read().to_pylist()) == [(1, "again"), (3, "again"), *theirs]


@pytest.mark.spark
def test_a_merge_that_spark_leaves_out_is_a_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    table, other = opened(tmp_path), opened(tmp_path)
    other.append(SCHEMA, (), "version", 3, {})
    # Only Spark's own look at the position is left.
    monkeypatch.setattr("telematics_assets.engines.spark.merging.unless_there", lambda entry: lambda batches: batches)
    with pytest.raises(CommitConflictError):
        merged(table, "late")
    assert {row["name"] for row in table.read().to_pylist()} == {"as it was"}


def test_tasks_look_for_the_next_version(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    assert list(unless_there(str(entry))(iter(rows((1, "a")).to_batches())))
    entry.touch()
    with pytest.raises(SurpriseError, match=OVERTAKEN):
        list(unless_there(str(entry))(iter(())))
