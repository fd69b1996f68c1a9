# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Files of results: written atomically, with the machine that made them."""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def machine() -> dict:
    """Return date, machine, device and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def json_text(document: dict) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, document: dict) -> None:
    write_bytes(path, json_text(document).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: no reader sees a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
