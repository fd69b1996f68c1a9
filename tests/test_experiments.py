# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Experiments on a cohort of a few cases: training, comparisons and pages; and the YAML files that describe them."""

import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from sklearn.metrics import f1_score, precision_score, recall_score
from typer.testing import CliRunner

from diffvp.cli import app
from diffvp.configuration_diffvp import DiffVPConfig
from diffvp.data.cache import VolumeCache
from diffvp.data.phantom_cases import load_phantom
from diffvp.data.phantom_cohort import write_cohort
from diffvp.data.pool import is_normal
from diffvp.experiments import evaluate
from diffvp.experiments.kinds import score_table
from diffvp.experiments.kinds.stability import stability
from diffvp.experiments.processes import completed
from diffvp.experiments.references import choose_references, reference_pool
from diffvp.experiments.results_page import write_page
from diffvp.experiments.runner import load_table, planned_runs, run_experiment
from diffvp.experiments.runs import HeldOut, Run, RunError, batches, cases_sha256, changed_prompt, make_reports
from diffvp.experiments.study import Condition, StudyConfig, Variant, load_variants, table_names
from diffvp.experiments.system_scores import PhantomReader, compare_rows, row_summary, score_labels, score_system
from diffvp.inference.report import load_checkpoint
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.metrics.collapse import collapse_panel
from diffvp.metrics.nlg import LexiconError, meteor
from diffvp.metrics.statistics import detectable_difference
from diffvp.references_diffvp import ReferencePool

from .marks import slow_except

TABLE = {
    "title": "A table",
    "about": "About it.",
    "seeds": [1, 2],
    "metrics": ["bleu_4", "rouge_l", "f1"],
    "rows": [
        {"name": "DiffVP", "variant": "diffvp", "paper": {"f1": 0.421}},
        {"name": "equal compute", "variant": "target"},
        {"name": "prompt of zeros", "variant": "diffvp", "seeds": [1], "condition": {"prompt": "zeroed"}},
    ],
    "compare": [["DiffVP", "equal compute"]],
}

FOREIGNERS = [
    {"name": "theirs", "variant": "diffvp", "condition": {"patients": "foreign", "foreign": 1.0, "pool_size": 2}},
    {"name": "ours", "variant": "diffvp", "condition": {"patients": "foreign"}},
]


@pytest.fixture(scope="module")
def study(first_stage, tmp_path_factory):
    """Study whose models train in seconds, with an already trained classifier."""
    document = {
        "name": "small",
        "title": "A few phantoms.",
        "training": str(first_stage / "config.yaml"),
        "settings": {
            "stage": "report",
            "classifier": str(first_stage / "run/diagnosis"),
            "data.cache_dir": str(tmp_path_factory.mktemp("cache")),
            "report.epochs": 1,
        },
        "test": {"split": "train", "labeler": "phantom", "cases": 18, "batch_size": 8, "max_new_tokens": 12},
    }
    path = tmp_path_factory.mktemp("study") / "small.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "mine.yaml"
    path.write_text(yaml.safe_dump(TABLE))
    return str(path)


@pytest.fixture(scope="module")
def made(study, table, meteor_data, tmp_path_factory):
    """(study, folder of its runs, result file of the table)."""
    runs, loaded = tmp_path_factory.mktemp("runs"), StudyConfig.load(study)
    return loaded, runs, run_experiment(table, loaded, runs, tmp_path_factory.mktemp("results"))


@pytest.mark.parametrize("lacking", ["WordNet", "Punkt", "RadBERT"])
def test_missing_scoring_resources_are_reported_before_training(study, table, lacking, monkeypatch, request, tmp_path):
    command = ["experiment", table, "--study", str(study), "--runs", str(tmp_path), "--output", str(tmp_path)]
    if lacking == "RadBERT":
        request.getfixturevalue("meteor_data")
        command.append(f"test.labeler={tmp_path / 'absent'}")
    else:

        def missing(*_):
            raise LexiconError("METEOR needs it.")

        monkeypatch.setattr(meteor, "wordnet" if lacking == "WordNet" else "punkt", missing)
        monkeypatch.setattr(meteor, "punkt" if lacking == "WordNet" else "wordnet", lambda: None)
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("training started"))
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert ("RadBertError" if lacking == "RadBERT" else "LexiconError") in result.stderr


def test_unwritable_output_is_reported_before_training(study, table, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("training started"))
    command = ["experiment", table, "--study", str(study), "--runs", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "file/results")])
    assert result.exit_code == 2 and "output: below the file file (expected a file" in result.stderr


@pytest.fixture
def cases(small_cohort):
    return load_phantom(small_cohort, "train")


# The files


def test_every_table_and_variant_of_the_project_is_valid(repository_root):
    variants, study = load_variants(), StudyConfig.load(repository_root / "configs/study_phantom.yaml")
    assert {"table1", "table3", "table4", "table5", "table6", "table7", "table8", "table10", "fig5b"} <= set(
        table_names()
    )
    for name in table_names():
        load_table(name, variants)
    for variant in variants.values():
        config = study.training_config(variant, 21, "x")
        DiffVPConfig(**config.model)
        assert (config.lora is None) == (variant.name in ("frozen LLM, linear mapper", "decoder from scratch"))


def test_variant_changes_only_its_named_settings(repository_root):
    study = StudyConfig.load(repository_root / "configs/study_phantom.yaml")
    full, target = (study.training_config(load_variants()[key], 21, "x").model_dump() for key in ("diffvp", "target"))
    levels = [settings["model"].pop("difference_level") for settings in (full, target)]
    assert levels == ["aligned", "target"] and target == full


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"name": "a", "variant": "nosuch"}], "compare": []}, "no such variant: nosuch"),
        ({"compare": [["DiffVP", "nobody"]]}, "compare names"),
        ({"rows": TABLE["rows"] + TABLE["rows"][:1]}, "rows: .*distinct names"),
        (
            {"rows": [{"name": "a", "variant": "diffvp", "condition": {"pool": 3}}], "compare": []},
            r"wrong.yaml: rows.0: condition.pool: unknown \(expected pool_size\)",
        ),
        ({"rows": [*TABLE["rows"], FOREIGNERS[0]]}, "same patients"),
        ({"titles": "A table"}, r"wrong.yaml: titles: unknown \(expected title\)"),
        ({"seeds": "many"}, r"wrong.yaml: seeds: 'many' \(expected a valid list\)"),
        ({"kind": "nosuch"}, "no such kind: nosuch; expected one of scores, information"),
        ({"rows": FOREIGNERS, "compare": [], "kind": "cases"}, "patients: foreign is for a table of scores"),
    ],
)
def test_mistakes_in_a_table_are_named(tmp_path, change, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(TABLE | change))
    with pytest.raises(ValueError, match=message):
        load_table(str(path), load_variants())


def test_unknown_table_error_lists_the_known_ones():
    with pytest.raises(ValueError, match="no experiment 'table99'; expected one of .*table4"):
        load_table("table99", load_variants())


@pytest.mark.parametrize("study", ["phantom", "reference"])
def test_stored_page_matches_stored_results(repository_root, tmp_path, study):
    """If this fails after a change of wording, call `write_page` on the results folder."""
    stored = repository_root / "experiments/results" / study
    for path in stored.glob("*.json"):
        shutil.copy(path, tmp_path)
    assert write_page(tmp_path).read_text(encoding="utf-8") == (stored / "RESULTS.md").read_text(encoding="utf-8")


# References at test time


def test_pool_is_replaced_in_the_stated_proportions(cases):
    normal = {case.name for case in cases if is_normal(case)}
    foreign = [replace(case, name=f"foreign_{case.name}") for case in cases if is_normal(case)]
    for condition, counts in (
        (Condition(), (7, 0, 0)),
        (Condition(pool_size=4), (4, 0, 0)),
        (Condition(pool_size=4, abnormal=0.5), (2, 2, 0)),
        (Condition(foreign=1.0), (0, 0, 7)),
        (Condition(pool_size=6, abnormal=1 / 3, foreign=0.5), (1, 2, 3)),
    ):
        pool = reference_pool(cases, condition, 0, foreign)
        foreigners = {name for name in pool if name.startswith("foreign_")}
        ours = set(pool) & normal
        assert (len(ours), len(set(pool) - normal - foreigners), len(foreigners)) == counts, condition
        assert list(pool) == list(reference_pool(cases, condition, 0, foreign))
        assert all(name == case.name for name, case in pool.items())
    pools = {tuple(reference_pool(cases, Condition(pool_size=2), seed)) for seed in range(20)}
    assert len(pools) > 5
    with pytest.raises(ValueError, match="takes 8 normal scans; there are 7"):
        reference_pool(cases, Condition(pool_size=8), 0)
    with pytest.raises(ValueError, match="takes 7 foreign scans; there are 0"):
        reference_pool(cases, Condition(foreign=1.0), 0)


def test_references_are_drawn_by_name_and_never_the_case_itself(cases):
    pool = reference_pool(cases, Condition(), 0)
    chosen = choose_references(cases, pool, Condition(references=3), 5, None)
    assert all(len({r.name for r in of}) == 3 and case not in [r.name for r in of] for case, of in chosen.items())
    backwards = choose_references(cases[::-1], dict(reversed(pool.items())), Condition(references=3), 5, None)
    assert {case: [r.name for r in of] for case, of in backwards.items()} == {
        case: [r.name for r in of] for case, of in chosen.items()
    }
    assert len({of[0].name for of in chosen.values()}) > 3
    for case, of in chosen.items():  # by digests, as in all stored results
        ranked = sorted(set(pool) - {case}, key=lambda name, case=case: sha256(f"5:{case}:{name}".encode()).digest())
        assert [reference.name for reference in of] == ranked[:3]
    nearest = choose_references(
        cases, pool, Condition(choice="nearest"), 5, lambda case, other: abs(case.row - other.row)
    )
    for case in cases:
        others = [other for other in pool.values() if other.name != case.name]
        assert abs(nearest[case.name][0].row - case.row) == min(abs(other.row - case.row) for other in others)
    alone = dict(list(pool.items())[:1])
    with pytest.raises(ValueError, match="has 0 reference"):
        choose_references([next(iter(alone.values()))], alone, Condition(), 0, None)


@pytest.mark.parametrize("count", [2, 3, 17, 32, 33, 65])
def test_batches_have_at_least_two_cases(count):
    parts = batches(list(range(count)), 16)
    assert sum(parts, []) == list(range(count)) and all(2 <= len(part) <= 16 for part in parts)


def test_changed_prompt_is_shuffled_or_zeroed(make_model, scans):
    model = make_model()
    own = model.prompt_generator(*(torch.randn(2, model.config.latent_size) for _ in range(2)))
    prompts = []
    model.prompt_generator.register_forward_hook(lambda module, inputs, prompt: prompts.append(prompt))
    plain = model(*scans).logits
    for prompt in ("own", "shuffled", "zeroed"):
        with changed_prompt(model, prompt):
            logits = model(*scans).logits
        assert torch.equal(logits, plain) == (prompt == "own")
    assert torch.equal(model(*scans).logits, plain), "the change ends with its block"
    assert own.shape == prompts[0].shape
    swapped = [scan.flip(0) for scan in scans]
    with changed_prompt(model, "shuffled"):
        changed = model.embed_prompt(*scans)
    length = model.config.num_prefix_tokens
    for prompt, expected in zip(changed, model.embed_prompt(*swapped), strict=True):
        assert torch.equal(prompt[:length], expected[:length])
    with (
        pytest.raises(ValueError, match="no difference prompt"),
        changed_prompt(make_model(difference_level="none"), "zeroed"),
    ):
        pass


# Scores


def test_scores_agree_with_scikit_learn_and_scipy(cases, meteor_data):
    rng = np.random.default_rng(0)
    truth = np.stack([case.labels for case in cases])
    reports = [case.report for case in cases]
    assert (PhantomReader().label_all(reports) == truth).all()
    shuffled = [reports[index] for index in rng.permutation(len(reports))]
    scores = score_system(shuffled, cases, PhantomReader())
    predicted = truth[[reports.index(report) for report in shuffled]]
    assert scores.value("f1") == pytest.approx(f1_score(truth, predicted, average="micro"))
    assert scores.value("precision") == pytest.approx(precision_score(truth, predicted, average="micro"))
    assert (
        score_system(reports, cases, PhantomReader()).value("f1") == 1
        and score_system(reports, cases, PhantomReader()).value("bleu_4") == 1
    )

    systems = [{seed: score_labels(rng.random(truth.shape) < p, cases) for seed in range(4)} for p in (0.3, 0.6)]
    summary = row_summary(systems[0], ["f1", "bleu_4"])
    values = [system.value("f1") for system in systems[0].values()]
    assert summary["f1"]["mean"] == pytest.approx(np.mean(values))
    assert summary["f1"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert summary["f1"]["interval"][0] < summary["f1"]["mean"] < summary["f1"]["interval"][1]
    assert "bleu_4" not in summary, "labels without text have no BLEU"
    result = compare_rows(*systems, ["f1", "recall"])
    other = [system.value("f1") for system in systems[1].values()]
    assert result["f1"]["p_seeds"] == pytest.approx(stats.ttest_ind(values, other, equal_var=False).pvalue, rel=1e-6)
    assert result["f1"]["difference"] == pytest.approx(np.mean(values) - np.mean(other))
    paired = compare_rows(*systems, ["f1"], same_models=True)
    assert paired["f1"]["p_seeds"] == pytest.approx(stats.ttest_rel(values, other).pvalue, rel=1e-6)
    low, high = result["recall"]["interval"]
    assert low < result["recall"]["difference"] < high < 0
    tested = [result[metric]["p_seeds"] for metric in ("f1", "recall")]
    assert max(result[m]["p_seeds_holm"] for m in ("f1", "recall")) == pytest.approx(max(max(tested), 2 * min(tested)))


def test_evaluation_page_gives_an_interval_for_each_score(cases):
    """Check the page of `diffvp evaluate`."""
    rng = np.random.default_rng(0)
    truth = np.stack([case.labels for case in cases])
    predicted = np.where(rng.random(truth.shape) < 0.2, 1 - truth, truth)
    scores = evaluate.score([case.report for case in cases], predicted, cases)
    for name, function in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert scores[name] == pytest.approx(function(truth, predicted, average="micro"))
        assert scores[f"{name}_interval"][0] < scores[name] < scores[f"{name}_interval"][1]
    assert scores["bleu4"] == scores["rougeL"] == 1
    labels = evaluate.score_by_label(predicted, cases)
    expected = f1_score(truth, predicted, average=None, zero_division=0)
    assert [labels[label]["f1"] for label in DIAGNOSIS_LABELS] == pytest.approx(expected)
    for label in labels.values():
        assert label["f1_interval"][0] <= label["f1"] <= label["f1_interval"][1]
    page = evaluate.markdown_page(
        {
            "checkpoint": {"name": "x", "sha256": {"model.safetensors": "0" * 64}},
            "dataset": {"name": "scans", "split": "test", "phantoms": False},
            "intended_domain": None,
            "cases": len(cases),
            "training_cases": 7,
            "command": "diffvp evaluate",
            "systems": {"DiffVP": scores, "labels alone": evaluate.score(None, predicted, cases)},
            "per_label": labels,
            "collapse": {"DiffVP": collapse_panel([case.report for case in cases], truth, PhantomReader())},
            "rare": ["Emphysema"],
            "text_agrees_with_classifier": evaluate.mean_with_interval(np.array([0.5, 1.0])),
            "signatures": ["signature"],
        }
    )
    assert "| distinct reports / n |" in page and "classifier that prompted it: 0.750 (" in page
    [row] = [line for line in page.splitlines() if line.startswith("| DiffVP |")]
    assert row.count("–") == 5 and "| no text | no text |" in page and "`signature`" in page


def test_scans_are_encoded_once_for_reports_and_nearest_training_report(made, cases, tmp_path, monkeypatch):
    model, processor = load_checkpoint(made[1] / "small/diffvp/seed-1/model")
    model.merge_adapter()
    model.generation_config.max_new_tokens = 12
    tested, normal = cases[:3], [case for case in cases if is_normal(case)]
    expected = evaluate.pooled_features(model, VolumeCache(tmp_path, processor.image_processor), tested, "test")
    processor.reference_pool = ReferencePool.of_paths({case.name: case.volume for case in normal})
    encoded, extract = [], type(model).extract_features
    monkeypatch.setattr(type(model), "extract_features", lambda self, ct: encoded.append(len(ct)) or extract(self, ct))
    outputs = evaluate.generate_reports(model, processor, tested)
    assert encoded == [3, 3], "scans and references"
    np.testing.assert_allclose(outputs.pooled, expected, atol=0.01)  # from volumes in half precision
    assert outputs.probabilities.shape == (3, 18)
    # References of a dataset, which its tables describe, are chosen as the processor chooses them.
    assert evaluate.generate_reports(model, processor, tested, pool=normal).reports == outputs.reports


def test_stability_counts_changes_with_the_reference():
    class Reader:
        signature = "words"

        def label_all(self, reports):
            return np.array([[label in report for label in DIAGNOSIS_LABELS] for report in reports], np.int8)

    def draw(*rows):
        return [{"references": [reference], "report": report} for reference, report in rows]

    first, second = DIAGNOSIS_LABELS[:2]
    content = stability(
        [
            draw(("a", f"{first} and {second}"), ("a", "nothing"), ("a", first)),
            draw(("b", f"{second} and {first}"), ("a", "nothing"), ("b", second)),
            draw(("c", first), ("a", "nothing"), ("c", f"{first} and {second}")),
        ],
        Reader(),
    )
    assert content["draws"] == content["cases"] == 3 and content["changed"] == pytest.approx(2 / 3)
    assert content["identical"]["mean"] == pytest.approx(1 / 3)
    assert content["findings"]["mean"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert content["overlap"]["mean"] == pytest.approx(((1 + 0.5 + 0.5) / 3 + 1 + (0 + 0.5 + 0.5) / 3) / 3)
    assert content["flips"][first] == pytest.approx(1 / 3) and content["flips"][second] == pytest.approx(2 / 3)
    low, high = content["overlap"]["interval"]
    assert low < content["overlap"]["mean"] < high


# Complete experiments


def read_reports(path):
    return json.loads(gzip.decompress(path.read_bytes()))["reports"]


def test_experiment_writes_scores_and_page(made):
    loaded, _, result = made
    document = json.loads(result.read_text())
    assert [row["seeds"] for row in document["rows"]] == [[1, 2], [1, 2], [1]]
    assert document["cases"] == 18 and document["rows"][0]["paper"] == {"f1": 0.421}
    assert {row["name"] for row in document["baselines"]} >= {"constant normal report", "nearest training report"}
    reports = read_reports(result.parent / "reports/diffvp/seed-1/random.json.gz")
    normal = {case.name for case in load_phantom(loaded.training["data"]["root"], "train")[:18] if is_normal(case)}
    assert all(set(row["references"]) <= normal - {row["id"]} for row in reports)
    page = write_page(result.parent).read_text()
    f1 = document["rows"][0]["scores"]["f1"]
    assert f"{f1['mean']:.3f} ± {f1['std']:.3f}" in page and "| DiffVP | 0.421 |" in page
    assert "Does the difference prompt help" in page.splitlines()[4]
    for row in document["rows"] + document["baselines"]:
        assert f"| {row['name']} |" in page


@pytest.mark.parametrize(("ours", "verdict"), [((0.1, 0.2, 0.3), "is the paper's"), ((0.1, 0.3, 0.2), "is not the")])
def test_page_compares_the_component_order_with_the_paper(made, tmp_path, ours, verdict):
    document = json.loads(made[2].read_text())
    first = document["rows"][0]
    for name, paper, f1 in zip("abc", (0.159, 0.256, 0.421), ours, strict=True):
        scores = first["scores"] | {"f1": first["scores"]["f1"] | {"mean": f1}}
        document["rows"].append(first | {"name": name, "paper": {"f1": paper}, "scores": scores})
    del document["rows"][0]["paper"]["f1"]
    (tmp_path / "mine.json").write_text(json.dumps(document))
    order = write_page(tmp_path).read_text().splitlines()[6]
    assert verdict in order and ("(a < b < c)" in order) == (verdict == "is not the")
    assert ("a 0.100 < b 0.200 < c 0.300" in order) == (verdict == "is the paper's")


@pytest.mark.parametrize(("least", "words"), [(0.0, "above it: DiffVP"), (1.0, "above it: none.")])
def test_page_lists_models_above_the_nearest_report_baseline(made, tmp_path, least, words):
    document = json.loads(made[2].read_text())
    document["experiment"], document["rows"][0]["scores"]["f1"]["mean"] = "mine", 0.5
    for row in document["baselines"]:
        if row["name"] == "nearest training report":
            row["scores"]["f1"]["mean"] = least
    (tmp_path / "mine.json").write_text(json.dumps(document))
    assert f"gives a micro-F1 of {least:.3f}. Rows of `mine` {words}" in write_page(tmp_path).read_text()


def test_new_score_has_its_own_name_on_the_page(made):
    document = json.loads(made[2].read_text().replace('"bleu_4"', '"new_score"'))
    page = score_table.lines(document)
    assert page[0].split(" | ")[2:4] == ["new_score", "ROUGE-L"]
    assert any(line.startswith("| difference | new_score |") for line in page)


def results(path: Path) -> dict:
    """Return a stored result without its command, which names the folders of the run."""
    document = json.loads(path.read_text())
    assert document.pop("command").startswith("diffvp experiment ")
    return document


def test_finished_experiment_is_not_repeated(made, study, table, tmp_path):
    loaded, runs, result = made
    document = results(result)
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    again = run_experiment(table, loaded, runs, tmp_path / "again")
    assert results(again) == document
    assert written == {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    baselines = result.parent / "reports/baselines-own.json"
    assert loaded.training["data"]["root"] not in baselines.read_text(), "local paths are not stored"
    baselines.unlink()
    from_reports = run_experiment(table, loaded, tmp_path / "no runs", result.parents[1])
    assert results(from_reports) == document and baselines.is_file()
    assert not list(tmp_path.rglob("*.safetensors")), "no model is trained if its reports exist"
    other = StudyConfig.load(study, ["training.report.learning_rate=0.5"])
    with pytest.raises(RunError, match="report.learning_rate was 0.001, is 0.5"):
        run_experiment(table, other, runs, tmp_path / "results")


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_experiment_is_reproducible(made, study, table, tmp_path, jobs):
    document = json.loads(made[2].read_text())
    elsewhere = StudyConfig.load(study, [f"training.data.cache_dir={tmp_path / 'cache'}"])
    from_nothing = run_experiment(table, elsewhere, tmp_path / "runs", tmp_path / "results", seeds=[1], jobs=jobs)
    if jobs > 1:
        assert (tmp_path / "runs/small/target/seed-1/log.txt").stat().st_size > 0
    for row, expected in zip(json.loads(from_nothing.read_text())["rows"], document["rows"], strict=True):
        for metric, score in row["scores"].items():
            assert score["by_seed"]["1"] == expected["scores"][metric]["by_seed"]["1"]


def test_plan_lists_the_remaining_work(made, table, tmp_path):
    """Stored reports suffice for a table of scores, but not for experiments that need the model itself."""
    loaded, runs, result = made
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump(TABLE | {"rows": [*TABLE["rows"], TABLE["rows"][2] | {
        "name": "another", "seeds": [2]}]}))  # fmt: skip
    inside = tmp_path / "inside.yaml"
    inside.write_text(
        yaml.safe_dump(TABLE | {"kind": "importance", "seeds": [1], "rows": TABLE["rows"][:1], "compare": []})
    )

    def left(name, folder: str) -> list[str]:
        return [left for _, left in planned_runs(str(name), loaded, Path(folder), result.parents[1], None)]

    assert left(table, runs) == left(table, tmp_path) == ["made"] * 4
    assert left(more, runs) == ["made", "to write", "made", "made"]
    assert left(more, tmp_path) == ["made", "to train", "made", "made"]
    assert (left(inside, runs), left(inside, tmp_path)) == (["made"], ["to train"])


@pytest.mark.slow
def test_experiments_on_model_internals_train_without_reports(study, tmp_path):
    path = tmp_path / "inside.yaml"
    row = {"name": "ours", "variant": "diffvp"}
    path.write_text(yaml.safe_dump(TABLE | {"kind": "importance", "seeds": [1], "rows": [row], "compare": []}))
    result = run_experiment(str(path), StudyConfig.load(study), tmp_path / "runs", tmp_path / "results", jobs=2)
    assert (tmp_path / "runs/small/diffvp/seed-1/log.txt").stat().st_size > 0
    assert not (result.parent / "reports").exists() and result.with_suffix(".png").is_file()
    assert list(json.loads(result.read_text())["provenance"]["weights"]) == ["ours, seed 1"]


def test_reports_of_two_models_in_one_row_are_refused(made, table, tmp_path):
    """For a new condition the model is trained; existing reports must come from the same model."""
    loaded, _, result = made
    shutil.copytree(result.parent / "reports", tmp_path / "small/reports")
    (tmp_path / "small/reports/diffvp/seed-1/prompt_zeroed.json.gz").unlink()
    path = tmp_path / "small/reports/diffvp/seed-1/random.json.gz"
    document = json.loads(gzip.decompress(path.read_bytes()))
    document["made_by"]["weights"] = "of another machine"
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    with pytest.raises(RunError, match="weights was of another machine.*another folder of results"):
        run_experiment(table, loaded, tmp_path / "runs", tmp_path, seeds=[1])


@pytest.mark.slow
def test_foreign_patients_are_tested_with_either_reference_pool(made, study, tmp_path_factory, tmp_path):
    """Foreign patients are tested on the models of the study, with references of either scanner."""
    _, runs, result = made
    of_two_models = json.loads(result.read_text())["comparisons"][0]
    root = write_cohort(tmp_path_factory.mktemp("b"), train=0, valid=8, seed=13, matrix=48, workers=1, progress=False)
    path = tmp_path / "foreigners.yaml"
    path.write_text(yaml.safe_dump(TABLE | {"seeds": [1], "rows": FOREIGNERS, "compare": [["theirs", "ours"]]}))
    with pytest.raises(ValueError, match="study small: foreign: missing"):
        run_experiment(str(path), StudyConfig.load(study), runs, tmp_path / "results")
    loaded = StudyConfig.load(study, ["foreign.layout=phantom", f"foreign.root={root}", "foreign.split=valid"])
    document = json.loads(run_experiment(str(path), loaded, runs, tmp_path / "results").read_text())
    foreign = {case.name: case for case in load_phantom(root, "valid")}
    own = {case.name for case in HeldOut(loaded).cases}
    assert document["cases"] == len(foreign) and document["baselines"]
    assert document["comparisons"][0]["same_models"] and not of_two_models["same_models"]
    stored = json.loads((tmp_path / "results/small/reports/baselines-foreign.json").read_text())
    assert stored["made_by"]["cases"] == cases_sha256(list(foreign.values()))  # phantoms of another seed share names
    for name, pool in (("patients_foreign-pool_size_2-foreign_1.0", set(foreign)), ("patients_foreign", own)):
        folder = tmp_path / "results/small/reports/diffvp/seed-1"
        reports = json.loads(gzip.decompress((folder / f"{name}.json.gz").read_bytes()))["reports"]
        assert [row["id"] for row in reports] == list(foreign)
        assert {of for row in reports for of in row["references"]} <= pool


def test_reports_without_a_newer_condition_field_stay_valid(made, table, tmp_path):
    loaded, runs, result = made
    shutil.copytree(result.parent / "reports", tmp_path / "small/reports")
    path = tmp_path / "small/reports/diffvp/seed-1/random.json.gz"
    document = json.loads(gzip.decompress(path.read_bytes()))
    del document["made_by"]["condition"]["patients"]
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    assert results(run_experiment(table, loaded, runs, tmp_path)) == results(result)
    document["made_by"]["condition"]["abnormal"] = 0.5
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    with pytest.raises(RunError, match="condition.abnormal was 0.5, is 0.0"):
        run_experiment(table, loaded, runs, tmp_path)


class InlinePool(Executor):
    """Run each task when it is submitted, like a free worker."""

    def submit(self, task, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(task(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future


def test_no_task_is_submitted_before_a_worker_is_free():
    """No task starts after the first failure, such as an interrupted one."""
    begun = []

    def task(number: int) -> int:
        begun.append(number)
        if number == 4:
            raise KeyboardInterrupt
        return number

    tasks = [(task, number) for number in range(20)]
    assert sorted(future.result() for future in completed(InlinePool(), tasks[:4], 2)) == begun == [0, 1, 2, 3]
    begun.clear()
    with pytest.raises(KeyboardInterrupt):
        for future in completed(InlinePool(), tasks, 2):
            future.result()
    assert begun == [0, 1, 2, 3, 4, 5], "the sixth was already running"


@pytest.mark.slow
def test_sigterm_stops_workers(study, table, meteor_data, tmp_path):
    """Otherwise the workers would continue unnoticed; their progress is saved."""
    settings = ["training.report.epochs=1000", f"--runs={tmp_path / 'runs'}", f"--output={tmp_path / 'results'}"]
    command = [sys.executable, "-m", "diffvp.cli", "experiment", table, f"--study={study}", *settings, "--jobs=2"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    logs = [tmp_path / f"runs/small/diffvp/seed-{seed}/report.jsonl" for seed in (1, 2)]
    while process.poll() is None and not all(log.is_file() and log.stat().st_size for log in logs):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    try:
        output = process.communicate(timeout=60)[0]  # returns after the last process that holds the pipe has ended
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 128 + signal.SIGTERM, output.decode()
    assert all(list((log.parent / "checkpoints").rglob("*.safetensors")) for log in logs)


def test_page_reports_the_replication_on_new_seeds(made, tmp_path):
    document = json.loads(made[2].read_text())
    [comparison] = [of for of in document["comparisons"] if of["second"] == "equal compute"][:1]
    first = dict(zip(("difference", "interval", "p_seeds"), (0.017, [0.004, 0.03], 0.281), strict=True))
    again = dict(zip(("difference", "interval", "p_seeds"), (-0.003, [-0.012, 0.007], 0.851), strict=True))
    for name, f1 in (("table4", first), ("replication", again)):
        metrics = comparison["metrics"] | {"f1": comparison["metrics"]["f1"] | f1}
        changed = {"experiment": name, "comparisons": [comparison | {"metrics": metrics}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(document | changed))
    page = write_page(tmp_path).read_text()
    assert "without a reference is +0.017 (95 % interval over cases +0.004 to +0.030" in page
    assert "chosen before any of them was trained, it is -0.003 (-0.012 to +0.007; p = 0.851)." in page
    sides = [
        list(row["scores"]["f1"]["by_seed"].values())
        for row in document["rows"]
        if row["name"] in ("DiffVP", "equal compute")
    ]
    if any(len(set(side)) > 1 for side in sides):  # the smallest detectable difference with these few seeds
        assert page.count(f"a power of 80% for a difference of {detectable_difference(*sides):.3f}") == 2
    del metrics["f1"]["p_seeds"]  # a trial with one seed
    (tmp_path / "replication.json").write_text(json.dumps(document | changed))
    assert "chosen before any of them" not in write_page(tmp_path).read_text()


def test_page_lists_reports_written_on_a_gpu(made, study, table, tmp_path):
    """Rounding differs on a GPU, so the same command on a CPU may not reproduce these reports exactly."""
    _, runs, result = made
    stored = tmp_path / "results/small/reports"
    shutil.copytree(result.parent / "reports", stored)
    path = stored / "target/seed-2/random.json.gz"
    document = json.loads(gzip.decompress(path.read_bytes()))
    assert document["made_on"]["device"] == "cpu" and document["made_on"]["versions"]["torch"] == version("torch")
    document["made_on"]["device"] = "NVIDIA H200"
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    older = stored / "target/seed-1/random.json.gz"  # written before the device was recorded
    document = json.loads(gzip.decompress(older.read_bytes()))
    del document["made_on"]
    older.write_bytes(gzip.compress(json.dumps(document).encode()))
    again = run_experiment(table, StudyConfig.load(study), runs, tmp_path / "results")
    assert json.loads(again.read_text())["provenance"]["devices"]["NVIDIA H200"] == ["equal compute"]
    assert "Reports written on a GPU (NVIDIA H200): equal compute." in write_page(again.parent).read_text()


def test_baselines_are_computed_once_for_all_seeds(made, study, table, tmp_path, monkeypatch):
    """Baselines do not depend on the seed, and their features take minutes."""
    _, runs, result = made
    stored = tmp_path / "results/small/reports"
    shutil.copytree(result.parent / "reports", stored)
    monkeypatch.setattr(score_table, "make_baselines", lambda *_: pytest.fail("baselines were computed again"))
    before = (stored / "baselines-own.json").read_bytes()
    run_experiment(table, StudyConfig.load(study), runs, tmp_path / "results", seeds=[2])
    assert (stored / "baselines-own.json").read_bytes() == before


@pytest.mark.slow
def test_another_labeler_recomputes_the_scores(made, study, table, tmp_path):
    _, runs, result = made
    ours = results(result)
    other = StudyConfig.load(study, ["test.labeler=rules"])
    document = json.loads(run_experiment(table, other, runs, tmp_path / "results").read_text())
    assert "labeler:phantom-reader" in ours["signature"] and "labeler:rule-labeler" in document["signature"]
    stored = json.loads((tmp_path / "results/small/reports/baselines-own.json").read_text())
    assert "labeler:rule-labeler" in stored["made_by"]["signature"]
    again = run_experiment(table, StudyConfig.load(study), runs, tmp_path / "results")
    assert results(again) == ours


@pytest.mark.slow
def test_language_model_judge_is_reported_next_to_the_rules(made, tmp_path):
    pytest.importorskip("openai", reason='the judge needs the extra "judge": pip install -e ".[judge]"')
    from diffvp.metrics.judge.answers import AnswerFile
    from diffvp.metrics.judge.model import ModelJudge
    from diffvp.metrics.judge.server import ChatServer as Chat

    from .chat_server import ChatServer, answer

    loaded, runs, _ = made
    rows = [{"name": "ours", "variant": "diffvp"}, {"name": "control", "variant": "target"}]
    figure = {"title": "A figure", "about": "About it.", "kind": "lesions", "seeds": [1], "rows": rows}
    path = tmp_path / "fig.yaml"
    path.write_text(yaml.safe_dump({**figure, "compare": [["ours", "control"]]}))
    with ChatServer(lambda prompt, number: answer("Report A")) as served:
        with Chat(served.url, "always A") as chat, AnswerFile(tmp_path / "answers.jsonl") as file:
            judge = ModelJudge(chat, file, workers=4)
            result = run_experiment(str(path), loaded, runs, tmp_path / "results", judge=judge)
    document, page = json.loads(result.read_text()), write_page(result.parent).read_text()
    rules, model = document["wins"]
    assert rules["judge"] == "rules" and list(model["dimensions"]) != list(rules["dimensions"])
    assert {of["value"] for of in model["dimensions"].values()} == {0.5}
    assert {of["value"] for of in document["calibration"]["agreement"].values()} == {0.5}
    assert "NEAR CHANCE in coverage, specificity, quantification" in page


KINDS = "importance", "lesions", "cases", "stability", "information", "maps"


@pytest.mark.parametrize("kind", slow_except(KINDS[:4], KINDS))
def test_every_figure_kind_reuses_the_runs(made, kind, tmp_path):
    loaded, runs, _ = made
    tested = load_phantom(loaded.training["data"]["root"], "train")[:18]
    ill = sum(not is_normal(case) for case in tested)
    rows = [{"name": "ours", "variant": "diffvp"}]
    control = {"variant": "diffvp", "condition": {"draw": 9}} if kind == "stability" else {"variant": "target"}
    rows += [] if kind == "importance" else [{"name": "control", **control}]
    figure = {"title": "A figure", "about": "About it.", "kind": kind, "seeds": [1], "rows": rows}
    figure["compare"] = [["ours", "control"]] if kind == "lesions" else []
    path = tmp_path / "fig.yaml"
    path.write_text(yaml.safe_dump(figure))
    result = run_experiment(str(path), loaded, runs, tmp_path / "results")
    document, page = json.loads(result.read_text()), write_page(result.parent).read_text()
    if kind == "importance":
        assert (result.parent / document["picture"]).stat().st_size > 1000 and document["picture"] in page
        assert document["figure"]["ours"]["targets"]["abnormal"]["difference"]["cases"] == ill
    elif kind == "lesions":
        findings = sum(case.labels.sum() for case in tested)
        assert document["figure"]["control"]["counts"]["findings"] == findings
        for of in document["wins"][0]["dimensions"].values():
            assert of["wins"] + of["losses"] + of["split"] == of["n"] == ill
        assert "| ours against control | specificity |" in page
        assert (result.parent / document["picture"]).stat().st_size > 1000 and document["picture"] in page
    elif kind == "stability":
        assert document["figure"]["draws"] == 2 and 0.5 < document["figure"]["changed"] <= 1
        assert "| the same findings |" in page
    elif kind == "information":
        ours, control = document["figure"]["ours"], document["figure"]["control"]
        assert sum(ours["variance"].values()) == pytest.approx(1) and "variance" not in control
        assert ours["test_cases"] == len(tested) and "| control | visual tokens |" in page
        told = ours["prompt"]["shares"].values()
        assert sum(of["count"] for of in told) == 18 * len(tested) and "micro-F1 of the prompt" in page
        assert (
            f"{ours['variance']['patient']:.1%} of the variance of its difference prompt depends on the patient alone"
            in page.splitlines()[6]
        )
    elif kind == "maps":
        pointing = document["figure"]["ours"]["maps"]["pixel"]["pointing_body"]["mean"]
        assert f"for subtracted voxels in {pointing:.0%}" in page.splitlines()[6]
        assert (result.parent / document["picture"]).stat().st_size > 1000
    else:
        assert [set(case) for case in document["figure"]] == [{"id", "true", "ours", "control"}] * len(
            document["figure"]
        )
        assert document["figure"][0]["true"] in page
    document["provenance"]["devices"] = {"NVIDIA H200": ["control"]}
    result.write_text(json.dumps(document))
    assert "Reports written on a GPU (NVIDIA H200): control." in write_page(result.parent).read_text()


def test_reports_of_other_weights_are_refused(study, tmp_path):
    run = Run(StudyConfig.load(study), Variant(name="x", about="x"), "x", 1, tmp_path / "x", tmp_path / "reports")
    test = HeldOut(run.study)
    make_reports(run, test, Condition())
    path = run.folder / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(RunError, match="model.safetensors was"):
        make_reports(run, test, Condition())


VARIANTS = "linear", "scratch", "pixel", "regions", "subtraction", "baseline"


@pytest.mark.parametrize("key", slow_except(VARIANTS[:2], VARIANTS))
def test_every_conditioning_variant_trains_and_writes_reports(study, key, tmp_path):
    variant = load_variants()[key]
    if key == "scratch":
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "num_key_value_heads": 2, "max_position_embeddings": 4096}  # fmt: skip
        variant = variant.model_copy(update={"settings": variant.settings | {"base.from_scratch": small}})
    run = Run(StudyConfig.load(study), variant, key, 1, tmp_path / key, tmp_path / "reports")
    reports = make_reports(run, HeldOut(run.study), Condition())["reports"]
    assert len(reports) == 18 and all(isinstance(row["report"], str) for row in reports)
    model, _ = run.load()
    assert model.config.use_diagnosis == (key == "pixel")
    if key == "scratch":
        assert model.config.base_model_name_or_path is None and model.language_model.config.hidden_size == 16
    assert DIAGNOSIS_LABELS == tuple(model.config.diagnosis_labels)


def test_command_prints_the_plan_and_names_mistakes(study, table, tmp_path):
    command = ["experiment", table, "--study", str(study), "--runs", str(tmp_path / "runs")]
    plan = CliRunner().invoke(app, [*command, "--dry-run"])
    assert plan.exit_code == 0 and plan.output.count("to train") == 4, plan.output
    assert not (tmp_path / "runs").exists()
    wrong = CliRunner().invoke(app, [*command, "training.report.epoch=3", "--dry-run"])
    assert wrong.exit_code == 2 and "report.epoch" in wrong.output
    unknown = CliRunner().invoke(app, ["experiment", "table99", "--study", str(study)])
    assert unknown.exit_code == 2 and "table4" in unknown.output


# The study on RadGenome-ChestCT


@pytest.fixture(scope="module")
def radgenome(small_cohort, tmp_path_factory):
    """Twenty phantoms in the layout of RadGenome-ChestCT: 14 for training and 6 for the test, three of them normal."""
    root = tmp_path_factory.mktemp("radgenome")
    cases = load_phantom(small_cohort, "train")
    normal, ill = ([case for case in cases if is_normal(case) == wanted] for wanted in (True, False))
    for split, long, chosen in (
        ("train", "train", normal[3:7] + ill[3:13]),
        ("valid", "validation", normal[:3] + ill[:3]),
    ):
        regions, disorders, labels = [], [], []
        for number, case in enumerate(chosen, start=1):
            name = f"{split}_{number}_a_1.nii.gz"
            hu = np.asarray(nib.load(case.volume).dataobj)
            grid = np.ix_(*(np.arange(size) * of // size for size, of in zip((160, 150, 40), hu.shape, strict=True)))
            path = root / f"dataset/{split}_preprocessed/{split}_{number}/{split}_{number}a/{name}"
            path.parent.mkdir(parents=True)
            nib.save(nib.Nifti1Image(hu[grid].astype(np.float32), np.eye(4)), path)
            regions += [(name, "", case.report), *((name, *of) for of in case.region_sentences.items())]
            disorders.append((name, "no findings" if is_normal(case) else "a finding"))
            labels.append((name, *case.labels))
        for path, columns, rows in (
            (f"radgenome_files/{long}_region_report.csv", ("Volumename", "Anatomy", "Sentence"), regions),
            (f"radgenome_files/{long}_case_disorders.csv", ("Volumename", "Disorders"), disorders),
            (f"multi_abnormality_labels/{split}_predicted_labels.csv", ("VolumeName", *DIAGNOSIS_LABELS), labels),
        ):
            (root / "dataset" / path).parent.mkdir(exist_ok=True)
            with open(root / "dataset" / path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *rows])
    return root


@pytest.mark.slow  # the layout is tested in test_layouts.py, a study on phantoms above
def test_paper_study_runs_on_the_radgenome_layout(
    radgenome, first_stage, tiny_base_with_tokenizer, repository_root, table, meteor_data, tmp_path
):
    small = yaml.safe_load((first_stage / "config.yaml").read_text())
    overrides = {
        "training.data.root": str(radgenome),
        "training.data.cache_dir": str(tmp_path / "cache"),
        "training.classifier": str(first_stage / "run/diagnosis"),
        "training.base": small["base"],
        "training.model": small["model"],
        "training.lora": small["lora"],
        "training.image_processor": small["image_processor"],
        "training.report.epochs": 1,
        "training.num_workers": 0,
        "training.log_with": [],
        "test.max_new_tokens": 8,
    }
    path = repository_root / "configs/study_radgenome.yaml"
    command = ["experiment", table, "--study", str(path), "--seed", "1", "--runs", str(tmp_path / "runs")]
    command += [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    plan = CliRunner().invoke(app, [*command, "--dry-run"])
    assert plan.exit_code == 0 and plan.output.count("to train") == 2, plan.output
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "results"), "--workers", "1"])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "results/radgenome/mine.json").read_text())
    assert document["cases"] == 6 and "labeler:rule-labeler" in document["signature"]
    reports = read_reports(tmp_path / "results/radgenome/reports/diffvp/seed-1/random.json.gz")
    assert {name for row in reports for name in row["references"]} <= {f"valid_{number}_a_1" for number in (1, 2, 3)}


def test_paper_study_can_be_planned_without_data(repository_root, tmp_path, monkeypatch):
    monkeypatch.chdir(repository_root)
    command = ["experiment", "table4", "--study", "configs/study_radgenome.yaml", "--dry-run"]
    plan = CliRunner().invoke(app, [*command, "--runs", str(tmp_path)])
    assert plan.exit_code == 0, plan.output
    assert "No data at RadGenome-ChestCT" in plan.output and plan.output.count("to train") == 30
    assert "parameters" in plan.output
