# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Bad input is refused with an error that names the field: quickly, in little memory, and with nothing on stderr."""

import gzip
import io
import itertools
import json
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from diffvp import inflate_diffvp
from diffvp.inflate_diffvp import inflate
from diffvp.map_diffvp import to_input_grid
from diffvp.reading_diffvp import read_ct
from diffvp.resampling_diffvp import resample
from diffvp.volume_diffvp import CTInputError, CTReadError

from .bad_inputs import CASES, members, meta, nrrd
from .ct_samples import SPACING, make_ct

MAX_SECONDS = 2.0
MAX_MB = 100  # beyond the imports
ORIENTATIONS = [
    tuple(codes[axis] for axis in order)
    for order in itertools.permutations(range(3))
    for codes in itertools.product("LR", "PA", "SI")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """Results of all cases, read in one separate process, which fails if it loads the model."""
    output = tmp_path_factory.mktemp("bad") / "results.json"
    command = [sys.executable, "-m", "diffvp.tests.bad_inputs", output]
    subprocess.run(command, cwd=output.parent, check=True, timeout=120)
    return json.loads(output.read_text())


def test_cases_are_numerous_and_uniquely_named():
    assert len({case.name for case in CASES}) == len(CASES)
    assert sum(case.error is not None for case in CASES) >= 250 and sum(case.error is None for case in CASES) >= 30


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_refused_and_good_input_read(case, results):
    result = results[case.name]
    assert result["found"] == (case.error.__name__ if case.error else "the scan"), result["message"]
    assert case.field in result["field"] and result["field"] in result["message"]
    assert "secret" not in result["message"].lower(), "the message contains the patient's name"
    assert result["printed"] == ""
    assert result["seconds"] <= MAX_SECONDS and result["peak_mb"] <= MAX_MB


# Any input gives a valid volume or a CTInputError.


def read_or_refuse(ct) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            tensor, geometry = resample(read_ct(ct, allow_non_hu=True), (8, 8, 8))
        except CTInputError as error:
            assert error.field and str(error).startswith(f"{error.source}: {error.field}: {error.found} (expected ")
            return
    assert tensor.shape == (1, 8, 8, 8) and tensor.isfinite().all() and tensor.abs().max() <= 1
    assert np.isfinite(geometry.tensor_affine).all() and min(geometry.tensor_spacing) > 0


def read_file(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        read_or_refuse(Path(folder) / name)


def mutated(content: bytes, length: int) -> st.SearchStrategy[bytes]:
    """`content` with some of its first `length` bytes replaced, and possibly truncated."""

    def change(arguments) -> bytes:
        places, end = arguments
        changed = bytearray(content)
        for place, byte in places:
            changed[place] = byte
        return bytes(changed[:end])

    places = st.lists(st.tuples(st.integers(0, length - 1), st.integers(0, 255)), max_size=6)
    return st.tuples(places, st.just(None) | st.integers(0, len(content))).map(change)


SMALL = nib.Nifti1Image(make_ct((8, 9, 10)), np.diag([-1.5, -1.25, 2.5, 1])).to_bytes()
SMALL_GZ = gzip.compress(SMALL, mtime=0)
VALUES = st.sampled_from(
    ["", "0", "-1", "3", "8 9 10", "nan", "inf", "1e999", "1e-999", "9" * 30, "(1,0,0)", "(1,0,0) (0,1,0) (0,0,1)",
     "none", "1 0 0 0 1 0 0 0 1", "True", "False", "LOCAL", "LIST", ".", "..", "../x", "/etc/passwd", "scan.mha",
     "gzip", "raw", "float", "MET_DOUBLE", "left-posterior-superior", "mm", "\0", "\xff"]
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=700), st.sampled_from(["scan.nii", "scan.nii.gz", "scan.nrrd", "scan.mha"]))
def test_random_bytes_are_read_or_refused(content, name):
    start = {"scan.nii": b"\x5c\1\0\0", "scan.nii.gz": b"\x1f\x8b\x08", "scan.nrrd": b"NRRD0004\n", "scan.mha": b""}
    read_file(name, content)
    read_file(name, start[name] + content)


@settings(deadline=None, max_examples=300)
@given(mutated(SMALL, 352), st.booleans())
def test_mutated_nifti_is_read_or_refused(content, compressed):
    read_or_refuse({"path": None, "bytes": gzip.compress(content, 1) if compressed else content})


@settings(deadline=None, max_examples=150)
@given(mutated(SMALL_GZ, len(SMALL_GZ)))
def test_mutated_gzip_is_read_or_refused(content):
    read_or_refuse({"path": None, "bytes": content})


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(["scan.nrrd", "scan.mha"]))
def test_mutated_text_headers_are_read_or_refused(data, name):
    """Replace the values of header fields, then bytes."""
    voxels = make_ct((8, 9, 10)).T.astype("<i2").tobytes()
    make, sizes = (nrrd, "sizes") if name.endswith("nrrd") else (meta, "DimSize")
    separator = ": " if make is nrrd else " = "
    header = make({sizes: "8 9 10"}, b"").decode()
    names = [line.partition(separator)[0] for line in header.splitlines() if separator in line]
    changed = data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    content = make({sizes: "8 9 10"} | changed, voxels)
    read_file(name, data.draw(mutated(content, len(content) - len(voxels))))


@settings(deadline=None, max_examples=100)
@given(
    st.binary(min_size=1, max_size=3000),
    st.integers(1, 500),
    st.integers(0, 40),
    st.integers(-3, 3),
    st.sampled_from(["gzip", "zlib"]),
    st.integers(20, 500),
)
def test_inflate_returns_exactly_the_expected_bytes(content, length, padding, more, codec, chunk):
    """Any chunk size gives the same result. Trailing zeros are dropped."""
    packed = (members(content, length) if codec == "gzip" else zlib.compress(content)) + bytes(padding)
    expected = len(content) + more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inflate_diffvp, "CHUNK", chunk)
        if more <= 0 <= expected and not content[expected:].strip(b"\0"):
            assert inflate(io.BytesIO(packed), expected, codec, "bytes").tobytes() == content[:expected]
        elif expected >= 0:
            with pytest.raises(CTReadError, match="voxel data"):
                inflate(io.BytesIO(packed), expected, codec, "bytes")


@pytest.mark.parametrize("codec", ["gzip", "zlib"])
def test_trailing_zeros_are_dropped_up_to_a_limit(monkeypatch, codec):
    """Zeros inside the compressed stream are limited, because a decompression bomb could continue with them."""
    content, pack = np.random.default_rng(0).bytes(3000), (gzip if codec == "gzip" else zlib).compress
    monkeypatch.setattr(inflate_diffvp, "MAX_PADDING", 10_000)
    monkeypatch.setattr(inflate_diffvp, "CHUNK", 1000)
    for zeros in (1, 999, 1000, 9000):
        assert inflate(io.BytesIO(pack(content + bytes(zeros))), 3000, codec, "bytes").tobytes() == content
    for behind in (bytes(20_000), bytes(500) + b"x", b"x", bytes(9000) + b"x"):
        with pytest.raises(CTReadError, match="longer"):
            inflate(io.BytesIO(pack(content + behind)), 3000, codec, "bytes")


@pytest.mark.parametrize("codec", ["gzip", "zlib"])
def test_inflate_refuses_truncation_bad_checksums_and_trailing_bytes(codec):
    content = np.random.default_rng(0).bytes(300)
    packed = (gzip if codec == "gzip" else zlib).compress(content)
    assert inflate(io.BytesIO(packed + bytes(9)), len(content), codec, "bytes").tobytes() == content
    for cut in range(1, len(packed)):
        with pytest.raises(CTReadError, match="truncated"):
            inflate(io.BytesIO(packed[:cut]), len(content), codec, "bytes")
    name = b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"n" * 300_000 + b"\0"  # header of a second member
    bad = [packed + bytes(9) + b"other bytes", packed + name]
    for position in range(-8 if codec == "gzip" else -4, 0):  # checksum, and length for gzip
        flipped = bytearray(packed)
        flipped[position] ^= 1
        bad.append(bytes(flipped))
    for damaged in bad:
        with pytest.raises(CTReadError, match="damaged"):
            inflate(io.BytesIO(damaged), len(content), codec, "bytes")
    with pytest.raises(CTReadError, match="damaged|truncated"):  # it could be the first byte of another member
        inflate(io.BytesIO(packed + b"x"), len(content), codec, "bytes")


@pytest.mark.parametrize("chunk", [20, 21, 64, 127, 1000])
@pytest.mark.parametrize("codec", ["gzip", "zlib"])
def test_inflate_handles_thousandfold_compression(monkeypatch, codec, chunk):
    monkeypatch.setattr(inflate_diffvp, "CHUNK", chunk)
    for length in (1, 257, 258, 259, 20_000, 100_003):
        packed = (gzip if codec == "gzip" else zlib).compress(bytes(length))
        assert inflate(io.BytesIO(packed), length, codec, "bytes").tobytes() == bytes(length)
        for cut in range(1, len(packed)):
            with pytest.raises(CTReadError, match="truncated"):
                inflate(io.BytesIO(packed[:cut]), length, codec, "bytes")


def test_memory_still_in_use_is_never_reused():
    """Scans of several sizes; those a caller keeps, whole or as a view of a view, retain their own voxels."""
    rng, kept = np.random.default_rng(0), []
    for turn in range(200):
        content = rng.bytes(int(rng.integers(1, 400_000)))
        result = inflate(io.BytesIO(members(content, 100_000)), len(content), "gzip", "bytes")
        kept.append((np.frombuffer(result, np.uint8)[len(content) // 3 :][::2], content[len(content) // 3 :][::2]))
        del result
        assert all(view.tobytes() == true for view, true in kept), turn
        if rng.random() < 0.6:
            kept.pop(int(rng.integers(len(kept))))


def test_released_scan_memory_is_reused():
    packed = members(bytes(300_000), 300_000)
    first = inflate(io.BytesIO(packed), 300_000, "gzip", "bytes").ctypes.data
    assert inflate(io.BytesIO(packed), 300_000, "gzip", "bytes").ctypes.data == first


def test_thousands_of_gzip_members_are_read():
    """bgzip writes members of up to 64 KB and ends with an empty one."""
    content = np.random.default_rng(0).bytes(2**22)
    packed = b"".join([members(content, 2**10), gzip.compress(b"") * 20000])
    assert inflate(io.BytesIO(packed), len(content), "gzip", "bytes").tobytes() == content


# Every tensor grid maps back to the input grid.


def turned(axis, degrees: float) -> np.ndarray:
    """Rotation matrix by Rodrigues' formula."""
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turn = np.radians(degrees)
    return np.eye(3) + np.sin(turn) * cross + (1 - np.cos(turn)) * cross @ cross


@st.composite
def grids(draw) -> tuple:
    """Shape (x, y, z), affine of the LPS array, and storage orientation."""
    shape = tuple(draw(st.integers(8, 20)) for _ in range(3))
    spacing = [draw(st.floats(0.3, 6)) for _ in range(3)]
    axis = draw(st.tuples(*[st.integers(-3, 3)] * 3).filter(any))
    affine = np.eye(4)
    affine[:3, :3] = turned(axis, draw(st.floats(0, 20))) @ np.diag([-1, -1, 1]) * spacing
    affine[:3, 3] = [draw(st.floats(-600, 600)) for _ in range(3)]
    assume(not np.array_equal(np.abs(affine), np.eye(4)))  # an identity affine counts as unset
    return shape, affine, draw(st.sampled_from(ORIENTATIONS))


def stored(lps: np.ndarray, affine: np.ndarray, codes) -> nib.Nifti1Image:
    change = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    return nib.Nifti1Image(apply_orientation(lps, change), affine @ inv_ornt_aff(change, lps.shape))


@settings(deadline=None, max_examples=80)
@given(grids(), st.data())
def test_marked_voxel_maps_back_to_its_position(grid, data):
    shape, affine, codes = grid
    lps = make_ct(shape)
    mark = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    lps[mark] = 3000
    image = stored(lps, affine, codes)
    volume = read_ct(image)
    assert volume.sha256 == read_ct(lps, SPACING).sha256
    # At least as fine as the scan: in a coarser tensor the voxel could fall between two grid points.
    size = tuple(data.draw(st.integers(n, 2 * n)) for n in shape[::-1])
    tensor, geometry = resample(volume, size, hu_window=(-1000, 3000))
    back = to_input_grid(tensor[0] + 1, geometry)  # 0 marks voxels outside the tensor
    place = np.unravel_index(back.argmax(), back.shape)
    assert image.dataobj[place] == 3000
    peak = np.unravel_index(int(tensor[0].argmax()), size)
    apart = (geometry.tensor_affine @ [*peak, 1] - image.affine @ [*place, 1])[:3]
    assert np.linalg.norm(apart) <= np.linalg.norm(volume.spacing)


@settings(deadline=None, max_examples=40)
@given(grids(), st.tuples(*[st.integers(8, 30)] * 3), st.none() | st.tuples(*[st.floats(0.5, 4)] * 3))
def test_world_coordinates_agree_with_nibabel(grid, size, spacing):
    """Each voxel holds its own index along one axis, so the tensor shows the voxels it was interpolated from."""
    shape, affine, codes = grid
    image = stored(np.zeros(shape, np.float32), affine, codes)
    found = []
    for axis in range(3):
        index = np.broadcast_to(
            np.arange(image.shape[axis]).reshape([-1 if a == axis else 1 for a in range(3)]), image.shape
        )
        volume = read_ct(nib.Nifti1Image(index.astype(np.float32), image.affine), allow_non_hu=True)
        tensor, geometry = resample(volume, size, spacing, crop_foreground=False, hu_window=(-1, 32))
        found.append((tensor[0].numpy() + 1) * 33 / 2 - 1)
    voxels = np.stack(found)
    last = np.array(image.shape).reshape(3, 1, 1, 1) - 1
    inside = ((voxels > 1e-3) & (voxels < last - 1e-3)).all(axis=0)  # the border repeats its values
    world = image.affine[:3, :3] @ voxels[:, inside] + image.affine[:3, 3:]
    indices = np.stack(np.nonzero(inside))
    expected = geometry.tensor_affine[:3, :3] @ indices + geometry.tensor_affine[:3, 3:]
    assert np.abs(world - expected).max(initial=0) < 2e-3


# The command refuses a file before it loads the model.


def test_command_refuses_every_bad_file_before_loading_the_model(results):
    tried = [case for case in CASES if "command" in results[case.name]]
    assert len(tried) >= 150
    for case in tried:
        exit_code, stdout, stderr = results[case.name]["command"]
        assert exit_code == 2 and stdout == "", case.name
        error = stderr.splitlines()[-1]
        assert error.startswith(f"{case.error.__name__}: ") and case.field in error, case.name


def test_command_refuses_without_importing_torch(tmp_path):
    """Runs in a separate process: importing torch and transformers takes seconds, refusing the file does not."""
    (tmp_path / "scan.nii.gz").write_bytes(b"no scan")
    code = (
        "import sys; from diffvp import cli\n"
        "try: cli.app(['report', 'scan.nii.gz'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "2 False False" and "CTReadError" in run.stderr
