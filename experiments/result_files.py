# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Files of results, written atomically: no reader sees a part of one."""

import json
from pathlib import Path

from ..storage_diffvp import replacing


def json_text(document: dict) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, document: dict) -> None:
    write_bytes(path, json_text(document).encode())


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)
