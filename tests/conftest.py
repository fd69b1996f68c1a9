# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
import contextlib
import gc
import logging
import os
import runpy
import shutil
import sqlite3
import sys

# Set before any import: huggingface_hub and evaluate read these once, at import time. The tests never need the
# network; a test that uses it fails on every machine, not only on one without a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# The test models are tiny: a second thread costs more time than it saves, many times more on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

CHECK_DATA_VARIABLE = "DIFFVP_CHECK_DATA"


def pytest_configure(config):
    """Copy the current code into the shipped checkpoint, once, before xdist starts its workers."""
    if not hasattr(config, "workerinput"):
        runpy.run_path(str(Path(__file__).resolve().parents[1] / "setup.py"))["copy_code"]()


def pytest_collection():
    """Turn the garbage collector off: during the imports it would search the growing modules again and again."""
    gc.disable()


def pytest_collection_finish():
    """Exempt all imported modules from garbage collection: accelerate collects after each stage of a training."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def without_waiting_for_the_disk():
    """Leave out fsync, also in SQLite: it waits for the disk, and files of tests need not survive a power failure."""
    connect = sqlite3.connect

    def connect_without_fsync(*arguments, **options) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(sqlite3, "connect", connect_without_fsync)
        yield


@pytest.fixture(scope="session", autouse=True)
def commands_built_once():
    from .commands import keep_command_tree

    with pytest.MonkeyPatch.context() as patch:
        keep_command_tree(patch.setattr)
        yield


@pytest.fixture(scope="session")
def check_data() -> Path:
    """Folder of real scans and published scores that some tests compare with; it is not part of the project."""
    value = os.environ.get(CHECK_DATA_VARIABLE)
    if value is None:
        pytest.skip(
            f"{CHECK_DATA_VARIABLE} is not set: the real scans and published scores are not part of the project"
        )
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{CHECK_DATA_VARIABLE}={value} is not a folder")
    return folder


@pytest.fixture(scope="session")
def repository_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def meteor_data():
    """(WordNet, Punkt tokenizer), as METEOR needs them; without them, the test is skipped with the reason."""
    from diffvp.metrics.nlg import LexiconError, lexicon

    try:
        return lexicon.load_wordnet(), lexicon.load_punkt()
    except LexiconError as error:
        pytest.skip(str(error))


def _reset_accelerate() -> None:
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Reset Accelerate's process-wide precision and devices, so that one test's choice does not affect the next."""
    _reset_accelerate()  # also before the test: a module-scoped fixture may have trained
    yield
    _reset_accelerate()


def _verbosity_of_transformers() -> tuple[int, bool]:
    """Return its level and if it shows progress bars; its defaults before the import, which takes seconds."""
    if "transformers" not in sys.modules:
        return logging.WARNING, True
    from transformers.utils import logging as transformers_logging

    return transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()


@contextlib.contextmanager
def _settings_restored() -> Iterator[None]:
    environment, level, before = dict(os.environ), logging.getLogger("diffvp").level, _verbosity_of_transformers()
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        logging.getLogger("diffvp").setLevel(level)
        if _verbosity_of_transformers() != before:
            from transformers.utils import logging as transformers_logging

            transformers_logging.set_verbosity(before[0])
            if before[1]:
                transformers_logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[Callable]:
    """Undo what commands set for the whole process. Yield the context that does it, for a part of a test."""
    with _settings_restored():
        yield _settings_restored


# A complete DiffVP model of a few thousand parameters: eight voxel tokens, four latents, a two-layer Llama.


@pytest.fixture(scope="session")
def tiny_fields() -> dict:
    """Fields of DiffVPConfig for a tiny model over a vocabulary of 96."""
    from diffvp.tests.base_families import TINY_FIELDS

    return TINY_FIELDS


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> Path:
    """Folder with a random Llama of two layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_config(tiny_fields, tiny_llm):
    from transformers import AutoConfig

    from diffvp.configuration_diffvp import DiffVPConfig

    return DiffVPConfig(text_config=AutoConfig.from_pretrained(tiny_llm), **tiny_fields)


@pytest.fixture
def make_model(tiny_fields, tiny_llm):
    """
    `make_model(lora=False, **config_fields)`: a tiny model on the tiny base, deterministic in its arguments.

    `lora` is True, or a dict of options of LoRA.
    """
    import torch
    from peft import LoraConfig

    from diffvp.modeling_diffvp import DiffVPForConditionalGeneration

    def make(lora: bool | dict = False, **changes):
        torch.manual_seed(0)
        options = {"r": 2, "target_modules": ["q_proj", "v_proj"]} | (lora if isinstance(lora, dict) else {})
        return DiffVPForConditionalGeneration.from_base(
            str(tiny_llm),
            lora_config=LoraConfig(task_type="CAUSAL_LM", **options) if lora else None,
            config={**tiny_fields, **changes},
        )

    return make


@pytest.fixture
def scans():
    """Two targets and two references for the tiny model."""
    from diffvp.tests.base_families import make_scans

    return make_scans()


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE of a few hundred tokens; like LLaMA's, it pads on the right and has no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from diffvp.configuration_diffvp import DEFAULT_INSTRUCTION
    from diffvp.labels_diffvp import DIAGNOSIS_LABELS

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([DEFAULT_INSTRUCTION, "Lung: clear. Heart: of normal size.", *DIAGNOSIS_LABELS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", padding_side="right", model_max_length=512
    )


@pytest.fixture(scope="session")
def make_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Function that makes a folder once for all processes of xdist. Tests copy what they change."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make_folder(name: str, make: Callable[[Path], object]) -> Path:
        folder, complete = root / "shared" / name, root / "shared" / f".{name}.complete"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_name(f".{name}.lock")):
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed: show the same error again
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder

    return make_folder


@pytest.fixture(scope="session")
def tiny_base_with_tokenizer(tokenizer, make_once) -> Path:
    """Folder with `tokenizer` and a random Llama of two layers with its vocabulary size."""

    def make(folder: Path) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return make_once("tiny-llama-with-tokenizer", make)


@pytest.fixture(scope="session")
def small_cohort(make_once):
    """Phantom cohort of a few cases, small enough to train on in seconds."""

    def make(root: Path) -> None:
        from diffvp.data.phantom_cohort import write_cohort

        # Seven of these 26 cases are normal, at least two in each span below that draws references.
        write_cohort(root, train=26, valid=0, seed=23, matrix=48, masks=True, workers=1, progress=False)

    return make_once("phantom", make)


def write_settings(folder: Path, cohort: Path, base: Path, tiny_fields: dict) -> Path:
    """Write a YAML file in `folder` for a training run of seconds, with its outputs in the same folder."""
    import yaml

    model = {k: v for k, v in tiny_fields.items() if k not in ("diagnosis_prompt_ids", "instruction_ids")}
    epoch = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.0}
    values = {
        "output_dir": str(folder / "run"),
        "seed": 0,
        "data": {
            "layout": "phantom",
            "root": str(cohort),
            "cache_dir": str(folder / "cache"),
            "diagnosis_cases": [0, 12],
            "validation_cases": [12, 18],
            "report_cases": [18, 26],
        },
        "image_processor": {"size": {"depth": 32, "height": 32, "width": 32}},
        "base": {"name": str(base)},
        "model": model,
        "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "diagnosis": {**epoch, "head_learning_rate": 1e-2},
        "report": {**epoch, "lora_learning_rate": 1e-3, "max_report_tokens": 1500},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def settings(small_cohort, tmp_path, tiny_base_with_tokenizer, tiny_fields):
    """YAML file for a training run of seconds."""
    return write_settings(tmp_path, small_cohort, tiny_base_with_tokenizer, tiny_fields)


@pytest.fixture(scope="session")
def first_stage(small_cohort, tiny_base_with_tokenizer, tiny_fields, make_once):
    """Folder of a run whose first stage is done. Copy the files before changing them."""

    def make(folder: Path) -> None:
        from diffvp.train_accelerate import run
        from diffvp.training.config import TrainingConfig

        path = write_settings(folder, small_cohort, tiny_base_with_tokenizer, tiny_fields)
        run(TrainingConfig.load(path, ["stage=diagnosis"]))

    return make_once("first-stage", make)


@pytest.fixture
def stage_one(settings, first_stage, tmp_path):
    """YAML file of a separate run whose first stage is done."""
    for name in ("run", "cache"):
        shutil.copytree(first_stage / name, tmp_path / name)
    return settings
