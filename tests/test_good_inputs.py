# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Valid scans are read voxel by voxel, with nothing on stdout or stderr."""

import warnings

import pytest

from diffvp.reading_diffvp import read_ct

from .good_inputs import GOOD, check


@pytest.mark.parametrize(("name", "write"), GOOD, ids=[name for name, _ in GOOD])
def test_valid_scan_is_read_silently(tmp_path, capfd, name, write):
    path, hu = write(tmp_path)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(read_ct(path), hu)
    assert capfd.readouterr() == ("", "")


def test_good_inputs_are_uniquely_named():
    assert len({name for name, _ in GOOD}) == len(GOOD)
