# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
A bridge to RadMatch, which counts errors in a report by a language model: `diffvp score --radmatch`.

RadMatch (Raidium, Apache-2.0) takes the findings out of both reports, matches them, and grades what differs. Its
prompts, its examples for chest CT and its rules are used as they are; see its own documentation for the metrics.
"""

import contextlib
import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import radmatch
from radmatch import constants

from .judge import JudgeError
from .judge.server import check_endpoint
from .markdown import table_lines, with_interval
from .statistics import bootstrap_mean

EXAMPLES = "chest-ct"  # of RadMatch's own
RATES = ("triage_recall", "actionable_recall", "triage_precision", "actionable_precision")


def score_radmatch(
    ids: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    output: str | os.PathLike,
    *,
    base_url: str,
    model: str,
    reports_leave_machine: bool = False,
    workers: int = 4,
) -> dict:
    """
    RadMatch's scores of generated reports, and what it found in each, below `output`.

    What is there is used again: a run that was interrupted goes on. A report is a file there, named by its number and
    the digest of its texts; `reports.csv` has the ids.

    Returns:
        "n" reports, of which "scored"; the others failed at the server and are left out of all scores.
        "actionable_errors_per_report" with its "interval" over reports; RadMatch's own summary as "summary";
        "signature".

    Raises:
        JudgeError: reports may not be sent to the server, or it answered for no report.
    """
    server = check_endpoint(base_url, reports_leave_machine)
    output = Path(output)
    stems = [_stem(number, *texts) for number, texts in enumerate(zip(predictions, references, strict=True))]
    _write_reports(output / "true", stems, references)
    _write_reports(output / "generated", stems, predictions)
    with open(output / "reports.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("report", "id"), *zip(stems, ids, strict=True)])
    results = output / constants.RESULTS_DIR
    true, generated = results / constants.FINDINGS_GT_DIR, results / constants.FINDINGS_PRED_DIR
    options = {"fewshot": EXAMPLES, "workers": workers}
    name = f"local:{model}"  # RadMatch's name for a server of one's own
    with _local_server(base_url):
        radmatch.extract_findings(output / "true", output / "generated", output, llm_extractor=name, **options)
        # RadMatch drops a report without text, whose every finding is missed: it would raise the score to write none.
        for stem, text in zip(stems, predictions, strict=True):
            if not text.strip():
                (generated / f"{stem}.json").write_text("[]", encoding="utf-8")
        # The stems, so that findings of other reports, from an earlier run, are not taken in.
        options |= {"llm_judge": name, "series_allowlist": set(stems)}
        radmatch.match_dataset(true, generated, results, **options)
        summary = radmatch.score_dataset(true, generated, results / constants.MATCHING_DIR, results, **options)
    scored = int(summary["metadata"]["n_reports"])
    if not scored:
        raise JudgeError(f"{server} gave RadMatch no usable answer for any report")
    folder = results / constants.PER_REPORT_METRICS_DIR
    errors = [
        json.loads(path.read_text(encoding="utf-8"))["actionable_errors_total"]
        for path in (folder / f"{stem}.json" for stem in stems)
        if path.is_file()
    ]
    interval = bootstrap_mean(errors) if len(errors) == scored > 1 else None
    return {
        "n": len(stems),
        "scored": scored,
        "actionable_errors_per_report": summary["actionable_errors_per_report"],
        "interval": None if interval is None else [interval.low, interval.high],
        "summary": summary,
        "signature": f"radmatch:{radmatch.__version__}|examples:{EXAMPLES}|model:{model.replace('|', ',')}|"
        f"server:{server}",
    }


def radmatch_page(scores: dict) -> str:
    """The scores as Markdown."""
    safety = scores["summary"]["clinical_safety_summary"]
    head = ["RadMatch", "errors per report that need action (less is better)", *(r.replace("_", " ") for r in RATES)]
    errors = with_interval(scores["actionable_errors_per_report"], scores["interval"])
    rates = ["-" if safety[rate] is None else f"{safety[rate]:.3f}" for rate in RATES]
    lines = table_lines(head, [[f"{scores['scored']} of {scores['n']} reports", errors, *rates]])
    if scores["scored"] < scores["n"]:
        lines += [
            "",
            f"{scores['n'] - scores['scored']} reports failed at the server and are in none of these scores.",
        ]
    return "\n".join([*lines, "", f"`{scores['signature']}`", ""])


def _stem(number: int, prediction: str, reference: str) -> str:
    """Another one for other texts: RadMatch takes findings that are there for those of the report."""
    digest = hashlib.sha256(f"{prediction}\0{reference}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{number:06d}-{digest[:12]}"


def _write_reports(folder: Path, stems: Sequence[str], texts: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.txt"):  # those of an earlier run, which RadMatch would score as well
        path.unlink()
    for stem, text in zip(stems, texts, strict=True):
        (folder / f"{stem}.txt").write_text(text, encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _local_server(base_url: str) -> Iterator[None]:
    """RadMatch takes its server from the environment; and no proxy may stand between this machine and itself."""
    host = urlsplit(base_url).hostname
    values = {
        "RADMATCH_LOCAL_BASE_URL": base_url,
        "RADMATCH_LOCAL_API_KEY": os.environ.get("OPENAI_API_KEY") or "none",
    }
    for name in ("NO_PROXY", "no_proxy"):
        values[name] = ",".join(filter(None, (os.environ.get(name), host)))
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
