# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Check that a scan shows a chest: ellipsoid bodies with known lungs, phantoms, and real scans."""

import dataclasses
import time

import numpy as np
import pytest

from diffvp.anatomy_diffvp import CTAnatomyError, anatomy_warnings, check_chest, measure_coverage
from diffvp.data.phantom import render_patient, sample_patient
from diffvp.reading_diffvp import read_ct
from diffvp.volume_diffvp import CTInputError

AIR, FAT, MUSCLE, BLOOD, BONE = -1000, -100, 50, 45, 400
LUNG = -860


class Body:
    """
    Adult body of ellipsoids from the pelvis to the neck, in mm: x to the left, y to posterior, z upwards from 0.

    Args:
        field: field of view along x and y, in mm.
        scale: scale of the body; 0.33 is a newborn.
        noise: standard deviation in HU.
    """

    def __init__(self, field=420.0, pixels=104, slice_mm=4.0, low=-100.0, high=300.0, scale=1.0, noise=15.0):
        self.spacing = (field / pixels, field / pixels, slice_mm * scale)
        self.scale, self.noise = scale, noise
        z = np.arange(low, high, slice_mm) * scale
        plane = (np.arange(pixels) - (pixels - 1) / 2) * field / pixels
        self.grid = np.meshgrid(plane / scale, plane / scale, z / scale, indexing="ij")
        self.hu = np.full(self.grid[0].shape, float(AIR))
        x, y, z = self.grid
        self.fill((x / 175) ** 2 + (y / 115) ** 2 < 1, FAT)
        self.fill((x / 160) ** 2 + (y / 102) ** 2 < 1, MUSCLE)
        self.fill((np.hypot(x, y - 70) < 22), 180)

    def fill(self, where, hu):
        self.hu[where] = hu
        return self

    def ellipsoid(self, centre, radii, hu):
        distance = sum(
            ((grid - place) / radius) ** 2 for grid, place, radius in zip(self.grid, centre, radii, strict=True)
        )
        return self.fill(distance < 1, hu)

    def lungs(self, right=LUNG, left=LUNG):
        """Add half ellipsoids of 1.4 litres each on the diaphragm, z from 0 to 220 mm."""
        for side, hu in ((-1, right), (1, left)):
            x, y, z = self.grid
            inside = ((x - 78 * side) / 62) ** 2 + (y / 85) ** 2 + ((z - 30) / 190) ** 2 < 1
            self.fill(inside & (z >= 0), hu)
        return self.ellipsoid((15, -25, 50), (55, 45, 60), BLOOD).ellipsoid((0, 10, 250), (9, 9, 120), AIR)

    def table(self, side="posterior"):
        """Add a table top of foam in a shell, as wide as the body."""
        x, y, _ = self.grid
        along, across = {"posterior": (x, y), "anterior": (x, -y), "left": (y, x)}[side]
        top = {"left": 180}.get(side, 120)
        self.fill((np.abs(along) < 200) & (across > top) & (across < top + 50), -930)
        for depth in (top, top + 46):
            self.fill((np.abs(along) < 200) & (across > depth) & (across < depth + 4), 0)
        return self

    def volume(self, seed=0):
        noise = np.random.default_rng(seed).normal(0, self.noise, self.hu.shape)
        return read_ct(np.clip(self.hu + noise, -1024, 3071).astype(np.int16), spacing=self.spacing)

    def lung_ml(self):
        voxel = np.prod(self.spacing) / 1000
        return float(np.count_nonzero((self.hu > -990) & (self.hu < -500) & (np.abs(self.grid[1]) < 100))) * voxel


def cut(volume, low=0.0, high=1.0):
    """Cut a scan between two fractions of its height."""
    depth = volume.array.shape[2]
    array = volume.array[:, :, round(low * depth) : round(high * depth)]
    return read_ct(np.ascontiguousarray(array), spacing=volume.spacing)


def refused(volume) -> bool:
    try:
        check_chest(measure_coverage(volume), "scan")
    except CTAnatomyError as error:
        assert isinstance(error, CTInputError) and error.field == "lungs" and "allow" in error.expected
        return True
    return False


@pytest.mark.parametrize("noise", [0, 15, 80])
@pytest.mark.parametrize("slice_mm", [1.5, 4, 10])
def test_lung_volume_and_extent_match_the_known_body(noise, slice_mm):
    body = Body(slice_mm=slice_mm, noise=noise).lungs().table()
    coverage = measure_coverage(body.volume())
    assert coverage["lung_volume_ml"] == pytest.approx(body.lung_ml(), rel=0.12)
    assert coverage["lung_extent_mm"] == pytest.approx(220, abs=30)
    assert coverage["cut_off"] == [] and coverage["below_mm"] == pytest.approx(100, abs=12)
    check_chest(coverage, "scan")
    assert anatomy_warnings(coverage) == []


CHESTS = {
    "collapsed lung": lambda: Body().lungs(right=40),
    "effusion up to the apex": lambda: Body().lungs(left=8),
    "pneumonectomy": lambda: Body().lungs(left=15).ellipsoid((60, -20, 50), (60, 50, 60), BLOOD),
    "pneumothorax": lambda: Body().lungs(left=AIR).ellipsoid((60, 0, 50), (30, 30, 60), -300),
    "emphysema": lambda: Body(noise=30).lungs(right=-945, left=-950),
    "ground glass": lambda: Body().lungs(right=-560, left=-600),
    "small lung of a large patient": lambda: (
        Body(field=480).lungs(right=40).ellipsoid((78, 0, 20), (80, 80, 95), MUSCLE)
    ),
    "newborn": lambda: Body(field=150, scale=0.33).lungs(right=-600, left=-620),
    "newborn in a large field": lambda: Body(field=500, pixels=128, scale=0.33).lungs(right=-600, left=-620).table(),
    "prone": lambda: Body().lungs().table("anterior"),
    "on the side": lambda: Body(field=480).lungs().table("left"),
    "sharp kernel": lambda: Body(noise=110).lungs(),
}  # fmt: skip


@pytest.mark.parametrize("name", CHESTS)
def test_difficult_chests_are_accepted(name):
    coverage = measure_coverage(CHESTS[name]().volume())
    check_chest(coverage, "scan")
    assert coverage["cut_off"] == []


def test_field_of_view_that_cuts_a_lung_is_accepted():
    volume = Body().lungs().volume()
    start = round(0.40 * volume.array.shape[0])
    for part in (np.s_[start:], np.s_[: volume.array.shape[0] - start], np.s_[30:60]):
        small = read_ct(np.ascontiguousarray(volume.array[part]), spacing=volume.spacing)
        assert not refused(small)
        width = range(*part.indices(volume.array.shape[0]))
        assert measure_coverage(small)["lung_volume_ml"] > 400 and len(width) < 64


def gas(body, count=12, radius=32):
    """Add bowel gas: spheres with a total of about 1.6 litres."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        centre = rng.uniform((-100, -60, -60), (100, 20, 260))
        body.ellipsoid(centre, (radius, radius * 0.8, radius), AIR)
    return body


OTHERS = {
    "abdomen": lambda: gas(Body()),
    "abdomen with much noise": lambda: gas(Body(noise=60)),
    "abdomen on a table": lambda: gas(Body().table()),
    "stool": lambda: gas(Body()).ellipsoid((90, 0, 80), (25, 25, 60), -350),
    "neck": lambda: Body().ellipsoid((0, 10, 100), (9, 9, 300), AIR),
    "head": lambda: (
        Body(scale=0.5).ellipsoid((0, -60, 100), (25, 20, 30), AIR).ellipsoid((90, 40, 60), (14, 14, 20), -700)
    ),
    "legs": lambda: Body().fill(np.abs(Body().grid[0]) < 25, AIR),
    "abdomen with lung bases": lambda: gas(Body(low=-330, high=60)).lungs(),
    "neck with apices": lambda: Body(low=160, high=420).lungs(),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_regions_are_refused(name):
    assert refused(OTHERS[name]().volume())


@pytest.mark.parametrize(
    ("low", "high", "ends"),
    [
        (-100, 100, ["top"]),  # without apices
        (90, 300, ["bottom"]),  # without the region below the carina
        (60, 120, ["top", "bottom"]),  # a slab
        (-400, 140, ["top"]),  # down to the pelvis
    ],
)
def test_partial_chest_gives_a_warning(low, high, ends):
    coverage = measure_coverage(Body(low=low, high=high).lungs().table().volume())
    check_chest(coverage, "scan")
    assert coverage["cut_off"] == ends
    warnings = anatomy_warnings(coverage)
    assert len(warnings) == len(ends) and all(end in text for end, text in zip(ends, warnings, strict=True))


@pytest.mark.parametrize(("blood", "contrast"), [(35, False), (55, False), (110, True), (300, True)])
def test_contrast_medium_is_detected_between_the_lungs(blood, contrast):
    body = Body(noise=25).lungs().ellipsoid((15, -25, 50), (55, 45, 60), blood)
    coverage = measure_coverage(body.volume())
    assert coverage["contrast"] is contrast and coverage["blood_hu"] == pytest.approx(blood, abs=20)


def test_contrast_in_the_header_overrides_the_voxels():
    volume = dataclasses.replace(Body().lungs().volume(), contrast=True)
    assert measure_coverage(volume)["contrast"] is True


def test_non_hu_voxels_have_no_coverage():
    volume = Body().volume()
    grey = read_ct((volume.array + 1024) // 8, spacing=volume.spacing, allow_non_hu=True)
    assert not grey.is_hu and measure_coverage(grey) is None
    check_chest(None, "scan")
    assert anatomy_warnings(None) == []


def test_coverage_is_independent_of_slope_and_stored_type():
    volume = Body().lungs().volume()
    stored = dataclasses.replace(
        volume, array=((volume.array + 1024) * 2).astype(np.uint16), slope=0.5, intercept=-1024
    )
    flipped = dataclasses.replace(volume, array=-volume.array, slope=-1.0)
    real = dataclasses.replace(volume, array=volume.array.astype(np.float64))
    assert measure_coverage(stored) == measure_coverage(flipped) == measure_coverage(real) == measure_coverage(volume)


def test_any_array_is_measured_without_error():
    rng = np.random.default_rng(0)
    for shape in ((8, 8, 8), (9, 70, 8), (130, 8, 200)):
        for hu in (rng.integers(-1024, 3000, shape), np.full(shape, -1000), rng.integers(0, 50, shape)):
            volume = dataclasses.replace(
                Body().volume(), array=hu.astype(np.int16), spacing=(0.2, 10.0, 3.0), shape=shape
            )
            coverage = measure_coverage(volume)
            assert refused(volume) or coverage["lung_volume_ml"] >= 0


@pytest.fixture(scope="module")
def phantoms():
    """Scans of phantom patients with their lung masks."""
    scans = [render_patient(sample_patient(5, index, "train"), matrix=64) for index in range(8)]
    return [(read_ct(scan.hu, spacing=scan.spacing), scan.regions["lung"]) for scan in scans]


def test_phantoms_are_accepted_as_chests(phantoms):
    for volume, lungs in phantoms:
        coverage = measure_coverage(volume)
        check_chest(coverage, "phantom")
        assert coverage["cut_off"] == [] and anatomy_warnings(coverage) == []
        # The mask also includes consolidations and lung displaced by an effusion.
        whole = np.count_nonzero(lungs) * np.prod(volume.spacing) / 1000
        assert 0.45 * whole < coverage["lung_volume_ml"] < 1.1 * whole


def test_cut_phantoms_are_flagged(phantoms):
    for volume, lungs in phantoms:
        slices = np.flatnonzero(lungs.any(axis=(0, 1)))
        bottom, top, depth = slices[0], slices[-1] + 1, volume.array.shape[2]
        apex = cut(volume, 0, (top - 0.15 * (top - bottom)) / depth)
        carina = (bottom + 0.65 * (top - bottom)) / depth
        for part, end in ((apex, "top"), (cut(volume, 0, carina), "top"), (cut(volume, carina, 1), "bottom")):
            assert refused(part) or measure_coverage(part)["cut_off"] == [end]
        assert not refused(apex)


def test_real_chest_scans_are_accepted_and_others_refused(check_data):
    folder = check_data / "ct"
    for name, ends in (("pyradiomics/lung1_image.nrrd", ["bottom"]), ("cip/ct-64.nrrd", [])):
        coverage = measure_coverage(read_ct(folder / name))
        check_chest(coverage, name)
        assert coverage["cut_off"] == ends and 2500 < coverage["lung_volume_ml"] < 5500
        assert coverage["contrast"] is False
    for name in ("totalsegmentator/example_ct.nii.gz", "totalsegmentator/dicom_series"):
        assert refused(read_ct(folder / name))


def test_coverage_takes_under_50_ms_of_cpu_time():
    rng = np.random.default_rng(0)
    plane = rng.integers(-1000, 100, (300, 1, 512), dtype=np.int16)
    volume = read_ct(np.broadcast_to(plane, (300, 512, 512)).copy().T, spacing=(0.7, 0.7, 1.0))
    taken = []
    for _ in range(7):
        started = time.process_time()
        measure_coverage(volume)
        taken.append(time.process_time() - started)
    assert min(taken) < 0.05  # about 0.003 s of CPU time; reading takes 0.1 s or more


# The image processor


def test_processor_always_measures_and_refuses_on_request():
    from diffvp.processing_diffvp import DiffVPImageProcessor

    processor = DiffVPImageProcessor(size=(8, 8, 8))
    chest, abdomen = Body().lungs().volume(), gas(Body()).volume()
    [geometry] = processor(abdomen)["geometry"]
    assert geometry.coverage == measure_coverage(abdomen)
    assert type(geometry).from_dict(geometry.to_dict()) == geometry
    [found] = processor.stream([abdomen], allow_any_anatomy=False)
    assert isinstance(found, CTAnatomyError)
    [found] = processor.stream([chest], allow_any_anatomy=False)
    assert found["geometry"][0].coverage["lung_volume_ml"] > 1000
    with pytest.raises(CTAnatomyError):
        processor([chest, abdomen], allow_any_anatomy=False)
