# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
DICOM objects checked by an independent validator and PACS. Run by `make test-dicom`; needs Debian's dicom3tools,
orthanc and orthanc-dicomweb.

SimpleITK, the third reader, can read neither object (see test_clinical.py); there, the slices it reads give the
expected grid of the map.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from typer.testing import CliRunner

if "DIFFVP_DICOM_TOOLS" not in os.environ:
    pytest.skip("takes dicom3tools and Orthanc: make test-dicom", allow_module_level=True)

from diffvp import cli
from diffvp.clinical.dicomweb import retrieve, store
from diffvp.clinical.objects import MAP_FILE, SR_FILE, dicom_objects, write_objects
from diffvp.clinical.source import read_source
from diffvp.reading_diffvp import read_ct

from .batch_samples import write_checkpoint
from .clinical_samples import PATIENT, SECRETS, SOURCES, STUDY, files_of, in_the_order_of, make_document, read_map

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@pytest.fixture(scope="module")
def checkpoint(tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return write_checkpoint(folder, tiny_base_with_tokenizer, tokenizer, tiny_fields, diagnosis_threshold=0.5)


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    """URL of a local PACS that requires a password, which a netrc file provides."""
    folder = tmp_path_factory.mktemp("orthanc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "StorageDirectory": str(folder / "storage"), "IndexDirectory": str(folder / "storage"),
        "HttpPort": port, "DicomServerEnabled": False, "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True, "RegisteredUsers": {"tester": "secret"},
        "Plugins": [str(PLUGIN)], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(settings))
    (folder / "netrc").write_text("machine 127.0.0.1 login tester password secret\n")
    with open(folder / "log.txt", "w") as log, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", str(folder / "netrc"))
        server = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
        try:
            wait_for(server, port, folder / "log.txt")
            yield f"http://127.0.0.1:{port}/dicom-web"
        finally:
            server.terminate()
            server.wait(30)


def wait_for(server: subprocess.Popen, port: int, log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/app/images/orthanc-logo.png", timeout=1).close()
            return
        except urllib.error.HTTPError:  # a request for the password shows that it is running
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(log.read_text())


def dciodvfy(path: Path) -> list[str]:
    """Return the error lines of the DICOM validator."""
    told = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, timeout=120)
    lines = (told.stdout + told.stderr).splitlines()
    assert any(line in ("ComprehensiveSR", "ParametricMap", "CTImage", "EnhancedCTImage") for line in lines), lines
    return [line for line in lines if line.startswith(("Error", "Abort"))]


def run(*arguments) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_required_tools_are_installed():
    """Without the tools, the other tests fail with less clear messages."""
    tools = [shutil.which("dciodvfy"), shutil.which("Orthanc"), PLUGIN.exists()]
    assert all(tools), "apt-get install dicom3tools orthanc orthanc-dicomweb"


def test_dicom_validator_finds_errors(tmp_path):
    """Only a validator that reports errors makes the tests below meaningful."""
    source = read_source(SOURCES["single-frame"](tmp_path))
    report, image = dicom_objects(make_document(), np.zeros(source.shape, np.float32), source)
    del report.VerificationFlag, image.FrameOfReferenceUID
    write_objects(tmp_path, report, image)
    assert [len(dciodvfy(tmp_path / name)) > 0 for name in (SR_FILE, MAP_FILE)] == [True, True]


@pytest.mark.parametrize("kind", SOURCES)
def test_validator_accepts_report_and_map(tmp_path, checkpoint, kind):
    source = SOURCES[kind](tmp_path)
    run("report", source, "--checkpoint", checkpoint, "--dicom", tmp_path / "dicom", "--output", tmp_path / "report")
    for name in (SR_FILE, MAP_FILE):
        assert dciodvfy(tmp_path / "dicom" / name) == [], name
    report = highdicom.sr.srread(tmp_path / "dicom" / SR_FILE)
    assert isinstance(report, highdicom.sr.ComprehensiveSR)
    nifti = nib.load(tmp_path / "report" / "difference_map.nii.gz")
    array, affine = in_the_order_of(*read_map(tmp_path / "dicom"), nifti.affine)
    np.testing.assert_allclose(affine, nifti.affine, atol=1e-4)
    assert np.array_equal(array, np.asarray(nifti.dataobj))


def test_validator_accepts_objects_with_every_kind_of_finding(tmp_path):
    source = read_source(SOURCES["Enhanced CT"](tmp_path))
    difference = np.random.default_rng(0).random(source.shape, dtype=np.float32)
    for part in ("CHEST", None):
        if part is None:  # unknown body part
            del source.header.BodyPartExamined
        write_objects(tmp_path / "dicom", *dicom_objects(make_document(), difference, source))
        for name in (SR_FILE, MAP_FILE):
            assert dciodvfy(tmp_path / "dicom" / name) == [], (name, part)


@pytest.mark.parametrize("kind", SOURCES)
def test_report_of_a_pacs_study_is_stored_in_that_study(tmp_path, checkpoint, orthanc, kind):
    """QIDO, WADO, report, STOW, QIDO: SR and map are in the study of the source, and the source is unchanged."""
    source = SOURCES[kind](tmp_path)
    files = files_of(source)
    study = files[0].StudyInstanceUID
    store(orthanc, files)
    with retrieve(orthanc, study) as folder:
        syntaxes = {one.file_meta.TransferSyntaxUID for one in files_of(folder)}
    assert syntaxes == {one.file_meta.TransferSyntaxUID for one in files}  # no transcoding

    arguments = ["--dicomweb", orthanc, "--study", study, "--checkpoint", checkpoint, "--store"]
    printed = run("report", *arguments, "--output", tmp_path / "report")
    assert not [secret for secret in [*SECRETS, study] if secret in printed]
    written = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert written["provenance"]["scan"]["sha256"] == read_ct(source).sha256

    client = DICOMwebClient(orthanc)
    found = [pydicom.Dataset.from_json(answer) for answer in client.search_for_series(study)]
    by_modality = {one.Modality: one.SeriesInstanceUID for one in found}
    assert len(found) == 3 and by_modality.keys() == {"CT", "SR", "OT"}
    [report] = client.retrieve_series(study, by_modality["SR"])
    [image] = client.retrieve_series(study, by_modality["OT"])
    assert report.SOPClassUID == pydicom.uid.ComprehensiveSRStorage
    assert image.SOPClassUID == pydicom.uid.ParametricMapStorage
    for one in (report, image):
        assert {name: one[name].value for name in PATIENT | STUDY} == PATIENT | STUDY
    evidence = {uid for _, _, uid, _ in highdicom.sr.ComprehensiveSR.from_dataset(report).get_evidence()}
    assert evidence == {one.SOPInstanceUID for one in (*files, image)}
    [patient] = [pydicom.Dataset.from_json(answer) for answer in client.search_for_studies(
        search_filters={"PatientID": PATIENT["PatientID"], "StudyInstanceUID": study}
    )]  # fmt: skip
    assert patient.NumberOfStudyRelatedInstances == len(files) + 2

    # A second report still finds the CT series among the objects now stored.
    run("report", *arguments[:-1], "--output", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "report.json").read_text(encoding="utf-8"))
    assert again["report"] == written["report"]
