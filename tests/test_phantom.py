# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Phantom cohort: images show what the reports say, the layout is CT-RATE's, and the bytes are reproducible."""

import csv
import dataclasses
import hashlib
import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from diffvp import progress
from diffvp.data import phantom_cohort
from diffvp.data.phantom import (
    FINDING_NETWORK,
    LOBES,
    Anatomy,
    Finding,
    on_scanner,
    render_patient,
    sample_attributes,
    sample_patient,
)
from diffvp.data.phantom_cases import load_phantom
from diffvp.data.phantom_cohort import volume_path, write_cohort
from diffvp.data.phantom_geometry import Geometry
from diffvp.data.phantom_report import (
    NORMAL,
    impression,
    labels_from_report,
    region_sentences,
    report_text,
    wordings,
)
from diffvp.data.pool import normal_pool
from diffvp.labels_diffvp import DIAGNOSIS_LABELS, REGIONS
from diffvp.processing_diffvp import DiffVPProcessor

MATRIX = 96
# Share of each label among CT-RATE's training scans that have at least one of the 18, counted in the published table.
CT_RATE_SHARES = (
    0.135,
    0.313,
    0.121,
    0.080,
    0.279,
    0.160,
    0.286,
    0.219,
    0.288,
    0.513,
    0.413,
    0.301,
    0.134,
    0.084,
    0.117,
    0.198,
    0.113,
    0.089,
)


def only(patient, *findings):
    return dataclasses.replace(patient, findings=tuple(findings))


def draw(label, seed=0, **attributes):
    return Finding(label, sample_attributes(label, np.random.default_rng(seed)) | attributes)


def render(patient, **kwargs):
    return render_patient(patient, matrix=MATRIX, **kwargs)


def tree(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def centre_mm(mask, scan):
    """Return the centre of a mask in scanner mm along the array axes (LPS)."""
    world = scan.affine @ [*ndimage.center_of_mass(mask), 1]
    return np.array([-world[0], -world[1], world[2]])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort")
    return write_cohort(root, train=5, valid=2, seed=4, matrix=64, workers=1, progress=False)


# Patients and reports ------------------------------------------------------------------------------------------------


def test_reports_state_exactly_the_labels_of_the_patient():
    for index in range(500):
        patient = sample_patient(3, index, "train")
        expected = {label: patient.labels[label] for label in DIAGNOSIS_LABELS}
        # The second stream of wordings brings up rare wordings, too.
        for rng in (None, np.random.default_rng(index)):
            regions = region_sentences(patient, rng)
            assert list(regions) == list(REGIONS)
            assert labels_from_report(report_text(regions)) == expected, report_text(regions)


def test_every_wording_names_only_its_own_finding():
    for label in DIAGNOSIS_LABELS:
        for seed in range(40):
            for sentence in wordings(label, draw(label, seed).attributes):
                assert [name for name, value in labels_from_report(sentence).items() if value] == [label], sentence
                assert sentence[0].isupper() and sentence.endswith(".")
    for sentences in NORMAL.values():
        for sentence in sentences:
            assert not any(labels_from_report(sentence).values()), sentence


def test_label_reader_handles_imperfect_text():
    text = "Pleura: Right pleural effusion measuring 12 mm in thickness is observed."
    assert labels_from_report(f"{text}\n{text} {text}")["Pleural effusion"] == 1
    assert not any(labels_from_report("").values())
    assert not any(labels_from_report("Lung: A nod").values())
    # A negated sentence stays negated next to a positive one, on one line or on two.
    mixed = "Heart: No pericardial effusion was detected. Heart size is increased (mild).\nPleura: No pleural"
    assert [name for name, value in labels_from_report(mixed).items() if value] == ["Cardiomegaly"]


def test_report_with_impression_says_the_same_as_without():
    for index in range(100):
        patient = sample_patient(4, index, "train")
        sentences = region_sentences(patient)
        text = report_text(sentences, impression(patient))
        parts = DiffVPProcessor.post_process(text, sections=True)
        assert parts.pop("impression") == impression(patient)
        assert parts == {region: " ".join(lines) for region, lines in sentences.items()}
        assert text == f"Findings:\n{report_text(sentences)}\nImpression: {impression(patient)}"
        assert labels_from_report(text) == patient.labels


def test_reports_are_short_and_varied():
    reports = [report_text(region_sentences(sample_patient(0, index, "train"))) for index in range(300)]
    assert 80 <= np.median([len(report.split()) for report in reports]) <= 130
    assert len(set(reports)) > 290
    assert reports[0].startswith("Abdomen: ") and "\nTrachea and bronchie: " in reports[0]


@pytest.mark.slow
def test_prevalences_match_ct_rate():
    patients = [sample_patient(1, index, "train") for index in range(4000)]
    labels = np.array([[patient.labels[label] for label in DIAGNOSIS_LABELS] for patient in patients])
    normal = labels.sum(1) == 0
    assert 0.075 < normal.mean() < 0.105
    np.testing.assert_allclose(labels[~normal].mean(0), CT_RATE_SHARES, atol=0.035)
    coronary, arterial = (
        labels[:, DIAGNOSIS_LABELS.index(f"{name} wall calcification")] == 1
        for name in ("Coronary artery", "Arterial")
    )
    assert arterial[coronary].mean() > 0.75 > 0.4 > arterial.mean()  # strongest pair in the data: 0.86 against 0.28


def test_patient_depends_only_on_seed_split_and_index():
    assert sample_patient(0, 5, "train") == sample_patient(0, 5, "train")
    others = [sample_patient(1, 5, "train"), sample_patient(0, 6, "train"), sample_patient(0, 5, "valid")]
    assert all(other.anatomy != sample_patient(0, 5, "train").anatomy for other in others)
    with pytest.raises(ValueError, match="index=-1"):
        sample_patient(0, -1, "train")
    assert set(FINDING_NETWORK) == set(DIAGNOSIS_LABELS)


# Images --------------------------------------------------------------------------------------------------------------


def test_same_patient_gives_the_same_bytes_and_normals_differ_everywhere():
    first, second = (only(sample_patient(0, index, "train")) for index in (1, 2))
    a, again = render(first, slice_mm=4.0), render(first, slice_mm=4.0)
    assert a.hu.tobytes() == again.hu.tobytes() and a.hu.dtype == np.int16
    b = render(second, slice_mm=4.0)
    depth = min(a.hu.shape[2], b.hu.shape[2])
    a, b = a.hu[:, :, :depth], b.hu[:, :, :depth]
    body = (a > -1000) & (b > -1000)
    assert body.mean() > 0.2
    assert (a[body] == b[body]).mean() < 0.04
    for z in range(0, depth, 8):  # no plane and no structure is shared
        assert np.abs(a[:, :, z].astype(int) - b[:, :, z])[body[:, :, z]].mean() > 20


def test_corners_of_the_field_of_view_are_air():
    scan = render(only(sample_patient(0, 1, "train")))
    # The shoulders may reach the sides of the field of view but never its corners, so a threshold finds the body.
    for corner in (scan.hu[:6, :6], scan.hu[-6:, :6], scan.hu[:6, -6:], scan.hu[-6:, -6:]):
        assert corner.max() <= -1000


def test_tissues_have_their_densities():
    scan = render(only(sample_patient(0, 1, "train")))
    lung = scan.hu[ndimage.binary_erosion(scan.regions["lung"], iterations=3)]
    heart = scan.hu[ndimage.binary_erosion(scan.regions["heart"], iterations=4)]
    assert -910 < np.median(lung) < -780
    assert 30 < np.median(heart) < 140
    assert np.percentile(scan.hu[scan.regions["bone"]], 75) > 200
    assert scan.hu[scan.regions["trachea and bronchie"]].min() < -900
    assert set(scan.regions) == set(REGIONS) and all(mask.any() for mask in scan.regions.values())


def test_orientation_is_lps():
    scan = render(only(sample_patient(0, 1, "train")))
    assert nib.aff2axcodes(scan.affine) == ("L", "P", "S")
    np.testing.assert_allclose(np.abs(np.diag(scan.affine)[:3]), scan.spacing)
    x, y, z = (centre_mm(scan.regions[name], scan) for name in ("heart", "bone", "abdomen"))
    lung = centre_mm(scan.regions["lung"], scan)
    assert x[0] > lung[0]  # the heart lies to the left,
    assert y[1] > lung[1] > x[1]  # the spine behind the lungs and the heart in front,
    assert z[2] < lung[2] < centre_mm(scan.regions["thyroid"], scan)[2]  # liver below, thyroid above


@pytest.mark.parametrize("label", DIAGNOSIS_LABELS)
def test_finding_changes_the_image_only_at_its_mask(label):
    patient = sample_patient(2, DIAGNOSIS_LABELS.index(label), "train")
    without, scan = render(only(patient)), render(only(patient, draw(label, 1)))
    mask = scan.lesions[label]
    change = np.abs(scan.hu.astype(int) - without.hu)
    assert mask.sum() >= 3
    # The change is well above the noise on average, and it covers most voxels of the mask.
    assert change[mask].mean() > 3 * patient.anatomy.noise
    assert (change[mask] > 15).mean() > 0.6
    distance = ndimage.distance_transform_edt(~mask, sampling=scan.spacing)
    if label in ("Mosaic attenuation pattern", "Interlobular septal thickening"):
        return  # patterns of the whole lung have no outside
    assert change[distance > 30].sum() == 0
    assert (change[distance > 2.5 * max(scan.spacing)] > 60).mean() < 0.002


def test_nodules_have_the_reported_size_number_side_and_lobe():
    for index, lobe in enumerate(LOBES):
        patient = sample_patient(7, index, "train")
        finding = draw("Lung nodule", index, lobe=lobe, size_mm=12 if "middle" in lobe else 20, count=3)
        scan = render(only(patient, finding), slice_mm=2.5)
        parts, count = ndimage.label(scan.lesions["Lung nodule"])
        assert count == 3
        sizes = ndimage.sum(parts > 0, parts, range(1, count + 1)) * np.prod(scan.spacing)
        largest = int(np.argmax(sizes)) + 1
        diameter = 2 * (3 * sizes.max() / 4 / np.pi) ** (1 / 3)
        assert abs(diameter - finding.attributes["size_mm"]) < scan.spacing[0]
        lungs = centre_mm(scan.regions["lung"], scan)
        nodule = centre_mm(parts == largest, scan)
        assert (nodule[0] < lungs[0]) == ("right" in lobe)
        if "middle" not in lobe:
            assert (nodule[2] > lungs[2] - 25) if "upper" in lobe else (nodule[2] < lungs[2] + 25)


@pytest.mark.parametrize("side", ["right", "left"])
def test_effusion_lies_behind_with_the_reported_side_and_thickness(side):
    patient = sample_patient(8, 1, "train")
    scan = render(only(patient, draw("Pleural effusion", side=side, thickness_mm=30)))
    fluid = scan.lesions["Pleural effusion"]
    lungs = centre_mm(scan.regions["lung"], scan)
    centre = centre_mm(fluid, scan)
    assert (centre[0] < lungs[0]) == (side == "right") and centre[1] > lungs[1] + 15
    # Thickness from front to back in the columns through the fluid; the thickest layer has the reported value.
    column = fluid.sum(axis=1) * scan.spacing[1]
    assert np.percentile(column[column > 0], 90) == pytest.approx(30, abs=9)


@pytest.mark.parametrize("ratio", [0.43, 0.60])
def test_image_shows_the_reported_cardiothoracic_ratio(ratio):
    patient = sample_patient(9, 3, "train")
    anatomy = dataclasses.replace(patient.anatomy, cardiothoracic_ratio=0.43, roll=0.0)
    finding = [draw("Cardiomegaly", cardiothoracic_ratio=ratio)] if ratio > 0.5 else []
    scan = render(only(dataclasses.replace(patient, anatomy=anatomy), *finding))
    width = lambda mask: np.ptp(np.flatnonzero(mask.any(axis=(1, 2))))  # noqa: E731
    assert width(scan.regions["heart"]) / width(scan.regions["lung"] | scan.regions["heart"]) == pytest.approx(
        ratio, abs=0.04
    )


def test_hernia_effusion_and_lymph_node_have_the_reported_sizes():
    patient = sample_patient(10, 1, "train")
    scan = render(
        only(
            patient,
            draw("Hiatal hernia", size_mm=50),
            draw("Pericardial effusion", thickness_mm=20),
            draw("Lymphadenopathy", stations=["right paratracheal"], short_axis_mm=22),
        ),
        slice_mm=2.5,
    )
    hernia = scan.lesions["Hiatal hernia"]
    assert 2 * (3 * hernia.sum() * np.prod(scan.spacing) / 4 / np.pi) ** (1 / 3) == pytest.approx(50, abs=3)
    fluid = scan.lesions["Pericardial effusion"]
    thickness = 2 * ndimage.distance_transform_edt(fluid, sampling=scan.spacing).max()
    assert thickness == pytest.approx(20, abs=5)
    node = scan.lesions["Lymphadenopathy"]
    parts, count = ndimage.label(node)
    largest = parts == 1 + int(np.argmax(ndimage.sum(node, parts, range(1, count + 1))))
    short = 2 * ndimage.distance_transform_edt(largest, sampling=scan.spacing).max()
    assert short == pytest.approx(22, abs=2.5 * scan.spacing[0])


def test_matrix_changes_the_sampling_but_not_the_patient():
    patient = only(sample_patient(11, 0, "train"), draw("Consolidation", lobe="left lower lobe", size_mm=60))
    coarse, fine = render_patient(patient, matrix=96, slice_mm=5.0), render_patient(patient, matrix=128, slice_mm=3.0)
    a, b = (scan.lesions["Consolidation"] for scan in (coarse, fine))
    np.testing.assert_allclose(centre_mm(a, coarse), centre_mm(b, fine), atol=2.0)
    volume = [mask.sum() * np.prod(scan.spacing) for mask, scan in ((a, coarse), (b, fine))]
    assert volume[0] == pytest.approx(volume[1], rel=0.1)


# The second scanner --------------------------------------------------------------------------------------------------

# Fields that depend on the scan; all other fields of the anatomy belong to the patient.
OF_THE_SCAN = {"below", "roll", "shift_x", "shift_y", "blood_hu", "liver_hu", "bone_hu", "fat_hu", "noise"}


def test_second_scanner_keeps_the_patient_and_changes_the_scan():
    patients = [sample_patient(0, index, "train") for index in range(300)]
    assert all(on_scanner(patient, "a") is patient for patient in patients)
    others = [on_scanner(patient, "b") for patient in patients]
    assert others[:5] == [on_scanner(sample_patient(0, index, "train"), "b") for index in range(5)]
    body = [field.name for field in dataclasses.fields(Anatomy) if field.name not in OF_THE_SCAN]
    for patient, other in zip(patients, others, strict=True):
        assert (other.findings, other.sex, other.age) == (patient.findings, patient.sex, patient.age)
        assert report_text(region_sentences(other)) == report_text(region_sentences(patient))
        assert all(getattr(other.anatomy, name) == getattr(patient.anatomy, name) for name in body)
        assert (patient.name, other.name) == (f"train_{patient.index + 1}_a_1", f"train_{patient.index + 1}_b_1")
        assert other.slice_mm < patient.slice_mm and other.fov_mm > patient.fov_mm
    for share, group in ((0.3, patients), (0.8, others)):
        contrast = np.array([patient.phase == "contrast" for patient in group])
        blood = np.array([patient.anatomy.blood_hu for patient in group])
        assert contrast.mean() == pytest.approx(share, abs=0.08) and blood[contrast].min() > blood[~contrast].max()


def test_findings_keep_their_place_in_the_body_on_either_scanner():
    nodule = draw("Lung nodule", 1, count=1, size_mm=24, lobe="left lower lobe")
    patient = only(sample_patient(0, 3, "train"), nodule)
    places, sizes = [], []
    for scanned in (patient, on_scanner(patient, "b")):
        scan = render(scanned)
        mask = scan.lesions["Lung nodule"]
        places.append(np.stack(Geometry(scanned).to_anatomy(*centre_mm(mask, scan))))
        sizes.append(2 * (3 * mask.sum() * np.prod(scan.spacing) / 4 / np.pi) ** (1 / 3))
    np.testing.assert_allclose(*places, atol=1.5)
    assert sizes == pytest.approx([24, 24], abs=1.5)


def test_hu_follow_the_calibration_of_air_and_water():
    patient = only(sample_patient(0, 1, "train"))
    scan = render(patient)
    other = render(dataclasses.replace(patient, air_hu=-980.0, water_hu=10.0))
    np.testing.assert_array_equal(scan.regions["lung"], other.regions["lung"])
    for region in ("lung", "heart"):
        inner = ndimage.binary_erosion(scan.regions[region], iterations=3)
        # A line through (-1000, -980) and (0, 10); medians of whole HU.
        assert np.median(other.hu[inner]) == pytest.approx(10 + 0.99 * np.median(scan.hu[inner]), abs=1)
    for corner in (other.hu[:6, :6], other.hu[-6:, -6:]):
        assert corner.max() <= -1000


def test_second_scanner_changes_the_image():
    patient = only(sample_patient(0, 1, "train"))
    scan, other = render(patient), render(on_scanner(patient, "b"))
    depth = [volume.hu.shape[2] * volume.spacing[2] for volume in (scan, other)]
    assert other.hu.shape[2] > scan.hu.shape[2] and depth[0] - 30 < depth[1] < depth[0]
    assert centre_mm(other.regions["heart"], other)[1] > centre_mm(scan.regions["heart"], scan)[1] + 5  # table down
    for corner in (other.hu[:6, :6], other.hu[-6:, :6], other.hu[:6, -6:], other.hu[-6:, -6:]):
        assert corner.max() <= -1000
    assert all(mask.any() for mask in other.regions.values())


def test_unknown_and_repeated_scanners_are_refused():
    patient = sample_patient(0, 0, "train")
    with pytest.raises(ValueError, match="scanner='c': expected one of a, b"):
        on_scanner(patient, "c")
    with pytest.raises(ValueError, match="train_1_b_1 is already on scanner 'b'"):
        on_scanner(on_scanner(patient, "b"), "b")


@pytest.mark.slow
def test_cohort_of_the_second_scanner_is_read_back_and_never_mixed(cohort, tmp_path):
    arguments = {"train": 0, "valid": 2, "seed": 4, "matrix": 64, "workers": 1, "progress": False}
    write_cohort(tmp_path, scanner="b", **arguments)
    cases, first = load_phantom(tmp_path, "valid"), load_phantom(cohort, "valid")
    assert [case.name for case in cases] == ["valid_1_b_1", "valid_2_b_1"]
    for case, other in zip(cases, first, strict=True):
        assert case.report == other.report and (case.labels == other.labels).all()
        assert case.patient_id == other.patient_id and case.scan_id != other.scan_id
        image = nib.load(case.volume)
        patient = on_scanner(sample_patient(4, int(case.name.split("_")[1]) - 1, "valid"), "b")
        np.testing.assert_array_equal(np.asarray(image.dataobj), render_patient(patient, matrix=64).hu)
        assert nib.load(tmp_path / f"phantom/lesion_mask/{case.name}.nii.gz").shape == image.shape
    records = [json.loads(line) for line in (tmp_path / "phantom/patients.jsonl").read_text().splitlines()]
    assert [record["scanner"] for record in records] == ["b", "b"] and records[0]["air_hu"] > -1000
    with (tmp_path / "dataset/metadata/validation_metadata.csv").open() as handle:
        assert next(csv.DictReader(handle))["ManufacturerModelName"] == "DiffVP phantom, scanner b"
    with pytest.raises(ValueError, match="'scanner': 'b'.*choose another folder"):
        write_cohort(tmp_path, **arguments)
    with pytest.raises(ValueError, match="asked for.*'scanner': 'b'"):
        write_cohort(cohort, scanner="b", **arguments)


def test_first_scanner_is_not_named_in_the_records(cohort):
    """Cohorts written before the second scanner existed must continue with the same bytes."""
    assert (cohort / "phantom/cohort.json").read_text() == '{"matrix": 64, "rendering": 2, "seed": 4}\n'
    fields = {"name", "seed", "index", "split", "sex", "age", "phase", "kernel", "slice_mm", "fov_mm", "anatomy"}
    for line in (cohort / "phantom/patients.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == fields | {"findings"}


# Dataset -------------------------------------------------------------------------------------------------------------


def test_cohort_is_read_back_as_sampled(cohort):
    for split, count in (("train", 5), ("valid", 2)):
        cases = load_phantom(cohort, split)
        assert len(cases) == count
        for index, case in enumerate(cases):
            patient = sample_patient(4, index, split)
            assert case.name == patient.name and case.patient_id == f"{split}_{index + 1}"
            assert case.volume == volume_path(cohort, patient.name)
            assert dict(zip(DIAGNOSIS_LABELS, case.labels.tolist(), strict=True)) == patient.labels
            assert case.report == report_text({name: [text] for name, text in case.region_sentences.items()})
            assert labels_from_report(case.report) == patient.labels
    pool = normal_pool(load_phantom(cohort, "train"))
    assert pool and [case.name for case in pool] == [
        sample_patient(4, index, "train").name for index in range(5) if not sample_patient(4, index, "train").findings
    ]


def test_volumes_and_masks_share_one_grid(cohort):
    patient = sample_patient(4, 0, "train")
    image = nib.load(cohort / "dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz")
    assert image.get_data_dtype() == np.int16 and nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert image.header.get_zooms() == pytest.approx((patient.fov_mm / 64, patient.fov_mm / 64, patient.slice_mm))
    scan = render_patient(patient, matrix=64)
    np.testing.assert_array_equal(np.asarray(image.dataobj), scan.hu)
    for region in REGIONS:
        mask = nib.load(cohort / f"dataset/train_region_mask/seg_train_1_a_1/{region}.nii.gz")
        np.testing.assert_allclose(mask.affine, image.affine)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), scan.regions[region])
    code = np.asarray(nib.load(cohort / "phantom/lesion_mask/train_1_a_1.nii.gz").dataobj)
    for number, label in enumerate(DIAGNOSIS_LABELS):
        expected = scan.lesions.get(label, np.zeros(code.shape, bool))
        np.testing.assert_array_equal((code >> number) & 1, expected)
    with (cohort / "dataset/metadata/train_metadata.csv").open() as handle:
        row = next(csv.DictReader(handle))
    assert json.loads(row["XYSpacing"]) == pytest.approx(image.header.get_zooms()[:2], abs=1e-5)
    assert float(row["ZSpacing"]) == patient.slice_mm and row["RescaleSlope"] == "1"
    assert [int(row[key]) for key in ("Columns", "Rows", "NumberofSlices")] == list(image.shape)


@pytest.mark.slow
def test_same_bytes_for_any_number_of_workers(cohort, tmp_path):
    write_cohort(tmp_path, train=5, valid=2, seed=4, matrix=64, workers=2, progress=False)
    assert tree(tmp_path) == tree(cohort)


def test_interrupted_run_resumes_and_keeps_complete_volumes(cohort, tmp_path, monkeypatch):
    arguments = {"train": 5, "valid": 2, "seed": 4, "matrix": 64, "workers": 1, "progress": False}
    rendered = []

    def failing(patient, **kwargs):
        if len(rendered) == 2:
            raise KeyboardInterrupt
        rendered.append(patient.name)
        return render_patient(patient, **kwargs)

    monkeypatch.setattr(phantom_cohort, "render_patient", failing)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path, **arguments)
    first = tmp_path / "dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"
    made = first.stat().st_mtime_ns
    monkeypatch.setattr(phantom_cohort, "render_patient", render_patient)
    write_cohort(tmp_path, **arguments)
    assert first.stat().st_mtime_ns == made
    assert tree(tmp_path) == tree(cohort)
    with pytest.raises(ValueError, match="'seed': 4.*'seed': 5"):
        write_cohort(tmp_path, **(arguments | {"seed": 5}))
    # Volumes of another rendering version are not mixed in either.
    monkeypatch.setattr(phantom_cohort, "RENDERING", phantom_cohort.RENDERING + 1)
    with pytest.raises(ValueError, match="choose another folder"):
        write_cohort(tmp_path, **arguments)


def test_progress_is_shown_without_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    write_cohort(tmp_path, train=1, valid=0, seed=4, matrix=24, workers=1)
    assert capsys.readouterr().err.splitlines() == ["Phantom cases: 0 of 1", "Phantom cases: 1 of 1"]
