# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Retrieve a series from a PACS (QIDO-RS, WADO-RS) and store objects in it (STOW-RS), with dicomweb-client.

Error messages name the host of the server. They contain no UIDs and no text from the server, which may name a patient.
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pydicom
import requests
from dicomweb_client import DICOMwebClient
from pydicom.config import IGNORE
from pydicom.uid import UID
from retrying import RetryError

from ..inflate_diffvp import MAX_ARCHIVE_BYTES, MAX_FILES
from ..slices_diffvp import DAMAGED
from ..volume_diffvp import CTInputError
from .source import values_as_they_are

# Without a handler, they would print tracebacks and warnings of the server.
for library in ("dicomweb_client", "retrying"):
    logging.getLogger(library).addHandler(logging.NullHandler())

TIMEOUT = (10, 120)  # seconds to connect, seconds between two reads
AS_STORED = (("application/dicom", "*"),)  # in the transfer syntax of the server, without transcoding


class DicomWebError(CTInputError):
    """A PACS cannot be reached, refuses the request, or does not have the requested objects."""


@contextlib.contextmanager
def retrieve(url: str, study: str, series: str | None = None, allow_incomplete: bool = False) -> Iterator[Path]:
    """
    Yield a temporary folder with the CT series of a study, for [`read_ct`] with the same `series`.

    Args:
        url: URL of the service, such as http://pacs:8042/dicom-web. Credentials come from ~/.netrc.
        study: StudyInstanceUID.
        series: SeriesInstanceUID of the series to retrieve; `None` or a number retrieves all CT series.
        allow_incomplete: also accept a series of which the server sends fewer instances than it has.

    Raises:
        DicomWebError: there is no such study or series, it exceeds the limits of [`read_ct`] for archives, or the
            server fails.
    """
    host = _host(url)
    one = None if series is None or series.isdecimal() else series
    for name, uid in (("StudyInstanceUID", study), ("SeriesInstanceUID", one)):
        if uid is not None and not UID(uid, IGNORE).is_valid:
            raise DicomWebError(host, name, "not a UID", "digits and dots, at most 64")
    with tempfile.TemporaryDirectory(prefix="diffvp-") as temporary:
        folder = Path(temporary) / "study"
        folder.mkdir()
        with _answers(host):
            client = _client(url, _at_most(MAX_ARCHIVE_BYTES, host))
            number = 0
            for uid, promised in _series(client, host, study, one):
                first = number
                for instance in client.iter_series(study, uid, media_types=AS_STORED):
                    number += 1
                    if number > MAX_FILES:
                        raise DicomWebError(host, "number of instances", "too large", f"at most {MAX_FILES}")
                    with values_as_they_are():
                        instance.save_as(folder / f"{number:06d}.dcm", enforce_file_format=True)
                if promised is not None and number - first < promised and not allow_incomplete:
                    found = f"{number - first} of {promised}"
                    expected = "all of the series; --allow-incomplete reads the others"
                    raise DicomWebError(host, "number of instances", found, expected)
        yield folder


def store(url: str, objects: Sequence[pydicom.Dataset]) -> None:
    """
    Store objects in their study.

    Raises:
        DicomWebError: the server does not store all of them.
    """
    host, statuses = _host(url), []
    with _answers(host), values_as_they_are():
        client = _client(url, lambda response, **_: statuses.append(response.status_code))
        client.set_http_retry_params(
            retry=False
        )  # a retry would send an empty body, because the first try consumes it
        answer = client.store_instances(objects, study_instance_uid=objects[0].StudyInstanceUID)
    if not answer and statuses[-1] == 200:  # everything is stored (PS3.18, 10.5.3), without a list
        return
    stored = {one.ReferencedSOPInstanceUID for one in answer.get("ReferencedSOPSequence") or []}
    missing = sum(one.SOPInstanceUID not in stored for one in objects)
    if missing:
        failed = answer.get("FailedSOPSequence") or []
        reasons = sorted({f"{one.FailureReason:#06x}" for one in failed if "FailureReason" in one})
        found = ", ".join([f"{missing} of {len(objects)} not stored", *reasons])
        raise DicomWebError(host, "STOW-RS", found, "all stored")


def _host(url: str) -> str:
    """Return the host of a URL, for messages."""
    expected = "http:// or https://, host and path of the service, such as http://pacs:8042/dicom-web"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is not a number
        valid = False
    if not valid:
        raise DicomWebError("DICOMweb", "URL", "malformed", expected)
    if parts.username or parts.password:
        raise DicomWebError(parts.hostname, "URL", "with a name or password", "none: put them into ~/.netrc")
    return parts.hostname


def _client(url: str, on_response: Callable) -> DICOMwebClient:
    client = DICOMwebClient(url.rstrip("/"), timeout=TIMEOUT, callback=on_response)
    client.set_http_retry_params(max_attempts=3)
    return client


def _at_most(limit: int, host: str) -> Callable:
    """Return a callback that counts the bytes of all responses as they are read, and refuses more than the limit."""
    left = limit

    def count(response: requests.Response, **_) -> requests.Response:
        read = response.iter_content

        def iter_content(*args, **kwargs):
            nonlocal left
            for chunk in read(*args, **kwargs):
                left -= len(chunk)
                if left < 0:
                    raise DicomWebError(host, "bytes received", "too many", f"at most {limit}: one study")
                yield chunk

        response.iter_content = iter_content
        return response

    return count


def _series(client: DICOMwebClient, host: str, study: str, series: str | None) -> list[tuple[str, int | None]]:
    """Return the UID of each CT series of a study, and the number of instances stated by the server."""
    filters = {} if series is None else {"SeriesInstanceUID": series}
    fields = ["Modality", "NumberOfSeriesRelatedInstances"]
    answers = client.search_for_series(study, fields=fields, search_filters=filters)
    with values_as_they_are():
        found = [pydicom.Dataset.from_json(answer) for answer in answers]
    if not found:
        raise DicomWebError(host, "study" if series is None else "series", "not there", "one that the server has")
    found = [one for one in found if series in (None, one.SeriesInstanceUID) and one.get("Modality", "CT") == "CT"]
    if not found:
        raise DicomWebError(host, "Modality", "no CT series", "a study with a CT series")
    counts = [one.get("NumberOfSeriesRelatedInstances") for one in found]
    if sum(count or 0 for count in counts) > MAX_FILES:
        raise DicomWebError(host, "number of instances", sum(counts), f"at most {MAX_FILES}: one study")
    return [(str(one.SeriesInstanceUID), count) for one, count in zip(found, counts, strict=True)]


@contextlib.contextmanager
def _answers(host: str) -> Iterator[None]:
    """Turn errors of connection, HTTP and content into [`DicomWebError`]. Their texts contain the URL, with UIDs."""
    try:
        yield
    except (requests.HTTPError, RetryError) as error:
        answer = error.response if isinstance(error, requests.HTTPError) else error.last_attempt.value
        raise DicomWebError(host, "HTTP status", answer.status_code, "200, of a study that may be read") from None
    except requests.RequestException as error:
        raise DicomWebError(host, "connection", type(error).__name__, "a DICOMweb server that answers") from None
    except CTInputError:
        raise
    except (*DAMAGED, KeyError, TypeError, AttributeError) as error:
        raise DicomWebError(host, "answer", type(error).__name__, "what DICOMweb (PS3.18) specifies") from None
