# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The routes of `diffvp serve`.

    POST   /v1/reports              a scan; its report, or with `Prefer: respond-async` 202 and the place of its report
    GET    /v1/reports/{id}         that report, once
    GET    /v1/reports/{id}/events  the same as server-sent events, word by word
    DELETE /v1/reports/{id}         never mind
    GET    /v1/settings             what writes: checkpoint, digests, references, decoding
    GET    /healthz /readyz /metrics /openapi.json /docs

Errors are problem details (RFC 9457). One about a scan has `source`, `field`, `found` and `expected`, and never the
name that the client's file had.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from prometheus_client import CONTENT_TYPE_LATEST, Counter, generate_latest
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from .. import __version__
from ..inference.report import EXPECTED_ERRORS
from ..pipeline_diffvp import RESEARCH_USE
from .jobs import Abandoned, Job, Refused, ReportQueue

PROBLEM = "application/problem+json"
LISTENING = 0.2  # seconds between looks at what has been written

# As far as a name says what is in the file. The rest of it may name the patient, and is forgotten.
SUFFIX = re.compile(r"(\.nii)?\.[a-z0-9]{1,8}$")

Retrieve = Callable[[str, str | None], AbstractContextManager[Path]]


class ProblemDetails(BaseModel):
    """Why there is no report. The last four are of a scan that cannot be read, or a field that is wrong."""

    title: str
    status: int
    detail: str
    source: str | None = None
    field: str | None = None
    found: str | None = None
    expected: str | None = None


class ReportAnswer(BaseModel):
    """A report, as a line of `diffvp batch`.

    Attributes:
        id: of the request.
        sha256: of the scan's content, the same in every file format.
        file_sha256: of the file that was sent; of a study that was fetched, null.
        settings_sha256: of /v1/settings.
    """

    model_config = ConfigDict(extra="allow")

    id: str
    schema_version: int
    sha256: str
    file_sha256: str | None
    report: str
    regions: dict[str, str]
    findings: list[dict]
    complete: bool
    reference: str
    warnings: list[str]
    consistency: dict | list
    coverage: dict | None
    checkpoint: dict
    settings_sha256: str
    statement: str
    intended_domain: str | None


class Pending(BaseModel):
    """A request without an outcome yet: arriving, reading, waiting or writing."""

    id: str
    state: str


class FieldError(ValueError):
    """A field of the form that is wrong."""

    def __init__(self, field: str, found: str, expected: str):
        super().__init__(f"form: {field}: {found} (expected {expected})")
        self.source, self.field, self.found, self.expected = "form", field, found, expected


UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "NIfTI, NRRD, MetaImage, a DICOM file, or a .zip of DICOM slices.",
                        },
                        "study": {
                            "type": "string",
                            "description": "Instead of a file: StudyInstanceUID on this service's DICOMweb server.",
                        },
                        "series": {
                            "type": "string",
                            "description": "SeriesInstanceUID, where a study or an archive has several.",
                        },
                    },
                }
            }
        },
    }
}
PROBLEMS = {
    status: {"model": ProblemDetails, "content": {PROBLEM: {}}, "description": text}
    for status, text in {
        400: "The form is wrong.", 401: "No token, or another.", 404: "No such request, or it was answered.",
        408: "The upload took too long.", 413: "The upload is too large.",
        422: "The scan cannot be read, or is none of a chest.", 429: "Too many requests are waiting.",
        503: "The server is going down, or the time was up.",
    }.items()
}  # fmt: skip


def of(*statuses: int) -> dict:
    return {status: PROBLEMS[status] for status in statuses}


def build_app(queue: ReportQueue, token: str | None = None, retrieve: Retrieve | None = None) -> FastAPI:
    """
    The service as an ASGI application.

    Args:
        queue: with a loaded checkpoint.
        token: which requests have to carry (`Authorization: Bearer`); without it only names of this machine are
            answered to, so that no web page can ask through a visitor's browser.
        retrieve: makes a folder of a study, by its UID and that of a series or `None`, of a DICOMweb server.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await queue.open()
        yield
        await queue.close()

    app = FastAPI(
        title="DiffVP", version=__version__, lifespan=lifespan, summary="Reports of chest CT by comparison",
        description=f"**{RESEARCH_USE}**",
    )  # fmt: skip
    requests = Counter("diffvp_requests", "Answers by status", ["status"], registry=queue.registry)
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "::1", "[::1]"])

    def problem(status: int, error: Exception, title: str | None = None, retry: int | None = None) -> JSONResponse:
        requests.labels(status).inc()
        facts = {name: getattr(error, name, None) for name in ("source", "field", "found", "expected")}
        facts = {name: str(value) for name, value in facts.items() if value is not None}
        content = {"title": title or type(error).__name__, "status": status, "detail": str(error), **facts}
        headers = {"Cache-Control": "no-store"} | ({} if retry is None else {"Retry-After": str(retry)})
        headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        return JSONResponse(content, status, headers, PROBLEM)

    def refusal(error: Exception) -> JSONResponse:
        """The answer that an outcome is which is no report."""
        if isinstance(error, Refused):
            return problem(error.status, error, "Refused", error.retry)
        if isinstance(error, EXPECTED_ERRORS):
            return problem(422, error)
        if isinstance(error, FieldError):
            return problem(400, error)
        if isinstance(error, Abandoned):  # read by nobody but the metrics, with nginx's status for it
            return problem(499, RuntimeError("Nobody waits for this report."), "Abandoned")
        return problem(500, RuntimeError("The report could not be written; the server's log says where it failed."))

    @app.exception_handler(Refused)
    @app.exception_handler(FieldError)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, RuntimeError(error.detail), "HTTP error")

    async def authorized(authorization: Annotated[str, Header()] = "") -> None:
        expected = f"Bearer {token}".encode()
        if token is not None and not hmac.compare_digest(authorization.encode(), expected):
            raise Refused(401, "The token is missing or another; expected Authorization: Bearer TOKEN.")

    async def find(id: str) -> Job:
        return queue.find(id)

    def answer(job: Job) -> Response:
        """The outcome of a job, which is then forgotten."""
        error = job.outcome.exception()
        record = None if error else job.outcome.result()
        queue.forget(job)
        if error:
            return refusal(error)
        requests.labels(200).inc()
        return JSONResponse(record, headers={"Cache-Control": "no-store"})

    def pending(job: Job) -> Response:
        place = f"/v1/reports/{job.id}"
        return JSONResponse({"id": job.id, "state": job.state}, 202, {"Location": place, "Cache-Control": "no-store"})

    protected = {"dependencies": [Depends(authorized)]}

    @app.post(
        "/v1/reports", openapi_extra=UPLOAD, **protected,
        responses={200: {"model": ReportAnswer}, 202: {"model": Pending}, **of(400, 401, 408, 413, 422, 429, 503)},
    )  # fmt: skip
    async def write_report(request: Request, prefer: Annotated[str, Header()] = "") -> Response:
        """Write the report of a scan. `Prefer: respond-async` answers at once, with where the report will be."""
        job = queue.admit()  # before the upload is read: who is refused need not send it
        kept = False
        try:
            await _receive(request, job, queue, retrieve)
            if "respond-async" in prefer:
                kept = True
                queue.keep(job)
                return pending(job)
            left = asyncio.create_task(_has_left(request))
            await asyncio.wait((job.outcome, left), return_when=asyncio.FIRST_COMPLETED)
            left.cancel()
            if not job.outcome.done():
                job.fail(Abandoned())
            return answer(job)
        finally:
            if not kept:
                queue.forget(job)

    @app.get(
        "/v1/reports/{id}", responses={200: {"model": ReportAnswer}, 202: {"model": Pending}, **of(401, 404, 422, 503)},
        **protected,
    )  # fmt: skip
    async def get_report(job: Annotated[Job, Depends(find)]) -> Response:
        """The report, once: it is forgotten with this answer. 202 while it is not written."""
        return answer(job) if job.outcome.done() else pending(job)

    @app.delete("/v1/reports/{id}", status_code=204, responses=of(401, 404), **protected)
    async def delete_report(job: Annotated[Job, Depends(find)]) -> None:
        """Forget the scan, and its report if there is one."""
        queue.forget(job)

    @app.get("/v1/reports/{id}/events", response_class=EventSourceResponse, responses=of(401, 404), **protected)
    async def get_events(job: Annotated[Job, Depends(find)]) -> AsyncIterator[ServerSentEvent]:
        """`state` when it changes, `text` as far as it is written, then once `report` or `error`."""
        state, written = None, ""
        while not job.outcome.done():
            if job.state != state:
                state = job.state
                yield ServerSentEvent(event="state", data={"id": job.id, "state": state})
            text = queue.text(job)
            if text != written:
                written = text
                yield ServerSentEvent(event="text", data={"text": text})
            await asyncio.wait((job.outcome,), timeout=LISTENING)
        final = answer(job)
        kind = "report" if final.status_code == 200 else "error"
        yield ServerSentEvent(event=kind, raw_data=final.body.decode())

    @app.get("/v1/settings", responses=of(401), **protected)
    def get_settings() -> dict:
        """What writes the reports: checkpoint and base model with digests, preprocessing, decoding, versions."""
        return queue.writer.header

    @app.get("/metrics", response_class=Response, responses=of(401), **protected)
    def get_metrics() -> Response:
        """Metrics of Prometheus."""
        return Response(generate_latest(queue.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def get_health() -> dict[str, str]:
        """Whether the process should go on: 503 tells who watches it to start another."""
        if not queue.alive:
            raise Refused(503, "Nothing writes reports any more.")
        return {"status": "alive"}

    @app.get("/readyz")
    async def get_readiness() -> dict[str, str]:
        """Whether to send requests here: not while the server is going down."""
        if queue.draining:
            raise Refused(503, "The server is going down.")
        return {"status": "ready"}

    return app


async def _receive(request: Request, job: Job, queue: ReportQueue, retrieve: Retrieve | None) -> None:
    """The form of a request, whose scan is then read.

    Raises:
        FieldError, Refused
    """
    bounded = Request(request.scope, _bounded(request, queue.limits.upload_bytes))
    try:
        form = await asyncio.wait_for(_form(bounded), queue.limits.timeout)
    except asyncio.TimeoutError:  # of Python 3.10 it is not the built-in one
        raise Refused(408, f"The upload took more than {queue.limits.timeout:g} s.") from None
    known = {"file": UploadFile, "study": str, "series": str}
    for name, value in form.multi_items():
        if name not in known:
            raise FieldError(name[:64], "unknown", ", ".join(known))
        if not isinstance(value, known[name]):
            raise FieldError(name, "text" if name == "file" else "a file", "a file" if name == "file" else "text")
    file, study, series = (form.get(name) for name in known)
    if (file is None) == (study is None):
        raise FieldError("file", "missing" if file is None else "beside study", "a file, or study")
    if study is None:
        queue.submit(job, _stored(file, job), series)
        return
    if retrieve is None:
        raise FieldError("study", "no DICOMweb server", "a file, or a service with --dicomweb")
    for name, value in (("study", study), ("series", series)):
        if value is not None and not re.fullmatch(r"[0-9.]{1,64}", value):
            raise FieldError(name, "no UID", "digits and dots, 64 at most")
    queue.submit(job, retrieve(study, series), series)


def _bounded(request: Request, limit: int) -> Callable[[], Awaitable[dict]]:
    """The body of a request, which ends with a refusal where it is longer than it may be.

    Raises:
        Refused: it says so beforehand.
    """
    too_large = Refused(413, f"The request has more than {limit:,} bytes.")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    left = limit

    async def receive() -> dict:
        nonlocal left
        message = await request.receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise too_large
        return message

    return receive


async def _form(request: Request) -> FormData:
    return await request.form(max_files=1, max_fields=2, max_part_size=1024)


@contextlib.contextmanager
def _stored(file: UploadFile, job: Job) -> Iterator[Path]:
    """An upload as a file, under a name of ours."""
    suffix = SUFFIX.search((file.filename or "").lower())
    path, digest = job.folder / f"scan{suffix[0] if suffix else ''}", hashlib.sha256()
    try:
        with file.file as source, path.open("wb") as target:
            source.seek(0)
            while block := source.read(2**20):
                digest.update(block)
                target.write(block)
        job.file_sha256 = digest.hexdigest()
        yield path
    finally:
        path.unlink(missing_ok=True)


async def _has_left(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, queue: ReportQueue):
        super().__init__(config)
        self.queue = queue

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.queue.drain()
        super().handle_exit(sig, frame)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve_reports(
    queue: ReportQueue,
    host: str,
    port: int,
    *,
    token: str | None = None,
    retrieve: Retrieve | None = None,
    log_level: str = "info",
) -> None:
    """Serve until the process is told to end; what is under way is then finished, within the time of grace."""
    config = uvicorn.Config(
        build_app(queue, token, retrieve), host=host, port=port, log_level=log_level, server_header=False,
        timeout_graceful_shutdown=round(queue.limits.grace) + 5,
    )  # fmt: skip
    _Server(config, queue).run()
