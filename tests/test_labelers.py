# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Rule labeler: each language rule, and the agreement with manual labels if these are available."""

import csv
import json
import random

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffvp.experiments import labeler as experiment
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.metrics.clinical_efficacy import classification_scores
from diffvp.metrics.labelers import RuleLabeler
from diffvp.metrics.labelers.markup import without_markup
from diffvp.metrics.labelers.rules import RULES_FILE

LABELER = RuleLabeler()
EXAMPLES = [(rule, text) for rule in LABELER.rules for text in rule.examples]
COUNTEREXAMPLES = [(rule, text) for rule in LABELER.rules for text in rule.counterexamples]
SENTENCES = [text for _, text in EXAMPLES + COUNTEREXAMPLES] + ["Trachea is open.", "No abnormality was detected."]


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> RuleLabeler:
    """Labeler without its speed filters: every sentence with a space is examined."""
    document = yaml.safe_load(RULES_FILE.read_text(encoding="utf-8"))
    for entry in document["labels"].values():
        entry["words"] = [" "]
    path = tmp_path_factory.mktemp("rules") / "slow.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return RuleLabeler(path)


def found(report: str) -> set[str]:
    return {label for label, value in LABELER.label(report).items() if value}


@pytest.mark.parametrize(("rule", "text"), EXAMPLES, ids=lambda value: getattr(value, "name", None))
def test_examples_of_each_rule_are_positive(rule, text):
    hits = [hit for hit in LABELER.explain(text) if (hit.label, hit.rule) == (rule.label, rule.name)]
    assert any(hit.counts for hit in hits)
    assert rule.label in found(text)


@pytest.mark.parametrize(("rule", "text"), COUNTEREXAMPLES, ids=lambda value: getattr(value, "name", None))
def test_counterexamples_of_each_rule_are_negative(rule, text):
    assert rule.label not in found(text)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        # negated before, after, in lists and in one-word answers
        ("No pleural effusion or thickening.", set()),
        ("No pleural or pericardial effusion, consolidation, or nodule.", set()),
        ("Consolidation, ground glass opacity and effusion are not observed.", set()),
        ("Neither effusion nor consolidation is seen.", set()),
        ("Pleural effusion: none.", set()),
        ("Pleural effusion: present.", {"Pleural effusion"}),
        ("There isn't any pleural effusion.", set()),
        ("Pleural effusion or thickening wasn't observed.", set()),
        ("The lungs are clear without consolidation, effusion or nodule.", set()),
        ("Lungs are free of nodules.", set()),
        ("Heart is not enlarged.", set()),
        ("Heart size is normal, without pericardial effusion.", set()),
        # the negation ends with its clause
        ("No pleural effusion, but there is pericardial effusion.", {"Pericardial effusion"}),
        ("Pericardial effusion was not observed, pleural effusion is observed on the right.", {"Pleural effusion"}),
        ("No nodule was detected in the lungs, and effusion is observed.", {"Pleural effusion"}),
        ("No nodule except for a calcified nodule in the left lung.", {"Lung nodule"}),
        ("Effusion is not seen on the left but is present on the right.", {"Pleural effusion"}),
        ("Pleural effusion was observed on the right and not observed on the left.", {"Pleural effusion"}),
        ("A few lymph nodes are observed, and no enlarged lymph nodes are detected.", {"Lymphadenopathy"}),
        # phrases that look like negations but are not
        ("There is no increase in pleural effusion.", {"Pleural effusion"}),
        ("No significant change in the size of the nodules in the right lung.", {"Lung nodule"}),
        ("Nodules are not enlarged compared with the previous examination.", {"Lung nodule"}),
        ("No increase in wall thickness in the esophagus.", set()),
        ("A pleural effusion cannot be excluded.", {"Pleural effusion"}),
        ("Mediastinal lymph nodes whose short axis does not exceed 1 cm.", {"Lymphadenopathy"}),
        # history
        ("The previously described consolidation has completely resolved.", set()),
        ("Nodule is no longer seen in the right lung.", set()),
        ("In the previous examination, a nodule was observed in the right lung.", set()),
        (
            "In the previous examination a nodule was seen, which is stable in the current examination.",
            {"Lung nodule"},
        ),
        ("The lung nodule, which was not observed in the previous examination, is 5 mm.", {"Lung nodule"}),
        ("The nodules observed in the previous examination are not observed now.", set()),
        ("The pleural effusion on the right has decreased.", {"Pleural effusion"}),
        ("With a history of atelectasis, emphysema is observed.", {"Emphysema"}),
        # anatomical sites
        ("Thyroid nodule.", set()),
        ("A 2 cm nodule in the left adrenal gland.", set()),
        ("Nodules in the liver and emphysema in both lungs.", {"Emphysema"}),
        ("Aortic valve calcification.", set()),
        ("Small amount of fluid in the right pleural space.", {"Pleural effusion"}),
        ("Calcified plaques in the pleura.", set()),
        # headings, items of an impression, no space after the full stop, a wrapped line
        ("LUNGS: 4 mm nodule.\nPLEURA: no effusion.", {"Lung nodule"}),
        ('Trachea is open. " Hiatal hernia " Atelectasis in both lungs', {"Hiatal hernia", "Atelectasis"}),
        ("• Emphysema • No nodule", {"Emphysema"}),
        ("No consolidation.Atelectasis is observed.", {"Atelectasis"}),
        ("No pleural\neffusion.", set()),
        ("Compared with 16.03. 2020 the nodule of 9.5 mm in the right lung is stable.", {"Lung nodule"}),
        ("No acute finding. Lungs are clear!", set()),
    ],
)
def test_negation_history_and_location_are_understood(text, labels):
    assert found(text) == labels


WORDINGS = [
    # negated after the finding: no, none, (-)
    ("Effusion, no.", set()),
    ("Effusion: no", set()),
    ("Pleural effusion - no.", set()),
    ("Pleural effusion – none", set()),
    ("Pleural effusion; none.", set()),
    ("Pleural effusion, none", set()),
    ("Pleural effusion = no", set()),
    ("Pleural effusion (no)", set()),
    ("Pleural effusion: nil.", set()),
    ("Pleural effusion? No.", set()),
    ("Pleural effusion: No\nPericardial effusion: No", set()),
    ("Effusion, no pneumothorax.", {"Pleural effusion"}),
    ("Pleural effusion, no pericardial effusion.", {"Pleural effusion"}),
    ("Pleural effusion: yes, pericardial effusion: no", {"Pleural effusion"}),
    ("Pleural effusion, yes; consolidation, no; lung nodule, no.", {"Pleural effusion"}),
    ("Lung nodule: no, pleural effusion: yes.", {"Pleural effusion"}),
    ("Pleural effusion, pericardial effusion, consolidation: none.", set()),
    ("Pleural effusion, no, consolidation, yes.", {"Consolidation"}),
    ("pleural effusion (-)", set()),
    ("Pleural effusion (\u2212).", set()),
    ("Pleural effusion(-), pericardial effusion(-)", set()),
    ("pleural effusion (+), pericardial effusion (-)", {"Pleural effusion"}),
    ("pericardial effusion (-), pleural effusion (+)", {"Pleural effusion"}),
    ("Pleural effusion [-]", set()),
    ("Pleural effusion: (-)", set()),
    ("Pleural effusion: -", set()),
    ("Pleural effusion -, emphysema +", {"Emphysema"}),
    ("Pleural effusion -ve.", set()),
    ("Pleural effusion (+/-)", {"Pleural effusion"}),
    ("Pleural effusion (+)", {"Pleural effusion"}),
    ("(-) pleural effusion", set()),
    ("Effusion: absent.", set()),
    ("Pleural effusion: negative", set()),
    ("Pleural effusion absent.", set()),
    ("Pleural effusion is negative.", set()),
    ("Consolidation (absent), emphysema (present).", {"Emphysema"}),
    ("Pericardial effusion(-) Pleural effusion(+)", {"Pleural effusion"}),
    ("pleural effusion ( - )", set()),
    ("pleural effusion\uff08\u2212\uff09", set()),
    ("pleural effusion (neg.)", set()),
    ("Pleural effusion (neg)", set()),
    ("Pleural effusion, absent", set()),
    ("Pleural effusion—none", set()),
    ("Effusion, not seen", set()),
    ("Effusion - not seen.", set()),
    ("Pleural effusion: not present.", set()),
    ("Pleural effusion, none seen.", set()),
    ("Pleural effusion: no evidence.", set()),
    ("Pleural effusion no", set()),
    ("Image no. 45: emphysema.", {"Emphysema"}),
    ("Nodule in the right lung (series no: 3, image no: 120).", {"Lung nodule"}),
    ("A nodule of 5-6 mm in the right lung.", {"Lung nodule"}),
    ("Pleural effusion +", {"Pleural effusion"}),
    ("Pleural effusion-thickening was not detected.", set()),
    ("There is no effusion. None of the nodules in the right lung is new.", {"Lung nodule"}),
    ("Pneumonia PCR negative, consolidation in the left lung.", {"Consolidation"}),
    # removed devices
    ("catheter removed", set()),
    ("Catheter removed.", set()),
    ("Central venous catheter removed since the prior study.", set()),
    ("Pacemaker extracted.", set()),
    ("Port explanted.", set()),
    ("Chest tube has been withdrawn.", set()),
    ("Status post catheter removal.", set()),
    ("After extraction of the pacemaker.", set()),
    ("Catheter not removed.", {"Medical material"}),
    ("The catheter should be removed.", {"Medical material"}),
    ("Catheter removed, a stent is observed.", {"Medical material"}),
    ("Catheter removed and a port is in place.", {"Medical material"}),
    ("The old catheter removed, new catheter placed.", {"Medical material"}),
    ("Endotracheal tube: removed.", set()),
    ("Interval removal of the chest tube.", set()),
    ("Catheter (removed).", set()),
    ("Catheter has since been removed.", set()),
    ("Catheter removed, lungs clear.", set()),
    ("The catheter is no longer in place.", set()),
    ("Pacemaker lead extraction was performed.", set()),
    ("Drain taken out.", set()),
    ("Port removed in 2019.", set()),
    ("Status post removal of the port.", set()),
    ("Clips of the removed gallbladder are observed.", {"Medical material"}),
    ("Catheter replaced.", {"Medical material"}),
    ("A stent, which was removed last year, is not observed.", set()),
    ("The catheter has not been removed.", {"Medical material"}),
    # a negation ends before a new subject
    ("no calcification in coronary arteries, aorta calcified", {"Arterial wall calcification"}),
    ("No calcification in the coronary arteries, the aorta is calcified.", {"Arterial wall calcification"}),
    ("No effusion, heart enlarged.", {"Cardiomegaly"}),
    ("No pleural effusion, the heart is enlarged.", {"Cardiomegaly"}),
    ("No effusion, a 4 mm nodule in the right lung.", {"Lung nodule"}),
    ("No effusion, mild atelectasis in both lungs.", {"Atelectasis"}),
    ("No pleural effusion, 5 mm nodule in the left lung.", {"Lung nodule"}),
    ("No effusion, consolidation, nodule.", set()),
    ("No pleural effusion, consolidation or nodule is seen.", set()),
    ("No nodule, mass or effusion present.", set()),
    ("No effusion, pneumothorax, atelectasis is seen.", set()),
    ("Aorta calcified, coronary calcification not seen.", {"Arterial wall calcification"}),
    ("No calcified plaques, enlarged lymph nodes, thickened septa.", set()),
    ("Without effusion, bronchi are dilated in the lower lobes.", {"Bronchiectasis"}),
    ("No pericardial effusion, pleural effusion present.", {"Pleural effusion"}),
    ("No pericardial effusion; pleural effusion present.", {"Pleural effusion"}),
    ("No coronary calcification, aortic wall calcified.", {"Arterial wall calcification"}),
    ("No effusion, lungs emphysematous.", {"Emphysema"}),
    ("No nodules, heart size increased.", {"Cardiomegaly"}),
    ("No pericardial effusion, left pleural effusion measuring 5 mm.", {"Pleural effusion"}),
    ("No lymph node, lung nodule larger than 5 mm.", set()),
    ("No coronary calcification - aorta calcified.", {"Arterial wall calcification"}),
    ("No calcification in the coronary arteries and the aorta is calcified.", {"Arterial wall calcification"}),
    ("No effusion while there is emphysema.", {"Emphysema"}),
    ("No effusion, whereas the heart is enlarged.", {"Cardiomegaly"}),
    ("Calcified plaques in the aorta, no calcification in the coronary arteries.", {"Arterial wall calcification"}),
    # markup, escapes, zero-width characters
    ("No pleural effusion._x000D_\nCardiomegaly.", {"Cardiomegaly"}),
    ("No effusion_x000D_Atelectasis in both lungs", {"Atelectasis"}),
    ("No effusion<br>Atelectasis in both lungs<br/>", {"Atelectasis"}),
    ("No pleural<br>effusion", set()),
    ("<p>No effusion</p><p>Emphysema</p>", {"Emphysema"}),
    ("Pleural effu\u00adsion is seen.", {"Pleural effusion"}),
    ("Pleural ef\u200bfusion is seen", {"Pleural effusion"}),
    ("No&nbsp;pleural&nbsp;effusion", set()),
    ("Nodule &lt; 5 mm in the right lung", {"Lung nodule"}),
    ("Nodules <5 mm and >3 mm in the right lung", {"Lung nodule"}),
    ("No effusion&lt;br&gt;Emphysema", {"Emphysema"}),
    ("No pleural_x000D_\neffusion.", set()),
    ("\ufeffEmphysema.", {"Emphysema"}),
    ("<b>No</b> <i>pleural</i> effusion.", set()),
    ("<li>No effusion</li><li>Hiatal hernia</li>", {"Hiatal hernia"}),
    ("Pleural effu&shy;sion", {"Pleural effusion"}),
    ("Pleural ef<wbr>fusion", {"Pleural effusion"}),
    ("No effusion&#13;&#10;Emphysema", {"Emphysema"}),
    ("No effusion\rEmphysema", {"Emphysema"}),
    ("pulmonary \ufb01brosis", {"Pulmonary fibrotic sequela"}),
    ("No effusion\\nEmphysema in both lungs", {"Emphysema"}),
    ("No BR <BR />Emphysema<o:p></o:p>", {"Emphysema"}),
    ("No effusion_x000d__x000a_Emphysema", {"Emphysema"}),
    ("No&nbsp pleural effusion", set()),
    # headings
    ("Enlarged lymph\nnodes in the mediastinum", {"Lymphadenopathy"}),
    ("Pericardium:\nEffusion of 5 mm.", {"Pericardial effusion"}),
    ("Lungs: 4 mm nodule.\nThyroid: nodule of 5 mm.", {"Lung nodule"}),
    ("Thyroid:\nA nodule of 5 mm is observed.", set()),
    ("Impression:\nNo effusion.\nEmphysema.", {"Emphysema"}),
    ("IMPRESSION: 1. Emphysema 2. No nodule", {"Emphysema"}),
    ("LUNGS: No nodule. IMPRESSION: Normal.", set()),
    ("Findings: Lungs: no effusion, aorta: calcified.", {"Arterial wall calcification"}),
    # further variants of all groups
    ("Consolidation: no. Nodule: no. Effusion: no.", set()),
    ("Pleural effusion, absent. Emphysema, present.", {"Emphysema"}),
    ("Pleural effusion: Absent", set()),
    ("Pleural effusion: NO", set()),
    ("PLEURAL EFFUSION: NONE.", set()),
    ("Effusion - none, emphysema - yes", {"Emphysema"}),
    ("Emphysema: +, effusion: -", {"Emphysema"}),
    ("Emphysema (+), effusion (-), nodule (-)", {"Emphysema"}),
    ("Emphysema(+)/effusion(-)", {"Emphysema"}),
    ("Lung nodule (-)", set()),
    ("Cardiomegaly (-)", set()),
    ("Cardiomegaly, no.", set()),
    ("Hiatal hernia, none.", set()),
    ("Lymphadenopathy: (-)", set()),
    ("Mosaic attenuation (-), bronchiectasis (+).", {"Bronchiectasis"}),
    ("Coronary calcification (-)", set()),
    ("Aortic calcification (+), coronary calcification (-)", {"Arterial wall calcification"}),
    ("Pleural effusion \u2013 not detected", set()),
    ("Pleural effusion: was not detected", set()),
    ("Consolidation, none; effusion, none.", set()),
    ("Pericardial effusion: No; pleural effusion: Yes", {"Pleural effusion"}),
    ("Effusion:no", set()),
    ("Effusion :no", set()),
    ("Effusion,no.", set()),
    ("Effusion -no.", set()),
    ("Effusion-no", set()),
    ("Effusion (\u2212)", set()),
    ("effusion (\u2013)", set()),
    ("effusion(\u2014)", set()),
    ("Effusion {-}", set()),
    ("Effusion: (none)", set()),
    ("Effusion: [no]", set()),
    ("Pleural effusion: ( no )", set()),
    ("Pleural effusion \u2192 none", set()),
    ("Pleural effusion = none", set()),
    ("No: pleural effusion.", set()),
    ("Negative: pleural effusion, nodule.", set()),
    ("Pleural effusion neg.", set()),
    ("Pleural effusion -, nodule -, emphysema -", set()),
    ("Catheter removed; lungs clear.", set()),
    ("The central venous catheter has since been removed.", set()),
    ("Previously noted catheter removed.", set()),
    ("PICC removed.", set()),
    ("Stent extracted.", set()),
    ("Tracheostomy tube removed.", set()),
    ("The pacemaker was explanted.", set()),
    ("Pacemaker explantation.", set()),
    ("Drain removal.", set()),
    ("Sternal wires removed.", set()),
    ("Catheter was pulled.", set()),
    ("The chest drain has been taken out.", set()),
    ("Catheters removed, sternotomy wires in place.", {"Medical material"}),
    ("Endotracheal tube removed, nasogastric tube remains.", {"Medical material"}),
    ("Compared with the prior, the port catheter is removed.", set()),
    ("Catheter no longer visualized.", set()),
    ("Catheter is absent.", set()),
    ("Implants extracted; surgical clips present.", {"Medical material"}),
    ("Removed catheter.", set()),
    ("Interval extraction of the pacemaker leads.", set()),
    ("Port catheter (removed)", set()),
    ("Port catheter - removed", set()),
    ("No coronary calcification, aortic arch calcified.", {"Arterial wall calcification"}),
    ("no calcification in aorta, coronary arteries calcified", {"Coronary artery wall calcification"}),
    ("No pleural effusion, pericardium thickened.", set()),
    ("No nodules, heart enlarged, no effusion.", {"Cardiomegaly"}),
    ("No effusion, both lungs show emphysema.", {"Emphysema"}),
    ("No lymphadenopathy, hiatal hernia present.", {"Hiatal hernia"}),
    ("Without consolidation, lungs emphysematous.", {"Emphysema"}),
    ("No pneumothorax, trace pleural effusion.", {"Pleural effusion"}),
    ("No nodule, interlobular septa thickened.", {"Interlobular septal thickening"}),
    (
        "No effusion, aorta and coronary arteries calcified.",
        {"Arterial wall calcification", "Coronary artery wall calcification"},
    ),
    ("no calcification in coronary arteries, aorta shows calcification", {"Arterial wall calcification"}),
    ("no calcification in coronary arteries, aorta with calcified plaques", {"Arterial wall calcification"}),
    ("Coronary arteries not calcified, aorta calcified.", {"Arterial wall calcification"}),
    ("No calcification in the coronary arteries, thoracic aorta heavily calcified.", {"Arterial wall calcification"}),
    ("No stent, pacemaker in situ.", {"Medical material"}),
    ("No effusion, catheter in place.", {"Medical material"}),
    ("Emphysema._x000D_No effusion.", {"Emphysema"}),
    ("Emphysema_x000D_\n_x000D_\nNo effusion", {"Emphysema"}),
    ("Pleural_x0020_effusion", {"Pleural effusion"}),
    ("No effusion<br><br>Emphysema", {"Emphysema"}),
    ("<div>No effusion</div><div>emphysema</div>", {"Emphysema"}),
    ("No effusion</p>Emphysema", {"Emphysema"}),
    ("Pleural&#160;effusion", {"Pleural effusion"}),
    ("Heart&amp;lungs: emphysema", {"Emphysema"}),
    ("&bull; Emphysema &bull; No effusion", {"Emphysema"}),
    ("Em\u00adphy\u00adse\u00adma", {"Emphysema"}),
    ("emphy\u2060sema", {"Emphysema"}),
    ("emphy\ufeffsema", {"Emphysema"}),
    ("No\u00a0effusion", set()),
    ("No\u2003effusion", set()),
    ("atelec\u200dtasis", {"Atelectasis"}),
    ('<span style="color:red">Emphysema</span>', {"Emphysema"}),
    ("<strong>No</strong> effusion", set()),
    ("Nodule&nbsp;&lt;5&nbsp;mm in the right lung", {"Lung nodule"}),
    ("Effusion, no<br>Emphysema, yes", {"Emphysema"}),
]


@pytest.mark.parametrize(("text", "labels"), WORDINGS)
def test_wordings_of_other_departments_are_understood(text, labels):
    assert found(text) == labels


def test_markup_is_removed_but_spans_refer_to_the_report():
    report = "No effusion.<br/>A pulmonary no\u00addule of 4&nbsp;mm &lt; 5 mm_x000D_\nis seen."
    [denied, stated] = LABELER.explain(report)
    assert (denied.label, denied.polarity) == ("Pleural effusion", "negated")
    assert report[slice(*stated.span)] == "no\u00addule"
    assert stated.sentence == report.split("<br/>")[1]


@given(st.text(alphabet="ab <>&;_x000D\u00ad\n\r/pbr", max_size=60))
def test_plain_text_maps_each_character_to_the_report(report):
    text, places = without_markup(report)
    if places is None:
        assert text == report
    else:
        assert len(places) == len(text) + 1 and places[-1] == len(report)
        assert places == sorted(places)
        kept = [(character, report[place]) for character, place in zip(text, places, strict=False)]
        assert all(one == other or other in "<&_\r" for one, other in kept)


def test_text_without_markup_is_unchanged():
    for text in ("Nodules <5 mm and > 3 mm.", "R&D; A&B", "p < 0.05", "snake_case_x", "Trachea is open."):
        assert without_markup(text)[0] == text


def test_explain_lists_every_mention():
    report = "Heart size is normal. No effusion was seen. Atelectasis? In the left lung, a 4 mm nodule is observed."
    denied, doubtful, stated = LABELER.explain(report)
    assert (denied.label, denied.polarity, denied.cue, denied.counts) == ("Pleural effusion", "negated", "no", False)
    assert (doubtful.label, doubtful.polarity, doubtful.counts) == ("Atelectasis", "uncertain", True)
    assert (stated.rule, stated.polarity, stated.cue) == ("nodule", "positive", "")
    assert stated.sentence == "In the left lung, a 4 mm nodule is observed."
    assert report[slice(*stated.span)] == "nodule"


@pytest.mark.parametrize(
    "text", ["Suspected atelectasis.", "Findings may represent atelectasis.", "Possible atelectasis.", "Atelectasis?"]
)
def test_uncertain_findings_count_and_are_marked(text):
    [hit] = LABELER.explain(text)
    assert hit.polarity == "uncertain" and hit.cue
    assert found(text) == {"Atelectasis"}


def test_question_about_the_cause_is_not_uncertainty():
    [hit] = LABELER.explain("A mosaic attenuation pattern is observed (small airway disease?).")
    assert hit.polarity == "positive"


def test_spans_survive_unicode():
    report = "İki akciğer: “İ” ﬁ 肺 – nodules in the right lung。No effusion."
    assert [report[slice(*hit.span)] for hit in LABELER.explain(report)] == ["nodules", "effusion"]
    assert found("Ground‑glass opacities in both lungs.") == {"Lung opacity"}
    assert found("There isn’t any pleural effusion.") == set()


def test_finding_in_a_long_report_is_found():
    normal = "Trachea and both main bronchi are open and no occlusive pathology was detected. " * 400
    report = normal + "Pleural effusion is observed on the right. " + normal
    assert len(report.split()) > 10_000
    assert found(report) == {"Pleural effusion"}


def test_empty_reports_have_no_labels_and_non_text_is_refused():
    assert found("") == found(" \n") == set()
    assert LABELER.explain("") == []
    with pytest.raises(TypeError, match="report: NoneType"):
        LABELER.label(None)
    with pytest.raises(TypeError, match="report: float"):
        LABELER.explain(float("nan"))
    with pytest.raises(TypeError, match=r"reports\[1\]: .*bytes"):
        LABELER.label_all(["Emphysema.", b"Emphysema."])


def test_label_all_equals_label_per_report():
    matrix = LABELER.label_all(SENTENCES)
    assert matrix.dtype == np.int8 and matrix.shape == (len(SENTENCES), 18)
    assert matrix.tolist() == [[LABELER.label(text)[label] for label in DIAGNOSIS_LABELS] for text in SENTENCES]
    assert LABELER.label_all([]).shape == (0, 18)


def test_every_label_can_be_found():
    assert LABELER.label_all(SENTENCES).any(axis=0).all()
    assert tuple(LABELER.label("")) == DIAGNOSIS_LABELS


def test_signature_changes_with_the_rules(tmp_path):
    changed = tmp_path / "rules.yaml"
    changed.write_bytes(RULES_FILE.read_bytes() + b"# a comment\n")
    assert RuleLabeler().signature == LABELER.signature != RuleLabeler(changed).signature


def test_rules_for_unknown_labels_are_refused(tmp_path):
    document = yaml.safe_load(RULES_FILE.read_text(encoding="utf-8"))
    document["labels"]["Emphysaema"] = document["labels"].pop("Emphysema")
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(ValueError, match=r"differ: \['Emphysaema', 'Emphysema'\]"):
        RuleLabeler(path)


def test_word_filter_does_not_change_labels(slow):
    assert (LABELER.label_all(SENTENCES) == slow.label_all(SENTENCES)).all()


@given(st.lists(st.sampled_from(SENTENCES), max_size=8), st.randoms(use_true_random=False))
def test_order_and_repetition_of_sentences_do_not_matter(sentences, rng):
    labels = found(" ".join(sentences))
    assert labels == set().union(*map(found, sentences))
    shuffled = sentences + sentences[:3]
    rng.shuffle(shuffled)
    assert found(" ".join(shuffled)) == labels


@given(st.lists(st.sampled_from(SENTENCES) | st.text(max_size=30), max_size=8).map(" ".join))
def test_spans_lie_within_their_sentences(report):
    hits = LABELER.explain(report)
    for hit in hits:
        start, end = hit.span
        assert 0 <= start < end <= len(report)
        assert report[start:end] in hit.sentence and hit.sentence in report
    assert found(report) == {hit.label for hit in hits if hit.counts}


def test_split_keeps_identical_reports_together():
    texts = [f"Report {number}." for number in range(700)]
    texts += [f"Report  {number}.\n" for number in range(100)]  # the same words
    development, test = experiment.split_rows(texts)
    assert (len(development), len(test)) == (500, 300)
    assert sorted(development + test) == list(range(800))
    apart = [number for number in range(100) if (number in development) != (700 + number in development)]
    assert len(apart) <= 1  # one pair may straddle the boundary


def test_experiment_scores_lie_within_their_intervals():
    rng = np.random.default_rng(1)
    actual = rng.integers(0, 2, (200, 18))
    predicted, worse = (np.where(rng.random(actual.shape) < share, actual, 1 - actual) for share in (0.9, 0.8))
    expected = classification_scores(predicted, actual, DIAGNOSIS_LABELS)
    scores = experiment.score(predicted, actual)
    entries = [(scores[name], expected[name]) for name in ("micro", "macro")]
    entries += [(scores["labels"][label], expected["labels"][label]) for label in DIAGNOSIS_LABELS]
    for ours, theirs in entries:
        for part in ("precision", "recall", "f1"):
            low, high = ours[f"{part}_ci"]
            assert low < ours[part] < high and ours[part] == theirs[part]
    low, high = experiment.compare(predicted, worse, actual)["f1_difference_ci"]["micro"]
    assert 0 < low < high < 0.2
    assert experiment.score(actual, actual)["micro"]["f1_ci"] == [1.0, 1.0]


@pytest.mark.slow
def test_labeler_experiment_writes_scores_without_report_text(tmp_path, monkeypatch):
    """Run the experiment on synthetic reports: it writes scores without any text of the reports."""
    monkeypatch.setattr(experiment, "DEVELOPMENT_REPORTS", 60)
    rng, path = random.Random(0), tmp_path / "reports.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["AccessionNo", "report_text", *DIAGNOSIS_LABELS])
        for number in range(90):
            labels = [rng.randint(0, 1) for _ in DIAGNOSIS_LABELS]
            text = f"Secretword {number}. " + " ".join(
                next(example for rule, example in EXAMPLES if rule.label == label)
                for label, value in zip(DIAGNOSIS_LABELS, labels, strict=True)
                if value
            )
            writer.writerow([f"case_{number}", text, *labels])
    missed = experiment.read_reports(path)
    rows = experiment.split_rows(missed.texts)[1]
    disagreements = np.argwhere(LABELER.label_all(missed.part(rows).texts) != missed.part(rows).labels)
    noise = tmp_path / "noise.yaml"
    entries = [
        {"id": missed.ids[rows[row]], "label": DIAGNOSIS_LABELS[column], "reason": "a reason"}
        for row, column in disagreements[:1].tolist()
    ]
    noise.write_text(yaml.safe_dump(entries), encoding="utf-8")
    monkeypatch.setattr(experiment, "NOISE_FILE", noise)

    page = experiment.evaluate(path, tmp_path / "out").read_text(encoding="utf-8")
    text = (tmp_path / "out" / "labeler.json").read_text(encoding="utf-8")
    result = json.loads(text)
    assert result["test"]["rules"]["n"] == 30 and result["development"]["rules"]["n"] == 60
    assert result["signature"] == LABELER.signature and LABELER.signature in page
    low, high = result["test"]["rules"]["micro"]["f1_ci"]
    assert low <= result["test"]["rules"]["micro"]["f1"] <= high
    assert result["noise"]["corrected"]["micro"] >= result["test"]["rules"]["micro"]["f1"]
    assert "Secretword" not in page + text and "is observed" not in page + text

    experiment.evaluate(path, tmp_path / "development", development_only=True)
    assert "test" not in json.loads((tmp_path / "development" / "labeler.json").read_text(encoding="utf-8"))

    noise.write_text(yaml.safe_dump([{"id": "case_x", "label": "Emphysema", "reason": ""}]), encoding="utf-8")
    with pytest.raises(ValueError, match="case_x is not in the test part"):
        experiment.evaluate(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a", "text", *"0" * 17, "2"], "{'Interlobular septal thickening': '2'}"),
        (["b", "text", *"0" * 18], "1 ids more than once"),
    ],
)
def test_unusable_tables_are_refused(tmp_path, row, message):
    path = tmp_path / "reports.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["AccessionNo", "report_text", *DIAGNOSIS_LABELS], ["b", "text", *"0" * 18], row])
    with pytest.raises(ValueError, match=message):
        experiment.read_reports(path)
    path.write_text("AccessionNo,report_text\nb,text\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected also .*Arterial wall calcification"):
        experiment.read_reports(path)


# Comparison with the manual labels. Only the experiment scores the test part.


@pytest.fixture(scope="module")
def development(check_data):
    data = experiment.read_reports(check_data / "reports" / "ctclip_train.csv")
    return data.part(experiment.split_rows(data.texts)[0])


def test_development_and_test_split_is_fixed(check_data):
    data = experiment.read_reports(check_data / "reports" / "ctclip_train.csv")
    development, test = (data.part(rows) for rows in experiment.split_rows(data.texts))
    assert (len(development), len(test)) == (500, 300)
    assert development.ids_sha256() == "d91319f0005d1efaac7254bf960977465345550e42f59615d7249920d52b1646"
    assert test.ids_sha256() == "d74dfb16cde6012f0b632f017c4c46f3b5b19ad4f42a49b318fda9b33040da0a"


@pytest.mark.slow
def test_labeler_agrees_with_the_development_part(development, slow):
    labels = LABELER.label_all(development.texts)
    scores = classification_scores(labels, development.labels, DIAGNOSIS_LABELS)
    assert scores["micro"]["f1"] >= 0.955 and scores["macro"]["f1"] >= 0.955
    assert min(values["f1"] for values in scores["labels"].values()) >= 0.9
    assert (slow.label_all(development.texts) == labels).all()
