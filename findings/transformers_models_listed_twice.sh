#!/usr/bin/env bash
# transformers 5.23.0: each start lists the files of all models twice, and the cache that should prevent it never hits.
#
# `import transformers` reads the Python files of all model folders for their names; `import transformers.models`, which
# every Auto class needs, asks for the same lists again. The function behind both is cached with `lru_cache`, whose default
# size of 128 is less than the number of model folders: when the second pass begins, its first folders are gone, and it
# pushes out the others one by one. Only the list of all folders would still be there, but it was asked for as a `Path`
# and is now asked for as the `str` of a file.
#
# Expected: the second pass finds the lists of the first, or at least some of them.
# Seen: more than 500 calls in each pass, none answered by the cache; the second pass takes 0.3 s, as long as the first.
#   Asked again as a `Path` before the second pass, the list of all folders takes less than a millisecond.
#
# Exits 1 once that changes: if the cache answers any call of the second pass.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q transformers==5.23.0 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY' 2>/dev/null
import sys
import time
from pathlib import Path

import transformers
from transformers.utils.import_utils import create_import_structure_from_path as listed

start = time.perf_counter()
listed(Path(transformers.__file__).parent / "models")
again = time.perf_counter() - start
first = listed.cache_info()
start = time.perf_counter()
import transformers.models

seconds = time.perf_counter() - start
second = listed.cache_info()
print(f"first pass: {first.misses} calls, none from the cache of {first.maxsize}")
print(f"second pass: {second.misses - first.misses + second.hits - first.hits} calls, {second.hits - first.hits} from the cache")
print(f"seconds: the same list as a Path {again:.5f}, second pass {seconds:.2f}")
sys.exit(0 if first.hits == 1 and second.hits == 1 and second.misses == 2 * first.misses else "the behaviour has changed")
PY
