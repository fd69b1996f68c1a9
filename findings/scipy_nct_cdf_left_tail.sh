#!/usr/bin/env bash
# scipy 1.17.1: stats.nct.cdf left of zero is NaN, or larger than further right, if nc is large.
#
# A noncentral t variable T is (Z + nc) / sqrt(V / df). So P(T < 0) = Phi(-nc) for any df, and P(T < t) for t < 0 is
# even smaller. The power of a two-sided t-test, cdf(-t) + sf(t), needs this tail.
#
# Expected: for nc = 24 a number of at most Phi(-24) = 1.4e-127 (or 0.0), and a cdf that never decreases.
# Seen (df = 5, nc = 24):  cdf(-5) = 1.6e-33,  cdf(-2.5) = nan,  cdf(0) = 1.4e-127,  sf(-2.5) = 1.0
#   The absolute error is negligible, but the NaN propagates: the power of a test that is certain becomes NaN. For the
#   left tail, 1 - sf is correct to about 1e-16 where cdf is NaN.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q scipy==1.17.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys

from scipy.stats import nct, norm

df, nc = 5, 24
far, near, zero, tail = nct.cdf(-5, df, nc), nct.cdf(-2.5, df, nc), nct.cdf(0, df, nc), nct.sf(-2.5, df, nc)
bound = norm.cdf(-nc)
power = nct.cdf(-2.5, df, nc) + nct.sf(2.5, df, nc)
print(f"cdf(-5) = {far:.3g}, cdf(-2.5) = {near:.3g}, cdf(0) = {zero:.3g}, Phi(-nc) = {bound:.3g}, sf(-2.5) = {tail}")
print(f"power of the two-sided test: {power}")
same = far > 1e50 * bound and near != near and abs(zero / bound - 1) < 1e-6 and tail == 1.0 and power != power
sys.exit(0 if same else "the behaviour has changed")
PY
