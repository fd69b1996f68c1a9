# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The pipeline `ct-report-generation` returns what processor and model return, at any batch size."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, pipeline
from transformers.generation.streamers import BaseStreamer

from diffvp import pipeline_diffvp
from diffvp.inference import report as reporting
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.pipeline_diffvp import DiffVPPipeline
from diffvp.processing_diffvp import DiffVPProcessor
from diffvp.volume_diffvp import CTInputError

from .ct_samples import SPACING
from .hub_samples import make_chest, make_pushable, write_scan


@pytest.fixture(scope="module")
def checkpoint(tiny_base_with_tokenizer, tiny_fields, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    base = tiny_base_with_tokenizer
    return make_pushable(folder, base, tiny_fields, tokenizer, str(base), None)


@pytest.fixture(scope="module")
def pipe(checkpoint):
    """Build the pipeline as a user does, from the code in the checkpoint."""
    pipe = pipeline("ct-report-generation", model=str(checkpoint), trust_remote_code=True, device="cpu")
    assert type(pipe).__module__.startswith("transformers_modules.")
    return pipe


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("scans")
    return [str(write_scan(folder / f"scan_{seed}.nii.gz", seed)) for seed in (11, 12, 13)]


@pytest.fixture(scope="module")
def parts(checkpoint):
    """Return model and processor without a pipeline."""
    return DiffVPForConditionalGeneration.from_pretrained(checkpoint), DiffVPProcessor.from_pretrained(checkpoint)


def assert_equal(found: dict, expected: dict) -> None:
    exact = ("report", "regions", "complete", "reference", "statement", "intended_domain")
    assert {key: found[key] for key in exact} == {key: expected[key] for key in exact}
    assert [one["probability"] for one in found["findings"]] == pytest.approx(
        [one["probability"] for one in expected["findings"]], abs=2e-4
    )
    torch.testing.assert_close(found["difference_map"], expected["difference_map"], atol=1e-5, rtol=1e-4)
    assert found["geometry"].sha256 == expected["geometry"].sha256


def test_findings_have_places_and_sizes_at_any_batch_size(
    scans, tiny_base_with_tokenizer, tiny_fields, tokenizer, tmp_path
):
    """Use a model with fine tokens and an aligned difference, saved and loaded from its own code."""
    fine = {"encoder_pyramid_channels": 6, "share_encoder": True, "difference_level": "aligned"}
    fine |= {"finding_regions": ["right lung", "left lung"]}
    fine |= {"finding_attributes": {"Lung nodule": {"place": "region", "size": True}, "Emphysema": {"place": "side"}}}
    places = [*fine["finding_regions"], "right", "left"]
    fine |= {"diagnosis_prompt_ids": DiffVPProcessor.diagnosis_prompt_ids(tokenizer, places=places)}
    base = tiny_base_with_tokenizer
    folder = make_pushable(tmp_path / "fine", base, {**tiny_fields, **fine}, tokenizer, str(base), None)
    pipe = pipeline("ct-report-generation", model=str(folder), trust_remote_code=True, device="cpu")
    alone = [pipe(scan) for scan in scans]
    for found, expected in zip(pipe(list(scans), batch_size=2), alone, strict=True):
        assert_equal(found, expected)
        findings = {one["label"]: one for one in found["findings"]}
        assert {one["label"]: one for one in expected["findings"]}["Lung nodule"]["peak"] == (
            findings["Lung nodule"]["peak"]
        )
        assert findings["Lung nodule"]["location"] in fine["finding_regions"]
        assert findings["Lung nodule"]["size_mm"] > 0 and findings["Emphysema"]["size_mm"] is None
        assert set(findings["Emphysema"]["location"].split(" and ")) <= {"right", "left"}
        assert findings["Cardiomegaly"]["location"] is None and len(findings["Cardiomegaly"]["peak"]) == 3


def test_result_for_one_scan_matches_processor_and_model(pipe, parts, scans, tmp_path):
    model, processor = parts
    inputs = processor(ct=scans[0])
    tokens = model.generate(**inputs)[0]
    found = pipe(scans[0])
    assert found["report"] == processor.decode(tokens, skip_special_tokens=True).strip() != ""
    assert found["regions"] == processor.post_process(found["report"])
    assert found["reference"] == inputs.reference_ids[0] in ("normal_1", "normal_2")
    assert found["complete"] == (int(tokens[-1]) == processor.tokenizer.eos_token_id)
    probabilities = model.diagnose(inputs["ct"])[0].sigmoid()
    assert len(found["findings"]) == 18
    for one, label, probability in zip(found["findings"], model.config.diagnosis_labels, probabilities, strict=True):
        assert one["label"] == label and one["probability"] == pytest.approx(float(probability), abs=1e-4)
        assert one["threshold"] == 0.5 and one["positive"] == bool(probability >= 0.5)
    expected = model.difference_map(inputs["ct"], inputs["reference"])[0]
    torch.testing.assert_close(found["difference_map"], expected)
    pipe.processor.save_map(tmp_path / "map.nii.gz", found["difference_map"], found["geometry"])
    assert nib.load(tmp_path / "map.nii.gz").shape == nib.load(scans[0]).shape
    assert found["statement"] == reporting.RESEARCH_USE and found["intended_domain"] == "boxes of noise"


def test_result_has_the_form_of_a_written_report(pipe, checkpoint, scans, tmp_path):
    """report.json and the pipeline share their fields; the code in a checkpoint does not compute the consistency."""
    document = reporting.write_report(*reporting.load_checkpoint(checkpoint), scans[0], tmp_path / "report").document
    found = pipe(scans[0])
    own = {"reference", "difference_map", "geometry"}
    assert found.keys() - own == document.keys() - {"provenance"}
    assert found.pop("consistency") is None and document["coverage"]["lung_volume_ml"] > 0
    same = [name for name in found if name not in own]
    assert {name: found[name] for name in same} == {name: document[name] for name in same}


def test_warnings_travel_with_the_report(pipe, scans):
    cut = pipe(scans[0], max_new_tokens=2)
    assert not cut["complete"] and "The report is cut off after 2 tokens." in cut["warnings"]
    batch = pipe(list(scans), batch_size=2)
    assert [one["warnings"] for one in batch] == [pipe(scan)["warnings"] for scan in scans]


def test_batch_results_equal_single_results(pipe, scans):
    single = [pipe(scan) for scan in scans]
    assert not torch.allclose(single[0]["difference_map"], single[1]["difference_map"]), (
        "equal maps would hide a wrong order"
    )
    batched = pipe(scans, batch_size=2)
    streamed = list(pipe((scan for scan in scans), batch_size=2))
    for results in (batched, streamed, pipe(tuple(scans))):
        for found, expected in zip(results, single, strict=True):
            assert_equal(found, expected)


def test_given_references_are_used(pipe, scans):
    first, second = (pipe(scans[0], reference=reference) for reference in scans[1:])
    assert not torch.allclose(first["difference_map"], second["difference_map"])
    paired = pipe([scans[0], scans[0]], reference=scans[1:], batch_size=2)
    rows = pipe([{"ct": scans[0], "reference": scans[1]}, {"ct": scans[0], "reference": scans[2]}])
    shared = pipe([scans[0]], reference=scans[1])
    for found, expected in ((paired[0], first), (paired[1], second), (rows[1], second), (shared[0], first)):
        assert_equal(found, expected)
    assert first["reference"] == "given by the user", "a file name may be a patient's name"
    assert torch.count_nonzero(pipe(scans[0], reference=scans[0])["difference_map"]) == 0


@pytest.mark.parametrize("ct, number", [("one", 1), (["one", "two", "three"], 3)])
def test_wrong_number_of_references_is_refused(pipe, ct, number):
    with pytest.raises(ValueError, match=f"reference: 2 for {number} scan"):
        pipe(ct, reference=["a", "b"])


def test_columns_series_and_iterators_work_as_lists(pipe, scans):
    """Check columns of scans and of references: each scan keeps its own reference."""
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    rows = datasets.Dataset.from_dict({"ct": scans, "reference": scans[::-1]})
    decoded = rows.cast_column("ct", datasets.Nifti())
    expected = pipe(scans, reference=scans[::-1], max_new_tokens=8)
    series = pandas.Series(scans), pandas.Series(scans[::-1], index=[3, 1, 2])
    generators = (scan for scan in scans), iter(scans[::-1])
    columns = (rows["ct"], rows["reference"]), (decoded["ct"], rows["reference"]), series, generators
    for ct, reference in columns:
        for found, one in zip(pipe(ct, reference=reference, max_new_tokens=8), expected, strict=True):
            assert_equal(found, one)
    for ct in (rows["ct"], pandas.Series(scans), tuple(scans), decoded.with_format("numpy")[:]["ct"]):
        found = pipe(ct, reference=scans[0], max_new_tokens=8)
        assert [one["geometry"].sha256 for one in found] == [one["geometry"].sha256 for one in expected]
    with pytest.raises(ValueError, match="reference: 2 for 3 scan"):
        pipe(rows["ct"], reference=pandas.Series(scans[:2]))


def test_seed_selects_the_reference(pipe, scans):
    drawn = {seed: pipe(scans[0], reference_seed=seed, max_new_tokens=1)["reference"] for seed in range(6)}
    assert set(drawn.values()) == {"normal_1", "normal_2"}
    assert pipe(scans[0], max_new_tokens=1)["reference"] == drawn[0]


def test_array_gives_the_report_of_the_file_and_needs_a_spacing(parts, scans):
    pipe = DiffVPPipeline(model=parts[0], processor=parts[1], device="cpu")
    found = pipe(make_chest(11), reference=scans[1], spacing=SPACING)
    assert found["report"] == pipe(scans[0], reference=scans[1])["report"]
    with pytest.raises(CTInputError, match="spacing"):
        pipe(make_chest(11))


def test_scan_without_lungs_is_refused_unless_allowed(pipe, scans, tmp_path):
    array = np.full((24, 24, 20), -1000, np.int16)
    array[4:-4, 4:-4, 2:-2] = np.random.default_rng(0).integers(0, 100, (16, 16, 16))
    nib.save(nib.Nifti1Image(array, np.diag([-9.0, -9.0, 9.0, 1.0])), tmp_path / "knee.nii.gz")
    knee = str(tmp_path / "knee.nii.gz")
    for call in (lambda: pipe(knee), lambda: pipe([scans[0], knee]), lambda: pipe(scans[0], reference=knee)):
        with pytest.raises(ValueError, match="lungs") as caught:
            call()
        assert type(caught.value).__name__ == "CTAnatomyError"
    assert pipe(knee, allow_any_anatomy=True)["geometry"].coverage["lung_volume_ml"] == 0
    assert pipe(scans[0])["geometry"].coverage["lung_extent_mm"] > 0


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamers_receive_the_tokens_of_the_report(pipe, scans):
    recorder, text = Recorder(), TextIteratorStreamer(pipe.tokenizer, skip_special_tokens=True)
    found = pipe(scans[0], streamer=recorder)
    assert recorder.ended and len(recorder.tokens) == 9
    assert pipe.tokenizer.decode(recorder.tokens, skip_special_tokens=True).strip() == found["report"]
    pipe(scans[0], streamer=text)
    assert "".join(text).strip() == found["report"]


def test_length_limit_comes_from_the_call_the_pipeline_or_the_default(scans, parts, monkeypatch):
    model, processor = parts
    recorders = {length: Recorder() for length in (3, 4, 30)}
    pipe = DiffVPPipeline(model=model, processor=processor, device="cpu", max_new_tokens=3)
    assert not pipe(scans[0], streamer=recorders[3])["complete"]
    pipe(scans[0], max_new_tokens=4, streamer=recorders[4])
    assert pipe(scans[0], generate_kwargs={"num_beams": 2})["report"]
    monkeypatch.setattr(model.generation_config, "max_new_tokens", None)
    monkeypatch.setattr(pipeline_diffvp, "MAX_NEW_TOKENS", 30)  # the default of transformers would be 20
    pipe = DiffVPPipeline(model=model, processor=processor, device="cpu")
    pipe(scans[0], streamer=recorders[30], generate_kwargs={"min_new_tokens": 30})
    assert [len(recorder.tokens) for recorder in recorders.values()] == list(recorders)


@pytest.mark.parametrize("own", [{"max_new_tokens": 7}, {"max_length": 5}, {}])
def test_default_length_replaces_no_stated_limit(pipe, scans, monkeypatch, own):
    """Without an end token, a report has as many tokens as the limit in force."""
    monkeypatch.setattr(pipe.model, "generation_config", GenerationConfig(pad_token_id=0, **own))
    monkeypatch.setattr(sys.modules[type(pipe).__module__], "MAX_NEW_TOKENS", 10)
    for given, length in (
        ({}, next(iter(own.values()), 10)),
        ({"max_length": 3}, 3),
        ({"max_new_tokens": 4}, 4),
        ({"generation_config": GenerationConfig(max_length=3)}, 3),
        ({"generation_config": GenerationConfig(max_new_tokens=4)}, 4),
        ({"generation_config": GenerationConfig(max_new_tokens=4), "max_length": 3}, 3),
        ({"generation_config": GenerationConfig(num_beams=2)}, 10),  # it replaces the model's
    ):
        found = pipe(scans[0], generate_kwargs=given)
        assert f"The report is cut off after {length} tokens." in found["warnings"]


def test_each_scan_gets_its_own_sequences(pipe, scans, monkeypatch):
    """With two sequences for each of two scans, rows 0 and 1 of `generate` belong to the first scan."""
    rows, generate = [], pipe.model.generate
    monkeypatch.setattr(pipe.model, "generate", lambda **given: rows.append(generate(**given)) or rows[-1])
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 5.0, "num_return_sequences": 2}
    found = pipe(scans[:2], batch_size=2, max_new_tokens=12, generate_kwargs=options)
    texts = [pipe.processor.decode(row, skip_special_tokens=True).strip() for row in rows[0]]
    assert [[one["report"] for one in of_scan] for of_scan in found] == [texts[:2], texts[2:]]
    assert len(set(texts)) == 4, "equal texts would hide mixed-up scans"
    assert all(torch.equal(of_scan[0]["difference_map"], of_scan[1]["difference_map"]) for of_scan in found)


def test_empty_input_gives_no_reports(pipe):
    assert pipe([]) == [] == pipe(())


def test_return_dict_in_generate_is_refused_before_reading(pipe):
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        pipe("nowhere.nii.gz", generate_kwargs={"return_dict_in_generate": True})


@pytest.mark.parametrize("ends", [None, [1, 3]])
def test_report_is_complete_only_if_it_has_an_end_token(pipe, scans, monkeypatch, ends):
    monkeypatch.setattr(pipe.model.generation_config, "eos_token_id", ends)
    rows, generate = [], pipe.model.generate
    monkeypatch.setattr(pipe.model, "generate", lambda **given: rows.append(generate(**given)) or rows[-1])
    complete = pipe(scans[0], max_new_tokens=4)["complete"]
    assert complete == any(token in (ends or []) for token in rows[0][0].tolist())


@pytest.mark.parametrize("as_config", [False, True])
def test_report_is_complete_at_an_end_token_of_the_call(pipe, parts, scans, as_config):
    inputs = parts[1](ct=scans[0])
    tokens = parts[0].generate(**inputs, max_new_tokens=6)[0].tolist()
    unused = next(token for token in range(10, 400) if token not in tokens)
    for end in (tokens[2], unused):
        ending = {"eos_token_id": end}
        options = {"generation_config": GenerationConfig(**ending, max_new_tokens=12)} if as_config else ending
        found = pipe(scans[0], generate_kwargs=options, **({} if as_config else {"max_new_tokens": 12}))
        [expected] = parts[0].generate(**inputs, max_new_tokens=12, **ending).tolist()
        assert found["report"] == pipe.processor.decode(expected, skip_special_tokens=True).strip()
        assert found["complete"] == (end in expected) == (len(expected) < 12)
        batch = pipe(scans[:2], batch_size=2, generate_kwargs=options, **({} if as_config else {"max_new_tokens": 12}))
        assert_equal(batch[0], found)


@pytest.mark.parametrize("of_call", [False, True])
def test_config_with_return_dict_gives_the_same_reports(pipe, scans, monkeypatch, of_call):
    expected = pipe(scans[:2], max_new_tokens=6)
    options = {}
    if of_call:
        options = {"generate_kwargs": {"generation_config": GenerationConfig(return_dict_in_generate=True)}}
    else:
        monkeypatch.setattr(pipe.model.generation_config, "return_dict_in_generate", True)
    for found, one in zip(pipe(scans[:2], batch_size=2, max_new_tokens=6, **options), expected, strict=True):
        assert_equal(found, one)


@pytest.mark.parametrize("changes", [{"use_diagnosis": False}, {"difference_level": "pixel"}])
def test_model_variants_run_in_the_pipeline(changes, parts, tiny_fields, tiny_base_with_tokenizer, scans):
    trained, processor = parts
    fields = {key: getattr(trained.config, key) for key in ("diagnosis_prompt_ids", "instruction_ids")}
    torch.manual_seed(0)
    config = {**tiny_fields, **fields, **changes}
    model = DiffVPForConditionalGeneration.from_base(str(tiny_base_with_tokenizer), config=config)
    found = DiffVPPipeline(model=model, processor=processor, device="cpu", max_new_tokens=5)(scans[:2], batch_size=2)
    inputs = processor(ct=scans[:2])
    tokens = model.generate(**inputs, max_new_tokens=5)
    assert [one["report"] for one in found] == [
        text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)
    ]
    assert [len(one["findings"]) for one in found] == [0 if model.diagnosis is None else 18] * 2


def test_saved_pipeline_is_a_complete_checkpoint(checkpoint, parts, tmp_path):
    model, processor = parts
    DiffVPPipeline(model=model, processor=processor, device="cpu").save_pretrained(tmp_path / "saved")
    found, expected = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "saved", checkpoint)
    )
    assert expected - found == {"README.md", "evaluation.json", "LICENSE", "NOTICE"} and found < expected
    tasks = json.loads((tmp_path / "saved/config.json").read_text())["custom_pipelines"]
    assert tasks == {"ct-report-generation": {"impl": "pipeline_diffvp.DiffVPPipeline", "pt": ["AutoModel"]}}
