# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Legitimate scans are read, voxel by voxel, without a word on any stream."""

import warnings

import pytest

from diffvp.reading_diffvp import read_ct

from .good_inputs import GOOD, check


@pytest.mark.parametrize(("name", "write"), GOOD, ids=[name for name, _ in GOOD])
def test_legitimate_scan_is_read(tmp_path, capfd, name, write):
    path, hu = write(tmp_path)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(read_ct(path), hu)
    assert capfd.readouterr() == ("", "")


def test_no_two_of_a_name():
    assert len({name for name, _ in GOOD}) == len(GOOD)
