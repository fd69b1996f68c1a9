# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Retrieval from and storage to a PACS, including its failures. `make test-dicom` uses a real PACS."""

import tempfile
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import generate_uid
from typer.testing import CliRunner

from diffvp import cli
from diffvp.clinical import dicomweb
from diffvp.clinical.dicomweb import DicomWebError, retrieve, store
from diffvp.inference import report as reporting
from diffvp.reading_diffvp import read_ct
from diffvp.volume_diffvp import CTReadError

from .batch_samples import write_checkpoint
from .clinical_samples import SECRETS, SOURCES, files_of, of_a_hospital
from .ct_samples import write_dicom
from .dicomweb_server import BOUNDARY, DicomWebServer
from .hub_samples import make_chest
from .marks import slow_except


@pytest.fixture
def server():
    with DicomWebServer() as server:
        yield server


@pytest.fixture(params=slow_except(("single-frame", "Enhanced CT"), SOURCES))
def source(request, server, tmp_path):
    """Series that the server holds."""
    path = SOURCES[request.param](tmp_path)
    server.add(files_of(path))
    return path


@pytest.fixture
def series(server, tmp_path):
    """Single-frame series that the server holds."""
    path = SOURCES["single-frame"](tmp_path)
    server.add(files_of(path))
    return path


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Folder for temporary files, which must be empty after the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Remove the waiting time between retries."""

    class Client(dicomweb.DICOMwebClient):
        def set_http_retry_params(self, retry=True, **_):
            super().set_http_retry_params(retry, max_attempts=2, wait_exponential_multiplier=1)

    monkeypatch.setattr(dicomweb, "DICOMwebClient", Client)


def study_of(path: Path) -> str:
    return files_of(path)[0].StudyInstanceUID


def refused(server, study: str, series: str | None = None, **options) -> str:
    with pytest.raises(DicomWebError) as error, retrieve(server.url, study, series, **options):
        pass
    message = str(error.value)
    assert message.startswith("127.0.0.1: ") and study not in message
    return message.removeprefix("127.0.0.1: ")


def test_retrieved_study_equals_its_files(server, source, temporary):
    with retrieve(server.url, study_of(source)) as folder:
        read = read_ct(folder)
        assert {one.file_meta.TransferSyntaxUID for one in files_of(folder)} == {
            one.file_meta.TransferSyntaxUID for one in files_of(source)
        }
        assert folder.is_relative_to(temporary)
    assert read.sha256 == read_ct(source).sha256
    assert not folder.exists()


def test_errors_of_the_caller_pass_through_unchanged(server, series):
    """Errors raised by the caller also remove the temporary folder."""
    with pytest.raises(CTReadError, match="series: none chosen"), retrieve(server.url, study_of(series)):
        raise CTReadError("study", "series", "none chosen", "one")
    with pytest.raises(ValueError, match="of the caller"), retrieve(server.url, study_of(series)):
        raise ValueError("of the caller")


def test_one_of_two_series_is_chosen_by_uid_or_number(server, tmp_path):
    study = generate_uid()

    def change(k, one):
        of_a_hospital(k, one)
        one.StudyInstanceUID = study

    paths = [write_dicom(tmp_path / name, make_chest(n), change=change) for n, name in enumerate("ab")]
    for path in paths:
        server.add(files_of(path))
    uids = [files_of(path)[0].SeriesInstanceUID for path in paths]
    for path, uid in zip(paths, uids, strict=True):
        server.requests.clear()
        with retrieve(server.url, study, uid) as folder:
            assert read_ct(folder, series=uid).sha256 == read_ct(path).sha256
        assert len(server.requests) == 2  # the other series is not retrieved
    with retrieve(server.url, study, "2") as folder:
        digests = {read_ct(folder, series=number).sha256 for number in ("1", "2")}
    assert digests == {read_ct(path).sha256 for path in paths}
    assert refused(server, study, generate_uid()) == "series: not there (expected one that the server has)"


def test_other_modalities_are_not_retrieved(server, series):
    files = files_of(series)
    for one in files[:3]:
        one.SeriesInstanceUID, one.SOPInstanceUID, one.Modality = "1.2.3", generate_uid(), "PT"
    server.add(files[:3])
    with retrieve(server.url, files[0].StudyInstanceUID) as folder:
        assert len(list(folder.iterdir())) == 18
    server.instances = server.instances[18:]
    assert refused(server, files[0].StudyInstanceUID) == "Modality: no CT series (expected a study with a CT series)"


def test_missing_study_is_refused(server):
    assert refused(server, "1.2.3") == "study: not there (expected one that the server has)"


@pytest.mark.parametrize("uid", ["1.2.x", "../../etc", "1.2.3/series", "", "1" * 65])
def test_malformed_uid_is_refused_without_a_request(server, uid):
    with pytest.raises(DicomWebError, match="StudyInstanceUID: not a UID"), retrieve(server.url, uid):
        pass
    assert not server.requests


@pytest.mark.parametrize("url", ["pacs", "ftp://pacs/dicom-web", "http://", "http://pacs:port/", "http://pacs:0/"])
def test_malformed_url_is_refused(url):
    with pytest.raises(DicomWebError, match="DICOMweb: URL: malformed"), retrieve(url, "1.2.3"):
        pass


def test_url_with_a_password_is_refused():
    with pytest.raises(DicomWebError) as error, retrieve("http://me:hunter2@pacs/dicom-web", "1.2.3"):
        pass
    assert "~/.netrc" in str(error.value) and "hunter2" not in str(error.value)


def test_credentials_come_from_netrc(server, series, tmp_path, monkeypatch):
    seen = []

    def fail(handler):
        seen.append(handler.headers["Authorization"])
        handler.answer(401, "text/plain", b"")

    server.fail["search"] = fail
    assert refused(server, study_of(series)).startswith("HTTP status: 401 ")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert refused(server, study_of(series)).startswith("HTTP status: 401 ")
    assert seen == [None, "Basic bWU6aHVudGVyMg=="]


def cut_off(handler) -> None:
    """Send less content than announced."""
    content = b"\r\n--" + BOUNDARY + b"\r\nContent-Type: application/dicom\r\n\r\n" + handler.server.instances[0][:600]
    handler.send_response(200)
    handler.send_header("Content-Type", f'multipart/related; type="application/dicom"; boundary={BOUNDARY.decode()}')
    handler.send_header("Content-Length", str(10 * len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def answer(status: int, kind: str, content: bytes):
    return lambda handler: handler.answer(status, kind, content)


FAILURES = {
    "not found": ("search", answer(404, "text/plain", b"Secret^Name"), "HTTP status: 404"),
    "busy": ("search", answer(503, "text/plain", b""), "HTTP status: 503"),
    "broken": ("retrieve", answer(500, "text/plain", b"Secret^Name"), "HTTP status: 500"),
    "no JSON": ("search", answer(200, "application/dicom+json", b"{Secret^Name"), "connection: JSON"),
    "other JSON": ("search", answer(200, "application/dicom+json", b"[1]"), "answer: "),
    "a page": ("retrieve", answer(200, "text/html", b"<p>Secret^Name</p>"), "answer: ValueError"),
    "no DICOM": ("retrieve", lambda handler: handler.answer_parts([b"Secret^Name"]), "answer: InvalidDicomError"),
    "cut off": ("retrieve", cut_off, "connection: "),
    "nothing": ("retrieve", lambda handler: handler.answer_parts([]), "number of instances: 0 of 18"),
    "hangs up": ("search", lambda handler: handler.connection.close(), "connection: "),
}


@pytest.mark.parametrize("name", FAILURES)
def test_server_failure_is_reported_without_patient_data(server, series, name, capsys):
    kind, failure, message = FAILURES[name]
    server.fail[kind] = failure
    told = refused(server, study_of(series))
    assert told.startswith(message) and "Secret" not in told + capsys.readouterr().err


def test_incomplete_study_is_refused_unless_allowed(server, series):
    """A PACS may still be receiving the study."""
    server.promised = 19
    assert refused(server, study_of(series)).startswith("number of instances: 18 of 19 (expected all of the series")
    with retrieve(server.url, study_of(series), allow_incomplete=True) as folder:
        assert read_ct(folder).shape == (26, 22, 18)


def test_oversized_study_is_refused(server, series, monkeypatch):
    monkeypatch.setattr(dicomweb, "MAX_ARCHIVE_BYTES", 10_000)
    assert refused(server, study_of(series)).startswith("bytes received: too many (expected at most 10000")
    monkeypatch.undo()
    monkeypatch.setattr(dicomweb, "MAX_FILES", 17)
    assert refused(server, study_of(series)).startswith("number of instances: 18 (expected at most 17")
    server.promised = 3
    assert refused(server, study_of(series)).startswith("number of instances: too large (expected at most 17")


def objects() -> list[pydicom.Dataset]:
    made = []
    for _ in range(2):
        one = pydicom.Dataset()
        one.preamble = bytes(128)
        one.file_meta = pydicom.dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        one.SOPClassUID, one.SOPInstanceUID = pydicom.uid.ComprehensiveSRStorage, generate_uid()
        one.StudyInstanceUID, one.SeriesInstanceUID = "1.2.3", generate_uid()
        made.append(one)
    return made


def test_stored_objects_arrive(server):
    made = objects()
    store(server.url, made)
    arrived = {one.SOPInstanceUID for one, _ in server.of_study("1.2.3")}
    assert arrived == {one.SOPInstanceUID for one in made}
    assert server.requests == ["POST /dicom-web/studies/1.2.3"]


def test_store_with_an_empty_answer_is_judged_by_its_status(server):
    server.fail["store"] = lambda handler: handler.answer(200, "application/dicom+json; charset=utf-8", b"{}")
    store(server.url, objects())
    server.fail["store"] = lambda handler: handler.answer(202, "application/dicom+json; charset=utf-8", b"{}")
    with pytest.raises(DicomWebError, match="STOW-RS: 2 of 2 not stored"):
        store(server.url, objects())


def test_failed_store_is_reported(server):
    made = objects()
    server.fail["store"] = lambda handler: handler.answer_stored(made[:1], failed=made[1:], status=202)
    with pytest.raises(DicomWebError, match=r"STOW-RS: 1 of 2 not stored, 0xa700 \(expected all stored\)"):
        store(server.url, made)
    server.fail["store"] = lambda handler: handler.answer(503, "text/plain", b"")
    server.requests.clear()
    with pytest.raises(DicomWebError, match="HTTP status: 503"):
        store(server.url, made)
    assert len(server.requests) == 1


# The command


@pytest.fixture(scope="module")
def checkpoint(tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return write_checkpoint(folder, tiny_base_with_tokenizer, tokenizer, tiny_fields)


def report(*arguments):
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


def test_report_is_stored_in_its_study(server, source, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "draw_figure", lambda path, *_, **__: path.write_bytes(b"a figure"))
    study, before = study_of(source), len(server.instances)
    arguments = ["--dicomweb", server.url, "--study", study, "--checkpoint", checkpoint]
    result = report(*arguments, "--store", "--output", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert not [secret for secret in [*SECRETS, study] if secret in result.output]
    *_, first, second = [one for one, _ in server.of_study(study)]
    assert len(server.instances) == before + 2 and {first.Modality, second.Modality} == {"SR", "OT"}
    report_json = (tmp_path / "report" / "report.json").read_text(encoding="utf-8")
    assert study not in report_json and read_ct(source).sha256 in report_json

    result = report(*arguments, "--dicom", tmp_path / "dicom", "--output", tmp_path / "report")
    assert result.exit_code == 0, result.output  # SR and map in the study are not taken for CT
    assert len(server.instances) == before + 2  # nothing is stored without --store
    assert len(list((tmp_path / "dicom").iterdir())) == 2


def test_report_is_kept_if_the_server_rejects_it(server, series, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "draw_figure", lambda path, *_, **__: path.write_bytes(b"a figure"))
    server.fail["store"] = lambda handler: handler.answer(403, "text/plain", b"")
    arguments = ["--dicomweb", server.url, "--study", study_of(series), "--checkpoint", checkpoint, "--store"]
    result = report(*arguments, "--dicom", tmp_path / "dicom", "--output", tmp_path / "report")
    assert result.exit_code == 2 and "DicomWebError: 127.0.0.1: HTTP status: 403" in " ".join(result.output.split())
    assert (tmp_path / "report" / "report.txt").exists() and len(list((tmp_path / "dicom").iterdir())) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--dicomweb", "http://pacs/dicom-web"],
        ["--study", "1.2.3"],
        ["scan.nii.gz", "--dicomweb", "http://pacs/dicom-web", "--study", "1.2.3"],
        ["scan.nii.gz", "--store"],
    ],
)
def test_ambiguous_scan_source_is_refused(arguments):
    result = report(*arguments)
    assert result.exit_code == 2 and "a scan, or --dicomweb URL with --study UID" in " ".join(result.output.split())
