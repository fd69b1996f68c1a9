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
"""Processors: from CT files to the model's tensors, and from its tokens to a report.

[`DiffVPImageProcessor`] reads and resamples. [`DiffVPProcessor`] adds the reference scan and the instruction, and
splits a report into regions. Reading is in `reading_diffvp.py`, resampling in `resampling_diffvp.py`, the form of a
report in `report_diffvp.py`.
"""

import io
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import (
    ProcessingKwargs,
    TextKwargs,
    Unpack,  # pyright: ignore[reportPrivateImportUsage]  # as its own processors do
)
from transformers.utils import logging
from transformers.utils.hub import resolve_revision

from .anatomy_diffvp import check_chest
from .collator_diffvp import DiffVPDataCollator, DiffVPDataset
from .configuration_diffvp import DEFAULT_INSTRUCTION
from .labels_diffvp import DIAGNOSIS_LABELS
from .map_diffvp import save_map, to_input_grid
from .reading_diffvp import is_simpleitk, read_ct, unwrapped
from .references_diffvp import REFERENCE_FOLDER, ReferencePool, ReferencePoolError, remove_references
from .report_diffvp import split_report
from .resampling_diffvp import CTGeometry, resample
from .storage_diffvp import HUB_KWARGS
from .volume_diffvp import CTInputError, CTIntensityError, CTVolume

logger = logging.get_logger(__name__)

AXES = ("depth", "height", "width")
# Keys that transformers writes next to an image processor's attributes.
SERVICE_KEYS = {"auto_map", "image_processor_type", "processor_class"}


class DiffVPImageProcessorKwargs(TypedDict, total=False):
    """
    size (`dict[str, int]`): size of the tensor in voxels, `{"depth": 64, "height": 256, "width": 256}`, or three
        numbers in that order.
    target_spacing (`tuple`, *optional*): mm per voxel (depth, height, width) of a fixed grid, centred on the
        foreground. `None` stretches the foreground to `size`, as the paper's preprocessing does.
    hu_window (`tuple`): HU that are mapped to -1 and 1; values outside are clipped.
    crop_foreground (`bool`): crop to the bounding box of the voxels above `foreground_hu`.
    foreground_hu (`float`): HU threshold of the foreground.
    antialias (`bool`): if the tensor is coarser than the scan, average over all voxels in between. `False`
        interpolates between the two nearest voxels along each axis, as MONAI does.
    allow_non_hu (`bool`): accept voxels that are not in Hounsfield units; set a `hu_window` that fits them.
    return_tensors (`str`, *optional*): `"pt"` (also if `None`) or `"np"`.
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
    """Convert CTs to a float32 tensor (batch, 1, depth, height, width) in [-1, 1].

    Depth runs from inferior to superior, height from anterior to posterior, width from the patient's right to left.
    The attributes are those of [`DiffVPImageProcessorKwargs`]; each call may override them.
    """

    valid_kwargs = DiffVPImageProcessorKwargs
    model_input_names = ["ct"]

    # Grid and window of the paper, which crops the foreground first (section 4.1).
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
        self._validate({key: value for key, value in kwargs.items() if key in known})
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    def _validate(self, kwargs: dict) -> None:
        validate_typed_dict(self.valid_kwargs, kwargs)  # pyright: ignore[reportArgumentType]  # wants a dict, no TypedDict

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # CTs have other settings than images
        self, ct, spacing=None, digest: bool = False, allow_any_anatomy: bool = True,
        **kwargs: Unpack[DiffVPImageProcessorKwargs],
    ) -> BatchFeature:  # fmt: skip
        return self.preprocess(ct, spacing=spacing, digest=digest, allow_any_anatomy=allow_any_anatomy, **kwargs)

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]  # as `__call__`
        self, ct, spacing=None, digest: bool = False, allow_any_anatomy: bool = True,
        **kwargs: Unpack[DiffVPImageProcessorKwargs],
    ) -> BatchFeature:  # fmt: skip
        """Read and resample one CT or a list of CTs. For many scans, use [`stream`].

        Args:
            ct: any input of [`read_ct`] (a path, an image, a `datasets.Nifti` value, an array), or several: a list, a
                tuple, a column of `datasets` or pandas, an array of objects, a generator. If a scan can be read only
                with further information (metadata of its dataset, a choice among several series), pass the `CTVolume`
                that `read_ct(path, metadata=..., series=...)` returns.
            spacing: mm per voxel along x, y, z of bare arrays, which are indexed [x, y, z] in LPS order.
            digest: compute the SHA-256 of each scan's content, `geometry.sha256`: 0.1 s for 512 x 512 x 300.
            allow_any_anatomy: accept scans of other regions than the chest. `False` refuses scans without lungs, as
                report generation does. `geometry.coverage` has the measured coverage in both cases.

        Returns:
            `ct`, (batch, 1, depth, height, width), and `geometry`, a list of [`CTGeometry`].

        Raises:
            CTInputError: an input is not a usable chest CT; the message names source, field, value and expectation.
            CTAnatomyError: a CT shows another region than the chest; a subclass of `CTInputError`.
            ValueError: the list is empty, `spacing` is given without arrays, or a setting is invalid.
        """
        options = self._options(kwargs)
        inputs = list(each(ct))
        if not inputs:
            raise ValueError("The list of CTs is empty.")
        if spacing is not None and not any(_is_array(one) for one in inputs):
            raise ValueError(f"ct: spacing: {spacing} (expected None: files and images state their own)")
        tensors, geometry = [], []
        for one in inputs:
            volume = _read(one, spacing, options["allow_non_hu"])
            if not (volume.is_hu or options["allow_non_hu"]):
                raise CTIntensityError(
                    volume.source,
                    "voxels",
                    "not in Hounsfield units",
                    "Hounsfield units, or allow_non_hu=True (--allow-non-hu)",
                )
            if not allow_any_anatomy:
                check_chest(volume.coverage, volume.source)
            tensor, place = _resample(volume, options, digest)
            tensors.append(tensor)
            geometry.append(replace(place, coverage=volume.coverage))
        batch = torch.stack(tensors)
        return BatchFeature(
            {"ct": batch.numpy() if options["return_tensors"] == "np" else batch, "geometry": geometry}
        )

    def resample(
        self, volume: CTVolume, **kwargs: Unpack[DiffVPImageProcessorKwargs]
    ) -> tuple[torch.Tensor, CTGeometry]:
        """Resample a volume from [`read_ct`]: its tensor (1, depth, height, width), and its position in the file."""
        return _resample(volume, self._options(kwargs), digest=False)

    def _options(self, kwargs: Mapping[str, object]) -> dict:
        """Return all settings; those given in the call take precedence."""
        given = dict(kwargs)
        self._validate(given)
        settings = {key: getattr(self, key) for key in self.valid_kwargs.__annotations__}
        return self._standardize_kwargs(**settings | given)

    def _standardize_kwargs(self, **kwargs) -> dict:  # pyright: ignore[reportIncompatibleMethodOverride]  # other names
        size, spacing, window = kwargs["size"], kwargs["target_spacing"], kwargs["hu_window"]
        if isinstance(size, (list, tuple)) and len(size) == 3:
            size = dict(zip(AXES, size, strict=True))
        if not isinstance(size, dict) or set(size) != set(AXES) or min(size.values()) < 1:
            raise ValueError(f"settings: size: {size} (expected positive depth, height and width in voxels)")
        if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
            raise ValueError(
                f"settings: target_spacing: {spacing} (expected None or three positive mm: depth, height, width)"
            )
        if len(window) != 2 or not window[0] < window[1]:
            # The only one of these settings with a command-line option: input errors there are shown in one line.
            raise CTIntensityError("settings", "hu_window", tuple(window), "two rising HU, such as (-1000, 200)")
        if kwargs["return_tensors"] not in (None, "pt", "np"):
            raise ValueError(f'settings: return_tensors: {kwargs["return_tensors"]!r} (expected "pt" or "np")')
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
        """[`preprocess`] many scans in parallel threads, and yield the results in the order of the scans.

        Threads suffice, because decompression and interpolation release the GIL. At most `workers + 1` scans are in
        memory at a time.

        Args:
            scans: any inputs of [`preprocess`], each a single scan.
            workers: number of threads; each processes one scan at a time.
            kwargs: arguments of [`preprocess`].

        Yields:
            The features of one scan (batch of 1), or the error that refused it; the other scans continue.

        Raises:
            ValueError: `workers` is below 1.
        """
        if workers < 1:
            raise ValueError(f"settings: workers: {workers} (expected at least 1)")

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
        """Resample a map (depth, height, width) to the voxel grid of the input file; see [`to_input_grid`]."""
        return to_input_grid(map, geometry)

    def save_map(self, path, map: torch.Tensor | np.ndarray, geometry: CTGeometry) -> Path:
        """Save a map (depth, height, width) as NIfTI on the voxel grid of the input file; see [`save_map`]."""
        return save_map(path, map, geometry)


# Iterable types that do not count as a list. A set does not, because it has no order for the results.
_SINGLE = (str, bytes, Mapping, Set, torch.Tensor, io.IOBase)


def is_many(value) -> bool:
    """Return `True` if an argument that takes one value or several holds several.

    Any iterable counts as several values: also a tuple, a column of `datasets` or pandas, or a generator. An array is
    one scan, unless it is an array of objects or strings. A table (a `DataFrame`) is no list: it would give the names
    of its columns.
    """
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "OUT"  # T: NumPy's strings of any length
    if getattr(value, "ndim", 1) != 1:
        return False
    return isinstance(value, Iterable) and not isinstance(value, _SINGLE) and not is_simpleitk(value)


def each(value) -> Iterator:
    """Iterate over the values of an argument that takes one value or several (see [`is_many`])."""
    for item in value if is_many(value) else [value]:
        yield unwrapped(item)


def _texts(text, count: int) -> list[str | None]:
    """Return one text for each of `count` scans.

    Raises:
        TypeError: `text`, or an item of it, is not a string.
        ValueError: the numbers of texts and scans differ.
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


# Argument names of other processors, and the names here.
HABITS = {
    **dict.fromkeys(("image", "images", "pixel_values", "video", "videos", "volume", "volumes"), "ct"),
    **dict.fromkeys(("reference_image", "reference_images", "references", "normal"), "reference"),
    **dict.fromkeys(("prompt", "prompts", "texts", "instruction", "messages", "conversation"), "text"),
}


class DiffVPBatchFeature(BatchFeature):
    """The model's inputs as keys; facts about them as attributes, which survive `.to()`.

    Attributes:
        geometry, reference_geometry: one [`CTGeometry`] per scan: source, content digest, mapping to the file's grid.
        reference_ids: for each scan the id of its reference in the pool, or the source of a given reference.
    """

    def __init__(self, data: dict, geometry=(), reference_geometry=(), reference_ids=()):
        super().__init__(data)
        self.geometry: list[CTGeometry] = list(geometry)
        self.reference_geometry: list[CTGeometry] = list(reference_geometry)
        self.reference_ids: list[str] = list(reference_ids)

    def __getstate__(self):
        return dict(self.__dict__)

    def __setstate__(self, state):
        self.__dict__.update(state)


class DiffVPProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: DiffVPImageProcessorKwargs  # pyright: ignore[reportIncompatibleVariableOverride]  # as its own do
    # Read by transformers 5.19; defaults are class attributes.
    _defaults = {}  # pyright: ignore[reportGeneralTypeIssues]


class DiffVPProcessor(ProcessorMixin):
    """Preprocess CTs, sample references, tokenize the instruction, and split reports into regions.

    Args:
        image_processor ([`DiffVPImageProcessor`]): preprocesses the CTs.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the base LLM.
        chat_template (`str`, *optional*): Jinja template; the default is the tokenizer's own, if it has one.
        instruction (`str`): instruction to the model if a call gives no `text`.
    """

    valid_processor_kwargs = DiffVPProcessorKwargs
    # Used by the pipeline, which imports no other file.
    is_many, each = staticmethod(is_many), staticmethod(each)
    # Left, because the report continues the prompt: no padding may stand between the two.
    text_kwargs = {"padding": True, "padding_side": "left", "return_tensors": "pt"}

    def __init__(self, image_processor, tokenizer, chat_template=None, instruction: str = DEFAULT_INSTRUCTION):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.instruction = instruction
        self.reference_pool: ReferencePool | None = None
        if tokenizer.pad_token is None:  # LLaMA-2 has none; padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # takes scans, no images, videos or audio
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
            ct: one CT or several, in any form that [`DiffVPImageProcessor.preprocess`] accepts; `None` to tokenize
                text only. Several values of `reference` and `text` are accepted in the same forms.
            reference: one for each CT, or one for all. `None` samples from the pool that ships with the checkpoint.
                The sample depends only on `reference_seed` and the content of the scan, not on its name or its
                position in a batch. A scan is never its own reference.
            text: one instruction for all CTs, or one for each; `None` is the instruction that the checkpoint was
                trained with. The model writes reports and answers nothing else: another instruction gives a warning.
            spacing: mm along x, y, z of bare arrays among `ct` and `reference`.
            reference_seed: seed for sampling references; 0 if not given.
            allow_any_anatomy: `False` refuses scans, and given references, that do not show a chest, as report
                generation does; `True` if not given.
            kwargs: settings of the image processor or the tokenizer for this call. A `hu_window` or `foreground_hu`
                for a scan that is not in Hounsfield units is not applied to a reference that is.

        Returns:
            `ct` and `reference` (batch, 1, depth, height, width), `input_ids` and `attention_mask` (batch, length),
            padded on the left; and the attributes of [`DiffVPBatchFeature`].

        Raises:
            TypeError: an argument is unknown or of the wrong type.
            ValueError: the numbers of scans, references and texts differ, or there is nothing to process.
            CTInputError: a scan or reference is not a usable chest CT.
            ReferencePoolError: no reference is given and the pool has none for the scan.
        """
        text_kwargs, images_kwargs = self._split_kwargs(kwargs)
        if ct is None:
            if reference is not None or text is None:
                raise ValueError("Give ct=, or text= alone.")
            text = list(each(text))
            return DiffVPBatchFeature(self._tokenize(_texts(text, len(text)), text_kwargs))
        # transformers' test suite requires `None` as the default of optional arguments.
        allow_any_anatomy = True if allow_any_anatomy is None else allow_any_anatomy
        seed = 0 if reference_seed is None else reference_seed
        if not isinstance(seed, int):
            raise TypeError(f"settings: reference_seed: {seed!r} (expected an integer)")
        scans = list(each(ct))
        texts = _texts(text, len(scans))  # fail before reading any scan
        self._warn_of_other_instructions(texts)
        given = [] if reference is None else list(each(reference))
        if given and len(given) not in (1, len(scans)):
            raise ValueError(f"reference: {len(given)} for {len(scans)} scans (expected one each, or one for all)")
        if spacing is not None and not any(_is_array(one) for one in scans + given):
            raise ValueError(f"ct: spacing: {spacing} (expected None: files and images state their own)")
        features = self._preprocess(scans, spacing, images_kwargs, allow_any_anatomy)
        batch = len(features["geometry"])
        # A window of grey values is only for the scan; a reference in Hounsfield units keeps the default window.
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
            references = torch.cat([part["ct"] for part in parts])
            geometry = [place for part in parts for place in part["geometry"]]
            ids = [place.source for place in geometry]
            if len(given) < batch:  # one for all
                references = references.repeat_interleave(batch, 0)
                geometry, ids = geometry * batch, ids * batch
        else:
            references, geometry, ids = self._sample_references(features["geometry"], seed, hu_kwargs)
        data = {"ct": features["ct"], "reference": references}
        if text_kwargs["return_tensors"] == "np":
            data = {key: value.numpy() for key, value in data.items()}
        data |= self._tokenize(texts, text_kwargs)
        return DiffVPBatchFeature(data, features["geometry"], geometry, ids)

    def _warn_of_other_instructions(self, texts: Sequence[str | None]) -> None:
        for text in texts:
            if text not in (None, self.instruction):
                logger.warning_once(
                    f"text: {textwrap.shorten(text, 80)!r} (expected {self.instruction!r}): the model writes reports "
                    "of chest CTs, which it compares with a normal scan. It was trained with one instruction, and "
                    "answers no others."
                )

    def _split_kwargs(self, kwargs: Mapping[str, Any]) -> tuple[dict, dict]:
        """Split the arguments of a call into those for the tokenizer and those for the image processor.

        Raises:
            TypeError: an argument is unknown; transformers would only warn.
        """
        image_names = set(self.image_processor.valid_kwargs.__annotations__)
        groups = {"text_kwargs", "images_kwargs", "common_kwargs"}
        unknown = sorted(set(kwargs) - set(TextKwargs.__annotations__) - image_names - groups)
        if unknown:
            meant = sorted({f"{HABITS[name]}=" for name in unknown if name in HABITS})
            hint = f" Expected {' and '.join(meant)}." if meant else ""
            raise TypeError(f"Unknown argument(s) {', '.join(unknown)} for {type(self).__name__}.{hint}")
        # Most base tokenizers pad on the right, which must not override `text_kwargs`.
        init_kwargs = {key: value for key, value in self.tokenizer.init_kwargs.items() if key != "padding_side"}
        valid: Any = self.valid_processor_kwargs  # transformers takes the class, but is annotated with an instance
        merged = self._merge_kwargs(valid, tokenizer_init_kwargs=init_kwargs, **kwargs)
        images = {key: value for key, value in merged["images_kwargs"].items() if key in image_names}
        return {**self.text_kwargs, **merged["text_kwargs"]}, images | {"return_tensors": "pt"}

    def _preprocess(self, scans: list, spacing, images_kwargs: dict, allow_any_anatomy: bool = True) -> BatchFeature:
        spacing = spacing if any(_is_array(one) for one in scans) else None
        return self.image_processor(
            scans, spacing=spacing, digest=True, allow_any_anatomy=allow_any_anatomy, **images_kwargs
        )

    def choose_reference(self, sha256: str, seed: int = 0) -> tuple[str, CTVolume]:
        """
        Return the id and volume of the reference that `__call__` samples for a scan.

        Args:
            sha256: SHA-256 of the scan's content, `CTVolume.sha256`.
            seed: `reference_seed` of `__call__`.

        Raises:
            ReferencePoolError: there is no pool, or it holds no other scan.
        """
        pool = self._pool()

        def load(entry: dict[str, str]) -> tuple[str, CTVolume]:
            volume = read_ct(pool.fetch(entry))
            return volume.sha256, volume

        return pool.choose(seed, sha256, load)

    def _pool(self) -> ReferencePool:
        if self.reference_pool is None:
            raise ReferencePoolError(
                "This processor has no reference pool: give reference= (--reference), or load_references()."
            )
        return self.reference_pool

    def _sample_references(
        self, geometry: list[CTGeometry], seed: int, images_kwargs: dict
    ) -> tuple[torch.Tensor, list[CTGeometry], list[str]]:
        """Sample a reference from the pool for each scan: tensors, geometries and ids."""
        pool = self._pool()
        loaded, tensors, places, ids = {}, [], [], []

        def load(entry: dict[str, str]) -> tuple[str, BatchFeature]:
            if entry["id"] not in loaded:
                loaded[entry["id"]] = self._preprocess([pool.fetch(entry)], None, images_kwargs)
            return loaded[entry["id"]]["geometry"][0].sha256, loaded[entry["id"]]

        for place in geometry:
            name, reference = pool.choose(seed, cast(str, place.sha256), load)  # computed by `_preprocess`
            tensors.append(reference["ct"])
            places += reference["geometry"]
            ids.append(name)
        return torch.cat(tensors), places, ids

    def _tokenize(self, texts: Sequence[str | None], text_kwargs: dict) -> dict:
        # A chat template writes the special tokens itself; the tokenizer would add a second BOS.
        options = {"add_special_tokens": self._chat_template() is None} | text_kwargs
        encoded = self.tokenizer([self.format_instruction(text) for text in texts], **options)
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def format_instruction(self, text: str | None = None) -> str:
        """Format an instruction for the LLM: a user turn if there is a chat template, otherwise a line of text."""
        text = self.instruction if text is None else text
        template = self._chat_template()
        if template is None:
            return f"{text}\n"
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], chat_template=template, tokenize=False, add_generation_prompt=True
        )

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]  # the other arguments are in `kwargs`
        self, conversation, chat_template=None, processor_kwargs: dict | None = None, **kwargs
    ):
        """Apply the chat template as the tokenizer does, but return text by default, as other processors do.

        A conversation cannot hold scans. Pass scans to `__call__`, which formats its `text` as a user turn itself.
        """
        options = {"chat_template": chat_template or self._chat_template(), "tokenize": False, "return_dict": False}
        return self.tokenizer.apply_chat_template(conversation, **options | (processor_kwargs or {}) | kwargs)

    def _chat_template(self) -> str | dict[str, str] | None:
        return self.tokenizer.chat_template if self.chat_template is None else self.chat_template

    def encode_report(self, report: str, max_length: int | None = None, truncation: bool = False) -> list[int]:
        """Return the token ids of a report with the end token, the target of eq. 10.

        Raises:
            ValueError: the report is longer than `max_length` and `truncation` is off. Training on truncated reports
                teaches the model to stop early.
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
        Write the diagnosis prompt D of eq. 9, with findings in the order of `DIAGNOSIS_LABELS`.

        Args:
            labels: labels of the predicted findings.
            attributes: text in brackets after a finding, by label, for example "right upper lobe, 12 mm".

        Raises:
            ValueError: a label is unknown.
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
        """Tokenize the fragments of the diagnosis prompt, for `config.diagnosis_prompt_ids`.

        Their concatenation *defines* the prompt's ids: `prefix`, then the predicted labels with the `separator`
        between them (or `none`), then `suffix`. In the result, `labels` holds a list of ids for each label, in the
        given order.

        Args:
            labels: all labels that the prompt can name.
            places: all locations that the prompt can name; adds fragments for the attributes of a finding, with sizes
                digit by digit.
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
        """Split a report into {region: text}; see [`split_report`]."""
        return split_report(text, sections)

    def to_input_grid(self, map: torch.Tensor | np.ndarray, geometry: CTGeometry) -> np.ndarray:
        """Resample a map (depth, height, width) to the voxel grid of the input file; see [`to_input_grid`]."""
        return to_input_grid(map, geometry)

    def save_map(self, path, map: torch.Tensor | np.ndarray, geometry: CTGeometry) -> Path:
        """Save a map (depth, height, width) as NIfTI on the voxel grid of the input file; see [`save_map`]."""
        return save_map(path, map, geometry)

    @property
    def model_input_names(self) -> list[str]:
        return ["ct", "reference", "input_ids", "attention_mask"]

    def load_references(self, folder) -> None:
        """
        Use the pool in a folder: NIfTI files and a `references.json`, which [`index_references`] writes.

        Raises:
            ReferencePoolError: the folder has no `references.json`, or a malformed one.
        """
        self.reference_pool = ReferencePool.load(folder, subfolder="")
        if self.reference_pool is None:
            raise ReferencePoolError(f"{Path(folder).name} has no references.json.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in transformers, but also load the pool in `references/` of the same repository and revision."""
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if kwargs.get(key) is not None}
        access = {key: hub_kwargs[key] for key in ("token", "local_files_only", "cache_dir") if key in hub_kwargs}
        revision = resolve_revision(pretrained_model_name_or_path, kwargs.get("revision") or "main", **access)
        options: dict[str, Any] = kwargs | {"revision": revision}
        loaded = super().from_pretrained(pretrained_model_name_or_path, **options)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with return_unused_kwargs
        subfolder = "/".join(part for part in (kwargs.get("subfolder", ""), REFERENCE_FOLDER) if part)
        processor.reference_pool = ReferencePool.load(
            pretrained_model_name_or_path, subfolder, **hub_kwargs | {"revision": revision}
        )
        return loaded

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # AutoImageProcessor would require trust_remote_code, although this code is already running.
        image_processor = DiffVPImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        # The tokenizer's file names its class. Without a config, AutoTokenizer would read the model's and warn that
        # it knows no tokenizer for this model type.
        options: dict[str, Any] = {"config": PreTrainedConfig()} | kwargs
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **options)
        return [image_processor, tokenizer]

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        As in transformers, but also save the reference pool, and remove that of an earlier save.

        For a local pool (scans that must not leave this machine), neither the scans nor their paths are written.
        """
        files = super().save_pretrained(save_directory, **kwargs)
        # transformers sets auto_map on the processor it saves, but not on the one it loads; keep them equal.
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

# The collator is exported so that every checkpoint can be trained further: saving copies imported files.
__all__ = [
    "DiffVPBatchFeature",
    "DiffVPDataCollator",
    "DiffVPDataset",
    "DiffVPImageProcessor",
    "DiffVPImageProcessorKwargs",
    "DiffVPProcessor",
    "DiffVPProcessorKwargs",
]
