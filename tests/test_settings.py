# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Numbers that no run can use are refused with the settings, before anything is loaded."""

import pytest
from typer.testing import CliRunner

from diffvp.cli import app
from diffvp.training.config import SettingsError, TrainingConfig

REFUSED = {
    **{
        f"{section}.{name}": (".nan", ".inf", "-.inf", "-1.0e-3")
        for section, own in (("diagnosis", "head_learning_rate"), ("report", "lora_learning_rate"))
        for name in ("learning_rate", own)
    },
    **{f"{section}.weight_decay": (".nan", ".inf", "-0.1") for section in ("diagnosis", "report")},
    **{f"{section}.warmup_ratio": (".nan", "-0.1", "1.5") for section in ("diagnosis", "report")},
    "seed": ("-1", str(2**32)),
    "lora.r": ("0", "-4", "1.5", "many"),
}
ACCEPTED = {
    "diagnosis.weight_decay": ("0", 0.0),
    "report.warmup_ratio": ("1", 1.0),
    "diagnosis.warmup_ratio": ("0", 0.0),
    "report.learning_rate": ("1.0e-9", 1e-9),
    "report.lora_learning_rate": ("0", 0.0),
    "seed": (str(2**32 - 1), 2**32 - 1),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values])
def test_unusable_number_is_refused_by_its_field(repository_root, field, value):
    with pytest.raises(SettingsError) as caught:
        TrainingConfig.load(repository_root / "configs/phantom.yaml", [f"{field}={value}"])
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"phantom.yaml: {field}: ") and "(expected " in line


def test_numbers_at_the_limits_are_accepted(repository_root):
    for field, (value, expected) in ACCEPTED.items():
        config = TrainingConfig.load(repository_root / "configs/phantom.yaml", [f"{field}={value}"])
        found = config
        for name in field.split("."):
            found = getattr(found, name)
        assert found == expected, field


def test_all_wrong_numbers_are_listed_together(repository_root):
    overrides = ["seed=-1", "report.learning_rate=.nan", "diagnosis.warmup_ratio=2"]
    with pytest.raises(SettingsError) as caught:
        TrainingConfig.load(repository_root / "configs/phantom.yaml", overrides)
    fields = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert sorted(fields) == ["diagnosis.warmup_ratio", "report.learning_rate", "seed"]


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_train_refuses_unusable_numbers_before_it_writes(repository_root, tmp_path, options):
    output = tmp_path / "run"
    words = ["train", repository_root / "configs/phantom.yaml", *options, "report.learning_rate=-1"]
    result = CliRunner().invoke(app, [*map(str, words), f"output_dir={output}"])
    assert result.exit_code == 2 and "report.learning_rate" in result.stderr
    assert not output.exists()
