#!/usr/bin/env bash
# dcm2niix 1.0.20260724: a slice rotated by 0.0002 rad is replaced by the mean of its neighbours.
#
# Each slice has its ImageOrientationPatient, as decimal text. 0.0002 rad is a hundredth of a degree, or 0.05 mm at
# the edge of a 500 mm field of view.
#
# Expected: one volume of six slices with slice 4 as stored, or no volume if the slices do not fit together.
# Seen: one volume for 0.0001. For 0.0002 three files: slice 4 alone, the other five, and an "_Eq_1" volume in which
#   the gap is interpolated. Slice 4 is 1000 everywhere and its neighbours are 0; the six-slice volume is 0 everywhere,
#   so a lesion in that slice is missing from the only file that looks complete. Messages are printed; exit status 0.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q dcm2niix==1.0.20260724 pydicom==3.0.2 nibabel==5.4.2 numpy==2.4.6
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import subprocess
import sys
from pathlib import Path

import dcm2niix
import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write_series(folder, turn):
    folder.mkdir()
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for i in range(6):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.Modality, ds.ImageType, ds.PatientPosition = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], "HFS"
        ds.SeriesNumber, ds.InstanceNumber, ds.ProtocolName = 1, i + 1, "chest"
        cosine, sine = (round(float(f(turn if i == 3 else 0)), 7) for f in (np.cos, np.sin))
        ds.ImageOrientationPatient = [cosine, sine, 0, -sine, cosine, 0]
        ds.ImagePositionPatient, ds.PixelSpacing, ds.SliceThickness = [0, 0, 2 * i], [1, 1], 2
        ds.Rows = ds.Columns = 32
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept = 1, 0
        ds.PixelData = np.full((32, 32), 1000 if i == 3 else 0, dtype="<i2").tobytes()
        ds["PixelData"].VR = "OW"
        ds.save_as(folder / f"{i}.dcm", enforce_file_format=True)


seen = {}
for turn in (0.0001, 0.0002):
    source, target = Path(f"dicom-{turn}"), Path(f"nifti-{turn}")
    write_series(source, turn)
    target.mkdir()
    command = [dcm2niix.bin, "-b", "n", "-f", "ct", "-o", str(target), str(source)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    volumes = {path.name: np.asarray(nibabel.load(path).dataobj) for path in target.glob("*.nii")}
    print(f"turned by {turn}: exit status {done.returncode}")
    for name, volume in sorted(volumes.items()):
        print(f"  {name}: {volume.shape[2] if volume.ndim > 2 else 1} slice(s), highest value {volume.max()}")
    complete = [int(volume.max()) for volume in volumes.values() if volume.shape[2:] == (6,)]
    seen[turn] = (done.returncode, len(volumes), complete)
sys.exit(0 if seen == {0.0001: (0, 1, [1000]), 0.0002: (0, 3, [0])} else "the behaviour has changed")
PY
