# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Agreement of the rule labeler with hand-set labels of 800 reports of CT-RATE.

    python -m diffvp.experiments.labeler CSV --output experiments/results

CSV is `ctclip_train.csv` of CT-CLIP: id, report, 18 labels. 500 reports are the development part: the rules were
written against them, and the baseline is trained on them. The other 300 are the test part. It must not be read while
rules are written; `--development` skips it. The results contain no text of the reports.
"""

import argparse
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console

from ..data.cases import Problem, raise_problems, read_csv
from ..files import write_texts
from ..labels_diffvp import DIAGNOSIS_LABELS
from ..metrics.clinical_efficacy import averages, classification_scores, label_counts, precision_recall_f1
from ..metrics.clinical_efficacy.reports import SCORES
from ..metrics.labelers import RuleLabeler
from ..metrics.markdown import table_lines, with_interval
from ..metrics.statistics import LEVEL, RESAMPLES, Statistic, bootstrap_counts, compare_counts
from ..provenance import without_place
from .result_files import json_text

DEVELOPMENT_REPORTS = 500
AVERAGES = ("micro", "macro")
FOLDS = 5
NOISE_FILE = Path(__file__).with_name("labeler_noise.yaml")
BASELINE = "TF-IDF of words and word pairs, one balanced logistic regression per label"


@dataclass(frozen=True)
class LabelledReports:
    """Reports with their ids and hand-set labels, (reports, 18) in the order of `DIAGNOSIS_LABELS`."""

    ids: list[str]
    texts: list[str]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, rows: Sequence[int]) -> "LabelledReports":
        return LabelledReports([self.ids[row] for row in rows], [self.texts[row] for row in rows], self.labels[rows])

    def ids_sha256(self) -> str:
        return hashlib.sha256("\n".join(sorted(self.ids)).encode()).hexdigest()


def read_reports(path: str | os.PathLike) -> LabelledReports:
    """Read the columns AccessionNo, report_text and the 18 labels.

    Raises:
        DatasetError: the file or a column is missing.
        ValueError: an id occurs twice, or a label is neither 0 nor 1.
    """
    problems: list[Problem] = []
    rows = read_csv(Path(path), ["AccessionNo", "report_text", *DIAGNOSIS_LABELS], problems)
    raise_problems(problems)
    rows = [row.values for row in rows]
    if not rows:
        raise ValueError(f"{path} has no rows")
    ids = [row["AccessionNo"] for row in rows]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path} has {len(ids) - len(set(ids))} ids more than once")
    for row in rows:
        if wrong := {label: row[label] for label in DIAGNOSIS_LABELS if row[label] not in ("0", "1")}:
            raise ValueError(f"{path}: {row['AccessionNo']}: {wrong} (expected labels 0 or 1)")
    labels = np.array([[int(row[label]) for label in DIAGNOSIS_LABELS] for row in rows])
    return LabelledReports(ids, [row["report_text"] for row in rows], labels)


def split_rows(reports: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the rows of the development part (the 500 reports with the smallest SHA-256) and of the test part.

    The hash is over the text, not the id, to keep identical reports together: 13 of the 800 repeat another.
    """
    digests = [hashlib.sha256(" ".join(report.split()).encode()).hexdigest() for report in reports]
    order = sorted(range(len(reports)), key=lambda row: (digests[row], row))
    return sorted(order[:DEVELOPMENT_REPORTS]), sorted(order[DEVELOPMENT_REPORTS:])


def baseline_labels(texts: Sequence[str], labels: NDArray[np.int64], queries: Sequence[str]) -> NDArray[np.int8]:
    """Train `BASELINE` on `texts` and `labels`; return its labels of `queries`, (queries, 18)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    known, asked = words.fit_transform(texts), words.transform(queries)
    found = np.zeros((len(queries), labels.shape[1]), np.int8)
    for column in range(labels.shape[1]):
        model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
        found[:, column] = model.fit(known, labels[:, column]).predict(asked)
    return found


def cross_validated(data: LabelledReports) -> NDArray[np.int8]:
    """Return the cross-validated labels of the baseline, (reports, 18)."""
    found = np.zeros_like(data.labels, dtype=np.int8)
    for fold in range(FOLDS):
        asked = np.arange(len(data)) % FOLDS == fold
        known = data.part(np.flatnonzero(~asked))
        found[asked] = baseline_labels(known.texts, known.labels, data.part(np.flatnonzero(asked)).texts)
    return found


def score(predicted: NDArray, actual: NDArray) -> dict:
    """Compute precision, recall and F1 with 95 % intervals over reports: micro, macro and per label."""
    scores, counts = classification_scores(predicted, actual, DIAGNOSIS_LABELS), label_counts(predicted, actual)

    def entry(values: dict, statistic: Statistic) -> dict:
        """Add intervals. `statistic` maps sums of counts (..., 3, labels) to precision, recall and F1 (..., 3)."""
        result = dict(values)
        for column, name in enumerate(SCORES):
            interval = bootstrap_counts(counts, lambda sums, column=column: statistic(sums)[..., column])
            result[f"{name}_ci"] = [interval.low, interval.high]
        return result

    labels = {
        label: entry(scores["labels"][label], lambda sums, column=column: precision_recall_f1(sums)[..., column])
        for column, label in enumerate(DIAGNOSIS_LABELS)
    }
    return {
        "n": len(actual),
        **{name: entry(scores[name], lambda sums, name=name: averages(sums)[name]) for name in AVERAGES},
        "labels": labels,
        "signature": f"{scores['signature']}|interval:bootstrap-{LEVEL:g}-{RESAMPLES}-seed-0",
    }


def compare(rules: NDArray, baseline: NDArray, actual: NDArray) -> dict:
    """Score both systems on one part, with the paired 95 % interval of the difference in F1."""
    counts = label_counts(rules, actual), label_counts(baseline, actual)
    differences = {}
    for name in AVERAGES:
        f1 = compare_counts(*counts, lambda sums, name=name: averages(sums)[name][..., SCORES.index("f1")])
        differences[name] = [f1.interval.low, f1.interval.high]
    return {
        "rules": score(rules, actual),
        "baseline": score(baseline, actual),
        "f1_difference_ci": differences,
    }


def reports_per_second(labeler: RuleLabeler, texts: Sequence[str]) -> float:
    """Measure the best of three runs in processor time, which excludes other work on the machine."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        labeler.label_all(texts)
        best = min(best, time.process_time() - start)
    return len(texts) / best


def judged_noise(path: Path, test: LabelledReports, predicted: NDArray) -> dict:
    """Read the disagreements judged as annotation errors, and score the rules with these labels corrected.

    Raises:
        ValueError: an entry is not a disagreement on the test part, or is listed twice.
    """
    entries = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else []
    corrected = test.labels.copy()
    for entry in entries:
        if entry["id"] not in test.ids:
            raise ValueError(f"{path.name}: {entry['id']} is not in the test part")
        row, column = test.ids.index(entry["id"]), DIAGNOSIS_LABELS.index(entry["label"])
        if predicted[row, column] == corrected[row, column]:
            raise ValueError(f"{path.name}: {entry['id']}, {entry['label']} is no disagreement, or listed twice")
        corrected[row, column] = predicted[row, column]
        entry["annotated"] = int(test.labels[row, column])
    scores = classification_scores(predicted, corrected, DIAGNOSIS_LABELS)
    return {
        "disagreements": int((predicted != test.labels).sum()),
        "judged": entries,
        "corrected": {name: scores[name]["f1"] for name in ("micro", "macro")},
    }


def evaluate(path: str | os.PathLike, output: str | os.PathLike, development_only: bool = False) -> Path:
    """Score both parts of the reports in `path`; write labeler.json and labeler.md into `output`."""
    labeler = RuleLabeler()
    data = read_reports(path)
    development, test = (data.part(rows) for rows in split_rows(data.texts))
    result = {
        "command": f"python -m diffvp.experiments.labeler {Path(path).name} --output {without_place(output)}"
        + (" --development" if development_only else ""),
        "signature": labeler.signature,
        "baseline": f"{BASELINE}; scikit-learn {version('scikit-learn')}",
        "reports_per_second": reports_per_second(labeler, development.texts),
        "split": {
            "development": {"n": len(development), "ids_sha256": development.ids_sha256()},
            "test": {"n": len(test), "ids_sha256": test.ids_sha256()},
        },
        "development": compare(labeler.label_all(development.texts), cross_validated(development), development.labels),
    }
    if not development_only:
        found = labeler.label_all(test.texts)
        trained = baseline_labels(development.texts, development.labels, test.texts)
        result["test"] = compare(found, trained, test.labels)
        result["noise"] = judged_noise(NOISE_FILE, test, found)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write_texts(output, {"labeler.json": json_text(result), "labeler.md": _page(result)})
    return output / "labeler.md"


def _table(part: dict) -> list[str]:
    rules, baseline = part["rules"], part["baseline"]
    rows = [("**micro**", rules["micro"], baseline["micro"]), ("**macro**", rules["macro"], baseline["macro"])]
    rows += [(label, rules["labels"][label], baseline["labels"][label]) for label in DIAGNOSIS_LABELS]
    cells = [
        [
            name,
            str(ours["support"]),
            *(with_interval(ours[score], ours[f"{score}_ci"]) for score in SCORES),
            with_interval(theirs["f1"], theirs["f1_ci"]),
        ]
        for name, ours, theirs in rows
    ]
    (low, high), (low_macro, high_macro) = (part["f1_difference_ci"][name] for name in AVERAGES)
    return [
        *table_lines(["label", "positives", "precision", "recall", "F1", "baseline F1"], cells),
        "",
        f"Rules minus baseline, F1, paired: micro {low:+.3f} to {high:+.3f}, macro {low_macro:+.3f} to "
        f"{high_macro:+.3f}.",
    ]


def _page(result: dict) -> str:
    """Write the results as Markdown."""
    development, test = result["split"]["development"], result["split"]["test"]
    lines = [
        "# Rule labeler against hand-set labels",
        "",
        f"Made by `{result['command']}`. Labeler `{result['signature']}`, {result['reports_per_second']:,.0f} reports "
        "per second of processor time on one core. Scores "
        f"`{result['development']['rules']['signature']}`; intervals are 95 % bootstrap intervals over reports.",
        f"Baseline: {result['baseline']}.",
        "",
        f"## Development part, n = {development['n']}",
        "",
        "The rules were written against these reports, so their scores are no estimate for new reports. The scores of "
        f"the baseline come from {FOLDS}-fold cross-validation.",
        "",
        *_table(result["development"]),
    ]
    if "test" in result:
        lines += [
            "",
            f"## Test part, n = {test['n']}",
            "",
            "These reports were not read or scored while the rules were written. Later rules cover wordings of other "
            "departments and programs and were written without looking at these reports. The baseline is trained on "
            "the development part.",
            "",
            *_table(result["test"]),
            "",
            "## Label noise",
            "",
            *_noise(result["noise"]),
        ]
    lines += [
        "",
        f"Split: the {development['n']} reports with the smallest SHA-256 of their text, and the others. SHA-256 of "
        f"the sorted ids: development `{development['ids_sha256'][:16]}`, test `{test['ids_sha256'][:16]}`.",
        "",
    ]
    return "\n".join(lines)


def _noise(noise: dict) -> list[str]:
    judged, corrected = noise["judged"], noise["corrected"]
    return [
        f"The rules disagree with the annotator on {noise['disagreements']} labels of the test part. The "
        f"{len(judged)} below look most like annotation errors, as judged by the author of the rules after the "
        f"scoring above. With these corrected, micro-F1 is {corrected['micro']:.3f} and macro-F1 "
        f"{corrected['macro']:.3f}. Errors that rules and annotator share do not show here.",
        "",
        *table_lines(
            ["report", "label", "annotated", "why it looks like an error"],
            [[entry["id"], entry["label"], str(entry["annotated"]), entry["reason"]] for entry in judged],
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Agreement of the rule labeler with hand-set labels.")
    parser.add_argument("csv", help="ctclip_train.csv: AccessionNo, report_text and the 18 labels")
    parser.add_argument("--output", default="experiments/results", help="folder for labeler.json and labeler.md")
    parser.add_argument("--development", action="store_true", help="skip the test part")
    arguments = parser.parse_args()
    Console().print(str(evaluate(arguments.csv, arguments.output, arguments.development)))


if __name__ == "__main__":
    main()
