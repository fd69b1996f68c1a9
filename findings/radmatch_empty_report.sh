#!/usr/bin/env bash
# radmatch 0.2.2: a model that writes an empty report has fewer errors per report than one that writes a wrong one.
#
# RadMatch counts actionable errors of generated reports, such as a missed finding. A language model extracts the
# findings of each report. Here a server in the script replaces it to make the result deterministic: "A nodule of
# 12 mm." has one finding, "No abnormality." has none.
#
# Expected: the case with a nodule costs one missed finding if the report says "No abnormality." or is empty: 0.5
#   errors per report over the two cases.
# Seen: 0.5 for the model that writes "No abnormality.", and 0.0 for the one with an empty report. That case has no
#   file of generated findings and is left out of all means; the summary says n_reports = 1, and an error is logged.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q radmatch==0.2.2
cd "$dir"
NO_PROXY=127.0.0.1 no_proxy=127.0.0.1 "$dir/venv/bin/python" - <<'PY'
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NODULE, NORMAL = "A nodule of 12 mm.", "No abnormality."


class LanguageModel(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        finding = {"text": NODULE, "clinical_status": "abnormal", "clinical_significance": "urgent"}
        finding |= {"comparison": None, "measurements": []}
        found = [finding] if NODULE in body["messages"][-1]["content"] else []
        message = {"role": "assistant", "content": json.dumps({"findings": found})}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), LanguageModel)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["RADMATCH_LOCAL_BASE_URL"] = f"http://127.0.0.1:{server.server_port}/v1"
os.environ["RADMATCH_LOCAL_API_KEY"] = "none"

import radmatch  # noqa: E402
from radmatch import constants  # noqa: E402


def score(name, generated):
    folder = Path(name)
    for kind, texts in (("true", [NORMAL, NODULE]), ("generated", generated)):
        (folder / kind).mkdir(parents=True)
        for number, text in enumerate(texts):
            (folder / kind / f"{number}.txt").write_text(text)
    results = folder / constants.RESULTS_DIR
    true, written = results / constants.FINDINGS_GT_DIR, results / constants.FINDINGS_PRED_DIR
    model, options = "local:m", {"fewshot": "chest-ct", "workers": 1}
    radmatch.extract_findings(folder / "true", folder / "generated", folder, llm_extractor=model, **options)
    radmatch.match_dataset(true, written, results, llm_judge=model, **options)
    matches = results / constants.MATCHING_DIR
    summary = radmatch.score_dataset(true, written, matches, results, llm_judge=model, **options)
    return summary["metadata"]["n_reports"], summary["actionable_errors_per_report"]


seen = {"tries": score("tries", [NORMAL, NORMAL]), "writes nothing": score("nothing", [NORMAL, ""])}
for name, (reports, errors) in seen.items():
    print(f"{name}: {errors} errors per report over {reports} report(s)")
sys.exit(0 if seen == {"tries": (2, 0.5), "writes nothing": (1, 0.0)} else "the behaviour has changed")
PY
