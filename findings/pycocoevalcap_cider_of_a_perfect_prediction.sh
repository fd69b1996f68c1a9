#!/usr/bin/env bash
# pycocoevalcap 1.2: CIDEr of a prediction equal to its reference is 0, 2.5 or 10, depending on the other references.
#
# CIDEr weights n-grams by their rarity in the references of the *scored set*, and is the mean over n = 1 to 4.
#
# Expected: a prediction that equals its only reference gets the full score, 10.
# Seen: 10 in a set of three different reports. The same pair scored alone gets 0, because each n-gram is in every
#   reference and each weight is log(1) = 0. So does every case of a set with equal references, such as normal reports.
#   A report of one word gets at most 2.5, because it has no longer n-grams. Scores of single cases, of subsets
#   ("normal scans only") and of different test sets are therefore not comparable.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-deps pycocoevalcap==1.2 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys

from pycocoevalcap.cider.cider import Cider

report = "there is no pleural effusion on either side"
others = ["a nodule lies in the right upper lobe", "the heart is enlarged with calcified vessels"]
sets = {
    "three different": [report, *others],
    "alone": [report],
    "all alike": [report] * 3,
    "one word": ["normal", *others],
}
seen = {}
for name, references in sets.items():
    cases = {i: [text] for i, text in enumerate(references)}
    seen[name] = round(float(Cider().compute_score(cases, cases)[1][0]), 6)
    print(f"{name}: CIDEr of the first prediction, equal to its reference: {seen[name]}")
same = seen == {"three different": 10.0, "alone": 0.0, "all alike": 0.0, "one word": 2.5}
sys.exit(0 if same else "the behaviour has changed")
PY
