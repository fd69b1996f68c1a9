# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""References that come closer to the patient: the scans, the choice of references, the probes, and the page."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from scipy import ndimage
from typer.testing import CliRunner

from diffvp import progress
from diffvp.cli import app
from diffvp.data.phantom import Finding, earlier_scan, render_patient, sample_patient, without_findings
from diffvp.experiments import doses
from diffvp.experiments.doses import ABNORMAL, ARMS, BODY, CONTROLS, EARLIER, ITSELF, NEAREST, RANDOM, TWIN, ZEROS
from diffvp.experiments.kinds import dose_response
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.processing_diffvp import DiffVPImageProcessor

MATRIX = 40
SETTINGS = {
    "seed": 9,
    "training_cases": [5, 6],
    "test_cases": 4,
    "pool": 3,
    "matrix": MATRIX,
    "compare": [[TWIN, ITSELF], [RANDOM, ABNORMAL]],
}


@pytest.fixture(scope="module")
def patient():
    """A patient with findings that lie in a part of the lung."""
    findings = (Finding("Lung nodule", {"count": 2, "lobe": "left lower lobe", "size_mm": 20}),)
    return replace(sample_patient(9, 0, "train"), findings=findings)


def rendered(patient):
    return render_patient(patient, matrix=96)


# Scans of one patient


def test_twin_equals_the_patient_away_from_his_findings(patient):
    scan, twin = rendered(patient), rendered(without_findings(patient))
    lesion = scan.lesions["Lung nodule"]
    reach = int(np.ceil(8 / min(scan.spacing)))  # edges of the finding, and the blur of the kernel
    away = ~ndimage.binary_dilation(lesion, iterations=reach)
    assert np.array_equal(scan.hu[away], twin.hu[away])
    assert away.mean() > 0.9
    assert np.abs(scan.hu.astype(int) - twin.hu)[lesion].mean() > 300
    assert not twin.lesions


def test_earlier_scan_is_the_same_healthy_body_in_another_scan(patient):
    scan, twin, earlier = map(rendered, (patient, without_findings(patient), earlier_scan(patient)))
    assert not earlier.lesions and earlier_scan(patient).age == patient.age - 1
    again = rendered(earlier_scan(patient))
    assert np.array_equal(earlier.hu, again.hu)
    # The lungs are 1 % smaller along each axis.
    volume = [of.regions["lung"].sum() * np.prod(of.spacing) for of in (twin, earlier)]
    assert volume[1] / volume[0] == pytest.approx(0.99**3, abs=0.01)
    np.testing.assert_allclose(np.linalg.norm(earlier.affine[:3, :3], axis=0), earlier.spacing)
    noise = [
        one.rng(f"noise{one.visit}").random() for one in (patient, without_findings(patient), earlier_scan(patient))
    ]
    assert noise[0] == noise[1] != noise[2]
    assert scan.hu.shape == twin.hu.shape


def test_earlier_scan_keeps_the_anatomy_of_the_patient(patient):
    """Compare in the frame of the anatomy: the same vessels, so a high correlation, unlike with another patient."""

    def central(of):
        still = replace(of.anatomy, roll=0.0, pitch=0.0, yaw=0.0, shift_x=0.0, shift_y=0.0, below=40.0)
        of = replace(of, anatomy=still, fov_mm=360.0, kernel="smooth")
        hu = render_patient(of, matrix=96, slice_mm=4.0).hu[..., 10:60].astype(float)
        return hu.ravel()

    same = np.corrcoef(central(without_findings(patient)), central(earlier_scan(patient)))[0, 1]
    other = np.corrcoef(central(without_findings(patient)), central(without_findings(sample_patient(9, 1, "pool"))))[
        0, 1
    ]
    assert same > 0.98 > other


# Choice of references


@pytest.fixture(scope="module")
def encoded_pool(tmp_path_factory):
    """Cache of the encoded patients of the pool: all tests have the same pool and model."""
    return tmp_path_factory.mktemp("pool")


@pytest.fixture
def comparer(make_model, encoded_pool, tmp_path):
    """A random model of a few thousand parameters with a pool of three."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/dose_pool").symlink_to(encoded_pool)
    torch.manual_seed(0)
    model = make_model(difference_level="aligned").eval()
    processor = type("Processor", (), {})()
    processor.image_processor = DiffVPImageProcessor(size={"depth": 32, "height": 32, "width": 32})
    settings = doses.Doses("", str(tmp_path / "cache"), 9, 3, (0, 1, 2), MATRIX)
    return doses.Comparer(settings, model, processor)


@pytest.mark.slow
def test_each_reference_is_what_its_name_says(comparer, monkeypatch):
    patient = next(one for one in comparer.doses.patients("valid", 9) if one.findings)
    seen = []
    align = type(comparer.model.aligned_difference).align

    def spy(self, features, reference):
        seen.append(reference[0])
        return align(self, features, reference)

    monkeypatch.setattr(type(comparer.model.aligned_difference), "align", spy)
    found = comparer.compare(patient)
    keys = [key.removesuffix(": pair") for key in found if key.endswith(": pair")]
    used = dict(zip([key for key in keys if key != ZEROS], seen, strict=True))
    own = comparer.encode(patient)
    assert torch.equal(used[ITSELF], own)
    assert torch.equal(used[TWIN], comparer.encode(without_findings(patient)))
    assert torch.equal(used[EARLIER], comparer.encode(earlier_scan(patient)))
    pool = {one.name: one for one in comparer.pool}
    chosen = comparer.references(patient, own)
    assert set(chosen) == set(used) - {ITSELF, TWIN, EARLIER}
    for key, reference in chosen.items():
        assert reference.name in pool and reference.name != patient.name
        assert torch.equal(used[key], comparer.encode(reference))
        assert bool(reference.findings) == key.startswith(ABNORMAL)
    means = {name: comparer.encode(without_findings(one)).mean(0) for name, one in pool.items()}
    assert chosen[NEAREST].name == min(means, key=lambda name: float((means[name] - own.mean(0)).norm()))
    same_sex = [one for one in pool.values() if one.sex == patient.sex] or list(pool.values())
    assert chosen[BODY].name == min(same_sex, key=lambda one: doses.body_distance(patient, one)).name
    torch.testing.assert_close(found[f"{ZEROS}: residual"], found["scan"])
    assert not found[f"{ZEROS}: pair"][1].any()


def test_random_references_change_with_the_draw_only(comparer):
    patients, own = comparer.doses.patients("valid", 12), torch.zeros(8, comparer.model.config.encoder_hidden_size)
    drawn = [[comparer.references(one, own)[f"{RANDOM}, {draw}"].name for one in patients] for draw in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert set(drawn[0]) == {one.name for one in comparer.pool}


def test_patients_of_pool_training_and_test_are_different():
    settings = doses.Doses("", "", 9, 3, (0,))
    anatomies = [one.anatomy for split in ("train", "valid", "pool") for one in settings.patients(split, 20)]
    assert len(set(anatomies)) == 60


@pytest.mark.slow
def test_interrupted_comparison_resumes_with_the_same_result(comparer, monkeypatch, tmp_path):
    patients = comparer.doses.patients("valid", 2)
    rendered, render = [], doses.render_patient
    monkeypatch.setattr(doses, "render_patient", lambda one, **options: rendered.append(one) or render(one, **options))
    first = doses.compare_all(comparer.doses, patients[:1], 1, comparer)
    rendered.clear()
    resumed = doses.compare_all(comparer.doses, patients, 1, comparer)
    assert rendered == [patients[1], earlier_scan(patients[1]), without_findings(patients[1])]
    elsewhere = replace(comparer.doses, cache=str(tmp_path / "elsewhere"))
    fresh = doses.compare_all(elsewhere, patients, 1, doses.Comparer(elsewhere, comparer.model, comparer.processor))
    for one, other in zip(resumed, fresh, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(first[0][key], fresh[0][key]) for key in first[0])


def test_progress_is_shown_without_a_terminal(comparer, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    doses.compare_all(comparer.doses, comparer.doses.patients("valid", 1), 1, comparer)
    assert capsys.readouterr().err.splitlines() == ["Patients: 0 of 1", "Patients: 1 of 1"]


@pytest.mark.parametrize("change", [{"pool": 1}, {"test_case": 5}])
def test_wrong_setting_is_named(tmp_path, repository_root, change):
    table = yaml.safe_load((repository_root / "experiments/dose_response.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(table | {"settings": SETTINGS | change}))
    study = repository_root / "configs/study_reference.yaml"
    result = CliRunner().invoke(app, ["experiment", str(path), f"--study={study}", f"--output={tmp_path}"])
    expected = {"pool": "settings: pool: 1 (expected greater than or equal to 2)",
                "test_case": "settings: test_case: unknown (expected test_cases)"}  # fmt: skip
    assert result.exit_code == 2 and f"SettingsError: {expected[next(iter(change))]}" in result.stderr


# Probes


def test_probe_finds_planted_labels_and_not_shuffled_ones():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (300, 2))
    vectors = rng.standard_normal((300, 40))
    vectors[:, 7] += 2.5 * labels[:, 0]
    scan = rng.standard_normal((300, 10))
    train, test = slice(0, 200), slice(200, 300)
    shuffled = np.stack([labels[:, 0], rng.permutation(labels[:, 0])], axis=1)
    likely = dose_response.read_findings([vectors[train], scan[train]], shuffled[train], [vectors[test], scan[test]])
    scores = dose_response.score_systems({"a": likely[None], "b": likely[None, ::-1]}, shuffled[test], [("a", "b")])
    planted, noise = (scores["labels"]["a"][DIAGNOSIS_LABELS[label]] for label in (0, 1))
    assert planted > 0.85
    assert 0.35 < noise < 0.65
    [test_entry] = scores["comparisons"]
    assert test_entry["auroc"]["p_holm"] < 0.05 < test_entry["auroc"]["difference"] * 10


def test_label_without_training_cases_gets_its_frequency():
    vectors = np.random.default_rng(0).standard_normal((20, 3))
    labels = np.zeros((20, 1), int)
    labels[0] = 1
    assert np.array_equal(dose_response.read_findings([vectors], labels, [vectors]), np.full((20, 1), 0.05))


def test_training_subsets_are_nested_and_change_with_the_seed():
    names = [f"train_{index}_a_1" for index in range(50)]
    small, large, other = (set(dose_response.subset(names, *of)) for of in ((10, 0), (30, 0), (10, 1)))
    assert len(small) == 10 and small < large and small != other
    assert dose_response.subset(names, 50, 3) == list(range(50))


# The command


@pytest.mark.slow
def test_command_writes_result_page_and_figure(make_model, comparer, tmp_path, monkeypatch, repository_root):
    loaded = comparer.model, comparer.processor
    monkeypatch.setattr(dose_response, "load_checkpoint", lambda *_: loaded)
    monkeypatch.setattr(dose_response, "STRENGTHS", [1.0])
    monkeypatch.setattr(dose_response, "DIAGNOSIS_LABELS", DIAGNOSIS_LABELS[9:11])  # the commonest
    monkeypatch.setattr(dose_response, "weights_sha256", lambda *_: {"model.safetensors": "0"})
    table = yaml.safe_load((repository_root / "experiments/dose_response.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(table | {"seeds": [0, 1], "settings": SETTINGS}))
    command = [
        "experiment",
        str(path),
        "--study",
        str(repository_root / "configs/study_reference.yaml"),
        "--workers=1",
    ]
    command += [f"--runs={tmp_path / 'runs'}", f"--output={tmp_path}", f"training.data.cache_dir={tmp_path / 'cache'}"]
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "reference/mine.json").read_text())
    cells = document["figure"]["cells"]
    assert len(cells) == 3 * 2 + 3 and document["cases"] == 4
    assert all(set(cell["scores"]) == {*ARMS, *CONTROLS} for cell in cells)
    assert (tmp_path / "reference/mine.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "reference/RESULTS.md").read_text()
    assert all(name in page for name in ARMS + CONTROLS)
    assert "table4" not in page, "no trained models are compared here"
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    repeated = json.loads((tmp_path / "reference/mine.json").read_text())
    assert repeated["figure"] == document["figure"]


def test_unknown_reference_is_refused(tmp_path, repository_root):
    table = yaml.safe_load((repository_root / "experiments/dose_response.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(table | {"settings": SETTINGS | {"compare": [["twin", ITSELF]]}}))
    study = repository_root / "configs/study_reference.yaml"
    result = CliRunner().invoke(app, ["experiment", str(path), f"--study={study}", f"--output={tmp_path}"])
    assert result.exit_code == 2
    assert "twin" in result.stderr
