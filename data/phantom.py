# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The phantom cohort: the definition of synthetic patients, and the function that renders their CT scans.

There is no licence-free labelled chest CT, so the project renders its own. `sample_patient` determines everything that
a report may state (anatomy, findings and their attributes) from (seed, split, index) only. `on_scanner` moves the
patient to another scanner, and `render_patient` converts it to Hounsfield units. Shapes are defined in
`phantom_geometry.py`; normal anatomy is painted in `phantom_anatomy.py`, findings in `phantom_findings.py`, and the
text is written in `phantom_report.py`. Images and reports are synthetic and derive from no real patient.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .phantom_anatomy import paint_anatomy, region_masks
from .phantom_findings import paint_findings
from .phantom_geometry import LOBES, Canvas, Geometry

# Finding statistics of CT-RATE's training split, one reconstruction per scan (24,128 volumes ending in _1.nii.gz of
# train_predicted_labels.csv). A small Bayesian network fitted to the scans with at least one finding: for each label
# the intercept and the log-odds weights of up to three labels above it. Aggregate statistics only. Sampled marginals
# are within 0.015 of the data's, and the mean number of findings is 3.96 (data: 3.84).
FINDING_NETWORK: dict[str, tuple[float, dict[str, float]]] = {
    "Arterial wall calcification": (-0.79, {}),
    "Coronary artery wall calcification": (-2.79, {"Arterial wall calcification": 3.96}),
    "Cardiomegaly": (
        -3.00,
        {"Arterial wall calcification": 1.31, "Coronary artery wall calcification": 0.88},
    ),
    "Emphysema": (-1.72, {"Arterial wall calcification": 1.31, "Cardiomegaly": -0.47}),
    "Hiatal hernia": (-2.06, {"Arterial wall calcification": 1.02}),
    "Pleural effusion": (-2.44, {"Cardiomegaly": 1.42, "Arterial wall calcification": 0.73}),
    "Pericardial effusion": (-3.09, {"Pleural effusion": 1.91, "Cardiomegaly": 0.75}),
    "Medical material": (
        -2.42,
        {"Pleural effusion": 1.31, "Coronary artery wall calcification": 0.61, "Cardiomegaly": 0.51},
    ),
    "Atelectasis": (-1.44, {"Pleural effusion": 1.36, "Arterial wall calcification": 0.66, "Emphysema": 0.38}),
    "Interlobular septal thickening": (
        -2.99,
        {"Pleural effusion": 1.42, "Cardiomegaly": 0.77, "Arterial wall calcification": 0.47},
    ),
    "Lung opacity": (-0.36, {"Interlobular septal thickening": 1.33, "Emphysema": -0.52}),
    "Consolidation": (-2.44, {"Lung opacity": 1.58, "Pleural effusion": 1.18}),
    "Lymphadenopathy": (
        -1.42,
        {"Arterial wall calcification": 0.77, "Pleural effusion": 0.78, "Consolidation": 0.52},
    ),
    "Lung nodule": (0.41, {"Lung opacity": -0.79, "Consolidation": -0.69, "Emphysema": 0.45}),
    "Pulmonary fibrotic sequela": (-0.81, {"Emphysema": 0.79, "Atelectasis": -0.45, "Consolidation": -0.51}),
    "Bronchiectasis": (-2.48, {"Emphysema": 0.75, "Pulmonary fibrotic sequela": 0.59}),
    "Peribronchial thickening": (
        -2.86,
        {"Bronchiectasis": 1.95, "Arterial wall calcification": 0.78, "Pleural effusion": 0.83},
    ),
    "Mosaic attenuation pattern": (
        -2.90,
        {"Cardiomegaly": 1.32, "Arterial wall calcification": 1.01, "Emphysema": -1.15},
    ),
}
# CT-RATE: 11.3 % of the scans carry none of the 18 labels, and RadGenome-ChestCT calls 8 to 9 % "No findings". The
# phantom has no disease outside the 18 labels, so the second number is the share of its normal patients.
NORMAL_SHARE = 0.09
# Increased with every change of the rendered bytes, so that a cohort never mixes two renderings.
RENDERING = 2

SEVERITIES = ("mild", "moderate", "severe")
SCANNERS = ("a", "b")


@dataclass(frozen=True)
class Finding:
    """One of the 18 labels with the attributes that both the image and the report show.

    `attributes` holds plain values (str, int, float or lists of them): lengths in mm end in `_mm`, lobes are names
    from `LOBES`, severity is one of `SEVERITIES`.
    """

    label: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Anatomy:
    """Body shape and pose of one patient; lengths in mm, angles in radians, densities in HU."""

    half_width: float  # of the torso, skin to skin
    half_depth: float
    lung_height: float  # costophrenic angle to apex
    fat: float  # subcutaneous fat thickness
    wall: float  # muscle and ribs between fat and pleura
    dome_right: float  # height of the diaphragm domes above the costophrenic angle
    dome_left: float
    below: float  # how far the scan reaches below the costophrenic angle and above the lung apex
    above: float
    kyphosis: float  # mm of bowing of the whole trunk
    roll: float  # rotations about z, x, y
    pitch: float
    yaw: float
    shift_x: float
    shift_y: float
    rib_spacing: float
    rib_slope: float
    rib_phase: float
    cardiothoracic_ratio: float
    heart_tilt: float
    aorta_radius: float
    arch_height: float  # fraction of lung_height
    carina_height: float
    trachea_radius: float
    lung_hu: float
    lung_gradient: float  # HU from front to back
    blood_hu: float
    liver_hu: float
    bone_hu: float
    fat_hu: float
    muscle_hu: float
    breast: float  # breast radius, 0 in males
    gland: float  # glandular share of the breast
    noise: float  # HU, standard deviation at 3 mm slices


@dataclass(frozen=True)
class PhantomPatient:
    """Full description of a synthetic patient before rendering."""

    seed: int
    index: int
    split: str
    sex: str
    age: int
    phase: str
    kernel: str
    slice_mm: float
    fov_mm: float
    anatomy: Anatomy
    findings: tuple[Finding, ...]
    scanner: str = "a"
    air_hu: float = -1000.0  # values that the scanner measures for air and water inside a patient
    water_hu: float = 0.0
    size: float = 1.0  # scale of the whole body
    visit: str = ""  # distinguishes the noise of several scans of a patient

    @property
    def name(self) -> str:
        """Name of the volume as in CT-RATE: split, patient (from 1), scan letter, reconstruction.

        The scan letter distinguishes the scans of a patient, and therefore the two scanners.
        """
        return f"{self.split}_{self.index + 1}_{self.scanner}_1"

    @property
    def labels(self) -> dict[str, int]:
        present = {finding.label for finding in self.findings}
        return {label: int(label in present) for label in FINDING_NETWORK}

    def finding(self, label: str) -> Finding | None:
        return next((finding for finding in self.findings if finding.label == label), None)

    def rng(self, stream: str) -> np.random.Generator:
        """Return a generator that depends only on (seed, split, index, stream), so that structures are independent."""
        return _generator(self.seed, self.split, self.index, stream)

    def to_dict(self) -> dict[str, Any]:
        record = {"name": self.name, **dataclasses.asdict(self), "findings": [vars(f) for f in self.findings]}
        if self.scanner == "a":  # keeps the bytes of older cohorts, all of scanner "a"
            for key in ("scanner", "air_hu", "water_hu"):
                del record[key]
        if not self.visit:  # likewise
            for key in ("size", "visit"):
                del record[key]
        return record


@dataclass
class PhantomScan:
    """A rendered scan in LPS axis order: x right to left, y anterior to posterior, z inferior to superior.

    `hu` is int16 (x, y, z); `spacing` in mm (x, y, z); `affine` maps voxel indices to RAS+ mm, as nibabel expects;
    `regions` are bool masks by name; `lesions` are bool masks by label, one for each finding of the patient; `lobes`
    is uint8, 1 + the index into `LOBES` inside the lungs as they were before any finding, 0 outside.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    regions: dict[str, np.ndarray]
    lesions: dict[str, np.ndarray]
    lobes: np.ndarray


def _generator(seed: int, split: str, index: int, stream: str) -> np.random.Generator:
    key = [seed, zlib.crc32(split.encode()), index, zlib.crc32(stream.encode())]
    return np.random.default_rng(np.random.SeedSequence(key))


def _severity(rng, weights=(0.45, 0.35, 0.2)) -> str:
    return str(rng.choice(SEVERITIES, p=weights))


def _some_of(rng, names, weights, at_most) -> list[str]:
    """Draw one to `at_most` of the names, keeping their order."""
    count = int(rng.integers(1, at_most + 1))
    picked = set(rng.choice(len(names), size=count, replace=False, p=np.asarray(weights) / np.sum(weights)).tolist())
    return [names[i] for i in sorted(picked)]


def _millimetres(rng, low, high) -> int:
    """Draw a log-uniform size, as usual for lesions, in whole mm, as in reports."""
    return int(round(math.exp(rng.uniform(math.log(low), math.log(high)))))


def sample_attributes(label: str, rng: np.random.Generator) -> dict[str, Any]:
    """Draw the attributes of one finding. Every value drawn here is visible in the image."""
    if label == "Medical material":
        kinds = ("sternal wires", "port", "pacemaker", "central venous catheter")
        kind = str(rng.choice(kinds, p=(0.4, 0.2, 0.2, 0.2)))
        side = {"port": "right", "pacemaker": "left", "central venous catheter": "right"}.get(kind)
        return {"kind": kind} | ({"side": side} if side else {})
    if label == "Arterial wall calcification":
        segments = [["aortic arch"], ["descending aorta"], ["aortic arch", "descending aorta"]]
        return {"severity": _severity(rng), "segments": segments[int(rng.choice(3, p=(0.3, 0.2, 0.5)))]}
    if label == "Cardiomegaly":
        severity = _severity(rng, (0.5, 0.3, 0.2))
        low = {"mild": 0.54, "moderate": 0.58, "severe": 0.62}[severity]
        return {"severity": severity, "cardiothoracic_ratio": round(float(rng.uniform(low, low + 0.03)), 3)}
    if label == "Pericardial effusion":
        return {"thickness_mm": _millimetres(rng, 8, 24)}
    if label == "Coronary artery wall calcification":
        severity = _severity(rng)
        vessels = ["LAD", "RCA", "LCx"][: {"mild": 1, "moderate": 2, "severe": 3}[severity]]
        return {"severity": severity, "vessels": vessels}
    if label == "Hiatal hernia":
        return {"size_mm": _millimetres(rng, 30, 75)}
    if label == "Lymphadenopathy":
        stations = ("right paratracheal", "prevascular", "subcarinal", "right hilar", "left hilar")
        chosen = _some_of(rng, stations, (0.3, 0.2, 0.2, 0.15, 0.15), 3)
        return {"stations": chosen, "short_axis_mm": _millimetres(rng, 12, 26)}
    if label == "Emphysema":
        return {"severity": _severity(rng), "side": str(rng.choice(("both", "right", "left"), p=(0.76, 0.12, 0.12)))}
    if label == "Atelectasis":
        names = ("right middle lobe", "right lower lobe", "left lower lobe")
        lobes = _some_of(rng, names, (0.2, 0.4, 0.4), 2)
        return {"kind": str(rng.choice(("linear", "subsegmental"), p=(0.65, 0.35))), "lobes": lobes}
    if label == "Lung nodule":
        lobe = str(rng.choice(LOBES, p=(0.26, 0.08, 0.26, 0.2, 0.2)))
        size = int(rng.integers(6, 17 if "middle" in lobe else 29))
        return {
            "count": int(rng.choice((1, 2, 3, 4, 5, 6), p=(0.4, 0.15, 0.15, 0.1, 0.1, 0.1))),
            "lobe": lobe,
            "size_mm": size,
        }
    if label == "Lung opacity":
        return {"lobes": _some_of(rng, LOBES, (0.22, 0.1, 0.26, 0.2, 0.22), 3), "severity": _severity(rng)}
    if label == "Pulmonary fibrotic sequela":
        side = str(rng.choice(("both", "right", "left"), p=(0.4, 0.35, 0.25)))
        return {"zone": str(rng.choice(("apex", "base"), p=(0.7, 0.3))), "side": side}
    if label == "Pleural effusion":
        side = str(rng.choice(("both", "right", "left"), p=(0.45, 0.3, 0.25)))
        return {"side": side, "thickness_mm": _millimetres(rng, 10, 60)}
    if label == "Mosaic attenuation pattern":
        return {"severity": _severity(rng, (0.4, 0.4, 0.2))}
    if label == "Peribronchial thickening":
        return {
            "severity": _severity(rng, (0.4, 0.4, 0.2)),
            "side": str(rng.choice(("both", "right", "left"), p=(0.7, 0.15, 0.15))),
        }
    if label == "Consolidation":
        lobe = str(rng.choice(LOBES, p=(0.2, 0.1, 0.3, 0.15, 0.25)))
        return {"lobe": lobe, "size_mm": _millimetres(rng, 28, 45 if "middle" in lobe else 75)}
    if label == "Bronchiectasis":
        return {"lobes": _some_of(rng, LOBES, (0.2, 0.14, 0.26, 0.14, 0.26), 2), "severity": _severity(rng)}
    if label == "Interlobular septal thickening":
        return {
            "severity": _severity(rng, (0.3, 0.4, 0.3)),
            "zone": str(rng.choice(("both lungs", "both lower lobes"), p=(0.6, 0.4))),
        }
    raise ValueError(f"unknown finding {label!r}: expected one of {sorted(FINDING_NETWORK)}")


def _sample_labels(rng: np.random.Generator) -> list[str]:
    if rng.random() < NORMAL_SHARE:
        return []
    while True:
        state: dict[str, int] = {}
        for label, (intercept, weights) in FINDING_NETWORK.items():
            logit = intercept + sum(weight * state[parent] for parent, weight in weights.items())
            state[label] = int(rng.random() < 1 / (1 + math.exp(-logit)))
        if any(state.values()):
            return [label for label, value in state.items() if value]


def sample_patient(seed: int, index: int, split: str) -> PhantomPatient:
    """Draw patient `index` (from 0) of `split` ("train", "valid", ...). The same arguments give the same patient."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed={seed}, index={index}: expected numbers >= 0")
    rng = _generator(seed, split, index, "patient")
    labels = _sample_labels(rng)
    findings = tuple(Finding(label, sample_attributes(label, rng)) for label in labels)

    def normal(mean, deviation, width=2.0):
        return float(mean + deviation * np.clip(rng.standard_normal(), -width, width))

    sex = str(rng.choice(("M", "F"), p=(0.55, 0.45)))
    chronic = sum(label in labels for label in ("Arterial wall calcification", "Cardiomegaly", "Emphysema"))
    age = int(np.clip(normal(44 + 9 * chronic, 13), 18, 92))
    female = sex == "F"
    fat = normal(18, 6) if female else normal(13, 5)
    half_width = normal(152 if female else 164, 9)
    height = normal(212 if female else 228, 13)
    contrast = bool(rng.random() < 0.3)
    sharp = bool(rng.random() < 0.35)
    anatomy = Anatomy(
        half_width=half_width,
        half_depth=half_width * float(rng.uniform(0.64, 0.74)),
        lung_height=height,
        fat=max(fat, 4.0),
        wall=float(rng.uniform(15, 21)),
        dome_right=float(rng.uniform(52, 76)),
        dome_left=float(rng.uniform(42, 64)),
        below=float(rng.uniform(32, 52)),
        above=float(rng.uniform(26, 38)),
        kyphosis=float(rng.uniform(4, 16)),
        roll=normal(0, 0.035),
        pitch=normal(0, 0.025),
        yaw=normal(0, 0.025),
        shift_x=normal(0, 7),
        shift_y=normal(0, 7),
        rib_spacing=height / 9.4,
        rib_slope=float(rng.uniform(0.4, 0.7)),
        rib_phase=float(rng.uniform(0, 20)),
        cardiothoracic_ratio=float(rng.uniform(0.40, 0.465)),
        heart_tilt=normal(0, 0.09),
        aorta_radius=normal(14.5, 1.3),
        arch_height=float(rng.uniform(0.74, 0.79)),
        carina_height=float(rng.uniform(0.62, 0.66)),
        trachea_radius=normal(8.0 if female else 9.3, 0.7),
        lung_hu=float(rng.uniform(-885, -825)),
        lung_gradient=float(rng.uniform(15, 60)),
        blood_hu=float(rng.uniform(95, 130) if contrast else rng.uniform(34, 48)),
        liver_hu=float(rng.uniform(85, 110) if contrast else rng.uniform(48, 64)),
        bone_hu=float(np.clip(normal(330 - 2.2 * age, 30), 90, 330)),
        fat_hu=float(rng.uniform(-112, -92)),
        muscle_hu=float(rng.uniform(42, 62)),
        breast=float(rng.uniform(36, 58)) if female else 0.0,
        gland=float(rng.uniform(0.1, 0.6)),
        noise=float(rng.uniform(18, 36) if sharp else rng.uniform(9, 20)),
    )
    return PhantomPatient(
        seed=seed,
        index=index,
        split=split,
        sex=sex,
        age=age,
        phase="contrast" if contrast else "non-contrast",
        kernel="sharp" if sharp else "smooth",
        slice_mm=float(rng.choice((2.5, 3.0, 4.0, 5.0), p=(0.2, 0.35, 0.2, 0.25))),
        fov_mm=float(np.clip(2.22 * half_width * rng.uniform(0.98, 1.06), 318, 404)),
        anatomy=anatomy,
        findings=findings,
    )


def on_scanner(patient: PhantomPatient, scanner: str) -> PhantomPatient:
    """Return the same body with the same findings, scanned by "a" (the patient as drawn) or by "b".

    Scanner "b" represents another hospital, as CTRG-Chest-548K does for RadGenome-ChestCT in the paper's tables 8
    and 9. It is a newer device with another protocol, with differences in the range of real scanners:

    - Slices of 1.25 to 2 mm instead of 2.5 to 5, a field of view a tenth larger, mostly a sharp kernel. It has
      slightly less noise at equal slice thickness, but more in these thinner slices.
    - Contrast medium in 8 of 10 scans instead of 3, in an earlier phase and at 100 kV instead of 120, which is closer
      to the absorption edge of iodine: blood at 150 to 210 HU instead of 95 to 130. At 100 kV marrow also reads 15 %
      more, and fat 6 HU less.
    - Calibration: water reads 2 to 6 HU too high (usual quality control tolerates 5 HU, accreditation 7), and air in
      the body -990 to -980 HU, because wide detectors record more scatter: means of -1004 and -989 have been measured
      in the tracheas of patients on a 4- and a 64-channel scanner of one manufacturer.
    - Position: the table is 8 to 20 mm low (off-centre by centimetres is common, and mostly low), the patient is
      rotated differently, and the scan ends closer to the lungs at the bottom.

    Raises:
        ValueError: `patient` is already on another scanner, or the scanner is unknown.
    """
    if scanner not in SCANNERS:
        raise ValueError(f"scanner={scanner!r}: expected one of {', '.join(SCANNERS)}")
    if patient.scanner != "a":
        raise ValueError(f"{patient.name} is already on scanner {patient.scanner!r}: expected a patient as drawn")
    if scanner == "a":
        return patient
    rng = patient.rng("scanner b")
    contrast, sharp = bool(rng.random() < 0.8), bool(rng.random() < 0.7)
    anatomy = dataclasses.replace(
        patient.anatomy,
        below=0.6 * patient.anatomy.below,
        roll=float(0.035 * np.clip(rng.standard_normal(), -2, 2)),
        shift_x=float(9 * np.clip(rng.standard_normal(), -2, 2)),
        shift_y=patient.anatomy.shift_y + float(rng.uniform(8, 20)),
        blood_hu=float(rng.uniform(150, 210) if contrast else rng.uniform(36, 50)),
        liver_hu=float(rng.uniform(95, 120) if contrast else rng.uniform(50, 66)),
        bone_hu=1.15 * patient.anatomy.bone_hu,
        fat_hu=patient.anatomy.fat_hu - 6,
        noise=float(rng.uniform(16, 28) if sharp else rng.uniform(8, 15)),
    )
    return dataclasses.replace(
        patient,
        phase="contrast" if contrast else "non-contrast",
        kernel="sharp" if sharp else "smooth",
        slice_mm=float(rng.choice((1.25, 1.5, 2.0), p=(0.4, 0.3, 0.3))),
        fov_mm=min(1.1 * patient.fov_mm, 430.0),
        anatomy=anatomy,
        scanner=scanner,
        air_hu=float(rng.uniform(-990, -980)),
        water_hu=float(rng.uniform(2, 6)),
    )


def without_findings(patient: PhantomPatient) -> PhantomPatient:
    """Return the exact twin: the same body in the same scan, to the noise of each voxel, without any finding."""
    return dataclasses.replace(patient, findings=())


def earlier_scan(patient: PhantomPatient) -> PhantomPatient:
    """Return the patient a year before any finding: the same anatomy in another scan.

    The body is 1 % smaller. Position on the table, lower end of the scan, field of view, slice thickness, kernel,
    amount of noise and the noise itself are drawn again, from the distributions of [`sample_patient`]. Lung volume and
    contrast medium stay the same.
    """
    rng = patient.rng("earlier scan")
    sharp = bool(rng.random() < 0.35)
    turns = np.clip(rng.standard_normal(5), -2, 2) * (0.035, 0.025, 0.025, 7, 7)
    roll, pitch, yaw, shift_x, shift_y = map(float, turns)
    anatomy = dataclasses.replace(
        patient.anatomy,
        below=float(rng.uniform(32, 52)),
        roll=roll,
        pitch=pitch,
        yaw=yaw,
        shift_x=shift_x,
        shift_y=shift_y,
        noise=float(rng.uniform(18, 36) if sharp else rng.uniform(9, 20)),
    )
    return dataclasses.replace(
        patient,
        age=patient.age - 1,
        kernel="sharp" if sharp else "smooth",
        slice_mm=float(rng.choice((2.5, 3.0, 4.0, 5.0), p=(0.2, 0.35, 0.2, 0.25))),
        fov_mm=float(np.clip(2.22 * anatomy.half_width * rng.uniform(0.98, 1.06), 318, 404)),
        anatomy=anatomy,
        findings=(),
        size=0.99,
        visit="earlier",
    )


def render_patient(patient: PhantomPatient, *, matrix: int = 144, slice_mm: float | None = None) -> PhantomScan:
    """Render a patient to a CT scan of `matrix` x `matrix` pixels.

    All geometry is in mm, so `matrix` and `slice_mm` (default: the patient's own slice thickness) change the
    sampling, not the patient.
    """
    geometry = Geometry(patient)
    canvas = Canvas(patient, geometry, matrix, patient.slice_mm if slice_mm is None else slice_mm)
    paint_anatomy(canvas)
    lobes = np.where(canvas.lung_sd < 0, 1 + geometry.lobe(canvas.x, canvas.y, canvas.z), 0).astype(np.uint8)
    paint_findings(canvas)
    # Scale before the acquisition, which sets the air around the patient.
    canvas.hu *= np.float32((patient.water_hu - patient.air_hu) / 1000)
    canvas.hu += np.float32(patient.water_hu)
    hu = canvas.acquire()
    # The transposes turn (z, y, x) into (x, y, z) without a copy: NIfTI stores x fastest.
    regions = {name: mask.T for name, mask in region_masks(canvas).items()}
    lesions = {finding.label: canvas.lesion(finding.label).T for finding in patient.findings}
    # A body of another size is the same voxels in another size.
    spacing = tuple(patient.size * length for length in canvas.spacing)
    affine = np.diag([patient.size] * 3 + [1.0]) @ canvas.affine()
    return PhantomScan(hu.T, spacing, affine, regions, lesions, lobes.T)
