# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Language data of METEOR: WordNet's synonyms and the Punkt model for sentence boundaries, both installed separately.

WordNet is read here instead of by NLTK. Since 3.10 NLTK opens files only below its own data folders, it requires files
that METEOR does not need (`lexnames`, `index.sense`; Debian's wordnet-base has neither), and it takes a second or two
to start.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import nltk
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

DEBIAN_WORDNET = Path("/usr/share/wordnet")
# Adjective satellites ("s") are in the files of the adjectives and need no separate look-up.
PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}

WORDNET_HELP = (
    "METEOR needs WordNet 3.0. Install it with `apt-get install --no-install-recommends wordnet-base` (Debian, "
    "Ubuntu) or `python -m nltk.downloader wordnet`, or score without it (`diffvp score --no-meteor`)."
)
PUNKT_HELP = (
    "METEOR needs NLTK's Punkt model to find the ends of sentences. Install it with `python -m nltk.downloader "
    "punkt_tab`, or from PyPI with `pip install --no-deps llama-index-core`, which carries a copy; or score without "
    "it (`diffvp score --no-meteor`)."
)

Reader = Callable[[str], bytes]


class LexiconError(LookupError):
    """WordNet or the Punkt model is missing or broken. METEOR would differ without them, so it is not computed."""


@dataclass(frozen=True)
class Lemma:
    text: str

    def name(self) -> str:
        return self.text


@dataclass(frozen=True)
class Synset:
    names: tuple[Lemma, ...]

    def lemmas(self) -> tuple[Lemma, ...]:
        return self.names


class WordNet:
    """Synonyms of words, with the interface of NLTK's WordNet reader that NLTK's METEOR uses.

    Args:
        read: returns the content of a WordNet file, such as "data.noun".

    Raises:
        LexiconError: a file is missing, or its version is not stated.
    """

    def __init__(self, read: Reader):
        self._data, self._index, self._exceptions = {}, {}, {}
        try:
            for pos, name in PARTS_OF_SPEECH.items():
                self._data[pos] = read(f"data.{name}")
                lines = read(f"index.{name}").decode("utf-8").splitlines()
                self._index[pos] = {line.split(" ", 1)[0]: line for line in lines if not line.startswith(" ")}
                lines = read(f"{name}.exc").decode("utf-8").splitlines()
                self._exceptions[pos] = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
        except (OSError, KeyError, UnicodeDecodeError) as error:  # KeyError: not in the zip file
            raise LexiconError(f"WordNet is incomplete: {error}. {WORDNET_HELP}") from error
        stated = re.search(rb"WordNet (\d+\.\d+) Copyright", self._data["n"][:4096])
        if stated is None:
            raise LexiconError(f"data.noun does not say which version of WordNet it is. {WORDNET_HELP}")
        self.version = stated[1].decode("ascii")
        self._known: dict[str, list[Synset]] = {}

    def synsets(self, word: str) -> list[Synset]:
        """Return all synonyms of a lower-case word as one set, because METEOR uses only their names."""
        if word not in self._known:
            names = {
                name for pos in PARTS_OF_SPEECH for form in self._forms(word, pos) for name in self._names(form, pos)
            }
            self._known[word] = [Synset(tuple(Lemma(name) for name in sorted(names)))]
        return self._known[word]

    def _forms(self, word: str, pos: str) -> list[str]:
        """Return the word and its possible base forms, if they are in WordNet."""
        forms = self._exceptions[pos].get(word)
        if forms is None:
            substitutions = WordNetCorpusReader.MORPHOLOGICAL_SUBSTITUTIONS[pos]
            forms = [word[: -len(old)] + new for old, new in substitutions if word.endswith(old)]
        return [form for form in (word, *forms) if form in self._index[pos]]

    def _names(self, form: str, pos: str) -> list[str]:
        """Return the names in all synonym sets of one base form."""
        fields = self._index[pos][form].split()
        names = []
        for offset in fields[-int(fields[2]) :]:  # "lemma pos sets ...", ending with one offset per set
            start = int(offset)
            # "offset file pos count(hex) name id name id ..."; a name may end with a marker such as "(p)"
            parts = self._data[pos][start : self._data[pos].index(b"\n", start)].decode("utf-8").split()
            if parts[0] != offset:
                raise LexiconError(f"data.{PARTS_OF_SPEECH[pos]} has no entry at {offset}. {WORDNET_HELP}")
            names += [re.sub(r"\([^()]*\)$", "", name) for name in parts[4 : 4 + 2 * int(parts[3], 16) : 2]]
        return names


def _nltk_reader(resource: str) -> Reader:
    """Return a reader for a folder of NLTK's data, zipped or not. Raise LookupError if NLTK does not have it."""
    folder = nltk.data.find(resource)

    def read(name: str) -> bytes:
        with folder.join(name).open() as file:
            return file.read()

    return read


def find_wordnet() -> Reader:
    """Find WordNet in NLTK's data folders or in Debian's wordnet-base.

    Raises:
        LexiconError: WordNet is missing. The message says how to install it.
    """
    try:
        return _nltk_reader("corpora/wordnet/")
    except LookupError as error:
        if not DEBIAN_WORDNET.is_dir():
            raise LexiconError(f"{WORDNET_HELP} Not found in NLTK's data folders or in {DEBIAN_WORDNET}.") from error
        return lambda name: (DEBIAN_WORDNET / name).read_bytes()


def find_punkt() -> Reader:
    """Find the English Punkt model in NLTK's data folders or in the copy that llama-index-core contains.

    Raises:
        LexiconError: the model is missing. The message says how to install it.
    """
    try:
        return _nltk_reader("tokenizers/punkt_tab/english/")
    except LookupError as error:
        package = find_spec("llama_index")  # locates the package without importing it
        roots = [Path(root) for root in package.submodule_search_locations or []] if package else []
        for root in roots:
            folder = root / "core" / "_static" / "nltk_cache" / "tokenizers" / "punkt_tab" / "english"
            if folder.is_dir():
                return lambda name: (folder / name).read_bytes()
        raise LexiconError(f"{PUNKT_HELP} Not found in NLTK's data folders or in the Python packages.") from error


def load_wordnet() -> WordNet:
    """Load WordNet.

    Raises:
        LexiconError: WordNet is missing or incomplete.
    """
    return WordNet(find_wordnet())


def load_punkt() -> PunktSentenceTokenizer:
    """Load NLTK's English sentence tokenizer.

    Raises:
        LexiconError: the model is missing or incomplete.
    """
    read = find_punkt()
    parameters = PunktParameters()
    try:
        parameters.abbrev_types = set(_lines(read("abbrev_types.txt")))
        parameters.sent_starters = set(_lines(read("sent_starters.txt")))
        parameters.collocations = {tuple(line.split("\t")) for line in _lines(read("collocations.tab"))}
        for line in _lines(read("ortho_context.tab")):
            word, flags = line.split("\t")
            parameters.ortho_context[word] = int(flags)
    except (OSError, KeyError, ValueError) as error:
        raise LexiconError(f"The Punkt model is incomplete: {error}. {PUNKT_HELP}") from error
    return PunktSentenceTokenizer(parameters)


def _lines(content: bytes) -> list[str]:
    # Not splitlines(), because words of the model contain characters that Unicode treats as line ends.
    return content.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
