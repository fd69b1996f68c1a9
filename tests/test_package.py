# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path, PurePosixPath

import pytest

import diffvp

COPYRIGHT = "# Copyright 2026 The DiffVP Authors."
LICENCE = "Licensed under the Apache License, Version 2.0"
# Absolute paths under a home or a work folder. The brackets keep the pattern from matching itself.
MACHINE_PATH = re.compile(rb"(?<![\w./~-])/(?:wor[k]|far[m]|roo[t]|hom[e]|User[s])/[\w.]|/tm[p]/[a-z]")


@pytest.fixture(scope="module")
def project_files(repository_root) -> list[Path]:
    """List the files that git tracks or would add."""
    if not (repository_root / ".git").exists():
        pytest.skip("not a git clone: which files belong to the project is unknown")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=repository_root, capture_output=True, text=True, check=True)
    # A file that is deleted but not yet committed is still listed.
    return [path for name in listing.stdout.split("\0") if name and (path := repository_root / name).is_file()]


def test_versions_agree():
    assert version("diffvp") == diffvp.__version__


def test_command_prints_its_version(tmp_path):
    run = subprocess.run(
        [Path(sys.executable).parent / "diffvp", "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.split() == ["diffvp", diffvp.__version__]


def test_help_is_quick_and_lists_the_commands(tmp_path):
    # The goal is below a second; the bound leaves room for a busy machine, and still fails when the command imports
    # torch and MONAI (7 s) just to print its help.
    command = [Path(sys.executable).parent / "diffvp", "--help"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    for name in ("report", "demo", "phantom"):
        assert re.search(rf"\b{name}\b", run.stdout), f"no command {name} in:\n{run.stdout}"


def test_help_imports_no_heavy_library(tmp_path):
    """Check without a clock what keeps `diffvp --help` below a second."""
    heavy = {"torch", "transformers", "monai", "peft", "matplotlib"}
    code = f"import sys, diffvp.cli; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_every_python_file_has_the_licence_header(project_files):
    """One line is enough, except in the files that ship to the Hub; `make lint` checks their full notice."""
    without = []
    for path in project_files:
        if path.suffix == ".py":
            lines = path.read_text(encoding="utf-8").splitlines()
            if lines[:1] and lines[0].startswith("#!"):
                del lines[0]
            if not lines or not lines[0].startswith(COPYRIGHT) or LICENCE not in " ".join(lines[:3]):
                without.append(str(path))
    assert without == []


def test_no_file_contains_a_path_of_a_developers_machine(project_files, repository_root):
    text_suffixes = {"", ".py", ".md", ".toml", ".yaml", ".yml", ".json", ".jsonl", ".csv", ".txt", ".cfg", ".jinja"}
    found = [
        f"{path.relative_to(repository_root)}:{number}: {line.decode(errors='replace').strip()[:100]}"
        for path in project_files
        if path.suffix in text_suffixes
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_no_file_contains_a_merge_conflict(project_files, repository_root):
    marks = (b"<" * 7 + b" ", b">" * 7 + b" ")
    found = [
        f"{path.relative_to(repository_root)}:{number}"
        for path in project_files
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if line.startswith(marks)
    ]
    assert found == []


@pytest.fixture(scope="module")
def wheel_members(repository_root, project_files, tmp_path_factory) -> set[str]:
    """Return the members of a wheel that is built from the project's files only, without a download."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for path in project_files:
        target = source / path.relative_to(repository_root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run(
        [*command, f"--wheel-dir={folder}", str(source)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    [wheel] = folder.glob("diffvp-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_contains_exactly_the_package(wheel_members, project_files, repository_root):
    outside_the_package = {"tests", "benchmarks", "docs"}
    expected = {
        f"diffvp/{relative.as_posix()}"
        for path in project_files
        if path.suffix == ".py" and (relative := path.relative_to(repository_root)).parts[0] not in outside_the_package
    }
    expected -= {"diffvp/setup.py"}
    copied = [repository_root / "hub/handler.py", *repository_root.glob("*_diffvp.py")]  # see setup.py
    expected |= {f"diffvp/checkpoints/diffvp-phantom/{path.name}" for path in copied}
    assert "diffvp/__init__.py" in expected
    # Equal, not a subset: a sub-package that pyproject.toml does not name would work in a clone but be missing here.
    assert {member for member in wheel_members if member.endswith(".py")} == expected
    tops = {PurePosixPath(member).parts[0] for member in wheel_members}
    assert tops == {"diffvp", f"diffvp-{diffvp.__version__}.dist-info"}


def test_wheel_carries_the_checkpoint_and_the_training_files(wheel_members, project_files, repository_root):
    """`diffvp demo`, `report` and `init` must work without a clone."""
    wanted = {
        f"diffvp/{relative.as_posix()}"
        for path in project_files
        if (relative := path.relative_to(repository_root)).parts[0] in ("checkpoints", "configs")
        and "accelerate" not in relative.parts
    }
    assert {
        "diffvp/checkpoints/diffvp-phantom/adapter/adapter_model.safetensors",
        "diffvp/configs/own_scans.yaml",
    } < wanted
    assert wanted <= wheel_members


def test_wheel_carries_the_licence(wheel_members):
    names = {PurePosixPath(member).name for member in wheel_members if ".dist-info/licenses/" in member}
    assert names == {"LICENSE", "NOTICE"}


def test_wheel_is_marked_as_typed(wheel_members):
    assert "diffvp/py.typed" in wheel_members


# Modules that the small install runs.
CORE = (
    "cli",
    "inference.report",
    "inference.batch",
    "data.phantom_cohort",
    "hub.push",
    "references_diffvp",
)
OPTIONAL = {"datasets"}  # imported only if the caller passes one of its objects


def _distribution(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("_", "-")


def test_small_install_contains_all_its_imports(repository_root):
    """Follow the imports behind `diffvp demo`, `report`, `phantom` and `push`, except lazy imports."""
    declared = {_distribution(line) for line in requires("diffvp") if "extra ==" not in line}
    distributions = packages_distributions()
    waiting, seen, missing = [f"diffvp.{name}" for name in CORE], set(), {}
    while waiting:
        name = waiting.pop()
        path = repository_root.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*above, *([node.module] if node.module else [])])
                imported = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                continue
            waiting += [one for one in imported if one.startswith("diffvp")]
            tops = {one.split(".")[0] for one in imported} - {"diffvp"} - sys.stdlib_module_names - OPTIONAL
            for top in tops:
                if not set(map(_distribution, distributions.get(top, [top]))) & declared:
                    missing.setdefault(top, set()).add(path.name)
    assert "diffvp.data.phantom_geometry" in seen and "diffvp.modeling_diffvp" in seen
    assert not missing


def test_each_flow_of_the_architecture_shows_at_most_12_files_and_none_twice(repository_root):
    text = (repository_root / "docs/architecture.md").read_text(encoding="utf-8")
    flows = re.findall(r"```mermaid\n(.*?)```", text, re.S)
    assert len(flows) == 3
    for flow in flows:
        files = re.findall(r"[\w/]+\.py", flow)
        assert all((repository_root / file).is_file() for file in files), files
        assert 1 < len(files) == len(set(files)) <= 12, files


def test_links_between_pages_resolve(repository_root):
    pages = [
        *repository_root.glob("*.md"),
        *repository_root.glob("docs/*.md"),
        *repository_root.glob("*/results/*.md"),
    ]
    assert len(pages) >= 3
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "volume_diffvp": ("CTGeometry", "resample", "save_map", "to_input_grid"),
        "configuration_diffvp": ("DIAGNOSIS_LABELS", "REGIONS"),
        "pipeline_diffvp": ("RESEARCH_USE", "describe_findings", "end_tokens"),
    }.items(),
)
def test_moved_names_are_found_in_their_former_places(module, names):
    place = importlib.import_module(f"diffvp.{module}")
    assert all(getattr(place, name) is not None for name in names)
