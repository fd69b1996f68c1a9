# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Check that base LLMs lose nothing: a tiny random LLM of each family in a DiffVP with LoRA, batched and saved in every
kind of checkpoint.

    python -m diffvp.benchmarks.bases

The families are those of `tests/base_families.py`. The table is also written into docs/bases.md.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from rich.progress import track
from transformers.utils.logging import disable_progress_bar

from diffvp.bases_diffvp import DiffVPBaseModelError
from diffvp.benchmarks.round_trip import TRIPS, batch_against_alone, logits, move_adapter, round_trip
from diffvp.metrics.markdown import table_lines
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.provenance import machine, versions
from diffvp.storage_diffvp import DiffVPCheckpointError
from diffvp.tests.base_families import (
    FAMILIES,
    OWN_CODE,
    REFUSED,
    TARGETS,
    TINY_FIELDS,
    make_scans,
    write_base,
    write_base_with_own_code,
)

LIMIT = 1e-5
NAMES = [*FAMILIES, *REFUSED, OWN_CODE]
BATCH = "batch"
DOCS = Path(__file__).parents[1] / "docs" / "bases.md"
START, END = "<!-- made by: python -m diffvp.benchmarks.bases -->\n", "<!-- end -->\n"


def make_inputs() -> dict[str, torch.Tensor]:
    """Return arguments of `forward`: a scan without findings, and one with all findings and thus a longer prompt."""
    ct, reference = make_scans()
    findings = torch.full((2, 18), -9.0)
    findings[1] = 9.0
    text = torch.randint(40, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"ct": ct, "reference": reference, "input_ids": text, "diagnosis_logits": findings}


def measure(name: str, folder: Path) -> dict[str, float | str]:
    """
    Measure one base of `NAMES`.

    Returns:
        `architecture`, `largest logit`, and for `BATCH` and each of `TRIPS` the largest difference of a logit or the
        message of the refusal. If the base is refused when the model is built: `architecture` and `refused`, the
        message.
    """
    if name == OWN_CODE:
        base = write_base_with_own_code(folder / "base")
    else:
        base = write_base(folder / "base", (FAMILIES | REFUSED)[name])
    adapter = LoraConfig(r=2, target_modules=TARGETS.get(name, "all-linear"))
    torch.manual_seed(0)
    try:
        model = DiffVPForConditionalGeneration.from_base(
            str(base), lora_config=adapter, config=TINY_FIELDS, trust_remote_code=True
        )
    except (DiffVPBaseModelError, DiffVPCheckpointError) as error:
        [architecture] = json.loads((base / "config.json").read_text())["architectures"]
        return {"architecture": architecture, "refused": str(error).replace(str(base), "base")}
    move_adapter(model, seed=5)
    inputs = make_inputs()
    new_adapter = LoraConfig(r=3, target_modules=TARGETS.get(name, "all-linear"))
    return {
        "architecture": type(model.language_model).__name__,
        "largest logit": float(logits(model, inputs).abs().max()),
        BATCH: batch_against_alone(model, inputs),
        **round_trip(model, inputs, folder, new_adapter),
    }


def table(families: dict[str, dict]) -> str:
    """Return the table of measured families, followed by the refusals."""
    rows, refusals = [], []
    for name, row in families.items():
        cells = []
        for trip in (BATCH, *TRIPS) if "refused" not in row else ():
            if isinstance(row[trip], str):
                refusals.append(f"- {name}, {trip}: {row[trip]}")
                cells.append("refused")
            else:
                figure = f"{row[trip]:.0e}" if row[trip] else "0"
                cells.append(figure if row[trip] <= LIMIT else f"**{figure}**")
        if cells:
            rows.append([name, row["architecture"], *cells])
        else:
            refusals.append(f"- {name} ({row['architecture']}): {row['refused']}")
    lines = table_lines(["base", "architecture", BATCH, *TRIPS], rows)
    return "\n".join([*lines, "", "Refused:", "", *refusals, ""])


def page(results: dict) -> str:
    largest = [row["largest logit"] for row in results["families"].values() if "refused" not in row]
    libraries = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join(
        [
            "# Base LLMs", "",
            f"`python -m diffvp.benchmarks.bases` with {libraries}, in float32 on the CPU ({results['machine']}).",
            f"A cell is the largest difference of a logit; bold is more than {LIMIT:.0e}. The largest logit of a",
            f"base is {min(largest):.0f} to {max(largest):.0f}.", "",
            table(results["families"]),
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    disable_progress_bar()
    families = {}
    for name in track(NAMES, "bases"):
        with tempfile.TemporaryDirectory() as folder:
            families[name] = measure(name, Path(folder))
    results = {
        "versions": versions(),
        "machine": machine(),
        "families": families,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bases.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "bases.md").write_text(page(results), encoding="utf-8")
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(START)
    DOCS.write_text(before + START + table(families) + END + rest.partition(END)[2], encoding="utf-8")
    print(table(families))


if __name__ == "__main__":
    main()
