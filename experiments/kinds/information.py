# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Information in the prompts of a model about the findings and about the reference.

- [`probe`]: findings that a logistic regression reads from a part of the input. It estimates what an LLM could write.
- [`variance_shares`]: dependence of the difference prompt on the patient, the reference, and their combination.
- [`latent_overlap`]: similarity of the latent tokens in attention and in their difference from the reference.
- [`prompt_following`]: agreement between the findings of the diagnosis prompt and those of the report.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ...data.cases import Case
from ...data.pool import is_normal
from ...metrics.markdown import table_lines
from ...modeling_diffvp import DiffVPForConditionalGeneration
from ...progress import counted
from ...training.cohort import load_cohort
from ...training.diagnosis_stage import micro_f1
from ...training.features import Features
from ..references import choose_references
from ..runs import Run, model_inputs, scan_inputs
from ..study import Condition
from ..system_scores import row_summary, score_labels
from .material import Kind, Material, Needs, device_lines, mean_cell

COMPONENTS = 128  # largest number of principal components: with more, regressions overfit 1,000 cases
BATCH = 32
PATIENTS, REFERENCES = 40, 10  # in the analysis of variance


def content(material: Material) -> dict:
    """Measure [`score_information`] for the first model of each row."""
    test, reports = material.test, material.first_reports()
    figure = {}
    for name, run, model, features, references in material.first_models():
        written = material.labeler.label_all([row["report"] for row in reports[name]])
        training = training_references(run)
        figure[name] = score_information(model, features, training, (test.cases, references), written)
    return {"figure": figure}


def lines(document: dict) -> list[str]:
    """Write the probes, the analysis of variance and the agreement of reports with their prompts."""
    figure = document["figure"]
    rows = [
        [name, part, f"{of['auroc']:.3f}", mean_cell(of["f1"])]
        for name, model in figure.items()
        for part, of in model["probes"].items()
    ]
    first = next(iter(figure.values()))
    note = (
        f"Logistic regressions on at most {COMPONENTS} principal components, fitted on {first['training_cases']} "
        f"training cases. Mean AUROC over labels, and micro-F1 at a threshold of 0.5, on {first['test_cases']} test "
        "cases. References are drawn at random and carry no information about the patient (0.5). Parts computed from "
        "scan and reference can at best keep the information of the scan."
    )
    compared = {name: model for name, model in figure.items() if "variance" in model}
    shares = [
        [name, *(f"{model['variance'][key]:.1%}" for key in ("patient", "reference", "interaction")),
         *(f"{model['overlap'][key]:.2f}" for key in ("attention", "difference"))]
        for name, model in compared.items()
    ]  # fmt: skip
    head = ["difference prompt of", "variance: patient", "reference", "interaction",
            "shared attention of two latents", "cosine of their differences"]  # fmt: skip
    page = [*table_lines(["model", "part", "AUROC", "micro-F1"], rows), "", note, "", *table_lines(head, shares), ""]
    told = {name: model["prompt"] for name, model in figure.items() if "prompt" in model}
    if told:
        head = ["stated in reports, of findings", *next(iter(told.values()))["shares"], "micro-F1 of the prompt"]
        rows = [
            [name, *(_share(of) for of in model["shares"].values()), f"{model['f1']:.3f}"]
            for name, model in told.items()
        ]
        page += [
            *table_lines(head, rows),
            "",
            "Told: named by the diagnosis prompt, which is predicted by the classifier.",
            "",
        ]
    return page + device_lines(document)


def _share(of: dict) -> str:
    return "none" if of["written"] is None else f"{of['written']:.1%} of {of['count']}"


def observations(document: dict) -> list[str]:
    """Summarize the first model in sentences for the top of the page."""
    first = next(iter(document["figure"].values()))
    sentences = []
    if "variance" in first:
        shares = first["variance"]
        sentences.append(
            f"{shares['patient']:.1%} of the variance of its difference prompt depends on the patient alone, "
            f"{shares['reference']:.1%} on the reference alone, and {shares['interaction']:.1%} on their combination."
        )
    if "prompt" in first:
        share = {name: of["written"] for name, of in first["prompt"]["shares"].items()}
        if None not in share.values():
            sentences.append(
                f"Its reports state {share['told, true']:.0%} of the true and {share['told, false']:.0%} of the false "
                f"findings that the diagnosis prompt names, and {share['not told, true']:.0%} of the true and "
                f"{share['not told, false']:.0%} of the false findings that it does not name."
            )
    return sentences


def training_references(run: Run) -> tuple[list[Case], dict[str, Case]]:
    """Return the training cases of the report stage and, by case name, a reference of each from the training pool."""
    cohort = load_cohort(run.config)
    pool = {case.name: case for case in cohort.pool}
    drawn = choose_references(cohort.report, pool, Condition(), run.seed)
    return cohort.report, {case: of[0] for case, of in drawn.items()}


def prompt_parts(
    model: DiffVPForConditionalGeneration, features: Features, cases: Sequence[Case], references: Sequence[Case]
) -> dict[str, NDArray[np.float32]]:
    """Collect the parts of the model's input, (cases, width); the last two are embeddings for the LLM."""
    prefix = 0 if model.prompt_generator is None else model.config.num_prefix_tokens
    parts: dict[str, list[NDArray]] = {}
    for start in range(0, len(cases), BATCH):
        chosen = slice(start, start + BATCH)
        inputs = model_inputs(model, features, cases[chosen], [[of] for of in references[chosen]])
        embeddings = torch.stack(
            [prompt[: prefix + model.config.num_latents] for prompt in model.embed_prompt(**inputs)]
        )
        of_batch = {
            "encoder's output, mean": inputs["ct_features"].float().mean(dim=1),
            "reference's encoder output, mean": inputs["reference_features"].float().mean(dim=1),
            "predicted findings": inputs.get("diagnosis_logits"),
            "difference prompt": embeddings[:, :prefix] if prefix else None,
            "visual tokens": embeddings[:, prefix:],
        }
        for name, values in of_batch.items():
            if values is not None:
                parts.setdefault(name, []).append(values.float().flatten(1).cpu().numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def probe(train: NDArray, train_cases: Sequence[Case], test: NDArray, test_cases: Sequence[Case]) -> dict:
    """
    Read findings from vectors with logistic regressions: fit on training cases, score on test cases.

    Args:
        train, test: vectors (cases, width).
        train_cases, test_cases: the cases of the vectors, with labels.

    Returns:
        "auroc": mean over the labels that have positive and negative test cases. "labels": their number. "f1":
        micro-F1 at a threshold of 0.5, with its interval over cases.
    """
    train_labels, test_labels = (np.stack([case.labels for case in of]) for of in (train_cases, test_cases))
    reader = make_pipeline(StandardScaler(), PCA(min(COMPONENTS, *train.shape), random_state=0), StandardScaler())
    train, test = reader.fit_transform(train), reader.transform(test)
    likely = np.zeros(test_labels.shape)
    areas = []
    for label in range(test_labels.shape[1]):
        truth = train_labels[:, label]
        if np.bincount(truth, minlength=2).min() < 2:  # each fold needs a case of either kind
            continue
        strengths = {"C": [1e-4, 1e-3, 1e-2, 1e-1]}
        regression = GridSearchCV(LogisticRegression(), strengths, cv=2, scoring="neg_log_loss")
        likely[:, label] = regression.fit(train, truth).predict_proba(test)[:, 1]
        if 0 < test_labels[:, label].sum() < len(test):
            areas.append(roc_auc_score(test_labels[:, label], likely[:, label]))
    f1 = row_summary({0: score_labels((likely > 0.5).astype(np.int8), test_cases)}, ["f1"])["f1"]
    return {"auroc": float(np.mean(areas)), "labels": len(areas), "f1": {key: f1[key] for key in ("mean", "interval")}}


def variance_shares(values: NDArray) -> dict[str, float]:
    """
    Compute a two-way analysis of variance of vectors without replicates.

    Args:
        values: (patients, references, width), each patient with each reference.

    Returns:
        Shares of "patient", "reference" and "interaction" in the sum of squares around the overall mean.

    Raises:
        ValueError: all vectors are equal.
    """
    centred = values - values.mean(axis=(0, 1))
    of_patient, of_reference = centred.mean(axis=1, keepdims=True), centred.mean(axis=0, keepdims=True)
    parts = {
        "patient": np.broadcast_to(of_patient, values.shape),
        "reference": np.broadcast_to(of_reference, values.shape),
        "interaction": centred - of_patient - of_reference,
    }
    total = float(np.square(centred).sum())
    if not total:
        raise ValueError("the prompt is the same for all patients and references")
    return {name: float(np.square(part).sum()) / total for name, part in parts.items()}


@torch.no_grad()
def latent_overlap(
    model: DiffVPForConditionalGeneration, features: Features, cases: Sequence[Case], references: Mapping[str, Case]
) -> dict[str, float]:
    """
    Measure the similarity of pairs of latent tokens, as means over cases and pairs.

    "attention" is the shared attention Σ min(a_i, a_j): 1 if both tokens attend to the same voxels. "difference" is
    the cosine of their differences from the reference, v_i − r_i.
    """
    shared, cosines = [], []
    for case in cases:
        own, other = scan_inputs(model, features, [case], [[references[case.name]]]).values()
        (latents, attention), (reference_latents, _) = model.resampler(own), model.resampler(other)
        pairs = np.array(list(itertools.combinations(range(latents.shape[1]), 2))).T
        weights = attention[0].float().cpu().numpy()
        shared.append(np.minimum(*weights[pairs]).sum(axis=-1).mean())
        difference = (latents - reference_latents)[0].float()
        unit = (difference / difference.norm(dim=-1, keepdim=True)).cpu().numpy()
        cosines.append(np.multiply(*unit[pairs]).sum(axis=-1).mean())
    return {"attention": float(np.mean(shared)), "difference": float(np.mean(cosines))}


def prompt_following(told: NDArray[np.bool_], truth: NDArray[np.bool_], written: NDArray[np.bool_]) -> dict:
    """
    Count the true and the false findings that reports state, of those named by the diagnosis prompt and of the others.

    A report that only copies the prompt states true and false findings equally often. One that uses the scan states
    the true ones more often.

    Args:
        told, truth, written: (cases, labels): findings of the prompt, of the case, and of the report.

    Returns:
        "shares": for "told, true", ..., "not told, false" their "count" and the share "written", `None` if the count
        is 0. "f1": micro-F1 of the prompt.
    """
    shares = {}
    for name, named in (("told", told), ("not told", ~told)):
        for kind, there in (("true", truth), ("false", ~truth)):
            of = written[named & there]
            shares[f"{name}, {kind}"] = {"count": of.size, "written": float(of.mean()) if of.size else None}
    return {"shares": shares, "f1": micro_f1(told, truth)}


def score_information(
    model: DiffVPForConditionalGeneration,
    features: Features,
    training: tuple[Sequence[Case], Mapping[str, Case]],
    test: tuple[Sequence[Case], Mapping[str, Case]],
    written: NDArray[np.int8],
) -> dict:
    """
    Compute all measures for one model.

    Args:
        training, test: cases and, by case name, their references.
        written: findings of the reports, (test cases, labels).

    Raises:
        ValueError: the model subtracts voxels and thus has no features of a reference, or no test case is abnormal.
    """
    if model.config.difference_level == "pixel":
        raise ValueError("difference_level is 'pixel': expected a model that encodes scan and reference by themselves")
    patients = [case for case in test[0] if not is_normal(case)][:PATIENTS]
    if not patients:
        raise ValueError(f"None of the {len(test[0])} test cases is abnormal: there is no finding to read")
    train, held_out = (
        prompt_parts(model, features, cases, [references[case.name] for case in cases])
        for cases, references in (training, test)
    )
    probes = {
        part: probe(train[part], training[0], held_out[part], test[0])
        for part in counted(train, "Reading the findings")
    }
    content = {"training_cases": len(training[0]), "test_cases": len(test[0]), "probes": probes}
    if model.config.use_diagnosis:
        probabilities = 1 / (1 + np.exp(-held_out["predicted findings"]))
        truth = np.stack([case.labels for case in test[0]]).astype(bool)
        told = probabilities >= np.array(model.config.diagnosis_threshold)
        content["prompt"] = prompt_following(told, truth, written.astype(bool))
    if model.config.difference_level == "latent":
        pool = list({case.scan_id: case for case in test[1].values()}.values())[:REFERENCES]
        prompts = [prompt_parts(model, features, [case] * len(pool), pool)["difference prompt"] for case in patients]
        content["variance"] = variance_shares(np.array(prompts, dtype=np.float64))
        content["overlap"] = latent_overlap(model, features, patients, test[1])
    return content


KIND = Kind(Needs(models=True), content, lines, observations=observations)
