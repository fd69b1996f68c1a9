# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Tables as spreadsheets save them: byte order marks, separators, and markup left in the text of a report."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffvp.data.cases import DatasetError, plain_text, read_csv
from diffvp.data.ctrg import load_ctrg
from diffvp.data.scans import list_scans
from diffvp.data.table import load_table
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.metrics import report_table
from diffvp.metrics.clinical_efficacy.reports import read_label_table
from diffvp.metrics.labelers import RuleLabeler
from diffvp.metrics.labelers.table import label_table
from diffvp.nifti_diffvp import read_table
from diffvp.reading_diffvp import CTMetadata, load_metadata
from diffvp.volume_diffvp import CTReadError

ROWS = [["path", "report"], ["a.nii.gz", 'Lungs: clear; heart, "normal".\nNo effusion.'], ["b.nii.gz", "Größe\t5 mm"]]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16"]  # UTF-16 with its mark is Excel's "Unicode text"
SEPARATORS = [",", ";", "\t"]
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)


def written(rows, separator: str, encoding: str, hint: bool = False) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    return (f"sep={separator}\r\n" * hint + text.getvalue()).encode(encoding)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Make the files that `ROWS` names; readers of tables do not check that they are scans."""
    for name in ("a.nii.gz", "b.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("separator", SEPARATORS)
def test_table_is_read_with_any_mark_and_separator(folder, separator, encoding, hint):
    (folder / "metadata.csv").write_bytes(written(ROWS, separator, encoding, hint))
    assert [fields for _, fields in read_table(folder / "metadata.csv")] == ROWS
    assert [number for number, _ in read_table(folder / "metadata.csv")] == [1, 2, 3]
    assert [(case.name, case.report) for case in load_table(folder)] == [("a", ROWS[1][1]), ("b", ROWS[2][1])]
    assert [scan.path.name for scan in list_scans(folder / "metadata.csv")] == ["a.nii.gz", "b.nii.gz"]


def test_table_name_may_end_in_tsv_or_capitals(folder):
    for name in ("mine.tsv", "MINE.CSV"):
        (folder / name).write_bytes(written(ROWS, "\t", "utf-8-sig"))
        assert len(load_table(folder / name)) == len(list_scans(folder / name)) == 2


@given(
    st.lists(st.tuples(CELLS, CELLS).map(list), min_size=1, max_size=5),
    st.sampled_from(SEPARATORS),
    st.sampled_from(ENCODINGS),
)
def test_any_text_is_read_back_unchanged(tmp_path_factory, rows, separator, encoding):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    rows = [["path", "report"], *rows]
    path.write_bytes(written(rows, separator, encoding))
    assert [fields for _, fields in read_table(path)] == rows


def test_second_byte_order_mark_is_ignored(folder):
    (folder / "metadata.csv").write_bytes("\ufeff".encode() + written(ROWS, ";", "utf-8-sig"))
    assert len(load_table(folder)) == 2


def test_labels_are_read_with_any_mark_and_separator(tmp_path):
    rows = [["VolumeName", *DIAGNOSIS_LABELS], ["valid_1_a_1.nii.gz", *"010000000000000001"]]
    for encoding in ENCODINGS:
        for separator in SEPARATORS:
            (tmp_path / "labels.csv").write_bytes(written(rows, separator, encoding))
            table = read_label_table(tmp_path / "labels.csv")
            np.testing.assert_array_equal(table["valid_1_a_1"], [int(one) for one in rows[1][1:]])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("separator", SEPARATORS)
def test_ct_rate_metadata_is_read_with_any_mark_and_separator(tmp_path, separator, encoding):
    columns = ["RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing", "ImageOrientationPatient"]
    rows = [["VolumeName", *columns, "PatientPosition"]]
    rows += [["train_1_a_1.nii.gz", "1", "-1024", "[0.7, 0.7]", "2.5", "[1, 0, 0, 0, 1, 0]", "HFS"]]
    (tmp_path / "metadata.csv").write_bytes(written(rows, separator, encoding))
    table = load_metadata(tmp_path / "metadata.csv")
    assert CTMetadata.from_ct_rate(table["train_1_a_1.nii.gz"]) == CTMetadata(1.0, -1024.0, (0.7, 0.7, 2.5))


@pytest.mark.parametrize(
    "content",
    [b"PK\3\4\xff\xfe", b"path,report\n\xe9,x\n", b'path,report\n"a"b,c\n', "path,report\n".encode("utf-16")[:-1]],
)
def test_file_that_is_not_a_table_is_refused_by_name(tmp_path, content):
    (tmp_path / "table.csv").write_bytes(content)
    problems = []
    assert read_csv(tmp_path / "table.csv", ["path"], problems) is None
    [problem] = problems
    assert (problem.table, problem.field) == ("table.csv", "content") and "UTF-8" in problem.expected
    with pytest.raises(CTReadError) as caught:
        load_metadata(tmp_path / "table.csv")
    assert (caught.value.source, caught.value.field) == ("table.csv", "content")


def test_empty_and_missing_tables_are_refused(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"")
    for path in (tmp_path / "table.csv", tmp_path / "missing.csv", tmp_path):
        with pytest.raises(CTReadError):
            load_metadata(path)
        problems = []
        assert read_csv(path, ["path"], problems) is None and len(problems) == 1


# The text of reports


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Clear lungs._x000D_\nNormal heart._x000d_", "Clear lungs.\nNormal heart.\n"),
        ("Clear lungs._x000D_\r\nNormal heart.", "Clear lungs.\nNormal heart."),
        ("Clear_x0009_lungs._x000A_", "Clear lungs.\n"),
        ("Clear lungs.<br>Normal heart.<BR />No effusion.<br/>", "Clear lungs.\nNormal heart.\nNo effusion.\n"),
        ('<p class="x">Clear <b>lungs</b>.</p>', "\nClear lungs.\n"),
        ("Nodule &lt; 5&nbsp;mm &amp; scar&#44; &quot;old&quot;", 'Nodule < 5 mm & scar, "old"'),
        ("Clear lungs.&lt;br&gt;Normal heart.", "Clear lungs.\nNormal heart."),
        ("Nodule &amp;lt; 5 mm", "Nodule < 5 mm"),
        # These contain no markup.
        ("Nodules < 5 mm and > 3 mm.", "Nodules < 5 mm and > 3 mm."),
        ("Density <a few HU and >30 HU", "Density <a few HU and >30 HU"),
        ("R&D; A & B; x_000D_y", "R&D; A & B; x_000D_y"),
        ("One.\r\nTwo.\n\nThree. \t", "One.\r\nTwo.\n\nThree. \t"),
    ],
)
def test_markup_in_a_report_becomes_plain_text(text, expected):
    assert plain_text(text) == expected == plain_text(expected)


@given(st.text(st.characters(codec="utf-8", exclude_characters="<&_")))
def test_text_without_markup_is_unchanged(text):
    assert plain_text(text) == text


DIRTY, CLEAN = "Clear lungs._x000D_\nNodule &lt; 5 mm.<br>", "Clear lungs.\nNodule < 5 mm.\n"


def test_every_table_of_reports_is_cleaned(folder):
    (folder / "metadata.csv").write_bytes(
        written([["path", "report", "lung"], ["a.nii.gz", DIRTY, DIRTY]], ";", "utf-8-sig")
    )
    [case] = load_table(folder)
    assert case.report == CLEAN and case.region_sentences == {"lung": CLEAN}
    (folder / "mine.jsonl").write_text(json.dumps({"path": "a.nii.gz", "report": DIRTY}), encoding="utf-8-sig")
    assert load_table(folder / "mine.jsonl")[0].report == CLEAN
    (folder / "CTRG-Chest-548K_volume").mkdir()
    (folder / "CTRG-Chest-548K_volume/7.nii.gz").write_bytes(b"")
    (folder / "annotation.json").write_text(
        json.dumps({"train": [{"id": "7", "finding": DIRTY}]}), encoding="utf-8-sig"
    )
    assert load_ctrg(folder, "train")[0].report == CLEAN


def test_only_true_reports_are_cleaned_before_scoring(folder, monkeypatch):
    class Scored(Exception):
        """Carries the predictions and references that would have been scored."""

    def score(predictions, references, **options):
        raise Scored(list(predictions), list(references))

    monkeypatch.setattr(report_table, "score_reports", score)
    rows = [["id", "prediction", "reference"], ["a", DIRTY, DIRTY]]
    (folder / "scores.csv").write_bytes(written(rows, "\t", "utf-16"))
    with pytest.raises(Scored) as scored:
        report_table.score_table(folder / "scores.csv", RuleLabeler())
    assert scored.value.args == ([DIRTY], [CLEAN])


def test_labeler_reads_the_cleaned_text(folder):
    rows = [["id", "report"], ["a", "No pleural&nbsp;effusion._x000D_\nThere is a hiatal<b> hernia</b>."]]
    (folder / "reports.csv").write_bytes(written(rows, ";", "utf-8-sig"))
    labels = label_table(folder / "reports.csv", folder / "labels.csv", RuleLabeler())
    assert [DIAGNOSIS_LABELS[k] for k in np.flatnonzero(labels[0])] == ["Hiatal hernia"]


@pytest.mark.parametrize(
    "text", ["<html>x</html>", "<!-- x -->", "{\\rtf1 x}", "<w:p>x</w:p>", "_xD83D_", '<img src="x">']
)
def test_other_markup_is_refused_with_row_and_column(folder, text):
    report = f"Secret words. {text}"
    (folder / "metadata.csv").write_bytes(
        written([["path", "report"], ["a.nii.gz", "Clear."], ["b.nii.gz", report]], ",", "utf-8")
    )
    with pytest.raises(DatasetError) as caught:
        load_table(folder)
    [problem] = caught.value.problems
    assert (problem.row, problem.field, problem.name) == (3, "report", "b")
    assert "markup" in problem.found and "15" in problem.found  # its position
    assert not re.search("Secret|words", str(caught.value))


def test_report_of_markup_only_is_refused_as_empty(folder):
    (folder / "metadata.csv").write_bytes(
        written([["path", "report"], ["a.nii.gz", "<br>&nbsp;_x000D_"]], ",", "utf-8")
    )
    with pytest.raises(DatasetError) as caught:
        load_table(folder)
    assert [problem.field for problem in caught.value.problems] == ["report"]


def test_single_name_to_exclude_is_not_split_into_letters(folder):
    (folder / "metadata.csv").write_bytes(written(ROWS, ",", "utf-8"))
    assert [case.name for case in load_table(folder, exclude="a")] == ["b"]
    assert [case.name for case in load_table(folder, include="b.nii.gz")] == ["b"]
