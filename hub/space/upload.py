# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
What strangers may send to the page, and how much of it.

Gradio writes a .pyi of stubs beside a file with a component of one's own; git does not keep it.
"""

import gradio as gr
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from .session import MAX_FILE_BYTES, Desk

FORM_BYTES = 64 * 1024  # of what surrounds the file of an upload


class Upload(gr.File):
    """A file that was sent here: its path, unseen. Whether it is one that can be read, the desk says, where all else
    is said; Gradio would leave an empty file for each, and fetch an address of the web without a bound."""

    is_template = True  # the browser shows it as what it is made of

    def preprocess(self, payload) -> str | None:
        return None if payload is None else payload.path

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        if str(url_or_file_path).startswith(("http://", "https://")):
            raise gr.Error("upload: an address (expected a file that you have sent)")
        return url_or_file_path


class UploadLimit:
    """Refuse uploads that there is no room for, before they are read and while they are."""

    def __init__(self, app, desk: Desk):
        self.app, self.desk = app, desk

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or not scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send)
            return
        left = MAX_FILE_BYTES + FORM_BYTES
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > left:
            await PlainTextResponse("The upload is too large.", 413)(scope, receive, send)
        elif not self.desk.has_room(int(declared)):
            await PlainTextResponse("Too many uploads are waiting; try again later.", 429)(scope, receive, send)
        else:

            async def bounded() -> dict:
                nonlocal left
                message = await receive()
                left -= len(message.get("body", b""))
                if left < 0:
                    raise HTTPException(413, "The upload is too large.")
                return message

            await self.app(scope, bounded, send)
