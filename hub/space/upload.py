# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Uploads to the page, and their limits.

Gradio writes a .pyi stub file next to a module with a custom component; git ignores it.
"""

import gradio as gr
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from .session import MAX_FILE_BYTES, Desk

FORM_BYTES = 64 * 1024  # allowance for the form around an uploaded file


class Upload(gr.File):
    """An uploaded file, passed on as its path without a check. The desk checks it and reports errors.

    Gradio's own component would leave an empty file for each upload, and download web addresses without a limit.
    """

    is_template = True  # the browser shows it as its base class

    def preprocess(self, payload) -> str | None:
        return None if payload is None else payload.path

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        if str(url_or_file_path).startswith(("http://", "https://")):
            raise gr.Error("upload: a web address (expected an uploaded file)")
        return url_or_file_path


class UploadLimit:
    """Refuse uploads that exceed the limits, before and while they are received."""

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
