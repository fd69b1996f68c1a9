# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Scores of files from `diffvp batch` and `diffvp label`, and of the same reports in other formats. No METEOR."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from diffvp.cli import app
from diffvp.data.cases import DatasetError
from diffvp.metrics.labelers import RuleLabeler
from diffvp.metrics.labelers.table import label_table
from diffvp.metrics.nlg import score_reports
from diffvp.metrics.report_table import read_pairs, score_table

REPORTS = {
    "a": "Lung: A nodule of 6 mm is observed.",
    "ward 1/b": "Heart: Heart size is increased.",
    "c.d": "Lung: No nodule is seen.",
}
WRITTEN = {"a": "Lung: A nodule of 6 mm is observed.", "ward 1/b": "Heart: Normal.", "c.d": "Lung: A nodule is seen."}


@pytest.fixture
def truth(tmp_path):
    """Write a table of the user's scans with paths as ids; one of the scans failed in the batch."""
    rows = [["path", "report"], *([f"{name}.nii.gz", text] for name, text in REPORTS.items()), ["z.nii.gz", "Clear."]]
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "metadata.csv"


@pytest.fixture
def batch(tmp_path):
    """Write a file like `diffvp batch`: a header, a report per scan, and the older report of a replaced one."""
    lines = [
        {"statement": "...", "settings": {}, "versions": {}},
        {"id": "a.nii.gz", "report": "Old.", "settings_sha256": ""},
    ]
    lines += [{"id": f"{name}.nii.gz", "report": text, "settings_sha256": ""} for name, text in WRITTEN.items()]
    (tmp_path / "reports.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "reports.jsonl"


@pytest.fixture
def expected(tmp_path):
    """Score the same reports in one table."""
    with open(tmp_path / "both.csv", "w", newline="") as file:
        rows = [[name, WRITTEN[name], REPORTS[name]] for name in REPORTS]
        csv.writer(file).writerows([["id", "prediction", "reference"], *rows])
    return score_table(tmp_path / "both.csv", RuleLabeler(), meteor=False)


def test_batch_file_is_scored_against_the_table_of_scans(batch, truth, expected):
    document = score_table(batch, RuleLabeler(), reference=truth, meteor=False)
    assert document["systems"] == expected["systems"] and document["n"] == 3
    assert document["without_prediction"] == 1
    assert not any(signature.startswith("meteor") for signature in document["signatures"])


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_parquet_jsonl_and_csv_give_the_same_scores(tmp_path, truth, expected, suffix):
    rows = [{"id": name, "prediction": WRITTEN[name], "reference": REPORTS[name]} for name in REPORTS]
    path = tmp_path / f"reports.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([list(rows[0]), *(row.values() for row in rows)])
    assert score_table(path, RuleLabeler(), meteor=False) == expected
    assert score_table(path, RuleLabeler(), reference=truth, meteor=False)["systems"] == expected["systems"]


def test_labels_from_diffvp_label_give_the_same_scores(tmp_path, truth, batch, expected):
    with open(tmp_path / "reports.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "report"], *REPORTS.items()])
    run = CliRunner().invoke(app, ["label", str(tmp_path / "reports.csv"), "--output", str(tmp_path / "labels.csv")])
    assert run.exit_code == 0, run.output
    document = score_table(batch, RuleLabeler(), reference=truth, labels=tmp_path / "labels.csv", meteor=False)
    assert document["systems"]["predictions"]["micro f1"] == expected["systems"]["predictions"]["micro f1"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "batch"])
def test_label_reads_every_kind_of_table(tmp_path, batch, suffix):
    path, output = batch, tmp_path / "labels.csv"
    rows = [{"id": f"{name}.nii.gz", "report": text} for name, text in WRITTEN.items()]
    if suffix != "batch":
        path = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix != "batch":
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
            writer.writerows([["id", "report"], *(row.values() for row in rows)])
    labels = label_table(path, output, RuleLabeler())
    assert labels.tolist() == RuleLabeler().label_all(WRITTEN.values()).tolist()
    with output.open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [row["id"] for row in rows]
    run = CliRunner().invoke(app, ["label", str(path), "--output", str(tmp_path / "again.csv")])
    assert run.exit_code == 0 and (tmp_path / "again.csv").read_bytes() == output.read_bytes()


@pytest.mark.parametrize("value", [["Clear."], {"a": 1}, 5, True], ids=repr)
def test_label_refuses_reports_and_ids_that_are_no_text(tmp_path, value):
    path, output = tmp_path / "x.jsonl", tmp_path / "labels.csv"
    for column in ("report", "id") if value != 5 else ("report",):
        path.write_text(
            "".join(
                json.dumps(row) + "\n" for row in ({"id": 1, "report": "x"}, {"id": 2, "report": "x", column: value})
            )
        )
        with pytest.raises(DatasetError) as caught:
            label_table(path, output, RuleLabeler())
        assert [(problem.row, problem.field) for problem in caught.value.problems] == [(2, column)]
    assert not output.exists()


def test_label_takes_numbers_as_ids_and_missing_reports_as_empty(tmp_path):
    rows = [{"id": 0, "report": float("nan")}, {"id": 1, "report": None}, {"id": 2}, {"id": 3, "report": "A nodule."}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = label_table(tmp_path / "x.jsonl", tmp_path / "labels.csv", RuleLabeler())
    assert labels.sum(axis=1).tolist() == [0, 0, 0, 1]
    (tmp_path / "y.jsonl").write_text(json.dumps({"id": 1, "text": "x"}) + "\n")
    for name, field in ("y.jsonl", "header"), ("absent.csv", "file"):
        with pytest.raises(DatasetError) as caught:
            label_table(tmp_path / name, tmp_path / "labels.csv", RuleLabeler())
        assert [problem.field for problem in caught.value.problems] == [field]


def test_unusable_files_and_unknown_ids_are_refused(tmp_path, truth, batch):
    with batch.open("a") as file:
        file.write(json.dumps({"id": "q.nii.gz", "report": "x", "settings_sha256": ""}) + "\n")
    with pytest.raises(DatasetError, match=r"metadata.csv \('q'\): row: missing"):
        score_table(batch, RuleLabeler(), reference=truth, meteor=False)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    (tmp_path / "x.jsonl").write_text("[1]\nnone\n")
    for name, said in {
        "x.parquet": "content: unreadable",
        "x.jsonl": "row 1: line: a list .*\n.*row 2: line: unreadable from column 1 on",
        "y.jsonl": "missing",
    }.items():
        with pytest.raises(DatasetError, match=said):
            score_table(tmp_path / name, RuleLabeler(), meteor=False)


CLEAR = REPORTS["c.d"]
NO_TEXTS = (["Clear."], {"Lung": "clear"}, 5, 1.5, True, False, 0, [])


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("value", NO_TEXTS, ids=repr)
@pytest.mark.parametrize("column", ["prediction", "reference", "near"])
def test_report_that_is_no_text_is_refused_with_its_row(tmp_path, value, column):
    row = {"id": "a", "prediction": "x", "reference": CLEAR, "near": "y"}
    path = write_lines(tmp_path / "reports.jsonl", row, {**row, "id": "b", column: value})
    with pytest.raises(DatasetError) as caught:
        score_table(path, RuleLabeler(), meteor=False, nearest_column="near")
    assert [(p.table, p.row, p.field) for p in caught.value.problems] == [("reports.jsonl", 2, column)]


@pytest.mark.parametrize("value", NO_TEXTS, ids=repr)
def test_text_columns_of_two_files_and_training_are_checked(tmp_path, expected, value):
    good, bad = {"id": 1, "report": CLEAR}, {"id": 2, "report": value}
    one = write_lines(tmp_path / "one.jsonl", good, {"id": 2, "report": "x"})
    two = write_lines(tmp_path / "two.jsonl", good, bad)
    for source, options in (
        (one, {"reference": two}),
        (two, {"reference": one}),
        (tmp_path / "both.csv", {"training": two}),
    ):
        with pytest.raises(DatasetError) as caught:
            score_table(source, RuleLabeler(), meteor=False, **options)
        assert [(p.table, p.row, p.field) for p in caught.value.problems] == [("two.jsonl", 2, "report")]


def test_bytes_in_parquet_are_refused(tmp_path):
    rows = [{"id": "a", "prediction": b"Clear.", "reference": CLEAR}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "reports.parquet")
    with pytest.raises(DatasetError) as caught:
        score_table(tmp_path / "reports.parquet", RuleLabeler(), meteor=False)
    assert [(p.row, p.field) for p in caught.value.problems] == [(1, "prediction")]


@pytest.mark.parametrize("value", [["a"], {"a": 1}, True], ids=repr)
@pytest.mark.parametrize("column", ["id", "path"])
def test_id_that_is_no_text_or_number_is_refused(tmp_path, value, column):
    rows = [
        {column: value, "prediction": "x", "reference": CLEAR},
        {column: 7, "prediction": "x", "reference": CLEAR},
    ]
    path = write_lines(tmp_path / "reports.jsonl", *rows)
    with pytest.raises(DatasetError) as caught:
        score_table(path, RuleLabeler(), meteor=False)
    assert [(p.row, p.field) for p in caught.value.problems] == [(1, column)]
    assert score_table(write_lines(path, rows[1]), RuleLabeler(), meteor=False)["n"] == 1


@pytest.mark.parametrize("value", ["Not given.", "nan", "", None, float("nan")], ids=repr)
def test_true_report_without_text_is_refused(tmp_path, value):
    path = write_lines(tmp_path / "both.jsonl", {"id": 1, "prediction": CLEAR, "reference": value})
    one = write_lines(tmp_path / "one.jsonl", {"id": 1, "report": CLEAR})
    two = write_lines(tmp_path / "two.jsonl", {"id": 1, "report": value})
    for source, reference, field in (path, None, "reference"), (one, two, "report"):
        with pytest.raises(DatasetError) as caught:
            score_table(source, RuleLabeler(), meteor=False, reference=reference)
        assert [(p.row, p.field) for p in caught.value.problems] == [(1, field)]


@pytest.mark.parametrize("missing", [None, float("nan"), ""], ids=repr)
def test_missing_prediction_is_the_empty_text(tmp_path, missing):
    rows = [{"id": 1, "prediction": missing, "reference": CLEAR}, {"id": 2, "prediction": "x", "reference": CLEAR}]
    path = write_lines(tmp_path / "reports.jsonl", *rows)
    assert read_pairs(path, "id", "prediction", "reference") == [["1", "2"], ["", "x"], [CLEAR, CLEAR]]
    one = write_lines(tmp_path / "one.jsonl", *({"id": row["id"], "report": row["prediction"]} for row in rows))
    expected = score_table(path, RuleLabeler(), meteor=False)
    assert score_table(one, RuleLabeler(), meteor=False, reference=path) == expected


def test_training_reports_without_text_are_left_out(tmp_path, expected):
    words = [{"report": value} for value in ("Not given.", "nan", None, float("nan"), " ")]
    training = write_lines(tmp_path / "train.jsonl", *words, {"report": CLEAR})
    document = score_table(tmp_path / "both.csv", RuleLabeler(), meteor=False, training=training)
    scores = score_reports([CLEAR] * 3, list(REPORTS.values()), meteor=False).summary()
    assert document["systems"]["constant normal report"]["bleu_4"]["value"] == pytest.approx(scores["bleu_4"])
    with pytest.raises(DatasetError):
        score_table(tmp_path / "both.csv", RuleLabeler(), meteor=False, training=write_lines(training, *words))


def test_output_is_a_terminal_table_or_markdown(batch, truth, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = ["score", str(batch), "--reference", str(truth), "--no-meteor"]
    shown, page = (CliRunner().invoke(app, [*command, *more]).stdout for more in ([], ["--markdown"]))
    assert "┃" in shown and "| ---" not in shown and "1 true reports have no generated one" in shown
    assert "| predictions | " in page and "┃" not in page
    # The systems are columns, and each score has a line.
    assert any(line.startswith("│ bleu_4") for line in shown.splitlines())
