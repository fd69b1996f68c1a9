# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Routes of `diffvp serve`.

    POST   /v1/reports              take a scan; answer its report, or with `Prefer: respond-async` 202 and a location
    GET    /v1/reports/{id}         return that report, once
    GET    /v1/reports/{id}/events  return it as server-sent events while it is written
    DELETE /v1/reports/{id}         cancel the request
    GET    /v1/settings             return checkpoint, digests, references and decoding
    GET    /healthz /readyz /metrics /openapi.json /docs

Errors are problem details (RFC 9457). Errors of a scan have `source`, `field`, `found` and `expected`, and never
contain the client's file name.
"""

import asyncio
import contextlib
import hashlib
import hmac
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
from ..report_diffvp import RESEARCH_USE
from .jobs import Abandoned, Job, Refused, ReportQueue

PROBLEM = "application/problem+json"
LISTENING = 0.2  # seconds between two looks at the text written so far

# The suffix is kept because it names the format. The rest of a file name may name the patient, and is dropped.
SUFFIX = re.compile(r"(\.nii)?\.[a-z0-9]{1,8}$")

Retrieve = Callable[[str, str | None], AbstractContextManager[Path]]


class ProblemDetails(BaseModel):
    """Reason why there is no report. The last four fields describe an unreadable scan or a wrong form field."""

    title: str
    status: int
    detail: str
    source: str | None = None
    field: str | None = None
    found: str | None = None
    expected: str | None = None


class ReportAnswer(BaseModel):
    """A report with the fields of a line of `diffvp batch`: docs/reports.md.

    Attributes:
        id: id of the request.
        sha256: digest of the scan's content, which does not depend on the file format.
        file_sha256: digest of the uploaded file; null for a study that was retrieved.
        settings_sha256: digest of the settings in /v1/settings.
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
    """A request without an outcome. States: arriving, reading, waiting, writing."""

    id: str
    state: str


class FieldError(ValueError):
    """A form field is wrong."""

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
                            "description": "StudyInstanceUID on this service's DICOMweb server, instead of a file.",
                        },
                        "series": {
                            "type": "string",
                            "description": "SeriesInstanceUID, if a study or an archive has several series.",
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
        400: "The form is wrong.", 401: "The token is missing or wrong.",
        404: "There is no such request, or it has been answered.",
        408: "The upload took too long.", 413: "The upload is too large.",
        422: "The scan cannot be read, or does not show a chest.", 429: "Too many requests are waiting.",
        503: "The server is shutting down, or the request timed out.",
    }.items()
}  # fmt: skip


WRITTEN = {200: {"model": ReportAnswer}, 202: {"model": Pending}}


def problems(*statuses: int) -> dict:
    return {status: PROBLEMS[status] for status in statuses}


class _Answers:
    """The HTTP answers of a service, counted by status."""

    def __init__(self, queue: ReportQueue):
        self.queue = queue
        self.counter = Counter("diffvp_requests", "Answers by status", ["status"], registry=queue.registry)

    def problem(self, status: int, error: Exception, title: str | None = None, retry: int | None = None) -> Response:
        """Return problem details."""
        self.counter.labels(status).inc()
        facts = {name: getattr(error, name, None) for name in ("source", "field", "found", "expected")}
        facts = {name: str(value) for name, value in facts.items() if value is not None}
        content = {"title": title or type(error).__name__, "status": status, "detail": str(error), **facts}
        headers = {"Cache-Control": "no-store"} | ({} if retry is None else {"Retry-After": str(retry)})
        headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        return JSONResponse(content, status, headers, PROBLEM)

    def refusal(self, error: Exception) -> Response:
        """Return the answer for an outcome that is not a report."""
        if isinstance(error, Refused):
            return self.problem(error.status, error, "Refused", error.retry)
        if isinstance(error, EXPECTED_ERRORS):
            return self.problem(422, error)
        if isinstance(error, FieldError):
            return self.problem(400, error)
        if isinstance(error, Abandoned):  # seen in the metrics only; 499 is nginx's status for it
            return self.problem(499, RuntimeError("The client no longer waits for this report."), "Abandoned")
        return self.problem(
            500, RuntimeError("The report could not be written. The server's log says where it failed.")
        )

    def outcome(self, job: Job) -> Response:
        """Return the outcome of a job, and forget the job."""
        error = job.outcome.exception()
        record = None if error else job.outcome.result()
        self.queue.forget(job)
        if error:
            return self.refusal(error)
        self.counter.labels(200).inc()
        return JSONResponse(record, headers={"Cache-Control": "no-store"})

    def pending(self, job: Job) -> Response:
        """Return the state and the location of a job without an outcome."""
        place = f"/v1/reports/{job.id}"
        return JSONResponse({"id": job.id, "state": job.state}, 202, {"Location": place, "Cache-Control": "no-store"})


def build_app(queue: ReportQueue, token: str | None = None, retrieve: Retrieve | None = None) -> FastAPI:
    """
    Build the service as an ASGI application.

    Args:
        queue: queue with a loaded checkpoint.
        token: token that requests must send (`Authorization: Bearer`). Without one, only requests to names of this
            machine are answered, so that no web page can send requests through a visitor's browser.
        retrieve: function that retrieves a study from a DICOMweb server to a folder, given its UID and the UID of a
            series or `None`.
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
    answers = _Answers(queue)
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "::1", "[::1]"])

    @app.exception_handler(Refused)
    @app.exception_handler(FieldError)
    async def refused(_: Request, error: Exception) -> Response:
        return answers.refusal(error)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return answers.problem(error.status_code, RuntimeError(error.detail), "HTTP error")

    async def authorized(authorization: Annotated[str, Header()] = "") -> None:
        expected = f"Bearer {token}".encode()
        if token is not None and not hmac.compare_digest(authorization.encode(), expected):
            raise Refused(401, "The token is missing or wrong; expected Authorization: Bearer TOKEN.")

    protected = {"dependencies": [Depends(authorized)]}
    _add_report_routes(app, queue, answers, retrieve, protected)
    _add_service_routes(app, queue, protected)
    return app


def _add_report_routes(
    app: FastAPI, queue: ReportQueue, answers: _Answers, retrieve: Retrieve | None, protected: dict
) -> None:
    """Add the routes that write and return reports."""

    async def find(id: str) -> Job:
        return queue.find(id)

    @app.post(
        "/v1/reports", openapi_extra=UPLOAD, **protected,
        responses=WRITTEN | problems(400, 401, 408, 413, 422, 429, 503),
    )  # fmt: skip
    async def write_report(request: Request, prefer: Annotated[str, Header()] = "") -> Response:
        """Write the report of a scan. `Prefer: respond-async` answers at once with the location of the report."""
        job = queue.admit()  # before the upload is read, so that a refused client need not send it
        kept = False
        try:
            await _receive(request, job, queue, retrieve)
            if "respond-async" in prefer:
                kept = True
                queue.keep(job)
                return answers.pending(job)
            left = asyncio.create_task(_has_left(request))
            await asyncio.wait((job.outcome, left), return_when=asyncio.FIRST_COMPLETED)
            left.cancel()
            if not job.outcome.done():
                job.fail(Abandoned())
            return answers.outcome(job)
        finally:
            if not kept:
                queue.forget(job)

    @app.get(
        "/v1/reports/{id}", responses=WRITTEN | problems(401, 404, 422, 503), **protected,
    )  # fmt: skip
    async def get_report(job: Annotated[Job, Depends(find)]) -> Response:
        """Return the report once; it is then forgotten. Answer 202 until it is written."""
        return answers.outcome(job) if job.outcome.done() else answers.pending(job)

    @app.delete("/v1/reports/{id}", status_code=204, responses=problems(401, 404), **protected)
    async def delete_report(job: Annotated[Job, Depends(find)]) -> None:
        """Cancel the request and forget the scan and its report."""
        queue.forget(job)

    @app.get("/v1/reports/{id}/events", response_class=EventSourceResponse, responses=problems(401, 404), **protected)
    async def get_events(job: Annotated[Job, Depends(find)]) -> AsyncIterator[ServerSentEvent]:
        """Send `state` on each change, `text` with the text written so far, and finally `report` or `error`."""
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
        final = answers.outcome(job)
        kind = "report" if final.status_code == 200 else "error"
        yield ServerSentEvent(event=kind, raw_data=final.body.decode())


def _add_service_routes(app: FastAPI, queue: ReportQueue, protected: dict) -> None:
    """Add the routes that describe the service itself."""

    @app.get("/v1/settings", responses=problems(401), **protected)
    def get_settings() -> dict:
        """Return checkpoint and base model with digests, preprocessing, decoding and versions."""
        return queue.writer.header

    @app.get("/metrics", response_class=Response, responses=problems(401), **protected)
    def get_metrics() -> Response:
        """Return Prometheus metrics."""
        return Response(generate_latest(queue.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def get_health() -> dict[str, str]:
        """Check liveness: 503 means that the process must be restarted."""
        if not queue.alive:
            raise Refused(503, "The thread that writes reports has ended.")
        return {"status": "alive"}

    @app.get("/readyz")
    async def get_readiness() -> dict[str, str]:
        """Check readiness: 503 while the server shuts down."""
        if queue.draining:
            raise Refused(503, "The server is shutting down.")
        return {"status": "ready"}


async def _receive(request: Request, job: Job, queue: ReportQueue, retrieve: Retrieve | None) -> None:
    """Receive the form of a request and submit its scan.

    Raises:
        FieldError: a form field is wrong.
        Refused: the upload is too large or took too long.
    """
    bounded = Request(request.scope, _bounded(request, queue.limits.upload_bytes))
    try:
        form = await asyncio.wait_for(_form(bounded), queue.limits.timeout)
    except asyncio.TimeoutError:  # in Python 3.10, not the built-in TimeoutError
        raise Refused(408, f"The upload took more than {queue.limits.timeout:g} s.") from None
    known = {"file": UploadFile, "study": str, "series": str}
    for name, value in form.multi_items():
        if name not in known:
            raise FieldError(name[:64], "unknown", ", ".join(known))
        if not isinstance(value, known[name]):
            raise FieldError(name, "text" if name == "file" else "a file", "a file" if name == "file" else "text")
    file, study, series = (form.get(name) for name in known)
    if (file is None) == (study is None):
        raise FieldError("file", "missing" if file is None else "given together with study", "a file, or study")
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
    """Return a function that receives the body of a request and refuses one that exceeds the limit.

    Raises:
        Refused: the declared length exceeds the limit.
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
    """Yield an upload as a file with a name of our own."""
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
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, queue: ReportQueue):
        super().__init__(config)
        self.queue = queue

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.queue.drain()
        super().handle_exit(sig, frame)


def serve_reports(
    queue: ReportQueue,
    host: str,
    port: int,
    *,
    token: str | None = None,
    retrieve: Retrieve | None = None,
    log_level: str = "info",
) -> None:
    """Serve until the process is told to stop; accepted requests are then finished within the grace period."""
    config = uvicorn.Config(
        build_app(queue, token, retrieve), host=host, port=port, log_level=log_level, server_header=False,
        timeout_graceful_shutdown=round(queue.limits.grace) + 5,
    )  # fmt: skip
    _Server(config, queue).run()
