# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The queue of scans between request and answer.

    arriving -> reading -> waiting -> writing -> an answer, or a refusal

Several threads read, a few scans ahead of the model. One thread writes the reports of all waiting scans together.
Everything else runs on the event loop, so no locks are needed. A scan's file is deleted after it is read, and a job is
forgotten after it is answered.
"""

import asyncio
import contextlib
import logging
import os
import queue as queues
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector
from transformers import BatchFeature

from ..inference.batch import ReportWriter
from ..inference.report import EXPECTED_ERRORS
from ..reading_diffvp import read_ct
from ..scratch import make_folder

FOLDER = "diffvp-serve-"
COMING = ("arriving", "reading")
log = logging.getLogger("diffvp.serve")


class Refused(Exception):
    """A request is refused for a reason other than its scan.

    Attributes:
        status: HTTP status.
        retry: seconds after which the client may try again.
    """

    def __init__(self, status: int, message: str, retry: int | None = None):
        super().__init__(message)
        self.status, self.retry = status, retry


class Abandoned(Exception):
    """The client no longer waits for the report."""


@dataclass(frozen=True)
class Limits:
    """
    Limits of the service.

    Attributes:
        batch_size: maximum number of scans to decode together.
        batch_wait: seconds for which a scan waits for others that are arriving or being read.
        workers: number of threads that read.
        waiting: maximum number of unanswered requests; further ones are refused.
        upload_bytes: maximum size of a request, including its form.
        timeout: seconds from a request to its answer, and seconds for which an unfetched answer is kept.
        grace: seconds to finish accepted requests when the server is told to stop.
    """

    batch_size: int = 16
    batch_wait: float = 0.1
    workers: int = os.cpu_count() or 1
    waiting: int = 32
    upload_bytes: int = 512 * 2**20
    timeout: float = 300.0
    grace: float = 30.0


@dataclass(eq=False)
class Job:
    """
    One request.

    Attributes:
        folder: folder of its file until it is read.
        outcome: the record of the report, or an exception.
        tokens: token ids of the report written so far.
    """

    id: str
    folder: Path
    outcome: asyncio.Future
    state: str = "arriving"
    tokens: list[int] = field(default_factory=list)
    file_sha256: str | None = None
    features: BatchFeature | None = None
    began: float = 0.0
    timers: list[asyncio.TimerHandle] = field(default_factory=list)

    def fail(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


class ReportQueue:
    """
    Queue of requests, with the threads that read and write.

    Args:
        writer: checkpoint with its engine.
        limits: see [`Limits`].

    Attributes:
        draining: `True` if no further requests are accepted.
        registry: Prometheus metrics.
    """

    def __init__(self, writer: ReportWriter, limits: Limits):
        self.writer, self.limits = writer, limits
        self.draining = False
        self.registry = CollectorRegistry()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: dict[str, Job] = {}
        ProcessCollector(registry=self.registry)
        waiting = Gauge("diffvp_requests_waiting", "Requests without an answer", registry=self.registry)
        waiting.set_function(lambda: len(self._jobs))
        self._seconds = Histogram(
            "diffvp_stage_seconds", "Seconds of a scan in each stage", ["stage"], registry=self.registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
        )  # fmt: skip
        self._sizes = Histogram(
            "diffvp_batch_size", "Scans decoded together", registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )  # fmt: skip

    async def open(self) -> None:
        """Start working on the current event loop."""
        self._loop = asyncio.get_running_loop()
        self._folder = make_folder(FOLDER)
        self._readers = ThreadPoolExecutor(self.limits.workers, "read")
        self._ahead = asyncio.Semaphore(2 * self.limits.batch_size)  # each scan in memory takes megabytes
        self._ready: asyncio.Queue[Job] = asyncio.Queue()
        self._reading: set[asyncio.Task] = set()
        self._calls: queues.SimpleQueue[Callable[[], None]] = queues.SimpleQueue()
        # A daemon thread, so that the process can end during a batch.
        threading.Thread(target=_work, args=(self._calls,), name="write", daemon=True).start()
        self._writing = asyncio.create_task(self._write_batches())

    async def close(self) -> None:
        """Stop at once; waiting clients get an answer."""
        self._give_up()
        for task in (self._writing, *self._reading):
            task.cancel()
        self._calls.put(None)
        self._readers.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def drain(self) -> None:
        """Accept no further requests and finish the others within the grace period. Signal handlers may call it."""
        self.draining = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, self.limits.grace, self._give_up)

    def _give_up(self) -> None:
        for job in list(self._jobs.values()):
            job.fail(Refused(503, "The server is shutting down.", retry=10))

    @property
    def alive(self) -> bool:
        """`True` while reports can be written."""
        return not self._writing.done()

    def admit(self) -> Job:
        """Return a new job with a folder for its scan.

        Raises:
            Refused: the queue is full or the server is shutting down.
        """
        if self.draining:
            raise Refused(503, "The server is shutting down.", retry=10)
        if len(self._jobs) >= self.limits.waiting:
            raise Refused(429, f"{len(self._jobs)} requests are waiting; expected fewer.", retry=5)
        job = Job(secrets.token_urlsafe(16), Path(tempfile.mkdtemp(dir=self._folder)), self._loop.create_future())
        job.began = self._loop.time()
        job.outcome.add_done_callback(
            lambda future: future.exception()
        )  # otherwise asyncio would log it as never retrieved
        late = Refused(503, f"No report after {self.limits.timeout:g} s.", retry=30)
        job.timers.append(self._loop.call_later(self.limits.timeout, job.fail, late))
        self._jobs[job.id] = job
        return job

    def find(self, name: str) -> Job:
        if name not in self._jobs:
            raise Refused(404, "There is no such request, or it has been answered.")
        return self._jobs[name]

    def forget(self, job: Job) -> None:
        """Remove a job that was answered or cancelled, with its files."""
        job.fail(Abandoned())
        for timer in job.timers:
            timer.cancel()
        self._jobs.pop(job.id, None)
        shutil.rmtree(job.folder, ignore_errors=True)

    def keep(self, job: Job) -> None:
        """Keep a job for a client that will fetch it, until `timeout` seconds after its outcome."""

        def wait(_: asyncio.Future) -> None:
            if job.id in self._jobs:
                job.timers.append(self._loop.call_later(self.limits.timeout, self.forget, job))

        job.outcome.add_done_callback(wait)

    def submit(self, job: Job, scan: AbstractContextManager[Path], series: str | None) -> None:
        """
        Submit the scan of a job.

        Args:
            scan: its file or folder, which exists while the context is open.
            series: number or UID of the DICOM series, if there are several.
        """
        job.state = "reading"
        task = asyncio.create_task(self._read(job, scan, series))
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    async def _read(self, job: Job, scan: AbstractContextManager[Path], series: str | None) -> None:
        await self._ahead.acquire()
        try:
            if not job.outcome.done():
                with self._seconds.labels("reading").time():
                    job.features = await self._loop.run_in_executor(self._readers, self._features, scan, series)
        except EXPECTED_ERRORS as error:
            job.fail(error)
        except Exception as error:  # a defect with one scan does not stop the others
            if not job.outcome.done():  # otherwise its folder is gone because it was cancelled
                _report(error)
            job.fail(error)
        if job.outcome.done():
            self._ahead.release()
            return
        job.state = "waiting"
        self._ready.put_nowait(job)

    def _features(self, scan: AbstractContextManager[Path], series: str | None) -> BatchFeature:
        with scan as path:
            volume = read_ct(path, series=series)
        options = {"digest": True, "allow_any_anatomy": self.writer.allow_any_anatomy}
        return self.writer.processor.image_processor(volume, **options)

    async def _write_batches(self) -> None:
        while True:
            batch = [await self._ready.get()]
            until = self._loop.time() + self.limits.batch_wait
            while len(batch) < self.limits.batch_size and (self._ready.qsize() or self._loop.time() < until):
                if self._ready.qsize():
                    batch.append(self._ready.get_nowait())
                elif any(job.state in COMING and not job.outcome.done() for job in self._jobs.values()):
                    await asyncio.sleep(0.005)
                else:
                    break
            for _ in batch:
                self._ahead.release()
            await self._write([job for job in batch if not job.outcome.done()])
            for job in batch:  # otherwise they stay in memory until the next batch
                job.features = None

    async def _write(self, batch: list[Job]) -> None:
        if not batch:
            return
        self._sizes.observe(len(batch))
        for job in batch:
            job.state, job.tokens = "writing", []
            self._seconds.labels("before writing").observe(self._loop.time() - job.began)
        try:
            with self._seconds.labels("writing").time():
                records = await self._in_thread(self._records, batch)
        except Abandoned:
            return
        except Exception as error:
            if len(batch) > 1:  # one scan may be the cause, or the memory suffices for fewer only
                for job in batch:
                    if not job.outcome.done():
                        await self._write([job])
                return
            if not isinstance(error, EXPECTED_ERRORS):
                _report(error)
            batch[0].fail(error)
            return
        for job, record in zip(batch, records, strict=True):
            if not job.outcome.done():
                job.outcome.set_result(record)

    async def _in_thread(self, function: Callable, *arguments):
        """Run a function in the thread that writes, and return its result."""
        done = self._loop.create_future()

        def settle(settle_it: Callable, value) -> None:
            if not done.done():
                settle_it(value)

        def call() -> None:
            try:
                outcome = done.set_result, function(*arguments)
            except Exception as error:
                outcome = done.set_exception, error
            with contextlib.suppress(RuntimeError):  # the loop was closed in the meantime
                self._loop.call_soon_threadsafe(settle, *outcome)

        self._calls.put(call)
        return await done

    def _records(self, batch: list[Job]) -> list[dict]:
        def on_token(index: int, token: int) -> None:
            if all(job.outcome.done() for job in batch):
                raise Abandoned
            batch[index].tokens.append(token)

        read = [(job.id, job.file_sha256, job.features) for job in batch]
        records, _ = self.writer.write(read, on_token)
        return records

    def text(self, job: Job) -> str:
        """Return the text of the report written so far."""
        return self.writer.processor.decode(job.tokens, skip_special_tokens=True).strip()


def _work(calls: queues.SimpleQueue) -> None:
    while (call := calls.get()) is not None:
        call()


def _report(error: Exception) -> None:
    """Log where a defect arose, without its message, which might quote the scan."""
    trace, places = error.__traceback__, []
    while trace is not None:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    log.error("%s at %s", type(error).__name__, " < ".join(reversed(places)))
