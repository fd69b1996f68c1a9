# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
#
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6",
#   "transformers>=5.19,<5.24",
#   "peft>=0.20",
#   "nibabel>=5",
#   "isal>=1.9,<2",
#   "pydicom>=3,<4",
#   "SimpleITK>=2.3",
#   "huggingface-hub>=1",
#   "pillow>=10.1",
#   "gguf>=0.10",
# ]
# ///
"""
Write the reports of all scans of a Hub dataset with a Hub checkpoint, as a Hub job:

    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN hub/job.py NAME/SCANS NAME/REPORTS \\
        --model NAME/MODEL --revision COMMIT

This single file does not need this repository: the code comes with the checkpoint, pinned to a commit. The checkpoint
must contain its base LLM, or name one on the Hub. NAME/REPORTS is private and gets one line per scan (reports.jsonl)
and one per unreadable scan (reports.failed.jsonl). Research use only.
"""

import argparse
import json
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from transformers import pipeline

SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".zip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", help="dataset repository with NIfTI, NRRD, MetaImage files or .zip of DICOM slices")
    parser.add_argument("reports", help="dataset repository for the reports; created as private if missing")
    parser.add_argument("--model", required=True, help="checkpoint on the Hub")
    parser.add_argument("--revision", required=True, help="commit of the checkpoint, whose code is run")
    parser.add_argument("--limit", type=int, help="maximum number of scans (default: all)")
    arguments = parser.parse_args()
    pinned = {"revision": arguments.revision, "trust_remote_code": True}
    pipe = pipeline("ct-report-generation", model=arguments.model, **pinned)
    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    folder = Path(snapshot_download(arguments.scans, repo_type="dataset", allow_patterns=patterns))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())[: arguments.limit]
    with tempfile.TemporaryDirectory() as written:
        reports, failures = Path(written) / "reports.jsonl", Path(written) / "reports.failed.jsonl"
        with reports.open("w", encoding="utf-8") as good, failures.open("w", encoding="utf-8") as bad:
            for path in paths:
                name = path.relative_to(folder).as_posix()
                try:
                    result = pipe(str(path))
                except ValueError as error:  # CTInputError: the reader of the checkpoint refuses the scan
                    bad.write(json.dumps({"id": name, "error": type(error).__name__, "message": str(error)}) + "\n")
                    continue
                geometry = result.pop("geometry")
                result.pop("difference_map")
                by = {"model": arguments.model, "revision": arguments.revision}
                good.write(json.dumps({"id": name, "sha256": geometry.sha256, **by, **result}) + "\n")
        api = HfApi()
        api.create_repo(arguments.reports, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(repo_id=arguments.reports, repo_type="dataset", folder_path=written)


if __name__ == "__main__":
    main()
