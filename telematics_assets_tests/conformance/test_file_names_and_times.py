"""Whatever a file is called and however old it is, it is data or it is said why not."""

from __future__ import annotations

import time

from telematics_assets_tests.conformance.platforms import LOCATION, DeltaPlatform, Platform
from telematics_assets_tests.conformance.samples import json_stream, lines, parquet, parquet_stream

ODD = [
    "with space.parquet",
    "100%.parquet",
    "%41.parquet",
    "a%2Fb.parquet",
    "#1.parquet",
    "q?x=1&y=2.parquet",
    "it's.parquet",
    'a "quoted" name.parquet',
    "new\nline.parquet",
    "tab\t.parquet",
    "back\\slash.parquet",
    "Zürich🚗.parquet",
    "e\u0301.parquet",
    "\u00e9.parquet",
    " leading.parquet",
    "trailing ",
    "-rf",
    "*.parquet",
    "[a].parquet",
    "{a}.parquet",
    "a=b.parquet",
    "day=2026-03-01/a.parquet",
    "no_ending",
    "a.b.c",
    "UPPER.PARQUET",
    "folder.parquet/inside.parquet",
    "x" * 200,
]


def test_files_of_any_name_are_loaded_under_their_name(platform: Platform) -> None:
    stream = parquet_stream()
    for number, name in enumerate(ODD):
        platform.volume_put(f"parquet/{name}", parquet(n=[number]))
    report = platform.engine.ingest(stream)
    assert (report.files_ingested, report.files_skipped) == (len(ODD), 0)
    assert platform.rows(stream, "n", "_source_file") == [
        {"n": number, "_source_file": f"{LOCATION}/parquet/{name}"} for number, name in enumerate(ODD)
    ]
    assert platform.states(stream) == dict.fromkeys(ODD, "INGESTED")
    assert platform.restart().ingest(stream).batches == ()


def test_odd_names_are_named_in_the_rescued_data_too(platform: Platform) -> None:
    stream = json_stream("n", schema_evolution_mode="rescue")
    platform.volume_put("json/a.json", lines('{"n":0}'))
    platform.engine.ingest(stream)
    platform.volume_put('json/new\nline "q" \\.json', lines('{"x":1}'))
    platform.engine.ingest(stream)
    row = platform.rows(stream, "n", "_rescued_data")[0]
    assert row["_rescued_data"] == f'{{"x":1,"_file_path":"{LOCATION}/json/new\\nline \\"q\\" \\\\.json"}}'


def test_names_that_start_with_a_dot_or_an_underscore_are_no_data(platform: Platform) -> None:
    stream = parquet_stream()
    for name in (".hidden.parquet", "_SUCCESS", "_temporary/a.parquet", ".tmp/a.parquet", "day/_a.parquet", "..x"):
        platform.volume_put(f"parquet/{name}", parquet(n=[0]))
    platform.volume_put("parquet/a_b.c.parquet", parquet(n=[1]))
    assert platform.engine.ingest(stream).files_ingested == 1
    assert platform.states(stream) == {"a_b.c.parquet": "INGESTED"}


def test_only_the_streams_own_folder_is_read(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet2/a.parquet", parquet(n=[1]))
    platform.volume_put("a.parquet", parquet(n=[2]))
    platform.volume_put("json/a.json", lines('{"n":3}'))
    assert platform.engine.ingest(stream).batches == ()
    assert platform.engine.ingest(json_stream()).rows == 1


def test_an_old_modification_time_never_hides_a_file(platform: Platform) -> None:
    stream = parquet_stream()
    platform.volume_put("parquet/new.parquet", parquet(n=[1]))
    platform.engine.ingest(stream)
    year_ns = 365 * 86_400_000_000_000
    platform.volume_put("parquet/old.parquet", parquet(n=[2]), time.time_ns() - 30 * year_ns)
    platform.volume_put("parquet/epoch.parquet", parquet(n=[3]), 0)
    assert platform.engine.ingest(stream).files_ingested == 2
    assert [row["n"] for row in platform.rows(stream, "n")] == [1, 2, 3]


def test_entries_that_are_no_files_are_named_and_stop_nobody(delta_platform: DeltaPlatform) -> None:
    stream = parquet_stream()
    delta_platform.volume_put("parquet/a.parquet", parquet(n=[1]))
    folder = delta_platform.at("parquet")
    (folder / "empty.parquet").mkdir()
    (folder / "link.parquet").symlink_to(folder / "a.parquet")
    (folder / "nowhere.parquet").symlink_to(folder / "gone")
    (folder / "loop").symlink_to(folder)
    with open(bytes(folder) + b"/\xff.parquet", "wb") as file:
        file.write(parquet(n=[2]))
    report = delta_platform.engine.ingest(stream)
    assert (report.files_ingested, report.rows) == (1, 1)
    assert delta_platform.states(stream) == {
        "a.parquet": "INGESTED",
        "link.parquet": "SKIPPED_CORRUPTED",
        "nowhere.parquet": "SKIPPED_CORRUPTED",
        "loop": "SKIPPED_CORRUPTED",
        "\\xff.parquet": "SKIPPED_CORRUPTED",
    }
    assert "not UTF-8" in delta_platform.reason(stream, "\\xff.parquet")
    assert "symbolic link" in delta_platform.reason(stream, "link.parquet")
