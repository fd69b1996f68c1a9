# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Reports of phantom patients in the style of RadGenome-ChestCT, and a labeler that extracts the 18 labels.

The text depends only on the parameters that also determine the image (findings, attributes, sex). Each sentence has
two to four wordings, one of them clearly the most common, as in the reports of one department.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from ..labels_diffvp import DIAGNOSIS_LABELS, REGIONS
from .phantom import LOBES, PhantomPatient

# Probability of each wording, by the number of wordings.
WEIGHTS = {1: (1.0,), 2: (0.75, 0.25), 3: (0.7, 0.2, 0.1), 4: (0.65, 0.18, 0.1, 0.07)}

NORMAL: dict[str, tuple[str, ...]] = {
    "abdomen": (
        "Upper abdominal organs are normal.",
        "No abnormality was detected in the upper abdominal organs.",
        "No space-occupying lesion was detected in the liver.",
    ),
    "bone": (
        "No lytic or destructive lesion was detected.",
        "Bone structures are natural.",
        "Vertebral corpus heights are preserved.",
    ),
    "breast F": ("Both breasts are normal.", "No mass was detected in both breasts."),
    "breast M": ("No gynecomastia was detected.", "No mass was detected in the chest wall."),
    "esophagus": ("Esophageal calibration is normal.", "No pathological wall thickening was detected."),
    "heart": (
        "Heart contour and size are normal.",
        "Heart size is normal and no pericardial effusion was detected.",
        "Cardiac dimensions are within normal limits.",
    ),
    "lung": (
        "Aeration of both lungs is normal and no infiltrative lesion was detected.",
        "No nodule, mass or infiltration was detected in both lungs.",
        "Both lungs have normal aeration without active infiltration.",
    ),
    "mediastinum": (
        "No enlarged lymph nodes were detected.",
        "Mediastinal structures are normal.",
        "No lymph node in pathological size was observed.",
    ),
    "pleura": (
        "No pleural effusion or thickening was detected.",
        "Pleural effusion was not observed.",
        "There is no effusion in both pleural spaces.",
    ),
    "thyroid": ("Thyroid gland is normal.", "No nodule was detected in the thyroid gland."),
    "trachea and bronchie": (
        "Trachea and both main bronchi are open.",
        "No occlusive pathology was detected.",
    ),
}

# Region of the report that mentions each finding.
REGION_OF: dict[str, str] = {
    "Arterial wall calcification": "mediastinum",
    "Cardiomegaly": "heart",
    "Pericardial effusion": "heart",
    "Coronary artery wall calcification": "heart",
    "Hiatal hernia": "esophagus",
    "Lymphadenopathy": "mediastinum",
    "Emphysema": "lung",
    "Atelectasis": "lung",
    "Lung nodule": "lung",
    "Lung opacity": "lung",
    "Pulmonary fibrotic sequela": "lung",
    "Pleural effusion": "pleura",
    "Mosaic attenuation pattern": "lung",
    "Peribronchial thickening": "trachea and bronchie",
    "Consolidation": "lung",
    "Bronchiectasis": "lung",
    "Interlobular septal thickening": "lung",
}
MATERIAL_REGION = {
    "sternal wires": "bone",
    "pacemaker": "heart",
    "port": "mediastinum",
    "central venous catheter": "mediastinum",
}
# Findings are reported in the order of the labels, with the largest changes of the lung first.
LUNG_ORDER = (
    "Consolidation",
    "Lung opacity",
    "Lung nodule",
    "Emphysema",
    "Mosaic attenuation pattern",
    "Interlobular septal thickening",
    "Atelectasis",
    "Pulmonary fibrotic sequela",
    "Bronchiectasis",
)


def _join(names: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _lobes(names: Sequence[str]) -> str:
    """List lobes as a radiologist does, naming both upper or both lower lobes together."""
    ordered = [name for name in LOBES if name in names]
    for level in ("upper", "lower"):
        if f"right {level} lobe" in ordered and f"left {level} lobe" in ordered:
            ordered[ordered.index(f"right {level} lobe")] = f"both {level} lobes"
            ordered.remove(f"left {level} lobe")
    return _join([name if name.startswith("both") else f"the {name}" for name in ordered])


def _sided(side: str, one: str, many: str) -> str:
    return f"both {many}" if side == "both" else f"the {side} {one}"


def wordings(label: str, a: Mapping) -> tuple[str, ...]:
    """Return all wordings of one finding with the attributes `a`, from `sample_attributes`."""
    if label == "Medical material":
        if a["kind"] == "sternal wires":
            return ("Sternotomy wires are observed in the sternum.", "Metallic suture wires are seen in the sternum.")
        if a["kind"] == "pacemaker":
            return (
                f"A pacemaker is observed in the {a['side']} chest wall with its lead in the right heart.",
                f"There is a pacemaker in the {a['side']} anterior chest wall.",
            )
        if a["kind"] == "port":
            return (
                f"A port catheter is observed in the {a['side']} chest wall, ending in the superior vena cava.",
                f"There is a port catheter in the {a['side']} chest wall.",
            )
        return (
            "A central venous catheter is observed in the superior vena cava.",
            "There is a catheter ending in the superior vena cava.",
        )
    if label == "Arterial wall calcification":
        place = _join([f"the {segment}" for segment in a["segments"]])
        amount = {"mild": "Mild", "moderate": "Moderate", "severe": "Severe"}[a["severity"]]
        return (
            f"{amount} calcified atheroma plaques are observed in the wall of {place}.",
            f"{amount} atherosclerotic wall calcifications are seen in {place}.",
            f"There are {a['severity']} calcified plaques in {place}.",
        )
    if label == "Cardiomegaly":
        return (
            f"Heart size is increased, consistent with {a['severity']} cardiomegaly.",
            f"There is {a['severity']} cardiomegaly.",
            f"Heart size is increased ({a['severity']}).",
        )
    if label == "Pericardial effusion":
        t = a["thickness_mm"]
        return (
            f"Pericardial effusion measuring {t} mm in thickness is observed.",
            f"There is pericardial effusion reaching {t} mm.",
            f"Pericardial effusion with a thickness of {t} mm is present.",
        )
    if label == "Coronary artery wall calcification":
        vessels = _join(a["vessels"])
        return (
            f"{a['severity'].capitalize()} coronary artery calcification is observed in the {vessels}.",
            f"There are {a['severity']} calcified plaques in the coronary arteries ({vessels}).",
        )
    if label == "Hiatal hernia":
        return (
            f"A hiatal hernia measuring {a['size_mm']} mm is observed.",
            f"There is a sliding type hiatal hernia of {a['size_mm']} mm at the lower end of the esophagus.",
            f"Hiatal hernia with a diameter of {a['size_mm']} mm is seen.",
        )
    if label == "Lymphadenopathy":
        place, size = _join(a["stations"]), a["short_axis_mm"]
        return (
            f"Enlarged lymph nodes are observed in the {place} region, the largest {size} mm in short axis.",
            f"There are {place} lymphadenopathies with a short axis up to {size} mm.",
            f"Pathologically enlarged {place} lymph nodes are seen, the short axis of the largest is {size} mm.",
        )
    if label == "Emphysema":
        place = _sided(a["side"], "lung", "lungs")
        severity = a["severity"]
        return (
            f"{severity.capitalize()} emphysematous changes are observed in {place}, mainly in the upper zone.",
            f"There is {severity} emphysema in {place}.",
            f"{severity.capitalize()} centrilobular emphysema is seen in {place}.",
        )
    if label == "Atelectasis":
        kind, place = a["kind"], _lobes(a["lobes"])
        return (
            f"{kind.capitalize()} atelectasis is observed in {place}.",
            f"There are {kind} atelectatic changes in {place}.",
            f"{kind.capitalize()} atelectasis areas are seen in {place}.",
        )
    if label == "Lung nodule":
        lobe, size, count = a["lobe"], a["size_mm"], a["count"]
        if count == 1:
            return (
                f"A nodule measuring {size} mm is observed in the {lobe}.",
                f"There is a {size} mm solid nodule in the {lobe}.",
                f"A solitary nodule with a diameter of {size} mm is seen in the {lobe}.",
            )
        number = "Two" if count == 2 else "A few" if count <= 4 else "Multiple"
        return (
            f"{number} nodules are observed in the lungs, the largest measuring {size} mm in the {lobe}.",
            f"There are {number.lower()} solid nodules, the largest {size} mm in the {lobe}.",
            f"{number} pulmonary nodules are seen, the largest in the {lobe} ({size} mm).",
        )
    if label == "Lung opacity":
        place, severity = _lobes(a["lobes"]), a["severity"]
        return (
            f"{severity.capitalize()} ground glass opacities are observed in {place}.",
            f"There are {severity} patchy ground-glass opacities in {place}.",
            f"Areas of {severity} ground glass density are seen in {place}.",
        )
    if label == "Pulmonary fibrotic sequela":
        part = "apex" if a["zone"] == "apex" else "lung base"
        place = _sided(a["side"], part, "apices" if a["zone"] == "apex" else "lung bases")
        return (
            f"Fibrotic sequela changes are observed in {place}.",
            f"There are pleuroparenchymal sequelae in {place}.",
            f"Sequela fibrotic bands are seen in {place}.",
        )
    if label == "Pleural effusion":
        t = a["thickness_mm"]
        if a["side"] == "both":
            return (
                f"Bilateral pleural effusion measuring {t} mm in thickness is observed.",
                f"There is pleural effusion on both sides reaching {t} mm.",
                f"Bilateral pleural effusion up to {t} mm is seen.",
            )
        return (
            f"{a['side'].capitalize()} pleural effusion measuring {t} mm in thickness is observed.",
            f"There is pleural effusion on the {a['side']} side reaching {t} mm.",
            f"A {a['side']} sided pleural effusion up to {t} mm is seen.",
        )
    if label == "Mosaic attenuation pattern":
        return (
            f"{a['severity'].capitalize()} mosaic attenuation pattern is observed in both lungs.",
            f"There is a {a['severity']} mosaic attenuation pattern in both lungs.",
            f"{a['severity'].capitalize()} mosaic perfusion is seen in the lung parenchyma.",
        )
    if label == "Peribronchial thickening":
        place = _sided(a["side"], "lung", "lungs")
        return (
            f"{a['severity'].capitalize()} peribronchial thickening is observed in {place}.",
            f"There is {a['severity']} peribronchial wall thickening in {place}.",
            f"{a['severity'].capitalize()} thickening of the bronchial walls is seen in {place}.",
        )
    if label == "Consolidation":
        return (
            f"A consolidation of {a['size_mm']} mm with air bronchogram is observed in the {a['lobe']}.",
            f"There is a consolidation area measuring {a['size_mm']} mm in the {a['lobe']}.",
            f"A consolidated area with air bronchograms is seen in the {a['lobe']} ({a['size_mm']} mm).",
        )
    if label == "Bronchiectasis":
        place = _lobes(a["lobes"])
        return (
            f"{a['severity'].capitalize()} bronchiectasis is observed in {place}.",
            f"There are {a['severity']} bronchiectatic changes in {place}.",
            f"{a['severity'].capitalize()} tubular bronchiectasis is seen in {place}.",
        )
    if label == "Interlobular septal thickening":
        return (
            f"{a['severity'].capitalize()} interlobular septal thickening is observed in {a['zone']}.",
            f"There is {a['severity']} interlobular septal thickening in {a['zone']}.",
            f"{a['severity'].capitalize()} thickening of the interlobular septa is seen in {a['zone']}.",
        )
    raise ValueError(f"unknown finding {label!r}: expected one of {DIAGNOSIS_LABELS}")


def _pick(sentences: Sequence[str], rng: np.random.Generator) -> str:
    return sentences[int(rng.choice(len(sentences), p=WEIGHTS[len(sentences)]))]


def region_sentences(patient: PhantomPatient, rng: np.random.Generator | None = None) -> dict[str, list[str]]:
    """Write the sentences of each of the ten regions, in canonical order.

    `rng` chooses the wordings. By default, it is the patient's own stream, so that the report is reproducible.
    """
    rng = patient.rng("report") if rng is None else rng
    found: dict[str, list[str]] = {region: [] for region in REGIONS}
    present = {finding.label: finding.attributes for finding in patient.findings}
    order = [label for label in DIAGNOSIS_LABELS if label not in LUNG_ORDER] + list(LUNG_ORDER)
    for label in order:
        if label in present:
            attributes = present[label]
            region = MATERIAL_REGION[attributes["kind"]] if label == "Medical material" else REGION_OF[label]
            found[region].append(_pick(wordings(label, attributes), rng))
    sentences: dict[str, list[str]] = {}
    for region in REGIONS:
        lines = list(found[region])
        if not lines:
            key = f"breast {patient.sex}" if region == "breast" else region
            lines = [_pick(NORMAL[key], rng)]
        sentences[region] = lines
    return sentences


def report_text(regions: Mapping[str, Sequence[str]], impression: str | None = None) -> str:
    """Write one line per region in canonical order: "Abdomen: sentence. sentence.".

    With an `impression` (see [`impression`]) the report has two sections: a line "Findings:" before the regions, and
    "Impression: ..." after them, as [`split_report`] reads them back with `sections=True`.
    """
    text = "\n".join(f"{name.capitalize()}: {' '.join(regions[name])}" for name in REGIONS if regions.get(name))
    return text if impression is None else f"Findings:\n{text}\nImpression: {impression}"


def impression(patient: PhantomPatient) -> str:
    """List the findings by name, as in the impression of a CT-RATE report."""
    present = [label for label in DIAGNOSIS_LABELS if patient.finding(label)]
    return ", ".join(present) + "." if present else "No findings."


# Expressions that name a label in a sentence. Sentences with a negation do not count.
PHRASES: dict[str, str] = {
    "Medical material": r"\bwires?\b|\bpacemaker|\bcatheter",
    "Arterial wall calcification": r"\b(?:calcif\w*|atherosclero\w*)\b.*\b(?:aort\w+)|\baort\w+\b.*\bcalcif",
    "Cardiomegaly": r"\bcardiomegaly\b|\bheart size is increased\b",
    "Pericardial effusion": r"\bpericardial effusion\b",
    "Coronary artery wall calcification": r"\bcoronary\b.*\bcalcif|\bcalcif\w*\b.*\bcoronary\b",
    "Hiatal hernia": r"\bhiatal hernia\b",
    "Lymphadenopathy": r"\blymphadenopath|\benlarged\b.*\blymph nodes?\b",
    "Emphysema": r"\bemphysema",
    "Atelectasis": r"\batelecta(?:sis|tic)\b",
    "Lung nodule": r"\bnodules?\b",
    "Lung opacity": r"\bground[ -]glass\b",
    "Pulmonary fibrotic sequela": r"\bsequelae?\b",
    "Pleural effusion": r"\bpleural effusion\b",
    "Mosaic attenuation pattern": r"\bmosaic\b",
    "Peribronchial thickening": r"\bperibronchial\b.*\bthickening\b|\bthickening of the bronchial walls?\b",
    "Consolidation": r"\bconsolidat(?:ion|ed)\b",
    "Bronchiectasis": r"\bbronchiecta(?:sis|tic)\b",
    "Interlobular septal thickening": r"\bseptal thickening\b|\bthickening of the interlobular septa\b",
}
_PHRASES = {label: re.compile(pattern) for label, pattern in PHRASES.items()}
_NEGATION = re.compile(r"\b(?:no|not|without|normal|free of|absen\w+)\b")
_SENTENCE = re.compile(r"[.;\n]+(?=\s|$)|\n")


def labels_from_report(text: str) -> dict[str, int]:
    """Extract the 18 labels from a report in the phantom's style: 1 if a sentence names the label without negation.

    Sentences are evaluated separately, so that a repeated or truncated sentence in generated text affects only itself.
    """
    labels = dict.fromkeys(DIAGNOSIS_LABELS, 0)
    for sentence in _SENTENCE.split(text.lower()):
        if not sentence or _NEGATION.search(sentence):
            continue
        for label, phrase in _PHRASES.items():
            if phrase.search(sentence):
                labels[label] = 1
    return labels
