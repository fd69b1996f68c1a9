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
from diffvp.metrics.report_table import score_table

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


def test_unusable_files_and_unknown_ids_are_refused(tmp_path, truth, batch):
    with batch.open("a") as file:
        file.write(json.dumps({"id": "q.nii.gz", "report": "x", "settings_sha256": ""}) + "\n")
    with pytest.raises(DatasetError, match=r"metadata.csv \('q'\): row: missing"):
        score_table(batch, RuleLabeler(), reference=truth, meteor=False)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    (tmp_path / "x.jsonl").write_text("[1]\nnone\n")
    for name, said in {
        "x.parquet": "content: unreadable",
        "x.jsonl": "row 2: line: no object",
        "y.jsonl": "missing",
    }.items():
        with pytest.raises(DatasetError, match=said):
            score_table(tmp_path / name, RuleLabeler(), meteor=False)


def test_output_is_a_terminal_table_or_markdown(batch, truth, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = ["score", str(batch), "--reference", str(truth), "--no-meteor"]
    shown, page = (CliRunner().invoke(app, [*command, *more]).stdout for more in ([], ["--markdown"]))
    assert "┃" in shown and "| ---" not in shown and "1 true reports have no generated one" in shown
    assert "| predictions | " in page and "┃" not in page
    # The systems are columns, and each score has a line.
    assert any(line.startswith("│ bleu_4") for line in shown.splitlines())
