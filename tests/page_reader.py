# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Type the code blocks of a page, as a reader does. test_docs.py runs this file in the reader's environment, which has no
pytest: `python -c SOURCE '[["bash", "..."], ["python", "..."]]'`.

Each bash block has a shell of its own, all Python blocks share one session. A server (`diffvp serve`, `diffvp app`)
goes on in the background, as in a second terminal, until the page ends or a block starts its like.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

PORTS = {"serve": 8000, "app": 7860}
SERVER = re.compile(r"^(?:\w+=\S+ )*diffvp (serve|app)\b.*$", re.MULTILINE)
WAIT = """
answers() { (exec 3<>/dev/tcp/127.0.0.1/$1) 2>/dev/null; }
wait_for() { until answers $1; do kill -0 $2; sleep 0.5; done; }
"""
servers: dict[str, subprocess.Popen] = {}


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def stop(name: str) -> None:
    if name in servers:
        with contextlib.suppress(ProcessLookupError):  # it ended, or its block's other server was stopped
            os.killpg(servers.pop(name).pid, signal.SIGTERM)
        while answers(PORTS[name]):
            time.sleep(0.1)


def run_bash(code: str) -> None:
    found = SERVER.findall(code)
    for name in found:
        stop(name)
        if answers(PORTS[name]):
            sys.exit(f"port {PORTS[name]} is in use, so `diffvp {name}` cannot be run")
    code = SERVER.sub(lambda line: f"{{ {line[0]}\n}} & wait_for {PORTS[line[1]]} $!", code)
    shell = subprocess.Popen(["bash", "-ec", WAIT + code], start_new_session=True)  # a session: killed as a whole
    servers.update(dict.fromkeys(found, shell))
    if shell.wait():
        sys.exit(f"exit status {shell.returncode}")


def main(blocks: list[list[str]]) -> None:
    session = {"__name__": "__main__"}
    try:
        for kind, code in blocks:
            sys.stdout.write(f">>> {code.splitlines()[0]}\n")
            sys.stdout.flush()
            if kind == "bash":
                run_bash(code)
            else:
                exec(compile(code, "block", "exec"), session)
    finally:
        for name in list(servers):
            stop(name)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
