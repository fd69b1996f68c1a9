# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""`diffvp serve` in a separate process, and many concurrent clients, for tests and the benchmark."""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Server:
    """Local server with a separate folder for its temporary files."""

    def __init__(self, checkpoint, folder: Path, *options, environment: dict | None = None, port: int | None = None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.log = (folder.parent / f"{folder.name}.log").open("w+")
        settings = os.environ | {
            "TMPDIR": str(folder), "PYTHONPATH": str(REPOSITORY.parent), "OMP_NUM_THREADS": "1", **(environment or {})
        }  # fmt: skip
        command = [sys.executable, "-m", "diffvp.cli", "serve", "--checkpoint", checkpoint, "--port", self.port]
        self.process = subprocess.Popen(
            [str(part) for part in (*command, *options)], env=settings, cwd=folder, stdout=self.log, stderr=self.log
        )
        self._wait()

    def _wait(self) -> None:
        with httpx.Client() as client:  # one, since each reads all certificates
            for _ in range(1200):
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended: {self.said()[-2000:]}")
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                        return
                time.sleep(0.1)
        raise RuntimeError("the server does not answer")

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def end(self, how: int = signal.SIGTERM, timeout: float = 60) -> int:
        self.process.send_signal(how)
        return self.process.wait(timeout)

    def metric(self, name: str) -> float:
        """Return the value of a metric without labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(300)
        self.log.close()


def send(client: httpx.Client, path: Path, content: bytes | None = None, **headers) -> httpx.Response:
    """Send one scan, and return the response. `content` replaces the content of the file, but not its name."""
    files = {"file": (path.name, path.read_bytes() if content is None else content)}
    return client.post("/v1/reports", files=files, headers=headers, timeout=1800)


@dataclass
class Outcome:
    """Results of many requests: seconds of those answered with a report, and all failures."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    mixed_up: list[str] = field(default_factory=list)
    wall: float = 0.0
    reports: dict[str, dict] = field(default_factory=dict)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ask(url: str, scans: Sequence[Path], broken: Sequence[Path], requests: int, clients: int) -> Outcome:
    """
    Send `requests` requests from `clients` concurrent clients, every tenth with a broken file.

    Each answer must carry the digest of the sent file, and the same report and probabilities as earlier answers for
    this scan.
    """
    outcome = Outcome()

    def one(client: httpx.Client, number: int) -> None:
        bad = bool(broken) and number % 10 == 9
        path = broken[number % len(broken)] if bad else scans[number % len(scans)]
        content = path.read_bytes()
        began = time.perf_counter()
        try:
            answer = send(client, path, content)
        except httpx.HTTPError as error:
            outcome.lost.append(f"{number}: {type(error).__name__}")
            return
        if bad:
            if answer.status_code == 422 and answer.json().get("field"):
                outcome.refused += 1
            else:
                outcome.lost.append(f"{number}: {answer.status_code} for a file that is none")
            return
        if answer.status_code != 200:
            outcome.lost.append(f"{number}: {answer.status_code} {answer.text[:200]}")
            return
        outcome.seconds.append(time.perf_counter() - began)
        record = answer.json()
        known = {key: record[key] for key in ("sha256", "report", "findings")}
        same = outcome.reports.setdefault(path.name, known) == known
        if record["file_sha256"] != hashlib.sha256(content).hexdigest() or not same:
            outcome.mixed_up.append(f"{number}: {path.name}")

    def work(first: int) -> None:
        with httpx.Client(base_url=url) as client:
            for number in range(first, requests, clients):
                one(client, number)

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(work, range(clients)))
    outcome.wall = time.perf_counter() - began
    return outcome
