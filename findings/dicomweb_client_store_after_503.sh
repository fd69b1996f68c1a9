#!/usr/bin/env bash
# dicomweb-client 0.61.2: an object that is sent again after a 503 is sent empty, and counts as stored.
#
# store_instances() sends objects above 1 MB in chunks, from a generator, and repeats a request after a 503 or another
# temporary error. The generator is created only once, before the first request, so the second request has no body. If
# the server answers it with 200, the call succeeds.
#
# Expected: the second request contains the object as the first did.
# Seen: 3,000,000 bytes and more, then 0; no error, no warning. An object below 1 MB is sent completely both times.
#   If a PACS is busy for a moment, the structured report arrives and the large parametric map does not.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q dicomweb-client==0.61.2 pydicom==3.0.2
cat > "$dir/store.py" <<'PY'
import http.server
import threading

from dicomweb_client.api import DICOMwebClient
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RawDataStorage, generate_uid

ANSWER = b'{"00081199": {"vr": "SQ", "Value": []}}'
sizes = []


class Busy(http.server.BaseHTTPRequestHandler):
    """Answer 503 to the first request and 200 to the others; record the sizes of the bodies."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        size = 0
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline().strip(), 16):
                size += len(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
        else:
            size = len(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        sizes.append(size)
        self.send_response(503 if len(sizes) == 1 else 200)
        self.send_header("Content-Type", "application/dicom+json")
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, *args):
        pass


def stored(size: int) -> list[int]:
    sizes.clear()
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = RawDataStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    data.add_new(0x00420011, "OB", b"x" * size)  # Encapsulated Document
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        DICOMwebClient(f"http://127.0.0.1:{server.server_port}").store_instances([data])
    finally:
        server.shutdown()
    return list(sizes)


small, large = stored(1000), stored(3_000_000)
print("1,000 bytes:", small)
print("3,000,000 bytes:", large)
assert len(small) == len(large) == 2, "the behaviour has changed"
assert small[0] == small[1] > 1000 and large[0] > 3_000_000 and large[1] == 0, "the behaviour has changed"
PY
"$dir/venv/bin/python" "$dir/store.py"
