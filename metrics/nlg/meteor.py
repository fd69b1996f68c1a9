# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""METEOR as in `evaluate.load("meteor")`: NLTK's, with WordNet, on the tokens of `word_tokenize`.

Do not compare it with METEOR 1.5, the Java program of most captioning papers: that one tokenises, weights and matches
differently, and its scores are far lower. NLTK looks up synonyms of the stems of words, so it finds synonyms of "ill",
but not of "large", whose stem is "larg".
"""

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from importlib.metadata import version

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.tokenize.destructive import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer
from nltk.translate.meteor_score import single_meteor_score
from numpy.typing import NDArray

from .lexicon import WordNet, load_punkt, load_wordnet
from .texts import check_pairs

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5  # defaults of evaluate and NLTK


class _Stemmer:
    """Porter's stemmer with a cache, because reports use few different words."""

    def __init__(self):
        self.stem = lru_cache(maxsize=None)(PorterStemmer().stem)


@lru_cache(maxsize=1)
def wordnet() -> WordNet:
    """WordNet, loaded once per process, on first use: reading it takes half a second."""
    return load_wordnet()


@lru_cache(maxsize=1)
def punkt() -> PunktSentenceTokenizer:
    """Punkt model, loaded once per process."""
    return load_punkt()


@lru_cache(maxsize=1)
def _stemmer() -> _Stemmer:
    return _Stemmer()


def check_meteor_data() -> None:
    """Raise LexiconError if METEOR cannot be computed. Long commands call this before they start."""
    wordnet(), punkt()


def meteor_signature() -> str:
    """Return the signature. Raise LexiconError without WordNet, whose version is part of it."""
    return (
        f"meteor|per-sample-mean|alpha:{ALPHA:g}|beta:{BETA:g}|gamma:{GAMMA:g}|case:lower|tok:punkt_tab+treebank"
        f"|stemmer:porter|wordnet:{wordnet().version}|nltk:{version('nltk')}"
    )


def meteor_tokens(text: str) -> list[str]:
    """Tokenise like `nltk.word_tokenize`: a full stop is a separate token only at the end of a sentence.

    Raises:
        LexiconError: the Punkt model is not installed.
    """
    words = NLTKWordTokenizer()
    return [word for sentence in punkt().tokenize(text) for word in words.tokenize(sentence)]


def _score(prediction: str, reference: str) -> float:
    return single_meteor_score(
        meteor_tokens(reference),
        meteor_tokens(prediction),
        stemmer=_stemmer(),
        wordnet=wordnet(),
        alpha=ALPHA,
        beta=BETA,
        gamma=GAMMA,
    )


def meteor_per_report(predictions: Sequence[str], references: Sequence[str], workers: int = 1) -> NDArray[np.float64]:
    """METEOR, (reports,). An empty prediction scores 0.

    Identical texts of m tokens score 1 - 0.5 / m^3, not 1: one chunk of matches still counts as a fragment.

    Args:
        workers: number of processes; the values do not depend on it.

    Raises:
        LexiconError: WordNet or the Punkt model is not installed. The message says how to install them.
        TypeError, ValueError: see [`check_pairs`]; also if `workers` is below 1.
    """
    predictions, references = check_pairs(predictions, references)
    if workers < 1:
        raise ValueError(f"workers: {workers} (expected at least 1)")
    # Load before starting workers, so that errors occur in this process and forked workers share the loaded data.
    check_meteor_data()
    if workers == 1:
        scores = [_score(*pair) for pair in zip(predictions, references, strict=True)]
    else:
        with ProcessPoolExecutor(workers) as pool:
            chunk = math.ceil(len(predictions) / (4 * workers))
            scores = list(pool.map(_score, predictions, references, chunksize=chunk))
    return np.array(scores, dtype=np.float64)
