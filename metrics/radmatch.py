# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Bridge to RadMatch, which counts the errors in reports with a language model: `diffvp score --radmatch`.

RadMatch (Raidium, Apache-2.0) extracts the findings of both reports, matches them and grades the differences. Its
prompts, its chest CT examples and its rules are unchanged; its own documentation defines the metrics.
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

EXAMPLES = "chest-ct"  # few-shot examples that RadMatch ships
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
    Score generated reports with RadMatch, and write its findings for each report below `output`.

    Results in `output` are reused, so an interrupted run resumes. Each report is a file named by its number and the
    digest of its texts; `reports.csv` maps these names to ids.

    Returns:
        "n", the number of reports; "scored", the number that RadMatch scored (the others failed at the server and are
        left out of all scores); "actionable_errors_per_report" with its "interval" over reports; "summary", RadMatch's
        own summary; "signature".

    Raises:
        JudgeError: reports may not be sent to the server, or it gave no usable answer for any report.
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
    name = f"local:{model}"  # RadMatch's name for a custom server
    with _local_server(base_url):
        radmatch.extract_findings(output / "true", output / "generated", output, llm_extractor=name, **options)
        # RadMatch drops empty reports. All their findings are missed, so dropping them would reward empty reports.
        for stem, text in zip(stems, predictions, strict=True):
            if not text.strip():
                (generated / f"{stem}.json").write_text("[]", encoding="utf-8")
        # Restrict to these stems: an earlier run may have left findings of other reports.
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
    """Format the scores as Markdown."""
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
    """Name a report by its number and texts, because RadMatch reuses the findings of a file with the same name."""
    digest = hashlib.sha256(f"{prediction}\0{reference}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{number:06d}-{digest[:12]}"


def _write_reports(folder: Path, stems: Sequence[str], texts: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.txt"):  # left by an earlier run; RadMatch would score them, too
        path.unlink()
    for stem, text in zip(stems, texts, strict=True):
        (folder / f"{stem}.txt").write_text(text, encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _local_server(base_url: str) -> Iterator[None]:
    """Set the environment variables that select RadMatch's server, and bypass proxies for its host."""
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
