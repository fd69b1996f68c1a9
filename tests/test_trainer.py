# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""`transformers.Trainer` with the model: saving, resuming, accumulation, several processes, and the collator."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import nibabel as nib
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import GenerationConfig, Trainer, TrainerCallback, TrainingArguments

from diffvp.cli import SHIPPED_CHECKPOINT
from diffvp.collator_diffvp import DiffVPDataCollator, DiffVPDataset
from diffvp.data.phantom import render_patient, sample_patient
from diffvp.data.phantom_report import region_sentences, report_text
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration, DiffVPForDiagnosis
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from diffvp.storage_diffvp import DiffVPCheckpointError

from .ct_samples import lps_affine, make_ct
from .hub_server import Hub
from .processes import in_two_processes

SAME = 1e-5


class Cases(torch.utils.data.Dataset):
    """Eight scans of noise with reports of different lengths, as token ids."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {
            "ct": torch.rand(1, 32, 32, 32, generator=generator),
            "reference": torch.rand(1, 32, 32, 32, generator=generator),
            "report": [*torch.randint(45, 95, (4 + index % 5,), generator=generator).tolist(), 2],
            "diagnosis_labels": (torch.rand(18, generator=generator) > 0.5).float(),
        }


def collate(cases: list[dict]) -> dict[str, torch.Tensor]:
    rows = [[1, 40, 41, *case["report"]] for case in cases]
    length = max(map(len, rows))
    return {
        **{key: torch.stack([case[key] for case in cases]) for key in ("ct", "reference", "diagnosis_labels")},
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "labels": torch.tensor([[-100] * 3 + row[3:] + [-100] * (length - len(row)) for row in rows]),
    }


def make_trainer(model, folder, callbacks=None, **options) -> Trainer:
    arguments = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "num_train_epochs": 2,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "epoch", "eval_strategy": "no",
        "report_to": [], "remove_unused_columns": False, "use_cpu": True, "seed": 0, "logging_strategy": "no",
        "disable_tqdm": True, **options,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **arguments)
    return Trainer(model, arguments, collate, Cases(), Cases(), callbacks=callbacks)


@pytest.fixture
def model(make_model):
    return make_model(lora=True)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    batch = collate([Cases()[index] for index in range(2)])
    return model.eval()(**{key: batch[key] for key in ("ct", "reference", "input_ids")}).logits


def difference(first, second) -> float:
    first, second = (one if isinstance(one, torch.Tensor) else logits(one) for one in (first, second))
    return float((first - second).abs().max())


# Resuming, and the best model


def test_checkpoint_of_each_epoch_is_complete_and_resumes(model, make_model, tmp_path):
    before = logits(model)
    make_trainer(model, tmp_path / "whole").train()
    assert difference(model, before) > 0.1
    folder = tmp_path / "whole/checkpoint-4"
    assert difference(DiffVPForConditionalGeneration.from_pretrained(folder), model) < SAME
    resumed = make_model(lora=True)
    make_trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert difference(resumed, model) < SAME


def test_best_model_comes_from_one_epoch(model, tmp_path):
    """Count the highest loss as best: here that of the first epoch."""
    epochs = []

    class Remember(TrainerCallback):
        def on_epoch_end(self, arguments, state, control, model, **kwargs):
            epochs.append(logits(model))

    make_trainer(
        model, tmp_path, [Remember()], eval_strategy="epoch", load_best_model_at_end=True, greater_is_better=True
    ).train()
    assert difference(model, epochs[0]) < SAME < 0.1 < difference(*epochs)


def test_weights_without_their_adapter_do_not_resume(model, make_model, tmp_path):
    """Put weights from `save_pretrained`, which leaves out the adapter, into a checkpoint of Trainer's."""
    make_trainer(model, tmp_path / "run", num_train_epochs=1).train()
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "stripped")
    model.save_pretrained(tmp_path / "final")
    assert not [key for key in load_file(tmp_path / "final/model.safetensors") if "lora" in key]
    shutil.copy(tmp_path / "final/model.safetensors", tmp_path / "stripped/model.safetensors")
    other = make_model(lora=True)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(DiffVPCheckpointError, match="without its adapter"):
        make_trainer(other, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "stripped"))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_checkpoint_mixed_from_two_steps_is_refused(model, tmp_path):
    make_trainer(model, tmp_path).train()
    first, last = (tmp_path / f"checkpoint-{step}" for step in (2, 4))
    shutil.copytree(last / "adapter", first / "adapter", dirs_exist_ok=True)
    with pytest.raises(DiffVPCheckpointError):
        DiffVPForConditionalGeneration.from_pretrained(first)


def test_partial_state_dict_still_loads(model):
    part = {"visual_projection.bias": torch.ones_like(model.visual_projection.bias)}
    result = model.load_state_dict(part, strict=False)
    assert model.visual_projection.bias.eq(1).all() and "resampler.queries" in result.missing_keys


def test_adapter_of_another_name_loads_and_resumes(make_model, tmp_path):
    def make():
        model = make_model()
        torch.manual_seed(0)
        model.language_model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]), "report")
        return model

    model, resumed = make(), make()
    make_trainer(model, tmp_path / "whole").train()
    first, last = (tmp_path / f"whole/checkpoint-{step}" for step in (2, 4))
    assert difference(DiffVPForConditionalGeneration.from_pretrained(last), model) < SAME
    make_trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(first))
    assert difference(resumed, model) < SAME
    shutil.copytree(last / "adapter", first / "adapter", dirs_exist_ok=True)
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps({**config, "file_digests": None}))
    with pytest.raises(DiffVPCheckpointError, match="different steps"):
        DiffVPForConditionalGeneration.from_pretrained(first)


# The loss


def step_gradients(model, folder, batch: int, steps: int) -> dict[str, torch.Tensor]:
    """Return the gradients of one optimizer step over all eight cases."""
    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, arguments, state, control, model, **kwargs):
            trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
            found.update({name.removeprefix("module."): one.grad.clone() for name, one in trained.items()})

    make_trainer(
        model, folder, [Keep()], per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1,
        max_grad_norm=0.0, learning_rate=0.0, save_strategy="no",
    ).train()  # fmt: skip
    return found


def assert_same_gradients(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and "classification_head.weight" in one
    for name, value in one.items():
        # Sums over tokens cancel, so the error is relative to the largest gradient.
        atol = 1e-5 * max(float(value.abs().max()), 0.1)
        torch.testing.assert_close(other[name], value, atol=atol, rtol=1e-4, msg=name)


def test_gradients_of_a_step_do_not_depend_on_accumulation(model, tmp_path):
    at_once = step_gradients(model, tmp_path, 8, 1)
    assert_same_gradients(at_once, step_gradients(model, tmp_path, 2, 4))
    # They also equal the gradients of eq. 11 over all cases, each weighted by its number of tokens.
    model.zero_grad()
    cases = [Cases()[index] for index in range(8)]
    tokens = sum(len(case["report"]) for case in cases)
    for case in cases:
        (model(**collate([case])).loss * len(case["report"]) / tokens).backward()
    assert_same_gradients(at_once, {name: one.grad for name, one in model.named_parameters() if one.requires_grad})


def train_in_two_processes(model, folder) -> None:
    found = step_gradients(model, folder / "run", 4, 1)
    save_file(found, folder / f"gradients-{torch.distributed.get_rank()}.safetensors")


def test_gradients_of_a_step_are_the_same_in_two_processes(make_model, tmp_path):
    at_once = step_gradients(make_model(lora=True), tmp_path / "one", 8, 1)
    in_two_processes(train_in_two_processes, make_model(lora=True), tmp_path)
    for rank in (0, 1):
        assert_same_gradients(at_once, load_file(tmp_path / f"gradients-{rank}.safetensors"))


def test_gradients_of_the_classifier_do_not_depend_on_accumulation(tiny_config, tmp_path):
    """Use the same case eight times, because BatchNorm depends on the other cases of a batch."""
    found = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, arguments, state, control, model, **kwargs):
            found.append({name: one.grad.clone() for name, one in model.named_parameters()})

    def collate_labels(cases):
        return {"ct": torch.stack([one["ct"] for one in cases]), "labels": torch.zeros(len(cases), 18)}

    for batch, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1,
            max_grad_norm=0.0, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        model = DiffVPForDiagnosis(tiny_config)
        result = Trainer(model, arguments, collate_labels, [Cases()[0]] * 8, callbacks=[Keep()]).train()
        found[-1]["loss"] = torch.tensor(result.training_loss)
    at_once, in_steps = found
    assert at_once["classifier.head.bias"].abs().max() > 0.01
    for name, value in at_once.items():
        atol = 1e-4 * max(float(value.abs().max()), 0.1)
        torch.testing.assert_close(in_steps[name], value, atol=atol, rtol=1e-4, msg=name)


@pytest.mark.parametrize("missing", ["labels", "diagnosis_labels"])
@pytest.mark.parametrize("fields", [{}, {"difference_level": "none"}, {"use_global_delta": False}])
def test_every_trained_parameter_has_a_gradient_without_labels(make_model, fields, missing):
    model = make_model(lora=True, **fields).train()
    batch = collate([Cases()[0], Cases()[1]])
    del batch[missing]
    result = model(**batch)
    result.loss.backward()
    assert [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None] == []
    if missing == "labels":
        assert result.loss == model.config.classification_loss_weight * result.classification_loss
        assert not model.visual_projection.weight.grad.any() and model.classification_head.weight.grad.any()
    else:
        assert result.loss == result.generation_loss and result.past_key_values is None
        assert not model.classification_head.weight.grad.any()


@pytest.mark.parametrize("option", [{"label_smoothing_factor": 0.1}, {}])
def test_loss_that_trainer_computes_itself_is_refused(model, tmp_path, option):
    trainer = make_trainer(model, tmp_path, save_strategy="no", **option)
    if not option:
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()
    before = logits(model)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer.train()
    assert difference(model, before) == 0


def test_predictions_are_the_logits(model, tmp_path):
    def compute_metrics(prediction):
        kept = prediction.label_ids[0][:, 1:] != -100
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[0][:, 1:]
        return {"accuracy": right[kept].mean()}

    trainer = make_trainer(model, tmp_path, save_strategy="no", per_device_eval_batch_size=3)
    trainer.compute_metrics = compute_metrics
    metrics = trainer.evaluate()
    batch = collate([Cases()[index] for index in range(8)])
    with torch.no_grad():
        result = model.eval()(**batch)
    labels = batch["labels"][:, 1:]
    right = result.logits[:, :-1].argmax(-1) == labels
    assert metrics["eval_accuracy"] == pytest.approx(float(right[labels != -100].float().mean()))
    del batch["labels"], batch["diagnosis_labels"]
    assert trainer.predict(Cases()).predictions.shape == tuple(result.logits.shape)


def test_invalid_generation_config_is_refused_before_the_first_step(model, tmp_path):
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.5)
    with pytest.raises(ValueError, match="temperature"):
        make_trainer(model, tmp_path).train()
    assert not list(tmp_path.glob("checkpoint-*"))


# The collator


@pytest.fixture
def processor(tokenizer):
    return DiffVPProcessor(DiffVPImageProcessor(size=(32, 32, 32)), tokenizer)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> dict[str, str]:
    """Write four scans; return their paths by file name, which is their id."""
    folder = tmp_path_factory.mktemp("scans")
    for seed in range(4):
        nib.save(nib.Nifti1Image(make_ct(seed=seed), lps_affine()), folder / f"scan_{seed}.nii.gz")
    return {path.name: str(path) for path in sorted(folder.iterdir())}


def test_collator_pads_inputs_and_masks_labels(processor, scans):
    first, second, *_ = scans.values()
    reports = ["Lung: clear.", "Heart: of normal size. Lung: clear."]
    cases = [
        {"ct": first, "reference": second, "report": reports[0], "split": "train", "diagnosis_labels": [0, 1] * 9},
        {"ct": second, "reference": first, "report": reports[1], "text": "Be brief.", "diagnosis_labels": [1, 0] * 9},
    ]
    batch = DiffVPDataCollator(processor)(cases)
    assert set(batch) == {"ct", "reference", "input_ids", "attention_mask", "labels", "diagnosis_labels"}
    assert torch.equal(batch["ct"], processor.image_processor([first, second])["ct"])
    assert torch.equal(batch["reference"], batch["ct"].flip(0))
    assert batch["diagnosis_labels"].tolist() == [[0, 1] * 9, [1, 0] * 9]
    assert batch["input_ids"].shape == batch["labels"].shape and batch["input_ids"].shape[1] % 16 == 0
    for row, (text, report) in enumerate(zip([None, "Be brief."], reports, strict=True)):
        prompt = processor(text=processor.instruction if text is None else text)["input_ids"][0].tolist()
        expected = prompt + processor.encode_report(report)
        length = int(batch["attention_mask"][row].sum())
        assert batch["attention_mask"][row, :length].all() and not batch["attention_mask"][row, length:].any()
        assert batch["input_ids"][row, :length].tolist() == expected
        kept = batch["labels"][row] != -100
        assert batch["labels"][row][kept].tolist() == processor.encode_report(report)
        assert int(kept.nonzero()[0]) == len(prompt)


def test_drawn_references_depend_only_on_seed_epoch_and_id(processor, scans):
    dataset = DiffVPDataset([{"ct": path, "report": "Lung: clear."} for path in scans.values()])
    volumes = {name: processor.image_processor(path)["ct"][0] for name, path in scans.items()}

    def drawn(seed, epoch, size, workers=0, pool=scans):
        collator = DiffVPDataCollator(processor, pool, seed=seed)
        dataset.set_epoch(epoch)
        loader = DataLoader(dataset, size, collate_fn=collator, num_workers=workers)
        references = [one for batch in loader for one in batch["reference"]]
        return [next(name for name in volumes if torch.equal(volumes[name], one)) for one in references]

    first = drawn(0, 0, 4)
    assert first == drawn(0, 0, 1) == drawn(0, 0, 3, workers=1, pool=dict(reversed(scans.items())))
    assert all(name != other for name, other in zip(scans, first, strict=True)), "a scan must not be its own reference"
    others = [drawn(0, 1, 4), drawn(0, 2, 4), drawn(1, 0, 4)]
    assert any(first != other for other in others) and others[0] != others[1]


def test_pool_of_the_processor_is_the_default_and_excludes_the_scan(processor, scans, tmp_path):
    from diffvp.references_diffvp import index_references

    for name in list(scans)[:2]:
        shutil.copy(scans[name], tmp_path / f"normal_{name}")
    index_references(tmp_path)
    processor.load_references(tmp_path)
    collator, first = DiffVPDataCollator(processor), list(scans)[0]
    other = processor.image_processor(scans[list(scans)[1]])["ct"]
    for epoch in range(4):
        batch = collator([{"ct": scans[first], "report": "Lung: clear.", "epoch": epoch}])
        assert torch.equal(batch["reference"], other)


def test_frozen_features_replace_scans(model, processor):
    ct, reference = torch.rand(2, 1, 1, 32, 32, 32)
    encoded = {name: value[0] for name, value in model.encode_inputs(ct, reference).items()}
    processor.chat_template = "{{ messages[0].content }}"  # the tiny vocabulary has no line break
    text = {"text": "?!", "report": [40, 41, 2]}
    collator = DiffVPDataCollator(processor)
    batch, whole = collator([encoded | text]), collator([{"ct": ct[0], "reference": reference[0], **text}])
    assert set(encoded) <= set(batch) and "ct" not in batch
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**whole).loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"report": None}, "no `report`.*remove_unused_columns"),
        ({"ct": None}, "no `ct`"),
        ({"report": "Lung: clear. " * 40}, "max_length is 60"),
        ({"ct": torch.zeros(1, 32, 32, 32), "reference": None}, "no `id`"),
        ({"diagnosis_labels": [0] * 18}, "Some cases of a batch have diagnosis_labels and others do not"),
    ],
)
def test_incomplete_or_too_long_case_is_refused(processor, scans, change, message):
    case = {"ct": next(iter(scans.values())), "reference": torch.zeros(1, 32, 32, 32), "report": "Lung: clear."}
    collator = DiffVPDataCollator(processor, scans, max_report_tokens=60)
    with pytest.raises(ValueError, match=message):
        collator([case, case | change])


def tell_epochs(folder, seedable: bool) -> None:
    """Write the epochs in which cases were requested, or the error."""
    dataset = DiffVPDataset([{"index": index} for index in range(8)])
    seen = []

    class Linear(torch.nn.Linear):
        def forward(self, epoch, labels=None):
            seen.extend(epoch.tolist())
            return {"loss": super().forward(torch.ones(1)).sum()}

    arguments = TrainingArguments(
        str(folder / "run"), num_train_epochs=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        accelerator_config={"use_seedable_sampler": seedable},
    )  # fmt: skip
    trainer = Trainer(
        Linear(1, 1), arguments, lambda cases: {"epoch": torch.tensor([case["epoch"] for case in cases])}, dataset
    )
    try:
        trainer.train()
        answer = seen
    except RuntimeError as error:
        answer = str(error)
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(answer))


def test_every_process_gets_the_epoch_or_an_error(tmp_path):
    for seedable in (False, True):
        folder = tmp_path / str(seedable)
        folder.mkdir()
        in_two_processes(tell_epochs, folder, seedable)
        for rank in (0, 1):
            answer = json.loads((folder / f"{rank}.json").read_text())
            assert "use_seedable_sampler" in answer if seedable else answer == [0] * 4 + [1] * 4


# The script of the docs


@pytest.mark.slow
def test_script_of_the_docs_trains_resumes_and_pushes_a_loadable_model(repository_root, tmp_path):
    """Run it on four phantoms, with the checkpoint of this repository and the code of this working copy."""
    page = (repository_root / "docs/training.md").read_text(encoding="utf-8")
    [script] = re.findall(r"```python\n(import csv\n.*?)```", page, re.S)
    assert script.count("NAME/") == 1
    script = script.replace("NAME/", "tester/")
    shipped = tmp_path / "checkpoints/diffvp-phantom"
    shutil.copytree(SHIPPED_CHECKPOINT, shipped)
    for path in repository_root.glob("*_diffvp.py"):
        shutil.copy(path, shipped / path.name)
    (tmp_path / "my_scans").mkdir()
    with open(tmp_path / "my_scans/metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "report"])
        for index in range(4):
            patient = sample_patient(9, index, "demo")
            scan = render_patient(patient, matrix=64, slice_mm=5.0)
            nib.save(nib.Nifti1Image(scan.hu, scan.affine), tmp_path / f"my_scans/{index}.nii.gz")
            table.writerow([f"{index}.nii.gz", report_text(region_sentences(patient))[:200]])
    interrupted = script.replace("num_train_epochs=2", "num_train_epochs=1").replace("trainer.push_to_hub()", "")
    assert interrupted.count("num_train_epochs=1") == 1
    ask = """
        import json, torch
        inputs = processor(ct="my_scans/0.nii.gz", text="Lung: a nodule.")
        with torch.no_grad():
            said = model.eval()(**inputs).logits
    """
    first = interrupted + "\ndel model, trainer\n" + script
    first += textwrap.dedent(ask) + "torch.save(said, 'said.pt')\n"
    first += "assert trainer.state.global_step == 4 and trainer.state.best_model_checkpoint\n"
    second = """
        import sys

        class Blocked:  # as if the package were not installed
            def find_spec(self, name, *_):
                if name.split(".")[0] == "diffvp":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Blocked())
        from transformers import AutoModel, AutoProcessor
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        repo = "tester/diffvp-mine"
        get_class_from_dynamic_module("collator_diffvp.DiffVPDataCollator", repo)
        processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
        model = AutoModel.from_pretrained(repo, trust_remote_code=True)
    """
    second = textwrap.dedent(second) + textwrap.dedent(ask)
    second += "print(float((said - torch.load('said.pt')).abs().max()), said.shape)"
    with Hub() as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        for code in (first, second):
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=280,
            )
            assert done.returncode == 0, done.stderr[-3000:]
        files = hub.repos["models/tester/diffvp-mine"].commits
    assert float(done.stdout.split()[0]) == 0.0
    assert files
