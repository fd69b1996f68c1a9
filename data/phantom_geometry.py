# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Geometry of the phantom: analytic surfaces of one patient in mm, and the grid into which they are painted.

The anatomical frame has its origin in the midline, at mid-depth of the trunk and at the height of the costophrenic
angle; x grows to the patient's left, y to posterior, z to superior (LPS). A rigid pose and a smooth warp lead from
the scanner's frame to it. Grids are (z, y, x) in this module; every structure is evaluated only in its box.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

AIR_HU = -1008.0
LOBES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe")

Box = tuple[slice, slice, slice]


def ellipsoid_sd(x, y, z, centre, radii):
    """Compute the signed distance in mm to an axis-parallel ellipsoid, exact to first order near the surface."""
    # Python floats keep float32 grids in float32; NumPy scalars would promote them.
    centre, radii = [float(c) for c in centre], [float(r) for r in radii]
    u, v, w = (x - centre[0]) / radii[0], (y - centre[1]) / radii[1], (z - centre[2]) / radii[2]
    k0 = np.sqrt(u * u + v * v + w * w)
    k1 = np.sqrt((u / radii[0]) ** 2 + (v / radii[1]) ** 2 + (w / radii[2]) ** 2)
    return k0 * (k0 - 1) / np.maximum(k1, 1e-6)


def ellipse_sd(x, y, a, b):
    """Compute the signed distance in mm to an ellipse in the axial plane; a and b may vary with z."""
    u, v = x / a, y / b
    k0 = np.sqrt(u * u + v * v)
    k1 = np.sqrt((u / a) ** 2 + (v / b) ** 2)
    return k0 * (k0 - 1) / np.maximum(k1, 1e-6)


def smoothstep(t):
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def rotation(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Return the rotation about z (roll in the scanner's tube), then x, then y."""
    cz, sz, cx, sx, cy, sy = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch), np.cos(yaw), np.sin(yaw)
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return about_y @ about_x @ about_z


class Geometry:
    """Analytic surfaces of one patient in the anatomical frame; all functions broadcast over x, y, z in mm."""

    def __init__(self, patient):
        self.patient = patient
        anatomy = self.anatomy = patient.anatomy
        self.height = anatomy.lung_height
        self.cavity_a = anatomy.half_width - anatomy.fat - anatomy.wall
        self.cavity_b = anatomy.half_depth - 0.7 * anatomy.fat - 0.75 * anatomy.wall
        self.cavity_y = -4.0
        self.spine_y = self.cavity_y + self.cavity_b - 21.0
        rng = patient.rng("warp")
        self._warp = [
            [
                (
                    rng.uniform(0.8, 1.9),
                    (2 * np.pi / rng.uniform(170, 320, 3)).tolist(),
                    rng.uniform(0, 2 * np.pi, 3).tolist(),
                )
                for _ in range(2)
            ]
            for _ in range(3)
        ]
        flat = [wave for waves in self._warp for wave in waves]
        self._warp_arrays = tuple(np.array([wave[i] for wave in flat]) for i in range(3))
        self._rotation = rotation(anatomy.roll, anatomy.pitch, anatomy.yaw)
        self._pivot = np.array([0.0, 0.0, 0.5 * self.height])
        self._shift = np.array([anatomy.shift_x, anatomy.shift_y, 0.0])
        self._set_centrelines()
        self._set_heart()

    # Pose and warp -------------------------------------------------------------------------------------------------

    def to_anatomy(self, x, y, z):
        """Transform scanner mm to anatomical mm."""
        r, p, shift = self._rotation.tolist(), self._pivot.tolist(), self._shift.tolist()
        dx, dy, dz = x - shift[0] - p[0], y - shift[1] - p[1], z - shift[2] - p[2]
        out = [r[i][0] * dx + r[i][1] * dy + r[i][2] * dz + p[i] for i in range(3)]
        for axis, waves in enumerate(self._warp):
            for amplitude, k, phase in waves:
                wave = np.sin(k[0] * x + phase[0]) * np.sin(k[1] * y + phase[1])
                out[axis] = out[axis] + amplitude * (wave * np.sin(k[2] * z + phase[2]))
        t = (z - 0.5 * self.height) / (0.5 * self.height)
        out[1] = out[1] + self.anatomy.kyphosis * np.minimum(t * t, 2.0)
        return out

    def to_scanner(self, points: np.ndarray) -> np.ndarray:
        """Invert `to_anatomy` for (n, 3) points by fixed-point iteration (the warp's strain is < 0.3)."""
        world = np.array(points, dtype=np.float64)
        amplitude, k, phase = self._warp_arrays
        for _ in range(6):
            # `to_anatomy` for a few points, all waves at once.
            waves = amplitude * np.sin(world[:, None, :] * k + phase).prod(-1)
            mapped = (world - self._shift - self._pivot) @ self._rotation.T + self._pivot
            mapped += waves.reshape(-1, 3, 2).sum(-1)
            t = (world[:, 2] - 0.5 * self.height) / (0.5 * self.height)
            mapped[:, 1] += self.anatomy.kyphosis * np.minimum(t * t, 2.0)
            world += (points - mapped) @ self._rotation
        return world

    # Trunk, cavity, lungs ------------------------------------------------------------------------------------------

    def trunk_sd(self, x, y, z):
        """Compute the signed distance to the skin of trunk and neck, without shoulders and breasts."""
        anatomy = self.anatomy
        t = z / self.height
        # Below the shoulders the trunk is a rounded box, above them it tapers to the neck.
        neck = smoothstep((t - 0.92) / 0.24)
        bulge = (t - 0.45) ** 2
        a = (anatomy.half_width - 0.05 * anatomy.half_width * bulge) * (1 - 0.58 * neck)
        b = (anatomy.half_depth - 0.06 * anatomy.half_depth * bulge) * (1 - 0.36 * neck)
        u2, v2 = (x / a) ** 2, ((y - 6 * neck) / b) ** 2
        # u2 and v2 are at most 1 inside; unclipped, their product would close the body again in the grid's corners.
        k = np.sqrt(np.maximum(u2 + v2 - 0.42 * np.minimum(u2, 1) * np.minimum(v2, 1), 1e-6))
        return (k - 1) * np.minimum(np.sqrt(x * x + y * y) / k, a)

    def shoulder(self, side: int):
        """Return centre and radii of the shoulder with the root of the raised arm."""
        anatomy = self.anatomy
        centre = np.array([side * 0.82 * anatomy.half_width, 8.0, self.height])
        return centre, np.array([0.36 * anatomy.half_width, 0.62 * anatomy.half_depth, 0.28 * self.height])

    def cavity_scale(self, z):
        t = np.clip((z - 0.36 * self.height) / (0.64 * self.height), 0, 1)
        taper = np.sqrt(np.maximum(1 - t * t * np.sqrt(np.sqrt(t)), 0))
        return np.maximum(taper, 0.05) * (1 - 0.05 * np.clip(-z / 60, -1, 1))

    def cavity_sd(self, x, y, z):
        scale = self.cavity_scale(z)
        # The apices lie towards the back, under the first ribs.
        y = y - self.cavity_y - 0.30 * self.cavity_b * (1 - scale)
        return ellipse_sd(x, y, self.cavity_a * scale, self.cavity_b * (0.25 + 0.75 * scale))

    def dome(self, x, y):
        """Return the height of the diaphragm in mm."""
        anatomy, a, b = self.anatomy, self.cavity_a, self.cavity_b
        top = np.where(x < 0, anatomy.dome_right, anatomy.dome_left)
        offset = np.abs(x) - 0.46 * a
        u = offset / np.where(offset > 0, 0.60 * a, 1.05 * a)
        v = (y - self.cavity_y + 0.12 * b) / (1.10 * b)
        return top * (1.04 - u * u - v * v)

    def mediastinal_half_width(self, y, z):
        wide = np.exp(-(((y + 2) / 38) ** 2))
        behind = smoothstep((y - self.spine_y + 30) / 20)
        return np.maximum(7 + 17 * wide * (1.1 - 0.35 * z / self.height), 21 * behind)

    def lung_sd(self, x, y, z):
        """Compute the signed distance to the lungs before the heart is cut out (negative inside)."""
        sd = np.maximum(self.cavity_sd(x, y, z) + 1.0, self.mediastinal_half_width(y, z) - np.abs(x))
        sd = np.maximum(sd, 0.75 * (self.dome(x, y) - z))
        return np.maximum(sd, z - self.height)

    def major_fissure(self, y):
        return 0.40 * self.height + 0.34 * self.height * (y / self.cavity_b)

    @property
    def minor_fissure(self) -> float:
        return 0.47 * self.height

    def lobe(self, x, y, z):
        """Return the index into `LOBES` for points inside the lungs."""
        lower = z < self.major_fissure(y)
        right = np.where(lower, 2, np.where(z < self.minor_fissure, 1, 0))
        return np.where(x < 0, right, np.where(lower, 4, 3))

    # Heart ---------------------------------------------------------------------------------------------------------

    def _set_heart(self):
        anatomy, patient = self.anatomy, self.patient
        enlarged = patient.finding("Cardiomegaly")
        ratio = enlarged.attributes["cardiothoracic_ratio"] if enlarged else anatomy.cardiothoracic_ratio
        axis = np.array([np.cos(-0.55 + anatomy.heart_tilt) * 0.88, np.sin(-0.55 + anatomy.heart_tilt) * 0.88, -0.44])
        axis /= np.linalg.norm(axis)
        second = np.cross(axis, [0, 0, 1.0])
        second /= np.linalg.norm(second)
        self.heart_axes = np.stack([axis, second, np.cross(second, axis)])  # rows: to the apex, right, superior
        radii = np.array([60.0, 41.0, 43.0])
        atrium = np.array([-26.0, 4.0, 8.0])
        left = 16 + np.linalg.norm(radii * self.heart_axes[:, 0])
        right = max(np.linalg.norm(radii * self.heart_axes[:, 0]) - 16, 26 + 27.0)
        self.heart_scale = ratio * 2 * self.cavity_a / (left + right)
        scale = self.heart_scale
        centre_z = 0.30 * (anatomy.dome_left + anatomy.dome_right) + 40 * scale
        self.heart_centre = np.array([16 * scale, -22 - 8 * (scale - 1), centre_z])
        self.heart_radii = radii * scale
        self.atrium_centre = self.heart_centre + np.array([-16 * scale, 0, 0]) + atrium * scale
        self.atrium_radii = np.array([27.0, 30.0, 36.0]) * scale
        effusion = patient.finding("Pericardial effusion")
        self.pericardial_mm = float(effusion.attributes["thickness_mm"]) if effusion else 0.0

    def heart_sd(self, x, y, z):
        """Compute the signed distance to the myocardium; epicardial fat and pericardium are outside."""
        d = [w - float(c) for w, c in zip((x, y, z), self.heart_centre, strict=True)]
        local = [sum(float(axis[i]) * d[i] for i in range(3)) for axis in self.heart_axes]
        sd = ellipsoid_sd(*local, (0, 0, 0), self.heart_radii)
        return np.minimum(sd, ellipsoid_sd(x, y, z, self.atrium_centre, self.atrium_radii))

    def pericardium_mm(self, x, y, z):
        """Return the thickness of pericardial fluid in a direction: largest posterior, inferior and left."""
        if not self.pericardial_mm:
            return 0.0
        c, r = self.heart_centre.tolist(), self.heart_radii.tolist()
        lean = 0.35 * (x - c[0]) / r[0] + 0.5 * (y - c[1]) / r[1] - 0.4 * (z - c[2]) / r[2]
        return self.pericardial_mm * np.clip(0.72 + 0.5 * lean, 0.35, 1.0)

    # Pleural space -------------------------------------------------------------------------------------------------

    def effusion_sd(self, x, y, z):
        """Compute the signed distance to free pleural fluid in the lung outline (positive without fluid)."""
        finding = self.patient.finding("Pleural effusion")
        if finding is None:
            return np.float32(1e3)
        thickness = float(finding.attributes["thickness_mm"])
        scale = self.cavity_scale(z)
        behind = (y - self.cavity_y) / (self.cavity_b * (0.25 + 0.75 * scale))
        level = np.clip(1.35 - z / (75 + 2.2 * thickness), 0, 1)
        depth = thickness * smoothstep((behind + 0.15) / 0.85) * np.sqrt(level)
        # The layer ends at its thin edge, instead of lining the whole pleura with partial volume.
        sd = -self.cavity_sd(x, y, z) - 1.0 - depth + 4.0 * np.clip(1 - depth / 4.0, 0, 1)
        side = finding.attributes["side"]
        if side != "both":
            sd = np.where((x < 0) == (side == "right"), sd, 1e3)
        return sd

    def aerated_sd(self, points: np.ndarray) -> np.ndarray:
        """Compute the signed distance of (n, 3) points to aerated lung, without heart and pleural fluid."""
        x, y, z = points.T
        heart = 4.0 + self.pericardium_mm(x, y, z) - self.heart_sd(x, y, z)
        return np.maximum(np.maximum(self.lung_sd(x, y, z), heart), -self.effusion_sd(x, y, z))

    def lung_points(self, rng, count: int, *, side: int = 0, margin: float = 3.0, where=None) -> np.ndarray:
        """Draw `count` points at least `margin` mm inside the aerated lung; side -1 right, 1 left, 0 both.

        `where` maps (x, y, z) to a bool mask. If too few candidates qualify, the deepest ones are taken.
        """
        n = max(400, 60 * count)
        low = np.array([-self.cavity_a, self.cavity_y - self.cavity_b, 0.0])
        high = np.array([self.cavity_a, self.cavity_y + self.cavity_b, self.height])
        points = rng.uniform(low, high, (n, 3))
        if side:
            points[:, 0] = side * np.abs(points[:, 0])
        if where is not None:
            points = points[where(*points.T)]
        depth = self.aerated_sd(points)
        good = points[depth < -margin]
        if len(good) >= count:
            return good[:count]
        return points[np.argsort(depth, kind="stable")[:count]]

    # Tubes ---------------------------------------------------------------------------------------------------------

    def _set_centrelines(self):
        h, r, ys = self.height, self.anatomy.aorta_radius, self.spine_y
        arch, carina = self.anatomy.arch_height * h, self.anatomy.carina_height * h
        top = h + self.anatomy.above + 25
        self.hilum = {-1: np.array([-39.0, 8.0, carina - 0.06 * h]), 1: np.array([41.0, 11.0, carina - 0.04 * h])}
        self.carina = np.array([0.0, 12.0, carina])
        line = lambda *points: np.array(points, dtype=np.float64)  # noqa: E731
        self.trachea = line((0, -6, top), (0, 2, 0.9 * h), (1, 8, 0.78 * h), tuple(self.carina))
        self.main_bronchi = {
            -1: line(tuple(self.carina), (-18, 11, carina - 0.05 * h), tuple(self.hilum[-1])),
            1: line(tuple(self.carina), (20, 12, carina - 0.055 * h), tuple(self.hilum[1])),
        }
        self.aorta = {
            "ascending aorta": line(
                (2, -18, 0.44 * h), (-9, -26, 0.53 * h), (-12, -26, 0.64 * h), (-8, -22, 0.72 * h)
            ),
            "aortic arch": line(
                (-8, -22, 0.72 * h), (2, -12, arch), (14, 6, arch + 2), (22, 24, arch - 5), (24, 33, 0.69 * h)
            ),
            "descending aorta": line(
                (24, 33, 0.69 * h),
                (24, ys - 24, 0.55 * h),
                (21, ys - 25, 0.3 * h),
                (14, ys - 29, 0.1 * h),
                (9, ys - 31, -80),
            ),
        }
        self.aorta_radii = {"ascending aorta": 1.08 * r, "aortic arch": 0.95 * r, "descending aorta": 0.85 * r}
        self.veins = [
            (line((-25, -14, 0.44 * h), (-25, -16, 0.6 * h), (-24, -18, 0.78 * h)), 9.5),
            (line((-24, -18, 0.78 * h), (-26, -18, 0.88 * h), (-30, -16, top)), 7.0),
            (line((-24, -20, 0.78 * h), (0, -34, 0.83 * h), (24, -22, 0.9 * h), (32, -16, top)), 6.0),
            (line((-19, ys - 36, -80), (-20, ys - 42, 0.1 * h), (-22, 0, 0.3 * h)), 11.0),
        ]
        self.arteries = [
            (line((12, -34, 0.44 * h), (17, -32, 0.52 * h), (16, -20, 0.59 * h), (10, -8, 0.61 * h)), 0.95 * r),
            (line((10, -8, 0.60 * h), (-14, -4, 0.585 * h), (-42, 4, 0.57 * h)), 9.5),
            (line((10, -8, 0.61 * h), (28, 6, 0.635 * h), (44, 14, 0.61 * h)), 9.5),
            (line((-1, -12, arch + 6), (-14, -8, 0.9 * h), (-22, -4, top)), 5.5),
            (line((10, 2, arch + 8), (16, 0, 0.92 * h), (22, -2, top)), 4.2),
            (line((19, 18, arch + 6), (27, 14, 0.92 * h), (40, 10, top)), 4.6),
        ]
        self.oesophagus = line(
            (4, 12, top),
            (6, 22, 0.8 * h),
            (5, 27, 0.62 * h),
            (7, ys - 34, 0.42 * h),
            (15, ys - 42, 0.24 * h),
            (24, ys - 50, 0.12 * h),
        )


class Canvas:
    """Grid for painting: HU in float32 (z, y, x), coordinates in the anatomical frame, and masks."""

    def __init__(self, patient, geometry: Geometry, matrix: int, slice_mm: float):
        self.patient, self.geometry = patient, geometry
        anatomy = patient.anatomy
        pixel = patient.fov_mm / matrix
        slices = int(np.ceil((anatomy.below + geometry.height + anatomy.above) / slice_mm))
        self.spacing = (float(pixel), float(pixel), float(slice_mm))
        self.shape = (slices, matrix, matrix)
        first = np.array([-0.5 * pixel * (matrix - 1), -0.5 * pixel * (matrix - 1), -anatomy.below])
        self.first = first
        self.axes = tuple(
            (first[i] + self.spacing[i] * np.arange(self.shape[2 - i])).astype(np.float32) for i in range(3)
        )
        x, y, z = (np.float32(axis) for axis in self.axes)
        grid = geometry.to_anatomy(x[None, None, :], y[None, :, None], z[:, None, None])
        self.x, self.y, self.z = (np.ascontiguousarray(np.broadcast_to(g, self.shape), np.float32) for g in grid)
        self.soft = float(max(pixel, 0.55 * pixel + 0.35 * slice_mm))
        self.hu = np.full(self.shape, AIR_HU, np.float32)
        # Signed distances that painters share, set by the painter of the structure: to the skin, to the surface of
        # the muscles, to the pleural and abdominal cavity, to aerated lung; and the course of the sternum.
        self.body_sd = self.muscle_sd = self.cavity_sd = self.lung_sd = np.empty(0, np.float32)
        self.sternum = np.empty((0, 3))
        self.airways: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.masks: dict[str, np.ndarray] = {}
        self._lesions: dict[str, np.ndarray] = {}

    def affine(self) -> np.ndarray:
        """Return the affine from voxel (x, y, z) to RAS+ mm. The array axes run to L, P, S, so x and y change sign."""
        sx, sy, sz = self.spacing
        affine = np.diag([-sx, -sy, sz, 1.0])
        affine[:3, 3] = (-self.first[0], -self.first[1], self.first[2])
        return affine

    def box(self, low, high, pad: float = 0.0) -> Box:
        """Return slices that cover an axis-parallel box of the anatomical frame."""
        low, high = np.asarray(low, float), np.asarray(high, float)
        corners = np.array(
            [[(low, high)[i][0], (low, high)[j][1], (low, high)[k][2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        )
        world = self.geometry.to_scanner(corners)
        pad += 5.0  # the warp bends the faces of the box
        return self.slices(world.min(0, keepdims=True) - pad, world.max(0, keepdims=True) + pad)[0]

    def boxes(self, centres: np.ndarray, radii, pad: float = 0.0) -> list[Box]:
        """Return slices around each of (n, 3) balls in the anatomical frame."""
        world = self.geometry.to_scanner(np.atleast_2d(centres))
        reach = 1.2 * np.reshape(radii, (-1, 1)) + pad
        return self.slices(world - reach, world + reach)

    def slices(self, low: np.ndarray, high: np.ndarray) -> list[Box]:
        """Return slices that cover (n, 3) boxes of the scanner frame."""
        spacing, size = np.array(self.spacing), np.array(self.shape[::-1])
        start = np.clip(np.floor((low - self.first) / spacing), 0, size).astype(int)
        stop = np.clip(np.ceil((high - self.first) / spacing) + 1, 0, size).astype(int)
        return [
            tuple(slice(int(a), int(b)) for a, b in zip(s[::-1], e[::-1], strict=True))
            for s, e in zip(start, stop, strict=True)
        ]

    def coordinates(self, box: Box):
        return self.x[box], self.y[box], self.z[box]

    def alpha(self, sd, soft: float | None = None):
        """Convert a signed distance in mm to coverage in [0, 1]."""
        return np.clip(0.5 - sd / (soft or self.soft), 0, 1)

    def blend(self, box: Box, alpha, hu) -> None:
        part = self.hu[box]
        part += alpha * (hu - part)

    def paint(self, box: Box, sd, hu, *, mask: str | None = None):
        alpha = self.alpha(sd)
        self.blend(box, alpha, hu)
        if mask is not None:
            self.mask(mask)[box] |= alpha > 0.5
        return alpha

    def mask(self, name: str) -> np.ndarray:
        return self.masks.setdefault(name, np.zeros(self.shape, bool))

    def lesion(self, label: str) -> np.ndarray:
        return self._lesions.setdefault(label, np.zeros(self.shape, bool))

    def ellipsoid(self, centre, radii, hu, *, cut=None, mask=None):
        centre, radii = np.asarray(centre, float), np.asarray(radii, float)
        box = self.box(centre - radii, centre + radii, pad=self.soft)
        x, y, z = self.coordinates(box)
        sd = ellipsoid_sd(x, y, z, centre, radii)
        if cut is not None:
            sd = np.maximum(sd, cut(x, y, z))
        return box, self.paint(box, sd, hu, mask=mask)

    def capsules(self, starts, ends, radii_start, radii_end):
        """Yield (box, signed distance) of tapered tubes given by (n, 3) end points and (n,) radii."""
        starts, ends = np.atleast_2d(starts), np.atleast_2d(ends)
        world = self.geometry.to_scanner(np.concatenate([starts, ends]))
        n = len(starts)
        reach = (1.2 * np.maximum(radii_start, radii_end) + self.soft).reshape(-1, 1)
        boxes = self.slices(np.minimum(world[:n], world[n:]) - reach, np.maximum(world[:n], world[n:]) + reach)
        for box, p, q, r0, r1 in zip(boxes, starts, ends, radii_start, radii_end, strict=True):
            if any(s.stop <= s.start for s in box):
                continue
            x, y, z = self.coordinates(box)
            d = q - p
            dx, dy, dz = x - np.float32(p[0]), y - np.float32(p[1]), z - np.float32(p[2])
            t = (dx * np.float32(d[0]) + dy * np.float32(d[1]) + dz * np.float32(d[2])) / np.float32(max(d @ d, 1e-6))
            t = np.clip(t, 0, 1)
            dx -= t * np.float32(d[0])
            dy -= t * np.float32(d[1])
            dz -= t * np.float32(d[2])
            yield box, np.sqrt(dx * dx + dy * dy + dz * dz) - (np.float32(r0) + t * np.float32(r1 - r0))

    def tube(self, points, radius, hu, *, mask: str | None = None, lesion: str | None = None) -> None:
        """Paint a polyline of capsules; `radius` is one number or one per point."""
        points = np.asarray(points, float)
        radii = np.broadcast_to(np.asarray(radius, float), (len(points),))
        for box, sd in self.capsules(points[:-1], points[1:], radii[:-1], radii[1:]):
            alpha = self.paint(box, sd, hu, mask=mask)
            if lesion is not None:
                self.lesion(lesion)[box] |= alpha > 0.5

    def acquire(self) -> np.ndarray:
        """Simulate the scanner: point spread of the kernel, noise, clipping, and rounding to int16 HU."""
        patient = self.patient
        sharp = patient.kernel == "sharp"
        hu = self.hu
        if not sharp:
            hu = ndimage.gaussian_filter1d(ndimage.gaussian_filter1d(hu, 0.45, axis=1), 0.45, axis=2)
        noise = patient.rng(f"noise{patient.visit}").standard_normal(self.shape, dtype=np.float32)
        blur = 0.5 if sharp else 0.9
        noise = ndimage.gaussian_filter1d(
            ndimage.gaussian_filter1d(noise, blur, axis=1, truncate=3), blur, axis=2, truncate=3
        )
        if sharp:
            noise -= ndimage.uniform_filter(noise, (1, 5, 5))
        sigma = patient.anatomy.noise * np.sqrt(3.0 / self.spacing[2]) / noise.std()
        outside = self.body_sd > 1.5 * self.soft
        hu = hu + np.float32(sigma) * noise
        # Air around the patient reads at most -1000 HU, so that "HU > -1000" finds the body, as in real scans whose
        # background is the padding value.
        hu[outside] = np.clip(AIR_HU + 0.25 * sigma * noise[outside], -1024, -1000)
        return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
