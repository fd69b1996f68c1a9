# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Client for language model servers that speak OpenAI's chat protocol."""

import ipaddress
import os
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import openai

from . import JudgeError
from .prompt import SCHEMA

# Backoff of the openai library: half a second, doubled up to eight, or as the server asks (Retry-After).
RETRIES = 6


class ServerFailed(JudgeError):
    """The server did not answer a request, after all retries."""


class RequestRefused(Exception):
    """The server refuses this request only; for example, it is too long."""


@dataclass(frozen=True)
class Reply:
    """Text of a model and its token counts; `None` if the server does not count tokens."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class RequestForm:
    """Request fields that not every server accepts."""

    response_format: str = "json_schema"  # alternatives: json_object, none
    limit: str = "max_tokens"  # alternative: max_completion_tokens
    temperature: bool = True  # True sends temperature 0; False leaves the server's default

    def fields(self, max_tokens: int) -> dict:
        fields: dict = {self.limit: max_tokens}
        if self.temperature:
            fields["temperature"] = 0
        if self.response_format == "json_schema":
            schema = {"name": "judgement", "strict": True, "schema": SCHEMA}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.response_format == "json_object":
            fields["response_format"] = {"type": "json_object"}
        return fields

    def simpler(self, complaint: str) -> "RequestForm | None":
        """Return the form to try after this complaint, or `None` after the simplest one."""
        if "max_completion_tokens" in complaint and self.limit == "max_tokens":
            return replace(self, limit="max_completion_tokens")
        if "temperature" in complaint and self.temperature:
            return replace(self, temperature=False)
        following = {"json_schema": "json_object", "json_object": "none"}
        if self.response_format in following:
            return replace(self, response_format=following[self.response_format])
        return None


def is_local_server(base_url: str) -> bool:
    """
    True if the server is on this machine.

    Raises:
        JudgeError: `base_url` is not an http(s) address.
    """
    try:
        parts = urlsplit(base_url)
        host = (parts.hostname or "").rstrip(".")
        _ = parts.port
    except ValueError:
        parts, host = None, ""
    if parts is None or parts.scheme not in ("http", "https") or not host:
        raise JudgeError("--base-url: no address (expected an address such as http://localhost:8000/v1)")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified  # servers print 0.0.0.0 as their address


def check_endpoint(base_url: str, reports_leave_machine: bool) -> str:
    """
    Return the server's name for signatures, host:port, after checking that reports may be sent there.

    Raises:
        JudgeError: the server is another machine, and `reports_leave_machine` is False.
    """
    local = is_local_server(base_url)
    parts = urlsplit(base_url)
    name = f"{parts.hostname}:{parts.port or {'http': 80, 'https': 443}[parts.scheme]}"
    if not (local or reports_leave_machine):
        raise JudgeError(
            f"--base-url: {name} is another machine, and would receive all true and generated reports (expected a "
            "server on this machine, or --reports-leave-machine)"
        )
    return name


class ChatServer:
    """
    Model on a server. Requests that time out, are rejected (429) or fail (5xx) are repeated with backoff.

    The first requests determine which answer format the server accepts: a JSON schema, a JSON object, or plain text.
    The API key is read from the environment variable OPENAI_API_KEY; local servers need none.

    Args:
        base_url: address of the API, including `/v1`.
        model: name of the model on the server.
        reports_leave_machine: allow another machine, which then receives the reports.
        max_tokens: largest number of tokens of an answer.
        timeout: seconds for one answer. Most servers keep computing after a client gives up, so a retry slows them
            down further.
        retries: number of repetitions of a failed request.

    Raises:
        JudgeError: see [`check_endpoint`].
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        reports_leave_machine: bool = False,
        max_tokens: int = 1024,
        timeout: float = 600.0,
        retries: int = RETRIES,
    ):
        self.name = check_endpoint(base_url, reports_leave_machine)
        self.model = model
        self.max_tokens = max_tokens
        self.form = RequestForm()
        self.answered = False
        # Ignore proxies for a local server and never follow redirects: either would send the reports elsewhere.
        http = openai.DefaultHttpxClient(trust_env=not is_local_server(base_url), follow_redirects=False)
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout,
            max_retries=retries,
            http_client=http,
        )

    def ask(self, prompt: str) -> Reply:
        """
        Return the model's reply to one message.

        Raises:
            RequestRefused: the server refuses this request, but accepts others.
            ServerFailed: the server gave no answer after all retries.
            JudgeError: the server does not know the model or the key, or accepts no request at all.
        """
        while True:
            form = self.form
            try:
                completion = self._client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": prompt}], **form.fields(self.max_tokens)
                )
            except openai.APIStatusError as error:
                self._make_simpler(form, error)
                continue
            except openai.APITimeoutError as error:
                raise ServerFailed(f"{self.name} did not answer in time") from error
            except openai.APIConnectionError as error:
                cause = type(error.__cause__ or error).__name__
                raise ServerFailed(f"{self.name} cannot be reached, or hung up ({cause})") from error
            except (openai.OpenAIError, ValueError) as error:  # the body is not JSON, or not a completion
                raise ServerFailed(f"{self.name} answers as no OpenAI server does ({type(error).__name__})") from error
            self.answered = True
            return _reply(completion)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> "ChatServer":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _make_simpler(self, form: RequestForm, error: openai.APIStatusError) -> None:
        """Switch to a simpler form of requests after one of `form` was refused, or raise the error."""
        status, said = error.status_code, _what_it_said(error)
        complaint = str(error).lower()
        too_long = status == 413 or (status == 400 and "context" in complaint and "length" in complaint)
        if too_long or (self.answered and status in (400, 422)):
            raise RequestRefused(f"HTTP {status}") from error
        if status in (400, 422, 500, 501):
            if self.form != form:  # another thread has already switched
                return
            simpler = form.simpler(complaint)
            if simpler is not None:
                self.form = simpler
                return
        failed = ServerFailed if status == 429 or status >= 500 else JudgeError
        raise failed(f"{self.name} answers HTTP {status}{said}") from error


def _reply(completion) -> Reply:
    choices = getattr(completion, "choices", None) or []
    message = getattr(choices[0], "message", None) if choices else None
    usage = getattr(completion, "usage", None)
    return Reply(
        (message.content or "") if message is not None else "",
        getattr(usage, "prompt_tokens", None),
        getattr(usage, "completion_tokens", None),
    )


def _what_it_said(error: openai.APIStatusError) -> str:
    """Return the beginning of a server's complaint. It may quote the head of the prompt, but no report."""
    body = error.body if isinstance(error.body, dict) else {}
    said = body.get("message") or body.get("detail")
    return f": {' '.join(said.split())[:200]}" if isinstance(said, str) and said.strip() else ""
