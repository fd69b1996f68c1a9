# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The bridge to RadMatch. RadMatch's own stages run here, against a server in the tests."""

import csv
import json
import sys

import pytest
from typer.testing import CliRunner

pytest.importorskip("radmatch", reason='RadMatch is not installed: pip install -e ".[radmatch]"')

from diffvp import cli
from diffvp.metrics.judge import JudgeError
from diffvp.metrics.radmatch import radmatch_page, score_radmatch

from .chat_server import EFFUSION, HEART, MISSED, NODULE, WRONG_SIDE, ChatServer, Status, by_radmatch


@pytest.fixture
def served():
    with ChatServer(by_radmatch) as server:
        server.whole = True
        yield server


def score(served, predictions, references, folder, **options):
    ids = [f"case {number}/é" for number in range(len(predictions))]
    return score_radmatch(ids, predictions, references, folder, base_url=served.url, model="m", **options)


def test_errors_are_counted_per_report(served, tmp_path):
    truth = f"{NODULE} {EFFUSION}"
    scores = score(served, [truth, NODULE, f"{NODULE} {WRONG_SIDE}"], [truth] * 3, tmp_path / "out")
    assert scores["n"] == scores["scored"] == 3
    assert scores["actionable_errors_per_report"] == pytest.approx(2 / 3)  # one missed, one on the wrong side
    assert scores["summary"]["muc_counts"] == {"COR": 4, "PAR": 0, "INC": 1, "MIS": 1, "SPU": 0}
    assert scores["summary"]["clinical_safety_summary"]["triage_recall"] == pytest.approx(4 / 6)
    assert scores["signature"].startswith("radmatch:0.2") and "|model:m|server:127.0.0.1:" in scores["signature"]
    assert "3 of 3 reports | 0.667 (" in radmatch_page(scores)


def test_empty_report_counts_as_missing_every_finding(served, tmp_path):
    scores = score(served, [NODULE, MISSED], [f"{NODULE} {EFFUSION}"] * 2, tmp_path)
    assert scores["scored"] == 2 and scores["summary"]["muc_counts"]["MIS"] == 3


def test_second_run_asks_only_about_changed_reports(served, tmp_path):
    first = score(served, [NODULE, EFFUSION, MISSED], [NODULE] * 3, tmp_path)
    asked = len(served.requests)
    assert (
        score(served, [NODULE, EFFUSION, MISSED], [NODULE] * 3, tmp_path)["summary"]["muc_counts"]
        == (first["summary"]["muc_counts"])
    )
    assert len(served.requests) == asked
    changed = score(served, [NODULE], [NODULE], tmp_path)  # fewer reports: the earlier ones no longer count
    assert changed["scored"] == 1 and changed["actionable_errors_per_report"] == 0
    assert score(served, [EFFUSION], [NODULE], tmp_path)["actionable_errors_per_report"] == 2


def test_failed_report_is_counted_and_mentioned(served, tmp_path):
    served.reply = lambda body, number: (
        Status(400) if WRONG_SIDE in body["messages"][-1]["content"] else by_radmatch(body, number)
    )
    scores = score(served, [NODULE, WRONG_SIDE], [NODULE] * 2, tmp_path)
    assert (scores["n"], scores["scored"], scores["interval"]) == (2, 1, None)
    assert "1 reports failed at the server" in radmatch_page(scores)
    with pytest.raises(JudgeError, match="no usable answer"):
        score(served, [WRONG_SIDE], [NODULE], tmp_path / "other")


def test_reports_leave_the_machine_only_with_permission(tmp_path):
    with pytest.raises(JudgeError, match="reports-leave-machine"):
        score_radmatch(["1"], ["a"], ["b"], tmp_path / "o", base_url="https://api.example.com/v1", model="m")
    assert not (tmp_path / "o").exists()


def test_environment_is_restored_and_no_proxy_is_used(served, tmp_path, monkeypatch):
    import os

    with ChatServer(by_radmatch) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("NO_PROXY", "example.org")
        before = dict(os.environ)
        score(served, [NODULE], [NODULE], tmp_path)
        assert dict(os.environ) == before and not proxy.requests


def test_ids_appear_only_in_their_own_table(served, tmp_path):
    score(served, [NODULE], [NODULE], tmp_path)
    with open(tmp_path / "reports.csv", newline="", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert row["id"] == "case 0/é" and (tmp_path / "true" / f"{row['report']}.txt").read_text() == NODULE
    assert not any("case" in path.name for path in tmp_path.rglob("*.json"))


def table(folder):
    path = folder / "reports.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "prediction", "reference"), ("1", NODULE, NODULE), ("2", HEART, EFFUSION)])
    return str(path)


def test_command_prints_radmatch_below_the_other_scores(served, tmp_path, monkeypatch):
    monkeypatch.setattr("diffvp.metrics.report_table.score_table", lambda *args, **options: {})
    monkeypatch.setattr("diffvp.metrics.report_table.table_page", lambda document: "the other scores")
    options = ["--radmatch", str(tmp_path / "out"), "--base-url", served.url, "--model", "m"]
    result = CliRunner().invoke(cli.app, ["score", table(tmp_path), *options, "--markdown"])
    assert result.exit_code == 0, result.output
    assert result.stdout.index("the other scores") < result.stdout.index("2 of 2 reports | 1.000 (0.000–2.000)")
    document = json.loads(CliRunner().invoke(cli.app, ["score", table(tmp_path), *options, "--json"]).stdout)
    assert document["radmatch"]["summary"]["muc_counts"]["COR"] == 1


@pytest.mark.parametrize("options", [[], ["--base-url", "https://example.com/v1", "--model", "m"]])
def test_missing_or_remote_server_is_refused_before_scoring(options, tmp_path):
    result = CliRunner().invoke(cli.app, ["score", table(tmp_path), "--radmatch", str(tmp_path / "out"), *options])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_missing_extra_gives_an_install_hint(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "diffvp.metrics.radmatch")
    monkeypatch.setitem(sys.modules, "radmatch", None)
    result = CliRunner().invoke(cli.app, ["score", table(tmp_path), "--radmatch", str(tmp_path / "out")])
    assert result.exit_code == 2 and "pip install" in result.stderr and "radmatch" in result.stderr
