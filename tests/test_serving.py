# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
`diffvp serve`. Most tests ask a real server in another process over the loopback. Tests of heavy load run in this
process, with a writer that waits until the test lets it continue.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the service needs FastAPI (pip install -e .[serve])")
import httpx
from typer.testing import CliRunner

from diffvp import cli, scratch
from diffvp.cli.console import is_loopback
from diffvp.inference.batch import ReportWriter
from diffvp.service.app import ProblemDetails, ReportAnswer, build_app
from diffvp.service.jobs import FOLDER, Limits, ReportQueue

from .batch_samples import write_box, write_checkpoint
from .ct_samples import make_ct, write_dicom
from .hub_samples import make_chest
from .marks import slow_except
from .serving import Server, ask, free_port, send

TOKEN = "a token of the tests"


@pytest.fixture(scope="module")
def checkpoint(tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path_factory):
    fields = {"intended_domain": "boxes of noise"}
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return write_checkpoint(folder, tiny_base_with_tokenizer, tokenizer, tiny_fields, **fields)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scans")
    paths = [folder / f"Doe^Jane {seed}.nii.gz" for seed in range(5)]
    for seed, path in enumerate(paths):
        write_box(path, seed)
    return paths


@pytest.fixture(scope="module")
def broken(tmp_path_factory, scans) -> list[Path]:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "Doe^John.nii.gz").write_bytes(b"no scan")
    (folder / "half.nii.gz").write_bytes(scans[0].read_bytes()[:2000])
    (folder / "Doe^John.pdf").write_bytes(b"%PDF")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    with Server(checkpoint, tmp_path_factory.mktemp("serve") / "tmp", "--max-upload", 1) as server:
        yield server


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def writer(checkpoint):
    return ReportWriter(checkpoint)


def test_report_equals_that_of_a_batch(client, scans, writer):
    answer = send(client, scans[0])
    record = answer.json()
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    ReportAnswer.model_validate(record)
    [expected], _ = writer.write([(record["id"], record["file_sha256"], _features(writer, scans[0]))])
    assert {key: record[key] for key in expected} == json.loads(json.dumps(expected))
    assert record["statement"].startswith("Research use only") and record["intended_domain"] == "boxes of noise"
    assert client.get("/v1/settings").json() == writer.header
    assert client.get(f"/v1/reports/{record['id']}").status_code == 404, "the report must not be kept"


def _features(writer: ReportWriter, path: Path):
    return writer.processor.image_processor(path, digest=True, allow_any_anatomy=False)


@pytest.mark.parametrize("requests", slow_except([60], [60, 200]))
def test_requests_of_8_clients_with_bad_files_are_answered(server, scans, broken, requests):
    ask(server.url, scans, broken, requests=16, clients=8)  # warm-up: memory that is allocated once
    first = server.metric("process_resident_memory_bytes")
    outcome = ask(server.url, scans, broken, requests=requests, clients=8)
    assert outcome.lost == [] and outcome.mixed_up == []
    assert outcome.refused == requests // 10 and len(outcome.seconds) == requests - requests // 10
    findings = {json.dumps(known["findings"]) for known in outcome.reports.values()}
    assert len(findings) == len(scans), "equal findings would hide mixed-up answers"
    assert server.metric("process_resident_memory_bytes") - first < 50 * 2**20
    assert server.metric("diffvp_batch_size_sum") / server.metric("diffvp_batch_size_count") > 2, (
        "requests must be batched"
    )
    assert server.metric("diffvp_requests_waiting") == 0
    assert [path for path in server.folder.rglob("*") if path.is_file()] == []


def test_logs_contain_neither_scan_names_nor_reports(server, client, scans, broken):
    report = send(client, scans[1]).json()["report"]
    for path in broken:
        answer = send(client, path)
        assert answer.status_code == 422 and "Doe" not in answer.text
    assert report not in server.said() and "Doe" not in server.said() and "Traceback" not in server.said()
    assert "POST /v1/reports HTTP/1.1" in server.said()


def test_bad_scans_are_refused_with_the_faulty_field_named(client, scans, broken, tmp_path):
    for path, field in zip(broken, ("sizeof_hdr", "suffix", "voxel data"), strict=True):
        problem = send(client, path)
        assert problem.headers["content-type"] == "application/problem+json"
        content = problem.json()
        assert ProblemDetails.model_validate(content).field == field
        assert content["detail"] == f"{content['source']}: {content['field']}: {content['found']} (expected " + (
            f"{content['expected']})"
        )
    write_dicom(tmp_path / "knee", make_ct())
    archive = Path(shutil.make_archive(str(tmp_path / "knee"), "zip", tmp_path / "knee"))
    problem = send(client, archive).json()
    assert problem["title"] == "CTAnatomyError" and problem["field"] == "lungs"


@pytest.mark.parametrize(
    ("form", "status", "field"),
    [
        ({"data": {"x": "1"}}, 400, "x"),
        ({"data": {"series": "1"}}, 400, "file"),
        ({"data": {"file": "scan.nii.gz"}}, 400, "file"),
        ({"files": {"series": ("a", b"1"), }}, 400, "series"),
        ({"data": {"study": "1.2.3"}}, 400, "study"),
        ({"files": {"file": ("a.nii", b"1")}, "data": {"study": "1.2.3"}}, 400, "file"),
        ({"files": [("file", ("a.nii", b"1")), ("file", ("b.nii", b"1"))]}, 400, None),
        ({"json": {"file": "scan.nii.gz"}}, 400, "file"),
        ({}, 400, "file"),
        ({"files": {"file": ("../../etc/passwd", b"root")}}, 422, "suffix"),
        ({"files": {"file": ("", b"")}}, 400, "file"),
        ({"files": {"file": ("a.nii.gz", b"x" * 1_200_000)}}, 413, None),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(client, form, status, field):
    answer = client.post("/v1/reports", **form)
    assert answer.status_code == status, answer.text
    assert answer.json().get("field") == field and answer.json()["status"] == status


def test_upload_without_a_length_is_limited_too(client):
    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.nii"\r\n\r\n'
        for _ in range(40):
            yield b"0" * 65536

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/reports", content=endless(), headers=headers).status_code == 413


def test_asynchronous_report_is_fetched_once_or_deleted(client, scans):
    place = send(client, scans[2], Prefer="respond-async")
    assert place.status_code == 202 and place.headers["location"] == f"/v1/reports/{place.json()['id']}"
    for _ in range(400):
        answer = client.get(place.headers["location"])
        if answer.status_code != 202:
            break
        assert answer.json()["state"] in ("arriving", "reading", "waiting", "writing")
        time.sleep(0.02)
    assert answer.status_code == 200 and answer.json()["report"] == send(client, scans[2]).json()["report"]
    assert client.get(place.headers["location"]).status_code == 404
    deleted = send(client, scans[2], Prefer="respond-async").headers["location"]
    assert client.delete(deleted).status_code == 204 and client.delete(deleted).status_code == 404
    failed = send(client, scans[2], b"no scan", Prefer="respond-async").headers["location"]
    while (answer := client.get(failed)).status_code == 202:
        time.sleep(0.02)
    assert answer.status_code == 422 and client.get(failed).status_code == 404


def events_of(client: httpx.Client, place: str) -> list[tuple[str, dict]]:
    with client.stream("GET", f"{place}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = list(stream.iter_lines())
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    return list(zip(names, (json.loads(line[6:]) for line in lines if line.startswith("data: ")), strict=True))


def test_events_end_with_the_report(client, scans):
    events = events_of(client, send(client, scans[3], Prefer="respond-async").headers["location"])
    assert events[-1][0] == "report" and {name for name, _ in events} <= {"state", "text", "report"}
    assert events[-1][1]["report"] == send(client, scans[3]).json()["report"]
    [*_, (name, problem)] = events_of(
        client, send(client, scans[3], b"no scan", Prefer="respond-async").headers["location"]
    )
    assert name == "error" and problem["status"] == 422
    assert client.get("/v1/reports/none/events").status_code == 404


def test_health_readiness_metrics_and_docs_answer(client):
    assert client.get("/healthz").json() == {"status": "alive"} and client.get("/readyz").status_code == 200
    metrics = client.get("/metrics").text
    for name in ("diffvp_requests_total", "diffvp_requests_waiting", "diffvp_batch_size", "diffvp_stage_seconds"):
        assert f"# HELP {name}" in metrics or f"# HELP {name.removesuffix('_total')}" in metrics
    assert client.get("/docs").status_code == 200


def test_openapi_describes_requests_and_answers(client):
    description = client.get("/openapi.json").json()
    post = description["paths"]["/v1/reports"]["post"]
    assert set(post["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]) == {
        "file", "study", "series"
    }  # fmt: skip
    assert {"200", "202", "413", "422", "429", "503"} <= set(post["responses"])
    assert "ReportAnswer" in description["components"]["schemas"]
    assert "Research use only" in description["info"]["description"]


def test_request_with_a_foreign_host_name_is_refused(client, scans):
    """Prevent DNS rebinding: a foreign host name that resolves to this machine."""
    for place in ("/v1/settings", "/metrics", "/openapi.json"):
        assert client.get(place, headers={"Host": "attacker.example"}).status_code == 400


@pytest.mark.slow
def test_server_recovers_from_sigkill_and_drains_on_sigterm(checkpoint, scans, broken, tmp_path):
    """Requests of a killed server fail. The next server removes its uploads and answers on the same port.

    On SIGTERM, a server first answers the waiting requests.
    """
    folder, port = tmp_path / "tmp", free_port()
    with Server(checkpoint, folder, port=port) as server:
        with ThreadPoolExecutor(1) as threads:
            slow = threads.submit(_half_an_upload, port)
            while not list(folder.glob(f"{FOLDER}*/*")):
                time.sleep(0.02)
            server.end(signal.SIGKILL)
            slow.result()
        assert list(folder.glob(f"{FOLDER}*/*")), "a killed server cannot remove its uploads"
    with Server(checkpoint, folder, "--max-new-tokens", 300, "--batch-size", 1, port=port) as server:
        assert len(list(folder.glob(f"{FOLDER}*"))) == 1 and not list(folder.glob(f"{FOLDER}*/*"))
        outcome = ask(server.url, scans, broken, requests=10, clients=2)
        assert outcome.lost == [] and outcome.mixed_up == []
        with ThreadPoolExecutor(6) as threads:
            asked = [threads.submit(lambda: send(httpx.Client(base_url=server.url), scans[0])) for _ in range(6)]
            while server.metric("diffvp_requests_waiting") < 2 and not all(one.done() for one in asked):
                time.sleep(0.01)
            assert server.end() == -signal.SIGTERM
            told = [one.result().status_code for one in asked]
            assert set(told) <= {200, 503} and told.count(200) >= 2, (
                "waiting requests are answered, later ones get 503"
            )
        assert not list(folder.glob(f"{FOLDER}*")), "a server that ends on SIGTERM leaves no files"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/readyz")


def _half_an_upload(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as one:
        one.sendall(
            b"POST /v1/reports HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        one.settimeout(60)
        while one.recv(100):
            pass


# Behaviour under load


class SlowWriter:
    """Writer whose engine waits for the test, or fails when it is told to."""

    def __init__(self, writer: ReportWriter):
        self.writer, self.go, self.batches, self.fails = writer, threading.Event(), [], lambda batch: None

    def __getattr__(self, name):
        return getattr(self.writer, name)

    def write(self, batch, on_token=None):
        batch = list(batch)
        self.batches.append(len(batch))
        while not self.go.wait(0.01):
            for index in range(len(batch)):
                on_token(index, 5)
        self.fails(batch)
        return self.writer.write(batch, on_token)


def run_in_this_process(writer, scenario, limits=None, **options):
    """Run a coroutine function with the application and its queue."""

    async def run():
        queue = ReportQueue(writer, limits or Limits(batch_wait=0.05))
        app = build_app(queue, **options)
        async with app.router.lifespan_context(app):
            return await scenario(app, queue)

    return asyncio.run(asyncio.wait_for(run(), 60))


def client_of(app) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30)


def serve_in_this_process(writer, scenario, limits=None, **options):
    """Run a coroutine function with a client of the application, and its queue."""

    async def ask(app, queue):
        async with client_of(app) as client:
            return await scenario(client, queue)

    return run_in_this_process(writer, ask, limits, **options)


async def post(client, path: Path, **headers):
    files = {"file": (path.name, path.read_bytes())}
    return await client.post("/v1/reports", files=files, headers=headers)


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def unanswered(queue: ReportQueue) -> float:
    return queue.registry.get_sample_value("diffvp_requests_waiting")


def scans_read(queue: ReportQueue) -> float | None:
    return queue.registry.get_sample_value("diffvp_stage_seconds_count", {"stage": "reading"})


def test_waiting_requests_are_batched_and_too_many_are_refused(writer, scans):
    slow = SlowWriter(writer)

    async def scenario(client, queue):
        first = asyncio.create_task(post(client, scans[0]))
        await until(lambda: slow.batches)
        rest = [asyncio.create_task(post(client, path)) for path in scans[1:4]]
        await until(lambda: scans_read(queue) == 4)
        refused = await post(client, scans[4])
        slow.go.set()
        return refused, await asyncio.gather(first, *rest)

    refused, answers = serve_in_this_process(slow, scenario, Limits(waiting=4))
    assert refused.status_code == 429 and refused.headers["retry-after"]
    assert [answer.status_code for answer in answers] == [200] * 4 and slow.batches == [1, 3]
    alone = [writer.write([("", None, _features(writer, path))])[0][0]["report"] for path in scans[:4]]
    assert [answer.json()["report"] for answer in answers] == alone


def test_draining_server_answers_503_after_the_grace_period(writer, scans):
    slow = SlowWriter(writer)

    async def scenario(client, queue):
        asked = [asyncio.create_task(post(client, path)) for path in scans[:2]]
        await until(lambda: slow.batches and unanswered(queue) == 2)
        queue.drain()
        refused = await post(client, scans[2])
        ready = await client.get("/readyz")
        assert ready.status_code == 503
        return [refused, *await asyncio.gather(*asked)]

    answers = serve_in_this_process(slow, scenario, Limits(batch_size=1, grace=0.3))
    slow.go.set()
    assert [answer.status_code for answer in answers] == [503] * 3
    assert all("shutting down" in answer.json()["detail"] and answer.headers["retry-after"] for answer in answers)


def test_requests_without_the_token_are_refused(writer, scans):
    right, wrong = ({"Authorization": f"Bearer {value}"} for value in (TOKEN, "another"))

    async def scenario(client, queue):
        for headers in ({}, wrong, {"Authorization": TOKEN}, {"Authorization": b"Bearer \xe9"}):
            for method, place in (("POST", "/v1/reports"), ("GET", "/v1/settings"), ("GET", "/metrics"),
                                  ("GET", "/v1/reports/a"), ("DELETE", "/v1/reports/a"),
                                  ("GET", "/v1/reports/a/events")):  # fmt: skip
                answer = await client.request(method, place, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", place
        assert (await client.get("/healthz")).status_code == (await client.get("/readyz")).status_code == 200
        assert (await client.get("/v1/reports/a", headers=right)).status_code == 404
        return await post(client, scans[0], **right)

    assert serve_in_this_process(writer, scenario, token=TOKEN).status_code == 200


def test_host_beyond_loopback_needs_a_token(checkpoint, monkeypatch):
    monkeypatch.delenv("DIFFVP_TOKEN", raising=False)
    result = CliRunner().invoke(cli.app, ["serve", "--checkpoint", str(checkpoint), "--host", "0.0.0.0"])
    assert result.exit_code == 2 and "host is 0.0.0.0" in result.stderr
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")


def test_events_stream_the_text_while_it_is_written(writer, scans):
    slow = SlowWriter(writer)

    async def scenario(client, queue):
        place = (await post(client, scans[0], Prefer="respond-async")).headers["location"]
        job = queue.find(place.rsplit("/")[-1])
        asyncio.get_running_loop().call_later(1.0, slow.go.set)
        answer = await client.get(f"{place}/events")
        return answer.text, queue.text(job)

    text, _ = serve_in_this_process(slow, scenario)
    names = re.findall(r"^event: (\w+)$", text, re.MULTILINE)
    assert names.count("text") > 1 and names.count("state") >= 1 and names[-1] == "report"
    written = [json.loads(line[6:])["text"] for line in text.splitlines() if line.startswith('data: {"text')]
    assert all(later.startswith(earlier) for earlier, later in zip(written, written[1:], strict=False))


def test_request_times_out_with_503(writer, scans):
    slow = SlowWriter(writer)

    async def scenario(client, queue):
        first = asyncio.create_task(post(client, scans[0]))
        await until(lambda: slow.batches)
        later = await post(client, scans[1])
        await post(client, scans[1], Prefer="respond-async")
        assert unanswered(queue) > 0
        await until(lambda: unanswered(queue) == 0)  # it expires without being fetched
        slow.go.set()
        return await first, later

    answers = serve_in_this_process(slow, scenario, Limits(timeout=0.5))
    assert [answer.status_code for answer in answers] == [503, 503]
    assert "No report after 0.5 s" in answers[0].json()["detail"]


def test_request_is_dropped_when_its_client_disconnects(writer, scans):
    slow = SlowWriter(writer)

    async def scenario(app, queue):
        client, receiving = client_of(app), asyncio.Event()
        request = client.build_request("POST", "/v1/reports", files={"file": (scans[0].name, scans[0].read_bytes())})
        body = b"".join(request.stream)
        scope = {
            "type": "http", "method": "POST", "path": "/v1/reports", "query_string": b"", "root_path": "",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
        }  # fmt: skip
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if parts:
                return parts.pop()
            await receiving.wait()
            return {"type": "http.disconnect"}

        sent = []

        async def note(message):
            sent.append(message)

        asked = asyncio.create_task(app(scope, receive, note))
        await until(lambda: slow.batches or sent)
        assert not sent
        receiving.set()
        await asked
        assert unanswered(queue) == 0
        slow.go.set()
        async with client:
            return (await post(client, scans[1])).status_code

    assert run_in_this_process(slow, scenario) == 200


def test_one_failing_scan_does_not_fail_its_batch(writer, scans, caplog):
    slow = SlowWriter(writer)
    poison = _features(writer, scans[2])["geometry"][0].sha256

    def fails(batch):
        if any(features["geometry"][0].sha256 == poison for _, _, features in batch):
            raise RuntimeError("Doe^Jane")

    slow.fails = fails

    async def scenario(client, queue):
        asked = [asyncio.create_task(post(client, path)) for path in scans[:4]]
        await until(lambda: slow.batches)
        slow.go.set()
        return await asyncio.gather(*asked), (await client.get("/healthz")).status_code

    answers, health = serve_in_this_process(slow, scenario, Limits(batch_wait=1.0))
    assert [answer.status_code for answer in answers] == [200, 200, 500, 200] and health == 200
    assert "Doe" not in answers[2].text and "Doe" not in caplog.text
    assert "RuntimeError at test_serving.py" in caplog.text


def test_study_is_fetched_from_its_server(writer, tmp_path):
    asked = []

    @contextlib.contextmanager
    def retrieve(study, series):
        asked.append((study, series))
        yield write_dicom(tmp_path / "series", make_chest(1))

    async def scenario(client, queue):
        wrong = await client.post("/v1/reports", data={"study": "../../etc"})
        return wrong, await client.post("/v1/reports", data={"study": "1.2.3", "series": "1"})

    wrong, answer = serve_in_this_process(writer, scenario, retrieve=retrieve)
    assert wrong.status_code == 400 and wrong.json()["field"] == "study"
    assert answer.status_code == 200 and answer.json()["file_sha256"] is None and asked == [("1.2.3", "1")]


def test_files_of_stopped_servers_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    mine, running, gone, other = (
        tmp_path / name for name in (f"{FOLDER}{os.getpid()}-a", f"{FOLDER}{os.getppid()}-b", f"{FOLDER}999999999-c",
                                     f"{FOLDER}notes")
    )  # fmt: skip
    for folder in (mine, running, gone, other):
        (folder / "inside").mkdir(parents=True)
    made = scratch.make_folder(FOLDER)
    assert not mine.exists() and not gone.exists() and running.exists() and other.exists()
    assert made.is_dir() and made.name.startswith(f"{FOLDER}{os.getpid()}-") and made.stat().st_mode & 0o077 == 0
