# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Publish a phantom cohort as a dataset on the Hub: `diffvp phantom FOLDER ... --push NAME/DATASET`.

The dataset keeps the layout that `diffvp train` reads. Each split gets a table next to its volumes, so that
`datasets.load_dataset("NAME/DATASET")` gives scans, reports and the 18 labels without custom code.
"""

import csv
import json
import os
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

from .. import __version__
from ..data.phantom_cohort import LONG_NAME, VOLUME_FOLDER, volume_path
from ..labels_diffvp import DIAGNOSIS_LABELS
from .push import Pushed, PushError

TEMPLATE = Path(__file__).with_name("dataset_card.md.jinja")
TABLE = "metadata.jsonl"  # the file name that `datasets` expects
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_tables(root: str | os.PathLike) -> dict[str, int]:
    """Write the table of each split next to its volumes: `file_name`, `report`, `impression`, and 0 or 1 per label.

    Returns:
        number of cases of each split that has cases.
    """
    dataset, counts = Path(root) / "dataset", {}
    for split, folder in VOLUME_FOLDER.items():
        labels = _rows(dataset / "multi_abnormality_labels" / f"{split}_predicted_labels.csv")
        reports = _rows(dataset / "radiology_text_reports" / f"{LONG_NAME[split]}_reports.csv")
        if not labels:
            continue
        lines = []
        for name, row in labels.items():
            volume = volume_path(Path(root), name.removesuffix(".nii.gz"))
            texts = reports[name]
            entry = {
                "file_name": volume.relative_to(dataset / folder).as_posix(),
                "report": texts["Findings_EN"],
                "impression": texts["Impressions_EN"],
                **{label: int(row[label]) for label in DIAGNOSIS_LABELS},
            }
            lines.append(json.dumps(entry) + "\n")
        (dataset / folder / TABLE).write_text("".join(lines), encoding="utf-8")
        counts[split] = len(lines)
    return counts


def _rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["VolumeName"]: row for row in csv.DictReader(file)}


def make_dataset_card(root: str | os.PathLike, counts: dict[str, int]) -> DatasetCard:
    """
    Make the card of the dataset.

    Args:
        counts: number of cases of each split.
    """
    settings = json.loads((Path(root) / "phantom" / "cohort.json").read_text(encoding="utf-8"))
    total = sum(counts.values())
    files = [
        {"split": LONG_NAME[split], "path": f"dataset/{folder}/**"}
        for split, folder in VOLUME_FOLDER.items()
        if split in counts
    ]
    data = DatasetCardData(
        pretty_name="DiffVP phantoms",
        license="apache-2.0",
        language="en",
        task_categories=["image-to-text"],
        size_categories=next((size for limit, size in SIZES if total < limit), "n>1M"),
        tags=["medical", "radiology", "computed-tomography", "report-generation", "synthetic"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    return DatasetCard.from_template(
        data, template_str=TEMPLATE.read_text(encoding="utf-8"), counts=counts, settings=settings, version=__version__,
        labels=DIAGNOSIS_LABELS, flags=" ".join(f"--{split} {counts.get(split, 0)}" for split in VOLUME_FOLDER),
    )  # fmt: skip


def push_cohort(root: str | os.PathLike, repo_id: str, private: bool = False) -> Pushed:
    """
    Upload a cohort that [`write_cohort`] wrote, in one commit.

    Raises:
        PushError: the upload failed; nothing was uploaded.
    """
    root, api = Path(root), HfApi()
    counts = write_tables(root)
    make_dataset_card(root, counts).save(root / "README.md")
    try:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, repo_type="dataset", folder_path=root, ignore_patterns=["**/.*", ".*"],
            commit_message=f"Upload {sum(counts.values())} phantoms",
        )  # fmt: skip
    except (HTTPError, LocalTokenNotFoundError, ValueError) as error:  # ValueError: an id or a card is refused
        raise PushError(f"{repo_id}: {' '.join(str(error).split())}", ["Nothing was uploaded."]) from error
    return Pushed(repo_id, commit.oid, commit.commit_url, None)
