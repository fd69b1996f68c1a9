# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Serve a checkpoint on Hugging Face Inference Endpoints, which expect this file next to it.

    {"inputs": "BASE64 of a NIfTI or NRRD file, or of a .zip of DICOM slices", "parameters": {"reference_seed": 1}}

Parameters: `reference_seed`, `max_new_tokens`, `allow_any_anatomy` and `difference_map`. With `difference_map`, the
answer includes the map as base64 of a .nii.gz on the grid of the scan. A wrong scan or parameter gives an error that
names it; the endpoint answers with status 400.
"""

import base64
import binascii
import tempfile
from pathlib import Path

from transformers import pipeline

PARAMETERS = ("reference_seed", "max_new_tokens", "allow_any_anatomy")
# First bytes of the formats. The content decides, because a request has no file name.
BEGINNINGS = {b"\x1f\x8b": "scan.nii.gz", b"PK\x03\x04": "scan.zip", b"NRRD": "scan.nrrd"}


class EndpointHandler:
    def __init__(self, path: str = ""):
        self.pipe = pipeline("ct-report-generation", model=path, trust_remote_code=True)

    def __call__(self, data: dict) -> dict:
        """
        Write the report of a scan.

        Raises:
            ValueError: the scan or a parameter is wrong; the message says how.
        """
        parameters = dict(data.get("parameters") or {})
        with_map = parameters.pop("difference_map", False)
        unknown = sorted(set(parameters) - set(PARAMETERS))
        if unknown:
            expected = ", ".join((*PARAMETERS, "difference_map"))
            raise ValueError(f"request: parameters: unknown: {', '.join(unknown)} (expected {expected})")
        try:
            content = base64.b64decode(data["inputs"], validate=True)
        except (KeyError, TypeError, binascii.Error) as error:
            found = "missing" if "inputs" not in data else "no base64"
            raise ValueError(f"request: inputs: {found} (expected the base64 of a file)") from error
        name = next((name for start, name in BEGINNINGS.items() if content.startswith(start)), "scan.nii")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            result = self.pipe(str(path), **parameters)
            difference, geometry = result.pop("difference_map"), result.pop("geometry")
            answer = {**result, "sha256": geometry.sha256}
            if with_map:
                saved = self.pipe.processor.save_map(Path(folder) / "difference_map.nii.gz", difference, geometry)
                answer["difference_map"] = base64.b64encode(Path(saved).read_bytes()).decode()
        return answer
