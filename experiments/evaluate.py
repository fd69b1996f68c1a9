# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Score a checkpoint on unseen cases, next to baselines.

    diffvp evaluate my_scans/own_scans.yaml                     # test cases and model of a training file
    diffvp evaluate phantom --output experiments/results        # a phantom cohort and the shipped checkpoint
    diffvp evaluate DIR --layout ct-rate --output results --checkpoint FOLDER
    diffvp evaluate NAME/DATASET --layout hub --revision COMMIT --output results --checkpoint FOLDER

The input is that of a user: the scan, and a reference from the pool of the checkpoint. Findings are read from the text
(phantoms: by their sentence reader; other scans: by the rules or RadBERT) and compared with the labels of the case. If
a dataset has no labels, the same labeler reads them from the true report.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ..configuration_diffvp import DiffVPConfig
from ..data.cache import TensorCache, VolumeCache, encoder_recipe
from ..data.cases import Case, Problem, check_no_leak, raise_problems
from ..data.lesions import lesion_mask_path, read_patients
from ..data.load import load_dataset_cases
from ..data.phantom import Finding
from ..data.phantom_cases import load_phantom
from ..data.pool import is_normal, pool_by_rule
from ..files import write_texts
from ..inference.report import load_checkpoint
from ..labels_diffvp import DIAGNOSIS_LABELS, REGIONS
from ..metrics.baselines import (
    label_baselines,
    most_frequent_report,
    most_frequent_report_by_region,
    nearest_reports,
)
from ..metrics.clinical_efficacy import classification_scores, label_counts, precision_recall_f1
from ..metrics.clinical_efficacy.reports import Labeler
from ..metrics.collapse import collapse_panel, rare_findings
from ..metrics.labelers.table import label_cases
from ..metrics.markdown import table_lines, with_interval
from ..metrics.nlg import score_reports
from ..metrics.report_table import collapse_lines
from ..metrics.statistics import Interval, bootstrap_counts, bootstrap_mean
from ..modeling_diffvp import DiffVPForConditionalGeneration
from ..processing_diffvp import DiffVPProcessor
from ..progress import counted
from ..provenance import versions, weights_sha256
from ..reading_diffvp import read_ct
from ..references_diffvp import ReferencePool
from ..report_diffvp import RESEARCH_USE, split_report
from ..train_accelerate import load_classifier
from ..training.cohort import load_cohort
from ..training.config import TrainingConfig
from ..volume_diffvp import CTVolume
from .goals import classifier_scores, goal_lines, map_scores, pool_cases, report_scores
from .lesion_scores import score_findings
from .result_files import json_text
from .system_scores import FINDING_SCORES, PhantomReader, micro, true_labels

BATCH_SIZE = 16
FEWEST_OF_LABEL = 5  # positive cases below which no score is shown
# A report depends only on its scan, which also determines the drawn reference: the report for the scan of the next
# patient is the next patient's report.
ANOTHER_SCAN = "DiffVP on another patient's scan"


@dataclass(frozen=True)
class TestSet:
    """
    Cases on which a checkpoint is scored.

    Attributes:
        name: name of the dataset, for the page.
        training, test: cases for the baselines, and cases to score; all have the 18 labels.
        labeler: reads findings from reports.
        truth: source of the labels: "dataset", "labeler", or "cohort" (of phantoms).
        pool: normal cases for a checkpoint without references.
        spacing: mm along x, y, z of scans whose files lack it.
        phantoms: folder of the phantom cohort, for the sizes of lesions.
        split: name of the test split.
    """

    __test__ = False  # not a pytest class

    name: str
    training: list[Case]
    test: list[Case]
    labeler: Labeler
    truth: str
    pool: list[Case] = field(default_factory=list)
    spacing: tuple[float, float, float] | None = None
    phantoms: Path | None = None
    split: str = "test"

    @property
    def signature(self) -> str:
        """Method of the scores of findings."""
        reader = self.labeler.signature.replace("|", ",")
        return f"clinical-efficacy|micro|labels:18|truth:{self.truth}|reader:{reader}"


def phantom_set(data: str | os.PathLike) -> TestSet:
    """Load the `valid` split of a phantom cohort."""
    train, test = load_phantom(data, "train"), load_phantom(data, "valid")
    return TestSet(Path(data).name, train, test, PhantomReader(), "cohort", phantoms=Path(data), split="valid")


def dataset_set(
    layout: str,
    root: str | os.PathLike,
    split: str,
    training_split: str,
    labeler: Labeler,
    spacing: tuple[float, float, float] | None = None,
    **options,
) -> TestSet:
    """
    Load a split of a dataset, and another for the baselines.

    Args:
        layout, root, options: see [`load_dataset_cases`].
        spacing: mm along x, y, z of scans whose files lack it.
    """
    train, test = (load_dataset_cases(layout, root, one, **options) for one in (training_split, split))
    check_no_leak(train, test, "test")
    tests = _labelled(TestSet(Path(root).name, train, test, labeler, "dataset", spacing=spacing, split=split))
    return replace(tests, pool=(pool_by_rule(tests.training) or ([], ""))[0])


def trained_set(config: TrainingConfig, labeler: Labeler) -> TestSet:
    """Load the test cases of a training file, which its model has not seen.

    Raises:
        ValueError: the training file has no test cases.
    """
    cohort = load_cohort(config)
    if not cohort.test:
        raise ValueError(
            "The training file has no test cases; expected data.test_fraction or data.test_split, and a model trained "
            "with it."
        )
    training = list({case.name: case for case in cohort.diagnosis + cohort.report}.values())
    name = Path(config.data.root).name
    options = {"pool": cohort.pool, "spacing": config.data.spacing}
    if config.data.layout == "phantom":
        options["phantoms"] = Path(config.data.root)
        return TestSet(name, training, cohort.test, PhantomReader(), "cohort", **options)
    truth = "labeler" if config.data.labeler else "dataset"
    return _labelled(TestSet(name, training, cohort.test, labeler, truth, **options))


def _labelled(tests: TestSet) -> TestSet:
    """Add labels that the labeler reads from the reports, if the dataset has none."""
    everything = tests.training + tests.test
    if any(case.labels is not None and len(case.labels) != len(DIAGNOSIS_LABELS) for case in everything):
        raise ValueError(f"The labels of {tests.name} differ from the 18 that a labeler reads.")
    if all(case.labels is not None for case in everything):
        return tests
    options = {name: label_cases(getattr(tests, name), tests.labeler) for name in ("training", "test")}
    return replace(tests, truth="labeler", **options)


def constant_normal_report(cases: list[Case]) -> str:
    """Join the most common wording of each region over the normal training cases.

    If reports are not written by region, return the most common normal report.
    """
    members, _ = pool_by_rule(cases) or ([], "")
    normal = [case.report for case in members]
    if not normal:
        raise ValueError("The training split has no normal case for the constant report.")
    if not any(set(split_report(report)) & set(REGIONS) for report in normal):
        return most_frequent_report(normal)
    return most_frequent_report_by_region(normal, split_report, REGIONS)


@dataclass(frozen=True)
class Outputs:
    """
    Outputs of a checkpoint for the test cases.

    Attributes:
        reports: greedily generated texts.
        pooled: see [`pooled`], (cases, 2 C).
        probabilities: of the classifier, (cases, labels); `None` without one.
    """

    reports: list[str]
    pooled: np.ndarray
    probabilities: np.ndarray | None


def pooled(features: torch.Tensor) -> torch.Tensor:
    """Return mean and maximum, (2 C,), of the voxel features (N, C) of a scan."""
    return torch.cat([features.mean(0), features.amax(0)]).cpu()


def pooled_features(
    model: DiffVPForConditionalGeneration, volumes: VolumeCache, cases: list[Case], name: str
) -> np.ndarray:
    """Return the [`pooled`] frozen features of cases, (cases, 2 C), cached by volume and encoder."""
    recipe = {"preprocessing": volumes.recipe, **encoder_recipe(model)}
    cache = TensorCache(volumes.cache.root.parent / "pooled", recipe)

    def compute(case: Case) -> dict[str, torch.Tensor]:
        [features] = model.extract_features(volumes.load(case)[None].float().to(model.device))
        return {"pooled": pooled(features)}

    found = [
        cache.get(volumes.digest(case), lambda case=case: compute(case))["pooled"]
        for case in counted(cases, f"Features, {name}")
    ]
    return torch.stack(found).numpy()


def generate_reports(
    model: DiffVPForConditionalGeneration,
    processor: DiffVPProcessor,
    targets: list[Case],
    spacing: tuple[float, float, float] | None = None,
    pool: Sequence[Case] = (),
) -> Outputs:
    """
    Read and encode each scan once, and generate its report.

    Args:
        spacing: mm along x, y, z of scans whose files lack it.
        pool: cases of the processor's pool, if it comes from the dataset: its files may lack spacing or rescale.
    """

    def read(case: Case) -> CTVolume:
        return read_ct(case.volume, spacing, processor.image_processor.allow_non_hu, case.metadata)

    normal = {case.name: case for case in pool}

    def load(entry: dict[str, str]) -> tuple[str, CTVolume]:
        volume = read(normal[entry["id"]])
        return volume.sha256, volume

    reports, features, probabilities = [], [], []
    for start in counted(range(0, len(targets), BATCH_SIZE), "Reports"):
        batch = targets[start : start + BATCH_SIZE]
        scans = [read(case) for case in batch]
        references = [processor.reference_pool.choose(0, scan.sha256, load)[1] for scan in scans] if pool else None
        inputs = processor(ct=scans, reference=references).to(model.device)
        encoded = model.encode_inputs(inputs.pop("ct"), inputs.pop("reference"))
        reports += processor.batch_decode(model.generate(**inputs, **encoded), skip_special_tokens=True)
        features += map(pooled, encoded["ct_features"])
        if model.config.use_diagnosis:
            probabilities.append(encoded["diagnosis_logits"].float().sigmoid().cpu().numpy())
    return Outputs(reports, torch.stack(features).numpy(), np.concatenate(probabilities) if probabilities else None)


@torch.no_grad()
def predict(folder: str | os.PathLike, volumes: VolumeCache, cases: list[Case]) -> tuple[np.ndarray, DiffVPConfig]:
    """
    Return the probabilities (cases, labels) of the classifier of a checkpoint or a first stage, and its configuration.

    Raises:
        ValueError: there is no classifier, or its labels or the shape of its input differ.
    """
    _, classifier = load_classifier(folder, DIAGNOSIS_LABELS)
    config = DiffVPConfig.from_pretrained(folder)
    shape = tuple(volumes.image_processor.size.values())
    if tuple(config.image_size) != shape:
        raise ValueError(
            f"{folder}: image_size: {list(config.image_size)} (expected {list(shape)}, as the checkpoint)"
        )
    classifier.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = classifier.head.weight.device
    logits = [
        classifier(volumes.load(case)[None].float().to(device))[0]
        for case in counted(cases, f"Findings, {Path(folder).name}")
    ]
    return torch.cat(logits).sigmoid().cpu().numpy(), config


def bounds(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def mean_with_interval(values: np.ndarray) -> dict:
    interval = bootstrap_mean(values)
    return {"value": interval.estimate, "interval": bounds(interval)}


def score(reports: list[str] | None, predicted: np.ndarray, cases: list[Case]) -> dict:
    """Compute precision, recall and micro-F1 of the findings, and BLEU-4 and ROUGE-L of texts, with intervals."""
    truth = true_labels(cases)
    counts = label_counts(predicted, truth)
    result = {}
    for name in FINDING_SCORES:
        interval = bootstrap_counts(counts, lambda sums, name=name: micro(sums, name))
        result |= {name: interval.estimate, f"{name}_interval": bounds(interval)}
    if reports is not None:
        scores = score_reports(reports, [case.report for case in cases], meteor=False)
        for name, metric in (("bleu4", "bleu_4"), ("rougeL", "rouge_l")):
            interval = bootstrap_mean(scores.per_report[metric])
            result |= {name: interval.estimate, f"{name}_interval": bounds(interval)}
    return result


def score_by_label(predicted: np.ndarray, cases: list[Case]) -> dict[str, dict]:
    """Compute precision, recall and F1 of each label, with the interval of F1 over cases."""
    truth = true_labels(cases)
    scores = classification_scores(predicted, truth, DIAGNOSIS_LABELS)["labels"]
    counts = label_counts(predicted, truth)
    for index, label in enumerate(DIAGNOSIS_LABELS):
        interval = bootstrap_counts(counts[..., index], lambda sums: precision_recall_f1(sums[..., None])[..., 2, 0])
        scores[label]["f1_interval"] = bounds(interval)
    return scores


def evaluate(
    tests: TestSet,
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    cache_dir: str | os.PathLike,
    limit: int | None = None,
    command: str = "diffvp evaluate",
    volume_labels: str | os.PathLike | None = None,
) -> tuple[Path, dict]:
    """
    Evaluate a checkpoint; write `NAME_checkpoint.json` and `NAME_checkpoint.md` (NAME without "diffvp-").

    Args:
        cache_dir: cache of preprocessed volumes, shared with training.
        limit: use only the first N test cases, for a trial.
        command: command to state in the results.
        volume_labels: phantoms only: another checkpoint, or its first stage, whose classifier was trained on labels of
            whole volumes, as on a dataset without masks. It is scored with its own thresholds.

    Returns:
        The path of the Markdown page, and the content of the JSON file.

    Raises:
        ValueError: the test split has too few cases or lesions, the checkpoint has too few references, or a classifier
            has other labels.
        DatasetError: a phantom cohort has no masks.
    """
    output = Path(output)
    tests = replace(tests, test=tests.test[:limit])
    patients = _known_findings(tests)
    normal = constant_normal_report(tests.training)
    output.mkdir(parents=True, exist_ok=True)  # before anything is computed
    model, processor, pool = load_with_pool(checkpoint, tests.pool)
    volumes = VolumeCache(cache_dir, processor.image_processor, tests.spacing)
    alone = {}
    if volume_labels is not None:
        probabilities, config = predict(volume_labels, volumes, tests.test)
        alone = {"volume_labels": classifier_scores(probabilities, config.diagnosis_threshold, tests.test, patients)}
    outputs = generate_reports(model, processor, tests.test, tests.spacing, pool)
    keys = pooled_features(model, volumes, tests.training, "training")
    texts = {
        "DiffVP": outputs.reports,
        "constant normal report": [normal] * len(tests.test),
        "nearest training report": nearest_reports(outputs.pooled, keys, [case.report for case in tests.training]),
        ANOTHER_SCAN: outputs.reports[1:] + outputs.reports[:1],
    }
    named = {name: tests.labeler.label_all(reports) for name, reports in texts.items()}
    classifier = None
    if outputs.probabilities is not None:
        classifier = (outputs.probabilities >= np.array(model.config.diagnosis_threshold)).astype(int)
    goals, maps = {}, {}
    if patients is not None:
        goals["maps"] = map_scores(model, volumes, tests.phantoms, tests.test, pool_cases(processor.reference_pool))
        maps = goals["maps"].pop("per_case")
        if classifier is not None:
            thresholds = model.config.diagnosis_threshold
            goals["classifier"] = classifier_scores(outputs.probabilities, thresholds, tests.test, patients)
            goals["report"] = report_scores(outputs.reports, named["DiffVP"], classifier, tests.test, patients)
    result = {
        "command": command + ("" if limit is None else f" --limit {limit}"),
        **_description(tests, checkpoint, model.config, outputs.reports),
        "systems": score_systems(tests, texts, named, classifier),
        **goals,
        **alone,
        **score_texts(tests, texts, named["DiffVP"], classifier),
        "lesion_sizes": {} if patients is None else _lesion_sizes(patients, tests.test, outputs.reports),
        "predictions": [
            {"name": case.name, "reference": case.report, "prediction": report}
            | ({"map": maps[case.name]} if case.name in maps else {})
            for case, report in zip(tests.test, outputs.reports, strict=True)
        ],
    }
    name = Path(checkpoint).name.removeprefix("diffvp-")
    write_texts(output, {f"{name}_checkpoint.json": json_text(result), f"{name}_checkpoint.md": markdown_page(result)})
    return output / f"{name}_checkpoint.md", result


def load_with_pool(
    checkpoint: str | os.PathLike, normal: list[Case]
) -> tuple[DiffVPForConditionalGeneration, DiffVPProcessor, list[Case]]:
    """Load a checkpoint with LoRA merged. Return also the normal cases that replace its pool, if it has none.

    Raises:
        ValueError: its findings are not the 18 labels, or there are no references.
    """
    model, processor = load_checkpoint(str(checkpoint))
    if tuple(model.config.diagnosis_labels) != DIAGNOSIS_LABELS:
        raise ValueError("The findings of the checkpoint differ from the 18 that a labeler reads.")
    pool = []
    if processor.reference_pool is None:
        paths = {case.name: case.volume for case in normal if isinstance(case.volume, Path)}
        pool, processor.reference_pool = normal, ReferencePool.of_paths(paths)
    model.merge_adapter()
    return model, processor, pool


def score_systems(
    tests: TestSet, texts: dict[str, list[str]], named: dict[str, np.ndarray], classifier: np.ndarray | None
) -> dict[str, dict]:
    """
    Score the texts, and baselines that are labels alone.

    Args:
        texts: reports of the test cases by the name of the system.
        named: findings of the reports by the name of the system, (cases, labels).
        classifier: findings of the classifier, (cases, labels).
    """
    systems = {name: score(reports, named[name], tests.test) for name, reports in texts.items()}
    if classifier is not None:
        systems["diagnosis classifier alone"] = score(None, classifier, tests.test)
    guesses = label_baselines(len(tests.test), np.stack([case.labels for case in tests.training]))
    return systems | {
        f"labels alone, {name}": score(None, guess.astype(int), tests.test) for name, guess in guesses.items()
    }


def score_texts(
    tests: TestSet, texts: dict[str, list[str]], written: np.ndarray, classifier: np.ndarray | None
) -> dict[str, object]:
    """
    Score the generated reports by label and against the classifier, and all texts for template collapse.

    Args:
        written: findings of the generated reports, (cases, labels). The others are as of [`score_systems`].
    """
    reports, truth = texts["DiffVP"], true_labels(tests.test)
    compared = {name: of for name, of in texts.items() if name != ANOTHER_SCAN}  # the same reports in another order
    compared["true reports"] = [case.report for case in tests.test]
    agreement = {}
    if classifier is not None:
        agreement = {"text_agrees_with_classifier": mean_with_interval((written == classifier).mean(axis=1))}
    return {
        "per_label": score_by_label(written, tests.test),
        "collapse": {
            name: collapse_panel(of, truth, tests.labeler, split=split_report) for name, of in compared.items()
        },
        "rare": [label for label, rare in zip(DIAGNOSIS_LABELS, rare_findings(truth), strict=True) if rare],
        **agreement,
        "reports": {
            "distinct": len(set(reports)),
            "all_findings_right": int((written == truth).all(axis=1).sum()),
        },
    }


def _known_findings(tests: TestSet) -> dict[str, list[Finding]] | None:
    """Return the findings of phantoms, by case name, after a check that the test cases can be scored.

    Raises:
        ValueError: there are too few test cases.
        DatasetError: lists the missing lesion masks.
    """
    if len(tests.test) < 2:
        raise ValueError(f"The test split has {len(tests.test)} case(s); expected at least 2")
    if tests.phantoms is None:
        return None
    patients = read_patients(tests.phantoms)
    _check_masks(tests.phantoms, tests.test)
    return patients


def _description(
    tests: TestSet, checkpoint: str | os.PathLike, config: DiffVPConfig, reports: list[str]
) -> dict[str, object]:
    """Describe data, checkpoint and method of the scores."""
    return {
        "dataset": {"name": tests.name, "split": tests.split, "phantoms": tests.phantoms is not None},
        "intended_domain": config.intended_domain,
        "checkpoint": {"name": Path(checkpoint).name, "sha256": weights_sha256(checkpoint)},
        "versions": versions(),
        "cases": len(tests.test),
        "training_cases": len(tests.training),
        "signatures": [
            *score_reports(reports[:1], [tests.test[0].report], meteor=False).signature.split(),
            tests.signature,
        ],
    }


def _check_masks(data: Path, test: list[Case]) -> None:
    """Fail on a missing lesion mask before hours of work."""
    paths = [lesion_mask_path(data, case.name) for case in test if not is_normal(case)]
    raise_problems(
        [
            Problem(path.name, None, "lesion mask", "missing", "a cohort with masks")
            for path in paths
            if not path.is_file()
        ]
    )


def _lesion_sizes(patients: dict[str, list[Finding]], test: list[Case], reports: list[str]) -> dict[str, dict]:
    """Count lesions of the test cases by size: all of them, and those that the reports name."""
    named = {case.name: report for case, report in zip(test, reports, strict=True)}
    by_size = score_findings(patients, named)["by_size"]
    return {f"{label}, {size}": counts for label, bins in by_size.items() for size, counts in bins.items()}


def markdown_page(result: dict) -> str:
    """Write the results as Markdown."""
    name, phantoms = result["checkpoint"]["name"], result["dataset"]["phantoms"]
    domain = (
        "Synthetic phantoms only: these numbers say nothing about patients."
        if phantoms
        else f"Intended domain, as stated in the checkpoint: {result['intended_domain'] or 'not stated'}."
    )
    agreement = result.get("text_agrees_with_classifier")
    goals = []
    if "report" in result:
        of = result["systems"]["DiffVP"]
        bleu = {"value": of["bleu4"], "interval": of["bleu4_interval"]}
        goals = [*goal_lines(result | {"bleu4": bleu}), ""]
    lines = [
        f"# {name} on unseen {'phantoms' if phantoms else 'scans'}",
        "",
        f"{result['cases']} cases of the `{result['dataset']['split']}` split, never used in training. The baselines "
        f"use {result['training_cases']} training cases. {domain}",
        f"Weights {result['checkpoint']['sha256']['model.safetensors'][:12]}.",
        f"Made by `{result['command']}`; intervals are 95 % bootstrap intervals over cases. {RESEARCH_USE}",
        "",
        *table_lines(
            ["system", "precision", "recall", "micro-F1", "BLEU-4", "ROUGE-L"],
            [
                [name, *(_cell(scores, column) for column in ("precision", "recall", "f1", "bleu4", "rougeL"))]
                for name, scores in result["systems"].items()
            ],
        ),
        "",
        *goals,
        f"Findings of the generated reports by label (no scores below {FEWEST_OF_LABEL} positive cases):",
        "",
        *table_lines(
            ["label", "cases", "precision", "recall", "F1"],
            [[label, str(scores["support"]), *_label_cells(scores)] for label, scores in result["per_label"].items()],
        ),
        "",
        *collapse_lines(result["collapse"], result["rare"]),
    ]
    if agreement is not None:
        lines += [
            "",
            "Share of labels on which a report agrees with the diagnosis classifier that prompted it: "
            f"{with_interval(**agreement)}.",
        ]
    return "\n".join([*lines, "", "Signatures: " + "; ".join(f"`{s}`" for s in result["signatures"]), ""])


def _label_cells(scores: dict) -> list[str]:
    if scores["support"] < FEWEST_OF_LABEL:
        return ["-"] * 3
    return [f"{scores['precision']:.3f}", f"{scores['recall']:.3f}", _cell(scores, "f1")]


def _cell(scores: dict, column: str) -> str:
    return with_interval(scores[column], scores[f"{column}_interval"]) if column in scores else "no text"
