# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Handler of Inference Endpoints, loaded from a checkpoint folder in the same way as by their toolkit."""

import base64
import gzip
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import nibabel as nib
import pytest

from diffvp.hub.card import ENDPOINT, PACKAGE, write_endpoint

from .batch_samples import write_box, write_checkpoint
from .ct_samples import write_dicom
from .hub_samples import make_chest


@pytest.fixture(scope="module")
def folder(tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint") / "tiny"
    write_checkpoint(folder, tiny_base_with_tokenizer, tokenizer, tiny_fields)
    write_endpoint(folder)
    return folder


@pytest.fixture(scope="module")
def handler(folder):
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(path=str(folder))


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_handler_output_equals_the_pipeline(handler, tmp_path):
    write_box(tmp_path / "scan.nii.gz", 1)
    answer = handler({"inputs": encoded((tmp_path / "scan.nii.gz").read_bytes()), "parameters": {"reference_seed": 2}})
    expected = handler.pipe(str(tmp_path / "scan.nii.gz"), reference_seed=2)
    assert json.loads(json.dumps(answer)) == answer and "difference_map" not in answer
    geometry = expected.pop("geometry")
    del expected["difference_map"]
    assert answer == {**expected, "sha256": geometry.sha256} and answer["schema_version"] == 1
    assert answer["statement"].startswith("Research use only")


def test_file_format_is_detected_from_content(handler, tmp_path):
    write_box(tmp_path / "scan.nii.gz", 1)
    image = nib.load(tmp_path / "scan.nii.gz")
    plain = image.to_bytes()
    archive = shutil.make_archive(str(tmp_path / "slices"), "zip", write_dicom(tmp_path / "slices", make_chest(1)))
    parameters = {"max_new_tokens": 2, "difference_map": True}
    for content in (plain, Path(archive).read_bytes()):
        answer = handler({"inputs": encoded(content), "parameters": parameters})
        drawn = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(answer["difference_map"])))
        shape = image.shape if content is plain else make_chest(1).shape
        assert drawn.shape == shape and answer["complete"] is False


@pytest.mark.parametrize(
    ("request_", "message"),
    [({}, "inputs: missing"), ({"inputs": "no base64!"}, "inputs: no base64"), ({"inputs": 5}, "inputs: no base64"),
     ({"inputs": "AAAA", "parameters": {"reference": "/etc/passwd"}}, "parameters: unknown: reference .expected"),
     ({"inputs": encoded(b"no scan")}, "scan.nii: "), ({"inputs": ""}, "scan.nii: ")],
)  # fmt: skip
def test_invalid_request_is_refused_with_its_field(handler, request_, message):
    with pytest.raises(ValueError, match=message):
        handler(request_)


def test_failed_request_leaves_no_temporary_files(handler, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError):
        handler({"inputs": encoded(b"no scan")})
    assert not list(tmp_path.iterdir())


def test_endpoint_files_are_copied_unchanged(folder):
    for name, kept in ENDPOINT.items():
        assert (folder / name).read_bytes() == (PACKAGE / kept).read_bytes()
