# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The processor: inputs, reference sampling, text, saving and loading."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import nibabel as nib
import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError

from diffvp import processing_diffvp
from diffvp.configuration_diffvp import DEFAULT_INSTRUCTION
from diffvp.labels_diffvp import DIAGNOSIS_LABELS, REGIONS
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from diffvp.reading_diffvp import read_ct
from diffvp.references_diffvp import ReferencePool, ReferencePoolError, index_references
from diffvp.resampling_diffvp import resample
from diffvp.volume_diffvp import CTInputError

SPACING = (2.0, 2.0, 3.0)
SIZE = {"depth": 8, "height": 10, "width": 12}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_ct(seed: int) -> np.ndarray:
    lps = np.full((16, 14, 12), -1000, np.int16)
    lps[3:13, 2:12, 1:11] = np.random.default_rng(seed).integers(-900, 200, (10, 10, 10))
    return lps


def write_ct(path, seed: int):
    nib.save(nib.Nifti1Image(make_ct(seed), np.diag([-2.0, -2.0, 3.0, 1.0])), path)
    return path


@pytest.fixture
def processor(tokenizer) -> DiffVPProcessor:
    return DiffVPProcessor(DiffVPImageProcessor(size=SIZE), pickle.loads(pickle.dumps(tokenizer)))


@pytest.fixture
def pool(tmp_path):
    """Make a folder with five references and their index."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for seed in range(5):
        write_ct(folder / f"normal-{seed}.nii.gz", seed)
    index_references(folder)
    return folder


# The image processor


def test_defaults_are_the_papers_and_need_no_checkpoint():
    features = DiffVPImageProcessor()(make_ct(1), spacing=SPACING)
    assert features["ct"].shape == (1, 1, 64, 256, 256) and features["ct"].dtype == torch.float32
    assert -1 <= features["ct"].min() < -0.8 and 0.9 < features["ct"].max() < 1
    assert len(features["geometry"]) == 1 and features["geometry"][0].size == (64, 256, 256)


def test_call_arguments_override_attributes_for_one_call():
    image_processor = DiffVPImageProcessor(size=[8, 10, 12], hu_window=(-900, 100))
    assert image_processor.size == SIZE and image_processor.hu_window == (-900.0, 100.0)
    ct, volume = make_ct(1), read_ct(make_ct(1), SPACING)
    features = image_processor(ct, spacing=SPACING)
    assert torch.equal(features["ct"][0], resample(volume, (8, 10, 12), hu_window=(-900, 100))[0])
    features = image_processor(
        [ct], spacing=SPACING, size=(4, 5, 6), target_spacing=(6, 5, 4.5), crop_foreground=False
    )
    assert torch.equal(features["ct"][0], resample(volume, (4, 5, 6), (6, 5, 4.5), False, hu_window=(-900, 100))[0])
    assert image_processor.size == SIZE, "a call must not change the processor"
    assert isinstance(image_processor(ct, spacing=SPACING, return_tensors="np")["ct"], np.ndarray)


@pytest.mark.parametrize(
    "arguments",
    [
        {"hu_window": "abc"},
        {"size": "8"},
        {"crop_foreground": "yes"},
        {"target_spacing": ("1", "1", "1")},
        {"allow_non_hu": 1},
    ],
)
def test_argument_types_are_validated(arguments):
    with pytest.raises(StrictDataclassFieldValidationError):
        DiffVPImageProcessor(size=SIZE)(make_ct(1), spacing=SPACING, **arguments)
    with pytest.raises(StrictDataclassFieldValidationError):
        DiffVPImageProcessor(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": {"height": 8, "width": 8}}, "size: "),
        ({"size": (8, 8)}, "size: "),
        ({"size": (0, 8, 8)}, "size: "),
        ({"target_spacing": (1, 1)}, "target_spacing"),
        ({"target_spacing": (1, 1, -1)}, "target_spacing"),
        ({"hu_window": (200, -1000)}, "rising"),
        ({"return_tensors": "tf"}, "return_tensors"),
    ],
)
def test_argument_values_are_validated(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiffVPImageProcessor(size=SIZE)(make_ct(1), spacing=SPACING, **arguments)


def test_falling_window_is_an_input_error():
    """Raise an input error, which the command line shows in one line, as for a scan."""
    with pytest.raises(CTInputError) as caught:
        DiffVPImageProcessor(size=SIZE)(make_ct(1), spacing=SPACING, hu_window=(200, -1000))
    assert caught.value.field == "hu_window"


def test_unknown_arguments_are_refused(processor):
    with pytest.raises(TypeError, match="hu_windows"):
        DiffVPImageProcessor(hu_windows=(-1000, 200))
    with pytest.raises((TypeError, ValueError)):
        DiffVPImageProcessor(size=SIZE)(make_ct(1), spacing=SPACING, do_rescale=True)
    with pytest.raises(TypeError, match="refrence"):
        processor(ct=make_ct(1), refrence=make_ct(2), spacing=SPACING)


def test_spacing_is_required_for_arrays_and_refused_for_files(processor, tmp_path):
    path = write_ct(tmp_path / "scan.nii.gz", 1)
    with pytest.raises(CTInputError, match="spacing: missing"):
        processor.image_processor(make_ct(1))
    for call in (processor.image_processor, processor):
        with pytest.raises(ValueError, match="spacing: .*expected None"):
            call(path, spacing=SPACING)
    inputs = processor(ct=[make_ct(1), path], reference=path, spacing=SPACING)
    assert torch.equal(inputs["ct"][0], inputs["ct"][1])


def test_map_is_saved_on_the_grid_of_the_input(processor, tmp_path):
    path = write_ct(tmp_path / "scan.nii.gz", 1)
    inputs = processor(ct=path, reference=path)
    saved = nib.load(processor.save_map(tmp_path / "map.nii.gz", inputs["ct"][0, 0], inputs.geometry[0]))
    assert saved.shape == (16, 14, 12) and (saved.affine == nib.load(path).affine).all()
    np.testing.assert_array_equal(saved.get_fdata(), processor.to_input_grid(inputs["ct"][0, 0], inputs.geometry[0]))


# Inputs of the model


def test_inputs_have_the_expected_keys_and_attributes(processor, tmp_path):
    target, normal = write_ct(tmp_path / "target.nii.gz", 1), write_ct(tmp_path / "normal.nii.gz", 2)
    inputs = processor(ct=target, reference=normal, return_tensors="pt")
    assert list(inputs) == ["ct", "reference", "input_ids", "attention_mask"] == processor.model_input_names
    assert inputs["ct"].shape == inputs["reference"].shape == (1, 1, 8, 10, 12)
    assert not torch.equal(inputs["ct"], inputs["reference"])
    assert inputs.geometry[0].sha256 == read_ct(target).sha256
    assert inputs.reference_ids == ["normal.nii.gz"] == [place.source for place in inputs.reference_geometry]
    moved = pickle.loads(pickle.dumps(inputs.to(torch.bfloat16)))
    assert moved["ct"].dtype == torch.bfloat16 and moved["input_ids"].dtype == torch.int64
    assert moved.geometry == inputs.geometry
    arrays = processor(ct=target, reference=normal, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values())


def test_reference_is_shared_or_given_once_per_scan(processor):
    scans, normals = [make_ct(1), make_ct(2), make_ct(3)], [make_ct(4), make_ct(5), make_ct(6)]
    each = processor(ct=scans, reference=normals, spacing=SPACING)
    shared = processor(ct=scans, reference=normals[0], spacing=SPACING)
    assert each["reference"].shape == shared["reference"].shape == (3, 1, 8, 10, 12)
    assert all(torch.equal(one, each["reference"][0]) for one in shared["reference"])
    assert len(shared.reference_geometry) == len(shared.reference_ids) == 3
    for k in range(3):
        alone = processor(ct=scans[k], reference=normals[k], spacing=SPACING)
        assert torch.equal(alone["reference"][0], each["reference"][k]) and torch.equal(alone["ct"][0], each["ct"][k])
    with pytest.raises(ValueError, match="reference: 2 for 3 scans"):
        processor(ct=scans, reference=normals[:2], spacing=SPACING)
    with pytest.raises(ValueError, match="2 texts for 3 scans"):
        processor(ct=scans, reference=normals, text=["a", "b"], spacing=SPACING)


def test_batches_pad_on_the_left(processor):
    texts = ["Short.", "A much longer instruction, of many more tokens."]
    batch = processor(ct=[make_ct(1), make_ct(2)], reference=make_ct(3), text=texts, spacing=SPACING)
    single = [
        processor(ct=make_ct(1), reference=make_ct(3), text=text, spacing=SPACING)["input_ids"][0] for text in texts
    ]
    length = batch["input_ids"].shape[1]
    for row, mask, ids in zip(batch["input_ids"], batch["attention_mask"], single, strict=True):
        assert torch.equal(row[length - len(ids) :], ids)
        assert mask.tolist() == [0] * (length - len(ids)) + [1] * len(ids)
    right = processor(text=texts, padding_side="right")
    assert right["attention_mask"][0, 0] == 1 and right["attention_mask"][0, -1] == 0


def test_text_needs_no_scan_but_a_reference_does(processor):
    assert list(processor(text="Describe the lungs.")) == ["input_ids", "attention_mask"]
    for arguments in ({}, {"reference": make_ct(1), "spacing": SPACING}):
        with pytest.raises(ValueError, match="Give ct="):
            processor(**arguments)


def test_an_instruction_that_the_model_does_not_know_gives_a_warning(processor, monkeypatch):
    warned = []
    monkeypatch.setattr(processing_diffvp.logger, "warning_once", warned.append)
    scans = {"ct": make_ct(1), "reference": make_ct(3), "spacing": SPACING}
    processor(**scans)
    processor(**scans, text=processor.instruction)
    assert not warned
    processor(**scans, text="Which day is it?")
    assert len(warned) == 1 and "Which day is it?" in warned[0] and "writes reports" in warned[0]


def test_instruction_uses_the_chat_template_if_there_is_one(processor):
    assert processor.format_instruction() == f"{DEFAULT_INSTRUCTION}\n"
    assert processor.format_instruction("Be brief.") == "Be brief.\n"
    processor.tokenizer.chat_template = CHAT_TEMPLATE
    assert processor.format_instruction("Be brief.") == "<s><user>Be brief.<assistant>"
    conversation = [{"role": "user", "content": "Be brief."}]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == "<s><user>Be brief.<assistant>"
    ids = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_tensors="pt")
    assert torch.equal(ids, processor(text="Be brief.")["input_ids"])
    ids = processor(text="Be brief.")["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert processor.decode(ids) == "<s><user>Be brief.<assistant>"


# The reference pool


def test_sampled_reference_depends_only_on_seed_and_content(processor, pool, tmp_path):
    processor.load_references(pool)
    scans = [write_ct(tmp_path / f"scan-{seed}.nii.gz", seed) for seed in range(10, 16)]
    together = processor(ct=scans)
    assert together["reference"].shape == together["ct"].shape
    assert len(set(together.reference_ids)) > 1
    assert processor(ct=scans).reference_ids == together.reference_ids
    assert processor(ct=scans[::-1]).reference_ids == together.reference_ids[::-1]
    for k, scan in enumerate(scans):
        alone = processor(ct=scan)
        assert alone.reference_ids == [together.reference_ids[k]]
        assert torch.equal(alone["reference"][0], together["reference"][k])
        assert alone.reference_geometry[0].source == f"{alone.reference_ids[0]}.nii.gz"
    renamed = tmp_path / "renamed.nii.gz"
    scans[0].rename(renamed)
    assert processor(ct=renamed).reference_ids == together.reference_ids[:1]
    assert any(
        processor(ct=scans[1:], reference_seed=seed).reference_ids != together.reference_ids[1:] for seed in (1, 2)
    )
    with pytest.raises(TypeError, match="reference_seed"):
        processor(ct=renamed, reference_seed="1")


def test_scan_is_never_its_own_reference(processor, pool):
    processor.load_references(pool)
    for seed in range(30):
        # The content of normal-2 as a bare array, without its name, format or file.
        assert processor(ct=make_ct(2), spacing=SPACING, reference_seed=seed).reference_ids != ["normal-2"]
    for k in (0, 1, 3, 4):
        (pool / f"normal-{k}.nii.gz").unlink()
    index_references(pool)
    processor.load_references(pool)
    assert processor(ct=make_ct(3), spacing=SPACING).reference_ids == ["normal-2"]
    with pytest.raises(ReferencePoolError, match="only scan in the reference pool"):
        processor(ct=make_ct(2), spacing=SPACING)


def test_missing_and_damaged_pools_are_refused(processor, pool, tmp_path):
    with pytest.raises(ReferencePoolError, match="no reference pool"):
        processor(ct=make_ct(1), spacing=SPACING)
    with pytest.raises(ReferencePoolError, match="has no references.json"):
        processor.load_references(tmp_path)
    processor.load_references(pool)
    for path in pool.glob("*.nii.gz"):
        write_ct(path, 99)
    with pytest.raises(ReferencePoolError, match="normal-.*sha256"):
        processor(ct=make_ct(1), spacing=SPACING)
    for path in pool.glob("*.nii.gz"):
        path.unlink()
    with pytest.raises(ReferencePoolError, match="missing from the pool"):
        processor(ct=make_ct(1), spacing=SPACING)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a list"),
        ('[{"id": "a"}]', "not a list"),
        ("[]", "at least one"),
        ('[{"id": "a", "file": "../a.nii.gz", "sha256": "0"}]', "without folders"),
        (json.dumps([{"id": "a", "file": "a.nii.gz", "sha256": "0"}] * 2), "distinct"),
    ],
)
def test_invalid_pool_index_is_refused(tmp_path, index, message):
    (tmp_path / "references.json").write_text(index)
    with pytest.raises(ReferencePoolError, match=message):
        ReferencePool.load(tmp_path, subfolder="")


# Save and load


def test_loaded_processor_equals_the_saved_one(processor, pool, tmp_path):
    processor.load_references(pool)
    processor.instruction = "Describe the chest."
    processor.image_processor = DiffVPImageProcessor(size=SIZE, target_spacing=(4, 3, 3), hu_window=(-900, 300))
    processor.save_pretrained(tmp_path / "saved")
    loaded = DiffVPProcessor.from_pretrained(tmp_path / "saved")
    assert loaded.to_dict() == processor.to_dict() and loaded.instruction == "Describe the chest."
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_diffvp.DiffVPProcessor"}
    assert saved["image_processor"]["auto_map"]["AutoImageProcessor"] == "processing_diffvp.DiffVPImageProcessor"
    before, after = (one(ct=make_ct(7), spacing=SPACING) for one in (processor, loaded))
    assert after.reference_ids == before.reference_ids
    assert all(torch.equal(before[key], after[key]) for key in before)
    loaded.save_pretrained(tmp_path / "saved")  # over itself
    loaded.save_pretrained(tmp_path / "again")
    names = [sorted(path.name for path in (tmp_path / one / "references").iterdir()) for one in ("saved", "again")]
    assert names[0] == names[1] == sorted(path.name for path in pool.iterdir())
    again = DiffVPProcessor.from_pretrained(tmp_path / "again")
    assert again(ct=make_ct(7), spacing=SPACING).reference_ids == before.reference_ids


@pytest.mark.slow  # the shipped processor is loaded so in each run
def test_auto_processor_works_in_a_process_without_the_package(processor, pool, tmp_path):
    processor.load_references(pool)
    processor.save_pretrained(tmp_path / "saved")
    expected = processor(ct=make_ct(7), spacing=SPACING)
    np.save(tmp_path / "ct.npy", make_ct(7))
    script = textwrap.dedent(
        f"""
        import sys
        import numpy as np, torch
        from transformers import AutoImageProcessor, AutoProcessor

        class Blocked:  # as if the package were not installed
            def find_spec(self, name, *_):
                if name.split(".")[0] == "diffvp":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Blocked())
        processor = AutoProcessor.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
        inputs = processor(ct=np.load("ct.npy"), spacing={SPACING})
        image_processor = AutoImageProcessor.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
        assert torch.equal(image_processor(np.load("ct.npy"), spacing={SPACING})["ct"], inputs["ct"])
        assert "diffvp" not in sys.modules
        torch.save(dict(inputs) | {{"ids": inputs.reference_ids}}, "inputs.pt")
        """
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    inputs = torch.load(tmp_path / "inputs.pt", weights_only=True)
    assert inputs.pop("ids") == expected.reference_ids
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


# Text


def test_diagnosis_prompt_lists_findings_in_label_order():
    assert DiffVPProcessor.diagnosis_prompt([]) == "Predicted findings: none.\n"
    found = ["Lung nodule", "Cardiomegaly"]
    assert DiffVPProcessor.diagnosis_prompt(found) == "Predicted findings: cardiomegaly, lung nodule.\n"
    with pytest.raises(ValueError, match="Unknown finding.*Broken heart"):
        DiffVPProcessor.diagnosis_prompt(["Broken heart"])


@pytest.mark.parametrize(
    "found", [[], ["Emphysema"], ["Cardiomegaly", "Lung nodule", "Interlobular septal thickening"]]
)
def test_diagnosis_prompt_fragments_spell_the_prompt(tokenizer, found):
    fragments = DiffVPProcessor.diagnosis_prompt_ids(tokenizer)
    assert set(fragments) == {"prefix", "labels", "separator", "none", "suffix"}
    assert len(fragments["labels"]) == len(DIAGNOSIS_LABELS)
    ids = list(fragments["prefix"]) + ([] if found else fragments["none"])
    for position, label in enumerate(found):
        ids += (fragments["separator"] if position else []) + fragments["labels"][DIAGNOSIS_LABELS.index(label)]
    assert tokenizer.decode(ids + fragments["suffix"]) == DiffVPProcessor.diagnosis_prompt(found)


def test_encoded_report_ends_with_eos_and_respects_max_length(processor):
    report = "Heart: of normal size.\nLung: clear."
    ids = processor.encode_report(report)
    assert ids[-1] == processor.tokenizer.eos_token_id and ids.count(processor.tokenizer.bos_token_id) == 0
    assert processor.batch_decode([ids], skip_special_tokens=True) == [report]
    assert processor.encode_report(report, max_length=len(ids)) == ids
    with pytest.raises(ValueError, match=f"{len(ids)} tokens.*max_length is {len(ids) - 1}"):
        processor.encode_report(report, max_length=len(ids) - 1)
    cut = processor.encode_report(report, max_length=5, truncation=True)
    assert cut == ids[:4] + [processor.tokenizer.eos_token_id]


def test_post_process_inverts_the_report_format():
    regions = {region: f"The {region} is normal. Nothing else." for region in REGIONS}
    report = "\n".join(f"{region.capitalize()}: {text}" for region, text in regions.items())
    assert DiffVPProcessor.post_process(report) == regions
    assert DiffVPProcessor.post_process(report.replace("\n", " ")) == regions
    shuffled = "\n".join(reversed(report.split("\n")))
    assert list(DiffVPProcessor.post_process(shuffled)) == list(REGIONS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("Nothing to split.", {"other": "Nothing to split."}),
        ("Preamble.\nLung: clear.", {"lung": "clear.", "other": "Preamble."}),
        ("Lung: clear.\nHeart: big.\nLung: a nodule.", {"heart": "big.", "lung": "clear. a nodule."}),
        ("lung : clear.\nHEART: big.", {"heart": "big.", "lung": "clear."}),
        ("Heart: see the lung: clear.", {"heart": "see the lung: clear."}),
        ("Lung: clear.\nImpression: normal.", {"lung": "clear.", "other": "Impression: normal."}),
        ("Bone:\nLung: clear.", {"lung": "clear."}),
        ("Trachea and bronchie: open.", {"trachea and bronchie": "open."}),
        ("Lung: a nodule\nof 5 mm.", {"lung": "a nodule of 5 mm."}),
        ("Lungs: clear. Heart: big.", {"heart": "big.", "lung": "clear."}),
        ("LUNGS: clear. HEART: big. IMPRESSION: x.", {"heart": "big.", "lung": "clear.", "other": "IMPRESSION: x."}),
        ("Bones: intact.\nTrachea and bronchi: open.", {"bone": "intact.", "trachea and bronchie": "open."}),
        ("Oesophagus: normal.\nlungs : clear.", {"esophagus": "normal.", "lung": "clear."}),
        ("Lung: clear. Impression: normal.", {"lung": "clear.", "other": "Impression: normal."}),
        ("Findings:\nLung: clear.", {"lung": "clear.", "other": "Findings:"}),
        ("Lung: no findings: clear.", {"lung": "no findings: clear."}),
    ],
)
def test_post_process_splits_reports_into_regions(text, expected):
    assert DiffVPProcessor.post_process(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Nothing to split.", {"other": "Nothing to split."}),
        ("Findings: The heart is big.", {"findings": "The heart is big."}),
        ("FINDINGS:\nLungs: clear.\nIMPRESSION:\n1. Normal.", {"lung": "clear.", "impression": "1. Normal."}),
        ("Lung: clear. Impression: Lung: see above.", {"lung": "clear.", "impression": "Lung: see above."}),
        ("Impression: normal.\nFindings:\nLung: clear.", {"lung": "clear.", "impression": "normal."}),
        ("Technique: CT.\nFindings: Open.\nConclusion: x.",
         {"findings": "Open.", "impression": "x.", "other": "Technique: CT."}),
        ("Impression: one.\nImpressions: two.", {"impression": "one. two."}),
    ],
)  # fmt: skip
def test_post_process_splits_sections(text, expected):
    assert DiffVPProcessor.post_process(text, sections=True) == expected


def test_stream_keeps_order_and_continues_after_a_bad_scan(tmp_path):
    scans = []
    for seed in range(7):
        path = tmp_path / f"{seed}.nii.gz"
        nib.save(nib.Nifti1Image(make_ct(seed), np.diag([-2.0, -2.0, 3.0, 1.0])), path)
        scans.append(path)
    scans.insert(3, tmp_path / "missing.nii.gz")
    processor = DiffVPImageProcessor(size=SIZE)
    for workers in (1, 3):
        results = list(processor.stream(iter(scans), workers=workers))
        assert isinstance(results.pop(3), CTInputError)
        for path, features in zip([one for one in scans if one.exists()], results, strict=True):
            assert torch.equal(features["ct"], processor(path)["ct"])
            assert features["geometry"][0].source == path.name


def test_stream_reads_only_a_few_scans_ahead(tmp_path):
    begun = []

    def scans():
        for seed in range(50):
            begun.append(seed)
            yield read_ct(make_ct(seed), SPACING)

    stream = DiffVPImageProcessor(size=SIZE).stream(scans(), workers=2)
    next(stream), next(stream)
    assert len(begun) <= 5
    stream.close()
    assert len(begun) <= 5
    with pytest.raises(ValueError, match="workers"):
        next(DiffVPImageProcessor().stream([], workers=0))


def test_digest_is_computed_only_on_request():
    scan = read_ct(make_ct(0), SPACING)
    processor = DiffVPImageProcessor(size=SIZE)
    assert processor(scan)["geometry"][0].sha256 is None
    assert processor(scan, digest=True)["geometry"][0].sha256 == scan.sha256


def test_grey_value_window_is_not_applied_to_the_reference(processor, pool):
    """Combine an 8-bit scan with a reference in Hounsfield units, from the pool and given."""
    processor.load_references(pool)
    grey = ((np.clip(make_ct(7).astype(np.float32), -1000, 200) + 1000) / 1200 * 255).round().astype(np.uint8)
    options = {"allow_non_hu": True, "hu_window": (0.0, 255.0), "foreground_hu": 10.0}
    expected = processor(ct=make_ct(7), spacing=SPACING)
    inputs = processor(ct=read_ct(grey, SPACING, allow_non_hu=True), **options)
    assert (inputs["ct"] - expected["ct"]).abs().max() < 0.01
    pooled = {
        place.sha256: processor.image_processor(processor.reference_pool.fetch(entry))["ct"][0]
        for entry in processor.reference_pool.entries
        for place in processor.image_processor(processor.reference_pool.fetch(entry), digest=True)["geometry"]
    }
    assert torch.equal(inputs["reference"][0], pooled[inputs.reference_geometry[0].sha256])
    normal = read_ct(make_ct(8), SPACING)
    given = processor(ct=read_ct(grey, SPACING, allow_non_hu=True), reference=normal, **options)
    assert torch.equal(given["reference"], processor.image_processor(normal)["ct"])
    with pytest.raises(CTInputError, match="not in Hounsfield units"):
        processor.image_processor(read_ct(grey, SPACING, allow_non_hu=True))
