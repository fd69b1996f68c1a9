# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
import csv
import math
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from functools import partial

import nltk
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from diffvp.labels_diffvp import REGIONS
from diffvp.metrics.nlg import (
    LexiconError,
    bleu_counts,
    bleu_from_counts,
    canonical_report,
    clean_reg2rg,
    coco_bleu_counts,
    coco_bleu_from_counts,
    coco_cider_per_report,
    coco_rouge_per_report,
    common_subsequence_length,
    lexicon,
    meteor_per_report,
    meteor_signature,
    meteor_tokens,
    region_scores,
    rouge_per_report,
    score_reports,
    split_reg2rg,
)
from diffvp.metrics.statistics import bootstrap_counts
from diffvp.processing_diffvp import DiffVPProcessor

NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_1", "rouge_2", "rouge_l")
PREDICTIONS = [
    "The heart is large. No effusion.",
    "Both lungs are clear and aerated, as far as can be seen on CT.",
    "",
    "Nodules of 4.6 mm in the right lung; normal otherwise.",
]
REFERENCES = [
    "The heart is of normal size. There is no effusion.",
    "Both lungs are clear.",
    "There is a hiatal hernia.",
    "A nodule of 4.6 mm lies in the right upper lobe.",
]
WORDS = ["the", "Lungs", "lung", "are", "clear", ".", "nodule,", "4.6", "µm", "é", "CT.", "no"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join)


def _read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# BLEU


def bleu_of(prediction, reference):
    return bleu_from_counts(bleu_counts([prediction], [reference])[0])


def test_bleu_matches_a_hand_computation():
    # 5 tokens against 6. 4 of 5 unigrams match (the, lungs, are, "."), 2 of 4 bigrams ("the lungs", "lungs are"),
    # 1 of 3 trigrams ("the lungs are") and 0 of 2 fourgrams. Smoothing adds 1 to both counts of each order.
    prediction, reference = "the lungs are clear .", "the lungs are well aerated ."
    precisions = [5 / 6, 3 / 5, 2 / 4, 1 / 3]
    brevity = math.exp(1 - 6 / 5)
    for order in range(1, 5):
        expected = brevity * math.prod(precisions[:order]) ** (1 / order)
        assert bleu_of(prediction, reference)[order - 1] == pytest.approx(expected, rel=1e-12)


def test_bleu_tokenises_as_13a_and_is_case_sensitive():
    # 13a splits the full stop off the word but not the decimal point, so all 4 tokens match.
    assert bleu_of("Nodule of 4.6.", "Nodule of 4.6 .")[0] == 1.0
    # 3 of 4 tokens match when the case differs, smoothed to (3 + 1) / (4 + 1).
    assert bleu_of("nodule of 4.6.", "Nodule of 4.6.")[0] == pytest.approx(4 / 5)


def test_bleu_clips_repeated_words_and_does_not_penalise_length():
    # "the" counts once out of 4; a longer prediction has no brevity penalty.
    assert bleu_of("the the the the", "the")[0] == pytest.approx((1 + 1) / (4 + 1))


def test_bleu_refuses_a_reference_without_tokens():
    with pytest.raises(ValueError, match=r"references\[1\] has no tokens"):
        bleu_counts(["a", "b"], ["a", "<skipped>"])


def test_bleu_of_resampled_counts_equals_bleu_of_the_texts():
    counts = bleu_counts(PREDICTIONS, REFERENCES)
    chosen = [3, 0, 0, 1]
    again = score_reports(
        [PREDICTIONS[i] for i in chosen], [REFERENCES[i] for i in chosen], scorer="corpus", meteor=False
    ).summary()
    resampled = bleu_from_counts(counts[chosen].sum(axis=0))
    assert [again[f"bleu_{order}"] for order in range(1, 5)] == resampled.tolist()
    interval = bootstrap_counts(counts, lambda sums: bleu_from_counts(sums)[..., 3], resamples=50)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


# ROUGE


def test_rouge_matches_a_hand_computation():
    # The longest common subsequence "the heart is" has 3 of 4 and 3 of 5 words: F = 2 PR / (P + R) = 6 / 9. Bigrams
    # match 2 of 3 and 2 of 4. Case is ignored. There is no stemmer, so "nodules" and "nodule" do not match.
    scores = rouge_per_report(["The heart is enlarged.", "nodules"], ["the heart is normal size", "nodule"])
    np.testing.assert_allclose(scores, [[6 / 9, 4 / 7, 6 / 9], [0, 0, 0]], rtol=1e-12)


@settings(deadline=None, max_examples=100)
@given(prediction=st.one_of(texts, st.text(max_size=40)), reference=texts)
def test_rouge_equals_the_rouge_score_package(prediction, reference):
    names = ["rouge1", "rouge2", "rougeL"]
    oracle = RougeScorer(names, use_stemmer=False).score(reference, prediction)
    assert rouge_per_report([prediction], [reference])[0].tolist() == [oracle[name].fmeasure for name in names]


@settings(deadline=None, max_examples=100)
@given(first=st.lists(st.integers(0, 4), max_size=90), second=st.lists(st.integers(0, 4), max_size=90))
def test_common_subsequence_length_equals_the_textbook_table(first, second):
    row = [0] * (len(second) + 1)
    for a in first:
        above, row = row, [0]
        for j, b in enumerate(second):
            row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
    assert common_subsequence_length(first, second) == row[-1]


# COCO


def test_coco_scores_match_a_hand_computation():
    predictions, references = ["the lungs are clear.", "no  mass"], ["the lungs are clear .", "no mass"]
    # Corpus: 3 + 2 of 6 words, 2 + 1 of 4 bigrams, 1 of 2 trigrams, 0 of 1 fourgram; 6 words against 7.
    brevity = math.exp(1 - 7 / 6)
    expected = [5 / 6, (5 / 6 * 3 / 4) ** 0.5, (5 / 6 * 3 / 4 * 1 / 2) ** (1 / 3), 0]
    bleu = coco_bleu_from_counts(coco_bleu_counts(predictions, references).sum(axis=0))
    np.testing.assert_allclose(bleu[:3], brevity * np.array(expected[:3]), rtol=1e-8)
    assert 0 <= bleu[3] < 1e-3
    # ROUGE-L: 3 of 4 and 3 of 5 words; 2 of 3 (the double space makes an empty word) and 2 of 2.
    pairs = [(3 / 4, 3 / 5), (2 / 3, 1.0)]
    expected = [(1 + 1.44) * p * r / (r + 1.44 * p) for p, r in pairs]
    np.testing.assert_allclose(coco_rouge_per_report(predictions, references), expected, rtol=1e-12)


# METEOR


def test_meteor_matches_a_hand_computation(meteor_data):
    # "the", "nodules" (by its stem) and "." match: 3 of 4 tokens on either side, in 2 chunks. So P = R = 3 / 4, and
    # the penalty is 0.5 (2 / 3)^3.
    expected = 3 / 4 * (1 - 0.5 * (2 / 3) ** 3)
    assert meteor_per_report(["The nodules grew."], ["the nodule persists."])[0] == pytest.approx(expected, rel=1e-12)
    # "sick" and "ill" are synonyms. So are "large" and "big", but NLTK looks up stems, and "larg" is not a word.
    assert meteor_per_report(["sick", "large"], ["ill", "big"]).tolist() == [0.5, 0.0]
    assert meteor_per_report(["", "???"], ["The heart is normal."] * 2).tolist() == [0.0, 0.0]
    assert "wordnet:3.0|nltk:" in meteor_signature()


def test_meteor_splits_full_stops_only_at_sentence_ends(meteor_data):
    # The Punkt model knows "Dr." and "CT." as abbreviations. Without it METEOR would give another score.
    tokens = meteor_tokens("Seen by Dr. Smith on an unenhanced CT. No mass in the liver. Normal otherwise.")
    assert [token for token in tokens if "." in token] == ["Dr.", "CT.", ".", "."]


def _nltk_data(root):
    """Write NLTK's data folder as its downloader leaves it, from the WordNet and Punkt model of this machine."""
    wordnet_reader, punkt_reader = lexicon.find_wordnet(), lexicon.find_punkt()
    wordnet = root / "corpora" / "wordnet"
    punkt = root / "tokenizers" / "punkt_tab" / "english"
    wordnet.mkdir(parents=True)
    punkt.mkdir(parents=True)
    for name in lexicon.PARTS_OF_SPEECH.values():
        for file in (f"data.{name}", f"index.{name}", f"{name}.exc"):
            (wordnet / file).write_bytes(wordnet_reader(file))
    # NLTK's own reader needs the names of the lexicographer files, which METEOR does not use: 45 in WordNet 3.0.
    (wordnet / "lexnames").write_text("".join(f"{index:02d}\tname{index}\t0\n" for index in range(45)))
    for file in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (punkt / file).write_bytes(punkt_reader(file))
    return root


@pytest.mark.slow
def test_wordnet_punkt_and_meteor_agree_with_nltk(meteor_data, tmp_path, monkeypatch):
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.tokenize import word_tokenize
    from nltk.translate.meteor_score import single_meteor_score

    class Reader(WordNetCorpusReader):
        def map_wn(self, version="wordnet"):  # for other languages; needs index.sense
            return None

    monkeypatch.setattr(nltk.data, "path", [str(_nltk_data(tmp_path / "nltk_data"))])
    monkeypatch.setattr(lexicon, "DEBIAN_WORDNET", tmp_path / "none")
    monkeypatch.setattr(lexicon, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no other languages
        reader = Reader(str(tmp_path / "nltk_data" / "corpora" / "wordnet"), None)
    ours, punkt = lexicon.load_wordnet(), lexicon.load_punkt()

    lemmas = [lemma for lemma in reader.all_lemma_names() if "_" not in lemma][::40]
    inflected = [lemma + end for lemma in lemmas for end in ("s", "es", "ed", "ing", "er", "est", "ies")]
    words = [*lemmas, *inflected, "better", "went", "diagnoses", "vertebrae", "larger", "men", "é", "", ".", "4.6"]
    assert len(words) > 10_000
    for word in words:
        expected = {lemma.name() for synset in reader.synsets(word) for lemma in synset.lemmas()}
        found = {lemma.name() for synset in ours.synsets(word) for lemma in synset.lemmas()}
        assert {name for name in found if "_" not in name} == {name for name in expected if "_" not in name}, word

    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        assert punkt.tokenize(reference) == nltk.sent_tokenize(reference)
        assert meteor_tokens(prediction) == word_tokenize(prediction)
        expected = single_meteor_score(word_tokenize(reference), word_tokenize(prediction), wordnet=reader)
        assert meteor_per_report([prediction], [reference])[0] == expected


def test_wordnet_is_also_read_from_a_zip_file(meteor_data, tmp_path, monkeypatch):
    folder = _nltk_data(tmp_path / "nltk_data") / "corpora"
    with zipfile.ZipFile(folder / "wordnet.zip", "w") as archive:
        for file in sorted((folder / "wordnet").iterdir()):
            archive.write(file, f"wordnet/{file.name}")
    shutil.rmtree(folder / "wordnet")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    monkeypatch.setattr(lexicon, "DEBIAN_WORDNET", tmp_path / "none")
    assert lexicon.load_wordnet().synsets("large") == meteor_data[0].synsets("large")


def test_missing_lexicons_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(lexicon, "DEBIAN_WORDNET", tmp_path / "none")
    monkeypatch.setattr(lexicon, "find_spec", lambda name: None)
    with pytest.raises(LexiconError, match="apt-get install .*wordnet-base.*nltk.downloader wordnet"):
        lexicon.load_wordnet()
    with pytest.raises(LexiconError, match="nltk.downloader punkt_tab.*pip install --no-deps llama-index-core"):
        lexicon.load_punkt()


def test_incomplete_lexicons_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(lexicon, "DEBIAN_WORDNET", tmp_path)
    with pytest.raises(LexiconError, match="WordNet is incomplete: .*data.noun"):
        lexicon.load_wordnet()
    for name in lexicon.PARTS_OF_SPEECH.values():
        for file in (f"data.{name}", f"index.{name}", f"{name}.exc"):
            (tmp_path / file).write_text("cyst n 1 0 1 0 00000000  \n" if file == "index.noun" else "")
    with pytest.raises(LexiconError, match="does not say which version"):
        lexicon.load_wordnet()
    (tmp_path / "data.noun").write_text("  1 WordNet 3.0 Copyright 2006 by Princeton University\n")
    with pytest.raises(LexiconError, match="data.noun has no entry at 00000000"):
        lexicon.load_wordnet().synsets("cyst")
    punkt = tmp_path / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    (punkt / "abbrev_types.txt").write_text("dr\n")
    with pytest.raises(LexiconError, match="Punkt model is incomplete"):
        lexicon.load_punkt()


def test_meteor_is_the_same_for_any_number_of_workers(meteor_data):
    predictions, references = PREDICTIONS * 3, REFERENCES * 3
    alone = meteor_per_report(predictions, references)
    assert meteor_per_report(predictions, references, workers=2).tolist() == alone.tolist()
    with pytest.raises(ValueError, match=r"workers: 0 \(expected"):
        meteor_per_report(predictions, references, workers=0)


# All scores

without_meteor = partial(score_reports, meteor=False)
SCORES = [
    bleu_counts,
    coco_bleu_counts,
    rouge_per_report,
    coco_rouge_per_report,
    meteor_per_report,
    score_reports,
]


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)
@pytest.mark.parametrize(
    ("predictions", "references", "error", "message"),
    [
        (["a", "b"], ["a"], ValueError, "2 predictions .* 1 references"),
        ([], [], ValueError, "no reports"),
        (["a"], [" \n"], ValueError, r"references\[0\] is empty"),
        (["a", float("nan")], ["a", "b"], TypeError, r"predictions\[1\]: nan"),
        (["a"], [None], TypeError, r"references\[0\]: None"),
        ("ab", ["a", "b"], TypeError, "predictions: one text"),
    ],
)
def test_invalid_report_lists_are_refused(score, predictions, references, error, message):
    with pytest.raises(error, match=message):
        score(predictions, references)


@pytest.mark.parametrize("scorer", ["paper", "corpus", "coco"])
def test_empty_predictions_score_0(scorer):
    summary = without_meteor(["", " "], ["The heart is normal."] * 2, scorer=scorer).summary()
    assert all(value == 0.0 for name, value in summary.items() if name not in ("n", "signature")), summary


def test_cider_equals_pycocoevalcap():
    predictions = [
        "the heart is normal .",
        "no nodule",
        "",
        "a nodule of 4 mm in the right lung . a nodule of 4 mm in the right lung",
        "clear",
    ]
    references = [
        "the heart is of normal size .",
        "a nodule of 4 mm",
        "no effusion",
        "a nodule of 5 mm in the right lung .",
        "clear",
    ]
    # Output of pycocoevalcap 1.2's Cider().compute_score({i: [reference]}, {i: [prediction]}), run once in a separate
    # environment.
    theirs = [3.6488656114822335, 0.4316117551946153, 0.0, 1.0699449578099811, 2.5]
    np.testing.assert_allclose(coco_cider_per_report(predictions, references), theirs, rtol=1e-12)
    # With a single report, every n-gram is in all reports and has an IDF of 0.
    assert coco_cider_per_report(["a b c d e"], ["a b c d e"]).tolist() == [0.0]


def test_cider_of_identical_reports_is_10_in_any_order():
    texts = [f"a nodule of {size} mm lies in the {side} lung near it" for size in (4, 5) for side in "lr"]
    scores = coco_cider_per_report(texts, texts)
    np.testing.assert_allclose(scores, 10)
    mixed = coco_cider_per_report(texts, texts[::-1])
    assert (mixed < 10).all() and (mixed >= 0).all()
    np.testing.assert_allclose(coco_cider_per_report(texts[::-1], texts)[::-1], mixed)


def test_summary_is_the_mean_over_reports_with_a_signature(meteor_data):
    scores = score_reports(PREDICTIONS, REFERENCES)
    assert tuple(scores.per_report) == NAMES
    assert scores.per_report["bleu_3"][1] == bleu_of(PREDICTIONS[1], REFERENCES[1])[2]
    summary = scores.summary()
    assert set(summary) == {*NAMES, *(f"{name}_std" for name in NAMES), "n", "signature"}
    assert summary["n"] == scores.n == 4
    for name, values in scores.per_report.items():
        assert summary[name] == pytest.approx(values.mean(), rel=1e-12)
        assert summary[f"{name}_std"] == pytest.approx(values.std(), rel=1e-12)
    prepared, bleu, meteor, rouge = summary["signature"].split()
    assert prepared == "prepared:no"
    assert bleu.startswith("bleu|per-sample-mean|order:1-4|smooth:add1|case:mixed|tok:13a|sacrebleu:")
    assert meteor.startswith("meteor|per-sample-mean|alpha:0.9|beta:3|gamma:0.5|case:lower|tok:punkt_tab+treebank|")
    assert rouge.startswith("rouge1,2,L|per-sample-mean|fmeasure|stemmer:no|case:lower|tok:a-z0-9|rouge-score:")


def test_scorers_differ_in_scores_and_signatures():
    corpus = without_meteor(PREDICTIONS, REFERENCES, scorer="corpus").summary()
    assert "bleu_4" in corpus and "bleu_4_std" not in corpus and "rouge_2_std" in corpus and "meteor" not in corpus
    assert "bleu|corpus|" in corpus["signature"] and "meteor" not in corpus["signature"]
    coco = score_reports(PREDICTIONS, REFERENCES, scorer="coco").summary()  # never needs WordNet
    scores = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "rouge_l_std", "cider", "cider_std"}
    assert set(coco) == scores | {"n", "signature"}
    assert "tok:whitespace" in coco["signature"] and "fbeta:1.2" in coco["signature"]
    with pytest.raises(ValueError, match=r"scorer: 'bleu' \(expected"):
        score_reports(PREDICTIONS, REFERENCES, scorer="bleu")
    with pytest.raises(ValueError, match=r"clean: 'mimic' \(expected"):
        score_reports(PREDICTIONS, REFERENCES, clean="mimic")


def test_reg2rg_cleaning_removes_region_headings():
    text = "The region 0 is lung: Both lungs\n are  clear. The region 12 is trachea and bronchie: Open. "
    assert clean_reg2rg(text) == "Both lungs are clear. Open."
    summary = without_meteor([text], ["Both lungs are clear. Open."], clean="reg2rg").summary()
    assert summary["bleu_4"] == summary["rouge_l"] == 1.0
    assert summary["signature"].startswith("prepared:reg2rg ")


@settings(deadline=None, max_examples=50)
@given(texts)
def test_identical_text_scores_1_if_it_is_long_enough(text):
    paper, coco = (without_meteor([text], [text], scorer=scorer).summary() for scorer in ("paper", "coco"))
    # The smoothing adds 1 to both sides of a fraction that is 1, so BLEU is exactly 1 even below 4 tokens.
    assert [paper[f"bleu_{order}"] for order in range(1, 5)] == [1.0] * 4
    # ROUGE sees only a-z and 0-9, and ROUGE-2 needs two such words.
    words = DefaultTokenizer().tokenize(text)
    assert paper["rouge_1"] == paper["rouge_l"] == (1.0 if words else 0.0)
    assert paper["rouge_2"] == (1.0 if len(words) > 1 else 0.0)
    # COCO's constants lower the score slightly, and to almost 0 if the text has no n-gram of an order.
    for order in range(1, 5):
        full = len(text.split()) >= order
        assert coco[f"bleu_{order}"] == pytest.approx(1.0, abs=1e-8) if full else coco[f"bleu_{order}"] < 0.04
    assert coco["rouge_l"] == pytest.approx(1.0, rel=1e-12)


@settings(deadline=None, max_examples=25)
@given(text=texts)
def test_identical_text_has_a_meteor_below_1(meteor_data, text):
    tokens = len(meteor_tokens(text))
    assert meteor_per_report([text], [text])[0] == pytest.approx(1 - 0.5 / tokens**3, rel=1e-12)


@settings(deadline=None, max_examples=25)
@given(pairs=st.lists(st.tuples(st.one_of(texts, st.just("")), texts), min_size=1, max_size=8), data=st.data())
@pytest.mark.parametrize("scorer", ["paper", "corpus", "coco"])
def test_order_of_reports_does_not_change_the_scores(scorer, pairs, data):
    shuffled = data.draw(st.permutations(pairs))
    one, other = (without_meteor(*zip(*rows, strict=True), scorer=scorer).summary() for rows in (pairs, shuffled))
    assert one == other  # bit for bit


@settings(deadline=None, max_examples=100)
@given(prediction=st.text(max_size=60), reference=st.text(min_size=1, max_size=60).filter(str.strip))
def test_any_unicode_scores_between_0_and_1(prediction, reference):
    for scorer in ("paper", "coco"):
        try:
            summary = without_meteor([prediction], [reference], scorer=scorer).summary()
        except ValueError as error:
            assert "has no tokens" in str(error)  # noqa: PT017
            continue
        assert all(0 <= value <= 1 + 1e-12 for name, value in summary.items() if name not in ("n", "signature"))


def test_meteor_accepts_any_unicode(meteor_data):
    odd = ["µm ± 4,6 – “ʺ” é̂", "肺は正常です。", "\ud83e\udec1 \x00 \u2028 \x85", "İstanbul ß ﬁ", "\ufeff."]
    scores = meteor_per_report(odd, odd)
    assert ((0 <= scores) & (scores < 1)).all() and scores[1] == 0.5


def test_constant_predictions_are_scored():
    summary = without_meteor(["No finding."] * 4, REFERENCES).summary()
    assert 0 < summary["bleu_4"] < 0.3 and summary["rouge_l"] < 0.3
    same = without_meteor(["No finding."] * 3, ["A finding."] * 3).summary()
    assert same["bleu_4_std"] == same["rouge_l_std"] == 0.0
    assert without_meteor(["No finding."], ["A finding."]).summary()["bleu_4"] == same["bleu_4"]


@pytest.mark.timeout(60)
def test_reports_of_10_000_words_are_scored_within_a_minute():
    rng = np.random.default_rng(0)
    vocabulary = [f"word{index}" for index in range(500)]
    long, other = (" ".join(rng.choice(vocabulary, 10_000)) + "." for _ in range(2))
    assert without_meteor([long], [long]).summary()["rouge_l"] == 1.0
    # Unrelated texts over a vocabulary of k words have about 2 / sqrt(k) of their words in common order.
    assert 0.07 < without_meteor([long], [other]).summary()["rouge_l"] < 0.11
    assert 0.07 < score_reports([long], [other], scorer="coco").summary()["rouge_l"] < 0.11


@pytest.mark.timeout(60)
def test_meteor_of_10_000_words_takes_at_most_a_minute(meteor_data):
    text = "The left lung is clear and the heart is of normal size. " * 833
    assert meteor_per_report([text], [text])[0] == pytest.approx(1.0, abs=1e-9)
    assert 0 < meteor_per_report([text], ["Both lungs are large. " * 2_500])[0] < 0.5


# Regions


def test_report_in_canonical_order_parses_to_the_same_regions():
    report = "Lung: Clear.\nHeart: Large.\nNo comparison.\nImpression: cardiomegaly.\nAbdomen: Normal."
    parts = DiffVPProcessor.post_process(report)
    ordered = canonical_report(parts, REGIONS)
    assert ordered.splitlines() == [parts["other"], "Abdomen: Normal.", f"Heart: {parts['heart']}", "Lung: Clear."]
    assert DiffVPProcessor.post_process(ordered) == parts
    assert canonical_report({"lung": "Clear.", "heart": "Large."}, REGIONS, headings=False) == "Large. Clear."


def test_reg2rg_text_is_split_into_regions():
    text = "Chest CT. The region 3 is Heart: Large.  The region 0 is lung:Clear. The region 4 is heart: No effusion."
    assert split_reg2rg(text) == {"other": "Chest CT.", "heart": "Large. No effusion.", "lung": "Clear."}
    assert split_reg2rg("Nothing of that form.") == {"other": "Nothing of that form."}
    assert split_reg2rg("") == {}


def test_region_scores_ignore_order_and_count_missing_and_extra():
    references = ["Heart: Normal size.\nLung: Both lungs are clear.", "Lung: A nodule is seen."]
    predictions = ["Lung: Both lungs are clear.\nHeart: Normal size.", "Heart: Large."]
    views = region_scores(predictions, references, DiffVPProcessor.post_process, REGIONS, meteor=False)
    # The first prediction differs only in order; the second has nothing right.
    assert views["as_written"]["rouge_l"] < 0.5
    assert views["canonical_order"]["rouge_l"] == 0.5
    assert list(views["regions"]) == list(REGIONS)
    heart, lung, bone = (views["regions"][region] for region in ("heart", "lung", "bone"))
    assert (heart["n"], heart["missing"], heart["extra"], heart["rouge_l"]) == (1, 0, 1, 1.0)
    assert (lung["n"], lung["missing"], lung["extra"], lung["rouge_l"]) == (2, 1, 0, 0.5)
    assert bone == {"n": 0, "missing": 0, "extra": 0}
    assert lung["signature"] == views["as_written"]["signature"]


def test_region_scores_of_reg2rg_text_ignore_order():
    references = ["The region 0 is heart: Normal. The region 1 is lung: Both lungs are clear."]
    predictions = ["The region 0 is lung: Both lungs are clear. The region 1 is heart: Normal."]
    views = region_scores(predictions, references, split_reg2rg, REGIONS, clean="reg2rg", meteor=False)
    assert views["as_written"]["bleu_1"] == views["canonical_order"]["bleu_4"] == 1.0
    assert views["as_written"]["bleu_4"] < 1.0


# Published numbers


def _published(check_data):
    """Return Reg2RG's 361 generated and reference CTRG reports, and their published scores as "mean±std"."""
    rows = _read_csv(check_data / "reports" / "reg2rg_ctrg_combined_reports_rm_region_text.csv")
    assert len(rows) == 361
    [scores] = _read_csv(check_data / "reports" / "reg2rg_nlg_evaluation_results.csv")
    return [row["Pred_whole_report"] for row in rows], [row["GT_whole_report"] for row in rows], scores


def test_bleu_and_rouge_equal_the_published_values(check_data):
    *pairs, published = _published(check_data)
    paper = without_meteor(*pairs).summary()
    for name, column in zip(
        ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_1", "rouge_2", "rouge_l"),
        ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-1", "ROUGE-2", "ROUGE-L"),
        strict=True,
    ):
        assert f"{paper[name]:.4f}±{paper[f'{name}_std']:.4f}" == published[column], column
    corpus = without_meteor(*pairs, scorer="corpus").summary()
    for order in range(1, 5):
        assert f"{corpus[f'bleu_{order}']:.4f}" == published[f"Overall_BLEU-{order}"]


def test_meteor_equals_the_published_value(check_data, meteor_data):
    *pairs, published = _published(check_data)
    meteor = meteor_per_report(*pairs)
    assert f"{meteor.mean():.4f}±{meteor.std():.4f}" == published["METEOR"] == "0.4971±0.1660"


def test_coco_scores_equal_pycocoevalcap(check_data):
    *pairs, _ = _published(check_data)
    coco = score_reports(*pairs, scorer="coco").summary()
    found = [coco[name] for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")]
    assert [round(100 * value, 2) for value in found] == [46.58, 37.98, 32.56, 28.74, 44.11]
    # Output of pycocoevalcap 1.2 for these texts, run once.
    theirs = [0.4658275414130067, 0.3798399197874062, 0.32559709859270713, 0.28738238097408086, 0.4410671993074136]
    np.testing.assert_allclose(found, theirs, rtol=1e-12)
    # python -m venv O && O/bin/pip install pycocoevalcap==1.2, then its Cider().compute_score on these texts.
    assert coco["cider"] == pytest.approx(0.3127075248126748, rel=1e-9)


# The evaluate module


@pytest.mark.slow
def test_evaluate_loads_the_module_without_the_package(repository_root, tmp_path):
    """Load it as a user of `evaluate` does: by path, from another working directory, without `diffvp` or network."""
    code = """
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
assert importlib.util.find_spec("diffvp") is None
import evaluate
nlg = evaluate.load(sys.argv[1] + "/metrics/nlg")
nlg.add_batch(predictions=["The lungs are clear."], references=["The lungs are clear."])
result = nlg.compute(meteor=False)
assert result["bleu_4"] == result["rouge_l"] == 1.0 and result["bleu_4_std"] == 0.0 and result["n"] == 1, result
assert "tok:13a" in result["signature"] and "rouge1,2,L" in result["signature"], result
texts = dict(predictions=["b: X y. a: Z w."], references=["a: Z w. b: X y."])
result = nlg.compute(**texts, scorer="coco", per_report=True)
assert len(result["per_report"]["rouge_l"]) == 1 and "fbeta:1.2" in result["signature"], result
split = lambda text: {"a": "Z w.", "b": "X y."}
result = nlg.compute(**texts, meteor=False, split=split, regions=["a", "b"])
assert result["rouge_l"] < result["canonical_order"]["rouge_l"] == result["regions"]["b"]["rouge_l"] == 1.0, result
try:
    result = nlg.compute(**texts, workers=2)
    assert result["meteor"] > 0 and "wordnet:3.0" in result["signature"], result
except LookupError as error:
    assert "METEOR needs" in str(error), error
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code, str(repository_root)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
