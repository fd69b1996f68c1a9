# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Fig. 6: a few cases with the true report and the reports of all rows."""

from .material import Kind, Material, Needs, device_lines, shown_cases


def content(material: Material) -> dict:
    """Return the reports of the first model of each row, for a few cases."""
    texts = material.first_texts()
    return {
        "figure": [
            {"id": case.name, "true": case.report, **{name: reports[case.name] for name, reports in texts.items()}}
            for case in shown_cases(material.test)
        ]
    }


def lines(document: dict) -> list[str]:
    """Write a heading for each case and a block for each report."""
    page = []
    for case in document["figure"]:
        page += [f"### {case['id']}", ""]
        for name, report in case.items():
            if name != "id":
                page += [f"**{name}**", "", "```", report, "```", ""]
    return page + device_lines(document)


KIND = Kind(Needs(), content, lines)
