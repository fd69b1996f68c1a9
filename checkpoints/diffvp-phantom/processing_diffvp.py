# Copyright 2026 The DiffVP Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
#
# SPDX-License-Identifier: Apache-2.0
"""What turns a CT file into the model's tensors and the model's tokens into a report.

[`DiffVPImageProcessor`] reads and resamples; [`DiffVPProcessor`] adds the reference scan, the instruction and the way
back from text to regions. Reading is in `reading_diffvp.py`, resampling in `volume_diffvp.py`.
"""

import io
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessingKwargs, TextKwargs, Unpack
from transformers.utils.hub import resolve_revision

from .anatomy_diffvp import check_chest, measure_coverage
from .collator_diffvp import DiffVPDataCollator, DiffVPDataset
from .configuration_diffvp import DEFAULT_INSTRUCTION, DIAGNOSIS_LABELS, REGIONS
from .reading_diffvp import is_simpleitk, read_ct, unwrapped
from .references_diffvp import REFERENCE_FOLDER, ReferencePool, ReferencePoolError, remove_references
from .storage_diffvp import HUB_KWARGS
from .volume_diffvp import CTGeometry, CTInputError, CTIntensityError, CTVolume, resample, save_map, to_input_grid

AXES = ("depth", "height", "width")
# Keys that transformers itself writes beside an image processor's attributes.
SERVICE_KEYS = {"auto_map", "image_processor_type", "processor_class"}
OTHER = "other"  # what post_process calls text that belongs to no region
# What opens a region or a section of a report, and its name. Departments write plurals and other spellings.
REGION_HEADINGS = {region: region for region in REGIONS} | {
    "lungs": "lung",
    "bones": "bone",
    "breasts": "breast",
    "oesophagus": "esophagus",
    "trachea and bronchi": "trachea and bronchie",
    "trachea and bronchus": "trachea and bronchie",
}
SECTION_HEADINGS = {
    "findings": "findings",
    "finding": "findings",
    "impression": "impression",
    "impressions": "impression",
    "conclusion": "impression",
    "conclusions": "impression",
}


class DiffVPImageProcessorKwargs(TypedDict, total=False):
    """
    size (`dict[str, int]`): voxels of the tensor, `{"depth": 64, "height": 256, "width": 256}`; also three numbers in
        that order.
    target_spacing (`tuple`, *optional*): mm per voxel (depth, height, width) of a fixed grid, centred on the
        foreground. `None` stretches the foreground to `size`, as the paper's preprocessing does.
    hu_window (`tuple`): HU that become -1 and 1; values beyond are clipped.
    crop_foreground (`bool`): crop to the bounding box of the voxels above `foreground_hu`.
    foreground_hu (`float`): HU.
    antialias (`bool`): average over the voxels between those of a coarser tensor, where `False` takes the two nearest
        of them along each axis, as MONAI does.
    allow_non_hu (`bool`): accept voxels that are not Hounsfield units; set a `hu_window` that fits them.
    return_tensors (`str`, *optional*): `"pt"` (also for `None`) or `"np"`.
    """

    size: dict[str, int] | list[int] | tuple[int, ...]
    target_spacing: list[float | int] | tuple[float | int, ...] | None
    hu_window: list[float | int] | tuple[float | int, ...]
    crop_foreground: bool
    foreground_hu: float | int
    antialias: bool
    allow_non_hu: bool
    return_tensors: str | None


class DiffVPImageProcessor(BaseImageProcessor):
    """CT -> float32 tensor (batch, 1, depth, height, width) in [-1, 1]; its attributes are those of
    [`DiffVPImageProcessorKwargs`] and may be overridden in each call.

    Depth runs from inferior to superior, height from anterior to posterior, width from the patient's right to left.
    """

    valid_kwargs = DiffVPImageProcessorKwargs
    model_input_names = ["ct"]

    # The paper's grid and window; it crops the foreground first (section 4.1).
    size = {"depth": 64, "height": 256, "width": 256}
    target_spacing = None
    hu_window = (-1000.0, 200.0)
    crop_foreground = True
    foreground_hu = -1000.0
    antialias = False
    allow_non_hu = False

    def __init__(self, **kwargs: Unpack[DiffVPImageProcessorKwargs]):
        known = self.valid_kwargs.__annotations__
        unknown = sorted(set(kwargs) - set(known) - SERVICE_KEYS)
        if unknown:
            raise TypeError(f"Unknown argument(s) {', '.join(unknown)}. Known: {', '.join(known)}.")
        validate_typed_dict(self.valid_kwargs, {key: value for key, value in kwargs.items() if key in known})
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    def __call__(
        self, ct, spacing=None, digest: bool = False, allow_any_anatomy: bool = True,
        **kwargs: Unpack[DiffVPImageProcessorKwargs],
    ) -> BatchFeature:  # fmt: skip
        return self.preprocess(ct, spacing=spacing, digest=digest, allow_any_anatomy=allow_any_anatomy, **kwargs)

    def preprocess(
        self, ct, spacing=None, digest: bool = False, allow_any_anatomy: bool = True,
        **kwargs: Unpack[DiffVPImageProcessorKwargs],
    ) -> BatchFeature:  # fmt: skip
        """Read and resample one CT or a list of them. For many, see [`stream`].

        Args:
            ct: whatever [`read_ct`] takes: a path, an image, a `datasets.Nifti` value, an array; or a list of these
                (also a tuple, a column of `datasets` or pandas, an array of objects, a generator). A scan that needs
                more to be understood (its dataset's metadata, one series of several) is given as the `CTVolume` that
                `read_ct(path, metadata=..., series=...)` returns.
            spacing: mm per voxel along x, y, z of bare arrays, which are indexed [x, y, z] in LPS order.
            digest: also take the SHA-256 of each scan's content, `geometry.sha256`: 0.1 s for 512 x 512 x 300.
            allow_any_anatomy: also take scans of other regions than the chest. `False` refuses scans without lungs, as
                reports do. What a scan holds of them is in `geometry.coverage` either way.

        Returns:
            `ct`, (batch, 1, depth, height, width), and `geometry`, a list of [`CTGeometry`].

        Raises:
            CTInputError: an input is not a usable chest CT; the message names source, field, value and expectation.
            CTAnatomyError: the one among them for a CT of another region.
        """
        options = self._options(kwargs)
        inputs = list(each(ct))
        if not inputs:
            raise ValueError("The list of CTs is empty.")
        if spacing is not None and not any(_is_array(one) for one in inputs):
            raise ValueError("spacing= is for bare arrays; files and images carry their own.")
        tensors, geometry = [], []
        for one in inputs:
            volume = _read(one, spacing, options["allow_non_hu"])
            if not (volume.is_hu or options["allow_non_hu"]):
                raise CTIntensityError(
                    volume.source, "voxels", "not in Hounsfield units", "Hounsfield units, or allow_non_hu=True"
                )
            coverage = measure_coverage(volume)
            if not allow_any_anatomy:
                check_chest(coverage, volume.source)
            tensor, place = _resample(volume, options, digest)
            tensors.append(tensor)
            geometry.append(replace(place, coverage=coverage))
        batch = torch.stack(tensors)
        return BatchFeature(
            {"ct": batch.numpy() if options["return_tensors"] == "np" else batch, "geometry": geometry}
        )

    def resample(
        self, volume: CTVolume, **kwargs: Unpack[DiffVPImageProcessorKwargs]
    ) -> tuple[torch.Tensor, CTGeometry]:
        """A volume that [`read_ct`] returned as a tensor (1, depth, height, width), and its place in the file."""
        return _resample(volume, self._options(kwargs), digest=False)

    def _options(self, kwargs: dict) -> dict:
        """The settings, with those of a call."""
        validate_typed_dict(self.valid_kwargs, kwargs)
        settings = {key: getattr(self, key) for key in self.valid_kwargs.__annotations__}
        return self._standardize_kwargs(**settings | kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict:
        size, spacing, window = kwargs["size"], kwargs["target_spacing"], kwargs["hu_window"]
        if isinstance(size, (list, tuple)) and len(size) == 3:
            size = dict(zip(AXES, size, strict=True))
        if not isinstance(size, dict) or set(size) != set(AXES) or min(size.values()) < 1:
            raise ValueError(f"size must give positive depth, height and width in voxels, got {size}.")
        if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
            raise ValueError(
                f"target_spacing must be None or three positive mm (depth, height, width), got {spacing}."
            )
        if len(window) != 2 or not window[0] < window[1]:
            # The one of these that the command line sets, whose errors of input are a line each.
            raise CTIntensityError("settings", "hu_window", tuple(window), "two rising HU, such as (-1000, 200)")
        if kwargs["return_tensors"] not in (None, "pt", "np"):
            raise ValueError(f'return_tensors must be "pt" or "np", got {kwargs["return_tensors"]!r}.')
        return kwargs | {
            "size": {axis: size[axis] for axis in AXES},
            "target_spacing": None if spacing is None else tuple(float(mm) for mm in spacing),
            "hu_window": tuple(float(hu) for hu in window),
        }

    def to_dict(self) -> dict:
        kept = set(self.valid_kwargs.__annotations__) | SERVICE_KEYS
        return {key: value for key, value in super().to_dict().items() if key in kept}

    def stream(
        self, scans: Iterable, workers: int = 1, **kwargs: Unpack[DiffVPImageProcessorKwargs]
    ) -> Iterator[BatchFeature | CTInputError]:
        """[`preprocess`] each of many scans, in their order, a scan at a time in each of `workers` threads.

        Threads suffice: inflating and interpolating release the interpreter's lock. Memory is bounded by
        `workers + 1` scans however many there are, for no scan is begun before its turn is near.

        Yields:
            the features of one scan (batch of 1), or the error that refused it: one bad scan does not end the rest.
        """
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}.")

        def one(scan):
            try:
                return self.preprocess(scan, **kwargs)
            except CTInputError as error:
                return error

        pending = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for scan in scans if _is_array(scans) else each(scans):
                    pending.append(pool.submit(one, scan))
                    if len(pending) > workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def to_input_grid(self, map: torch.Tensor | np.ndarray, geometry: CTGeometry) -> np.ndarray:
        """A map (depth, height, width) on the voxel grid of the input file; see [`to_input_grid`]."""
        return to_input_grid(map, geometry)

    def save_map(self, path, map: torch.Tensor | np.ndarray, geometry: CTGeometry) -> Path:
        """A map (depth, height, width) as NIfTI with the shape and affine of the input file; see [`save_map`]."""
        return save_map(path, map, geometry)


# What can be iterated over, and is one scan or one text, or neither. Nor does a set count as several: it has no order
# that results could follow.
_SINGLE = (str, bytes, Mapping, Set, torch.Tensor, io.IOBase)


def is_many(value) -> bool:
    """Whether a value of an argument that takes one or a list is a list, whatever its type.

    That is what can be iterated over: also a tuple, a column of `datasets` (which is no list) or pandas, a generator.
    Arrays are one scan, but for those of objects or texts.
    """
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "OUT"  # T: NumPy's strings of any length
    return isinstance(value, Iterable) and not isinstance(value, _SINGLE) and not is_simpleitk(value)


def each(value) -> Iterator:
    """The items of such an argument, one after another."""
    for item in value if is_many(value) else [value]:
        yield unwrapped(item)


def _texts(text, count: int) -> list[str | None]:
    """A text for each of `count` scans.

    Raises:
        TypeError: what is given, or an item of it, is no string.
        ValueError: there are more of them, or fewer.
    """
    if text is None:
        return [None] * count
    texts = list(each(text))
    for number, one in enumerate(texts):
        if not isinstance(one, str):
            name = f"text[{number}]" if is_many(text) else "text"
            raise TypeError(f"{name} is of type {type(one).__name__}; expected a string, or a list of strings.")
    if not is_many(text):
        return texts * count
    if len(texts) != count:
        raise ValueError(f"{len(texts)} texts for {count} scans; expected one each, or one string for all.")
    return texts


def _read(ct, spacing, allow_non_hu: bool) -> CTVolume:
    return ct if isinstance(ct, CTVolume) else read_ct(ct, spacing if _is_array(ct) else None, allow_non_hu)


def _resample(volume: CTVolume, options: dict, digest: bool) -> tuple[torch.Tensor, CTGeometry]:
    return resample(
        volume,
        tuple(options["size"][axis] for axis in AXES),
        options["target_spacing"],
        options["crop_foreground"],
        options["foreground_hu"],
        options["hu_window"],
        options["antialias"],
        digest,
    )


def _is_array(value) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


# What other processors call their arguments.
HABITS = {
    **dict.fromkeys(("image", "images", "pixel_values", "video", "videos", "volume", "volumes"), "ct"),
    **dict.fromkeys(("reference_image", "reference_images", "references", "normal"), "reference"),
    **dict.fromkeys(("prompt", "prompts", "texts", "instruction", "messages", "conversation"), "text"),
}


class DiffVPBatchFeature(BatchFeature):
    """The model's inputs as keys, and what is known about them as attributes, which survive `.to()`.

    Attributes:
        geometry, reference_geometry: one [`CTGeometry`] per scan: source, content digest, the way back to the file.
        reference_ids: id in the pool, or the source of a reference that the caller gave.
    """

    def __init__(self, data: dict, geometry=(), reference_geometry=(), reference_ids=()):
        super().__init__(data)
        self.geometry: list[CTGeometry] = list(geometry)
        self.reference_geometry: list[CTGeometry] = list(reference_geometry)
        self.reference_ids: list[str] = list(reference_ids)

    @property
    def ct_sha256(self) -> list[str]:
        """Content digest of each scan."""
        return [place.sha256 for place in self.geometry]

    def __getstate__(self):
        return dict(self.__dict__)

    def __setstate__(self, state):
        self.__dict__.update(state)


class DiffVPProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: DiffVPImageProcessorKwargs
    _defaults = {}  # transformers before 5.2x reads it; defaults are class attributes


class DiffVPProcessor(ProcessorMixin):
    """CT preprocessing, reference sampling, the instruction, and text back to regions.

    Args:
        image_processor ([`DiffVPImageProcessor`])
        tokenizer (`PreTrainedTokenizerBase`): the base LLM's.
        chat_template (`str`, *optional*): Jinja template; by default the tokenizer's own, if it has one.
        instruction (`str`): what the model is asked to do when a call gives no `text`.
    """

    valid_processor_kwargs = DiffVPProcessorKwargs
    # For the pipeline, which imports no other file.
    is_many, each = staticmethod(is_many), staticmethod(each)
    # Left: the report continues the prompt, so padding must not stand between the two.
    text_kwargs = {"padding": True, "padding_side": "left", "return_tensors": "pt"}

    def __init__(self, image_processor, tokenizer, chat_template=None, instruction: str = DEFAULT_INSTRUCTION):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.instruction = instruction
        self.reference_pool: ReferencePool | None = None
        if tokenizer.pad_token is None:  # LLaMA-2 has none; padding is masked, so that any token will do
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(
        self,
        ct=None,
        reference=None,
        text: str | list[str] | None = None,
        spacing: Sequence[float] | None = None,
        reference_seed: int | None = None,
        allow_any_anatomy: bool | None = None,
        **kwargs: Unpack[DiffVPProcessorKwargs],
    ) -> DiffVPBatchFeature:
        """Prepare scans, their references and the instruction for [`DiffVPForConditionalGeneration`].

        Args:
            ct: one CT or a list of them, of any type that [`DiffVPImageProcessor.preprocess`] takes for one, as
                also for `reference` and `text`; `None` for the text alone.
            reference: one for each CT, or one for all. `None` samples from the pool that ships with the checkpoint,
                by `reference_seed` and the content of the scan alone: not by its name or its place in a batch. A scan
                is never its own reference.
            text: instruction for all or for each; `None` is the default one.
            spacing: mm along x, y, z of bare arrays among `ct` and `reference`.
            reference_seed: seed of the sampling; 0 if not given.
            allow_any_anatomy: `False` refuses scans, and given references, that are not of a chest, as reports do;
                `True` if not given.
            kwargs: settings of the image processor or the tokenizer for this call. A `hu_window` or `foreground_hu`
                given for a scan that is not in Hounsfield units does not apply to a reference that is.

        Returns:
            `ct` and `reference` (batch, 1, depth, height, width), `input_ids` and `attention_mask` (batch, length),
            padded on the left; and the attributes of [`DiffVPBatchFeature`].
        """
        text_kwargs, images_kwargs = self._split_kwargs(kwargs)
        if ct is None:
            if reference is not None or text is None:
                raise ValueError("Give ct=, or text= alone.")
            text = list(each(text))
            return DiffVPBatchFeature(self._tokenize(_texts(text, len(text)), text_kwargs))
        # transformers' suite wants `None` for the default of what a call may leave out.
        allow_any_anatomy = True if allow_any_anatomy is None else allow_any_anatomy
        seed = 0 if reference_seed is None else reference_seed
        if not isinstance(seed, int):
            raise TypeError(f"reference_seed must be an integer, got {seed!r}.")
        scans = list(each(ct))
        texts = _texts(text, len(scans))  # before anything is read
        given = [] if reference is None else list(each(reference))
        if given and len(given) not in (1, len(scans)):
            raise ValueError(f"{len(given)} references for {len(scans)} scans; expected one each, or one for all.")
        if spacing is not None and not any(_is_array(one) for one in scans + given):
            raise ValueError("spacing= is for bare arrays; files and images carry their own.")
        features = self._preprocess(scans, spacing, images_kwargs, allow_any_anatomy)
        batch = len(features["geometry"])
        # A window of grey values is one of the scan: a reference in Hounsfield units keeps theirs.
        hu_kwargs = images_kwargs
        if not all(place.is_hu for place in features["geometry"]):
            hu_kwargs = {key: images_kwargs[key] for key in images_kwargs if key not in ("hu_window", "foreground_hu")}
        if given:
            allow_non_hu = images_kwargs.get("allow_non_hu", self.image_processor.allow_non_hu)
            volumes = [_read(one, spacing, allow_non_hu) for one in given]
            parts = [
                self._preprocess([one], None, hu_kwargs if one.is_hu else images_kwargs, allow_any_anatomy)
                for one in volumes
            ]
            references = {"ct": torch.cat([part["ct"] for part in parts])}
            references["geometry"] = [place for part in parts for place in part["geometry"]]
            ids = [place.source for place in references["geometry"]]
            if len(given) < batch:  # one for all
                references["ct"] = references["ct"].repeat_interleave(batch, 0)
                references["geometry"], ids = references["geometry"] * batch, ids * batch
        else:
            references, ids = self._sample_references(features["geometry"], seed, hu_kwargs)
        data = {"ct": features["ct"], "reference": references["ct"]}
        if text_kwargs["return_tensors"] == "np":
            data = {key: value.numpy() for key, value in data.items()}
        data |= self._tokenize(texts, text_kwargs)
        return DiffVPBatchFeature(data, features["geometry"], references["geometry"], ids)

    def _split_kwargs(self, kwargs: dict) -> tuple[dict, dict]:
        """Call-time arguments for the tokenizer and for the image processor, checked; transformers only warns."""
        image_names = set(self.image_processor.valid_kwargs.__annotations__)
        groups = {"text_kwargs", "images_kwargs", "common_kwargs"}
        unknown = sorted(set(kwargs) - set(TextKwargs.__annotations__) - image_names - groups)
        if unknown:
            meant = sorted({f"{HABITS[name]}=" for name in unknown if name in HABITS})
            hint = f" Expected {' and '.join(meant)}." if meant else ""
            raise TypeError(f"Unknown argument(s) {', '.join(unknown)} for {type(self).__name__}.{hint}")
        # Most base tokenizers pad on the right; that must not win over the reason for the left.
        init_kwargs = {key: value for key, value in self.tokenizer.init_kwargs.items() if key != "padding_side"}
        merged = self._merge_kwargs(self.valid_processor_kwargs, tokenizer_init_kwargs=init_kwargs, **kwargs)
        images = {key: value for key, value in merged["images_kwargs"].items() if key in image_names}
        return {**self.text_kwargs, **merged["text_kwargs"]}, images | {"return_tensors": "pt"}

    def _preprocess(self, scans: list, spacing, images_kwargs: dict, allow_any_anatomy: bool = True) -> BatchFeature:
        spacing = spacing if any(_is_array(one) for one in scans) else None
        return self.image_processor(
            scans, spacing=spacing, digest=True, allow_any_anatomy=allow_any_anatomy, **images_kwargs
        )

    def choose_reference(self, sha256: str, seed: int = 0) -> tuple[str, CTVolume]:
        """
        Id and volume of the reference that `__call__` samples for a scan.

        Args:
            sha256: of the scan's content, `CTVolume.sha256`.

        Raises:
            ReferencePoolError: there is no pool, or nothing in it but the scan.
        """
        pool = self._pool()

        def load(entry: dict[str, str]) -> tuple[str, CTVolume]:
            volume = read_ct(pool.fetch(entry))
            return volume.sha256, volume

        return pool.choose(seed, sha256, load)

    def _pool(self) -> ReferencePool:
        if self.reference_pool is None:
            raise ReferencePoolError("This processor has no reference pool: give reference=, or load_references().")
        return self.reference_pool

    def _sample_references(self, geometry: list[CTGeometry], seed: int, images_kwargs: dict):
        """One reference for each scan, from the pool."""
        pool = self._pool()
        loaded, tensors, places, ids = {}, [], [], []

        def load(entry: dict[str, str]) -> tuple[str, BatchFeature]:
            if entry["id"] not in loaded:
                loaded[entry["id"]] = self._preprocess([pool.fetch(entry)], None, images_kwargs)
            return loaded[entry["id"]]["geometry"][0].sha256, loaded[entry["id"]]

        for place in geometry:
            name, reference = pool.choose(seed, place.sha256, load)
            tensors.append(reference["ct"])
            places += reference["geometry"]
            ids.append(name)
        return {"ct": torch.cat(tensors), "geometry": places}, ids

    def _tokenize(self, texts: list[str | None], text_kwargs: dict) -> dict:
        # A chat template writes the special tokens itself; the tokenizer would add a second BOS.
        options = {"add_special_tokens": self._chat_template() is None} | text_kwargs
        encoded = self.tokenizer([self.format_instruction(text) for text in texts], **options)
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def format_instruction(self, text: str | None = None) -> str:
        """The instruction as the LLM reads it: a user turn where there is a chat template, else a line."""
        text = self.instruction if text is None else text
        template = self._chat_template()
        if template is None:
            return f"{text}\n"
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], chat_template=template, tokenize=False, add_generation_prompt=True
        )

    def apply_chat_template(self, conversation, chat_template=None, processor_kwargs: dict | None = None, **kwargs):
        """As the tokenizer's, but text by default as in other processors: a conversation holds no scans.

        Scans are arguments of the call, which makes its `text` a user turn itself.
        """
        options = {"chat_template": chat_template or self._chat_template(), "tokenize": False, "return_dict": False}
        return self.tokenizer.apply_chat_template(conversation, **options | (processor_kwargs or {}) | kwargs)

    def _chat_template(self) -> str | None:
        return self.tokenizer.chat_template if self.chat_template is None else self.chat_template

    def encode_report(self, report: str, max_length: int | None = None, truncation: bool = False) -> list[int]:
        """Token ids of a report with the end token: the target of eq. 10.

        Raises:
            ValueError: it is longer than `max_length` and `truncation` is off: a cut report teaches to stop early.
        """
        ids = self.tokenizer(report, add_special_tokens=False)["input_ids"]
        if max_length is not None and len(ids) >= max_length:
            if not truncation:
                raise ValueError(
                    f"The report has {len(ids) + 1} tokens with its end token; max_length is {max_length}."
                )
            ids = ids[: max_length - 1]
        return ids + [self.tokenizer.eos_token_id]

    @staticmethod
    def diagnosis_prompt(labels: Sequence[str], attributes: Mapping[str, str] | None = None) -> str:
        """
        The diagnosis prompt D of eq. 9, findings in the order of `DIAGNOSIS_LABELS`.

        Args:
            attributes: what stands in brackets behind a finding, by label: "right upper lobe, 12 mm".
        """
        unknown = sorted(set(labels) - set(DIAGNOSIS_LABELS))
        if unknown:
            raise ValueError(f"Unknown finding(s) {', '.join(unknown)}. Known: {', '.join(DIAGNOSIS_LABELS)}.")
        brackets = {label: f" ({text})" for label, text in (attributes or {}).items() if text}
        named = [label.lower() + brackets.get(label, "") for label in DIAGNOSIS_LABELS if label in labels]
        return f"Predicted findings: {', '.join(named) or 'none'}.\n"

    @staticmethod
    def diagnosis_prompt_ids(
        tokenizer, labels: Sequence[str] = DIAGNOSIS_LABELS, places: Sequence[str] | None = None
    ) -> dict:
        """The fragments of the diagnosis prompt as token ids, for `config.diagnosis_prompt_ids`.

        Their concatenation *defines* the prompt's ids: prefix, then the found labels with the separator between them
        or `none`, then suffix. `labels` holds one list for each label, in the given order. With `places`, fragments
        for the attributes of a finding, sizes digit by digit.
        """

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        fragments = {
            "prefix": ids("Predicted findings:"),
            "labels": [ids(f" {label.lower()}") for label in labels],
            "separator": ids(","),
            "none": ids(" none"),
            "suffix": ids(".\n"),
        }
        if places is not None:
            fragments["attributes"] = {
                "open": ids(" ("),
                "close": ids(")"),
                "and": ids(" and "),
                "comma": ids(", "),
                "places": {place: ids(place) for place in places},
                "digits": [ids(str(digit)) for digit in range(10)],
                "mm": ids(" mm"),
            }
        return fragments

    @staticmethod
    def post_process(text: str, sections: bool = False) -> dict[str, str]:
        """Split a report into {region: text}, in canonical order.

        "Heart: ..." opens a region, on a line of its own or within one; so do "Lungs:" and "LUNGS:". A region that is
        not written is absent; parts of a region written twice are joined; text before the first region, and what has
        another heading ("Impression: ..."), go to "other", the heading included.

        Args:
            sections: also "findings", the text below "Findings:" that belongs to no region, and "impression", all
                that stands below "Impression:" or "Conclusion:" up to the next section.
        """
        names = sorted([*REGION_HEADINGS, *SECTION_HEADINGS], key=len, reverse=True)
        anywhere = "|".join(re.escape(name) for name in names)  # at the start of a line in any case
        inline = "|".join(re.escape(form) for name in names for form in (name.capitalize(), name.upper()))
        heading = re.compile(
            rf"(?:^[ \t]*(?i:{anywhere})|(?<=\s)(?:{inline}))[ \t]*:|^[ \t]*[A-Z][A-Za-z ]{{2,40}}:", re.M
        )
        parts: dict[str, list[str]] = {}
        current, start = OTHER, 0
        for found in heading.finditer(text):
            name = found.group().strip(" \t:").lower()
            section = SECTION_HEADINGS.get(name) if sections else None
            if current == "impression" and section is None:
                continue
            parts.setdefault(current, []).append(text[start : found.start()])
            known = section or REGION_HEADINGS.get(name)
            current, start = (known, found.end()) if known else (OTHER, found.start())
        parts.setdefault(current, []).append(text[start:])
        order = (*REGIONS, "findings", "impression", OTHER)
        joined = {region: " ".join(" ".join(parts.get(region, [])).split()) for region in order}
        return {region: words for region, words in joined.items() if words}

    def to_input_grid(self, map: torch.Tensor | np.ndarray, geometry: CTGeometry) -> np.ndarray:
        """A map (depth, height, width) on the voxel grid of the input file; see [`to_input_grid`]."""
        return to_input_grid(map, geometry)

    def save_map(self, path, map: torch.Tensor | np.ndarray, geometry: CTGeometry) -> Path:
        """A map (depth, height, width) as NIfTI with the shape and affine of the input file; see [`save_map`]."""
        return save_map(path, map, geometry)

    @property
    def model_input_names(self) -> list[str]:
        return ["ct", "reference", "input_ids", "attention_mask"]

    def load_references(self, folder) -> None:
        """Use the pool of a folder: NIfTI files and the `references.json` that [`index_references`] writes."""
        self.reference_pool = ReferencePool.load(folder, subfolder="")
        if self.reference_pool is None:
            raise ReferencePoolError(f"{Path(folder).name} has no references.json.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers; also finds the pool in `references/` of the same repository and revision."""
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if kwargs.get(key) is not None}
        access = {key: hub_kwargs[key] for key in ("token", "local_files_only", "cache_dir") if key in hub_kwargs}
        revision = resolve_revision(pretrained_model_name_or_path, kwargs.get("revision") or "main", **access)
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs | {"revision": revision})
        processor = loaded[0] if isinstance(loaded, tuple) else loaded  # with return_unused_kwargs
        subfolder = "/".join(part for part in (kwargs.get("subfolder", ""), REFERENCE_FOLDER) if part)
        processor.reference_pool = ReferencePool.load(
            pretrained_model_name_or_path, subfolder, **hub_kwargs | {"revision": revision}
        )
        return loaded

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # By class: AutoImageProcessor would ask for trust_remote_code, although this code is already running.
        image_processor = DiffVPImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        # The tokenizer's file says its class. Without a config AutoTokenizer would ask the model's, for whose type it
        # knows none, and warn of it.
        tokenizer = cls._load_tokenizer_from_pretrained(
            "tokenizer", pretrained_model_name_or_path, **{"config": PreTrainedConfig()} | kwargs
        )
        return [image_processor, tokenizer]

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        As in transformers; the reference pool is copied along, and one of an earlier save is taken away. Of references
        that may not travel neither the scans nor their paths are written.
        """
        files = super().save_pretrained(save_directory, **kwargs)
        # transformers leaves auto_map on what it saves but not on what it loads, and the two should be equal.
        vars(self).pop("auto_map", None)
        references = Path(save_directory) / REFERENCE_FOLDER
        if self.reference_pool is None or self.reference_pool.is_local:
            remove_references(references)
        else:
            self.reference_pool.copy_to(references)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files


DiffVPImageProcessor.register_for_auto_class()
DiffVPProcessor.register_for_auto_class()

# The collator comes along: every checkpoint can be trained further, and the saver copies what is imported.
__all__ = [
    "DiffVPBatchFeature",
    "DiffVPDataCollator",
    "DiffVPDataset",
    "DiffVPImageProcessor",
    "DiffVPImageProcessorKwargs",
    "DiffVPProcessor",
    "DiffVPProcessorKwargs",
]
