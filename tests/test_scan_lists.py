# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The scans of folders and lists: links, unreadable folders, JSON lines, multi-frame DICOM files."""

import json
import os
import shutil

import pytest

from diffvp.data.cases import DatasetError
from diffvp.data.scans import list_references, list_scans
from diffvp.data.start import StartError, start
from diffvp.data.table import load_table
from diffvp.folders_diffvp import walk_files
from diffvp.reading_diffvp import read_ct

from .ct_samples import make_ct, write_dicom, write_enhanced
from .dataset_samples import touch
from .good_inputs import bare

SECRET = "Metastasis in the left upper lobe of Mrs Example"


def ids(source) -> list[str]:
    return [scan.id for scan in list_scans(source)]


def problems_of(source) -> list[tuple]:
    with pytest.raises(DatasetError) as caught:
        list_scans(source)
    assert SECRET not in str(caught.value) and "Metastasis" not in str(caught.value)
    return [(problem.table, problem.row, problem.field) for problem in caught.value.problems]


# Folders


@pytest.fixture
def ward(tmp_path):
    """Folder of links to patient folders that lie elsewhere."""
    for name in ("archive/p1/a.nii.gz", "archive/p2/deep/b.nii.gz", "ward/c.nii.gz"):
        touch(tmp_path / name)
    for name in ("p1", "p2"):
        os.symlink(f"../archive/{name}", tmp_path / "ward" / name)
    return tmp_path / "ward"


def test_linked_folders_are_listed(ward):
    assert ids(ward) == ["c.nii.gz", "p1/a.nii.gz", "p2/deep/b.nii.gz"]
    os.symlink("ward", ward.parent / "linked")
    assert ids(ward.parent / "linked") == ids(ward)


def test_loops_and_second_links_add_nothing(ward):
    os.symlink(".", ward / "loop")
    os.symlink("../ward", ward / "a loop")
    os.symlink("../archive/p1", ward / "p3")
    os.symlink("nowhere", ward / "broken")
    (ward / "real").mkdir()
    touch(ward / "real/d.nii.gz")
    os.symlink("real", ward / "alias")  # comes before the folder itself in order
    assert ids(ward) == ["c.nii.gz", "p1/a.nii.gz", "p2/deep/b.nii.gz", "real/d.nii.gz"]


def test_linked_folder_of_slices_is_one_scan(tmp_path):
    write_dicom(tmp_path / "archive/series", make_ct((12, 12, 4)))
    (tmp_path / "ward").mkdir()
    os.symlink("../archive/series", tmp_path / "ward/p1")
    assert ids(tmp_path / "ward") == ["p1"]


def test_walk_is_sorted_and_may_leave_out_hidden_folders(tmp_path):
    for name in ("b/2", "b/1", "a/c/3", ".hidden/4", "0"):
        touch(tmp_path / name)
    found = [(os.path.relpath(folder, tmp_path), names) for folder, names in walk_files(tmp_path)]
    assert found == [(".", ["0"]), (".hidden", ["4"]), ("a", []), (os.path.join("a", "c"), ["3"]), ("b", ["1", "2"])]
    assert [os.path.relpath(folder, tmp_path) for folder, _ in walk_files(tmp_path, hidden=False)] == [
        place for place, _ in found if place != ".hidden"
    ]


def test_unreadable_folder_is_refused_by_name(ward, monkeypatch):
    """Its scans would be left out otherwise. The tests may run as root, who can read any folder."""
    touch(ward / "locked/d.nii.gz")
    scandir = os.scandir

    def refuse(path="."):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert problems_of(ward) == [("ward", None, "folder")]
    with pytest.raises(DatasetError, match="locked"):
        list_scans(ward)
    with pytest.raises(StartError, match="locked: folder: unreadable"):
        start(ward)


# Lists


def test_json_lines_are_a_table(tmp_path):
    rows = [
        {"path": "a.nii.gz", "report": SECRET},
        {"path": "b.nii.gz", "id": 7},
        {"path": "c.nii.gz", "id": None},
        {"path": "d.nii.gz", "id": "x"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert ids(tmp_path / "list.jsonl") == ["a.nii.gz", "7", "c.nii.gz", "x"]
    assert list_scans(tmp_path / "list.jsonl")[1].path == tmp_path / "b.nii.gz"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"id": "a.nii.gz", "error": "CTReadError", "message": SECRET}], [("list.jsonl", 1, "header")]),
        ([{"path": ["a.nii.gz"]}, {"path": "b.nii.gz", "id": {"a": SECRET}}], [1, 2]),
        ([{"path": ""}, {"id": "a"}, {"path": "b.nii.gz"}], [1, 2]),
        ([SECRET], [("list.jsonl", 1, "line")]),
        ([], [("list.jsonl", None, "list")]),
    ],
)
def test_json_lines_of_another_form_are_refused(tmp_path, content, expected):
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    found = problems_of(tmp_path / "list.jsonl")
    assert found == expected or [row for _, row, _ in found] == expected


def test_missing_json_lines_are_refused(tmp_path):
    assert problems_of(tmp_path / "list.jsonl")[0] == ("list.jsonl", None, "file")


def test_missing_references_are_all_named(tmp_path):
    touch(tmp_path / "a.nii.gz")
    (tmp_path / "list.txt").write_text("a.nii.gz\nb.nii.gz\nc.nii.gz\n")
    with pytest.raises(DatasetError) as caught:
        list_references(tmp_path / "list.txt")
    assert [problem.name for problem in caught.value.problems] == ["b.nii.gz", "c.nii.gz"]
    (tmp_path / "list.txt").write_text("a.nii.gz\n")
    assert [scan.path for scan in list_references(tmp_path / "list.txt")] == [tmp_path / "a.nii.gz"]


# Multi-frame DICOM


@pytest.fixture
def enhanced(tmp_path):
    """Folder with a multi-frame file per patient."""
    for number in (1, 2):

        def change(one, uid=f"1.2.3.{number}"):
            one.SeriesInstanceUID = uid

        write_enhanced(tmp_path / f"enh/p{number}.dcm", make_ct(seed=number), change=change)
    return tmp_path / "enh"


def test_multi_frame_file_is_a_scan_by_name(enhanced):
    assert ids(enhanced / "p1.dcm") == ["p1.dcm"]
    shutil.copy(enhanced / "p1.dcm", enhanced / "IM0001")
    assert ids(enhanced / "IM0001") == ["IM0001"]
    (enhanced.parent / "list.txt").write_text("enh/p1.dcm\nenh/p2.dcm\n")
    [_, second] = list_scans(enhanced.parent / "list.txt")
    assert (read_ct(second.path).array == make_ct(seed=2)).all()


def test_multi_frame_file_may_be_a_row_of_a_table(enhanced):
    (enhanced.parent / "metadata.csv").write_text("path,report\nenh/p1.dcm,Clear.\nenh/p2.dcm,Clear.\n")
    cases = load_table(enhanced.parent)
    assert [case.name for case in cases] == ["enh/p1", "enh/p2"]
    assert (read_ct(cases[0].volume).array == make_ct(seed=1)).all()


def test_multi_frame_files_of_several_series_are_a_scan_each(enhanced):
    assert ids(enhanced) == ["p1.dcm", "p2.dcm"]
    shutil.copytree(enhanced, enhanced.parent / "more/enh")
    assert ids(enhanced.parent / "more") == ["enh/p1.dcm", "enh/p2.dcm"]


def test_other_folders_with_multi_frame_files_are_one_scan(enhanced):
    """Such as one file, the parts of one series, or slices next to it: the reader tells them apart."""
    one = enhanced.parent / "one"
    shutil.copytree(enhanced, one, ignore=shutil.ignore_patterns("p2.dcm"))
    assert ids(one) == ["one"]
    write_enhanced(one / "p1.dcm", make_ct(), range(6))
    write_enhanced(one / "p2.dcm", make_ct(), range(6, 18))
    assert ids(one) == ["one"]
    write_dicom(enhanced, make_ct((12, 12, 4)))
    assert ids(enhanced) == ["enh"]


def test_init_lists_multi_frame_files(enhanced):
    (enhanced / "p2.txt").write_text("Lung: clear.")
    started = start(enhanced)
    assert started.table.read_text().splitlines() == ["path,report", "p1.dcm,", "p2.dcm,Lung: clear."]


@pytest.mark.parametrize("name", ["IM0001", "scan.dic", "1.2.840.113704.7"])
def test_multi_frame_file_without_a_preamble_is_a_scan_wherever_it_is_named(tmp_path, name):
    file = write_enhanced(tmp_path / "s/scan.dcm", make_ct()).rename(tmp_path / "s" / name)
    bare(file)
    (tmp_path / "list.txt").write_text(f"s/{name}\n")
    assert ids(file) == [name] and ids(tmp_path / "s") == ["s"] and ids(tmp_path / "list.txt") == [f"s/{name}"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"path": f"s/{name}", "report": "Clear."}) + "\n")
    [case] = load_table(tmp_path)
    for path in (file, tmp_path / "s", case.volume):
        assert read_ct(path).array.shape == make_ct().shape


@pytest.mark.parametrize("suffix", [".dcm", ".DICOM", ".dic", ".IMA", ".17", ""])
def test_folder_of_slices_is_listed_whatever_their_suffix(tmp_path, suffix):
    for number, file in enumerate(write_dicom(tmp_path / "s", make_ct()).iterdir()):
        file.rename(file.with_name(f"slice{number}{suffix}"))
    assert ids(tmp_path) == ["s"]
