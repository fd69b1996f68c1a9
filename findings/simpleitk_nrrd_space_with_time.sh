#!/usr/bin/env bash
# SimpleITK 2.5.7: a 4-D NRRD in "right-anterior-superior-time" is read as if it were left-posterior-superior.
#
# NRRD names the directions of its coordinates: `space: right-anterior-superior` in 3-D, with `-time` for a series of
# volumes. ITK's coordinates are left-posterior-superior, so its NRRD reader converts RAS, but not RAS-time.
#
# Expected: the same origin and directions of the first three axes for a single volume and for a series.
# Seen: origin (10, 20, 30) and axes (1, 1, 1) in RAS are read as (-10, -20, 30) and (-1, -1, 1), which is correct. In
#   RAS-time they are read as (10, 20, 30) and (1, 1, 1): left and right, and front and back, are swapped, without an
#   error or warning. SimpleITK's own 4-D files have no `space`, so other readers cannot know their orientation.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q SimpleITK==2.5.7 numpy==2.4.6
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def read(name, space, dimension):
    directions = [[int(i == j) for j in range(dimension)] for i in range(dimension)]
    lines = [
        "NRRD0004",
        "type: short",
        f"dimension: {dimension}",
        f"space: {space}",
        "sizes:" + " 2" * dimension,
        "space directions: " + " ".join("(" + ",".join(map(str, row)) + ")" for row in directions),
        "endian: little",
        "encoding: raw",
        "space origin: (10,20,30" + ",0" * (dimension - 3) + ")",
    ]
    voxels = np.arange(2**dimension, dtype="<i2").tobytes()
    Path(name).write_bytes("\n".join(lines + ["", ""]).encode() + voxels)
    image = sitk.ReadImage(name)
    axes = np.array(image.GetDirection()).reshape(dimension, dimension).diagonal()[:3]
    print(f"{space}: origin {image.GetOrigin()[:3]}, axes {axes}")
    return image.GetOrigin()[:3], tuple(axes)


lps = read("lps.nrrd", "left-posterior-superior", 3)
ras = read("ras.nrrd", "right-anterior-superior", 3)
lpst = read("lpst.nrrd", "left-posterior-superior-time", 4)
rast = read("rast.nrrd", "right-anterior-superior-time", 4)
sitk.WriteImage(sitk.JoinSeries([sitk.Image(2, 2, 2, sitk.sitkInt16)] * 2), "joined.nrrd")
header = Path("joined.nrrd").read_bytes().split(b"\n\n")[0]
print(f"4-D file of SimpleITK names its space: {b'space: ' in header}")
same = ras == ((-10, -20, 30), (-1, -1, 1)) and rast == lpst == lps == ((10, 20, 30), (1, 1, 1))
sys.exit(0 if same and b"space: " not in header else "the behaviour has changed")
PY
