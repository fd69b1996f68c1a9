# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Studies as they are exported: several folders, discs, links, other objects and other programs' spellings."""

import os
import shutil

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import SegmentationStorage, generate_uid

from diffvp import slices_diffvp
from diffvp.reading_diffvp import read_ct
from diffvp.volume_diffvp import CTInputError, CTReadError

from .ct_samples import SPACING, make_ct, write_dicom
from .good_inputs import check, dicomdir

Z = SPACING[2]
LPS = make_ct()


def series(folder, name, hu=LPS, change=None):
    """Write a series whose file of slice k, from the lowest up, is `name(k)` below the folder."""
    written = sorted(write_dicom(folder / "written", hu, change=change).iterdir(), reverse=True)
    files = []
    for k, file in enumerate(written):
        target = folder / name(k)
        target.parent.mkdir(parents=True, exist_ok=True)
        files.append(file.rename(target))
    (folder / "written").rmdir()
    return files


def assert_told(source, lost) -> None:
    with pytest.raises(CTReadError) as caught:
        read_ct(source)
    assert any(file.name in str(caught.value) for file in lost), caught.value


# Lost slices


@pytest.mark.parametrize(
    "name", [lambda k: f"D{k // 9}/IM{k:04d}", lambda k: f"{k // 9}/{k}.dcm", lambda k: f"{k:04d}/image"]
)
def test_lost_slices_in_a_folder_of_their_own_are_named(tmp_path, name):
    files = series(tmp_path / "scan", name)
    for file in files[9:]:
        file.write_bytes(b"")
    assert_told(tmp_path / "scan", files[9:])
    check(read_ct(tmp_path / "scan", allow_incomplete=True), LPS[:, :, :9])
    shutil.make_archive(str(tmp_path / "scan"), "zip", tmp_path / "scan")
    assert_told(tmp_path / "scan.zip", files[9:])


@pytest.mark.parametrize("name", [".{}.dcm.x7Hq2a", ".{}.dcm.icloud", "{}.dcm~", ".{}.dcm.part"])
def test_file_under_a_temporary_name_counts_as_a_lost_slice(tmp_path, name):
    files = series(tmp_path, lambda k: f"IM{k:04d}.dcm")
    lost = tmp_path / name.format(files[17].stem)
    files[17].rename(lost).write_bytes(b"")
    assert_told(tmp_path, [lost])
    shutil.copy(files[16], files[17])
    one = pydicom.dcmread(files[17])
    one.ImagePositionPatient[2] += Z
    one.SOPInstanceUID = generate_uid()
    one.save_as(files[17])
    check(read_ct(tmp_path), np.concatenate([LPS[:, :, :17], LPS[:, :, 16:17]], axis=2))  # the file is there


def test_lost_slice_with_a_random_name_is_named(tmp_path):
    letters = "ZKGH2MQXAB3CDEFLNP"
    files = series(tmp_path, lambda k: letters[k:] + letters[:k])
    files[17].write_bytes(b"")
    assert_told(tmp_path, files[17:])


def test_files_beside_the_folders_of_slices_are_ignored(tmp_path):
    series(tmp_path, lambda k: f"D{k // 9}/IM{k:04d}")
    for name in ("V1/viewer1", "D7/README", "notes1", "autorun.inf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    check(read_ct(tmp_path), LPS)


def test_folder_with_dicomdir_misses_the_files_that_it_lists(tmp_path):
    directory, hu = dicomdir(tmp_path)
    check(read_ct(directory.parent), hu)
    files = [path for path in directory.parent.rglob("*") if path.is_file() and path.name != "DICOMDIR"]
    lost = max(files, key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    lost.unlink()
    for source in (directory, directory.parent):
        assert_told(source, [lost])
    check(read_ct(directory.parent, allow_incomplete=True), hu[:, :, :17])
    directory.write_bytes(directory.read_bytes()[:700])  # a damaged list takes nothing from the files
    check(read_ct(directory.parent), hu[:, :, :17])


def test_linked_folders_are_read_once(tmp_path):
    files = series(tmp_path / "scan", lambda k: f"IM{k:04d}")
    (tmp_path / "elsewhere").mkdir()
    for file in files[9:]:
        file.rename(tmp_path / "elsewhere" / file.name)
    (tmp_path / "scan/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "scan/loop").symlink_to(tmp_path / "scan")
    check(read_ct(tmp_path / "scan"), LPS)


def test_folder_without_dicom_names_its_files(tmp_path):
    for name in ("a.tar.gz", "page.png"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CTReadError, match=r"content: no DICOM file, but a\.tar\.gz, page\.png"):
        read_ct(tmp_path)


# Parts that are not one stack


@pytest.mark.parametrize("field", ["StudyInstanceUID", "FrameOfReferenceUID"])
def test_adjacent_scans_of_two_patients_under_one_uid_are_never_one(tmp_path, field):
    parts, uid = [make_ct(seed=seed) for seed in (0, 1)], generate_uid()
    for number, part in enumerate(parts):

        def change(k, one, number=number):
            one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = uid, "1.2", "1.3"
            setattr(one, field, f"1.4.{number}")
            one.ImagePositionPatient = [40, -25, 300 + (k + 18 * number) * Z]

        write_dicom(tmp_path / "s", part, change=change, prefix=str(number))
    with pytest.raises(CTReadError, match="series: none chosen"):
        read_ct(tmp_path / "s")
    for number, part in enumerate(parts, 1):
        check(read_ct(tmp_path / "s", series=number), part)


@pytest.mark.parametrize("distance", [0.4, 1.0, 1.25, 4.0, 60.0])
def test_acquisitions_at_a_distance_can_be_chosen(tmp_path, distance):
    parts, uid = [make_ct(seed=seed) for seed in (0, 1)], generate_uid()
    for number, part in enumerate(parts):

        def change(k, one, number=number):
            one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = uid, "1.2", "1.3"
            one.AcquisitionNumber = number + 1
            one.ImagePositionPatient = [40, -25, 300 + k * Z + number * (17 * Z + distance)]

        write_dicom(tmp_path / "s", part, change=change, prefix=str(number))
    with pytest.raises(CTReadError, match="series: none chosen"):
        read_ct(tmp_path / "s")
    for number, part in enumerate(parts, 1):
        check(read_ct(tmp_path / "s", series=number), part)


def test_adjacent_parts_of_two_grids_can_be_chosen(tmp_path):
    parts, uid = [make_ct(), make_ct((24, 20, 12), seed=1)], generate_uid()
    for number, part in enumerate(parts):

        def change(k, one, number=number):
            one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = uid, "1.2", "1.3"
            one.ImagePositionPatient = [40, -25, 300 + (k + 18 * number) * Z]

        write_dicom(tmp_path / "s", part, change=change, prefix=str(number))
    found = [read_ct(tmp_path / "s", series=number) for number in (1, 2)]
    for volume, part in zip(found, parts, strict=True):
        check(volume, part)


def test_one_missing_slice_is_still_refused(tmp_path):
    files = series(tmp_path, lambda k: f"{k}", change=lambda k, one: setattr(one, "AcquisitionNumber", 1 + k // 9))
    files[4].unlink()
    with pytest.raises(CTInputError, match="slices are missing"):
        read_ct(tmp_path)


def test_equal_names_in_two_folders_are_told_apart(tmp_path):
    uid = generate_uid()
    for folder, spacing in (("a", 0.7), ("b", 0.9)):

        def change(k, one, folder=folder, spacing=spacing):
            one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = uid, "1.2", "1.3"
            one.PixelSpacing = [spacing, spacing]
            one.ImagePositionPatient = [40, -25, 300 + (k + 4 * (folder == "b")) * Z]

        write_dicom(tmp_path / "scan" / folder, make_ct((26, 22, 4)), change=change)
    with pytest.raises(CTInputError) as caught:
        read_ct(tmp_path / "scan")
    assert f"a{os.sep}" in str(caught.value) and f"b{os.sep}" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


# Neighbours


def segmentation(items: int) -> Dataset:
    one = Dataset()
    one.file_meta = pydicom.dataset.FileMetaDataset()
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = SegmentationStorage
    one.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    one.SOPInstanceUID, one.Modality = generate_uid(), "SEG"
    one.PerFrameFunctionalGroupsSequence = Sequence([Dataset() for _ in range(items)])
    return one


def test_large_object_of_another_class_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(slices_diffvp, "MAX_ITEMS", 100)
    write_dicom(tmp_path, LPS)
    segmentation(101).save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    check(read_ct(tmp_path), LPS)


@pytest.mark.parametrize("own_uid", [True, False])
def test_image_without_a_position_is_skipped(tmp_path, own_uid):
    file = sorted(write_dicom(tmp_path, LPS).iterdir())[0]
    page = pydicom.dcmread(file)
    page.SOPInstanceUID = generate_uid()
    if own_uid:
        page.SeriesInstanceUID = generate_uid()
    del page.ImagePositionPatient, page.ImageOrientationPatient, page.PixelSpacing
    page.save_as(tmp_path / "page")
    check(read_ct(tmp_path), LPS)
    page.PixelSpacing = [0.7, 0.7]  # a slice that has lost its place is no page
    page.save_as(tmp_path / "page")
    with pytest.raises(CTInputError):
        read_ct(tmp_path)


# Spellings


def test_duplicates_of_two_programs_are_dropped(tmp_path):
    """One wrote 1 and the other 1.000000, which are the same number."""
    for file in sorted(write_dicom(tmp_path / "a", LPS).iterdir()):
        one = pydicom.dcmread(file)
        for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            setattr(one, name, [f"{float(value):.6f}" for value in getattr(one, name)])
        one.RescaleSlope = f"{float(one.RescaleSlope):.6f}"
        (tmp_path / "b").mkdir(exist_ok=True)
        one.save_as(tmp_path / "b" / file.name)
    check(read_ct(tmp_path), LPS)


@pytest.mark.parametrize("excess", [b"\xff" * 512, b" " * 64, b"x" * 1000, b"123" * 5, bytes(4096)])
def test_padding_of_any_byte_behind_the_pixels_is_ignored(tmp_path, excess):
    write_dicom(tmp_path, LPS, change=lambda k, one: setattr(one, "PixelData", one.PixelData + excess))
    check(read_ct(tmp_path), LPS)


def test_rows_behind_the_pixels_are_refused(tmp_path):
    rows = np.arange(2 * LPS.shape[0], dtype="<u2").tobytes()
    write_dicom(tmp_path, LPS, change=lambda k, one: setattr(one, "PixelData", one.PixelData + rows))
    with pytest.raises(CTReadError, match="pixel data"):
        read_ct(tmp_path)


@pytest.mark.parametrize("frames", ["0", "01", "1"])
def test_number_of_frames_is_read_as_an_integer(tmp_path, frames):
    write_dicom(tmp_path, LPS, change=lambda k, one: setattr(one, "NumberOfFrames", frames))
    check(read_ct(tmp_path), LPS)


def test_empty_modality_lut_is_none(tmp_path):
    write_dicom(tmp_path, LPS, change=lambda k, one: setattr(one, "ModalityLUTSequence", Sequence()))
    check(read_ct(tmp_path), LPS)


def test_stated_number_of_images_counts_slices_that_share_an_instance_uid(tmp_path):
    def change(k, one):
        one.SOPInstanceUID, one.ImagesInAcquisition, one.AcquisitionNumber = "1.2.3", 18, 1

    files = series(tmp_path, lambda k: f"x{k}", change=change)
    check(read_ct(tmp_path), LPS)
    files[17].unlink()
    with pytest.raises(CTReadError, match="ImagesInAcquisition"):
        read_ct(tmp_path)


@pytest.mark.parametrize(
    ("field", "values"),
    [("AcquisitionDate", ("20200101", "20200102")), ("SeriesDate", ("20200101", "20200102")),
     ("FrameReferenceTime", ("0", "350")), ("TemporalPositionTimeOffset", (0.0, 350.0))],
)  # fmt: skip
def test_phases_that_only_a_date_or_time_tells_apart_can_be_chosen(tmp_path, field, values):
    parts, uid = [make_ct(seed=seed) for seed in (0, 1)], generate_uid()
    for number, part in enumerate(parts):

        def change(k, one, number=number):
            one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = uid, "1.2", "1.3"
            setattr(one, field, values[number])

        write_dicom(tmp_path / "s", part, change=change, prefix=str(number))
    for number, part in enumerate(parts, 1):
        check(read_ct(tmp_path / "s", series=number), part)
