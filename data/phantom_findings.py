# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Paint the findings of a phantom patient. Every attribute that the report states is visible here.

Cardiomegaly and pericardial effusion are part of the heart (`phantom_anatomy.py`). Findings of the lung are painted
only in air, so that heart and pleural fluid remain visible. Their positions are drawn from the aerated lung, so that
no finding of the report is hidden.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from .phantom_geometry import LOBES, Canvas, ellipsoid_sd, smoothstep

SIDES = {"right": (-1,), "left": (1,), "both": (-1, 1)}
METAL_HU = 2800.0
CALCIUM_HU = 850.0
SOFT_HU = 38.0
GAS_HU = -985.0


def paint_findings(canvas: Canvas) -> None:
    """Paint all findings of the patient, ordered so that no finding hides another."""
    for label, painter in PAINTERS.items():
        finding = canvas.patient.finding(label)
        if finding is not None:
            painter(canvas, finding.attributes, canvas.patient.rng(label))


# Pleura, mediastinum, heart ------------------------------------------------------------------------------------------


def _pleural_effusion(canvas: Canvas, attributes, rng) -> None:
    fluid = np.flatnonzero(canvas.lung_sd < 4)
    points = tuple(g.reshape(-1)[fluid] for g in (canvas.x, canvas.y, canvas.z))
    sd = np.maximum(canvas.geometry.effusion_sd(*points), canvas.lung_sd.reshape(-1)[fluid])
    alpha = canvas.alpha(sd)
    flat = canvas.hu.reshape(-1)
    flat[fluid] += alpha * (rng.uniform(4, 18) - flat[fluid])
    canvas.lesion("Pleural effusion").reshape(-1)[fluid] = alpha > 0.5
    lungs = canvas.lung_sd.reshape(-1)
    lungs[fluid] = np.maximum(lungs[fluid], -sd)


def _hiatal_hernia(canvas: Canvas, attributes, rng) -> None:
    geometry = canvas.geometry
    radius = attributes["size_mm"] / 2
    centre = np.array([8.0 + 0.12 * radius, geometry.spine_y - 22 - 0.55 * radius, 0.17 * geometry.height + radius])
    box, distance = _ball(canvas, centre, radius)
    sd = distance - radius
    alpha = canvas.paint(box, sd, 42.0)
    canvas.lesion("Hiatal hernia")[box] = alpha > 0.5
    canvas.lung_sd[box] = np.maximum(canvas.lung_sd[box], -sd)
    level = centre[1] + rng.uniform(-0.35, 0.1) * radius
    inner = canvas.alpha(sd + 5.5)
    canvas.blend(box, inner, 14.0)
    canvas.blend(box, inner * canvas.alpha(canvas.coordinates(box)[1] - level), GAS_HU)


def _lymphadenopathy(canvas: Canvas, attributes, rng) -> None:
    h, carina = canvas.geometry.height, canvas.geometry.carina
    short = attributes["short_axis_mm"]
    places = {
        "right paratracheal": (-17 - 0.35 * short, 4, 0.735 * h),
        "prevascular": (8 + 0.3 * short, -34, 0.735 * h),
        "subcarinal": (2, 19, carina[2] - 12 - 0.6 * short),
        "right hilar": (-45 - 0.3 * short, 6, carina[2] - 0.085 * h),
        "left hilar": (48 + 0.3 * short, 8, carina[2] - 0.075 * h),
    }
    # The first station holds the largest node, of the reported size; each node has a smaller neighbour above it.
    above = np.array([0.15, 0.2, 1.35]) * short
    for position, station in enumerate(attributes["stations"]):
        sizes = (short, max(0.7 * short, 10.0)) if position == 0 else (max(0.8 * short, 10.0), max(0.65 * short, 7.0))
        for radius, shift in zip((0.5 * size for size in sizes), (0 * above, above), strict=True):
            centre = np.array(places[station], float) + shift + rng.normal(0, 1.0, 3)
            radii = radius * np.array([1.0, 1.15, 1.35])
            box, distance = _ball(canvas, centre, radii)
            canvas.paint(box, distance - radius - 2.5, canvas.patient.anatomy.fat_hu + 10)
            alpha = canvas.paint(box, distance - radius, SOFT_HU + 8)
            canvas.lesion("Lymphadenopathy")[box] |= alpha > 0.5
            canvas.lung_sd[box] = np.maximum(canvas.lung_sd[box], -(distance - radius - 2.5))


def _arterial_calcification(canvas: Canvas, attributes, rng) -> None:
    geometry = canvas.geometry
    count = {"mild": 4, "moderate": 8, "severe": 16}[attributes["severity"]]
    for number in range(count):
        segment = attributes["segments"][number % len(attributes["segments"])]
        points, radius = geometry.aorta[segment], geometry.aorta_radii[segment]
        if segment == "descending aorta":
            points = points[:4]
        place = rng.uniform(0.05, 0.95) * (len(points) - 1)
        base = int(place)
        along = points[base + 1] - points[base]
        across = np.cross(along, rng.standard_normal(3))
        centre = points[base] + (place - base) * along + radius * across / np.linalg.norm(across)
        size = rng.uniform(2.4, 3.4) + (0.8 if attributes["severity"] == "severe" else 0.0)
        _spot(canvas, centre, size * np.array([1.0, 1.0, 1.5]), CALCIUM_HU, "Arterial wall calcification")


def _coronary_calcification(canvas: Canvas, attributes, rng) -> None:
    geometry = canvas.geometry
    beads = {"mild": 4, "moderate": 5, "severe": 7}[attributes["severity"]]
    # Courses on the surface of the heart: position along its long axis (-1 base, 1 apex) and angle around it.
    courses = {"LAD": (-0.35, 0.5, 0.5 * np.pi - 0.5), "RCA": (-0.5, 0.2, -0.1), "LCx": (-0.5, 0.1, np.pi - 0.35)}
    axes, radii = geometry.heart_axes, geometry.heart_radii
    for vessel in attributes["vessels"]:
        first, last, angle = courses[vessel]
        for place in np.linspace(first, last, beads):
            turn = angle + rng.normal(0, 0.07)
            ring = np.sqrt(1 - place**2)
            local = np.array([place, ring * np.cos(turn), ring * np.sin(turn)])
            centre = geometry.heart_centre + ((radii + 1.6) * local) @ axes
            if geometry.heart_sd(*centre.reshape(3, 1))[0] < -1.0:  # inside the right atrium: move to its surface
                away = centre - geometry.atrium_centre
                centre = geometry.atrium_centre + away * float(
                    1.05 / np.sqrt(((away / geometry.atrium_radii) ** 2).sum())
                )
            _spot(
                canvas,
                centre,
                rng.uniform(2.6, 3.4) * np.array([1.0, 1.0, 1.25]),
                CALCIUM_HU,
                "Coronary artery wall calcification",
            )


def _medical_material(canvas: Canvas, attributes, rng) -> None:
    geometry, anatomy = canvas.geometry, canvas.patient.anatomy
    h, kind, label = geometry.height, attributes["kind"], "Medical material"

    def wire(points, radius):
        canvas.tube(points, radius, METAL_HU, lesion=label)

    cava = [geometry.veins[0][0][2], geometry.veins[0][0][1], geometry.veins[0][0][0]]
    if kind == "sternal wires":
        levels = np.linspace(0.36, 0.74, int(rng.integers(5, 8))) * h
        for level in levels:
            y = float(np.interp(level, canvas.sternum[:, 2], canvas.sternum[:, 1]))
            turn = np.linspace(0, 2 * np.pi, 13)
            ring = np.stack([13 * np.sin(turn), y + 10 * np.cos(turn), level + 2 * np.cos(turn)], axis=1)
            wire(ring, 1.7)
            wire([(0, y - 10, level), (3, y - 15, level + 2)], 2.4)
        return
    side = SIDES[attributes["side"]][0]
    pocket = _chest_wall_point(canvas, side * 0.52 * anatomy.half_width, 0.80 * h)
    if kind == "central venous catheter":
        wire([geometry.veins[1][0][2], geometry.veins[1][0][1], *cava], 1.7)
        return
    if kind == "pacemaker":
        _spot(canvas, pocket, np.array([23.0, 7.0, 20.0]), METAL_HU, label, soft=canvas.soft)
        path = geometry.veins[2][0]
        right_heart = geometry.heart_centre + np.array([10.0, -14.0, -16.0]) * geometry.heart_scale
        wire(
            [
                pocket,
                path[3] * (1.0, 1.0, 0) + (0, 0, 0.93 * h),
                path[2],
                path[1],
                *cava,
                geometry.atrium_centre,
                right_heart,
            ],
            1.9,
        )
        return
    _spot(canvas, pocket, np.array([13.0, 7.0, 13.0]), METAL_HU, label, soft=canvas.soft)
    wire([pocket, geometry.veins[1][0][1] + (-6, -4, 6), *cava], 1.7)


def _chest_wall_point(canvas: Canvas, x: float, z: float) -> np.ndarray:
    """Return a point just under the anterior skin of the chest."""
    y = np.linspace(-1.1 * canvas.patient.anatomy.half_depth, 0, 200)
    sd = canvas.geometry.trunk_sd(np.full(200, x), y, np.full(200, z))
    return np.array([x, float(y[np.argmax(sd < -9.0)]), z])


# Lungs ---------------------------------------------------------------------------------------------------------------


def _emphysema(canvas: Canvas, attributes, rng) -> None:
    severity = attributes["severity"]
    h = canvas.geometry.height
    count = {"mild": 50, "moderate": 90, "severe": 140}[severity]
    largest = {"mild": 8.0, "moderate": 10.0, "severe": 15.0}[severity]
    floor = {"mild": 0.60, "moderate": 0.52, "severe": 0.40}[severity] * h
    for side in SIDES[attributes["side"]]:
        centres = canvas.geometry.lung_points(rng, count, side=side, margin=1.0, where=lambda x, y, z: z > floor)
        radii = rng.uniform(4.0, largest, len(centres))
        for box, centre, radius in zip(canvas.boxes(centres, radii, pad=canvas.soft), centres, radii, strict=True):
            x, y, z = canvas.coordinates(box)
            sd = ellipsoid_sd(x, y, z, centre, (radius, radius, radius))
            _in_lung(canvas, box, canvas.alpha(sd), GAS_HU, "Emphysema")


def _mosaic(canvas: Canvas, attributes, rng) -> None:
    inner = np.flatnonzero(canvas.lung_sd < 2)
    points = [g.reshape(-1)[inner] for g in (canvas.x, canvas.y, canvas.z)]
    pattern = np.zeros(len(inner), np.float32)
    for _ in range(6):
        direction = rng.standard_normal(3)
        k = (2 * np.pi / rng.uniform(42, 75)) * direction / np.linalg.norm(direction)
        phase = rng.uniform(0, 2 * np.pi)
        pattern += np.sin(sum(float(k[i]) * points[i] for i in range(3)) + float(phase))
    bright = smoothstep(pattern / 0.7 + 0.5) * canvas.alpha(canvas.lung_sd.reshape(-1)[inner])
    rise = {"mild": 110.0, "moderate": 150.0, "severe": 200.0}[attributes["severity"]]
    flat = canvas.hu.reshape(-1)
    room = np.clip((-300 - flat[inner]) / 300, 0, 1)  # vessels do not get brighter
    flat[inner] += room * (bright * rise - (canvas.alpha(canvas.lung_sd.reshape(-1)[inner]) - bright) * 25)
    canvas.lesion("Mosaic attenuation pattern").reshape(-1)[inner] = bright > 0.5


def _ground_glass(canvas: Canvas, attributes, rng) -> None:
    low, high = {"mild": (13, 18), "moderate": (17, 25), "severe": (22, 34)}[attributes["severity"]]
    rise = {"mild": 290.0, "moderate": 330.0, "severe": 370.0}[attributes["severity"]]
    for lobe in attributes["lobes"]:
        for centre in _lobe_points(canvas, rng, lobe, int(rng.integers(1, 4)), margin=6.0):
            radii = rng.uniform(low, high, 3)
            box = canvas.box(centre - radii - 8, centre + radii + 8)
            x, y, z = canvas.coordinates(box)
            ragged = 3.5 * np.sin(x / 5 + 1) * np.sin(y / 6) * np.sin(z / 5.5)
            alpha = canvas.alpha(ellipsoid_sd(x, y, z, centre, radii) + ragged, 10.0)
            alpha = alpha * canvas.alpha(canvas.lung_sd[box]) * _of_side(x, lobe)
            part = canvas.hu[box]
            part += alpha * np.clip((-60 - part) / 500, 0, 1) * rise
            canvas.lesion("Lung opacity")[box] |= alpha > 0.5


def _septal_thickening(canvas: Canvas, attributes, rng) -> None:
    geometry = canvas.geometry
    deep = {"mild": 16.0, "moderate": 24.0, "severe": 34.0}[attributes["severity"]]
    near = (canvas.lung_sd < 1) & (canvas.lung_sd > -deep)
    if attributes["zone"] == "both lower lobes":
        near &= canvas.z < geometry.major_fissure(canvas.y)
    inner = np.flatnonzero(near)
    points = np.stack([g.reshape(-1)[inner] for g in (canvas.x, canvas.y, canvas.z)], axis=1)
    # Secondary lobules: cells around jittered lattice points; their common walls are the septa.
    cell = 17.0
    low, high = points.min(0) - cell, points.max(0) + cell
    steps = [np.arange(a, b, cell) for a, b in zip(low, high, strict=True)]
    lattice = np.stack(np.meshgrid(*steps, indexing="ij"), -1)
    seeds = lattice.reshape(-1, 3) + rng.uniform(-0.42, 0.42, (lattice.size // 3, 3)) * cell
    distance, _ = cKDTree(seeds).query(points, k=2)
    alpha = canvas.alpha((0.5 * (distance[:, 1] - distance[:, 0]) - 1.3).astype(np.float32), 1.5)
    alpha *= canvas.alpha(canvas.lung_sd.reshape(-1)[inner]) * canvas.alpha(
        -canvas.lung_sd.reshape(-1)[inner] - deep + 4, 8.0
    )
    flat = canvas.hu.reshape(-1)
    flat[inner] += alpha * np.clip((-150 - flat[inner]) / 200, 0, 1) * (-230 - flat[inner])
    canvas.lesion("Interlobular septal thickening").reshape(-1)[inner] = alpha > 0.5


def _fibrotic_sequela(canvas: Canvas, attributes, rng) -> None:
    geometry, label = canvas.geometry, "Pulmonary fibrotic sequela"
    h, apex = geometry.height, attributes["zone"] == "apex"
    where = (
        (lambda x, y, z: z > 0.80 * h)
        if apex
        # noqa: E731
        else (lambda x, y, z: (z < 0.36 * h) & (y > 0.15 * geometry.cavity_b))
    )
    for side in SIDES[attributes["side"]]:
        for start in geometry.lung_points(rng, 12, side=side, margin=3.0, where=where):
            towards = geometry.hilum[side] - start
            towards = towards / np.linalg.norm(towards) + rng.normal(0, 0.75, 3)
            length = rng.uniform(16, 34) * towards / np.linalg.norm(towards)
            bend = start + length / 2 + rng.normal(0, 4.0, 3)
            _strand(canvas, [start - 0.3 * length, bend, start + 0.7 * length], rng.uniform(1.6, 2.6), -20.0, label)
        if apex:  # the pleural cap
            cap = np.flatnonzero(
                (canvas.lung_sd > -7) & (canvas.lung_sd < 2) & (canvas.z > 0.86 * h) & (canvas.x * side > 0)
            )
            z, sd = canvas.z.reshape(-1)[cap], canvas.lung_sd.reshape(-1)[cap]
            alpha = canvas.alpha(-sd - 4.5 - 1.5 * np.sin(canvas.x.reshape(-1)[cap] / 4)) * canvas.alpha(sd)
            alpha *= smoothstep((z / h - 0.86) / 0.05)
            flat = canvas.hu.reshape(-1)
            flat[cap] += alpha * (10.0 - flat[cap])
            canvas.lesion(label).reshape(-1)[cap] |= alpha > 0.5


def _atelectasis(canvas: Canvas, attributes, rng) -> None:
    geometry, label = canvas.geometry, "Atelectasis"
    for lobe in attributes["lobes"]:
        low = (lambda x, y, z: z < geometry.dome(x, y) + 34) if "lower" in lobe else None
        if attributes["kind"] == "linear":
            for centre in _lobe_points(canvas, rng, lobe, 2, margin=8.0, where=low):
                normal = np.array([rng.normal(0, 0.3), rng.normal(0, 0.35), 1.0])
                normal /= np.linalg.norm(normal)
                first = np.cross(normal, [np.cos(angle := rng.uniform(0, np.pi)), np.sin(angle), 0])
                first /= np.linalg.norm(first)
                second = np.cross(normal, first)
                half = np.array([rng.uniform(24, 36), rng.uniform(11, 17), rng.uniform(2.6, 3.6)])
                box = canvas.box(centre - half[0], centre + half[0])
                d = [w - float(c) for w, c in zip(canvas.coordinates(box), centre, strict=True)]
                local = [sum(float(axis[i]) * d[i] for i in range(3)) for axis in (first, second, normal)]
                bow = 0.0022 * local[0] ** 2
                sd = np.maximum(
                    np.hypot(local[0] / half[0], local[1] / half[1]) * half[1] - half[1],
                    np.abs(local[2] - bow) - half[2],
                )
                _in_lung(canvas, box, canvas.alpha(sd) * _of_side(canvas.coordinates(box)[0], lobe), 5.0, label)
            continue

        def behind(x, y, z, low=low):
            return (y > 0.25 * geometry.cavity_b) & (low(x, y, z) if low else True)

        for centre in _lobe_points(canvas, rng, lobe, 1, margin=4.0, where=behind if low else None):
            # A wedge: broad at the pleura, pointing to the hilum.
            side = -1 if "right" in lobe else 1
            axis = geometry.hilum[side] - centre
            axis /= np.linalg.norm(axis)
            base = centre - 12 * axis
            box = canvas.box(centre - 40, centre + 40)
            d = [w - float(c) for w, c in zip(canvas.coordinates(box), base, strict=True)]
            along = sum(float(axis[i]) * d[i] for i in range(3))
            off = np.sqrt(np.maximum(sum(w * w for w in d) - along**2, 0))
            sd = np.maximum(off - 19 * np.clip(1 - along / 44, 0, 1), -along - 16)
            alpha = canvas.alpha(0.8 * sd) * _of_side(canvas.coordinates(box)[0], lobe)
            _in_lung(canvas, box, alpha, 42.0, label)


def _consolidation(canvas: Canvas, attributes, rng) -> None:
    geometry, label, lobe = canvas.geometry, "Consolidation", attributes["lobe"]
    radius = attributes["size_mm"] / 2
    side = -1 if "right" in lobe else 1
    centre = _lobe_points(canvas, rng, lobe, 1, margin=min(0.55 * radius, 16.0))[0]
    box, distance = _ball(canvas, centre, radius + 4)
    x, y, z = canvas.coordinates(box)
    ragged = 1.0 + np.sin(x / 4.5) * np.sin(y / 5 + 1) * np.sin(z / 6)
    alpha = canvas.alpha(distance - radius + 1.6 * ragged) * _of_side(x, lobe)
    _in_lung(canvas, box, alpha, 32.0, label)
    hilum = geometry.hilum[side]
    inward = (hilum - centre) / np.linalg.norm(hilum - centre)
    for _ in range(3 if radius < 20 else 5):  # air bronchogram
        spread = rng.normal(0, 0.45, 3)
        path = [centre + 0.8 * radius * inward, centre + 3 * spread, centre - 0.55 * radius * (inward + spread)]
        for tube, sd in canvas.capsules(path[:-1], path[1:], np.array([2.0, 1.8]), np.array([1.8, 1.5])):
            canvas.blend(tube, canvas.alpha(sd) * canvas.lesion(label)[tube], -880.0)


def _peribronchial(canvas: Canvas, attributes, rng) -> None:
    thick = {"mild": 3.0, "moderate": 3.8, "severe": 4.8}[attributes["severity"]]
    for side in SIDES[attributes["side"]]:
        tubes = canvas.airways["right" if side < 0 else "left"]
        for points, radius in tubes:
            _cuffed_tube(canvas, points, np.maximum(radius, 1.7), thick, "Peribronchial thickening")


def _bronchiectasis(canvas: Canvas, attributes, rng) -> None:
    geometry = canvas.geometry
    lumen = {"mild": 3.4, "moderate": 4.4, "severe": 5.8}[attributes["severity"]]
    for lobe in attributes["lobes"]:
        hilum = geometry.hilum[-1 if "right" in lobe else 1]
        for goal in _lobe_points(canvas, rng, lobe, 6, margin=8.0):
            start = goal + (hilum - goal) * min(0.6, 42 / np.linalg.norm(hilum - goal))
            middle = (start + goal) / 2 + rng.normal(0, 4, 3)
            radii = lumen * rng.uniform(0.8, 1.25, 3)
            _cuffed_tube(canvas, np.stack([start, middle, goal]), radii, 1.9, "Bronchiectasis")


def _nodules(canvas: Canvas, attributes, rng) -> None:
    size = attributes["size_mm"]
    lobes = [attributes["lobe"]] + [str(rng.choice(LOBES)) for _ in range(attributes["count"] - 1)]
    sizes = [size] + [max(6.0, size * rng.uniform(0.45, 0.85)) for _ in lobes[1:]]
    taken: list[tuple[np.ndarray, float]] = []
    for lobe, diameter in zip(lobes, sizes, strict=True):
        radius = diameter / 2

        def free(x, y, z, radius=radius):
            ok = np.ones(x.shape, bool)
            for centre, other in taken:
                ok &= np.hypot(np.hypot(x - centre[0], y - centre[1]), z - centre[2]) > radius + other + 8
            return ok

        centre = _lobe_points(canvas, rng, lobe, 1, margin=radius + 3.0, where=free)[0]
        taken.append((centre, radius))
        box, distance = _ball(canvas, centre, radius)
        alpha = canvas.paint(box, distance - radius, SOFT_HU + 10)
        canvas.lesion("Lung nodule")[box] |= alpha > 0.5


# Helpers -------------------------------------------------------------------------------------------------------------


def _ball(canvas: Canvas, centre, radii):
    """Return box and distance field around an anatomical point (mm, in the scanner frame, to preserve diameters).

    With three radii the distance is scaled so that it equals the first radius on the ellipsoid's surface.
    """
    radii = np.broadcast_to(np.asarray(radii, float), (3,))
    world = canvas.geometry.to_scanner(np.asarray(centre, float)[None])[0]
    reach = radii + 2 * canvas.soft + 4
    box = canvas.slices((world - reach)[None], (world + reach)[None])[0]
    x, y, z = (canvas.axes[i][box[2 - i]] - np.float32(world[i]) for i in range(3))
    scale = (radii[0] / radii).astype(np.float32)
    return box, np.sqrt(
        (x * scale[0])[None, None, :] ** 2 + (y * scale[1])[None, :, None] ** 2 + (z * scale[2])[:, None, None] ** 2
    )


def _of_side(x, lobe: str):
    """Return a mask of the lobe's half of the chest, which keeps a lesion near the midline in its lung."""
    return (x < 0) if "right" in lobe else (x > 0)


def _lobe_points(canvas: Canvas, rng, lobe: str, count: int, *, margin: float, where=None) -> np.ndarray:
    number = LOBES.index(lobe)

    def inside(x, y, z):
        ok = canvas.geometry.lobe(x, y, z) == number
        return ok & where(x, y, z) if where is not None else ok

    points = canvas.geometry.lung_points(
        rng, max(count, 20), side=-1 if "right" in lobe else 1, margin=margin, where=inside
    )
    return points[:count]


def _in_lung(canvas: Canvas, box, alpha, hu, label: str) -> None:
    alpha = alpha * canvas.alpha(canvas.lung_sd[box])
    canvas.blend(box, alpha, hu)
    canvas.lesion(label)[box] |= alpha > 0.5


def _spot(canvas: Canvas, centre, radii, hu, label: str, soft: float = 2.0) -> None:
    box = canvas.box(centre - radii, centre + radii, pad=2 * canvas.soft)
    alpha = canvas.alpha(ellipsoid_sd(*canvas.coordinates(box), centre, radii), max(soft, 0.8 * canvas.soft))
    canvas.blend(box, alpha, hu)
    canvas.lesion(label)[box] |= alpha > 0.5


def _strand(canvas: Canvas, points, radius: float, hu: float, label: str) -> None:
    points = np.stack(points)
    radii = np.full(len(points) - 1, radius)
    for box, sd in canvas.capsules(points[:-1], points[1:], radii, radii):
        _in_lung(canvas, box, canvas.alpha(sd), hu, label)


def _cuffed_tube(canvas: Canvas, points, radii, wall: float, label: str) -> None:
    """Paint an airway with a visible wall: soft tissue around a lumen of air."""
    for outer in (True, False):
        grow = wall if outer else 0.0
        for box, sd in canvas.capsules(points[:-1], points[1:], radii[:-1] + grow, radii[1:] + grow):
            alpha = canvas.alpha(sd) * canvas.alpha(canvas.lung_sd[box])
            canvas.blend(box, alpha, 5.0 if outer else GAS_HU)
            if outer:
                canvas.lesion(label)[box] |= alpha > 0.5


# Later findings are painted over earlier ones: diffuse patterns first, small and dense structures last. All painters
# have one signature, although some need no attributes (the effusion is in the geometry) or no random numbers.
PAINTERS = {
    "Pleural effusion": _pleural_effusion,
    "Hiatal hernia": _hiatal_hernia,
    "Lymphadenopathy": _lymphadenopathy,
    "Mosaic attenuation pattern": _mosaic,
    "Emphysema": _emphysema,
    "Lung opacity": _ground_glass,
    "Interlobular septal thickening": _septal_thickening,
    "Consolidation": _consolidation,
    "Atelectasis": _atelectasis,
    "Pulmonary fibrotic sequela": _fibrotic_sequela,
    "Peribronchial thickening": _peribronchial,
    "Bronchiectasis": _bronchiectasis,
    "Lung nodule": _nodules,
    "Arterial wall calcification": _arterial_calcification,
    "Coronary artery wall calcification": _coronary_calcification,
    "Medical material": _medical_material,
}
