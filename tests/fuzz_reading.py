# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of the reader: any bytes must give a valid volume or a `CTInputError`.

    make fuzz                                          # a minute
    python -m diffvp.tests.fuzz_reading runs/fuzz -max_total_time=3600

The first argument is a folder for the corpus, which grows from run to run, and for failing inputs; further arguments
go to libFuzzer. The first byte of an input selects the format of the other bytes.
"""

import gzip
import sys
import tempfile
from pathlib import Path

import atheris
import datasets  # noqa: F401 - large packages are imported before the instrumentation, which would take minutes
import numpy as np
import SimpleITK  # noqa: F401
import torch  # noqa: F401

with atheris.instrument_imports(include=["diffvp", "nibabel"]):
    from diffvp.reading_diffvp import read_ct
    from diffvp.resampling_diffvp import resample
    from diffvp.volume_diffvp import CTInputError

from .bad_inputs import GOOD

SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
SIZE = (8, 8, 8)


def seed(corpus: Path) -> None:
    """Write the good inputs that are files, each after the byte that selects its format."""
    corpus.mkdir(parents=True, exist_ok=True)
    for title, (_, make, *_) in GOOD.items():
        with tempfile.TemporaryDirectory() as folder:
            path = make(Path(folder))
            suffix = "".join(Path(path).suffixes[-2:]) if isinstance(path, Path) else ""
            if suffix not in SUFFIXES:
                continue
            content = path.read_bytes()
        name = "".join(letter if letter.isalnum() else "-" for letter in title)
        (corpus / name).write_bytes(bytes([SUFFIXES.index(suffix)]) + content)


def test_one_input(data: bytes) -> None:
    suffix, content = SUFFIXES[data[0] % len(SUFFIXES)] if data else ".nii", data[1:]
    if suffix == ".nii":
        ct = {"path": None, "bytes": content}
    elif suffix == ".nii.gz":  # compressed here, because the fuzzer cannot guess the checksum
        ct = {"path": None, "bytes": content if content[:2] == b"\x1f\x8b" else gzip.compress(content, 1)}
    else:
        ct = Path(sys.argv[1]) / f"scan{suffix}"
        ct.write_bytes(content)
    try:
        tensor, geometry = resample(read_ct(ct, allow_non_hu=True), SIZE)
    except CTInputError as error:
        if not error.field or str(error.found) not in str(error):
            raise AssertionError("the message names neither field nor value") from error
        return
    if tensor.shape != (1, *SIZE) or not tensor.isfinite().all() or tensor.abs().max() > 1:
        raise AssertionError("no valid tensor")
    if not np.isfinite(geometry.tensor_affine).all():
        raise AssertionError("no valid geometry")


def main() -> None:
    folder = Path(sys.argv[1])
    seed(folder / "corpus")
    (folder / "v.raw").write_bytes(bytes(20592))  # data file of the detached headers
    options = [f"-artifact_prefix={folder}/", "-max_len=32768", "-timeout=10", "-rss_limit_mb=2048", *sys.argv[2:]]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
