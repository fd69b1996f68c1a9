# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Score a checkpoint on a phantom test split beside the baselines that a report generator has to beat.

    diffvp evaluate phantom --checkpoint checkpoints/diffvp-phantom --output experiments/results

Every system sees what a user would have: the scan, and a reference from the pool that ships with the checkpoint.
Findings are read from the text by the phantom's own sentence reader and compared with the labels of the case.
"""

import json
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from ..configuration_diffvp import DIAGNOSIS_LABELS, REGIONS
from ..data.cache import TensorCache, VolumeCache, encoder_recipe, weights_sha256, without_place
from ..data.cases import Case
from ..data.lesions import read_patients
from ..data.pool import normal_pool
from ..data.radgenome import load_phantom
from ..metrics.baselines import label_baselines, most_frequent_report_by_region, nearest_reports
from ..metrics.clinical_efficacy import classification_scores, label_counts, precision_recall_f1
from ..metrics.collapse import collapse_panel, rare_findings
from ..metrics.markdown import table_lines, with_interval
from ..metrics.nlg import score_reports
from ..metrics.report_table import collapse_lines
from ..metrics.statistics import Interval, bootstrap_counts, bootstrap_mean
from ..modeling_diffvp import DiffVPForConditionalGeneration
from ..processing_diffvp import DiffVPProcessor
from ..reporting import load_checkpoint
from .lesions import score_findings
from .scores import FINDINGS, PhantomReader, micro

BATCH_SIZE = 16
LABELS_SIGNATURE = "clinical-efficacy|micro|labels:18|truth:cohort|reader:phantom_report.labels_from_report"


def constant_normal_report(cases: list[Case]) -> str:
    """The most common wording of each region among the normal cases of the training split."""
    normal = [case.report for case in normal_pool(cases)]
    if not normal:
        raise ValueError("The training split has no normal case to take the constant report from.")
    return most_frequent_report_by_region(normal, DiffVPProcessor.post_process, REGIONS)


def pooled_features(
    model: DiffVPForConditionalGeneration, volumes: VolumeCache, cases: list[Case], name: str
) -> np.ndarray:
    """Mean and maximum of the frozen voxel features, (cases, 2 C), computed once for each volume and encoder."""
    recipe = {"preprocessing": volumes.recipe, **encoder_recipe(model)}
    cache = TensorCache(volumes.cache.root.parent / "pooled", recipe)

    def compute(case: Case) -> dict[str, torch.Tensor]:
        features = model.extract_features(volumes.load(case)[None].float().to(model.device))[0]
        return {"pooled": torch.cat([features.mean(0), features.amax(0)]).cpu()}

    pooled = [
        cache.get(volumes.digest(case), lambda case=case: compute(case))["pooled"]
        for case in track(cases, f"Features, {name}")
    ]
    return torch.stack(pooled).numpy()


def generate_reports(
    model: DiffVPForConditionalGeneration, processor: DiffVPProcessor, targets: list[Case]
) -> tuple[list[str], np.ndarray]:
    """Greedy reports of the targets, and the classifier's probabilities (cases, labels)."""
    reports, probabilities = [], []
    for start in track(range(0, len(targets), BATCH_SIZE), "Reports"):
        inputs = processor(ct=[case.volume for case in targets[start : start + BATCH_SIZE]]).to(model.device)
        logits = model.diagnose(inputs["ct"])
        reports += processor.batch_decode(model.generate(**inputs, diagnosis_logits=logits), skip_special_tokens=True)
        probabilities.append(logits.float().sigmoid().cpu().numpy())
    return reports, np.concatenate(probabilities)


def bounds(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def mean_with_interval(values: np.ndarray) -> dict:
    interval = bootstrap_mean(values)
    return {"value": interval.estimate, "interval": bounds(interval)}


def score(reports: list[str] | None, predicted: np.ndarray, cases: list[Case]) -> dict:
    """Precision, recall and micro-F1 of the findings and, for text, BLEU-4 and ROUGE-L, with intervals over cases."""
    truth = np.stack([case.labels for case in cases]).astype(int)
    counts = label_counts(predicted, truth)
    result = {}
    for name in FINDINGS:
        interval = bootstrap_counts(counts, lambda sums, name=name: micro(sums, name))
        result |= {name: interval.estimate, f"{name}_interval": bounds(interval)}
    if reports is not None:
        scores = score_reports(reports, [case.report for case in cases], meteor=False)
        for name, metric in (("bleu4", "bleu_4"), ("rougeL", "rouge_l")):
            interval = bootstrap_mean(scores.per_report[metric])
            result |= {name: interval.estimate, f"{name}_interval": bounds(interval)}
    return result


def score_labels(predicted: np.ndarray, cases: list[Case]) -> dict[str, dict]:
    """Precision, recall and F1 of each label, with the interval of its F1 over cases."""
    truth = np.stack([case.labels for case in cases]).astype(int)
    scores = classification_scores(predicted, truth, DIAGNOSIS_LABELS)["labels"]
    counts = label_counts(predicted, truth)
    for index, label in enumerate(DIAGNOSIS_LABELS):
        interval = bootstrap_counts(counts[..., index], lambda sums: precision_recall_f1(sums[..., None])[..., 2, 0])
        scores[label]["f1_interval"] = bounds(interval)
    return scores


def evaluate(
    data: str | os.PathLike,
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    cache_dir: str | os.PathLike,
    limit: int | None = None,
) -> Path:
    """
    Evaluate on the `valid` split of `data`; writes `NAME_checkpoint.json` and `NAME_checkpoint.md`, NAME being that of
    the checkpoint without "diffvp-".

    Args:
        cache_dir: preprocessed volumes, for the nearest training report; the folder that training uses.
        limit: only the first so many test cases, for a trial.
    """
    model, processor = load_checkpoint(str(checkpoint))
    model.merge_adapter()
    volumes = VolumeCache(cache_dir, processor.image_processor)
    train, test = load_phantom(data, "train"), load_phantom(data, "valid")[:limit]
    patients = read_patients(data)
    if len(test) < 2:
        raise ValueError(f"The test split has {len(test)} case(s); comparing patients takes 2.")
    reports, probabilities = generate_reports(model, processor, test)
    # A report depends on its scan alone, the reference that is sampled for it included. So the report that the model
    # writes when it is given the scan of the next patient is the next patient's. Nobody keeps his own.
    shuffled = reports[1:] + reports[:1]
    normal = [constant_normal_report(train)] * len(test)
    nearest = nearest_reports(
        pooled_features(model, volumes, test, "test"),
        pooled_features(model, volumes, train, "training"),
        [case.report for case in train],
    )
    classifier = (probabilities >= np.array(model.config.diagnosis_threshold)).astype(int)
    reader = PhantomReader()
    texts = {
        "DiffVP": reports,
        "constant normal report": normal,
        "nearest training report": nearest,
        "DiffVP on another patient's scan": shuffled,
    }
    systems = {name: score(written, reader.label_all(written), test) for name, written in texts.items()}
    systems["diagnosis classifier alone"] = score(None, classifier, test)
    guesses = label_baselines(len(test), np.stack([case.labels for case in train]))
    for name, guess in guesses.items():
        systems[f"labels alone, {name}"] = score(None, guess.astype(int), test)
    written = reader.label_all(reports)
    per_label = score_labels(written, test)
    truth = np.stack([case.labels for case in test]).astype(int)
    collapse = {
        name: collapse_panel(of, truth, reader, split=DiffVPProcessor.post_process)
        for name, of in (texts | {"true reports": [case.report for case in test]}).items()
        if name != "DiffVP on another patient's scan"  # the same reports
    }
    named = {case.name: report for case, report in zip(test, reports, strict=True)}
    result = {
        "command": f"diffvp evaluate {Path(data).name} --output {without_place(output)}"
        + ("" if limit is None else f" --limit {limit}"),
        "checkpoint": {"name": Path(checkpoint).name, "sha256": weights_sha256(checkpoint)},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "cases": len(test),
        "training_cases": len(train),
        "signatures": [
            *score_reports(reports[:1], [test[0].report], meteor=False).signature.split(),
            LABELS_SIGNATURE,
        ],
        "systems": systems,
        "per_label": per_label,
        "collapse": collapse,
        "rare": [label for label, rare in zip(DIAGNOSIS_LABELS, rare_findings(truth), strict=True) if rare],
        "text_agrees_with_classifier": mean_with_interval((written == classifier).mean(axis=1)),
        "lesion_sizes": {
            f"{label}, {size}": counts
            for label, bins in score_findings(patients, named)["by_size"].items()
            for size, counts in bins.items()
        },
        "predictions": [
            {"name": case.name, "reference": case.report, "prediction": report}
            for case, report in zip(test, reports, strict=True)
        ],
    }
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    name = Path(checkpoint).name.removeprefix("diffvp-")
    texts = {f"{name}_checkpoint.json": json.dumps(result, indent=1) + "\n", f"{name}_checkpoint.md": _page(result)}
    for file, text in texts.items():
        (output / f".{file}").write_text(text, encoding="utf-8")
    for file in texts:
        os.replace(output / f".{file}", output / file)
    return output / f"{name}_checkpoint.md"


def _page(result: dict) -> str:
    """The results as Markdown."""
    lines = [
        f"# {result['checkpoint']['name']} on unseen phantoms",
        "",
        f"{result['cases']} cases of the `valid` split, which no training uses. Synthetic phantoms only: these "
        "numbers say nothing about patients.",
        f"Weights {result['checkpoint']['sha256']['model.safetensors'][:12]}.",
        f"Made by `{result['command']}`; intervals are 95 % bootstrap intervals over cases.",
        "",
        *table_lines(
            ["system", "precision", "recall", "micro-F1", "BLEU-4", "ROUGE-L"],
            [
                [name, *(_cell(scores, column) for column in ("precision", "recall", "f1", "bleu4", "rougeL"))]
                for name, scores in result["systems"].items()
            ],
        ),
        "",
        "Findings of the generated reports, by label:",
        "",
        *table_lines(
            ["label", "cases", "precision", "recall", "F1"],
            [
                [
                    label,
                    str(scores["support"]),
                    f"{scores['precision']:.3f}",
                    f"{scores['recall']:.3f}",
                    _cell(scores, "f1"),
                ]
                for label, scores in result["per_label"].items()
            ],
        ),
        "",
        *collapse_lines(result["collapse"], result["rare"]),
        "",
        "Labels on which a report and the diagnosis classifier that prompted it agree: "
        f"{with_interval(**result['text_agrees_with_classifier'])}.",
    ]
    return "\n".join([*lines, "", "Signatures: " + "; ".join(f"`{s}`" for s in result["signatures"]), ""])


def _cell(scores: dict, column: str) -> str:
    return with_interval(scores[column], scores[f"{column}_interval"]) if column in scores else "no text"
