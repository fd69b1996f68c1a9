# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Datasets in their original layouts, user tables, splits by patient, and the pool of normal references."""

import csv
import json
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from diffvp import cli
from diffvp.data.cases import (
    SHOWN_PROBLEMS,
    Case,
    DatasetError,
    Problem,
    check_no_leak,
    first_reconstructions,
    read_csv,
    read_ids,
    shown,
    split_by_patient,
)
from diffvp.data.ct_rate import load_ct_rate
from diffvp.data.ctrg import load_ctrg
from diffvp.data.load import load_dataset_cases, store_hub
from diffvp.data.phantom_cases import load_phantom
from diffvp.data.phantom_cohort import write_cohort
from diffvp.data.pool import build_pool, load_pool, normal_pool, other_scans
from diffvp.data.radgenome import load_radgenome
from diffvp.data.scans import list_scans
from diffvp.data.table import hub_cases, load_hub, load_table
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.nifti_diffvp import CTMetadata
from diffvp.reading_diffvp import read_ct
from diffvp.volume_diffvp import CTReadError

from .ct_samples import SPACING, lps_affine, make_ct, write_dicom
from .dataset_samples import TRAIN, label_row, touch, write_csv, write_ct_rate, write_ctrg, write_radgenome

SECRET = "Metastasis in the left upper lobe of Mrs Example"  # must not appear in any message


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def write_nifti(path: Path, array=None, spacing=SPACING, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = make_ct() if array is None else array
    nib.save(nib.Nifti1Image(array, lps_affine(spacing) if affine is None else affine), path)
    return path


def make_case(name: str, **fields) -> Case:
    fields = {"patient_id": name, "scan_id": name, "volume": Path(name), "report": "Clear."} | fields
    return Case(name, **fields)


def problems_of(call, *arguments, **options) -> list[tuple]:
    with pytest.raises(DatasetError) as caught:
        call(*arguments, **options)
    assert SECRET not in str(caught.value) and "Metastasis" not in str(caught.value)
    return [(problem.table, problem.row, problem.field, problem.name) for problem in caught.value.problems]


# Cases and problems --------------------------------------------------------------------------------------------------


def test_message_counts_all_problems_and_shows_the_first_ones():
    problems = [Problem("labels.csv", row, "Emphysema", "'7'", "0 or 1", f"scan_{row}") for row in range(2, 32)]
    error = DatasetError(problems)
    lines = str(error).splitlines()
    assert lines[0] == "30 problems in the dataset:"
    assert lines[1] == "- labels.csv, row 2 ('scan_2'): Emphysema: '7' (expected 0 or 1)"
    assert len(lines) == SHOWN_PROBLEMS + 3 and lines[-2] == "... and 10 more" and "exclude" in lines[-1]
    assert isinstance(error, ValueError) and len(error.problems) == 30
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_report_text_is_hidden_in_messages_and_case_repr():
    assert shown(SECRET) == f"text of {len(SECRET)} characters" and shown("train_1_a_1") == "'train_1_a_1'"
    assert SECRET not in str(DatasetError([Problem("t", 1, "id", "missing", "an id", SECRET)]))
    assert SECRET not in repr(make_case("a", report=SECRET, region_sentences={"lung": SECRET}))


patients = st.lists(st.integers(0, 30).map("patient_{}".format), min_size=2, max_size=60)


@settings(max_examples=50, deadline=None)
@given(patients, st.floats(0.01, 0.99), st.integers(0, 5), st.randoms())
def test_split_keeps_patients_together_in_any_order_of_cases(ids, fraction, seed, random):
    cases = [make_case(f"{patient}_{k}", patient_id=patient) for k, patient in enumerate(ids)]
    if len(set(ids)) < 2:
        with pytest.raises(ValueError, match="expected at least two"):
            split_by_patient(cases, fraction, seed)
        return
    train, validation = split_by_patient(cases, fraction, seed)
    assert train and validation and sorted(map(id, cases)) == sorted(map(id, train + validation))
    check_no_leak(train, validation)
    moved = random.sample(cases, len(cases))
    assert {case.name for case in split_by_patient(moved, fraction, seed)[1]} == {case.name for case in validation}


def test_patient_keeps_its_side_when_cases_are_added():
    cases = [make_case(f"p{k}") for k in range(400)]
    before, after = (split_by_patient(some, 0.2, seed=1)[1] for some in (cases[:200], cases))
    assert {case.name for case in before} == {case.name for case in after} & {case.name for case in cases[:200]}
    assert 50 < len(after) < 110
    assert {case.name for case in after} != {case.name for case in split_by_patient(cases, 0.2, seed=2)[1]}
    for fraction in (0, 1, -0.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_by_patient(cases, fraction, 0)


def test_patient_or_file_on_both_sides_is_a_leak():
    train = [make_case("a", patient_id="x"), make_case("b", volume=Path("same"))]
    validation = [make_case("c", patient_id="x"), make_case("d", patient_id="x"), make_case("e", volume=Path("same"))]
    assert [problem[2:] for problem in problems_of(check_no_leak, train, validation)] == [
        ("patient_id", "c"),  # once per patient
        ("volume", "e"),
    ]
    check_no_leak(train, [make_case("f")])


def test_first_reconstruction_of_each_scan_is_kept():
    names = ["s_10", "s_2", "t_1", "u"]
    cases = [make_case(name, scan_id=name[0]) for name in names]
    assert [case.name for case in first_reconstructions(cases)] == ["s_2", "t_1", "u"]


def test_malformed_csv_is_refused_and_excel_csv_read(tmp_path):
    for content, found in {
        b"": "header: empty",
        b"a,b\n1\n": "row 2: row: 1 fields (expected 2 ",
        b"a,a,b\n": "'a' twice",
        b'a,b\n"x"y,2\n': "unreadable",
        b"a,b\n\xff,2\n": "not UTF-8",
    }.items():
        (tmp_path / "t.csv").write_bytes(content)
        problems = []
        read_csv(tmp_path / "t.csv", ["a", "b"], problems)
        assert found in str(DatasetError(problems))
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfa,b\r\n\r\n1,"two\nlines"\r\n')  # as written by Excel
    [row] = read_csv(tmp_path / "t.csv", ["a"], [])
    assert row.number == 3 and row.values == {"a": "1", "b": "two\nlines"}


# CT-RATE -------------------------------------------------------------------------------------------------------------


def test_ct_rate_version_2_is_loaded(tmp_path):
    cases = load_ct_rate(write_ct_rate(tmp_path), "train")
    assert [case.name for case in cases] == TRAIN[:3]  # without the brain scan
    first, second, other = cases
    assert (first.patient_id, first.scan_id, other.scan_id) == ("train_1", "train_1_a", "train_1_b")
    assert second.scan_id == first.scan_id and second.report == first.report == "Report of train_1_a."
    assert first.volume == tmp_path / "dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"
    assert other.labels.dtype == np.int8 and other.labels.shape == (18,)
    assert [DIAGNOSIS_LABELS[k] for k in np.flatnonzero(other.labels)] == ["Emphysema"]
    assert [case.row for case in cases] == [2, 3, 4]
    assert first.metadata is None and first.disorders == "" and first.region_sentences == {}
    assert [case.name for case in load_ct_rate(tmp_path, "train", include=["train_1_b_1.nii.gz"])] == ["train_1_b_1"]
    assert [case.name for case in load_ct_rate(tmp_path, "train", exclude=["train_1_b_1"])] == TRAIN[:2]


@pytest.mark.parametrize("long", ["validation", "valid"])
def test_ct_rate_split_may_be_named_valid_or_validation(tmp_path, long):
    names = [name.replace("train", "valid") for name in TRAIN]
    write_ct_rate(tmp_path, "valid", names, "valid_fixed", long)
    for split in ("valid", "validation"):
        assert [case.name for case in load_ct_rate(tmp_path, split)] == names[:3]
    with pytest.raises(ValueError, match="unknown split 'test'"):
        load_ct_rate(tmp_path, "test")


def test_ct_rate_version_1_gives_the_same_volume_as_version_2(tmp_path):
    write_ct_rate(tmp_path, folder="train")
    assert load_ct_rate(tmp_path, "train")[0].metadata == CTMetadata(1.0, -8192.0, (1.5, 1.25, 2.5))
    old = load_ct_rate(tmp_path, "train")[0]
    array = make_ct()
    blank = nib.Nifti1Image(array.astype(np.float32) + 8192, None)
    nib.save(blank, old.volume)
    write_ct_rate(tmp_path)
    new = load_ct_rate(tmp_path, "train")[0]
    assert new.metadata is None and new.volume.parts[-4] == "train_fixed"
    write_nifti(new.volume, array)
    first, second = read_ct(old.volume, metadata=old.metadata), read_ct(new.volume)
    np.testing.assert_array_equal(first.slope * first.array + first.intercept, second.array)
    assert first.spacing == pytest.approx(SPACING) and second.spacing == pytest.approx(SPACING)


def test_ct_rate_version_1_requires_its_metadata(tmp_path):
    write_ct_rate(tmp_path, folder="train")
    table = tmp_path / "dataset/metadata/train_metadata.csv"
    replace_in(table, "train_1_a_1.nii.gz,Philips,1.0,-8192.0", "train_1_a_1.nii.gz,Philips,1.0,")
    replace_in(table, "HFS", "FFS")
    replace_in(table, "train_1_b_1", "train_1_c_1")
    assert problems_of(load_ct_rate, tmp_path, "train") == [
        (table.name, None, "row", "train_1_b_1"),
        (table.name, 2, "RescaleIntercept", "train_1_a_1"),
    ]
    table.unlink()
    assert problems_of(load_ct_rate, tmp_path, "train") == [(table.name, None, "file", "")]


def test_all_problems_of_ct_rate_are_reported_at_once(tmp_path):
    write_ct_rate(tmp_path, names=[*TRAIN[:3], "train_3_a_1", "train_4_a_1", "train_5_a_1", "train_9_a_1"])
    labels = tmp_path / "dataset/multi_abnormality_labels/train_predicted_labels.csv"
    reports = tmp_path / "dataset/radiology_text_reports/train_reports.csv"
    replace_in(labels, "train_1_a_1.nii.gz,0", "train_1_a_1.nii.gz,2")
    replace_in(labels, "train_1_a_2.nii.gz,0,0", f"train_1_a_2.nii.gz,,{SECRET}")
    replace_in(labels, "train_3_a_1", "train_1_b_1")  # one name twice, the other missing
    replace_in(labels, "train_4_a_1", "brain_4")
    replace_in(reports, "Report of train_1_a.", "Not given.")
    replace_in(reports, "Report of train_1_a.", "nan")
    replace_in(reports, "Report of train_1_b.", " ")
    (tmp_path / "dataset/train_fixed/train_1/train_1_b/train_1_b_1.nii.gz").unlink()
    (tmp_path / "dataset/train_fixed/train_5/train_5_a/train_5_a_1.nii.gz").unlink()
    found = problems_of(load_ct_rate, tmp_path, "train")
    assert sorted(found, key=str) == sorted(
        [
            (labels.name, 2, "Medical material", "train_1_a_1"),
            (labels.name, 3, "Medical material", "train_1_a_2"),
            (labels.name, 3, "Arterial wall calcification", "train_1_a_2"),
            (labels.name, 5, "VolumeName", "train_1_b_1"),
            (labels.name, 6, "VolumeName", ""),
            (labels.name, None, "row", "train_3_a_1"),
            (labels.name, None, "row", "train_4_a_1"),
            (reports.name, 2, "Findings_EN", "train_1_a_1"),
            (reports.name, 3, "Findings_EN", "train_1_a_2"),
            (reports.name, 4, "Findings_EN", "train_1_b_1"),
            (reports.name, None, "row", "brain_4"),
            (labels.name, 4, "volume", "train_1_b_1"),
            (labels.name, 7, "volume", "train_5_a_1"),
        ],
        key=str,
    )
    with pytest.raises(DatasetError, match=r"volume: missing \(expected 'dataset/train_fixed/train_5/train_5_a/"):
        load_ct_rate(tmp_path, "train", include=["train_5_a_1"])
    bad = {name for *_, name in found} | {"brain_4"}
    replace_in(labels, "train_5_a_1", "train_6_a_1")
    replace_in(reports, "train_5_a_1", "train_6_a_1")
    touch(tmp_path / "dataset/train_fixed/train_6/train_6_a/train_6_a_1.nii.gz")
    assert [case.name for case in load_ct_rate(tmp_path, "train", exclude=bad)] == ["train_6_a_1"]


def test_unknown_and_missing_label_columns_are_refused(tmp_path):
    write_ct_rate(tmp_path)
    labels = tmp_path / "dataset/multi_abnormality_labels/train_predicted_labels.csv"
    replace_in(labels, "Hiatal hernia", "Hernia")
    with pytest.raises(DatasetError) as caught:
        load_ct_rate(tmp_path, "train")
    assert [problem.row for problem in caught.value.problems] == [1, 1]
    assert "also Hiatal hernia" in str(caught.value) and "unknown label 'Hernia'" in str(caught.value)


def test_missing_dataset_files_are_named(tmp_path):
    assert problems_of(load_ct_rate, tmp_path, "train") == [
        ("train_predicted_labels.csv", None, "file", ""),
        ("train_reports.csv", None, "file", ""),
        ("dataset", None, "folder of volumes", ""),
    ]
    assert ("train_region_report.csv", None, "file", "") in problems_of(load_radgenome, tmp_path, "train")
    assert problems_of(load_ctrg, tmp_path, "train") == [("annotation.json", None, "file", "")]
    assert problems_of(load_table, tmp_path) == [(tmp_path.name, None, "table", "")]


def test_old_report_tables_with_accession_column_are_read(tmp_path):
    write_ct_rate(tmp_path)
    reports = tmp_path / "dataset/radiology_text_reports/train_reports.csv"
    replace_in(reports, "VolumeName", "AccessionNo")
    assert len(load_ct_rate(tmp_path, "train")) == 3
    replace_in(reports, "AccessionNo", "Accession")
    assert (reports.name, 1, "header", "") in problems_of(load_ct_rate, tmp_path, "train")


# RadGenome-ChestCT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "valid"])
def test_radgenome_is_loaded(tmp_path, split):
    first, second = load_radgenome(write_radgenome(tmp_path, split), split)
    assert first.volume == tmp_path / f"dataset/{split}_preprocessed/{split}_1/{split}_1a/{split}_1_a_1.nii.gz"
    assert (first.patient_id, first.scan_id) == (f"{split}_1", f"{split}_1_a")
    assert first.report == f"Whole report of {split}_1_a_1." and first.labels is None
    assert first.region_sentences == {
        "lung": "Emphysema in the right lung. Clear left lung.",
        "trachea and bronchie": "Open.",
        "others": "No more.",
    }
    assert (first.disorders, second.disorders) == ("Emphysema", "no findings")
    write_csv(
        tmp_path / f"dataset/multi_abnormality_labels/{split}_predicted_labels.csv",
        [
            label_row(name) for name in (f"{split}_1_a_1", f"{split}_1_a_2", f"{split}_2_b_1")
        ],  # CT-RATE's table has more volumes
    )
    cases = load_radgenome(tmp_path, split)
    assert [case.labels.sum() for case in cases] == [0, 0]
    assert [case.name for case in normal_pool(cases)] == [f"{split}_2_b_1"]


@pytest.mark.parametrize("whole", ["nan", "whole", "Whole scan"])
def test_radgenome_whole_report_row_has_several_names(tmp_path, whole):
    write_radgenome(tmp_path)
    replace_in(tmp_path / "dataset/radgenome_files/train_region_report.csv", ".gz,,", f".gz,{whole},")
    assert load_radgenome(tmp_path, "train")[0].report == "Whole report of train_1_a_1."


def test_radgenome_repeated_whole_report_keeps_the_longest(tmp_path):
    write_radgenome(tmp_path)
    regions = tmp_path / "dataset/radgenome_files/train_region_report.csv"
    replace_in(regions, "train_1_a_1.nii.gz,others,No more.", "train_1_a_1.nii.gz,nan,Whole report")
    replace_in(regions, "train_2_b_1.nii.gz,,Whole report of", "train_2_b_1.nii.gz,,report of")
    replace_in(regions, "train_2_b_1.nii.gz,others,No more.", "train_2_b_1.nii.gz,,Whole report of train_2_b_1.")
    reports = [case.report for case in load_radgenome(tmp_path, "train")]
    assert reports == ["Whole report of train_1_a_1.", "Whole report of train_2_b_1."]


def test_all_problems_of_radgenome_are_reported_at_once(tmp_path):
    write_radgenome(tmp_path)
    regions = tmp_path / "dataset/radgenome_files/train_region_report.csv"
    disorders = tmp_path / "dataset/radgenome_files/train_case_disorders.csv"
    replace_in(regions, "train_1_a_1.nii.gz,others", "train_1_a_1.nii.gz,spleen/left")
    replace_in(regions, "train_1_a_1.nii.gz,heart,", "train_1_a_1.nii.gz,,Another report.")
    replace_in(regions, "train_2_b_1.nii.gz,,Whole report of train_2_b_1.", f"train_2_b_1.nii.gz,lung,{SECRET}")
    replace_in(regions, "train_2_b_1.nii.gz,others", ",others")
    replace_in(disorders, "no findings", "")
    (tmp_path / "dataset/train_preprocessed/train_2/train_2b/train_2_b_1.nii.gz").unlink()
    assert sorted(problems_of(load_radgenome, tmp_path, "train"), key=str) == sorted(
        [
            (regions.name, 7, "Anatomy", "train_1_a_1"),
            (regions.name, 8, "Anatomy", "train_1_a_1"),
            (regions.name, 14, "Volumename", ""),
            (regions.name, 9, "rows", "train_2_b_1"),
            (regions.name, 9, "volume", "train_2_b_1"),
            (disorders.name, 3, "Disorders", "train_2_b_1"),
        ],
        key=str,
    )
    replace_in(disorders, "train_2_b_1", "train_1_a_1")
    found = problems_of(load_radgenome, tmp_path, "train")
    assert (disorders.name, 3, "Volumename", "train_1_a_1") in found
    assert (disorders.name, None, "row", "train_2_b_1") in found


# The phantom cohort --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort")
    return write_cohort(root, train=5, valid=2, seed=4, matrix=48, masks=False, workers=1, progress=False)


def test_phantom_cases_agree_with_their_tables(cohort):
    dataset = cohort / "dataset"

    def rows(path):
        with (dataset / path).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    for split, long in (("train", "train"), ("valid", "validation")):
        cases = load_phantom(cohort, split)
        labels = rows(f"multi_abnormality_labels/{split}_predicted_labels.csv")
        reports = rows(f"radiology_text_reports/{long}_reports.csv")
        disorders = rows(f"radgenome_files/{long}_case_disorders.csv")
        regions = rows(f"radgenome_files/{long}_region_report.csv")
        for case, label, report, disorder in zip(cases, labels, reports, disorders, strict=True):
            assert case.name + ".nii.gz" == case.volume.name == label["VolumeName"]
            assert [str(value) for value in case.labels] == [label[name] for name in DIAGNOSIS_LABELS]
            assert case.report == report["Findings_EN"] and case.disorders == disorder["Disorders"]
            own = {row["Anatomy"]: row["Sentence"] for row in regions if row["Volumename"] == case.volume.name}
            assert case.region_sentences == {region: text for region, text in own.items() if region}
            assert case.volume.is_file() and case.metadata is None
        expected = [case.name for case in cases if not case.labels.any() and case.disorders == "No findings"]
        assert [case.name for case in normal_pool(cases)] == expected
        assert [case.name for case in load_dataset_cases("phantom", cohort, split)] == [case.name for case in cases]


def test_phantom_reader_names_each_problem(cohort, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'test'"):
        load_phantom(cohort, "test")
    for path in (cohort / "dataset").rglob("*.csv"):
        copy = tmp_path / path.relative_to(cohort)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / "dataset/valid_fixed").symlink_to(cohort / "dataset/valid_fixed")
    disorders = tmp_path / "dataset/radgenome_files/validation_case_disorders.csv"
    disorders.write_text("\n".join(disorders.read_text().splitlines()[:-1]) + "\n")
    labels = tmp_path / "dataset/multi_abnormality_labels/valid_predicted_labels.csv"
    replace_in(labels, ",0", ",2")
    assert problems_of(load_phantom, tmp_path, "valid") == [
        (labels.name, 2, "Medical material", "valid_1_a_1"),
        (disorders.name, None, "row", "valid_2_a_1"),
    ]


# CTRG ----------------------------------------------------------------------------------------------------------------


def test_ctrg_is_loaded(tmp_path):
    content = {
        "train": [{"id": 0, "finding": "Of Dia-LLaMA.", "image_path": ["0.npz"]}, {"id": "7", "finding": "x"}],
        "val": [{"id": 1, "findings": "Of MvKeTR.", "clip_indices": [3]}],
        "test": [{"id": 2, "finding": "x"}],
    }
    write_ctrg(tmp_path, content)
    first, second = load_ctrg(tmp_path, "train")
    assert (first.name, first.report, first.row) == ("0", "Of Dia-LLaMA.", 1)
    assert first.patient_id == first.scan_id == "0" and first.labels is None
    assert second.volume == tmp_path / "CTRG-Chest-548K_volume/7.nii.gz"
    [validation] = load_ctrg(tmp_path, "validation")
    assert (validation.name, validation.report) == ("1", "Of MvKeTR.")
    assert [case.name for case in load_ctrg(tmp_path, "train", exclude=["0"])] == ["7"]
    with pytest.raises(DatasetError, match="'no', not of this split"):
        build_pool(load_ctrg(tmp_path, "train"), ids=["no"])


def test_all_problems_of_ctrg_are_reported_at_once(tmp_path):
    content = {
        "train": [{"id": 0, "finding": " "}, {"finding": SECRET}, {"id": 1}, {"id": 3, "finding": SECRET}],
        "test": [{"id": 3, "finding": "x"}, {"id": 4, "finding": ""}],
    }
    write_ctrg(tmp_path, content)
    (tmp_path / "CTRG-Chest-548K_volume/3.nii.gz").unlink()
    train, test = "annotation.json[train]", "annotation.json[test]"
    assert problems_of(load_ctrg, tmp_path, "train") == [
        (train, 1, "finding", "0"),
        (train, 2, "id", ""),
        (train, 3, "finding", "1"),
        (train, 4, "volume", "3"),
        (test, 1, "id", "3"),
    ]
    assert problems_of(load_ctrg, tmp_path, "valid")[0] == ("annotation.json", None, "splits", "")
    for text in ("[1]", '{"train": 1}', '{"train": [', '{"train": "' + SECRET):
        (tmp_path / "annotation.json").write_text(text)
        assert problems_of(load_ctrg, tmp_path, "train") == [("annotation.json", None, "content", "")]


# User tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """Folder with scans of four formats, in which a table can be written."""
    for name in ("scans/a.nii.gz", "scans/b.nrrd", "c.mha"):
        touch(tmp_path / name)
    write_dicom(tmp_path / "scans/d", make_ct())
    return tmp_path


def test_table_needs_only_path_and_report(own):
    paths = ["scans/a.nii.gz", "scans/b.nrrd", str(own / "c.mha"), "scans/d"]
    expected = {"scans/a": paths[0], "scans/b": paths[1], "c": "c.mha", "scans/d": paths[3]}
    csv_table = write_csv(own / "metadata.csv", [{"path": path, "report": f"Of {path}."} for path in paths])
    jsonl = own / "other.jsonl"
    jsonl.write_text("".join(json.dumps({"file_name": path, "report": f"Of {path}."}) + "\n" for path in paths))
    for root in (own, csv_table, jsonl):
        cases = load_table(root)
        assert {case.name: case.volume for case in cases} == {k: own / v for k, v in expected.items()}
        assert all(case.patient_id == case.scan_id == case.name for case in cases)
        assert all(case.labels is None and case.normal is None for case in cases)
        assert [case.report for case in cases] == [f"Of {path}." for path in paths]
    volume = read_ct(load_table(own)[3].volume)
    np.testing.assert_array_equal(volume.array, make_ct())


def test_every_known_column_of_a_table_is_read(own):
    row = {"path": "scans/d", "report": "All of it.", "id": "x.nii.gz", "patient_id": "p", "scan_id": "s"}
    row |= {"split": "training", "normal": "0", "lung": "Clear.", "others": "", "hospital": "any other column"}
    row |= dict.fromkeys(DIAGNOSIS_LABELS, "0") | {"Emphysema": "1.0"}
    other = row | {"path": "c.mha", "id": "y", "split": "val", "normal": "1"}
    third = row | {"path": "scans/b.nrrd", "id": "z", "split": "test"}
    write_csv(own / "metadata.csv", [row, other, third])
    [case] = load_table(own, "train")
    assert (case.name, case.patient_id, case.scan_id, case.row) == ("x", "p", "s", 2)
    assert case.normal is False and case.labels.sum() == 1 and case.region_sentences == {"lung": "Clear."}
    assert [case.name for case in load_table(own, "validation")] == ["y"]
    assert [case.name for case in load_table(own)] == ["x", "y", "z"]
    assert [case.name for case in load_table(own, exclude=["x", "y.nii.gz"])] == ["z"]
    assert problems_of(load_table, own, include=["nobody"]) == [("metadata.csv", None, "row", "nobody")]


def test_table_is_found_in_the_folder_of_the_split(own):
    (own / "train").mkdir()
    write_csv(own / "train/metadata.csv", [{"path": "../c.mha", "report": "x"}])
    assert len(load_table(own, "train")) == 1
    assert problems_of(load_table, own, "valid") == [(own.name, None, "table", "")]
    touch(own / "train/metadata.jsonl")
    assert problems_of(load_table, own, "train") == [("train", None, "table", "")]


def test_json_lines_may_lack_values_and_hold_any_character(own):
    rows = [
        {"path": "scans/d", "report": "Line one.\u2028Line two.\x85", "id": 0, "normal": True},
        {"path": "c.mha", "report": None, "normal": False},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (own / "metadata.jsonl").write_text(text + "\n{\n\n[1]\n", encoding="utf-8")
    assert problems_of(load_table, own) == [
        ("metadata.jsonl", 3, "line", ""),
        ("metadata.jsonl", 5, "line", ""),
        ("metadata.jsonl", 2, "report", "c"),
    ]
    (own / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert problems_of(load_table, own) == [("metadata.jsonl", 2, "report", "c")]
    [case] = load_table(own, exclude=["c"])
    assert case.name == "0" and case.report == rows[0]["report"] and case.normal is True


def test_all_problems_of_a_table_are_reported_at_once(own):
    (own / "empty").mkdir()
    touch(own / "picture.png")
    rows = [
        {"path": "scans/d", "report": "x"},
        {"path": "scans/d", "report": "x", "id": "again"},
        {"path": "c.mha", "report": "Not given.", "normal": "yes"},
        {"path": SECRET, "report": "scans/a.nii.gz"},  # columns swapped
        {"path": SECRET * 9, "report": "x"},
        {"path": "", "report": "x"},
        {"path": "picture.png", "report": "x"},
        {"path": "empty", "report": "x", "patient_id": ""},
        {"path": "scans/b.nrrd", "report": "x", "id": "again", "split": "both", "normal": ""},
    ]
    columns = {"id": "", "patient_id": "p", "split": "train", "normal": "0"}
    write_csv(own / "metadata.csv", [columns | row for row in rows])
    found = [(row, field) for _, row, field, _ in problems_of(load_table, own)]
    assert found == [
        (3, "path"),
        (4, "normal"),
        (4, "report"),
        (5, "path"),
        (6, "path"),
        (7, "path"),
        (8, "path"),
        (9, "path"),
        (9, "patient_id"),
        (10, "split"),
        (10, "normal"),
        (10, "id"),
    ]


def test_misspelt_column_names_are_refused(own):
    write_csv(own / "metadata.csv", [{"path": "c.mha", "report": "x", "PatientID": "1", "Emphysema": "0"}])
    with pytest.raises(DatasetError) as caught:
        load_table(own)
    labels, slip = caught.value.problems
    assert labels.field == slip.field == "header"
    assert "PatientID" in slip.found and "patient_id" in slip.expected
    assert DIAGNOSIS_LABELS[0] in labels.found and "Emphysema" not in labels.found
    write_csv(own / "metadata.csv", [{"file": "c.mha", "text": "x"}])
    assert [problem[2] for problem in problems_of(load_table, own)] == ["header", "header"]
    write_csv(own / "metadata.csv", [{"path": "c.mha", "report": "x"}])
    assert problems_of(load_table, own, "train") == [("metadata.csv", 1, "header", "")]


NO_TEXT = {"a list": ["Clear.", SECRET], "an object": {"findings": SECRET}, "a number": 5, "true or false": True}


def test_value_that_is_no_text_is_refused(own):
    """The `str` of a list or an object would be learnt as a report."""
    for found, value in NO_TEXT.items():
        for column in ("report", "lung"):
            row = {"path": "c.mha", "report": "Clear."} | {column: value}
            (own / "metadata.jsonl").write_text(json.dumps(row) + "\n")
            with pytest.raises(DatasetError) as caught:
                load_table(own)
            [problem] = caught.value.problems
            assert (problem.row, problem.field, problem.found, problem.expected) == (1, column, found, "text")
            assert "Metastasis" not in str(caught.value)
    for column in ("path", "id", "patient_id", "scan_id"):
        row = {"path": "c.mha", "report": "Clear."} | {column: ["x"]}
        (own / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        assert [problem[1:3] for problem in problems_of(load_table, own)] == [(1, column)]


def test_ids_may_be_numbers_and_missing_values_stay_missing(own):
    row = {"path": "c.mha", "report": "Clear.", "id": 7, "patient_id": 8, "scan_id": 9, "lung": None}
    (own / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    [case] = load_table(own)
    assert (case.name, case.patient_id, case.scan_id, case.region_sentences) == ("7", "8", "9", {})
    for missing in (None, float("nan")):
        (own / "metadata.jsonl").write_text(json.dumps(row | {"report": missing}) + "\n")
        with pytest.raises(DatasetError) as caught:
            load_table(own)
        assert [(problem.field, problem.found) for problem in caught.value.problems] == [("report", "empty")]


@pytest.mark.parametrize("value", NO_TEXT.values(), ids=list(NO_TEXT))
def test_value_of_ctrg_that_is_no_text_is_refused(tmp_path, value):
    write_ctrg(tmp_path, {"train": [{"id": 0, "finding": value}]})
    assert problems_of(load_ctrg, tmp_path, "train") == [("annotation.json[train]", 1, "finding", "0")]
    (tmp_path / "annotation.json").write_text(json.dumps({"train": [{"id": [0], "finding": "x"}]}))
    assert problems_of(load_ctrg, tmp_path, "train") == [("annotation.json[train]", 1, "id", "")]


def nifti_dataset(**columns):
    from datasets import Dataset, Nifti

    return Dataset.from_dict(columns).cast_column("scan", Nifti())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("value", [["Clear.", SECRET], {"findings": SECRET}, 5], ids=["list", "struct", "int"])
def test_column_of_datasets_that_is_no_text_is_refused(tmp_path, streaming, value):
    dataset = nifti_dataset(scan=[str(write_nifti(tmp_path / "a.nii.gz"))], report=[value])
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    assert problems_of(lambda: list(hub_cases(dataset))) == [("dataset", 1, "report", "" if not streaming else "a")]


@pytest.mark.parametrize("streaming", [False, True])
def test_row_of_datasets_without_a_scan_is_refused(tmp_path, streaming):
    path = str(write_nifti(tmp_path / "a.nii.gz"))
    for second, named in ((None, "y"), (str(tmp_path / "gone.nii.gz"), "y")):
        dataset = nifti_dataset(scan=[path, second], report=["x"] * 2, id=["x", "y"])
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        cases = hub_cases(dataset)
        assert next(cases).name == "x"
        assert problems_of(next, cases) == [("dataset", 2, "scan", named)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("names", [["negative", "positive"], ["Positive", "Negative"], ["1", "0"], ["present", "no"]])
def test_labels_of_a_dataset_are_told_by_the_names_of_their_classes(tmp_path, streaming, names):
    """The numbers of a `ClassLabel` say only in which order its classes stand."""
    from datasets import ClassLabel

    positive = next(number for number, name in enumerate(names) if name.lower() in ("positive", "present", "1"))
    labels = {label: [positive if k % 3 else 1 - positive] for k, label in enumerate(DIAGNOSIS_LABELS)}
    dataset = nifti_dataset(scan=[str(write_nifti(tmp_path / "a.nii.gz"))], report=["x"], **labels)
    for label in DIAGNOSIS_LABELS:
        dataset = dataset.cast_column(label, ClassLabel(names=names))
    [case] = hub_cases(dataset.to_iterable_dataset() if streaming else dataset)
    assert case.labels.tolist() == [int(k % 3 > 0) for k in range(len(DIAGNOSIS_LABELS))]


@pytest.mark.parametrize("names", [["mild", "severe"], ["unknown", "yes"]])
def test_label_of_a_dataset_with_unclear_classes_is_refused(tmp_path, names):
    from datasets import ClassLabel

    columns = {label: [0] for label in DIAGNOSIS_LABELS} | {"report": ["x"], "split": [0]}
    dataset = nifti_dataset(scan=[str(write_nifti(tmp_path / "a.nii.gz"))], **columns)
    dataset = dataset.cast_column("split", ClassLabel(names=["train", "test"]))
    [case] = hub_cases(dataset)
    label = DIAGNOSIS_LABELS[5]
    assert case.labels is not None and not case.labels.any()
    assert problems_of(lambda: list(hub_cases(dataset.cast_column(label, ClassLabel(names=names))))) == [
        ("dataset", 1, label, "")
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_without_rows_is_refused(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_nifti(tmp_path / "folder/a.nii.gz")
    (tmp_path / "folder/metadata.csv").write_text("file_name,report\n")
    options = {"data_dir": str(tmp_path / "folder"), "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    assert problems_of(lambda: list(load_hub("niftifolder", "train", **options))) == [
        ("niftifolder", None, "dataset", "")
    ]
    (tmp_path / "empty").mkdir()
    options["data_dir"] = str(tmp_path / "empty")
    assert problems_of(lambda: list(load_hub("niftifolder", "train", **options)))[0][2] == "dataset"


@pytest.mark.parametrize("streaming", [False, True])
def test_nifti_folder_is_loaded_through_datasets(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    rows = [{"file_name": f"scan_{k}.nii.gz", "report": f"Of {k}.", "patient_id": f"p{k}"} for k in range(2)]
    for k, row in enumerate(rows):
        write_nifti(folder / row["file_name"], make_ct(seed=k))
    write_csv(folder / "metadata.csv", rows)
    options = {"data_dir": str(folder), "streaming": streaming}
    if not streaming:
        options["cache_dir"] = str(tmp_path / "cache")
    cases = list(load_hub("niftifolder", "train", **options))
    assert [(case.name, case.patient_id, case.report, case.row) for case in cases] == [
        ("scan_0", "p0", "Of 0.", 1),
        ("scan_1", "p1", "Of 1.", 2),
    ]
    np.testing.assert_array_equal(read_ct(cases[1].volume).array, make_ct(seed=1))
    assert len(load_table(folder)) == 2  # the same folder without `datasets`


def test_stream_names_files_elsewhere_which_are_fetched(tmp_path, monkeypatch):
    """A stream of a folder on the Hub names its files (hf://...) and holds no bytes."""
    import fsspec
    from datasets import Dataset, Features, Nifti, Value

    fetched = fsspec.filesystem("memory")
    places = []
    for k in range(2):
        fetched.pipe(f"/scans/scan_{k}.nii.gz", write_nifti(tmp_path / f"{k}.nii.gz", make_ct(seed=k)).read_bytes())
        places.append({"path": f"memory://scans/scan_{k}.nii.gz", "bytes": None})
    places[1]["path"] = f"gzip://scan_1.nii::{places[1]['path']}"
    features = Features({"scan": Nifti(decode=False), "report": Value("string")})
    dataset = Dataset.from_dict({"scan": places, "report": ["A.", "B."]}, features=features)
    cases = list(hub_cases(dataset.to_iterable_dataset()))
    monkeypatch.setattr("diffvp.data.load.load_hub", lambda *args, **options: iter(cases))
    stored = store_hub("me/scans", "train", store=tmp_path / "store")
    for k, (case, kept) in enumerate(zip(cases, stored, strict=True)):
        assert case.name == f"scan_{k}" and kept.volume.is_relative_to(tmp_path)
        for volume in (case.volume, kept.volume):
            np.testing.assert_array_equal(read_ct(volume).array, make_ct(seed=k))
    fetched.rm("/scans", recursive=True)
    with pytest.raises(CTReadError, match="path: unreadable"):
        read_ct(cases[0].volume)


def test_datasets_of_the_wrong_form_are_refused(tmp_path):
    from datasets import Dataset, Features, Nifti, Value

    paths = [str(write_nifti(tmp_path / f"{k}.nii.gz")) for k in "abc"]
    features = Features({"scan": Nifti(), "report": Value("string")})
    dataset = Dataset.from_dict({"scan": paths, "report": [SECRET, "Not given.", None]}, features=features)
    # A dataset in memory reports all problems, a stream the first one.
    assert [row for _, row, _, _ in problems_of(lambda: list(hub_cases(dataset)))] == [2, 3]
    stream = hub_cases(dataset.to_iterable_dataset())
    assert next(stream).report == SECRET
    assert [row for _, row, _, _ in problems_of(next, stream)] == [2]
    double = Dataset.from_dict({"scan": [paths[0]] * 2, "report": ["x"] * 2}, features=features)
    assert [field for _, _, field, _ in problems_of(lambda: list(hub_cases(double)))] == ["id"]
    for columns, field in ((["report"], "columns of type Nifti"), (["scan"], "header")):
        assert [p[2] for p in problems_of(lambda c=columns: list(hub_cases(dataset.select_columns(c))))] == [field]


# Loading by the name of a layout -------------------------------------------------------------------------------------


def test_layouts_are_loaded_by_name(tmp_path):
    write_ct_rate(tmp_path)
    assert len(load_dataset_cases("ct-rate", tmp_path, "train")) == 3
    with pytest.raises(ValueError, match="layout: 'ct_rate' .expected one of phantom, radgenome, ct-rate"):
        load_dataset_cases("ct_rate", tmp_path, "train")
    with pytest.raises(ValueError, match="expected the name of a split"):
        load_dataset_cases("ct-rate", tmp_path, None)
    with pytest.raises(DatasetError, match="cases: none"):
        load_dataset_cases("ct-rate", tmp_path, "train", exclude=TRAIN)


# The pool ------------------------------------------------------------------------------------------------------------

ZERO, ONE = np.zeros(18, np.int8), np.eye(18, dtype=np.int8)[3]


def test_normal_rule_requires_labels_and_disorders_to_agree():
    cases = [
        make_case("a_1", scan_id="a", labels=ZERO, disorders="No findings"),
        make_case("a_2", scan_id="a", labels=ZERO, disorders="no findings "),
        make_case("b_1", labels=ONE, disorders="No findings"),
        make_case("c_1", labels=ZERO, disorders="no findings except a cyst"),
        make_case("d_1", labels=ZERO),
    ]
    pool = build_pool(cases)
    assert [case.name for case in pool.cases] == ["a_1", "d_1"] and "all 18 labels 0" in pool.rule
    assert [case.name for case in normal_pool(cases)] == ["a_1", "a_2", "d_1"]
    assert pool.counts == {
        "volumes": {"all": 5, "all-zero labels": 4, "no findings": 3, "both": 2},
        "scans": {"all": 4, "all-zero labels": 3, "no findings": 2, "both": 1},
    }
    assert pool.warnings == []


def test_pool_without_labels_requires_ids_or_a_normal_column():
    cases = [make_case(name) for name in "abc"]
    with pytest.raises(DatasetError) as caught:
        build_pool(cases)
    [problem] = caught.value.problems
    assert problem.field == "normal scans"
    assert all(way in problem.expected for way in ("18 labels", "`normal`", "--ids", "--read-reports"))
    pool = build_pool(cases, ids=["c.nii.gz", "a"])
    assert [case.name for case in pool.cases] == ["a", "c"] and pool.rule == "a list of ids"
    assert pool.counts["scans"] == {"all": 3, "all-zero labels": None, "no findings": None, "both": None}
    marked = [make_case(name, normal=name == "b") for name in "abc"]
    assert [case.name for case in build_pool(marked).cases] == ["b"]
    with pytest.raises(DatasetError, match="normal scans: none by the column normal"):
        build_pool([make_case("a", normal=False)])


def test_pool_members_must_be_cases_of_the_split(tmp_path):
    cases = [make_case(name, scan_id=name[0]) for name in ("a_1", "a_2", "b_1")]
    path = tmp_path / "pool.txt"
    path.write_text("b_1\n\na_1\n")
    pool = load_pool(path, cases)
    assert [case.name for case in pool] == ["a_1", "b_1"]
    assert other_scans(cases[1], pool) == ["b_1"]  # a_1 is the same scan
    path.write_text("a_1\nvalid_1_a_1\na_1\n")
    assert problems_of(load_pool, path, cases) == [("pool.txt", 2, "id", ""), ("pool.txt", 3, "id", "a_1")]


def test_abnormal_pool_members_are_named():
    cases = [
        make_case("a", labels=ONE, disorders="Emphysema"),
        make_case("b", labels=ZERO, disorders="no findings", report="Lung: Emphysema in both upper lobes."),
        make_case("c", labels=ZERO),
    ]
    warnings = build_pool(cases, ids=["a", "c"]).warnings
    assert warnings == ["'a' is not a normal scan: 1 of its labels are set; its disorders are not \"no findings\"."]
    assert build_pool(cases, ids=["c"]).warnings == ["The pool has only one scan, for which there is no reference."]


def test_abnormal_phantom_reports_are_detected_in_the_pool(cohort):
    cases = load_phantom(cohort, "train")
    ill = next(case for case in cases if case.labels.any())
    unmarked = [make_case(case.name, report=case.report, volume=case.volume) for case in cases]
    [warning] = [w for w in build_pool(unmarked, layout="phantom", ids=[ill.name]).warnings if ill.name in w]
    assert warning == f"'{ill.name}' is not a normal scan: its report names a finding."


def test_unusual_scans_in_the_pool_are_named(tmp_path):
    volumes = {name: write_nifti(tmp_path / f"{name}.nii.gz") for name in "abc"}
    volumes["thick"] = write_nifti(tmp_path / "thick.nii.gz", spacing=(1.5, 1.25, 8.0))
    volumes["picture"] = write_nifti(tmp_path / "picture.nii.gz", np.zeros((26, 22, 18), np.uint8))
    volumes["large"] = write_nifti(tmp_path / "large.nii", np.zeros((60, 22, 2), np.int16))
    volumes["dicom"] = write_dicom(tmp_path / "dicom", make_ct())
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8bbroken")
    volumes["broken"] = tmp_path / "broken.nii.gz"
    (tmp_path / "broken.mha").write_bytes(b"broken")
    volumes["broken too"] = tmp_path / "broken.mha"
    cases = [make_case(name, volume=volume) for name, volume in volumes.items()]
    assert build_pool(cases, ids=list(volumes)).warnings == [
        "'thick' looks like a scan of another kind: 8 mm between slices (usually 2.5).",
        "'picture' looks like a scan of another kind: no value below 0, so not in Hounsfield units.",
        "'large' looks like a scan of another kind: 60 columns (usually 26).",
    ]


def test_blank_headers_give_no_warning(tmp_path):
    metadata = CTMetadata(1.0, -1024.0, SPACING)
    cases = []
    for name in "ab":
        volume = write_nifti(tmp_path / f"{name}.nii.gz", (make_ct() + 1024).astype(np.uint16), affine=np.eye(4))
        cases.append(make_case(name, volume=volume, metadata=metadata))
    cases.append(make_case("c", volume=write_nifti(tmp_path / "c.nii.gz")))
    assert build_pool(cases, ids=["a", "b", "c"]).warnings == []


@pytest.mark.parametrize(
    ("split", "volumes", "scans", "normal_volumes", "normal_scans"),
    [("train", 47149, 24128, 5226, 2731), ("valid", 3039, 1564, 346, 181)],
)
def test_normal_scans_of_real_label_tables_have_known_counts(
    check_data, split, volumes, scans, normal_volumes, normal_scans
):
    """Labels alone select more than the paper's 1,787 and 124 scans; the disorders are not available here."""
    path = check_data / f"reports/ctrate_{split}_labels.csv"
    problems, cases = [], []
    for row in read_csv(path, ["VolumeName", *DIAGNOSIS_LABELS], problems):
        name = row.values["VolumeName"].removesuffix(".nii.gz")
        labels = np.array([int(row.values[label]) for label in DIAGNOSIS_LABELS], np.int8)
        scan = name.rsplit("_", 1)[0]
        cases.append(Case(name, scan.rsplit("_", 1)[0], scan, {"path": None, "bytes": None}, "x", labels))
    pool = build_pool(cases)
    assert not problems and len(pool.cases) == normal_scans
    assert all(case.name.endswith("_1") for case in pool.cases)
    assert (pool.counts["volumes"]["all"], pool.counts["volumes"]["all-zero labels"]) == (volumes, normal_volumes)
    assert (pool.counts["scans"]["all"], pool.counts["scans"]["all-zero labels"]) == (scans, normal_scans)


# The command ---------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.app, ["pool", "build", *map(str, arguments)])


def test_pool_command_writes_the_pool(cohort, tmp_path):
    output = tmp_path / "new" / "pool.txt"
    arguments = (cohort, "--layout", "phantom", "--split", "train", "--output", output)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    expected = normal_pool(load_phantom(cohort, "train"))
    # Each line has the path for `diffvp batch --reference`, too.
    assert [(scan.id, scan.path) for scan in list_scans(output)] == [(case.name, case.volume) for case in expected]
    assert f"{len(expected)} normal references by all 18 labels 0" in result.stdout
    assert load_pool(output, load_phantom(cohort, "train")) and read_ids(output) == [case.name for case in expected]
    result = run(*arguments, "--json")
    document = json.loads(result.stdout)
    assert document["size"] == document["counts"]["scans"]["both"] == len(expected)
    assert (document["layout"], document["split"], document["counts"]["volumes"]["all"]) == ("phantom", "train", 5)
    assert document["warnings"] == [line for line in result.stderr.splitlines() if line]


def test_pool_command_without_labels_requires_ids(own):
    write_csv(own / "metadata.csv", [{"path": path, "report": "x"} for path in ("c.mha", "scans/a.nii.gz")])
    arguments = (own, "--layout", "table", "--output", own / "pool.txt")
    result = run(*arguments)
    assert result.exit_code == 2 and "--ids" in result.stderr and not (own / "pool.txt").exists()
    (own / "ids.txt").write_text("c\nscans/a\n")
    result = run(*arguments, "--ids", own / "ids.txt")
    assert result.exit_code == 0, result.output
    assert (own / "pool.txt").read_text() == "c\tc.mha\nscans/a\tscans/a.nii.gz\n"
    assert run(*arguments[:-1], own / "lists/pool.txt", "--ids", own / "pool.txt").exit_code == 0
    assert (own / "lists/pool.txt").read_text() == f"c\t{own}/c.mha\nscans/a\t{own}/scans/a.nii.gz\n"
    assert run(*arguments, "--ids", own / "none.txt").exit_code == 2


def test_pool_command_lists_problems(tmp_path):
    write_ct_rate(tmp_path)
    arguments = (tmp_path, "--layout", "ct-rate", "--split", "train", "--output", tmp_path / "pool.txt")
    (tmp_path / "dataset/train_fixed/train_1/train_1_a/train_1_a_2.nii.gz").unlink()
    reports = tmp_path / "dataset/radiology_text_reports/train_reports.csv"
    replace_in(reports, "Report of train_1_b.", "Not given.")
    result = run(*arguments)
    assert result.exit_code == 2 and "2 problems in the dataset:\n- train_reports.csv, row 4" in result.stderr
    (tmp_path / "exclude.txt").write_text("train_1_a_2\ntrain_1_b_1\n")
    assert run(*arguments, "--exclude", tmp_path / "exclude.txt").exit_code == 0
    assert read_ids(tmp_path / "pool.txt") == ["train_1_a_1"]
    result = run(tmp_path, "--layout", "nifti", "--output", tmp_path / "pool.txt")
    assert result.exit_code == 2 and "'nifti'" in result.stderr
