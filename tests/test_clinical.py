# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Reports as DICOM objects and FHIR resources. `make test-dicom` checks them with dciodvfy and a real PACS.
"""

import base64
import copy
import json
import shutil
import sys
import threading
import warnings
import zipfile

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from fhir.resources.R4B.diagnosticreport import DiagnosticReport
from fhir.resources.R4B.observation import Observation
from pydicom.uid import generate_uid
from typer.testing import CliRunner

from diffvp import cli
from diffvp.clinical import codes
from diffvp.clinical.fhir import diagnostic_report
from diffvp.clinical.objects import MAP_FILE, SR_FILE, dicom_objects, write_objects
from diffvp.clinical.source import read_source, values_as_they_are
from diffvp.inference import report as reporting
from diffvp.labels_diffvp import DIAGNOSIS_LABELS, REGIONS
from diffvp.reading_diffvp import read_ct
from diffvp.volume_diffvp import CTReadError

from .batch_samples import read_lines, write_checkpoint
from .clinical_samples import (
    PATIENT,
    SECRETS,
    SOURCES,
    STUDY,
    files_of,
    in_the_order_of,
    make_document,
    of_a_hospital,
    read_map,
)
from .ct_samples import write_dicom, write_enhanced
from .hub_samples import make_chest, write_scan
from .marks import slow_except

RESEARCH_USE = "Research use only. Not a medical device; not for diagnosis."


@pytest.fixture(scope="module")
def checkpoint(tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path_factory):
    """Tiny model with a low threshold: it reports some findings, but not all."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return write_checkpoint(folder, tiny_base_with_tokenizer, tokenizer, tiny_fields, diagnosis_threshold=0.5)


@pytest.fixture(scope="module")
def no_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "draw_figure", lambda path, *_, **__: path.write_bytes(b"a figure"))
        yield


def run(*arguments) -> str:
    """Run `diffvp`, require success, and return its output."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module", params=slow_except(("single-frame", "Enhanced CT"), SOURCES))
def made(request, checkpoint, no_figures, tmp_path_factory):
    """(source, printed output of the command, folder with everything it wrote)."""
    folder = tmp_path_factory.mktemp("clinical")
    source = SOURCES[request.param](folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warnings of pydicom quote patient data
        printed = run(
            "report", source, "--checkpoint", checkpoint, "--dicom", folder / "dicom", "--fhir", "--output",
            folder / "report",
        )  # fmt: skip
    return source, printed, folder


# Objects


def test_report_and_map_belong_to_the_study_of_the_source(made):
    source, _, folder = made
    files = files_of(source)
    objects = [pydicom.dcmread(folder / "dicom" / name) for name in (SR_FILE, MAP_FILE)]
    for one in objects:
        assert one.StudyInstanceUID == files[0].StudyInstanceUID
        for name, value in (PATIENT | STUDY).items():
            assert one[name].value == value, name
    report, image = objects
    series = {one.SeriesInstanceUID for one in (files[0], *objects)}
    assert len(series) == 3 and len({one.SOPInstanceUID for one in (*files, *objects)}) == len(files) + 2
    assert report.SOPClassUID == pydicom.uid.ComprehensiveSRStorage
    assert image.SOPClassUID == pydicom.uid.ParametricMapStorage
    [study] = report.CurrentRequestedProcedureEvidenceSequence
    listed = {
        item.ReferencedSOPInstanceUID: series.SeriesInstanceUID
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert study.StudyInstanceUID == files[0].StudyInstanceUID
    assert listed == {one.SOPInstanceUID: one.SeriesInstanceUID for one in (*files, image)}
    assert "PertinentOtherEvidenceSequence" not in report


def test_report_and_map_are_marked_unverified_and_for_research(made):
    _, _, folder = made
    report, image = (pydicom.dcmread(folder / "dicom" / name) for name in (SR_FILE, MAP_FILE))
    assert (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag) == (
        "PARTIAL", "UNVERIFIED", "PRELIMINARY",
    )  # fmt: skip
    assert image.ContentQualification == "RESEARCH" and image.ContentLabel == "DIFFERENCE"
    for one in (report, image):
        assert one.SeriesDescription.startswith("RESEARCH USE ONLY")
    assert RESEARCH_USE in texts(report) and RESEARCH_USE in image.DerivationDescription


def test_dicom_map_equals_the_nifti_map(made):
    _, _, folder = made
    nifti = nib.load(folder / "report" / "difference_map.nii.gz")
    array, affine = in_the_order_of(*read_map(folder / "dicom"), nifti.affine)
    np.testing.assert_allclose(affine, nifti.affine, atol=1e-4)
    assert array.dtype == np.float32 and np.ptp(array) > 0
    assert np.array_equal(array, np.asarray(nifti.dataobj))


def test_map_grid_equals_the_grid_simpleitk_reads(made):
    """SimpleITK, an independent reader, also reads Enhanced CT, but no parametric maps (test below)."""
    source, _, folder = made
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(source)) if source.is_dir() else str(source)
    read = sitk.ReadImage(names)
    axes = np.array(read.GetDirection()).reshape(3, 3) * read.GetSpacing()
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = axes, read.GetOrigin()
    expected = np.diag([-1, -1, 1, 1]) @ lps
    array, affine = in_the_order_of(*read_map(folder / "dicom"), expected)
    assert array.shape == read.GetSize()
    np.testing.assert_allclose(affine, expected, atol=1e-4)


def test_simpleitk_cannot_read_the_float_map(made):
    """GDCM supports integer Pixel Data only, as docs/clinical.md states. Update the page if this test fails."""
    _, _, folder = made
    with pytest.raises(RuntimeError, match="Unable to determine ImageIO reader"):
        sitk.ReadImage(str(folder / "dicom" / MAP_FILE))


def test_map_frames_reference_the_source_slice_at_their_position(made):
    source, _, folder = made
    files = {one.SOPInstanceUID: one for one in files_of(source)}
    image = pydicom.dcmread(folder / "dicom" / MAP_FILE)
    assert image.FrameOfReferenceUID == next(iter(files.values())).FrameOfReferenceUID
    seen = set()
    for group in image.PerFrameFunctionalGroupsSequence:
        place = group.PlanePositionSequence[0].ImagePositionPatient
        [item] = group.DerivationImageSequence[0].SourceImageSequence
        one = files[item.ReferencedSOPInstanceUID]
        assert item.ReferencedSOPClassUID == one.SOPClassUID
        number = item.get("ReferencedFrameNumber")
        if "PerFrameFunctionalGroupsSequence" in one:
            one = one.PerFrameFunctionalGroupsSequence[number - 1].PlanePositionSequence[0]
        else:
            assert number is None
        assert one.ImagePositionPatient == place
        seen.add((item.ReferencedSOPInstanceUID, number))
    assert len(seen) == image.NumberOfFrames == 18
    [series] = image.ReferencedSeriesSequence
    for items in (series.ReferencedInstanceSequence, image.SourceImageSequence):
        assert {item.ReferencedSOPInstanceUID for item in items} == files.keys()


def test_highdicom_reads_the_structured_report(made):
    _, _, folder = made
    read = highdicom.sr.srread(folder / "dicom" / SR_FILE)
    assert isinstance(read, highdicom.sr.ComprehensiveSR)
    document = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    found = texts(read)
    assert {as_dicom(text) for text in document["regions"].values()} - {""} <= set(found)
    assert any(digest in text for text in found for digest in document["provenance"]["checkpoint"]["sha256"].values())


def test_patient_data_appears_only_in_the_dicom_objects(made):
    """Patient data appears in no other file, printed output or file name."""
    _, printed, folder = made
    uids = [pydicom.dcmread(folder / "dicom" / SR_FILE)[name].value for name in ("StudyInstanceUID", "SOPInstanceUID")]
    resource = folder / "report" / "diagnostic_report.json"
    for path in (folder / "report").iterdir():
        content = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], path.name
        if path != resource:
            assert not [uid for uid in uids if uid.encode() in content], path.name
    assert not [secret for secret in [*SECRETS, *uids] if secret in printed]
    assert sorted(path.name for path in (folder / "dicom").iterdir()) == [MAP_FILE, SR_FILE]


def as_dicom(text: str) -> str:
    """Replace control characters, which the tiny model sometimes writes."""
    return text.translate(dict.fromkeys(set(range(32)) - set(b"\t\n\f\r"), " "))


def texts(report: pydicom.Dataset) -> list[str]:
    """Return all texts of a structured report."""
    found = [report.TextValue] if "TextValue" in report else []
    for item in report.get("ContentSequence", []):
        found += texts(item)
    return found


# Findings as coded content


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """Report and map of a document with every kind of finding, and the source."""
    source = read_source(SOURCES["Enhanced CT"](tmp_path_factory.mktemp("coded")))
    difference = np.random.default_rng(0).random(source.shape, dtype=np.float32)
    return *dicom_objects(make_document(), difference, source), source


def name_of(item) -> str:
    return item.ConceptNameCodeSequence[0].CodeMeaning


def value_of(item) -> str:
    return item.ConceptCodeSequence[0].CodeValue if item.ValueType == "CODE" else item.TextValue


def below(report, heading: str) -> list:
    [container] = [item for item in report.ContentSequence if name_of(item) == heading]
    return list(container.ContentSequence)


def test_structured_report_lists_findings_above_and_below_threshold(coded):
    report, _, _ = coded
    findings = [item for item in below(report, "Findings") if name_of(item) == "Finding"][
        3:
    ]  # after the three regions
    others = below(report, "Not found: below the threshold")
    assert {name_of(item) for item in others} == {"Not found: below the threshold"}
    document = make_document()["findings"]
    for items, positive in ((findings, True), (others, False)):
        expected = [one for one in document if one["positive"] is positive]
        assert len(items) == len(expected) > 5
        for item, one in zip(items, expected, strict=True):
            code = codes.FINDINGS.get(one["label"])
            assert value_of(item) == (one["label"] if code is None else code.value)
            certainty, threshold = (
                float(number.MeasuredValueSequence[0].NumericValue) for number in item.ContentSequence[:2]
            )
            assert certainty == pytest.approx(100 * one["probability"]) and threshold == 50
    assert {item.ValueType for item in [*findings, *others]} == {"CODE", "TEXT"}


def test_structured_report_gives_side_size_and_slice_of_findings(coded):
    report, _, source = coded
    coded_items = [item for item in below(report, "Findings") if item.ValueType == "CODE"]
    found = {value_of(item): list(item.ContentSequence)[2:] for item in coded_items}
    effusion, consolidation = (found[codes.FINDINGS[label].value] for label in ("Pleural effusion", "Consolidation"))
    assert [value_of(item) for item in effusion[:2]] == ["24028007", "7771000"]  # laterality: right, left
    assert effusion[2].MeasuredValueSequence[0].NumericValue == 21
    assert effusion[2].MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue == "mm"
    # 10 mm anterior, 10 mm right and 20 mm superior of the centre of the first voxel at RAS (-40, 25, 300)
    column, row = effusion[3].GraphicData
    assert (column, row) == pytest.approx((0.5 + 10 / 1.5, 0.5 + 15 / 1.25))
    shown = effusion[3].ContentSequence[0].ReferencedSOPSequence[0]
    assert shown.ReferencedFrameNumber == 18 - 8  # frame 1 is the last slice
    assert source.frames[8].number == 18 - 8 and source.frames[8].position[2] == 320
    assert [value_of(item) for item in consolidation[:1]] == ["41224006"]
    assert len(consolidation) == 2  # its peak is outside the scan


def test_regions_have_their_anatomical_site_code(coded):
    report, _, _ = coded
    heart, lung, other = [item for item in below(report, "Findings") if name_of(item) == "Finding"][:3]
    assert (value_of(heart), value_of(heart.ContentSequence[0])) == ("Small.", "80891009")
    assert (value_of(lung), value_of(lung.ContentSequence[0])) == ("Clear.", "39607008")
    assert value_of(other) == "A word of its own." and "ContentSequence" not in other


def test_codes_match_the_dicom_dictionary():
    """Compare the codes of DICOM's context groups with pydicom's dictionary. No test can look up the others."""
    from pydicom.sr.codedict import CONCEPTS

    known = {}
    for scheme, names in CONCEPTS.items():
        for entries in names.values():
            for value, (meaning, *_) in entries.items():
                if not meaning.endswith("(body structure)"):  # full SNOMED names, which DICOM does not use
                    known.setdefault((scheme, value), set()).add(meaning.lower())
    every = [value for value in vars(codes).values() if isinstance(value, codes.Code)]
    every += [*codes.FINDINGS.values(), *codes.REGIONS.values()]
    every += [code for pair in codes.PLACES.values() for code in pair]
    looked_up = [code for code in every if (code.scheme, code.value) in known]
    wrong = [code for code in looked_up if code.meaning.lower() not in known[code.scheme, code.value]]
    assert len(looked_up) >= 30 and not wrong
    assert codes.FINDINGS.keys() <= set(DIAGNOSIS_LABELS) and codes.REGIONS.keys() == set(REGIONS)
    assert all(len(code.value) <= 16 and len(code.meaning) <= 64 for code in every)


def test_report_without_classifier_lists_no_findings(tmp_path):
    source = read_source(SOURCES["single-frame"](tmp_path))
    report, image = dicom_objects(make_document(findings=[]), np.zeros(source.shape, np.float32), source)
    assert "Not found: below the threshold" not in [name_of(item) for item in report.ContentSequence]
    [mapping] = image.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    assert (mapping.DoubleFloatRealWorldValueFirstValueMapped, mapping.RealWorldValueSlope) == (0, 1)


# Sources


def objects_of(path, **options):
    """Return report and map of a random difference on the grid of a series, the difference, and the volume."""
    source, volume = read_source(path, **options), read_ct(path, **options)
    source.check_grid(volume.shape, volume.affine)
    difference = np.random.default_rng(0).random(source.shape, dtype=np.float32)
    return *dicom_objects(make_document(), difference, source), difference, volume


@pytest.mark.parametrize(
    ("orientation", "step"),
    [
        ([-1, 0, 0, 0, -1, 0], (0, 0, -2.5)),  # prone, feet first
        ([0, 1, 0, 0, 0, -1], (1.5, 0, 0)),  # sagittal
        ([0.98, 0.19899748742132398, 0, -0.19899748742132398, 0.98, 0], (0, 0, 2.5)),  # rotated in the axial plane
    ],
)
def test_map_follows_the_slices_in_any_orientation(tmp_path, orientation, step):
    def change(k, one):
        of_a_hospital(k, one)
        one.ImageOrientationPatient = orientation

    path = write_dicom(tmp_path / "series", make_chest(1), step=step, change=change)
    report, image, difference, volume = objects_of(path)
    write_objects(tmp_path / "dicom", report, image)
    array, affine = in_the_order_of(*read_map(tmp_path / "dicom"), volume.affine)
    np.testing.assert_allclose(affine, volume.affine, atol=1e-4)
    assert np.array_equal(array, difference)


def test_frames_of_a_chosen_phase_keep_their_numbers(tmp_path):
    lps = make_chest(1)

    def change(one):
        of_a_hospital(0, one)
        second = copy.deepcopy(one.PerFrameFunctionalGroupsSequence)
        for number, items in ((1, one.PerFrameFunctionalGroupsSequence), (2, second)):
            for item in items:
                item.FrameContentSequence[0].FrameAcquisitionNumber = number
        one.PerFrameFunctionalGroupsSequence = [*one.PerFrameFunctionalGroupsSequence, *second]
        one.NumberOfFrames, one.PixelData = 36, one.PixelData + bytes(reversed(one.PixelData))

    path = write_enhanced(tmp_path / "two.dcm", lps, change=change)
    with pytest.raises(CTReadError, match="series: none chosen"):
        read_source(path)
    for number, first in ((1, 1), (2, 19)):
        frames = read_source(path, series=number).frames
        assert [frame.number for frame in frames] == list(range(first, first + 18))


def test_archive_gives_the_same_source_as_its_folder(tmp_path):
    folder = SOURCES["single-frame"](tmp_path)
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"study/{file.name}")
    zipped, plain = read_source(tmp_path / "series.zip"), read_source(folder)
    assert zipped.frames == plain.frames and zipped.header == plain.header
    assert zipped.header.PatientName == PATIENT["PatientName"]  # decoded before the temporary files were removed


def test_invalid_header_values_are_copied_unchanged(tmp_path, caplog):
    """Even an invalid birth date must match the study, and must not appear in a log."""
    odd = {"PatientBirthDate": "unbekannt", "PatientSex": "Maennlich", "StudyTime": "nachts", "PatientID": "x" * 80}

    def change(k, one):
        of_a_hospital(k, one)
        with pydicom.config.disable_value_validation():
            for name, value in odd.items():
                setattr(one, name, value)
        del one.StudyID, one.ReferringPhysicianName, one.SliceThickness

    with pydicom.config.disable_value_validation():
        path = write_dicom(tmp_path / "series", make_chest(1), change=change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = read_source(path)
        made = dicom_objects(make_document(), np.zeros(source.shape, np.float32), source)
        write_objects(tmp_path / "dicom", *made)
    with pydicom.config.disable_value_validation():
        for name in (SR_FILE, MAP_FILE):
            written = pydicom.dcmread(tmp_path / "dicom" / name)
            assert {key: written[key].value for key in odd} == odd
            assert written.StudyID is None or written.StudyID == ""
    assert not [secret for secret in [*SECRETS, *odd.values()] if secret in caplog.text]


def test_japanese_names_are_preserved(tmp_path):
    def change(k, one):
        of_a_hospital(k, one)
        one.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        one.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"
        one.StudyDescription, one.ReferringPhysicianName = "胸部", "Suzuki^Ichiro=鈴木^一郎"

    path = write_dicom(tmp_path / "series", make_chest(1), change=change)
    report, image, _, _ = objects_of(path)
    write_objects(tmp_path / "dicom", report, image)
    for name in (SR_FILE, MAP_FILE):
        written = pydicom.dcmread(tmp_path / "dicom" / name)
        assert str(written.PatientName) == "Yamada^Tarou=山田^太郎=やまだ^たろう"
        assert written.StudyDescription == "胸部" and written.SpecificCharacterSet == "ISO_IR 192"


def test_map_states_lossy_compression_of_the_source(tmp_path):
    def change(k, one):
        of_a_hospital(k, one)
        one.LossyImageCompression, one.LossyImageCompressionRatio = "01", "9.5"
        one.LossyImageCompressionMethod, one.BodyPartExamined = "ISO_10918_1", "ABDOMEN"

    _, image, _, _ = objects_of(write_dicom(tmp_path / "lossy", make_chest(1), change=change))
    assert (image.LossyImageCompression, image.LossyImageCompressionRatio) == ("01", 9.5)
    assert image.LossyImageCompressionMethod == "ISO_10918_1" and image.BodyPartExamined == "ABDOMEN"
    assert "Laterality" not in image  # DICOM defines it for paired body parts only
    _, image, _, _ = objects_of(write_dicom(tmp_path / "plain", make_chest(1), change=without("BodyPartExamined")))
    assert image.LossyImageCompression == "00"
    # With --allow-any-anatomy, it may be any body part.
    assert "BodyPartExamined" not in image and "Laterality" in image and not image.Laterality


def without(name: str):
    def change(k, one):
        of_a_hospital(k, one)
        delattr(one, name)

    return change


def mixed(name: str):
    def change(k, one):
        of_a_hospital(k, one)
        if k == 4:
            setattr(one, name, generate_uid())

    return change


def repeated(k, one):
    of_a_hospital(k, one)
    one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = "1.2.3"


REFUSED = {
    "no study": (without("StudyInstanceUID"), "StudyInstanceUID: missing (expected one"),
    "no frame of reference": (without("FrameOfReferenceUID"), "FrameOfReferenceUID: missing (expected one"),
    "no instance": (without("SOPInstanceUID"), "SOPInstanceUID: missing, or the same in two slices"),
    "two studies": (mixed("StudyInstanceUID"), "StudyInstanceUID: 2 different ones (expected one in all slices)"),
    "one instance": (repeated, "SOPInstanceUID: missing, or the same in two slices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_series_without_unique_identifiers_is_refused(tmp_path, case):
    """Such a series can still be read and reported on."""
    change, message = REFUSED[case]
    path = write_dicom(tmp_path / "series", make_chest(1), change=change)
    read_ct(path)
    with pytest.raises(CTReadError) as refused:
        read_source(path)
    assert str(refused.value).startswith(f"series: {message}")


def test_source_that_changes_during_the_run_is_refused(tmp_path):
    folder = SOURCES["single-frame"](tmp_path)
    source, volume = read_source(folder), read_ct(folder)
    moved = volume.affine + 0
    moved[2, 3] += 2.5
    for shape, affine in ((volume.shape, moved), ((26, 22, 17), volume.affine)):
        with pytest.raises(CTReadError, match="slices: not those that were read before"):
            source.check_grid(shape, affine)


def test_dicom_output_requires_a_dicom_source(tmp_path, checkpoint):
    scan = write_scan(tmp_path / "scan.nii.gz", seed=1)
    refused = refusal("report", scan, "--checkpoint", checkpoint, "--dicom", tmp_path / "dicom")
    assert "scan.nii.gz: format: NIfTI (expected a DICOM series" in refused
    (tmp_path / "folder").mkdir()
    shutil.copy(scan, tmp_path / "folder")
    refused = refusal("report", tmp_path / "folder", "--checkpoint", checkpoint, "--dicom", tmp_path / "dicom")
    assert "CTReadError: folder: content: no DICOM file" in refused
    assert not (tmp_path / "dicom").exists()


def test_missing_extra_is_named_by_the_command(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    source = SOURCES["single-frame"](tmp_path)
    told = refusal("report", source, "--checkpoint", checkpoint, "--dicom", tmp_path / "out")
    assert "This takes highdicom, which is not installed: pip install 'highdicom" in told


def test_interrupted_write_leaves_no_report_without_its_map(tmp_path, monkeypatch):
    report, image, _, _ = objects_of(SOURCES["single-frame"](tmp_path))
    folder = tmp_path / "dicom"
    write_objects(folder, report, image)
    for failing in (image, report):
        with monkeypatch.context() as patch:
            patch.setattr(type(failing), "save_as", fail)
            with pytest.raises(OSError, match="disk full"):
                write_objects(folder, report, image)
        assert [path.name for path in folder.iterdir()] == [MAP_FILE]
        write_objects(folder, report, image)
    assert sorted(path.name for path in folder.iterdir()) == [MAP_FILE, SR_FILE]


def fail(*_, **__):
    raise OSError("disk full")


def test_threads_restore_the_pydicom_settings():
    before = pydicom.config.settings.reading_validation_mode, pydicom.config.settings.writing_validation_mode

    def enter():
        for _ in range(200):
            with values_as_they_are():
                assert pydicom.config.settings.reading_validation_mode == pydicom.config.IGNORE

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (pydicom.config.settings.reading_validation_mode, pydicom.config.settings.writing_validation_mode) == before


# FHIR


def test_fhir_resource_is_valid_and_agrees_with_the_report(made):
    source, _, folder = made
    content = (folder / "report" / "diagnostic_report.json").read_text(encoding="utf-8")
    document = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    resource = DiagnosticReport.model_validate_json(content)
    study, report = files_of(source)[0].StudyInstanceUID, pydicom.dcmread(folder / "dicom" / SR_FILE).SOPInstanceUID
    assert resource.status == "preliminary"
    assert resource.imagingStudy[0].identifier.value == f"urn:oid:{study}"
    assert resource.identifier[0].value == f"urn:oid:{report}"
    assert resource.conclusion.startswith(RESEARCH_USE) and document["report"] in resource.conclusion
    page = base64.b64decode(json.loads(content)["presentedForm"][0]["data"]).decode()
    assert page == (folder / "report" / "report.txt").read_text(encoding="utf-8")
    assert not resource.subject


def test_fhir_validator_rejects_wrong_fields():
    resource = diagnostic_report(make_document())
    for wrong in ({"imagingStudies": []}, {"issued": "yesterday"}, {"result": {"reference": "#finding-1"}}):
        with pytest.raises(ValueError, match="validation error"):
            DiagnosticReport.model_validate(resource | wrong)


def test_fhir_observations_give_every_finding():
    document = make_document()
    resource = diagnostic_report(document)
    DiagnosticReport.model_validate(resource)
    device, *observations = resource["contained"]
    assert [f"#{one['id']}" for one in observations] == [one["reference"] for one in resource["result"]]
    assert "ab" * 32 in device["note"][-1]["text"] and device["note"][0]["text"] == RESEARCH_USE
    assert len(observations) == 18 and "imagingStudy" not in resource and "identifier" not in resource
    for one, found in zip(observations, document["findings"], strict=True):
        Observation.model_validate(one)
        assert one["code"]["text"] == found["label"]
        assert one["interpretation"][0]["coding"][0]["code"] == ("POS" if found["positive"] else "NEG")
        values = [part["valueQuantity"]["value"] for part in one["component"][:2]]
        assert values == pytest.approx([100 * found["probability"], 50])
    effusion = observations[12]["component"][2:]
    assert [part["valueCodeableConcept"]["text"] for part in effusion[:2]] == ["Right", "Left"]
    assert effusion[2]["valueQuantity"] == {
        "value": 21, "unit": "mm", "system": "http://unitsofmeasure.org", "code": "mm",
    }  # fmt: skip
    positive = [found["label"] for found in document["findings"] if found["positive"]]
    assert [code["text"] for code in resource["conclusionCode"]] == positive


def test_fhir_resource_without_findings_is_valid():
    resource = diagnostic_report(make_document(findings=[], report=""))
    DiagnosticReport.model_validate(resource)
    assert not resource.keys() & {"result", "conclusionCode", "contained"}


def test_nifti_scan_gives_a_fhir_resource_without_a_study(tmp_path, checkpoint, no_figures):
    scan = write_scan(tmp_path / "scan.nii.gz", seed=1)
    run("report", scan, "--checkpoint", checkpoint, "--fhir", "--output", tmp_path / "report")
    resource = json.loads((tmp_path / "report" / "diagnostic_report.json").read_text(encoding="utf-8"))
    DiagnosticReport.model_validate(resource)
    assert "imagingStudy" not in resource
    run("report", scan, "--checkpoint", checkpoint, "--output", tmp_path / "report")  # replaces it
    assert not (tmp_path / "report" / "diagnostic_report.json").exists()


# Many scans


@pytest.mark.slow
def test_batch_writes_dicom_and_fhir_of_each_scan(tmp_path, checkpoint, no_figures):
    """Batches continue after a file that is not DICOM; their objects equal those of a single report."""
    scans, output = tmp_path / "Ward^7", tmp_path / "reports.jsonl"
    folders = [SOURCES[name](tmp_path) for name in ("single-frame", "Enhanced CT")]
    write_scan(scans.parent / "scan.nii.gz", seed=3)
    listed = tmp_path / "scans.txt"
    listed.write_text("".join(f"{path}\n" for path in [*folders, scans.parent / "scan.nii.gz"]))
    options = ["--checkpoint", checkpoint, "--output", output, "--dicom", tmp_path / "dicom", "--fhir"]
    run("batch", listed, *options, "--allow-failures")
    _, *records = read_lines(output)
    [failure] = read_lines(tmp_path / "reports.failed.jsonl")
    assert failure["message"].startswith("scan.nii.gz: format: NIfTI (expected a DICOM series")
    for record, folder in zip(records, folders, strict=True):
        objects = tmp_path / "dicom" / record["dicom"]
        report, image = pydicom.dcmread(objects / SR_FILE), pydicom.dcmread(objects / MAP_FILE)
        study = files_of(folder)[0].StudyInstanceUID
        assert report.StudyInstanceUID == image.StudyInstanceUID == study
        resource = DiagnosticReport.model_validate(record["fhir"])
        assert resource.imagingStudy[0].identifier.value == f"urn:oid:{study}"
        assert resource.identifier[0].value == f"urn:oid:{report.SOPInstanceUID}"
        assert {as_dicom(text) for text in record["regions"].values()} - {""} <= set(texts(report))
        options_alone = ["--dicom", tmp_path / "alone", "--output", tmp_path / "report"]
        run("report", folder, "--checkpoint", checkpoint, *options_alone)
        alone = pydicom.dcmread(tmp_path / "alone" / MAP_FILE)
        assert alone.FloatPixelData == image.FloatPixelData
        assert len(texts(pydicom.dcmread(tmp_path / "alone" / SR_FILE))) == len(texts(report))
    assert not [secret for secret in SECRETS if secret in output.read_text(encoding="utf-8")]

    kept = {path: path.read_bytes() for path in (tmp_path / "dicom").rglob("*.dcm")}
    run("batch", listed, *options, "--allow-failures")  # everything exists already
    assert {path: path.read_bytes() for path in (tmp_path / "dicom").rglob("*.dcm")} == kept
    assert "was started with other settings: results" in refusal("batch", listed, *options[:4])


def test_batch_writes_fhir_for_non_dicom_scans(tmp_path, checkpoint):
    write_scan(tmp_path / "scan.nii.gz", seed=3)
    run("batch", tmp_path, "--checkpoint", checkpoint, "--output", tmp_path / "reports.jsonl", "--fhir")
    [record] = read_lines(tmp_path / "reports.jsonl")[1:]
    DiagnosticReport.model_validate(record["fhir"])
    assert "dicom" not in record and "imagingStudy" not in record["fhir"]


@pytest.mark.parametrize("choice, sampled", [([], True), (["--reference", "nearest"], False)])
def test_batch_states_a_seed_only_for_sampled_references(tmp_path, checkpoint, choice, sampled):
    write_scan(tmp_path / "scan.nii.gz", seed=3)
    output = tmp_path / "reports.jsonl"
    run("batch", tmp_path, "--checkpoint", checkpoint, "--output", output, "--fhir", *choice)
    [record] = read_lines(output)[1:]
    page = base64.b64decode(record["fhir"]["presentedForm"][0]["data"]).decode()
    assert ("seed 0" in page) is sampled and record["reference"] in page
