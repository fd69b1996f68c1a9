# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Time and memory from a CT file to the model's tensor, against MONAI, TorchIO and SimpleITK.

    pip install torchio imagecodecs
    python benchmarks/preprocess.py --rounds 5 --output benchmarks/results

All pipelines convert the same file to 64 x 256 x 256 voxels in [-1, 1]. They alternate in one process; a ratio is the
median over rounds of (time / our time in the same round). Peak memory is measured in a separate process. Single runs
vary twofold on a shared machine: only ratios are meaningful.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from rich.progress import track

from diffvp.metrics.markdown import table_lines
from diffvp.provenance import machine
from diffvp.reading_diffvp import read_ct
from diffvp.resampling_diffvp import resample

STREAMED = 24  # scans in a stream, for the scaling over threads
SIZE = (64, 256, 256)  # depth, height, width
WINDOW = (-1000.0, 200.0)
# name: voxels x, y, z; mm; standard deviation of the noise in HU, which determines how well the file compresses
SHAPES = {
    "512 x 512 x 300": ((512, 512, 300), (0.7, 0.7, 1.0), 12),
    "256 x 256 x 200": ((256, 256, 200), (1.4, 1.4, 1.5), 12),
    "512 x 512 x 100, low noise": ((512, 512, 100), (0.7, 0.7, 3.0), 4),
    "512 x 512 x 600, high noise": ((512, 512, 600), (0.7, 0.7, 0.5), 30),
}
MAIN = "512 x 512 x 300"
DICOM = "DICOM, 512 x 512 x 120"
OURS = "diffvp"


def scan(shape, noise: float, seed: int = 0) -> np.ndarray:
    """Make HU [x, y, z] in LPS order: a noisy body with two lungs, in noisy air."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape[:2]], indexing="ij")
    body = (x / 0.85) ** 2 + (y / 0.65) ** 2 < 1
    lungs = ((np.abs(x) - 0.4) / 0.28) ** 2 + (y / 0.45) ** 2 < 1
    plane = np.where(lungs, -850, np.where(body, 40, -1000))
    array = np.empty(shape, np.int16, order="F")
    for z in range(shape[2]):
        array[:, :, z] = np.clip(plane + rng.normal(0, noise, plane.shape), -1024, 3071)
    return array


def write_nifti(path: Path, array: np.ndarray, spacing) -> None:
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = (180.0, 175.0, -150.0)
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nib.save(image, path)


def write_dicom(folder: Path, array: np.ndarray, spacing) -> None:
    import SimpleITK as sitk

    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()  # otherwise each slice becomes a separate series
    for z in range(array.shape[2]):
        image = sitk.GetImageFromArray(array[:, :, z].T)
        image.SetSpacing(spacing[:2])
        for tag, value in {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0060": "CT", "0020|000e": "1.2.3.4", "0020|000d": "1.2.3",
            "0020|0032": f"-180\\-175\\{-150 + z * spacing[2]}", "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(z + 1), "0028|1052": "0", "0028|1053": "1", "0018|0050": str(spacing[2]),
        }.items():  # fmt: skip
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{z:04d}.dcm"))
        writer.Execute(image)


def write_compressed(folder: Path, source: Path, kind: str) -> None:
    """Compress the slices of a folder losslessly: JPEG 2000 with SimpleITK, JPEG-LS with imagecodecs."""
    import pydicom
    import SimpleITK as sitk
    from pydicom.encaps import encapsulate

    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetUseCompression(True)
    writer.SetImageIO("GDCMImageIO")
    for path in sorted(source.iterdir()):
        if kind == "JPEG 2000":
            whole = sitk.ReadImage(str(path))
            image = whole[:, :, 0]
            for key in whole.GetMetaDataKeys():
                image.SetMetaData(key, whole.GetMetaData(key))
            writer.SetFileName(str(folder / path.name))
            writer.Execute(image)
            continue
        import imagecodecs

        one = pydicom.dcmread(path)
        pixels = (one.pixel_array.astype(np.int32) + 1024).astype(np.uint16)
        one.PixelRepresentation, one.RescaleIntercept = 0, -1024
        one.PixelData = encapsulate([imagecodecs.jpegls_encode(pixels)])
        one["PixelData"].VR, one["PixelData"].is_undefined_length = "OB", True
        one.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.80"
        pydicom.dcmwrite(folder / path.name, one, implicit_vr=False, little_endian=True)


def hounsfield(path) -> np.ndarray:
    """Read a DICOM folder or file in HU, without resampling."""
    volume = read_ct(path)
    assert (volume.slope, volume.intercept) == (1, 0)
    return volume.array


def hounsfield_simpleitk(path) -> np.ndarray:
    import SimpleITK as sitk

    if not Path(path).is_dir():
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    return sitk.GetArrayFromImage(sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))))


def ours(path, antialias: bool = False, digest: bool = False) -> torch.Tensor:
    """Preprocess like `DiffVPImageProcessor`, without its import of transformers (150 MB)."""
    return resample(read_ct(path), SIZE, antialias=antialias, digest=digest)[0]


def ours_antialiased(path) -> torch.Tensor:
    return ours(path, antialias=True)


def ours_with_digest(path) -> torch.Tensor:
    return ours(path, digest=True)


def monai(path, steps) -> torch.Tensor:
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Resize

    reader = "PydicomReader" if Path(path).is_dir() else None
    load = [LoadImage(image_only=True, reader=reader), EnsureChannelFirst()]
    tensor = Compose(load + steps + [Resize(SIZE[::-1], mode="trilinear")])(path)
    return tensor.as_tensor().permute(0, 3, 2, 1)


def monai_standard(path) -> torch.Tensor:
    from monai.transforms import CropForeground, Orientation, ScaleIntensityRange, Spacing

    return monai(path, [
        Orientation("LPS", labels=None), Spacing((1, 1, 3), mode="bilinear"),
        ScaleIntensityRange(*WINDOW, -1, 1, clip=True),
        CropForeground(select_fn=lambda x: x > -1, allow_smaller=False),
    ])  # fmt: skip


def monai_single(path) -> torch.Tensor:
    """Preprocess with one interpolation, which ours equals: the standard chain without Spacing."""
    from monai.transforms import CropForeground, Orientation, ScaleIntensityRange

    return monai(path, [
        Orientation("LPS", labels=None), ScaleIntensityRange(*WINDOW, -1, 1, clip=True),
        CropForeground(select_fn=lambda x: x > -1, allow_smaller=False),
    ])  # fmt: skip


def monai_minimal(path) -> torch.Tensor:
    from monai.transforms import Orientation, ScaleIntensityRange

    return monai(path, [Orientation("LPS", labels=None), ScaleIntensityRange(*WINDOW, -1, 1, clip=True)])


def torchio(path) -> torch.Tensor:
    import torchio as tio

    transform = tio.Compose([
        tio.ToCanonical(), tio.Resample((1, 1, 3)), tio.Clamp(*WINDOW),
        tio.RescaleIntensity((-1, 1), in_min_max=WINDOW), tio.Resize(SIZE[::-1]),
    ])  # fmt: skip
    return transform(tio.ScalarImage(path)).data


def simpleitk(path) -> torch.Tensor:
    """Resample once, linearly, to the grid of the tensor."""
    import SimpleITK as sitk

    if Path(path).is_dir():
        image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)))
    else:
        image = sitk.ReadImage(str(path))
    scale = [n / m for n, m in zip(image.GetSize(), SIZE[::-1], strict=True)]
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(SIZE[::-1])
    resampler.SetOutputDirection(image.GetDirection())
    resampler.SetOutputSpacing([s * k for s, k in zip(image.GetSpacing(), scale, strict=True)])
    resampler.SetOutputOrigin(image.TransformContinuousIndexToPhysicalPoint([k / 2 - 0.5 for k in scale]))
    resampler.SetDefaultPixelValue(-1000)
    resampler.SetOutputPixelType(sitk.sitkFloat32)
    array = sitk.GetArrayFromImage(resampler.Execute(image))
    return torch.from_numpy(np.clip(array, *WINDOW)).sub_(WINDOW[0]).mul_(2 / (WINDOW[1] - WINDOW[0])).sub_(1)[None]


PIPELINES = {
    OURS: ours,
    "diffvp, antialias": ours_antialiased,
    "diffvp, with content digest": ours_with_digest,
    "MONAI standard": monai_standard,
    "MONAI minimal": monai_minimal,
    "TorchIO": torchio,
    "SimpleITK, one resampling": simpleitk,
}
READERS = {OURS: hounsfield, "SimpleITK": hounsfield_simpleitk}
NOT_DICOM = {"TorchIO"}  # reads a folder through ITK, like SimpleITK: nothing else to time


def interleaved(path: Path, names: list[str], rounds: int, pipelines=PIPELINES) -> dict[str, dict[str, float]]:
    times = {name: [] for name in names}
    for name in names:
        pipelines[name](path)  # imports, page cache
    for turn in track(range(rounds), path.name):
        # Random order: after a pipeline that frees much memory, the next one pays for the page faults.
        for name in np.random.default_rng(turn).permutation(names).tolist():
            start = time.perf_counter()
            pipelines[name](path)
            times[name].append(time.perf_counter() - start)
    return {
        name: {
            "median_s": statistics.median(values),
            "ratio": statistics.median(value / own for value, own in zip(values, times[OURS], strict=True)),
        }
        for name, values in times.items()
    }


def peak_memory(path: Path, name: str) -> float:
    """Return the peak memory (MB) of a separate process, imports included."""
    command = [sys.executable, __file__, "--peak", name, str(path)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def threads(path: Path, rounds: int) -> float:
    """Return the throughput of two threads over that of one.

    The stream is long, so that the first scan of each thread, for which it takes memory from the system, hardly
    counts.
    """
    from diffvp.processing_diffvp import DiffVPImageProcessor

    processor = DiffVPImageProcessor()
    ratios = []
    for _ in range(rounds):
        seconds = {}
        for workers in (1, 2):
            start = time.perf_counter()
            for features in processor.stream([path] * STREAMED, workers=workers):
                assert "ct" in features
            seconds[workers] = time.perf_counter() - start
        ratios.append(seconds[1] / seconds[2])
    return statistics.median(ratios)


def readers(folder: Path, rounds: int) -> dict[str, dict]:
    """Time the reading of DICOM: uncompressed, JPEG 2000, JPEG-LS, and enhanced CT."""
    from diffvp.tests.ct_samples import write_enhanced

    array = scan((512, 512, 300), 12)
    write_dicom(folder / "whole", array, (0.7, 0.7, 1.0))
    write_dicom(folder / "part", array[:, :, :60], (0.7, 0.7, 1.0))
    write_enhanced(folder / "enhanced.dcm", array)
    paths = {"uncompressed, 300 slices": folder / "whole", "enhanced CT, 300 frames": folder / "enhanced.dcm"}
    for kind in ("JPEG 2000", "JPEG-LS"):
        paths[f"{kind}, 60 slices"] = folder / kind
        write_compressed(folder / kind, folder / "part", kind)
    return {
        f"Reading DICOM: {name}": interleaved(path, list(READERS), rounds, READERS) for name, path in paths.items()
    }


def exponent(folder: Path, rounds: int) -> dict:
    """Fit the slope of log time against log voxels, from 64 MB to 512 MB of int16."""
    paths = {}
    for slices in (122, 244, 488, 976):
        paths[slices] = folder / f"slices_{slices}.nii.gz"
        write_nifti(paths[slices], scan((512, 512, slices), 12), (0.7, 0.7, 0.6))
    times = {slices: [] for slices in paths}
    for _ in track(range(rounds), "64 to 512 MB"):
        for slices, path in paths.items():
            start = time.perf_counter()
            ours(path)
            times[slices].append(time.perf_counter() - start)
    medians = {slices: statistics.median(values) for slices, values in times.items()}
    slope = np.polyfit(np.log(list(medians)), np.log(list(medians.values())), 1)[0]
    return {
        "median_s": {f"{slices * 512 * 512 * 2 / 1e6:.0f} MB": t for slices, t in medians.items()},
        "exponent": slope,
    }


def resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak_resident() -> float:
    """Return the peak memory (MB) of this process. `ru_maxrss` would include that of its parent."""
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def drift(path: Path, volumes: int) -> float:
    """Return the growth (MB) of the process over `volumes` scans, from a linear fit to its sizes.

    Single sizes, or medians of fifty, depend on what the allocator happens to hold: tensors of 17 MB come and go.
    """
    from diffvp.processing_diffvp import DiffVPImageProcessor

    processor = DiffVPImageProcessor()
    sizes = []
    for features in track(processor.stream([path] * volumes, workers=2), "Drift", total=volumes):
        assert "ct" in features
        sizes.append(resident())
    settled = sizes[50:]
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0] * volumes)


def page(results: dict) -> str:
    lines = [
        "# Preprocessing: from a CT file to the model's tensor", "",
        f"`python benchmarks/preprocess.py --rounds {results['rounds']}` on {results['machine']}. Ratios are medians",
        "over the interleaved rounds, against diffvp in the same round.", "",
    ]  # fmt: skip
    for name, rows in results["shapes"].items():
        table = []
        for pipeline, row in rows.items():
            memory = f"{row['peak_mb']:.0f}" if "peak_mb" in row else "-"
            table.append([pipeline, f"{row['median_s']:.3f}", f"{row['ratio']:.2f}", memory])
        lines += [f"## {name}", "", *table_lines(["pipeline", "median s", "times diffvp", "peak MB"], table), ""]
    lines += [
        "- Peak memory is of reading and resampling with torch; `DiffVPImageProcessor` imports transformers, too.",
        f"- Largest difference to MONAI's chain with one interpolation: {results['max_difference']:.2g}.",
        f"- Two threads over one: {results['threads']:.2f}.",
        "- Seconds by size: "
        + ", ".join(f"{size} {seconds:.2f}" for size, seconds in results["scaling"]["median_s"].items())
        + f"; exponent {results['scaling']['exponent']:.3f}.",
        f"- Growth of the process over {results['volumes']} volumes: {results['drift_mb']:.1f} MB.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--volumes", type=int, default=1000, help="scans for the measurement of memory growth")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        PIPELINES[options.peak[0]](options.peak[1])
        print(peak_resident())
        return
    results = {
        "rounds": options.rounds, "volumes": options.volumes,
        "machine": machine(), "shapes": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, (shape, spacing, noise) in SHAPES.items():
            path = folder / f"{name.replace(' ', '').replace(',', '_')}.nii.gz"
            write_nifti(path, scan(shape, noise), spacing)
            rows = interleaved(path, list(PIPELINES), options.rounds)
            if name == MAIN:
                for pipeline in PIPELINES:
                    rows[pipeline]["peak_mb"] = peak_memory(path, pipeline)
                results["max_difference"] = float((ours(path) - monai_single(path)).abs().max())
                results["threads"] = threads(path, options.rounds)
            results["shapes"][name] = rows
        path = folder / "series"
        write_dicom(path, scan((512, 512, 120), 12), (0.7, 0.7, 2.5))
        results["shapes"][DICOM] = interleaved(path, [n for n in PIPELINES if n not in NOT_DICOM], options.rounds)
        results["shapes"] |= readers(folder, options.rounds)
        results["scaling"] = exponent(folder, options.rounds)
        small = folder / "small.nii.gz"
        write_nifti(small, scan((256, 256, 100), 12), (1.4, 1.4, 3.0))
        read_ct(small)
        results["drift_mb"] = drift(small, options.volumes)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "preprocess.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / "preprocess.md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
