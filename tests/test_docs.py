# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Run every code block of README and docs in a fresh clone (`make test-docs`, DIFFVP_DOCS=1).

Each page has a clone and an environment of its own, with nothing but what `make demo` installs; further libraries come
from the commands of the page. Its blocks run one after another (page_reader.py) next to a reader's files
(reader_files.py). PLACEHOLDERS are replaced. A line before a block exempts it: `<!-- not run: REASON -->` always,
`<!-- needs: WHAT -->` where WHAT is missing on this machine.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>not run|needs): (?P<why>[^>]+) -->\n)? *```(?P<kind>bash|python)\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
# Blocks that need more than two cores without a GPU and the package registries.
NOT_RUN = {"CI runs it", "hours", "several GPUs", "LLaMA-2, CT-RATE and GPUs", "make test-vllm", "make test-ray"}
METEOR_DATA, CHECK_DATA = "METEOR's data", "DIFFVP_CHECK_DATA"


def blocks(page: str) -> list[re.Match]:
    return list(BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")))


def needs(block: re.Match) -> set[str]:
    return set(block["why"].split(", ")) if block["mark"] == "needs" else set()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_gives_a_reason(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(blocks(page)) == len(re.findall(r"^ *```(?:bash|python)\b", text, re.MULTILINE))
    assert len(re.findall("<!-- (?:not run|needs):", text)) == sum(block["mark"] is not None for block in blocks(page))
    assert {block["why"] for block in blocks(page) if block["mark"] == "not run"} <= NOT_RUN
    assert set().union(*map(needs, blocks(page))) <= {METEOR_DATA, CHECK_DATA}


def test_no_page_installs_diffvp_from_pypi():
    """Anyone could register that name on PyPI and run code on the readers' machines."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        found = re.search(r"pip install (?:\S+ )*[\"']?diffvp(?:\[|[\"'\s]|$)", path.read_text(encoding="utf-8"))
        assert path == Path(__file__) or found is None, f"{path.name}: {found and found[0]}"


READER = (ROOT / "tests" / "page_reader.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("block", "status"),
    [
        (("python", "assert value == 1"), 0),
        (("python", "assert value == 2"), 1),
        (("bash", "true\ntrue"), 0),
        (("bash", "false\ntrue"), 1),
        (("bash", "diffvp serve  # a server that does not start\ntrue"), 1),
    ],
)
def test_failing_block_fails_its_page(block, status, tmp_path):
    (tmp_path / "diffvp").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "diffvp").chmod(0o755)
    command = [sys.executable, "-c", READER, json.dumps([("python", "value = 1"), block])]
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == status


def missing() -> set[str]:
    """Return what blocks may need and this machine lacks."""
    from diffvp.metrics.nlg import lexicon

    found = set() if os.environ.get("DIFFVP_CHECK_DATA") else {CHECK_DATA}
    try:
        lexicon.load_wordnet()
    except lexicon.LexiconError:
        found.add(METEOR_DATA)
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """
    Return the folder of all clones, their environment as `make demo` makes it, and a reader's files.

    A virtual environment cannot be moved: it is made in the folder of the clones, and put back there for each page.
    """
    from .reader_files import write_reader_files

    folder = tmp_path_factory.mktemp("docs")
    clone = folder / "diffvp"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    subprocess.run(["make", ".venv/.installed-core"], cwd=clone, env=reader(), check=True)
    shutil.move(clone / ".venv", folder / "environment")
    write_reader_files(folder / "files")
    return clone, folder / "environment", folder / "files"


@pytest.fixture
def clone(prepared):
    """Fresh clone of the committed state, with a fresh environment and a reader's files in the same folder."""
    clone, environment, files = prepared
    shutil.rmtree(clone)
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    shutil.copytree(environment, clone / ".venv", symlinks=True, copy_function=os.link)
    shutil.copytree(files, clone, dirs_exist_ok=True)
    if data := os.environ.get("DIFFVP_CHECK_DATA"):
        for path in ("ct/pyradiomics/lung1_image.nrrd", "ct/pyradiomics/lung1_label.nrrd", "ct/cip/ct-64.nrrd"):
            shutil.copy(Path(data, path), clone)
        shutil.copy(Path(data, "reports/reg2rg_ctrg_combined_reports_rm_region_text.csv"), clone)
    return clone


@pytest.fixture
def servers(clone, tmp_path):
    """Servers of others that pages talk to, on this machine: what stands for PLACEHOLDERS, and the reader's Hub."""
    from .chat_server import ChatServer, by_rules_or_radmatch
    from .dicomweb_server import DicomWebServer
    from .hub_server import USER, Hub
    from .reader_files import read_series

    with DicomWebServer() as pacs, ChatServer(by_rules_or_radmatch) as model, Hub() as hub:
        model.whole = True
        series = read_series(clone / "SERIES")
        pacs.add(series)
        placeholders = {
            "URL": pacs.url,
            "UID": series[0].StudyInstanceUID,
            "HOST": "127.0.0.1",
            "NAME": USER,
            "http://localhost:8000/v1": model.url,
        }
        yield placeholders, hub.environment(tmp_path / "hub")


def reader(**more: str) -> dict[str, str]:
    """Return this environment without that of the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    tests = Path(sys.executable).parent
    places = [place for place in kept["PATH"].split(os.pathsep) if Path(place).absolute() != tests]
    return kept | {"PATH": os.pathsep.join(places)} | more


@pytest.mark.skipif(not os.environ.get("DIFFVP_DOCS"), reason="an hour of two cores: make test-docs")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("page", [page for page in PAGES if any(block["mark"] != "not run" for block in blocks(page))])
def test_code_blocks_of_a_page_run(page, clone, servers, tmp_path):
    placeholders, hub = servers
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in placeholders))
    lacking = missing()
    typed = [
        (block["kind"], pattern.sub(lambda found: placeholders[found[0]], textwrap.dedent(block["code"])))
        for block in blocks(page)
        if block["mark"] != "not run" and not needs(block) & lacking
    ]
    (tmp_path / ".curlrc").write_text("fail-with-body\n")  # an HTTP error ends the block
    binaries = clone / ".venv" / "bin"  # as `source .venv/bin/activate`
    environment = reader(**hub, CURL_HOME=str(tmp_path), VIRTUAL_ENV=str(binaries.parent), PIP_QUIET="1")
    environment["PATH"] = f"{binaries}{os.pathsep}{environment['PATH']}"
    command = [binaries / "python", "-c", READER, json.dumps(typed)]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    left_out = set().union(*map(needs, blocks(page))) & lacking
    if left_out:
        pytest.skip(f"ran but for the blocks that need {', '.join(sorted(left_out))}")
