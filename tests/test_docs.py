# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Run every code block of README and docs unchanged in a fresh clone (`make test-docs`, DIFFVP_DOCS=1).

A block that cannot be run here has a line `<!-- not run: REASON -->` before it. The blocks of a page run one after
another in one folder, its Python blocks in one process, as a reader would type them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .ct_samples import make_ct, write_dicom

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<kind>bash|python)\n(?P<code>.*?)```", re.DOTALL)
# Names that the pages presuppose: scans, reports, and lists of both.
PREPARED = """
import csv
from pathlib import Path
predictions = references = ["Lung: clear.", "Lung: A nodule of 6 mm is observed."]
paths = ["scan.nii.gz", "normal.nii.gz"]
repo = "checkpoints/diffvp-phantom"
"""


def blocks(page: str) -> list[re.Match]:
    return list(BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_gives_a_reason(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(blocks(page)) == len(re.findall(r"^ *```(?:bash|python)$", text, re.MULTILINE))
    assert text.count("<!-- not run:") == sum(block["reason"] is not None for block in blocks(page))


def test_no_page_installs_diffvp_from_pypi():
    """Anyone could register that name on PyPI and run code on the readers' machines."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        found = re.search(r"pip install (?:\S+ )*[\"']?diffvp(?:\[|[\"'\s]|$)", path.read_text(encoding="utf-8"))
        assert path == Path(__file__) or found is None, f"{path.name}: {found and found[0]}"


def script(page: str) -> str:
    """Return a program that runs the blocks of a page."""
    lines = ["import subprocess", PREPARED]
    for block in blocks(page):
        if block["reason"] is None:
            lines.append(f"print('>>>', {block['code'].splitlines()[0]!r}, flush=True)")
            code = block["code"]
            lines.append(
                code if block["kind"] == "python" else f"subprocess.run(['bash', '-ec', {code!r}], check=True)"
            )
    return "\n".join(lines)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Clone of the committed state, with a reader's scans and reports in the same folder."""
    import nibabel as nib

    from diffvp.data.phantom import render_patient, sample_patient

    from .own_scans import write_own_scans

    folder = tmp_path_factory.mktemp("docs") / "diffvp"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    for index, name in enumerate(("scan", "normal")):
        scan = render_patient(sample_patient(7, index, "docs"), matrix=96)
        nib.save(nib.Nifti1Image(scan.hu, scan.affine), folder / f"{name}.nii.gz")
    for name in ("a", "b"):
        shutil.copy(folder / "scan.nii.gz", folder / f"{name}.nii.gz")
        (folder / "scans").mkdir(exist_ok=True)
        shutil.copy(folder / "scan.nii.gz", folder / "scans" / f"{name}.nii.gz")
    write_dicom(folder / "patient_7", make_ct((40, 40, 30)))
    write_own_scans(folder / "my_scans", normal=9, others=7)
    (folder / "scans.csv").write_text("path\nscans/a.nii.gz\n")
    for name, columns in {
        "reports.csv": ("id,prediction,reference,report", "a,Lung: clear.,Lung: clear.,Lung: clear.\n"),
        "train.csv": ("report", "Lung: clear.\nHeart: Heart size is increased.\n"),
    }.items():
        (folder / name).write_text("\n".join(columns))
    return folder


@pytest.mark.skipif(not os.environ.get("DIFFVP_DOCS"), reason="an hour of two cores: make test-docs")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_blocks_of_a_page_run(page, clone):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(clone.parent),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script(page)], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
