# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The page as strangers reach it: its endpoint for programs, its limits, and the removal of files."""

import asyncio
import http.client
import json
import os
import re
import time
import uuid
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs gradio (pip install -e .[app])")
import httpx
from gradio_client import Client, handle_file

from diffvp.hub.space import session
from diffvp.hub.space.page import build_page, launch
from diffvp.hub.space.session import Desk

from .batch_samples import write_box, write_checkpoint

LOOK = ["Mediastinum", True, 50]


@pytest.fixture(scope="module")
def page(tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    checkpoint = write_checkpoint(folder, tiny_base_with_tokenizer, tokenizer, tiny_fields)
    before = os.environ.get("GRADIO_TEMP_DIR")
    blocks = build_page(Desk(str(checkpoint), tmp_path_factory.mktemp("page")))
    blocks.address = launch(blocks, "127.0.0.1", None, mcp=True, block=False)
    yield blocks
    blocks.close()
    os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


@pytest.fixture
def client(page):
    with httpx.Client(base_url=page.address, timeout=60) as client:
        yield client


@pytest.fixture
def scan(tmp_path) -> Path:
    write_box(tmp_path / "scan.nii.gz", 1)
    return tmp_path / "scan.nii.gz"


def upload(client: httpx.Client, path: Path) -> str:
    [stored] = client.post("/gradio_api/upload", files={"files": (path.name, path.read_bytes())}).json()
    return stored


def run(client: httpx.Client, page, event: str, *data, visitor: str | None = None) -> str:
    """Choose something as a browser does, and return everything that comes back."""
    number = next(number for number, fn in page.fns.items() if fn.name == event and len(fn.outputs) > 5)
    visitor = visitor or uuid.uuid4().hex
    request = {"data": [*data, *LOOK], "fn_index": number, "session_hash": visitor}
    assert client.post("/gradio_api/queue/join", json=request).status_code == 200
    messages = []
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": visitor}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                messages.append(json.loads(line[5:]))
                if messages[-1]["msg"] in ("process_completed", "close_stream"):
                    return json.dumps(messages)
    return json.dumps(messages)


def status_of(told: str) -> str:
    return re.findall(r'class=\\\\*"status[^>]*>([^<]*)<', told)[-1]


def file_at(path) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_program_gets_a_report_from_the_named_endpoint(page, scan):
    program = Client(page.address, verbose=False)
    document = program.predict(scan=handle_file(scan), reference_seed=1, api_name="/report")
    assert document["statement"].startswith("Research use only")
    inputs = page.desk.processor(ct=scan, reference_seed=1)
    assert document["provenance"]["scan"]["sha256"] == inputs.geometry[0].sha256
    assert document["provenance"]["reference"]["id"] == inputs.reference_ids[0]
    expected = page.desk.model.generate(**inputs, do_sample=False)
    assert document["report"] == page.desk.processor.batch_decode(expected, skip_special_tokens=True)[0].strip()
    assert not files_below(page.desk.uploads) and not list(page.desk.studies.iterdir())
    assert set(program.view_api(return_format="dict")["named_endpoints"]) == {"/report"}


def test_program_gets_the_reason_for_a_refused_scan(page, tmp_path):
    (tmp_path / "text.nii.gz").write_bytes(b"no scan")
    with pytest.raises(Exception, match=r"text.nii.gz: sizeof_hdr: .* \(expected"):
        Client(page.address, verbose=False).predict(handle_file(tmp_path / "text.nii.gz"), 0, api_name="/report")
    assert not files_below(page.desk.uploads) and not list(page.desk.claimed.iterdir())


def test_page_is_one_tool_for_a_language_model(page):
    pytest.importorskip("mcp", reason="pip install gradio[mcp]")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def tools():
        async with (
            streamablehttp_client(f"{page.address}gradio_api/mcp/") as (reading, writing, _),
            ClientSession(reading, writing) as session,
        ):
            await session.initialize()
            return (await session.list_tools()).tools

    [tool] = asyncio.run(tools())
    assert tool.name.endswith("report") and "Research use only" in tool.description
    assert set(tool.inputSchema["properties"]) == {"scan", "reference_seed"}


def test_web_addresses_are_never_fetched(page, client, monkeypatch):
    from gradio import processing_utils

    async def fetched(*_, **__):
        pytest.fail("was fetched")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetched)
    told = run(client, page, "run_upload", file_at("https://example.org/scan.nii.gz"), "Random")
    assert "expected an uploaded file" in told and not files_below(page.desk.uploads)


def test_visitor_can_read_only_their_own_files(page, client, scan):
    told = run(client, page, "run_upload", file_at(upload(client, scan)), "Random")
    assert status_of(told).startswith("Reference:")
    places = sorted(set(re.findall(r'"path": "(/[^"]*)"', told)))
    assert len([place for place in places if Path(place).is_relative_to(page.desk.studies)]) == 3
    for place in places:
        assert client.get(f"/gradio_api/file={place}").status_code == 200
    others = [page.desk.sample("Phantom 4").path, page.desk.model.name_or_path + "/config.json", __file__]
    for place in others:
        assert client.get(f"/gradio_api/file={place}").status_code == 403
    assert not files_below(page.desk.uploads), "neither the upload nor an empty file of Gradio's may be left"
    for study in list(page.desk.studies.iterdir()):  # a study stays until its visitor leaves
        assert study.is_dir()


def test_folder_of_uploads_cannot_be_named_as_a_scan(page, client, scan):
    stored = Path(upload(client, scan))
    for folder in (page.desk.uploads, stored.parent):
        told = run(client, page, "run_upload", file_at(str(folder)), "Random")
        assert "not an uploaded file" in status_of(told) and stored.is_file()
    assert status_of(run(client, page, "run_upload", file_at(str(stored)), "Random")).startswith("Reference:")


def test_own_reference_follows_a_scan_and_is_another(page, client, scan, tmp_path):
    write_box(tmp_path / "other.nii.gz", 2)
    chosen = ("run_reference", "Own file")
    told = run(client, page, *chosen, file_at(upload(client, tmp_path / "other.nii.gz")))
    assert "other.nii.gz: reference: without a scan" in status_of(told)
    assert not files_below(page.desk.uploads)
    visitor = uuid.uuid4().hex
    run(client, page, "run_upload", file_at(upload(client, scan)), "Random", visitor=visitor)
    told = run(client, page, *chosen, file_at(upload(client, scan)), visitor=visitor)
    assert "scan.nii.gz: reference: the scan itself" in status_of(told)
    told = run(client, page, *chosen, file_at(upload(client, tmp_path / "other.nii.gz")), visitor=visitor)
    assert status_of(told) == "Reference: your own."
    assert not files_below(page.desk.uploads)


def test_internal_error_is_reported_without_its_message(page, client, scan, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("Doe^Jane")

    monkeypatch.setattr(page.desk, "compare", fail)
    told = run(client, page, "run_upload", file_at(upload(client, scan)), "Random")
    assert "An error occurred (RuntimeError)" in status_of(told)
    assert "Doe" not in told and "Doe" not in caplog.text and "RuntimeError" in caplog.text
    monkeypatch.setattr(page.desk, "sample", fail)
    assert "An error occurred" in status_of(run(client, page, "run_sample", "Phantom 1", "Random"))


def test_uploads_are_limited_in_number_and_size(page, client, scan, monkeypatch):
    monkeypatch.setattr(session, "MAX_UPLOADED_FILES", 2)
    place = upload(client, scan)
    for number in range(2):
        other = scan.with_name(f"other-{number}.nii.gz")
        write_box(other, 50 + number)
        answer = client.post("/gradio_api/upload", files={"files": (other.name, other.read_bytes())})
        assert answer.status_code == (200, 429)[number]
    long_ago = time.time() - session.UPLOAD_SECONDS - 1
    for path in files_below(page.desk.uploads):
        os.utime(path, (long_ago, long_ago))
    assert client.post("/gradio_api/upload", files={"files": (scan.name, scan.read_bytes())}).status_code == 200
    assert files_below(page.desk.uploads) == [Path(place)], "old unread uploads must make room"
    Path(place).unlink()
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=30)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Length", str(session.MAX_FILE_BYTES * 2))
    connection.endheaders()
    assert connection.getresponse().status == 413, "expected a refusal before the content is sent"


def test_upload_without_a_length_is_limited_too(page, client, monkeypatch):
    from diffvp.hub.space import upload as module

    monkeypatch.setattr(module, "MAX_FILE_BYTES", 200_000)

    def many():
        for number in range(10):  # each of them small
            head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{number}.nii"\r\n\r\n'
            yield head.encode() + b"0" * 50_000 + b"\r\n"
        yield b"--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert client.post("/gradio_api/upload", content=many(), headers=headers).status_code == 413
    for path in files_below(page.desk.uploads):
        path.unlink()
