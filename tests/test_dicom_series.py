# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Series from archives, discs and interrupted downloads: no slice is silently lost, duplicated or mixed up."""

import copy
import shutil
import zipfile

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from diffvp.reading_diffvp import read_ct
from diffvp.resampling_diffvp import resample
from diffvp.volume_diffvp import CTGeometryError, CTInputError, CTReadError

from .ct_samples import SPACING, make_ct, write_dicom, write_enhanced
from .good_inputs import bare, check, dicomdir, implicit_that_says_explicit
from .marks import slow_except

Z = SPACING[2]
LPS = make_ct()


def renamed(folder, name):
    """Rename the slices by their position in the stack."""
    files = sorted(folder.iterdir(), reverse=True)  # from the lowest slice up
    return [file.rename(folder / name(k)) for k, file in enumerate(files)]


# Damaged and missing files

DAMAGE = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "a page of the portal": lambda content: b"<!DOCTYPE html><html><body>Session expired</body></html>",
    "a text": lambda content: b"404 not found",
    "cut within the preamble": lambda content: content[:100],
    "cut within the header": lambda content: content[:400],
    "cut before the pixels": lambda content: content[: content.index(b"\xe0\x7f\x10\0")],
    "cut within the pixels": lambda content: content[:-300],
    "zeros from the middle on": lambda content: content[:300] + bytes(len(content) - 300),
}
NAMES = {
    "IM0001.dcm": lambda k: f"IM{k:04d}.dcm",
    "1.dcm": lambda k: f"{k}.dcm",
    "no suffix": lambda k: f"IM_{k:04d}",
    "a number": lambda k: f"{k:08d}",
    "UID": lambda k: f"CT.1.2.840.113704.{700 + k}.{k * 7919}",
    "hash": lambda k: f"{(k + 1) * 2654435761 % 2**32:08x}-{k * 40503 % 65536:04x}",
    ".IMA": lambda k: f"CHEST.CT.0003.{k:04d}.IMA",
}
ENDS = {"upper": range(14, 18), "lower": range(4), "one": [17], "both": [0, 1, 17]}


def assert_told(source, lost) -> None:
    with pytest.raises(CTReadError) as caught:
        read_ct(source)
    assert any(file.name in str(caught.value) for file in lost), caught.value


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("ends", ["upper", "both"])
def test_damaged_files_at_the_ends_are_named(tmp_path, damage, ends):
    files = renamed(write_dicom(tmp_path / "s", LPS), NAMES["IM0001.dcm"])
    lost = [files[k] for k in ENDS[ends]]
    for file in lost:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert_told(tmp_path / "s", lost)
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, f"export/{file.name}")
    assert_told(tmp_path / "s.zip", lost)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ends", ENDS)
def test_empty_files_are_named_for_any_naming_scheme(tmp_path, name, ends):
    files = renamed(write_dicom(tmp_path / "s", LPS), NAMES[name])
    lost = [files[k] for k in ENDS[ends]]
    for file in lost:
        file.write_bytes(b"")
    assert_told(tmp_path / "s", lost)


def test_unfinished_downloads_are_named_unless_the_file_exists(tmp_path):
    files = renamed(write_dicom(tmp_path / "s", LPS), NAMES["IM0001.dcm"])
    finished = files[3].with_name(files[3].name + ".part")
    finished.write_bytes(b"")
    check(read_ct(tmp_path / "s"), LPS)
    part = files[17].rename(files[17].with_name(files[17].name + ".crdownload"))
    part.write_bytes(b"")
    assert_told(tmp_path / "s", [part])


def test_other_files_beside_the_slices_are_ignored(tmp_path):
    files = renamed(write_dicom(tmp_path / "s", LPS), NAMES["IM0001.dcm"])
    for name in ("notes.txt", "README", "._IM0003.dcm", ".DS_Store", "Thumbs.db", "viewer.exe", "IM0001.dcm.json",
                 "IM0001.jpg", "report1.pdf"):  # fmt: skip
        (files[0].parent / name).write_bytes(b"" if name == "notes.txt" else b"something else")
    check(read_ct(tmp_path / "s"), LPS)


def test_incomplete_series_is_read_on_request_with_a_warning(tmp_path):
    files = renamed(write_dicom(tmp_path / "s", LPS), NAMES["IM0001.dcm"])
    files[17].write_bytes(b"")
    files[16].write_bytes(files[16].read_bytes()[:-300])
    files[0].write_bytes(files[0].read_bytes()[:400])
    with pytest.raises(CTReadError, match="allow-incomplete|truncated|damaged"):
        read_ct(tmp_path / "s")
    volume = read_ct(tmp_path / "s", allow_incomplete=True)
    check(volume, LPS[:, :, 1:16])
    assert volume.warnings == ("Files of the series that could not be read: 3.",)
    assert resample(volume, (8, 8, 8))[1].warnings == volume.warnings
    files[8].write_bytes(b"")
    with pytest.raises(CTGeometryError, match="slices are missing"):
        read_ct(tmp_path / "s", allow_incomplete=True)


def test_complete_series_has_no_warning(tmp_path):
    assert read_ct(write_dicom(tmp_path / "s", LPS), allow_incomplete=True).warnings == ()


@pytest.mark.parametrize("field", ["ImagesInAcquisition", "NumberOfSeriesRelatedInstances"])
@pytest.mark.parametrize("lost", [[17], [0], [0, 1, 2, 16, 17]])
def test_fewer_slices_than_stated_in_the_header_are_refused(tmp_path, field, lost):
    def change(k, one):
        setattr(one, field, 18)
        one.AcquisitionNumber = 3

    files = sorted(write_dicom(tmp_path / "s", LPS, change=change).iterdir(), reverse=True)
    check(read_ct(tmp_path / "s"), LPS)
    for k in lost:
        files[k].unlink()
    shutil.copy(files[5], tmp_path / "s" / "copy.dcm")  # a copy does not replace a missing slice
    with pytest.raises(CTReadError, match=f"{field}: 18, with {18 - len(lost)} files there"):
        read_ct(tmp_path / "s")
    volume = read_ct(tmp_path / "s", allow_incomplete=True)
    assert volume.array.shape[2] == 18 - len(lost) and field in volume.warnings[0]


def test_images_in_acquisition_may_count_two_reconstructions(tmp_path):
    def change(k, one):
        one.AcquisitionNumber, one.ImagesInAcquisition = 1, 36

    for seed in (0, 1):
        write_dicom(tmp_path / "s" / str(seed), make_ct(seed=seed), change=change)
    with pytest.raises(CTReadError, match="series: none chosen"):
        read_ct(tmp_path / "s")
    assert {read_ct(tmp_path / "s", series=n).sha256 for n in (1, 2)} == {
        read_ct(make_ct(seed=seed), SPACING).sha256 for seed in (0, 1)
    }


def test_images_in_acquisition_of_reformatted_slices_is_ignored(tmp_path):
    def change(k, one):
        one.ImageType, one.ImagesInAcquisition = ["DERIVED", "SECONDARY", "REFORMATTED"], 300

    check(read_ct(write_dicom(tmp_path / "s", LPS, change=change)), LPS)


def test_missing_file_of_a_concatenation_is_refused(tmp_path):
    def change(one):
        one.ConcatenationUID, one.InConcatenationTotalNumber = "1.2.3.9", 3

    for start in (0, 6, 12):
        write_enhanced(tmp_path / "s" / f"{start}.dcm", LPS, range(start, start + 6), change=change)
    check(read_ct(tmp_path / "s"), LPS)
    (tmp_path / "s" / "12.dcm").unlink()
    with pytest.raises(CTReadError, match="InConcatenationTotalNumber: 3, with 2"):
        read_ct(tmp_path / "s")


def test_missing_file_listed_in_dicomdir_is_named(tmp_path):
    path, hu = dicomdir(tmp_path)
    check(read_ct(path), hu)
    files = sorted(file for file in path.parent.rglob("*") if file.is_file() and file != path)
    for file in files:  # some systems mount discs with lower-case names
        file.rename(file.with_name(file.name.lower()))
    check(read_ct(path), hu)
    files[-1].with_name(files[-1].name.lower()).unlink()
    with pytest.raises(CTReadError, match=f"{files[-1].name}: content: missing"):
        read_ct(path)


def test_dicomdir_cannot_read_outside_its_folder(tmp_path):
    path, _ = dicomdir(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"PT000000\\ST000000", b"..\\..\\ST000000000"))
    with pytest.raises(CTReadError, match="ReferencedFileID"):
        read_ct(path)


@pytest.mark.parametrize("cut", [0, 40, 200, 700, -300])
def test_damaged_dicomdir_is_refused(tmp_path, cut):
    path, _ = dicomdir(tmp_path)
    path.write_bytes(path.read_bytes()[:cut] if cut else b"no DICOM")
    with pytest.raises(CTReadError):
        read_ct(path)


def test_enhanced_file_is_read_and_single_slice_refused(tmp_path):
    hu = make_ct()
    check(read_ct(write_enhanced(tmp_path / "scan.dcm", hu)), hu)
    check(read_ct((tmp_path / "scan.dcm").rename(tmp_path / "IM0001")), hu)
    slice = write_dicom(tmp_path / "s", hu) / "001.dcm"
    with pytest.raises(CTReadError, match="001.dcm: number of frames: 1 .*folder"):
        read_ct(slice)
    (tmp_path / "x.dcm").write_bytes(b"no DICOM")
    with pytest.raises(CTReadError, match="x.dcm: content: no DICOM file"):
        read_ct(tmp_path / "x.dcm")
    with pytest.raises(CTReadError, match="spacing"):
        read_ct(tmp_path / "IM0001", spacing=SPACING)


# Without preamble


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("only", [range(18), range(14, 18), [0], [3, 9]])
def test_slices_without_a_preamble_are_read(tmp_path, implicit, only):
    files = sorted(write_dicom(tmp_path / "s", LPS).iterdir(), reverse=True)
    for k in only:
        one = pydicom.dcmread(files[k])
        data = pydicom.Dataset({element.tag: element for element in one})
        data.save_as(files[k], implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    check(read_ct(tmp_path / "s"), LPS)


def test_meta_header_without_preamble_or_prefix_is_read(tmp_path):
    for number, file in enumerate(sorted(write_dicom(tmp_path / "s", LPS).iterdir())):
        file.write_bytes(file.read_bytes()[128 if number % 2 else 132 :])
    check(read_ct(tmp_path / "s"), LPS)


def test_slices_without_a_preamble_in_a_zip_are_read(tmp_path):
    for file in write_dicom(tmp_path / "s", LPS).iterdir():
        bare(file)
    shutil.make_archive(str(tmp_path / "s"), "zip", tmp_path / "s")
    check(read_ct(tmp_path / "s.zip"), LPS)


# Mixed explicit and implicit VR


def mixed(private: int):
    """Return a change that adds a private implicit-VR element of this length to an explicit-VR data set."""

    def change(path):
        content = path.read_bytes()
        at = content.index(b"\x28\0\x02\0US")
        element = b"\x27\0\x10\x10" + private.to_bytes(4, "little") + b"A" * private
        path.write_bytes(content[:at] + element + content[at:])

    return change


@pytest.mark.parametrize("length", [0, 4, 10, 64, 300])
def test_implicit_elements_in_an_explicit_data_set_are_read(tmp_path, length):
    for path in write_dicom(tmp_path / "s", LPS).iterdir():
        mixed(length)(path)
    check(read_ct(tmp_path / "s"), LPS)


@pytest.mark.parametrize("length", [66, 72, 90])
def test_implicit_elements_with_ambiguous_length_are_read_or_refused(tmp_path, length):
    for path in write_dicom(tmp_path / "s", LPS).iterdir():
        mixed(length)(path)
    try:
        check(read_ct(tmp_path / "s"), LPS)
    except CTReadError:
        pass


def test_implicit_series_declared_explicit_is_read(tmp_path):
    for path in write_dicom(tmp_path / "s", LPS).iterdir():
        implicit_that_says_explicit(path)
    check(read_ct(tmp_path / "s"), LPS)


# Duplicated and mixed slices


def every(**fields):
    def change(k, one):
        for name, value in fields.items():
            setattr(one, name, value(k) if callable(value) else value)

    return change


TELLING = {
    "AcquisitionNumber": (1, 2), "TemporalPositionIdentifier": (1, 2), "ConvolutionKernel": ("B31f", "B70f"),
    "AcquisitionTime": ("101010", "101500"), "KVP": (80, 140), "SeriesNumber": (3, 4), "TriggerTime": (0, 350),
    "ContrastBolusAgent": ("none", "given"), "ImageType": (["ORIGINAL", "PRIMARY", "AXIAL", "A"],
                                                           ["ORIGINAL", "PRIMARY", "AXIAL", "B"]),
    "SliceThickness": (1, 5), "FilterType": ("LARGE BOWTIE", "BODY"), "IrradiationEventUID": ("1.2.1", "1.2.2"),
    "FrameOfReferenceUID": ("1.2.1", "1.2.2"), "SeriesDescription": ("Secret A", "Secret B"),
    "ScanOptions": ("HELICAL", "CARDIAC"), "ProtocolName": ("Secret native", "Secret venous"),
}  # fmt: skip


def assert_to_choose(source, parts) -> str:
    with pytest.raises(CTReadError, match="series: none chosen; available") as caught:
        read_ct(source)
    found = {read_ct(source, series=number).sha256 for number in range(1, len(parts) + 1)}
    assert found == {read_ct(part, SPACING).sha256 for part in parts}
    with pytest.raises(CTReadError, match="series"):
        read_ct(source, series=len(parts) + 1)
    assert "secret" not in str(caught.value).lower()
    return str(caught.value)


@pytest.mark.parametrize("field", TELLING)
@pytest.mark.parametrize("shift", slow_except([0.0, Z / 2], [0.0, Z / 2, 0.1 * Z]))
def test_interleaved_stacks_of_one_series_can_be_chosen(tmp_path, field, shift):
    uid, parts = generate_uid(), [make_ct(seed=seed) for seed in (0, 1)]
    for number, part in enumerate(parts):

        def change(k, one, number=number):
            one.SeriesInstanceUID = uid
            setattr(one, field, TELLING[field][number])
            one.ImagePositionPatient = [40, -25, 300 + k * Z + number * shift]

        write_dicom(tmp_path / "s", part, change=change, prefix=str(number))
    asked = assert_to_choose(tmp_path / "s", parts)
    for value in TELLING[field] if field in ("ConvolutionKernel", "SeriesNumber", "AcquisitionNumber") else ():
        assert str(value) in asked


def test_three_interleaved_phases_can_be_chosen(tmp_path):
    uid, parts = generate_uid(), [make_ct(seed=seed) for seed in range(3)]
    for number, part in enumerate(parts):
        fields = {
            "SeriesInstanceUID": uid,
            "AcquisitionNumber": 9 + number,
            "InstanceNumber": lambda k, n=number: 3 * k + n,
        }
        write_dicom(tmp_path / "s", part, change=every(**fields), prefix=str(number))
    asked = assert_to_choose(tmp_path / "s", parts)
    assert asked.index("acquisition 9") < asked.index("acquisition 10") < asked.index("acquisition 11")


def test_two_kernels_with_adjacent_acquisitions_can_be_chosen(tmp_path):
    uid, parts = generate_uid(), [make_ct(seed=seed) for seed in (0, 1)]
    for kernel, part in zip("AB", parts, strict=True):
        change = every(SeriesInstanceUID=uid, ConvolutionKernel=kernel, AcquisitionNumber=lambda k: 1 + k // 9)
        write_dicom(tmp_path / "s", part, change=change, prefix=kernel)
    assert_to_choose(tmp_path / "s", parts)


@pytest.mark.parametrize("field", ["AcquisitionNumber", "AcquisitionTime", "ConvolutionKernel"])
@pytest.mark.parametrize("period", [1, 3, 9])
def test_adjacent_acquisitions_are_one_stack(tmp_path, field, period):
    check(read_ct(write_dicom(tmp_path / "s", LPS, change=every(**{field: lambda k: str(100 + k // period)}))), LPS)


def test_slice_lacking_a_header_field_stays_in_its_stack(tmp_path):
    def change(k, one):
        if k != 7:
            one.AcquisitionNumber, one.ConvolutionKernel = 1, "B31f"

    check(read_ct(write_dicom(tmp_path / "s", LPS, change=change)), LPS)


def test_uid_of_several_stacks_requires_a_choice(tmp_path):
    for kernel, seed in (("A", 0), ("B", 1)):
        change = every(SeriesInstanceUID="1.2.3", ConvolutionKernel=kernel)
        write_dicom(tmp_path / "s", make_ct(seed=seed), change=change, prefix=kernel)
    with pytest.raises(CTReadError, match="series: several under this UID; available: 1: kernel A"):
        read_ct(tmp_path / "s", series="1.2.3")


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
def test_duplicate_instances_in_another_syntax_are_dropped(tmp_path, syntax):
    write_dicom(tmp_path / "a", LPS)
    (tmp_path / "a" / "again").mkdir()
    for path in sorted((tmp_path / "a").glob("*.dcm"))[:9]:
        one = pydicom.dcmread(path)
        uid = one.SOPInstanceUID
        if syntax == RLELossless:
            one.compress(RLELossless, generate_instance_uid=False)
        one.file_meta.TransferSyntaxUID, one.SOPInstanceUID = syntax, uid
        pydicom.dcmwrite(tmp_path / "a" / "again" / path.name, one, implicit_vr=syntax == ImplicitVRLittleEndian,
                         little_endian=True)  # fmt: skip
    check(read_ct(tmp_path / "a"), LPS)


@pytest.mark.parametrize("new_uid", [True, False])
@pytest.mark.parametrize("same_folder", [True, False])
def test_duplicate_positions_are_dropped_only_if_pixels_are_equal(tmp_path, new_uid, same_folder):
    first = write_dicom(tmp_path / "s" / "a", LPS) / "005.dcm"
    (tmp_path / "s" / "b").mkdir()
    second = tmp_path / "s" / ("a/x.dcm" if same_folder else "b/005.dcm")
    one = pydicom.dcmread(first)
    if new_uid:
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    one.save_as(second)
    check(read_ct(tmp_path / "s"), LPS)
    one.PixelData = np.frombuffer(one.PixelData, "<u2")[::-1].tobytes()
    one.save_as(second)
    with pytest.raises(CTGeometryError, match="slice positions: the same in") as caught:
        read_ct(tmp_path / "s")
    assert str(caught.value).count("005.dcm") == (1 if same_folder else 2)
    if not same_folder:
        assert "a/005.dcm" in str(caught.value) and "b/005.dcm" in str(caught.value)


def test_shared_instance_uid_drops_no_slice(tmp_path):
    """Some anonymisers give all slices the same UID."""
    check(read_ct(write_dicom(tmp_path / "s", LPS, change=every(SOPInstanceUID="1.2.3"))), LPS)


@pytest.mark.parametrize(
    "kind",
    [
        ["DERIVED", "SECONDARY", "AXIAL", "MIP"], ["DERIVED", "PRIMARY", "AXIAL", "MIN_IP"],
        ["DERIVED", "SECONDARY", "PROJECTION IMAGE"], ["DERIVED", "SECONDARY", "OTHER", "CSA MIP"],
        ["DERIVED", "SECONDARY", "AXIAL", "MAX_IP"], ["DERIVED", "SECONDARY", "MINIP"],
        ["DERIVED", "SECONDARY", "VRT"], ["DERIVED", "SECONDARY", "AXIAL", "CURVED_MPR"],
        ["DERIVED", "PRIMARY", "VOLUME", "SUBTRACTION"], ["DERIVED", "SECONDARY", "OTHER", "CPR"],
        ["DERIVED", "SECONDARY", "AXIAL", "MAXIMUM"], ["ORIGINAL", "PRIMARY", "LOCALIZER"],
    ],
)  # fmt: skip
def test_projections_are_not_read_as_slices(tmp_path, kind):
    write_dicom(tmp_path / "s" / "other", make_ct(seed=4), change=every(ImageType=kind))
    with pytest.raises(CTReadError, match="ImageType"):
        read_ct(tmp_path / "s")
    write_dicom(tmp_path / "s" / "axial", LPS, change=every(ImageType=["ORIGINAL", "PRIMARY", "AXIAL"]))
    check(read_ct(tmp_path / "s"), LPS)


@pytest.mark.parametrize("kind", [["DERIVED", "PRIMARY", "MPR"], ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"]])
def test_reformatted_slices_are_read(tmp_path, kind):
    check(read_ct(write_dicom(tmp_path / "s", LPS, change=every(ImageType=kind))), LPS)


# Multi-frame files


def frames_of(one, **fields):
    """Set fields in the FrameContentSequence of each frame."""
    for k, item in enumerate(one.PerFrameFunctionalGroupsSequence):
        for name, value in fields.items():
            setattr(item.FrameContentSequence[0], name, value(k))


def compressed(one, kinds):
    """Compress each frame, as one fragment or as two."""
    size, fragments = one.Rows * one.Columns * 2, []
    frames = [one.PixelData[k * size : (k + 1) * size] for k in range(one.NumberOfFrames)]
    for frame in frames:
        single = pydicom.Dataset()
        single.update({element.tag: copy.deepcopy(element) for element in one if element.tag.group == 0x28})
        single.NumberOfFrames, single.PixelData = 1, frame
        single["PixelData"].VR = "OW"
        single.file_meta = pydicom.dataset.FileMetaDataset()
        single.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        single.SOPClassUID, single.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
        single.compress(RLELossless, generate_instance_uid=False)
        fragments.append(next(pydicom.encaps.generate_frames(single.PixelData, number_of_frames=1)))
    one.PixelData = encapsulate(fragments, has_bot=kinds == "table", fragments_per_frame=2 if kinds == "table" else 1)
    one["PixelData"].VR, one["PixelData"].is_undefined_length = "OB", True
    one.file_meta.TransferSyntaxUID = RLELossless


@pytest.mark.parametrize("kinds", ["table", "none"])
def test_compressed_frames_are_read(tmp_path, kinds):
    rescales = [(1 + k % 2, -1024 - 2 * k) for k in range(18)]
    path = write_enhanced(
        tmp_path / "scan.dcm", LPS // 2 * 2, rescales=rescales, change=lambda one: compressed(one, kinds)
    )
    check(read_ct(path), LPS // 2 * 2)


@pytest.mark.parametrize("field", ["FrameAcquisitionNumber", "TemporalPositionIndex", "StackID"])
def test_phases_of_one_file_can_be_chosen(tmp_path, field):
    parts = [make_ct((26, 22, 18), seed) for seed in (0, 1)]
    both = np.concatenate(parts, axis=2)

    def change(one):
        for k, item in enumerate(one.PerFrameFunctionalGroupsSequence):
            item.PlanePositionSequence[0].ImagePositionPatient = [40, -25, 300 + k % 18 * Z]
        values = ("1", "2") if field == "StackID" else (1, 2)
        frames_of(one, **{"StackID": lambda k: "1", field: lambda k: values[k // 18]})

    assert_to_choose(write_enhanced(tmp_path / "scan.dcm", both, change=change), parts)


def test_projection_frames_are_refused(tmp_path):
    def change(one):
        one.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "MAX_IP"]

    with pytest.raises(CTReadError, match="ImageType"):
        read_ct(write_enhanced(tmp_path / "scan.dcm", LPS, change=change))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda one: setattr(one, "NumberOfFrames", 17),
        lambda one: setattr(one, "NumberOfFrames", 10**9),
        lambda one: delattr(one, "PerFrameFunctionalGroupsSequence"),
        lambda one: delattr(one, "SharedFunctionalGroupsSequence"),
        lambda one: delattr(one.PerFrameFunctionalGroupsSequence[4], "PlanePositionSequence"),
        lambda one: delattr(one.SharedFunctionalGroupsSequence[0], "PixelValueTransformationSequence"),
        lambda one: setattr(one, "PixelData", one.PixelData[:-2]),
        lambda one: setattr(one, "PixelData", one.PixelData[: len(one.PixelData) // 2]),
        lambda one: one.PerFrameFunctionalGroupsSequence.pop(),
        lambda one: one.PerFrameFunctionalGroupsSequence.append(one.PerFrameFunctionalGroupsSequence[0]),
    ],
)
def test_inconsistent_frames_are_refused(tmp_path, spoil):
    with pytest.raises(CTInputError):
        read_ct(write_enhanced(tmp_path / "scan.dcm", LPS, change=spoil))


def test_trailing_bytes_after_the_frames_are_ignored(tmp_path):
    path = write_enhanced(
        tmp_path / "s.dcm", LPS, change=lambda one: setattr(one, "PixelData", one.PixelData + bytes(512))
    )
    check(read_ct(path), LPS)


# Padding


@pytest.mark.parametrize(
    "case", ["12 bits", "rle", "overlay", "signed type of unsigned", "limit alone", "half slope", "enhanced"]
)
def test_declared_padding_becomes_air_in_any_encoding(tmp_path, case):
    def change(k, one):
        pixels = np.frombuffer(one.PixelData, "<u2").reshape(one.Rows, one.Columns).copy()
        value, kind = 63536, "US"
        if case in ("12 bits", "overlay"):
            one.BitsStored, one.HighBit, value = 12, 11, 63536 if case == "12 bits" else 4095
        if case == "signed type of unsigned":
            value, kind = -2000, "SS"
        if case == "half slope":
            one.RescaleSlope, one.RescaleIntercept, pixels = "0.5", -1024, pixels * 2
        pixels[:4, :5] = value % 65536
        if case == "overlay":
            pixels |= np.uint16(0x5000)
        one.PixelData = pixels.tobytes()
        one.add_new("PixelPaddingValue", kind, value)
        if case == "limit alone":
            del one.PixelPaddingValue
            one.add_new("PixelPaddingRangeLimit", "US", value)
        if case == "rle":
            one.compress(RLELossless)

    if case == "enhanced":

        def all_frames(one):
            pixels = np.frombuffer(one.PixelData, "<u2").reshape(-1, one.Rows, one.Columns).copy()
            pixels[:, :4, :5] = 63536
            one.PixelData = pixels.tobytes()
            one.add_new("PixelPaddingValue", "US", 63536)

        source = write_enhanced(tmp_path / "s.dcm", LPS, change=all_frames)
    else:
        source = write_dicom(tmp_path / "s", LPS, change=change)
    volume = read_ct(source)
    found = volume.array * volume.slope + volume.intercept
    if case == "limit alone":  # has no meaning without PixelPaddingValue (PS3.3, C.7.5.1.1.2)
        assert found[:5, :4].min() > 60000
    else:
        assert found[:5, :4].max() <= -1000
    np.testing.assert_array_equal(found[5:], LPS[5:])


# Rounded headers


@pytest.mark.parametrize("step", [0.2, 0.3, 0.4, 0.5, 0.6, 0.625, 0.75, 0.8, 1.25, 3.75])
@pytest.mark.parametrize("bottom", [-899.8, -752.35])
@pytest.mark.parametrize("digits", [1, 6])
def test_rounded_positions_are_accepted_and_gaps_refused(tmp_path, step, bottom, digits):
    if step < 0.5 and digits == 1 and not round(bottom * 10, 6).is_integer():
        pytest.skip("no scanner rounds to half of a slice")

    def change(k, one):
        one.ImagePositionPatient = [40, -25, f"{bottom + step * k:.{digits}f}"]

    folder = write_dicom(tmp_path / "s", make_ct((12, 12, 18)), change=change)
    volume = read_ct(folder)
    assert volume.spacing[2] == pytest.approx(step, rel=0.01)
    sorted(folder.iterdir())[7].unlink()
    with pytest.raises(CTGeometryError, match="slice"):
        read_ct(folder)


@pytest.mark.parametrize("cosines", [[1, "0.0002", 0, "-0.0002", 1, 0], [1, 0, "0.001", 0, 1, 0]])
@pytest.mark.parametrize("only", [0, 7, 17])
def test_rounded_direction_cosines_are_accepted(tmp_path, cosines, only):
    change = every(ImageOrientationPatient=lambda k: cosines if k == only else [1, 0, 0, 0, 1, 0])
    volume = read_ct(write_dicom(tmp_path / "s", LPS, change=change))
    check(volume, LPS)
    np.testing.assert_allclose(np.abs(np.diag(volume.affine)[:3]), SPACING)


@pytest.mark.parametrize("rounded", ["0.703", "0.7031", "0.70"])
@pytest.mark.parametrize("only", [0, 7, 17])
def test_rounded_pixel_spacing_is_accepted(tmp_path, rounded, only):
    change = every(PixelSpacing=lambda k: [rounded] * 2 if k == only else ["0.703125"] * 2)
    assert read_ct(write_dicom(tmp_path / "s", LPS, change=change)).spacing[:2] == (0.703125, 0.703125)


def test_pixel_spacing_change_of_three_percent_is_refused(tmp_path):
    change = every(PixelSpacing=lambda k: ["0.72"] * 2 if k == 7 else ["0.70"] * 2)
    with pytest.raises(CTGeometryError, match="PixelSpacing"):
        read_ct(write_dicom(tmp_path / "s", LPS, change=change))


@pytest.mark.parametrize("uid", [JPEG2000Lossless, RLELossless])
def test_uncompressed_pixels_under_a_compressed_syntax_are_refused(tmp_path, uid):
    def change(path):
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", str(uid).encode().ljust(20, b"\0")[:20]))

    folder = write_dicom(tmp_path / "s", LPS)
    for path in folder.iterdir():
        change(path)
    with pytest.raises(CTReadError):
        read_ct(folder)
