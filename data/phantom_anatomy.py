# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Paint the normal anatomy of a phantom patient, from the skin inwards, and derive the ten region masks."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..labels_diffvp import REGIONS
from .phantom_geometry import Canvas, Geometry, ellipsoid_sd, smoothstep

WHOLE = (slice(None), slice(None), slice(None))
AIRWAY_HU = -1000.0
FLUID_HU = 12.0


def paint_anatomy(canvas: Canvas) -> None:
    """Paint a healthy thorax, with heart size and pleural fluid according to the findings."""
    _trunk(canvas)
    _rib_cage(canvas)
    _abdomen(canvas)
    _lungs(canvas)
    _spine(canvas)
    _mediastinum(canvas)
    _heart(canvas)
    _neck_and_breasts(canvas)


def _trunk(canvas: Canvas) -> None:
    geometry, anatomy = canvas.geometry, canvas.patient.anatomy
    x, y, z = canvas.x, canvas.y, canvas.z
    body = geometry.trunk_sd(x, y, z).astype(np.float32)
    for side in (-1, 1):
        centre, radii = geometry.shoulder(side)
        box = canvas.box(centre - radii - 14, centre + radii + 14)
        body[box] = np.minimum(body[box], ellipsoid_sd(*canvas.coordinates(box), centre, radii))
    depth = canvas.muscle_sd = body + anatomy.fat
    if anatomy.breast:
        for side in (-1, 1):
            centre, radii = breast_shape(canvas, side)
            box = canvas.box(centre - radii - 4, centre + radii + 4)
            body[box] = np.minimum(body[box], ellipsoid_sd(*canvas.coordinates(box), centre, radii))
    cavity = geometry.cavity_sd(x, y, z).astype(np.float32)
    canvas.body_sd, canvas.cavity_sd = body, cavity
    canvas.blend(WHOLE, canvas.alpha(body), anatomy.fat_hu)
    skin = np.flatnonzero(np.abs(body + 1.2) < 4)
    flat = canvas.hu.reshape(-1)
    alpha = canvas.alpha(np.abs(body.reshape(-1)[skin] + 1.2) - 1.0)
    flat[skin] += alpha * (25 - flat[skin])
    # Muscle: everything deeper than the fat, but fat planes separate the rib cage from the outer muscles and the
    # muscles of the shoulder girdle from each other.
    inner = np.flatnonzero((depth < 4) & (cavity > -4))
    d, c = depth.reshape(-1)[inner], cavity.reshape(-1)[inner]
    px, py, pz = (g.reshape(-1)[inner] for g in (x, y, z))
    alpha = canvas.alpha(d)
    waves = np.sin(px / 21 + 1.1 * np.sin(pz / 27) + 0.9 * np.sin(py / 19))
    layers = np.abs(np.sin(0.105 * d + 1.6 * waves + 0.5 * np.sin(pz / 15) + 0.02 * px))
    plane = np.maximum(np.exp(-(((c - 12 - 1.5 * waves) / 2.0) ** 2)), smoothstep((0.20 - layers) / 0.12) * (c > 14))
    tissue = anatomy.muscle_hu + plane * (anatomy.fat_hu + 15 - anatomy.muscle_hu)
    flat[inner] += alpha * (tissue - flat[inner])
    canvas.blend(WHOLE, canvas.alpha(cavity), anatomy.fat_hu + 8)


def breast_shape(canvas: Canvas, side: int):
    anatomy = canvas.patient.anatomy
    size = anatomy.breast or 24.0
    centre = np.array(
        [side * 0.50 * anatomy.half_width, -0.80 * anatomy.half_depth - 0.10 * size, 0.40 * anatomy.lung_height]
    )
    return centre, np.array([1.15 * size, 0.85 * size, 1.2 * size])


def _rib_cage(canvas: Canvas) -> None:
    geometry, anatomy = canvas.geometry, canvas.patient.anatomy
    c = canvas.cavity_sd.reshape(-1)
    shell = np.flatnonzero((c > -1.5) & (c < 13))
    c = c[shell]
    px, py, pz = (g.reshape(-1)[shell] for g in (canvas.x, canvas.y, canvas.z))
    slope, spacing = anatomy.rib_slope, anatomy.rib_spacing
    height = pz - slope * (py - geometry.spine_y) - anatomy.rib_phase
    phase = np.abs(height - spacing * np.round(height / spacing)) / np.sqrt(1 + slope**2)
    across = np.hypot((c - 5.6) / 3.6, phase / 5.0)
    front = smoothstep((-(py - geometry.cavity_y) / geometry.cavity_b - 0.45) / 0.2)
    front = front * (np.abs(px) < 0.72 * geometry.cavity_a)
    cortex = 620 - 480 * front  # the costal cartilages are softer than bone
    marrow = (anatomy.bone_hu + 40) * (1 - front) + 110 * front
    valid = (pz < 0.97 * geometry.height) & (np.abs(px) > 10) & (height < 1.02 * geometry.height)
    flat, bone = canvas.hu.reshape(-1), canvas.mask("bone").reshape(-1)
    alpha = canvas.alpha(3.6 * (across - 1)) * valid
    core = canvas.alpha(3.6 * (across - 0.5))
    flat[shell] += alpha * (cortex + core * (marrow - cortex) - flat[shell])
    bone[shell] |= alpha > 0.5

    h = geometry.height

    def front_y(level):
        scale = geometry.cavity_scale(level)
        half = geometry.cavity_b
        return geometry.cavity_y + 0.30 * half * (1 - scale) - half * (0.25 + 0.75 * scale) - 7

    # Sternum: a flat plate just outside the front of the cavity, wider at the manubrium.
    levels = np.array([0.30, 0.45, 0.60, 0.70, 0.76]) * h
    canvas.sternum = np.array([[0.0, front_y(level), level] for level in levels])
    box = canvas.box((-34, canvas.sternum[:, 1].min() - 14, 0.26 * h), (34, canvas.sternum[:, 1].max() + 14, 0.82 * h))
    x, y, z = canvas.coordinates(box)
    middle = np.interp(z, levels, canvas.sternum[:, 1])
    wide = 13 + 11 * smoothstep((z / h - 0.58) / 0.1)
    sd = np.maximum(np.hypot(x / wide, (y - middle) / 6.5) * 6.5 - 6.5, np.maximum(0.28 * h - z, z - 0.79 * h))
    canvas.paint(box, sd, 480.0, mask="bone")
    canvas.paint(box, sd + 3.0, anatomy.bone_hu + 10)
    top = np.array([0.0, front_y(0.76 * h), 0.79 * h])
    width, depth = anatomy.half_width, anatomy.half_depth
    for side in (-1, 1):
        clavicle = [
            top + (side * 24, 0, 4),
            top + (side * 60, 8, 16),
            (side * 0.66 * width, -0.18 * depth, 0.99 * h),
            (side * 0.84 * width, 0.0, 1.06 * h),
        ]
        canvas.tube(clavicle, 6.2, 560.0, mask="bone")
        canvas.tube(clavicle, 3.0, anatomy.bone_hu + 60)
        # Scapula: a thin blade behind the ribs, its spine, and the humeral head of the raised arm.
        hinge = np.array([side * 0.80 * width, 0.22 * depth, 0.94 * h])
        tip = np.array([side * 0.58 * width, 0.80 * depth, 0.50 * h])
        inner_edge = np.array([side * 0.42 * width, 0.84 * depth, 0.90 * h])
        _plate(canvas, hinge, tip, inner_edge, 2.6, 430.0)
        canvas.tube([hinge, (hinge + inner_edge) / 2 + (0, 12, 8), inner_edge], (6.5, 5.0, 3.0), 480.0, mask="bone")
        head = hinge + (side * 14, -14, 14)
        for radius, hu in ((22.0, 520.0), (19.0, anatomy.bone_hu + 20)):
            canvas.ellipsoid(head, (radius, radius, radius), hu, mask="bone")


def _plate(canvas: Canvas, a, b, c, half_thickness: float, hu: float) -> None:
    """Paint a flat triangular bone with corners a, b, c."""
    points = np.stack([a, b, c])
    normal = np.cross(b - a, c - a)
    normal /= np.linalg.norm(normal)
    box = canvas.box(points.min(0) - half_thickness, points.max(0) + half_thickness, pad=canvas.soft)
    x, y, z = canvas.coordinates(box)
    sd = np.abs((x - a[0]) * normal[0] + (y - a[1]) * normal[1] + (z - a[2]) * normal[2]) - half_thickness
    centre = points.mean(0)
    for p, q in ((a, b), (b, c), (c, a)):
        edge = np.cross(q - p, normal)
        edge /= np.linalg.norm(edge)
        if (centre - p) @ edge > 0:
            edge = -edge
        sd = np.maximum(sd, (x - p[0]) * edge[0] + (y - p[1]) * edge[1] + (z - p[2]) * edge[2])
    canvas.paint(box, sd, hu, mask="bone")


def _abdomen(canvas: Canvas) -> None:
    geometry, anatomy = canvas.geometry, canvas.patient.anatomy
    a, b, ys, yc = geometry.cavity_a, geometry.cavity_b, geometry.spine_y, geometry.cavity_y
    right, left, blood = anatomy.dome_right, anatomy.dome_left, anatomy.blood_hu

    def inside(gap):
        """Below the diaphragm and within the body wall."""
        return lambda x, y, z: np.maximum(z - geometry.dome(x, y) + gap, geometry.cavity_sd(x, y, z) + gap)

    muscle = anatomy.muscle_hu
    # The diaphragm itself: a muscular sheet under the lungs, with the crura beside the spine.
    box = canvas.box((-a - 6, yc - b - 6, -anatomy.below - 30), (a + 6, yc + b + 6, max(right, left) + 6))
    x, y, z = canvas.coordinates(box)
    sheet = np.abs(z - geometry.dome(x, y) + 2.0) * 0.75 - 2.0
    canvas.paint(box, np.maximum(sheet, canvas.cavity_sd[box]), muscle)
    for side in (-1, 1):
        canvas.tube([(side * 12, ys - 17, -80), (side * 13, ys - 20, 10), (side * 9, ys - 30, 34)], 5.0, muscle)
        kidney = anatomy.muscle_hu - 14 + 0.8 * (blood - 40)
        canvas.ellipsoid((side * 58, ys - 4, -46 - 6 * side), (26, 23, 46), kidney, cut=inside(6))
    liver = anatomy.liver_hu
    canvas.ellipsoid((-0.44 * a, yc - 2, right - 66), (0.66 * a, 0.90 * b, 76), liver, cut=inside(3.5))
    canvas.ellipsoid((4, yc - 0.46 * b, right - 44), (62, 0.40 * b, 34), liver, cut=inside(3.5))
    rng = canvas.patient.rng("abdomen")
    for _ in range(7):  # hepatic veins, brighter in the contrast phase
        start = np.array([-18.0, 14.0, 0.42 * right])
        end = np.array([rng.uniform(-0.9, -0.15) * a, yc + rng.uniform(-0.6, 0.6) * b, rng.uniform(-35, 0.6 * right)])
        canvas.tube(
            [start, (start + end) / 2 + rng.normal(0, 7, 3), end],
            (5.0, 3.2, 1.5),
            0.6 * blood + 12 if blood < 80 else blood + 28,
        )
    spleen = 0.55 * liver + 0.45 * muscle + 4
    canvas.ellipsoid((0.66 * a, yc + 0.46 * b, left - 58), (30, 0.46 * b, 46), spleen, cut=inside(4))
    centre = np.array([0.42 * a, yc - 0.28 * b, left - 50])
    radii = np.array([46.0, 0.44 * b, 42.0]) * rng.uniform(0.85, 1.1)
    canvas.ellipsoid(centre, radii, 45.0, cut=inside(4))
    level = centre[1] + rng.uniform(-0.55, 0.35) * radii[1]
    gas, alpha = canvas.ellipsoid(centre, radii - 5, FLUID_HU + 10, cut=inside(9))
    canvas.blend(gas, alpha * canvas.alpha(canvas.coordinates(gas)[1] - level), AIRWAY_HU + 20)
    for side in (-1, 1):
        top = np.array([side * 27.0, ys - 18, -10 - 4 * side])
        for limb in ((4, 14, -16), (-9 * side, 10, -18)):
            canvas.tube([top, top + limb], (3.2, 2.0), 32.0)
    canvas.mask("abdomen")[box] = (z < geometry.dome(x, y)) & (canvas.cavity_sd[box] < 0)


def _lungs(canvas: Canvas) -> None:
    geometry, anatomy, patient = canvas.geometry, canvas.patient.anatomy, canvas.patient
    x, y, z = canvas.x, canvas.y, canvas.z
    near = np.flatnonzero(canvas.cavity_sd < 8)
    canvas.lung_sd = np.full(canvas.shape, 99.0, np.float32)
    canvas.lung_sd.reshape(-1)[near] = geometry.lung_sd(*(g.reshape(-1)[near] for g in (x, y, z)))
    canvas.masks["pleura"] = np.abs(canvas.lung_sd) < 3.5
    inner = near[canvas.lung_sd.reshape(-1)[near] < 3]
    flat = canvas.hu.reshape(-1)
    px, py, pz = (g.reshape(-1)[inner] for g in (x, y, z))
    tissue = anatomy.lung_hu + anatomy.lung_gradient * (py / geometry.cavity_b)
    tissue = tissue + 10 * np.sin(px / 17) * np.sin(py / 13 + 1) * np.sin(pz / 19)
    oblique = np.abs(pz - geometry.major_fissure(py)) / 1.6
    minor = np.where((px < 0) & (pz > geometry.major_fissure(py)), np.abs(pz - geometry.minor_fissure), 99)
    tissue += 90 * canvas.alpha(np.minimum(oblique, minor) - 0.6, 2.0)
    flat[inner] += canvas.alpha(canvas.lung_sd.reshape(-1)[inner]) * (tissue - flat[inner])
    canvas.masks["lung"] = canvas.lung_sd < 0
    for side, name in ((-1, "right"), (1, "left")):
        nodes, parents, radii = vessel_tree(patient, geometry, side)
        children = np.flatnonzero(parents >= 0)
        for box, sd in canvas.capsules(
            nodes[parents[children]], nodes[children], radii[children], 0.85 * radii[children]
        ):
            canvas.blend(box, canvas.alpha(sd) * canvas.alpha(canvas.lung_sd[box] - 2), anatomy.blood_hu)
        canvas.airways[name] = segmental_bronchi(patient, geometry, side)
        for points, radius in canvas.airways[name]:
            canvas.tube(points, radius + 1.1, -120.0, mask="trachea and bronchie")
            canvas.tube(points, radius, AIRWAY_HU + 40)


def vessel_tree(patient, geometry, side: int):
    """Grow a random tree from the hilum to points throughout one lung: nodes (n, 3), parent indices, radii in mm.

    Each target joins the tree at a node with a short path to the hilum. Radii follow Murray's law.
    """
    rng = patient.rng(f"vessels {side}")
    healthy = _without_findings(geometry)
    targets = healthy.lung_points(rng, 190, side=side, margin=2.5)
    targets = targets[np.argsort(((targets - geometry.hilum[side]) ** 2).sum(1), kind="stable")]
    bends = rng.normal(0, 0.07, (len(targets), 3))
    nodes = np.empty((1 + 2 * len(targets), 3))
    nodes[0], length = geometry.hilum[side], np.zeros(1 + 2 * len(targets))
    parents = np.full(len(nodes), -1)
    count = 1
    for target, bend in zip(targets, bends, strict=True):
        distance = np.sqrt(((nodes[:count] - target) ** 2).sum(1))
        parent = int(np.argmin(distance + 0.45 * length[:count]))
        gap = distance[parent]
        nodes[count] = (nodes[parent] + target) / 2 + bend * gap
        nodes[count + 1] = target
        parents[count], parents[count + 1] = parent, count
        length[count], length[count + 1] = length[parent] + gap / 2, length[parent] + gap
        count += 2
    load = np.zeros(len(nodes))
    load[2::2] += 0.88**2.6
    for node in range(len(nodes) - 1, 0, -1):
        load[parents[node]] += load[node]
    return nodes, parents, load ** (1 / 2.6)


def _without_findings(geometry):
    """Return the geometry with a normal heart and pleural space, since normal anatomy must not depend on findings."""
    return Geometry(dataclasses.replace(geometry.patient, findings=())) if geometry.patient.findings else geometry


def segmental_bronchi(patient, geometry, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return curved, tapering airways from the hilum into the lobes: (points, lumen radii in mm)."""
    rng = patient.rng(f"bronchi {side}")
    healthy = _without_findings(geometry)
    tubes = []
    for lobe in (0, 1, 2) if side < 0 else (3, 4):
        goals = healthy.lung_points(
            rng, 3, side=side, margin=22, where=lambda x, y, z, lobe=lobe: geometry.lobe(x, y, z) == lobe
        )
        fork = geometry.hilum[side] + 0.30 * (goals.mean(0) - geometry.hilum[side])
        tubes.append((np.stack([geometry.hilum[side], fork]), np.array([4.2, 3.4])))
        for goal in goals:
            middle = (fork + goal) / 2 + rng.normal(0, 4, 3)
            tubes.append((np.stack([fork, middle, goal]), np.array([2.9, 2.2, 1.3])))
    return tubes


def _spine(canvas: Canvas) -> None:
    geometry, anatomy = canvas.geometry, canvas.patient.anatomy
    ys, spacing = geometry.spine_y, anatomy.rib_spacing
    back = ys + 66
    box = canvas.box((-50, ys - 24, -70), (50, back, geometry.height + anatomy.above + 20))
    x, y, z = canvas.coordinates(box)
    bone = canvas.mask("bone")
    # Muscle fills the space beside and behind the vertebrae.
    beside = np.maximum(np.maximum(np.abs(x) - 21, ys - y), y - ys - 34)
    canvas.paint(box, np.maximum(beside, canvas.cavity_sd[box] - 2), anatomy.muscle_hu)
    phase = z - anatomy.rib_phase
    phase = phase - spacing * np.round(phase / spacing)  # 0 at the middle of a vertebra, +-spacing/2 in the disc
    column = (np.hypot(x / 17.5, (y - ys) / 14.5) - 1) * 15
    disc = np.abs(phase) - (0.5 * spacing - 2.6)
    canvas.paint(box, column, 75.0)
    alpha = canvas.paint(box, np.maximum(column, disc), 430.0)
    bone[box] |= alpha > 0.5
    canvas.paint(box, np.maximum(column + 2.6, disc + 2.0), anatomy.bone_hu)
    ring = np.hypot(x / 1.15, y - ys - 22)
    arch = np.maximum(np.abs(ring - 10.5) - 2.8, np.abs(phase + 2) - 0.36 * spacing)
    spinous = np.maximum(np.maximum(np.abs(x) - 3.2, np.abs(y - ys - 40 + 0.7 * phase) - 11), np.abs(phase + 3) - 8)
    transverse = np.maximum(
        np.maximum(np.abs(x) - 30, np.abs(y - ys - 24 - 0.12 * np.abs(x)) - 4.5), np.abs(phase) - 6
    )
    transverse = np.maximum(transverse, 9 - np.abs(x))
    alpha = canvas.paint(box, np.minimum(np.minimum(arch, spinous), transverse), 420.0)
    bone[box] |= alpha > 0.5
    canvas.paint(box, ring - 7.8, 28.0)


def _mediastinum(canvas: Canvas) -> None:
    geometry, anatomy, h = canvas.geometry, canvas.patient.anatomy, canvas.geometry.height
    blood, r = anatomy.blood_hu, anatomy.trachea_radius
    rng = canvas.patient.rng("mediastinum")
    for points, radius in geometry.veins:
        canvas.tube(points, radius, blood - 3)
    for points, radius in geometry.arteries:
        canvas.tube(points, radius, blood)
    for name, points in geometry.aorta.items():
        canvas.tube(points, geometry.aorta_radii[name], blood + 2)
    for side in (-1, 1):
        hilum = geometry.hilum[side]
        for z in (-14, -26):  # pulmonary veins on their way to the left atrium
            canvas.tube([hilum + (0, -4, z), (0.35 * hilum[0], 14, 0.50 * h)], 5.5, blood)
    canvas.tube(geometry.oesophagus, 7.5, 38.0, mask="esophagus")
    gas = geometry.oesophagus[1:4] + (0, -1, 0)
    canvas.tube(gas, rng.uniform(0.8, 2.6), -500.0)
    canvas.tube(geometry.trachea, r + 2.0, 30.0, mask="trachea and bronchie")
    canvas.tube(geometry.trachea, r, AIRWAY_HU)
    for side in (-1, 1):
        canvas.tube(geometry.main_bronchi[side], (r - 0.6, r - 1.4, r - 2.4), 20.0, mask="trachea and bronchie")
        canvas.tube(geometry.main_bronchi[side], (r - 2.2, r - 3.0, r - 4.2), AIRWAY_HU + 10)
    # Small, normal lymph nodes and strands in the mediastinal fat.
    for _ in range(int(rng.integers(2, 8))):
        centre = np.array([rng.uniform(-26, 30), rng.uniform(-30, 14), rng.uniform(0.56, 0.78) * h])
        canvas.ellipsoid(centre, rng.uniform(1.8, 3.4) * np.array([1.0, 0.8, 1.1]), 30.0)


def _heart(canvas: Canvas) -> None:
    geometry, anatomy = canvas.geometry, canvas.patient.anatomy
    centre, scale = geometry.heart_centre, geometry.heart_scale
    reach = np.array([78.0, 66.0, 62.0]) * scale + geometry.pericardial_mm + 8
    box = canvas.box(centre - reach, centre + reach)
    x, y, z = canvas.coordinates(box)
    sd = geometry.heart_sd(x, y, z)
    fluid = geometry.pericardium_mm(x, y, z)
    fat = 3.6
    # The pericardial sac rests on the diaphragm and does not cross the chest wall.
    rest = np.maximum(0.6 * (geometry.dome(x, y) - z) - 4, canvas.cavity_sd[box] + 1.5)
    outer = np.maximum(sd - fat - fluid, rest)
    canvas.paint(box, outer - 1.2, 30.0)  # pericardium
    canvas.lung_sd[box] = np.maximum(canvas.lung_sd[box], -outer + 1.2)
    if geometry.pericardial_mm:
        alpha = canvas.paint(box, outer, FLUID_HU)
        canvas.lesion("Pericardial effusion")[box] = (alpha > 0.5) & (sd > fat)
    canvas.paint(box, np.maximum(sd - fat, rest + 1), anatomy.fat_hu + 10)
    heart = np.maximum(sd, rest + 2)
    wall = anatomy.muscle_hu - 6 + 0.45 * (anatomy.blood_hu - 40)
    alpha = canvas.paint(box, heart, wall, mask="heart")
    canvas.masks["heart"][box] |= canvas.alpha(outer) > 0.5
    if canvas.patient.finding("Cardiomegaly"):
        canvas.lesion("Cardiomegaly")[box] = alpha > 0.5
    # Chambers: blood differs from muscle in the contrast phase only.
    axes, radii = geometry.heart_axes, geometry.heart_radii
    left = centre + 0.26 * radii[0] * axes[0] + 10 * scale * np.array([0.5, 0.6, 0])
    canvas.ellipsoid(left, np.array([27.0, 22.0, 24.0]) * scale, anatomy.blood_hu)
    right = centre + np.array([-6.0, -17.0, -4.0]) * scale
    canvas.ellipsoid(right, np.array([26.0, 17.0, 26.0]) * scale, anatomy.blood_hu - 2)
    canvas.ellipsoid(geometry.atrium_centre, geometry.atrium_radii - 4, anatomy.blood_hu - 3)
    canvas.ellipsoid(
        centre + np.array([-4.0, 26.0, 20.0]) * scale, np.array([26.0, 15.0, 18.0]) * scale, anatomy.blood_hu
    )
    # The great vessels leave the heart in front of the atria.
    root = geometry.aorta["ascending aorta"]
    canvas.tube(
        np.stack([centre + np.array([-4, 2, 14]) * scale, root[0], root[1]]),
        geometry.aorta_radii["ascending aorta"],
        anatomy.blood_hu + 2,
    )


def _neck_and_breasts(canvas: Canvas) -> None:
    geometry, anatomy = canvas.geometry, canvas.patient.anatomy
    rng = canvas.patient.rng("neck")
    h, top = geometry.height, geometry.height + anatomy.above
    level = h + 0.45 * anatomy.above
    y = float(np.interp(level, geometry.trachea[::-1, 2], geometry.trachea[::-1, 1]))
    for side in (-1, 1):
        size = rng.uniform(0.85, 1.2)
        canvas.ellipsoid(
            (side * (anatomy.trachea_radius + 8), y + 2, level),
            np.array([8.5, 10, 22]) * size,
            rng.uniform(95, 125),
            mask="thyroid",
        )
        canvas.tube([(side * 30, y + 4, top + 20), (side * 26, y - 4, h + 2)], 6.5, anatomy.blood_hu)
        canvas.tube([(side * 38, y + 20, top + 20), (side * 30, y - 16, h - 6)], 8.0, anatomy.muscle_hu)
    canvas.ellipsoid((0, y - anatomy.trachea_radius - 2, level - 4), (10, 3, 5), 105.0, mask="thyroid")
    breast = canvas.mask("breast")
    for side in (-1, 1):
        centre, radii = breast_shape(canvas, side)
        box = canvas.box(centre - radii, centre + radii)
        x, yy, z = canvas.coordinates(box)
        sd = ellipsoid_sd(x, yy, z, centre, radii)
        chest = -canvas.muscle_sd[box]  # in front of the pectoral muscle
        breast[box] |= (sd < 0) & (chest < 0) & (canvas.body_sd[box] < 0)
        if anatomy.breast:
            strands = np.sin(x / 6.0 + np.sin(z / 7)) * np.sin(yy / 5.0 + 1) + 0.7 * np.sin(z / 6 + x / 9)
            inner = canvas.alpha(ellipsoid_sd(x, yy, z, centre, 0.68 * radii), 8.0) * canvas.alpha(chest + 3)
            share = inner * smoothstep((strands + 2.2 * anatomy.gland - 0.9) / 0.5)
            canvas.blend(box, share * canvas.alpha(canvas.body_sd[box] + 5), 38.0)


def region_masks(canvas: Canvas) -> dict[str, np.ndarray]:
    """Return the ten regions of RadGenome-ChestCT as bool masks on the grid. As there, regions may overlap."""
    masks = canvas.masks
    masks["lung"] &= ~masks["heart"]
    masks["pleura"] &= ~masks["heart"]
    masks["mediastinum"] = (canvas.cavity_sd < 0) & ~masks["lung"] & ~masks["abdomen"] & ~masks["bone"]
    return {name: masks[name] for name in REGIONS}
