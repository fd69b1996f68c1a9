# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Judges of report pairs: the model with a faulty server, the rules, and the calibration of both."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from diffvp import cli, progress
from diffvp.data.cases import DatasetError
from diffvp.metrics.judge import JudgeError
from diffvp.metrics.judge.calibration import calibrate, faulty, other_side, right, true_place
from diffvp.metrics.judge.rules import RuleJudge, lengths_mm
from diffvp.metrics.judge.table import calibration_page, judged, read_comparisons
from diffvp.metrics.judge.verdicts import Comparison, Verdicts, position_bias, win_rates

pytest.importorskip("openai", reason='the judge needs the extra "judge": pip install -e ".[judge]"')
pytest.importorskip("json_repair", reason='the judge needs the extra "judge": pip install -e ".[judge]"')

from diffvp.metrics.judge.answers import AnswerFile
from diffvp.metrics.judge.model import ModelJudge
from diffvp.metrics.judge.prompt import DIMENSIONS, prompt_text, read_answer
from diffvp.metrics.judge.server import ChatServer as Chat
from diffvp.metrics.judge.server import check_endpoint

from .chat_server import (
    ChatServer,
    HalfAnswer,
    RawBody,
    Status,
    Wait,
    answer,
    by_rules,
    longer,
    shown_texts,
    write_tables,
)

TRUTH = "Heart: Normal. Lung: A nodule measuring 8 mm is observed in the right upper lobe."
LONG, SHORT = "A nodule of 8 mm in the right upper lobe and no effusion.", "Normal lungs."


@pytest.fixture
def ask(tmp_path):
    """Function that judges with a server of given replies; both stay open until the test ends."""
    opened = []

    def judge(reply, comparisons=((TRUTH, LONG, SHORT),), *, timeout=5.0, retries=3, whole=False, **options):
        served = ChatServer(reply)
        served.whole = whole
        file = AnswerFile(tmp_path / f"answers-{len(opened)}.jsonl")
        opened.extend((served, file))
        chat = Chat(served.url, "m", timeout=timeout, retries=retries)
        opened.append(chat)
        model = ModelJudge(chat, file, **options)
        return model.judge([Comparison(*of) for of in comparisons]), served, model

    yield judge
    for of in opened:
        of.__exit__(None, None, None)


def judge_by(url: str, file: AnswerFile, comparisons: list, *, retries: int = 3, workers: int = 1) -> Verdicts:
    with Chat(url, "m", retries=retries) as chat:
        return ModelJudge(chat, file, workers=workers).judge(comparisons)


def pairs(count: int) -> list[Comparison]:
    return [Comparison(TRUTH, f"{LONG} Case {number}.", SHORT) for number in range(count)]


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        answer("Report B"),
        "Of course! Here is my judgement:\n```json\n" + answer("Report B") + "\n```\nI hope this helps.",
        "<think>Perhaps " + answer("Report A") + "?</think>" + answer("Report B"),
        answer("Report B").replace("}", ",}"),
        answer("Report B").replace('"', "'"),
        answer("Report B", evidence={"GT_key_findings": ["a nodule", "an eff"]})[:-12],  # cut off by max_tokens
        answer("report b "),
        answer("B"),
        'The format is {"finding_coverage_winner": "Report A" or "Report B", ...}.\n' + answer("Report B"),
    ],
    ids=["strict", "fence", "thinking", "comma", "quotes", "cut", "case", "letter", "echo"],
)
def test_answer_is_read_despite_surrounding_text(text):
    read = read_answer(text)
    assert read.winners == dict.fromkeys(DIMENSIONS, "B")
    assert not read.problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Report A is better.",
        answer("Tie"),
        answer("Report A or Report B"),
        '{"finding_coverage_winner": "Report A" or "Report B"}',
        '{"finding_coverage_winner": "Report A", "finding_coverage_winner": "Report B"}',
        '{"finding_coverage_winner": ["Report A"]}',
        "[" * 5000,
        '{"a":' * 5000,
        "{" * 5000,
        "[1, 2]",
        "null",
    ],
)
def test_answer_without_a_choice_gives_no_winner(text):
    assert set(read_answer(text).winners.values()) == {None}
    assert read_answer(text).problem


def test_choice_in_some_dimensions_is_kept():
    read = read_answer(answer("Report A", "Tie", "Report B", "Report A", "both"))
    assert list(read.winners.values()) == ["A", None, "B", "A", None]
    assert "clinical_actionability" in read.problem and "quantification_detail" in read.problem


def test_template_fields_in_reports_are_not_substituted():
    assert shown_texts(prompt_text("{first}", "{second} {0}", "{truth}")) == ("{first}", "{second} {0}", "{truth}")
    assert shown_texts(prompt_text("a", "", "b")).first == "(no text)"


# The server ----------------------------------------------------------------------------------------------------------


def test_both_orders_are_asked_and_the_preferred_report_wins(ask):
    verdicts, served, _ = ask(lambda prompt, number: longer(prompt))
    assert (verdicts.scores == 1).all()
    assert [shown_texts(body["messages"][0]["content"])[1:] for body in served.requests] == [
        (LONG, SHORT),
        (SHORT, LONG),
    ]
    assert all(body["temperature"] == 0 for body in served.requests)
    assert served.requests[0]["response_format"]["json_schema"]["strict"] is True


def test_judge_that_always_prefers_the_first_gives_ties(ask):
    verdicts, _, _ = ask(lambda prompt, number: answer("Report A"), pairs(3))
    assert (verdicts.scores == 0.5).all()
    bias = position_bias(verdicts)["detail_richness"]
    assert bias["first"]["value"] == 1 and bias["disagree"] == 1


def test_tie_is_asked_again_with_a_reason(ask):
    verdicts, served, _ = ask(lambda prompt, number: answer("Tie" if number % 2 else "Report B"), orders=1)
    assert (verdicts.scores != 0.5).all() and not verdicts.refused
    assert len(served.requests) == 2
    assert "finding_coverage_winner is 'Tie'" in served.requests[1]["messages"][0]["content"]


def test_two_ties_are_a_refusal_and_not_asked_again(ask):
    verdicts, served, model = ask(lambda prompt, number: answer("Tie"))
    assert np.isnan(verdicts.scores).all()
    assert verdicts.refused == {"no choice of A or B": 2}
    assert len(served.requests) == 4
    model.judge([Comparison(TRUTH, LONG, SHORT)])
    assert len(served.requests) == 4
    rates = win_rates(verdicts)["finding_coverage"]
    assert rates["value"] is None and rates["unanswered"] == 1


def test_dimension_without_a_choice_does_not_affect_the_others(ask):
    tie = "Report A", "Report A", "Tie", "Report A", "Report A"
    verdicts, _, _ = ask(lambda prompt, number: answer(*tie))
    assert np.isnan(verdicts.scores[0]).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    "failure",
    [Status(429), Status(429, Retry_After="0.01"), Status(500), Status(503), HalfAnswer("x" * 200), Wait(1.0)],
    ids=["429", "429-later", "500", "503", "half", "timeout"],
)
def test_failed_request_is_repeated(ask, failure):
    fails = iter([None, None, failure, failure])
    verdicts, served, _ = ask(lambda prompt, number: next(fails, None) or longer(prompt), pairs(2), timeout=0.5)
    assert (verdicts.scores == 1).all()
    assert len(served.requests) == 6


@pytest.mark.parametrize(
    "text", [RawBody('{"choices": [{"mess'), RawBody("<html>busy</html>"), RawBody("{}"), RawBody("[]")]
)
def test_malformed_response_is_not_counted_as_an_answer(ask, text):
    try:
        verdicts, _, _ = ask(lambda prompt, number: text)
    except JudgeError:
        return
    assert np.isnan(verdicts.scores).all() and sum(verdicts.refused.values()) == 2


def test_unreachable_server_is_named(tmp_path):
    with AnswerFile(tmp_path / "a.jsonl") as file, pytest.raises(JudgeError, match="127.0.0.1:9"):
        judge_by("http://127.0.0.1:9/v1", file, pairs(1), retries=0)


def test_answers_are_kept_if_the_server_fails(tmp_path):
    def dying(prompt, number):
        return longer(prompt) if number <= 5 else Status(500)

    with AnswerFile(tmp_path / "a.jsonl") as file:
        with ChatServer(dying) as served, pytest.raises(JudgeError, match="500"):
            judge_by(served.url, file, pairs(10), retries=0)
        assert len(file.answers) == 5
        with ChatServer(lambda prompt, number: longer(prompt)) as served:
            verdicts = judge_by(served.url, file, pairs(10), workers=3)
            assert len(served.requests) == 15
    assert (verdicts.scores == 1).all()


def test_failing_request_does_not_block_the_others(ask):
    def reply(prompt, number):
        return Status(500) if "Case 1." in prompt else longer(prompt)

    verdicts, _, model = ask(reply, pairs(4), retries=0)
    assert np.isnan(verdicts.scores[1]).all() and (verdicts.scores[[0, 2, 3]] == 1).all()
    assert sum(verdicts.refused.values()) == 2
    assert model.plan(pairs(4))["kept"] == 6  # unanswered questions are asked again in the next run


def takes(**refused):
    """Return the reply function of a server that refuses requests with these fields, as many servers do."""

    def reply(body, number):
        for field, complaint in refused.items():
            kind = body.get("response_format", {}).get("type")
            if field in body or field == kind:
                return Status(complaint[0], complaint[1])
        return longer(body["messages"][0]["content"])

    return reply


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        ({"json_schema": (400, "json_schema is not supported")}, {"response_format": {"type": "json_object"}}),
        ({"response_format": (422, "Unexpected fields")}, {"response_format": None}),
        ({"response_format": (500, "internal error")}, {"response_format": None}),
        ({"max_tokens": (400, "Use 'max_completion_tokens' instead.")}, {"max_completion_tokens": 1024}),
        ({"temperature": (400, "'temperature' does not support 0")}, {"temperature": None}),
        (
            {
                "max_tokens": (400, "Use 'max_completion_tokens' instead."),
                "temperature": (400, "'temperature' does not support 0"),
                "response_format": (400, "no"),
            },
            {"max_completion_tokens": 1024, "temperature": None, "response_format": None},
        ),
    ],
)
def test_request_adapts_to_fields_the_server_refuses(ask, refused, expected):
    verdicts, served, model = ask(takes(**refused), whole=True, retries=0)
    assert (verdicts.scores == 1).all()
    assert {key: served.requests[-1].get(key) for key in expected} == expected
    assert ("temperature" in model.signature) == ("temperature" in refused)


def test_overlong_report_is_skipped_and_the_schema_kept(ask):
    def reply(body, number):
        if "Case 0." in body["messages"][0]["content"]:
            return Status(400, "This model's maximum context length is 512 tokens.")
        return longer(body["messages"][0]["content"])

    verdicts, served, _ = ask(reply, pairs(2), whole=True)
    assert np.isnan(verdicts.scores[0]).all() and (verdicts.scores[1] == 1).all()
    assert served.requests[-1]["response_format"]["type"] == "json_schema"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_key_or_model_ends_the_run_at_once(ask, status):
    with pytest.raises(JudgeError, match=f"{status}.*no such"):
        ask(lambda prompt, number: Status(status, "no such"), pairs(5))


# Endpoints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000/v1",
        "http://127.0.0.1/v1",
        "http://[::1]:1/v1",
        "http://127.9.9.9/v1",
        "http://0.0.0.0:8/v1",
    ],
)
def test_local_endpoint_needs_no_flag(url):
    assert check_endpoint(url, False)


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com/v1",
        "http://192.168.0.7:8000/v1",
        "http://localhost.example.com/v1",
        "http://127.0.0.1@example.com/v1",
        "http://notlocalhost/v1",
    ],
)
def test_remote_endpoint_is_refused_without_the_flag(url):
    with pytest.raises(JudgeError, match="reports-leave-machine"):
        check_endpoint(url, False)
    assert check_endpoint(url, True)


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://localhost/v1", "http://", "http://localhost:x/v1"])
def test_malformed_address_is_refused(url):
    with pytest.raises(JudgeError, match="no address"):
        check_endpoint(url, True)


def test_password_in_the_address_is_not_in_the_signature(tmp_path):
    assert check_endpoint("http://user:secret@example.com/v1?key=secret", True) == "example.com:80"


def test_local_server_bypasses_the_proxy(ask, monkeypatch):
    with ChatServer(lambda prompt, number: answer("Report B")) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        verdicts, served, _ = ask(lambda prompt, number: longer(prompt))
        assert not proxy.requests
    assert len(served.requests) == 2 and (verdicts.scores == 1).all()


def test_redirect_to_another_server_is_not_followed(ask):
    with ChatServer(lambda prompt, number: answer("Report B")) as elsewhere:
        with pytest.raises(JudgeError):
            ask(lambda prompt, number: Status(307, Location=f"{elsewhere.url}/chat/completions"), retries=0)
        assert not elsewhere.requests


# Kept answers --------------------------------------------------------------------------------------------------------


def test_torn_line_is_dropped_and_asked_again(tmp_path):
    path = tmp_path / "a.jsonl"
    with ChatServer(lambda prompt, number: longer(prompt)) as served:
        with AnswerFile(path) as file:
            judge_by(served.url, file, pairs(2))
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        with AnswerFile(path) as file:
            assert len(file.answers) == 3
            verdicts = judge_by(served.url, file, pairs(2))
        assert len(served.requests) == 5
    assert (verdicts.scores == 1).all()
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    "line", [b"{}", b"no json", b"\xff\xfe", b'{"key": "1", "winners": {"finding_coverage": "C"}}', b"[]"]
)
def test_unrelated_answer_file_is_refused_and_unchanged(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(JudgeError, match="line 1"):
        AnswerFile(path)
    assert path.read_bytes() == line + b"\n"


def test_two_runs_cannot_share_an_answer_file(tmp_path):
    pytest.importorskip("fcntl", reason="files are not locked on Windows")
    with AnswerFile(tmp_path / "a.jsonl"), pytest.raises(JudgeError, match="another run"):
        AnswerFile(tmp_path / "a.jsonl")


def test_answer_key_depends_on_model_prompt_and_order(ask, tmp_path, monkeypatch):
    _, served, model = ask(lambda prompt, number: longer(prompt))
    keys = {question.key for question in model.questions([Comparison(TRUTH, LONG, SHORT)])}
    keys |= {question.key for question in model.questions([Comparison(TRUTH, SHORT, LONG)])}
    model.server.model = "other"
    keys |= {question.key for question in model.questions([Comparison(TRUTH, LONG, SHORT)])}
    monkeypatch.setattr("diffvp.metrics.judge.answers.SHA256", "another")
    keys |= {question.key for question in model.questions([Comparison(TRUTH, LONG, SHORT)])}
    assert len(keys) == 8


def test_signature_names_all_servers_whose_answers_were_used(tmp_path):
    with AnswerFile(tmp_path / "a.jsonl") as file:
        names = []
        for count in (1, 2):
            with ChatServer(lambda prompt, number: longer(prompt)) as served, Chat(served.url, "a|b") as chat:
                model = ModelJudge(chat, file)
                model.judge(pairs(count))
                names.append(model.server.name)
        assert model.signature.startswith("judge|pairwise|dims:5|orders:2|prompt:")
        assert f"|model:a,b|server:{','.join(sorted(names))}" in model.signature


JUDGE_PAIRS = """
import json, sys
from diffvp.metrics.judge.answers import AnswerFile
from diffvp.metrics.judge.model import ModelJudge
from diffvp.metrics.judge.server import ChatServer
from diffvp.metrics.judge.verdicts import Comparison

with ChatServer(sys.argv[1], "m") as chat, AnswerFile(sys.argv[2]) as file:
    pairs = [Comparison(*of) for of in json.load(open(sys.argv[3], encoding="utf-8"))]
    print(json.dumps(ModelJudge(chat, file, workers=2).judge(pairs).scores.tolist()))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_run_resumes_without_asking_twice(tmp_path):
    def slow(prompt, number):
        time.sleep(0.05)
        return longer(prompt)

    (tmp_path / "pairs.json").write_text(json.dumps(pairs(12)), encoding="utf-8")
    kept = tmp_path / "kept.jsonl"
    with ChatServer(slow) as served:
        line = [sys.executable, "-c", JUDGE_PAIRS, served.url, str(kept), str(tmp_path / "pairs.json")]
        killed = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not (kept.exists() and kept.read_bytes().count(b"\n") >= 8):
            assert killed.poll() is None, killed.communicate()
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        content = kept.read_bytes()
        done = content[: content.rindex(b"\n") + 1]
        assert 8 <= done.count(b"\n") < 24
        before = len(served.requests)
        resumed = subprocess.run(line, capture_output=True, text=True)
        assert resumed.returncode == 0, resumed.stderr
        assert len(served.requests) - before == 24 - done.count(b"\n")
    assert json.loads(resumed.stdout) == [[1.0] * 5] * 12
    assert kept.read_bytes().startswith(done)
    assert len({json.loads(line)["key"] for line in kept.read_text().splitlines()}) == 24


# Rules ---------------------------------------------------------------------------------------------------------------


def test_lengths_in_sentences_are_converted_to_mm():
    assert lengths_mm("12 x 9 mm, 1.5 cm and 3,5 mm") == (12.0, 15.0, 3.5)


@pytest.mark.parametrize(
    ("first", "second", "won"),
    [
        ("A nodule of 8 mm in the right upper lobe.", "No nodule was detected.", (1, 1, 1)),
        ("A nodule of 8 mm in the right upper lobe.", "A nodule of 8 mm in the left upper lobe.", (0.5, 1, 0.5)),
        ("A nodule of 16 mm in the right upper lobe.", "A nodule of 9 mm in the right upper lobe.", (0.5, 0.5, 0)),
        ("A nodule of 8 mm.", "A nodule in the right upper lobe.", (0.5, 0, 1)),
        ("", "A nodule.", (0, 0.5, 0.5)),
        ("A nodule. Pleural effusion.", "A nodule.", (0.5, 0.5, 0.5)),
    ],
)
def test_rules_find_the_report_with_more_of_the_truth(first, second, won):
    rules = RuleJudge()
    assert tuple(rules.judge([Comparison(TRUTH, first, second)]).scores[0]) == won
    assert tuple(rules.judge([Comparison(TRUTH, second, first)]).scores[0]) == tuple(1 - np.array(won))


# Calibration ---------------------------------------------------------------------------------------------------------


def test_known_winners_follow_from_the_findings_and_no_text():
    from diffvp.data.phantom import sample_patient

    for index in range(40):
        patient = sample_patient(3, index, "judge")
        assert right(patient, patient.findings)["finding_coverage"] == len(patient.findings)
        for finding in patient.findings:
            swapped = other_side(finding)
            if swapped is not None:
                assert true_place(swapped) and not true_place(swapped) & true_place(finding)
        stated = faulty(patient, patient.rng("test"))
        counts, best = right(patient, stated), right(patient, patient.findings)
        assert all(counts[name] <= best[name] for name in best)


def test_rules_agree_with_the_known_winners():
    of = calibrate(RuleJudge(), 100)
    assert all(entry["value"] >= 0.95 and entry["n"] == entry["asked"] for entry in of["agreement"].values())
    assert all(entry["value"] == 0.5 for entry in of["self"].values())
    assert of["corruptions"]["dropped"]["finding_coverage"]["value"] >= 0.95
    assert of["corruptions"]["side"]["anatomical_specificity"]["value"] >= 0.95
    assert of["corruptions"]["size"]["quantification_detail"]["value"] >= 0.95


@pytest.mark.parametrize("reply", [lambda prompt: answer("Report A"), lambda prompt: answer("Report B")])
def test_calibration_detects_a_judge_that_does_not_read(ask, reply):
    _, served, model = ask(lambda prompt, number: reply(prompt))
    of = calibrate(model, 8)
    assert {entry["value"] for entry in of["agreement"].values()} == {0.5}
    assert {entry["value"] for entry in of["self"].values()} == {0.5}
    assert {entry["first"]["value"] for entry in of["position"].values()} <= {0.0, 1.0}


def test_judge_without_answers_is_reported_as_not_measured(ask):
    _, _, model = ask(lambda prompt, number: "Once upon a time")
    page = calibration_page(calibrate(model, 2))
    assert "NOT MEASURED in coverage, specificity, quantification" in page
    assert "no JSON object with winners" in page


def test_calibration_confirms_a_judge_that_reads(ask):
    _, served, model = ask(lambda prompt, number: by_rules(prompt))
    of = calibrate(model, 12)
    # If the rules find no difference, this judge answers Report A in both orders.
    assert all(entry["value"] >= 0.9 for entry in of["agreement"].values())


# Win rates -----------------------------------------------------------------------------------------------------------


def test_sign_test_and_win_rate_count_cases():
    from scipy.stats import binomtest

    scores = np.array([1.0] * 9 + [0.0] * 2 + [0.5] * 4 + [np.nan])[:, None]
    of = win_rates(Verdicts(("finding_coverage",), scores))["finding_coverage"]
    assert (of["wins"], of["losses"], of["split"], of["unanswered"], of["n"]) == (9, 2, 4, 1, 15)
    assert of["value"] == pytest.approx(11 / 15)
    assert of["p"] == pytest.approx(binomtest(9, 11).pvalue)
    assert of["interval"][0] < of["value"] < of["interval"][1]


def test_equal_reports_count_half_and_are_not_asked(ask):
    _, served, model = ask(lambda prompt, number: longer(prompt))
    before = len(served.requests)
    document = judged(model, [Comparison(TRUTH, LONG, LONG + "\n"), Comparison(TRUTH, LONG, SHORT)])
    assert document["same"] == 1 and document["dimensions"]["detail_richness"]["value"] == 0.75
    assert len(served.requests) == before  # the other pair was asked before


def test_single_order_is_drawn_from_the_texts(ask):
    verdicts, served, model = ask(lambda prompt, number: longer(prompt), pairs(20), orders=1)
    assert len(served.requests) == 20
    shown_first = {"Case" in shown_texts(body["messages"][0]["content"]).first for body in served.requests}
    assert shown_first == {True, False}
    assert (verdicts.scores == 1).all() and "|orders:1|" in model.signature


# The command ---------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.app, ["judge", *map(str, arguments)])


def test_rules_judge_needs_no_server_and_no_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setitem(sys.modules, "json_repair", None)
    result = run(*write_tables(tmp_path, 10), "--judge", "rules", "--calibration", 20, "--markdown")
    assert result.exit_code == 0, result.output
    assert "|rules|" in result.stdout and "win rate" in result.stdout
    assert result.stdout.index("agrees with the known winner") < result.stdout.index("win rate")


def test_pages_are_terminal_tables_or_markdown(tmp_path):
    command = [*write_tables(tmp_path, 4), "--judge", "rules", "--calibration", 2]
    shown, page = (run(*command, *more).stdout for more in ([], ["--markdown"]))
    assert "┃" in shown and not [line for line in shown.splitlines() if line.startswith("|")]
    assert page.count("\n| --- ") == 2 and "┃" not in page


def test_missing_extra_error_is_one_line(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("diffvp.metrics.judge.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openai", None)
    result = run("--calibrate", "--base-url", "http://localhost:1/v1", "--model", "m")
    assert result.exit_code == 2
    assert re.search(r"openai, which is not installed: pip install '?openai\S* '?json-repair", result.stderr)
    assert result.stderr.count("\n") == 1


def test_page_and_json_agree(tmp_path):
    tables = write_tables(tmp_path, 6)
    with ChatServer(lambda prompt, number: by_rules(prompt)) as served:
        options = ["--base-url", served.url, "--model", "m", "--answers", tmp_path / "a.jsonl", "--calibration", 4]
        page = run(*tables, *options, "--price", 1, 2)
        assert page.exit_code == 0, page.output
        asked = len(served.requests)
        document = json.loads(run(*tables, *options, "--json").stdout)
        assert len(served.requests) == asked
    for of in document["dimensions"].values():
        assert f"{of['value']:.3f}" in page.stdout
    assert document["signature"] in page.stdout
    assert f"{asked} requests took {100 * asked:,} prompt and {10 * asked:,} completion tokens" in page.stderr
    assert f"cost {(100 * asked + 2 * 10 * asked) / 1e6:.2f}" in page.stderr


def test_dry_run_sends_no_request(tmp_path):
    with ChatServer(lambda prompt, number: by_rules(prompt)) as served:
        result = run(
            *write_tables(tmp_path, 3), "--base-url", served.url, "--model", "m", "--answers", tmp_path / "a.jsonl",
            "--dry-run",
        )  # fmt: skip
        assert result.exit_code == 0 and "prompt and" in result.stderr and not served.requests


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--calibrate"],
        ["--calibrate", "--base-url", "https://api.example.com/v1", "--model", "m"],
        ["--calibrate", "--judge", "rules", "--calibration", "0"],
    ],
)
def test_invalid_judge_options_error_is_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_progress_without_a_terminal_is_occasional_lines(monkeypatch, capsys):
    times = itertools.count(0, 6)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with progress.counting("Comparisons") as count:
        for done in range(4):
            count(done, 4)
    assert capsys.readouterr().err.splitlines() == ["Comparisons: 1 of 4", "Comparisons: 3 of 4"]


def table(path: Path, columns: str, *rows: str) -> Path:
    path.write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    return path


def write_reports(path: Path, rows: list[dict]) -> None:
    """Write a table of the kind that the suffix names."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        between = "\t" if path.suffix == ".tsv" else ","
        table(path, *(between.join(line) for line in [rows[0], *(row.values() for row in rows)]))


def test_true_reports_are_read_from_a_separate_table(tmp_path):
    first = table(tmp_path / "A.csv", "id,prediction", "1,a one", "2,a two")
    second = table(tmp_path / "B.csv", "id,prediction", "2,", "1,b one")
    truth = table(tmp_path / "T.csv", "id,reference", "3,t three", "2,t two", "1,t one")
    assert read_comparisons(first, second, truth) == [("t one", "a one", "b one"), ("t two", "a two", "")]


@pytest.mark.parametrize(
    ("second", "truth"),
    [
        ("id,prediction\n1,x\n", "id,reference\n1,t\n2,t\n"),
        ("id,prediction\n1,x\n2,y\n3,z\n", "id,reference\n1,t\n2,t\n"),
        ("id,prediction\n1,x\n2,y\n", "id,reference\n1,t\n"),
        ("id,prediction\n1,x\n2,y\n", "id,reference\n1,t\n2,\n"),
        ("id,prediction\n1,x\n1,y\n", "id,reference\n1,t\n2,t\n"),
        ("id,text\n1,x\n2,y\n", "id,reference\n1,t\n2,t\n"),
        ("id,prediction\n1,x\n2,y\n", "id,reference\n1,t\n2,Not given.\n"),
        ("id,prediction\n1,x\n2,y\n", "id,reference\n1,nan\n2,t\n"),
    ],
)
def test_tables_of_other_scans_are_refused(tmp_path, second, truth):
    first = table(tmp_path / "A.csv", "id,prediction", "1,a", "2,b")
    (tmp_path / "B.csv").write_text(second)
    (tmp_path / "T.csv").write_text(truth)
    with pytest.raises(DatasetError):
        read_comparisons(first, tmp_path / "B.csv", tmp_path / "T.csv")


def test_tables_with_other_true_reports_are_refused(tmp_path):
    first = table(tmp_path / "A.csv", "id,prediction,reference", "1,a,truth")
    second = table(tmp_path / "B.csv", "id,prediction,reference", "1,b,another truth")
    with pytest.raises(DatasetError):
        read_comparisons(first, second)
    table(tmp_path / "B.csv", "id,prediction,reference", "1,b,Not given.")
    assert read_comparisons(first, second) == [("truth", "a", "b")]
    with pytest.raises(DatasetError) as caught:
        read_comparisons(table(tmp_path / "C.csv", "id,prediction", "1,a"), second)
    assert [(problem.row, problem.field) for problem in caught.value.problems] == [(1, "header")]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_every_kind_are_judged(tmp_path, suffix):
    paths = [tmp_path / f"{name}.{suffix}" for name in ("A", "B")]
    for path in paths:
        rows = [{"id": f"{k}", "prediction": f"{path.stem} {k}", "reference": f"truth {k}"} for k in range(2)]
        write_reports(path, rows)
    expected = [("truth 0", "A 0", "B 0"), ("truth 1", "A 1", "B 1")]
    assert read_comparisons(*paths) == read_comparisons(*paths, paths[1]) == expected
    run = CliRunner().invoke(cli.app, ["judge", *map(str, paths), "--judge", "rules", "--calibration", "0", "--json"])
    assert run.exit_code == 0 and json.loads(run.stdout)["n"] == 2


def test_outputs_of_batch_are_judged(tmp_path):
    paths = [tmp_path / name / "reports.jsonl" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        lines = [{"statement": "...", "settings": {}, "versions": {}}]
        lines += [{"id": "1.nii.gz", "report": f"of {path.parent.name}", "settings_sha256": ""}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    truth = table(tmp_path / "metadata.csv", "path,report", "1.nii.gz,t one", "2.nii.gz,t two")
    assert read_comparisons(*paths, truth) == [("t one", "of a", "of b")]


@pytest.mark.parametrize("value", [["x"], {"x": 1}, 5, True], ids=repr)
def test_reports_and_ids_that_are_no_text_are_not_judged(tmp_path, value):
    good = {"id": 1, "prediction": "a", "reference": "t"}
    first, second = tmp_path / "A.jsonl", tmp_path / "B.jsonl"
    write_reports(first, [good])
    for column in ("prediction", "reference", "id") if value != 5 else ("prediction", "reference"):
        write_reports(second, [{**good, column: value}])
        for tables, name in ((first, second), "B.jsonl"), ((second, first), "B.jsonl"):
            with pytest.raises(DatasetError) as caught:
                read_comparisons(*tables)
            assert (name, 1, column) in [(p.table, p.row, p.field) for p in caught.value.problems]


def test_missing_prediction_is_judged_as_the_empty_text(tmp_path):
    first, second = tmp_path / "A.jsonl", tmp_path / "B.jsonl"
    write_reports(first, [{"id": 1, "prediction": float("nan"), "reference": "t"}])
    write_reports(second, [{"id": 1, "prediction": None}])
    assert read_comparisons(first, second) == [("t", "", "")]
