# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Local server for OpenAI's chat protocol, with replies and failures set by the test."""

import csv
import json
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from diffvp.metrics.judge.calibration import calibration_items
from diffvp.metrics.judge.rules import RuleJudge
from diffvp.metrics.judge.verdicts import Comparison

DIMENSIONS = (
    "finding_coverage",
    "clinical_actionability",
    "detail_richness",
    "anatomical_specificity",
    "quantification_detail",
)
# Sentences that `by_radmatch` knows.
NODULE, EFFUSION, HEART = "A nodule of 8 mm.", "Left pleural effusion.", "Normal heart."
MISSED, WRONG_SIDE = "", "Right pleural effusion."


class HalfAnswer(str):
    """Sent with the length of the whole answer, but truncated, so that the connection breaks."""


class RawBody(str):
    """Sent as the body, with status 200."""


class Status(int):
    """HTTP status with a message and headers."""

    def __new__(cls, status: int, message: str = "no", **headers: str):
        value = super().__new__(cls, status)
        value.message, value.headers = message, headers
        return value


class Wait(float):
    """Seconds before the answer is sent, which is too late."""


def answer(*winners: str, **more) -> str:
    """Return the JSON of an answer, with one winner for all dimensions or one for each."""
    winners = winners * 5 if len(winners) == 1 else winners
    return json.dumps({**{f"{name}_winner": w for name, w in zip(DIMENSIONS, winners, strict=True)}, **more})


def shown_texts(prompt: str) -> Comparison:
    """Return the true report, Report A and Report B of a prompt."""
    return Comparison(
        *(prompt.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0] for tag in ("GT", "Report A", "Report B"))
    )


def longer(prompt: str) -> str:
    """Answer as a judge that prefers the longer report, or Report A if both are equally long."""
    _, first, second = shown_texts(prompt)
    return answer("Report A" if len(first) >= len(second) else "Report B")


def by_rules(prompt: str) -> str:
    """Answer as a judge that follows the rules, and prefers Report A if they find no difference."""
    verdicts = RULES.judge([shown_texts(prompt)])
    scores = dict(zip(verdicts.dimensions, verdicts.scores[0], strict=True))
    return answer(*("Report A" if scores.get(name, 1) >= 0.5 else "Report B" for name in DIMENSIONS))


RULES = RuleJudge()


def by_radmatch(body: dict, number: int):
    """Answer RadMatch: one finding per sentence, equal last words match, other wordings are errors."""
    content = body["messages"][-1]["content"]
    stage = body["response_format"]["json_schema"]["name"]
    if stage == "findings_output":
        sentences = [of for of in (NODULE, EFFUSION, HEART, WRONG_SIDE) if of in content]
        keys = {"clinical_significance": "urgent", "comparison": None, "measurements": []}
        status = {of: "normal" if of == HEART else "abnormal" for of in sentences}
        return json.dumps({"findings": [{"text": of, "clinical_status": status[of], **keys} for of in sentences]})
    asked = json.loads(content)
    if stage == "matching_output":
        found, true = asked["pred_findings"], asked["gt_findings"]
        pairs = [(one["finding_id"], of["finding_id"]) for one in found for of in true
                 if one["text"].split()[-1] == of["text"].split()[-1]]  # fmt: skip
        return json.dumps(
            {
                "matches": [{"pred_id": one, "gt_id": of, "reasoning": ""} for one, of in pairs],
                "unmatched_pred": [
                    one["finding_id"] for one in found if one["finding_id"] not in {p for p, _ in pairs}
                ],
                "unmatched_gt": [of["finding_id"] for of in true if of["finding_id"] not in {t for _, t in pairs}],
            }
        )
    wrong = {"dimension": "location", "severity": "major", "reasoning": ""}
    same = [pair["pred_finding"]["text"] == pair["gt_finding"]["text"] for pair in asked["pairs"]]
    return json.dumps({"errors_per_match": [[] if of else [wrong] for of in same]})


def by_rules_or_radmatch(body: dict, number: int):
    """Answer the judge's prompts by the rules, and RadMatch's; for a server with `whole` bodies."""
    prompt = body["messages"][-1]["content"]
    return by_rules(prompt) if "<GT>" in prompt else by_radmatch(body, number)


def write_tables(folder: Path, count: int) -> list[str]:
    """Write A.csv and B.csv with `count` pairs, and return their names."""
    items = [item.comparison for item in calibration_items(2 * count) if item.kind == "graded"][:count]
    for name, column in (("A.csv", 1), ("B.csv", 2)):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["id", "prediction", "reference"])
            rows.writerows([f"case-{number}", item[column], item.truth] for number, item in enumerate(items))
    return [str(folder / "A.csv"), str(folder / "B.csv")]


def command(*arguments: object) -> list[str]:
    """Return the command line of `diffvp judge` for a separate process."""
    return [sys.executable, "-c", "from diffvp.cli import main; main()", "judge", *map(str, arguments)]


class ChatServer(ThreadingHTTPServer):
    """
    Attributes:
        reply: function of the prompt and the number of the request, from 1. It returns the text of a completion, or
            an instance of a class above.
        requests: bodies in order of arrival.
        headers: headers of each request.
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[str, int], object]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.requests, self.headers = reply, [], []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()  # poll interval for shutdown

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> "ChatServer":
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        pass  # clients that timed out


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the acknowledgement of the headers

    def log_message(self, *args) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.requests)
        prompt = body["messages"][-1]["content"]
        reply = self.server.reply(body if getattr(self.server, "whole", False) else prompt, number)
        if isinstance(reply, Wait):
            time.sleep(reply)
            reply = answer("Report A")
        if isinstance(reply, Status):
            self._send(int(reply), json.dumps({"error": {"message": reply.message}}), reply.headers)
        elif isinstance(reply, RawBody):
            self._send(200, str(reply), {})
        else:
            message = {"role": "assistant", "content": str(reply)}
            document = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
            self._send(200, json.dumps(document), {}, half=isinstance(reply, HalfAnswer))

    def _send(self, status: int, text: str, headers: dict, half: bool = False) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self.close_connection = True
