# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Compare readers on malformed, hostile and legitimate files, with the corpora of `tests/`: diffvp, nibabel, SimpleITK,
MONAI, pydicom, dicom2nifti and dcm2niix.

    pip install itk pynrrd   # required by MONAI for NRRD, MetaImage and DICOM
    pip install --no-deps dicom2nifti python-gdcm
    apt-get install dcm2niix
    python benchmarks/bad_inputs.py --output benchmarks/results

Each case runs in a separate process, forked from one that has imported the reader, with limits on time and address
space. Memory is the peak of the process minus its size after the imports.
"""

import argparse
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.progress import track

from diffvp.metrics.markdown import table_lines
from diffvp.provenance import machine

READERS = ("diffvp", "nibabel", "SimpleITK", "MONAI", "pydicom", "dicom2nifti", "dcm2niix")
FORMATS = {
    "diffvp": {"NIfTI", "NRRD", "MetaImage", "DICOM", "zip", "folder"},
    "nibabel": {"NIfTI"},
    "SimpleITK": {"NIfTI", "NRRD", "MetaImage", "DICOM"},
    "MONAI": {"NIfTI", "NRRD", "MetaImage", "DICOM"},
    "pydicom": {"DICOM"},
    "dicom2nifti": {"DICOM"},
    "dcm2niix": {"DICOM"},
}
OUTCOMES = ("accepted", "other voxels", "typed error", "generic error", "crash", "hang")
PLAIN = "good: .nii.gz"  # all good cases contain the scan of this one
# Valid files that diffvp refuses because they are not a CT on a grid that its model accepts. A general image reader
# may accept them.
SOUND = {
    "NIfTI": (
        "ANALYZE 7.5 pair", "NIfTI pair", "unknown suffix", "folder named .nii.gz", "2-D", "4-D over time", "5-D",
        "three slices", "RGB", "complex", "no form codes", "identity alone", "spacing of 100 mm",
        "spacing of 1 micron",
        "sform sheared by 15 degrees", "in metres", "in microns", "oblique by 45 degrees", "a NaN", "an infinity",
        "all NaN", "constant", "not rescaled, 1024 too high", "not rescaled, 8192 too high", "8-bit",
        "normalised to 0..1", "rescaled twice", "rescaled twice, with metal", "bytes in the other order",
        "scl_slope -1", "scl_slope -1 and air of 0", "two scans in a folder", "two scans in a zip",
        "two of a fifth axis", "a first axis of 1", "template of another size alone",
    ),
    "NRRD": (
        "no space", "space of a scanner", "no directions", "in metres", "4-D", "2-D", "a NaN", "not rescaled",
        "endian wrong", "two frames", "byte skip -1 of gzip", "time in a direction of space",
    ),
    "MetaImage": (
        "no TransformMatrix", "in centimetres", "2-D", "4-D", "two frames", "three channels", "rescale in the header",
        "not rescaled", "a NaN",
    ),
    "DICOM": (
        "gantry tilt", "two series", "rescale applied already", "no rescale", "MR",
        "MONOCHROME1", "RGB", "several frames a file", "secondary capture", "DICOMDIR alone", "MIP alone",
        "MinIP alone", "localizer alone",
    ),
}  # fmt: skip


def reader(name: str, voxels: bool = False):
    """Import a reader and return its function that reads a path.

    Args:
        voxels: read Hounsfield units; otherwise go as far as the reader can, up to the model's tensor.
    """
    if name == "diffvp":
        import diffvp.dicom_diffvp  # noqa: F401 - otherwise imported at the first series
        from diffvp.reading_diffvp import read_ct
        from diffvp.resampling_diffvp import resample

        def read_hu(path: str) -> np.ndarray:
            volume = read_ct(path)
            return volume.array * volume.slope + volume.intercept

        return read_hu if voxels else lambda path: resample(read_ct(path), (32, 64, 64))[0]
    if name in CONVERTERS:
        return CONVERTERS[name]()
    if name == "nibabel":
        import nibabel

        return lambda path: nibabel.load(path).get_fdata()
    if name == "SimpleITK":
        import SimpleITK

        def read(path: str):
            if not os.path.isdir(path):
                return SimpleITK.ReadImage(path)
            series = SimpleITK.ImageSeriesReader()
            series.SetFileNames(series.GetGDCMSeriesFileNames(path))
            return series.Execute()

        return read
    import itk
    from monai.transforms import (
        Compose,
        CropForeground,
        EnsureChannelFirst,
        LoadImage,
        Orientation,
        Resize,
        ScaleIntensityRange,
        Spacing,
    )

    if voxels:
        return LoadImage(image_only=True)
    # ITK loads its parts lazily, which takes seconds.
    for part in ("ImageFileReader", "ImageSeriesReader", "GDCMSeriesFileNames", "NrrdImageIO", "MetaImageIO"):
        getattr(itk, part)
    return Compose(
        [
            LoadImage(image_only=True),
            EnsureChannelFirst(),
            Orientation("LPS", labels=None),
            Spacing((1.5, 1.5, 2.0)),
            ScaleIntensityRange(-1000, 200, -1, 1, clip=True),
            CropForeground(select_fn=lambda x: x > -1, allow_smaller=False),
            Resize((64, 64, 32), mode="trilinear"),
        ]
    )


def by_pydicom():
    """Read as in the documentation: pixels and rescale of every file, in the order of their positions."""
    import pydicom
    from pydicom.fileset import FileSet
    from pydicom.pixels import apply_rescale

    def read(path: str) -> np.ndarray:
        path = Path(path)
        if path.name == "DICOMDIR":
            slices = [instance.load() for instance in FileSet(path)]
        else:
            files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
            slices = []
            for file in files:
                try:
                    slices.append(pydicom.dcmread(file))
                except pydicom.errors.InvalidDicomError:  # folders also contain notes
                    continue
        if len(slices) > 1:
            slices.sort(key=lambda one: one.ImagePositionPatient[2])
        return np.stack([apply_rescale(one.pixel_array, one) for one in slices])

    return read


def by_dicom2nifti():
    import logging

    import dicom2nifti
    import nibabel

    logging.disable()

    def read(path: str) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            output, source = os.path.join(folder, "scan.nii"), path if os.path.isdir(path) else os.path.dirname(path)
            dicom2nifti.dicom_series_to_nifti(source, output, reorient_nifti=False)
            return nibabel.load(output).get_fdata()

    return read


def by_dcm2niix():
    import nibabel

    def read(path: str) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.dirname(path) if os.path.basename(path) == "DICOMDIR" else path
            command = ["dcm2niix", "-z", "n", "-b", "n", "-f", "%s", "-o", folder, source]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            # It converts all series; take the first by name.
            return nibabel.load(sorted(Path(folder).glob("*.nii"))[0]).get_fdata()

    return read


CONVERTERS = {"pydicom": by_pydicom, "dicom2nifti": by_dicom2nifti, "dcm2niix": by_dcm2niix}


def version_of(name: str) -> str:
    if name != "dcm2niix":
        return version(name)
    lines = subprocess.run(["dcm2niix", "--version"], capture_output=True, text=True).stdout.split()
    return lines[-1].removeprefix("v")


def resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def attempt(read, package: str, path: str, check: bool, gigabytes: int, limit: float) -> dict:
    """Read a file in a forked process; return outcome, seconds and memory."""
    receive, send = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if not child:
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(quiet, descriptor)
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        result = {"before_mb": resident_mb(), "outcome": "accepted", "error": ""}
        try:
            voxels = read(path)
            if check:
                if package == "SimpleITK":
                    voxels = sys.modules[package].GetArrayFromImage(voxels)
                voxels = np.asarray(voxels)
                result["sum"], result["size"] = float(voxels.sum(dtype=np.float64)), voxels.size
        except BaseException as error:  # any exception is a result
            own = type(error).__module__.split(".")[0] == package
            result |= {"outcome": "typed error" if own else "generic error", "error": type(error).__name__}
        os.write(send, json.dumps(result).encode())
        os._exit(0)
    os.close(send)
    ready = select.select([receive], [], [], limit)[0]
    seconds = time.perf_counter() - start
    content = os.read(receive, 2**16) if ready else b""
    os.close(receive)
    if not content:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    if content:
        result = json.loads(content)
    elif not ready:
        result = {"before_mb": resident_mb(), "outcome": "hang", "error": f"killed after {limit:.0f} s"}
    else:
        result = {"before_mb": resident_mb(), "outcome": "crash", "error": f"exit {os.waitstatus_to_exitcode(status)}"}
    before = result.pop("before_mb")
    return result | {"seconds": seconds, "mb": max(0.0, usage.ru_maxrss / 1024 - before)}


def cases(folder: Path) -> list[dict]:
    """Write the cases that are files; return their descriptions and paths."""
    from diffvp.tests.bad_inputs import CASES

    written = []
    for case in CASES:
        if case.format == "object":
            continue
        place = folder / f"{len(written):03d}"
        place.mkdir()
        path = str(case.make(place))
        kind, _, title = case.name.partition(": ")
        group = "good" if case.error is None else "no CT" if title in SOUND[kind] else "damaged"
        form = "zip" if path.endswith(".zip") else case.format
        written.append({"name": case.name, "format": form, "group": group, "path": path})
    return written


def legitimate(folder: Path) -> list[dict]:
    """Write the legitimate files; return their descriptions, paths and contents."""
    from diffvp.tests.ct_samples import make_ct
    from diffvp.tests.good_inputs import GOOD
    from diffvp.tests.good_volumes import GOOD as VOLUMES

    written = []
    volumes = [(name, lambda folder, make=make: (Path(make(folder)), make_ct())) for name, make in VOLUMES]
    for number, (name, write) in enumerate(GOOD + volumes):
        place = folder / f"good{number:03d}"
        place.mkdir()
        path, hu = write(place)
        form = "zip" if path.suffix == ".zip" else re.split("[:, ]", name)[0]
        row = {"name": name, "format": form, "group": "legitimate", "path": str(path)}
        written.append(row | {"sum": float(hu.sum(dtype=np.float64)), "size": hu.size})
    return written


def page(results: dict) -> str:
    rows, readers = results["cases"], results["readers"]
    lines = [
        "# Malformed and hostile files", "",
        f"`python benchmarks/bad_inputs.py` on {results['machine']}; {results['gigabytes']} GB of address space and",
        f"{results['limit']:.0f} s for each case. {', '.join(f'{name} {readers[name]}' for name in readers)}.",
        "A dash: not a format of this reader, so not counted. A typed error is of a class of the reader's own; any",
        "other exception is generic. Other voxels: accepted, but not those of the file that was asked for. The",
        "generators are `tests/bad_inputs.py` and `tests/good_inputs.py`.", "",
    ]  # fmt: skip
    titles = {
        "damaged": "Damaged, incomplete, ambiguous, contradictory or hostile files",
        "no CT": "Sound files that are no CT on a grid the model can take (a general reader may well accept them)",
        "good": "Good files (here, accepting is right)",
    }
    for group, title in titles.items():
        table = []
        for name in readers:
            found = [row["results"][name] for row in rows if row["group"] == group and name in row.get("results", {})]
            counts = Counter(one["outcome"] for one in found)
            numbers = [str(counts[outcome]) for outcome in OUTCOMES]
            worst = [f"{max(one['seconds'] for one in found):.2f}", f"{max(one['mb'] for one in found):.0f}"]
            table.append([name, str(len(found)), *numbers, *worst])
        lines += [f"## {title}", ""]
        lines += [*table_lines(["reader", "cases", *OUTCOMES, "longest s", "most MB"], table), ""]
    lines += ["## Legitimate files wrongly refused, or read wrong", ""]
    table = []
    for name in readers:
        found = [row["results"][name]["outcome"] for row in rows
                 if row["group"] == "legitimate" and name in row.get("results", {})]  # fmt: skip
        counts = Counter("refused" if one not in ("accepted", "other voxels") else one for one in found)
        numbers = (len(found), counts["refused"], counts["other voxels"], counts["accepted"])
        table.append([name, *map(str, numbers)] if found else [name, "0", "-", "-", "-"])
    lines += [*table_lines(["reader", "files", "refused", "other voxels", "read"], table), ""]
    lines += ["## Case by case", ""]
    table = []
    for row in rows:
        cells = []
        for name in readers:
            one = row.get("results", {}).get(name)
            if one is None:
                cells.append("-")
                continue
            slow = f", {one['seconds']:.1f} s" if one["seconds"] > 2 else ""
            hungry = f", {one['mb']:.0f} MB" if one["mb"] > 600 else ""
            text = one["error"] or "accepted"
            wrong = text == "other voxels" or (text == "accepted") == (row["group"] == "damaged")
            wrong = wrong if row["group"] in ("damaged", "legitimate") else text == "other voxels"
            cells.append((f"**{text}**" if wrong else text) + slow + hungry)
        table.append([row["name"], *cells])
    return "\n".join([*lines, *table_lines(["case", *readers], table), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--limit", type=float, default=60, help="time limit for a case, in seconds")
    parser.add_argument("--gigabytes", type=int, default=16, help="limit of the address space for a case, in GB")
    parser.add_argument("--reader", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        name, manifest = options.reader
        package = {"MONAI": "monai"}.get(name, name)
        readers = {True: reader(name, voxels=True), False: reader(name)}
        found = {}
        for row in track(json.loads(Path(manifest).read_text()), name):
            if row["format"] in FORMATS[name]:
                group, limits = row["group"], (options.gigabytes, options.limit)
                read = readers[group == "legitimate"]
                found[row["name"]] = attempt(read, package, row["path"], group in ("good", "legitimate"), *limits)
        Path(manifest).with_name(f"{name}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = cases(folder) + legitimate(folder)
        (folder / "cases.json").write_text(json.dumps(rows))
        for name in READERS:
            command = [sys.executable, __file__, "--reader", name, str(folder / "cases.json")]
            command += ["--limit", str(options.limit), "--gigabytes", str(options.gigabytes)]
            subprocess.run(command, check=True)
            found = json.loads((folder / f"{name}.json").read_text())
            for row in rows:
                if row["name"] in found:
                    one = row.setdefault("results", {})[name] = found[row["name"]]
                    # The sum does not depend on the order of voxels; resampling an oblique grid changes it by 9 %.
                    if row["group"] == "legitimate" and "sum" in one:
                        other = one["size"] != row["size"] or abs(one["sum"] / row["sum"] - 1) > 1e-3
                    else:
                        other = "sum" in one and PLAIN in found and abs(one["sum"] / found[PLAIN]["sum"] - 1) > 0.2
                    if other:
                        one |= {"outcome": "other voxels", "error": "other voxels"}
    for row in rows:
        del row["path"]
    results = {
        "machine": machine(),
        "limit": options.limit, "gigabytes": options.gigabytes,
        "readers": {name: version_of(name) for name in READERS},
        "cases": rows,
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bad_inputs.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "bad_inputs.md").write_text(page(results), encoding="utf-8")
    print(page(results).partition("## Case by case")[0])


if __name__ == "__main__":
    main()
