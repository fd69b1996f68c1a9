# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""`diffvp init` on folders of all kinds: it never loses reports, and names files that it cannot read."""

import csv

import pytest

from diffvp.data.start import StartError, start

from .dataset_samples import touch


@pytest.fixture
def scans(tmp_path):
    for number in range(3):
        touch(tmp_path / f"scans/a{number}.nii.gz")
    return tmp_path / "scans"


def rows_of(table) -> list[list[str]]:
    with open(table, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_second_call_keeps_the_reports_typed_into_the_output_folder(scans, tmp_path):
    output = tmp_path / "out"
    first = start(scans, output)
    assert first.table == output / "metadata.csv" and not first.ready
    rows = rows_of(first.table)
    assert [row[1] for row in rows] == ["report", "", "", ""]
    for row in rows[1:3]:
        row[1] = "Lungs clear."
    with open(first.table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    typed = first.table.read_bytes()
    again = start(scans, output)  # one report is still missing
    assert again.table == first.table and again.written == [] and not again.ready
    assert first.table.read_bytes() == typed
    first.table.write_bytes(typed.replace(b"a2.nii.gz,", b"a2.nii.gz,Lungs clear."))
    third = start(scans, output)
    assert third.ready and third.written == [output / "own_scans.yaml"]
    assert f'root: "{first.table}"' in third.config.read_text()


def test_table_in_both_folders_is_refused(scans, tmp_path):
    (tmp_path / "out").mkdir()
    for folder in (scans, tmp_path / "out"):
        (folder / "metadata.csv").write_text("path,report\n")
    with pytest.raises(StartError, match="table: "):
        start(scans, tmp_path / "out")
    started = start(scans, scans.parent / "out/../scans")
    assert started.table.samefile(scans / "metadata.csv") and not started.ready, "a header is no table of reports"


def test_byte_order_mark_is_no_part_of_a_report(scans):
    for number in range(3):
        (scans / f"a{number}.txt").write_bytes("Lungs clear.".encode("utf-8-sig"))
    assert [row[1] for row in rows_of(start(scans).table)] == ["report", *["Lungs clear."] * 3]


@pytest.mark.parametrize("name", ["a1.txt", "other.csv", "other.tsv", "other.jsonl"])
def test_file_in_another_encoding_is_refused_by_name(scans, name):
    (scans / name).write_bytes("path,report\na.nii.gz,37 °C\n".encode("latin1"))
    before = sorted(scans.iterdir())
    with pytest.raises(StartError) as caught:
        start(scans)
    assert str(caught.value).startswith(f"{scans / name}: content: not UTF-8")
    assert sorted(scans.iterdir()) == before


@pytest.mark.parametrize(
    "content", ["5\n", "[1]\n", "hello\n", "null\n", '"path report"\n', "", "\n", '["path", "report"]\n']
)
def test_json_lines_without_rows_are_no_table(scans, content):
    (scans / "log.jsonl").write_text(f"{content}\n")
    assert len(rows_of(start(scans).table)) == 4
    assert start(scans).table == scans / "metadata.csv"


def test_json_lines_with_rows_are_the_table(scans):
    (scans / "own.jsonl").write_text('{"path": "a0.nii.gz", "report": "Clear."}\n')
    assert start(scans).table == scans / "own.jsonl" and not (scans / "metadata.csv").exists()
