# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Columns of any library are accepted as lists, and geometries survive storage by `datasets`."""

import pickle
from collections import deque

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from accelerate.utils import send_to_device

from diffvp.data.table import hub_cases
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.map_diffvp import save_map, to_input_grid
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor, each, is_many
from diffvp.reading_diffvp import read_ct
from diffvp.resampling_diffvp import CTGeometry
from diffvp.volume_diffvp import CTInputError

from .bad_inputs import sitk_image
from .ct_samples import SPACING, lps_affine, make_ct

datasets = pytest.importorskip("datasets")
pandas = pytest.importorskip("pandas")

TEXTS = ["Describe.", "Write the report of this scan, region by region.", "Describe the heart."]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("scans")
    for seed in range(3):
        nib.save(nib.Nifti1Image(make_ct(seed=seed), lps_affine()), folder / f"scan_{seed}.nii.gz")
    return [str(folder / f"scan_{seed}.nii.gz") for seed in range(3)]


@pytest.fixture(scope="module")
def rows(paths):
    rows = datasets.Dataset.from_dict({"ct": paths, "path": paths, "text": TEXTS})
    return rows.cast_column("ct", datasets.Nifti())


@pytest.fixture(scope="module")
def image_processor() -> DiffVPImageProcessor:
    return DiffVPImageProcessor(size=(8, 10, 12))


@pytest.fixture(scope="module")
def processor(image_processor, tokenizer) -> DiffVPProcessor:
    return DiffVPProcessor(image_processor, pickle.loads(pickle.dumps(tokenizer)))


def objects(values) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


# name: function that makes a column from a list
COLUMNS = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "generator": lambda values: (value for value in values),
    "map": lambda values: map(str, values),
    "array of objects": objects,
    "array of texts": np.array,
    "array of texts of any length": lambda values: np.array(values, dtype=np.dtypes.StringDType()),
    "Series": pandas.Series,
    "Series of another index": lambda values: pandas.Series(values, index=[7, 3, 7]),
    "Series of categories": lambda values: pandas.Series(values, dtype="category"),
    "column of a DataFrame": lambda values: pandas.DataFrame({"a": values})["a"],
    "Index": pandas.Index,
    "values of a dict": lambda values: dict(enumerate(values)).values(),
    "column": lambda values: datasets.Dataset.from_dict({"a": values})["a"],
    "nested column": lambda values: datasets.Dataset.from_dict({"a": [{"b": value} for value in values]})["a"]["b"],
    "column of a stream": lambda values: datasets.Dataset.from_dict({"a": values}).to_iterable_dataset()["a"],
    "column in NumPy's format": lambda values: datasets.Dataset.from_dict({"a": values}).with_format("numpy")["a"],
    "slice in NumPy's format": lambda values: datasets.Dataset.from_dict({"a": values}).with_format("numpy")[:3]["a"],
    "column in pandas' format": lambda values: datasets.Dataset.from_dict({"a": values}).with_format("pandas")["a"],
    "column in torch's format": lambda values: datasets.Dataset.from_dict({"a": values}).with_format("torch")["a"],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_texts_in_any_column_are_assigned_per_scan(processor, paths, name):
    found = processor(ct=paths, reference=paths[0], text=COLUMNS[name](TEXTS))["input_ids"]
    assert torch.equal(found, processor(ct=paths, reference=paths[0], text=TEXTS)["input_ids"])
    alone = processor(text=COLUMNS[name](TEXTS))["input_ids"]
    assert torch.equal(alone, processor(text=TEXTS)["input_ids"])


@pytest.mark.parametrize("name", COLUMNS)
def test_paths_in_any_column_are_scans_and_references(processor, image_processor, paths, name):
    expected = image_processor(paths)["ct"]
    assert torch.equal(image_processor(COLUMNS[name](paths))["ct"], expected)
    inputs = processor(ct=COLUMNS[name](paths), reference=COLUMNS[name](paths[::-1]))
    assert torch.equal(inputs["ct"], expected) and torch.equal(inputs["reference"], expected.flip(0))
    streamed = [features["ct"] for features in image_processor.stream(COLUMNS[name](paths))]
    assert torch.equal(torch.cat(streamed), expected)


def test_images_in_columns_and_arrays_are_scans(image_processor, paths, rows):
    expected = image_processor(paths)["ct"]
    images = [nib.load(path) for path in paths]
    undecoded = rows.cast_column("ct", datasets.Nifti(decode=False))
    formatted = rows.with_format("numpy")
    for scans in (
        rows["ct"], rows[:]["ct"], undecoded["ct"], rows.to_iterable_dataset()["ct"], tuple(images), objects(images),
        pandas.Series(images), formatted["ct"], formatted[:]["ct"], [formatted[k]["ct"] for k in range(3)],
    ):  # fmt: skip
        assert torch.equal(image_processor(scans)["ct"], expected)
    assert torch.equal(image_processor(formatted[1]["ct"])["ct"], expected[1:2])
    np.testing.assert_array_equal(read_ct(formatted[1]["ct"]).array, make_ct(seed=1))


def test_arrays_in_a_column_are_scans(image_processor):
    arrays = [make_ct(seed=seed) for seed in range(3)]
    expected = image_processor(arrays, spacing=SPACING)["ct"]
    for scans in (objects(arrays), pandas.Series(arrays), (one for one in arrays), tuple(map(torch.tensor, arrays))):
        assert torch.equal(image_processor(scans, spacing=SPACING)["ct"], expected)


def test_single_scan_is_not_treated_as_a_list(image_processor, paths):
    """Iterable single objects count as one scan: an array, a tensor, an image, a dict, a text."""
    value = {"path": paths[0], "bytes": None}
    for one in (
        make_ct(), torch.tensor(make_ct()), sitk_image(), nib.load(paths[0]), value, paths[0], read_ct(paths[0]),
        np.array(paths[0]), np.float32(3), None, b"bytes", {paths[0]},
    ):  # fmt: skip
        assert not is_many(one) and len(list(each(one))) == 1
    assert image_processor(sitk.ReadImage(paths[0]))["ct"].shape[0] == 1
    with pytest.raises(CTInputError) as caught:
        image_processor(set(paths))  # a set has no order, so results could not be assigned
    assert caught.value.field == "type"


@pytest.mark.parametrize("wrong", [5, 1.5, b"Describe.", {"text": "Describe."}, {"Describe."}, True, np.array([1, 2])])
def test_non_text_is_refused(processor, paths, wrong):
    for arguments in ({"ct": paths, "reference": paths[0]}, {}):
        with pytest.raises(TypeError, match="text"):
            processor(**arguments, text=wrong)


def test_table_is_neither_a_list_of_texts_nor_of_scans(processor, image_processor, paths):
    """Iterating over a table gives the names of its columns."""
    for table in (
        pandas.DataFrame({"Describe the scan.": TEXTS}),
        pandas.DataFrame({paths[0]: TEXTS, paths[1]: TEXTS}),
    ):
        assert not is_many(table)
        for arguments in ({"ct": paths[:1], "reference": paths[1]}, {}):
            with pytest.raises(TypeError):
                processor(**arguments, text=table)
        for scans in ({"ct": table, "reference": paths[0]}, {"ct": paths[:1], "reference": table}):
            with pytest.raises(CTInputError) as caught:
                processor(**scans)
            assert caught.value.field == "type"


@pytest.mark.parametrize("item", [None, 5, float("nan"), pandas.NA, b"x", {"a": "b"}, ["Describe."]])
def test_non_text_in_a_list_is_refused_with_its_index(processor, paths, item):
    for arguments in ({"ct": paths, "reference": paths[0]}, {}):
        for texts in ([TEXTS[0], item, TEXTS[2]], pandas.Series([TEXTS[0], item, TEXTS[2]], dtype=object)):
            with pytest.raises(TypeError, match=r"text\[1\]"):
                processor(**arguments, text=texts)


def test_column_of_wrong_length_is_refused_before_reading_scans(processor, paths, rows):
    for texts in (rows["text"], iter(TEXTS)):
        with pytest.raises(ValueError, match="3 texts for 2 scans"):
            processor(ct=["missing.nii", "missing.nii"], reference=paths[0], text=texts)
    with pytest.raises(ValueError, match="reference: 3 for 2 scans"):
        processor(ct=paths[:2], reference=rows["ct"])


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow"])
def test_dataset_cases_are_the_same_in_every_format(rows, form):
    """Labels and flags have the number type of the format."""
    values = {"report": TEXTS, "normal": [1, 0, 1]} | {label: [0, 1, 0] for label in DIAGNOSIS_LABELS}
    dataset = datasets.concatenate_datasets([rows.select_columns("ct"), datasets.Dataset.from_dict(values)], axis=1)
    expected = list(hub_cases(dataset))
    for formatted in (dataset.with_format(form), dataset.to_iterable_dataset().with_format(form)):
        found = list(hub_cases(formatted))
        assert [case.identity for case in found] == [case.identity for case in expected]
        assert [case.normal for case in found] == [True, False, True]


# Geometries stored by `map`


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("form", [None, "numpy", "torch", "pandas"])
def test_geometry_survives_map_in_every_format(image_processor, rows, paths, tmp_path, batched, form):
    """Maps written with the stored geometry equal those of the original geometry."""
    stored = rows.map(
        lambda row: image_processor(row["ct"], digest=True), batched=batched, batch_size=2,
        remove_columns=rows.column_names, load_from_cache_file=False, keep_in_memory=True,
    )  # fmt: skip
    features = image_processor(paths, digest=True)
    row = stored.with_format(form)[1]
    found = row["geometry"] if batched else row["geometry"][0]
    if form == "pandas":
        found = row["geometry"].iloc[0] if batched else row["geometry"].iloc[0][0]
    geometry, expected = CTGeometry.from_dict(found), features["geometry"][1]
    for name in ("source", "layout", "sha256", "is_hu", "shape", "axes", "flips", "size"):
        assert getattr(geometry, name) == getattr(expected, name)
    for name in ("affine", "spacing", "offset", "scale"):
        np.testing.assert_allclose(getattr(geometry, name), getattr(expected, name), rtol=1e-6, atol=1e-5)
    tensor = features["ct"][1, 0]
    np.testing.assert_allclose(to_input_grid(tensor, found), to_input_grid(tensor, expected), atol=1e-4)
    saved = nib.load(save_map(tmp_path / "map.nii", tensor, found))
    np.testing.assert_allclose(saved.affine, nib.load(paths[1]).affine, atol=1e-5)


def test_geometry_survives_batching_and_refuses_unknown_fields(image_processor, paths):
    [geometry] = image_processor(paths[0])["geometry"]
    assert send_to_device({"geometry": [geometry]}, "cpu")["geometry"] == [geometry]
    assert CTGeometry.from_dict(geometry) == CTGeometry.from_dict(geometry.to_dict()) == geometry
    for wrong in ({"tensor_shape": [1, 2, 3]}, {"tensor_affine": None}):
        with pytest.raises(TypeError):
            CTGeometry.from_dict(geometry.to_dict() | wrong)
    with pytest.raises(TypeError):
        CTGeometry.from_dict({"source": "a"})


def test_geometry_survives_parquet_and_json(image_processor, paths, tmp_path):
    geometry = image_processor(paths)["geometry"]
    rows = datasets.Dataset.from_dict({"geometry": geometry})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_json(tmp_path / "rows.jsonl")
    from_json = pandas.read_json(tmp_path / "rows.jsonl", lines=True, precise_float=True)["geometry"]
    for found in (
        rows["geometry"],
        datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"))["geometry"],
        from_json,
    ):
        for stored, expected in zip(found, geometry, strict=True):
            np.testing.assert_allclose(CTGeometry.from_dict(stored).tensor_affine, expected.tensor_affine, atol=1e-5)
            assert CTGeometry.from_dict(stored).shape == expected.shape
