# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Fetch transformers' own test suites of one release: `python tests/conformance/fetch.py 5.23.0`.

The source distribution on PyPI contains them (`tests/test_modeling_common.py` and others); the wheel does not. They
are put in `.conformance/<version>/transformers_tests`, under their own name, because `tests` is this project's folder.
If another release is installed than the requested one, the requested one is put in `.conformance/<version>/site`,
without its dependencies, to take precedence. `make test-conformance` puts `.conformance/<version>/site` and
`.conformance/<version>` on PYTHONPATH, so that a test can write
`from transformers_tests.test_modeling_common import ModelTesterMixin`.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version as installed_version
from pathlib import Path

CONFORMANCE = Path(__file__).resolve().parents[2] / ".conformance"

_HEADER = "# For a module that the source distribution leaves out; see tests/conformance/fetch.py of DiffVP.\n"
# Modules that the suites import and the source distribution leaves out. The two mixins are empty: the export and
# generation suites exist only in transformers' repository, so they do not run here.
STUBS = {
    "transformers_tests/__init__.py": "",
    "transformers_tests/exporters/__init__.py": "",
    "transformers_tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "transformers_tests/generation/__init__.py": "",
    "transformers_tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "transformers_tests/utils/__init__.py": "",
    # Used on configurations without sub-configurations: each value must be returned as given.
    "transformers_tests/utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        '    "return_dict": False,\n'
        '    "output_hidden_states": True,\n'
        '    "dtype": "float16",\n'
        '    "chunk_size_feed_forward": 5,\n'
        '    "architectures": ["DiffVPForConditionalGeneration"],\n'
        '    "id2label": {0: "label"},\n'
        '    "label2id": {"label": "0"},\n'
        '    "problem_type": "regression",\n'
        "}\n"
    ),
    # Next to the suite, where it looks for the helpers of transformers' repository. The original finds files that
    # their CI has downloaded, and otherwise returns the address, as this stub does.
    "utils/fetch_hub_objects_for_ci.py": (
        "def url_to_local_path(url, return_url_if_not_found=True):\n"
        "    if return_url_if_not_found:\n"
        "        return url\n"
        '    raise FileNotFoundError(f"{url} has not been downloaded")\n'
    ),
}


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"], check=True)


def _unpack_tests(archive: Path, release: str, target: Path) -> int:
    """Extract `transformers-<release>/tests` of `archive` as the folder `target`; return the number of files."""
    prefix = f"transformers-{release}/tests/"
    count = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(prefix):
                member.name = member.name.removeprefix(prefix)
                tar.extract(member, target, filter="data")
                count += 1
    return count


def _fetch_suites(release: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        # No build isolation: pip only reads the metadata of the source, for which the installed setuptools is enough.
        _pip("download", "--no-binary=:all:", "--no-build-isolation", f"--dest={download}", f"transformers=={release}")
        [archive] = Path(download).iterdir()
        count = _unpack_tests(archive, release, target / "transformers_tests")
    if not (target / "transformers_tests" / "test_modeling_common.py").is_file():
        raise ValueError(f"{archive.name} holds {count} test files, but not tests/test_modeling_common.py")
    for name, text in STUBS.items():
        path = target / name
        if path.exists():
            raise ValueError(f"{archive.name} has its own {name}: the stub for it must go")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_HEADER + text, encoding="utf-8")


def fetch(release: str) -> Path:
    """Fetch the missing parts of `.conformance/<release>` and return that folder.

    Raises:
        ValueError: `release` is not a version number, or its source distribution holds no modelling suite.
        subprocess.CalledProcessError: pip could not download it; see its message on standard error.
    """
    if not re.fullmatch(r"\d+(\.\d+)+\w*", release):
        raise ValueError(f"{release!r} is not a transformers version such as 5.23.0")
    folder = CONFORMANCE / release
    CONFORMANCE.mkdir(exist_ok=True)
    # Build both next to their place and rename them, so that an interrupted download never looks complete.
    with tempfile.TemporaryDirectory(dir=CONFORMANCE, prefix="building-") as building:
        if not folder.is_dir():
            suites = Path(building, "suites")
            _fetch_suites(release, suites)
            suites.rename(folder)
        if release != installed_version("transformers") and not (folder / "site").is_dir():
            site = Path(building, "site")
            _pip("install", f"--target={site}", f"transformers=={release}")
            site.rename(folder / "site")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch transformers' own test suites of one release.")
    parser.add_argument("release", help="a transformers version, such as 5.23.0")
    folder = fetch(parser.parse_args().release)
    suites = len(list((folder / "transformers_tests").glob("test_*.py")))
    print(f"{folder.relative_to(CONFORMANCE.parent)}: {suites} suites")


if __name__ == "__main__":
    main()
