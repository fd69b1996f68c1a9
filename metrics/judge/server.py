# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""A server of a language model that speaks the chat protocol of OpenAI: what it is asked, and what it takes."""

import ipaddress
import os
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import openai

from . import JudgeError
from .prompt import SCHEMA

# openai's own backoff: half a second, doubled up to eight, or what the server asks for (Retry-After).
RETRIES = 6


class ServerFailed(JudgeError):
    """The server did not answer one request, however often it was sent."""


class RequestRefused(Exception):
    """The server refuses this one request: it is too long, say."""


@dataclass(frozen=True)
class Reply:
    """Text of a model, and the tokens that it took; `None` where the server does not count."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class RequestForm:
    """The fields of a request that not every server takes."""

    response_format: str = "json_schema"  # or json_object, or none
    limit: str = "max_tokens"  # or max_completion_tokens
    temperature: bool = True  # 0; without it, the server's own

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
        """What to try after a request was refused with this complaint; `None` after the simplest."""
        if "max_completion_tokens" in complaint and self.limit == "max_tokens":
            return replace(self, limit="max_completion_tokens")
        if "temperature" in complaint and self.temperature:
            return replace(self, temperature=False)
        following = {"json_schema": "json_object", "json_object": "none"}
        if self.response_format in following:
            return replace(self, response_format=following[self.response_format])
        return None


def is_loopback(base_url: str) -> bool:
    """
    Whether the server is on this machine.

    Raises:
        JudgeError: it is no http(s) address.
    """
    try:
        parts = urlsplit(base_url)
        host = (parts.hostname or "").rstrip(".")
        _ = parts.port
    except ValueError:
        parts, host = None, ""
    if parts is None or parts.scheme not in ("http", "https") or not host:
        raise JudgeError("--base-url is no address; expected one such as http://localhost:8000/v1")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified  # 0.0.0.0, as servers say where they listen


def check_endpoint(base_url: str, reports_leave_machine: bool) -> str:
    """
    The server's name for signatures, host:port, if reports may be sent there.

    Raises:
        JudgeError: the server is another machine, and nobody said that reports may go there.
    """
    local = is_loopback(base_url)
    parts = urlsplit(base_url)
    name = f"{parts.hostname}:{parts.port or {'http': 80, 'https': 443}[parts.scheme]}"
    if not (local or reports_leave_machine):
        raise JudgeError(
            f"{name} is not this machine: all reports, true and generated, would be sent there. Say so with "
            "--reports-leave-machine, or give the address of a server here."
        )
    return name


class ChatServer:
    """
    A model on a server. Requests that time out, are turned away (429) or fail (5xx) are sent again with backoff.

    How answers are asked for (JSON by schema, as an object, or in words) is found out with the first request that the
    server refuses. The key is that of the environment, OPENAI_API_KEY; servers on this machine take none.

    Args:
        base_url: of the API, with its `/v1`.
        model: as the server calls it.
        reports_leave_machine: the server may be another machine, which then sees the reports.
        max_tokens: of an answer.
        timeout: seconds for one answer. Few servers stop when nobody waits: asked again, a slow one gets slower.

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
        # No proxy of the environment between this machine and itself, and no redirection to another one: either would
        # take the reports elsewhere.
        http = openai.DefaultHttpxClient(trust_env=not is_loopback(base_url), follow_redirects=False)
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout,
            max_retries=retries,
            http_client=http,
        )

    def ask(self, prompt: str) -> Reply:
        """
        The model's reply to one message.

        Raises:
            RequestRefused: this request is refused, though others are not.
            ServerFailed: no answer came, in [`RETRIES`] repetitions.
            JudgeError: the server does not know the model or the key, or takes no request at all.
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
            except (openai.OpenAIError, ValueError) as error:  # the body is no JSON, or none of a completion
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
        """Change the form of requests after one of `form` was refused, or raise what it was refused for."""
        status, said = error.status_code, _what_it_said(error)
        complaint = str(error).lower()
        too_long = status == 413 or (status == 400 and "context" in complaint and "length" in complaint)
        if too_long or (self.answered and status in (400, 422)):
            raise RequestRefused(f"HTTP {status}") from error
        if status in (400, 422, 500, 501):
            if self.form != form:  # another thread has seen to it
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
    """The beginning of a server's complaint. What it quotes of the request is the prompt's head, and no report."""
    body = error.body if isinstance(error.body, dict) else {}
    said = body.get("message") or body.get("detail")
    return f": {' '.join(said.split())[:200]}" if isinstance(said, str) and said.strip() else ""
