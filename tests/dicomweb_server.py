# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Local DICOMweb server with QIDO, WADO and STOW of series, which can be told to fail. `make test-dicom` uses a real
server.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from urllib.parse import parse_qs, urlsplit

import pydicom

BOUNDARY = b"a-boundary"


class DicomWebServer(ThreadingHTTPServer):
    """
    Attributes:
        instances: data sets as bytes, in order of arrival.
        requests: method and path of each request.
        fail: functions called with the handler instead of answering, by kind of request: "search", "retrieve" or
            "store".
        promised: NumberOfSeriesRelatedInstances, if it differs from the actual number.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.instances: list[bytes] = []
        self.requests: list[str] = []
        self.fail: dict[str, Callable] = {}
        self.promised: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/dicom-web"

    def add(self, datasets) -> None:
        for one in datasets:
            content = BytesIO()
            one.save_as(content, enforce_file_format=True)
            self.instances.append(content.getvalue())

    def of_study(self, study: str) -> list[tuple[pydicom.Dataset, bytes]]:
        read = [(pydicom.dcmread(BytesIO(content), stop_before_pixels=True), content) for content in self.instances]
        return [(one, content) for one, content in read if one.StudyInstanceUID == study]

    def __enter__(self) -> "DicomWebServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()  # poll interval for shutdown
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: DicomWebServer

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append(f"GET {self.path}")
        address = urlsplit(self.path)
        _, _, _, study, _, *series = address.path.split("/")
        kind = "retrieve" if series else "search"
        if kind in self.server.fail:
            self.server.fail[kind](self)
        elif series:
            found = [content for one, content in self.server.of_study(study) if one.SeriesInstanceUID == series[0]]
            self.answer_parts(found)
        else:
            self.search(study, {name: values[0] for name, values in parse_qs(address.query).items()})

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        content = self.body()
        if "store" in self.server.fail:
            self.server.fail["store"](self)
            return
        boundary = self.headers["Content-Type"].split('boundary="')[1].rstrip('"').encode()
        stored = []
        for part in content.split(b"--" + boundary)[1:-1]:
            data = part.split(b"\r\n\r\n", 1)[1][:-2]
            self.server.instances.append(data)
            stored.append(pydicom.dcmread(BytesIO(data), stop_before_pixels=True))
        self.answer_stored(stored)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def search(self, study: str, filters: dict[str, str]) -> None:
        found: dict[str, list[pydicom.Dataset]] = {}
        for one, _ in self.server.of_study(study):
            found.setdefault(one.SeriesInstanceUID, []).append(one)
        answers = []
        for uid, ones in found.items():
            if filters.get("SeriesInstanceUID") in (None, uid):
                answer = pydicom.Dataset()
                answer.SeriesInstanceUID, answer.Modality = uid, ones[0].Modality
                answer.NumberOfSeriesRelatedInstances = self.server.promised or len(ones)
                answers.append(answer.to_json_dict())
        self.answer(200, "application/dicom+json", json.dumps(answers).encode())

    def answer_parts(self, parts: list[bytes]) -> None:
        content = b""
        for part in parts:
            content += b"\r\n--" + BOUNDARY + b"\r\nContent-Type: application/dicom\r\n\r\n" + part
        content += b"\r\n--" + BOUNDARY + b"--"
        kind = f'multipart/related; type="application/dicom"; boundary={BOUNDARY.decode()}'
        self.answer(200, kind, content)

    def answer_stored(self, stored: list[pydicom.Dataset], failed: list[pydicom.Dataset] = (), status=200) -> None:
        answer = pydicom.Dataset()
        answer.ReferencedSOPSequence = [_reference(one) for one in stored]
        if failed:
            answer.FailedSOPSequence = [_reference(one, FailureReason=0xA700) for one in failed]
        self.answer(status, "application/dicom+json", answer.to_json().encode())

    def answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _reference(one: pydicom.Dataset, **fields) -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = one.SOPClassUID, one.SOPInstanceUID
    for name, value in fields.items():
        setattr(item, name, value)
    return item
