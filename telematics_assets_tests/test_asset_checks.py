"""The checks of a bronze table: what each of them catches, and what it does to the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from telematics_assets.catalog import TELEMATICS, Column, FileStream, TableContract, TableName
from telematics_assets.definitions import build_definitions
from telematics_assets.engines.base import BatchBalance, TableState
from telematics_assets.errors import CheckpointCorruptError, VolumeUnavailableError
from telematics_assets.settings import Settings
from telematics_assets.testing import MemoryEngine, parquet_bytes
from telematics_assets_tests.orchestra import definitions_of, json_points, load, parquet_points


@pytest.fixture
def engine() -> MemoryEngine:
    return MemoryEngine()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def test_clean_files_pass_every_check(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    engine.volume.put("parquet/a.parquet", parquet_points())
    assert not _failed(load(engine, instance))


def test_checks_of_a_table_that_does_not_exist_yet_pass(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    assert not _failed(_check(engine, instance))


def test_a_broken_contract_fails_the_run_and_names_the_columns(instance: dg.DagsterInstance) -> None:
    class Broken(MemoryEngine):
        def state(self, table: TableName) -> TableState | None:
            state = super().state(table)
            assert state is not None
            kept = [column for column in state.columns if column.name != "trip_id"]
            return replace(
                state, columns=tuple(replace(c, type="STRING") if c.name == "speed_kmh" else c for c in kept)
            )

    engine = Broken()
    engine.volume.put("parquet/a.parquet", parquet_points())
    result = load(engine, instance)
    assert not result.success
    contract = _failed(result)["contract"]
    assert contract.blocking
    assert contract.severity == dg.AssetCheckSeverity.ERROR
    assert _table(contract, "broken") == [
        {"column": "trip_id", "promised": "STRING", "found": "nothing"},
        {"column": "speed_kmh", "promised": "DOUBLE", "found": "STRING"},
    ]


def test_a_blocking_check_stops_what_comes_behind_it_in_the_same_run(instance: dg.DagsterInstance) -> None:
    @dg.asset(deps=[["bronze", "telematics"]])
    def report() -> None: ...

    class Empty(MemoryEngine):
        def state(self, table: TableName) -> TableState | None:
            state = super().state(table)
            return state and replace(state, columns=())

    job = dg.define_asset_job("all", selection=dg.AssetSelection.assets(["bronze", "telematics"], "report"))
    engine = Empty()
    engine.volume.put("parquet/a.parquet", parquet_points())
    both = dg.Definitions.merge(definitions_of(engine), dg.Definitions(assets=[report], jobs=[job]))
    result = both.resolve_job_def("all").execute_in_process(instance=instance, raise_on_error=False)
    assert result.asset_materializations_for_node("bronze__telematics")
    assert not result.asset_materializations_for_node("report")


def test_a_corrupt_file_warns_once_and_is_named(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    engine.volume.put("parquet/a.parquet", parquet_points())
    engine.volume.put("parquet/zero.parquet", b"")
    result = load(engine, instance)
    assert result.success
    corrupt = _failed(result)["corrupt_files"]
    assert corrupt.severity == dg.AssetCheckSeverity.WARN
    assert [line["path"] for line in _table(corrupt, "quarantined")] == ["parquet/zero.parquet"]

    assert "corrupt_files" in _failed(_check(engine, instance)), "started alone, it judges the last load again"
    engine.volume.put("parquet/b.parquet", parquet_points(4))
    later = load(engine, instance)
    assert not _failed(later)
    assert _evaluations(later)["corrupt_files"].metadata["files_of_all_loads"].value == 1


def test_an_empty_run_repeats_the_verdict_on_the_last_load(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    engine.volume.put("parquet/a.parquet", parquet_points())
    engine.volume.put("parquet/zero.parquet", b"")
    load(engine, instance)
    assert "corrupt_files" in _failed(load(engine, instance))


def test_batches_of_a_run_that_failed_half_way_are_judged_by_the_next(instance: dg.DagsterInstance) -> None:
    engine = MemoryEngine()
    engine.volume.put("parquet/a.parquet", parquet_points())
    load(engine, instance)
    engine.volume.put("parquet/zero.parquet", b"")
    engine.ingest(TELEMATICS)  # Nobody told Dagster about this batch.
    engine.volume.put("parquet/b.parquet", parquet_points())
    assert "corrupt_files" in _failed(load(engine, instance))


def test_a_file_that_changed_after_loading_warns(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    engine.volume.put("parquet/a.parquet", parquet_points(3))
    load(engine, instance)
    engine.volume.put("parquet/a.parquet", parquet_points(4))
    changed = _failed(_check(engine, instance))["changed_files"]
    assert changed.severity == dg.AssetCheckSeverity.WARN
    assert [line["path"] for line in _table(changed, "changed")] == ["parquet/a.parquet"]


def test_the_same_file_under_two_names_warns_and_names_both(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    engine.volume.put("parquet/a.parquet", parquet_points(3))
    assert not _failed(load(engine, instance))
    engine.volume.put("parquet/again.parquet", parquet_points(3))
    result = load(engine, instance)
    assert result.success
    duplicate = _failed(result)["duplicate_files"]
    assert duplicate.severity == dg.AssetCheckSeverity.WARN
    assert _table(duplicate, "duplicates") == [{"path": "parquet/again.parquet", "same_as": "parquet/a.parquet"}]
    engine.volume.put("parquet/b.parquet", parquet_points(4))
    assert not _failed(load(engine, instance))


@pytest.mark.parametrize(("broken", "warns"), [(1, False), (2, True)])
def test_too_many_unreadable_records_warn(
    engine: MemoryEngine, instance: dg.DagsterInstance, broken: int, warns: bool
) -> None:
    engine.volume.put("json/a.json", json_points(20, *["no json"] * broken))
    result = load(engine, instance, "telematics_test")
    assert ("rescued_ratio" in _failed(result)) is warns
    assert _evaluations(result)["rescued_ratio"].metadata["rows_corrupt"].value == broken


def test_values_outside_the_contract_warn_with_an_example(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    engine.volume.put("parquet/a.parquet", parquet_points(3, speed_kmh=[10.0, 999.0, float("nan")]))
    implausible = _failed(load(engine, instance))["plausible_values"]
    assert implausible.severity == dg.AssetCheckSeverity.WARN
    (line,) = _table(implausible, "outside")
    assert (line["column"], line["limits"], line["outside"], line["of"]) == ("speed_kmh", "0 to 300", 2, 3)
    assert line["example"] in ("999.0", "NaN", "nan")


def test_a_batch_that_added_other_rows_than_its_files_brought_is_an_error(instance: dg.DagsterInstance) -> None:
    class Leaking(MemoryEngine):
        def balance(self, stream: FileStream, since_batch: int) -> Sequence[BatchBalance]:
            return [replace(book, added_rows=book.added_rows - 1) for book in super().balance(stream, since_batch)]

    engine = Leaking()
    engine.volume.put("parquet/a.parquet", parquet_points(3))
    wrong = _failed(load(engine, instance))["reconciliation"]
    assert wrong.severity == dg.AssetCheckSeverity.ERROR
    assert [(line["rows_of_its_files"], line["rows_added"]) for line in _table(wrong, "wrong")] == [(3, 2)]


def test_reconciliation_shows_the_books_of_the_last_load(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    for name, rows in (("a", 3), ("b", 4)):
        engine.volume.put(f"parquet/{name}.parquet", parquet_points(rows))
        metadata = _evaluations(load(engine, instance))["reconciliation"].metadata
        assert metadata["rows_of_the_files"].value == metadata["rows_added"].value == rows


def test_a_check_tries_again_when_the_engine_does_not_answer(instance: dg.DagsterInstance) -> None:
    class Flaky(MemoryEngine):
        answers = False

        def balance(self, stream: FileStream, since_batch: int) -> Sequence[BatchBalance]:
            if not self.answers:
                self.answers = True
                raise VolumeUnavailableError("no answer")
            return super().balance(stream, since_batch)

    engine = Flaky()
    engine.volume.put("parquet/a.parquet", parquet_points())
    result = load(engine, instance)
    assert result.success
    assert _evaluations(result)["reconciliation"].passed


def test_a_check_that_cannot_answer_fails_the_run_but_not_the_other_checks(instance: dg.DagsterInstance) -> None:
    class Forgetful(MemoryEngine):
        def balance(self, stream: FileStream, since_batch: int) -> Sequence[BatchBalance]:
            raise CheckpointCorruptError("results of batch 0 are gone: rebuild the ledger")

    engine = Forgetful()
    engine.volume.put("parquet/a.parquet", parquet_points())
    result = load(engine, instance)
    assert not result.success
    assert len(_evaluations(result)) == 6


def test_a_stream_without_limits_has_no_plausibility_check() -> None:
    stream = FileStream("trips", "json", "trips", "trips", TableContract("One row per trip."))
    definitions = build_definitions([stream], Settings(), tables=())
    keys = definitions.resolve_asset_graph().asset_check_keys
    assert "plausible_values" not in {key.name for key in keys}
    assert len(keys) == 6


def test_a_column_of_another_type_is_rescued_and_the_contract_holds(
    engine: MemoryEngine, instance: dg.DagsterInstance
) -> None:
    engine.volume.put("parquet/a.parquet", parquet_points())
    load(engine, instance)
    engine.volume.put("parquet/b.parquet", parquet_bytes(pa.table({"vehicle_id": ["v"], "speed_kmh": ["fast"]})))
    failed = _failed(load(engine, instance))
    assert "rescued_ratio" in failed
    assert "contract" not in failed


def _check(engine: MemoryEngine, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """Run the checks alone, as from the UI."""
    selection = dg.AssetSelection.checks_for_assets(["bronze", "telematics"])
    job = dg.Definitions(jobs=[dg.define_asset_job("check", selection=selection)])
    merged = dg.Definitions.merge(definitions_of(engine), job)
    return merged.resolve_job_def("check").execute_in_process(instance=instance, raise_on_error=False)


def _evaluations(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()}


def _failed(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {name: evaluation for name, evaluation in _evaluations(result).items() if not evaluation.passed}


def _table(evaluation: dg.AssetCheckEvaluation, name: str) -> list[Any]:
    value = evaluation.metadata[name]
    assert isinstance(value, dg.TableMetadataValue)
    return [record.data for record in value.records]


@pytest.mark.parametrize(
    ("mode", "found", "passes"),
    [
        ("addNewColumnsWithTypeWidening", "BIGINT", True),
        ("addNewColumnsWithTypeWidening", "DECIMAL(12,2)", True),
        ("addNewColumnsWithTypeWidening", "SMALLINT", False),
        ("addNewColumnsWithTypeWidening", "ARRAY<INT>", False),
        ("addNewColumns", "BIGINT", False),
    ],
)
def test_a_contract_allows_a_wider_type_only_where_the_stream_widens(
    mode: str, found: str, passes: bool, instance: dg.DagsterInstance
) -> None:
    class Retyped(MemoryEngine):
        def state(self, table: TableName) -> TableState | None:
            state = super().state(table)
            if state is None:
                return None
            retyped = [replace(c, type=found) if c.name == "engine_rpm" else c for c in state.columns]
            return replace(state, columns=tuple(retyped))

    engine = Retyped()
    engine.volume.put("parquet/a.parquet", parquet_points())
    stream = TELEMATICS.with_options(schema_evolution_mode=mode)
    defs = build_definitions(streams=(stream,), engine=engine, landing=engine.volume)
    result = defs.resolve_job_def("load_telematics").execute_in_process(instance=instance, raise_on_error=False)
    assert ("contract" in _failed(result)) != passes


def test_a_contract_may_spell_its_types_as_it_likes(engine: MemoryEngine, instance: dg.DagsterInstance) -> None:
    columns = (
        Column("price", "decimal(10, 2)", "A price."),
        Column("tags", "MAP<STRING,INT>", "Tags."),
        Column("points", "array< struct<Km:double> >", "Points."),
    )
    stream = replace(TELEMATICS, contract=TableContract("Some rows.", columns))
    engine.volume.put("parquet/a.parquet", parquet_bytes({"more": [1]}))
    defs = build_definitions(streams=(stream,), engine=engine, landing=engine.volume)
    result = defs.resolve_job_def("load_telematics").execute_in_process(instance=instance, raise_on_error=False)
    assert "contract" not in _failed(result)
