#!/usr/bin/env bash
# SimpleITK 2.5.7: in an Enhanced CT file the rescale of the first frame is applied to all frames.
#
# An Enhanced CT stores its slices as frames of one file. RescaleSlope and RescaleIntercept are in the Pixel Value
# Transformation macro, given once for all frames or for each frame.
#
# Expected: each frame in HU by its own values: stored 1000 with intercepts -1000, -1100, -1200 gives 0, -100, -200.
# Seen: 0, 0, 0. No error or warning. The positions of the frames, from the same per-frame sequence, are used (spacing
#   2 mm). With pydicom 3.0.2 the correct values can be computed frame by frame.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q SimpleITK==2.5.7 pydicom==3.0.2 numpy==2.4.6
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import sys

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid


def item(**elements):
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


meta = FileMetaDataset()
meta.TransferSyntaxUID = ExplicitVRLittleEndian
frames = [
    item(
        FrameContentSequence=[item(StackID="1", InStackPositionNumber=i + 1, DimensionIndexValues=[1, i + 1])],
        PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 2 * i])],
        PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=intercept, RescaleType="HU")],
    )
    for i, intercept in enumerate([-1000, -1100, -1200])
]
shared = item(
    PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    PixelMeasuresSequence=[item(PixelSpacing=[1, 1], SliceThickness=2)],
)
dataset = item(
    SOPClassUID=EnhancedCTImageStorage,
    SOPInstanceUID=generate_uid(),
    StudyInstanceUID=generate_uid(),
    SeriesInstanceUID=generate_uid(),
    FrameOfReferenceUID=generate_uid(),
    Modality="CT",
    ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
    SharedFunctionalGroupsSequence=[shared],
    PerFrameFunctionalGroupsSequence=frames,
    NumberOfFrames=3,
    Rows=4,
    Columns=4,
    SamplesPerPixel=1,
    PhotometricInterpretation="MONOCHROME2",
    BitsAllocated=16,
    BitsStored=16,
    HighBit=15,
    PixelRepresentation=0,
    PixelData=np.full((3, 4, 4), 1000, dtype="<u2").tobytes(),
)
dataset["PixelData"].VR = "OW"
dataset.file_meta = meta
dataset.save_as("enhanced.dcm", enforce_file_format=True)

image = sitk.ReadImage("enhanced.dcm")
seen = sitk.GetArrayFromImage(image)[:, 0, 0].tolist()
read = pydicom.dcmread("enhanced.dcm")
rescales = [frame.PixelValueTransformationSequence[0] for frame in read.PerFrameFunctionalGroupsSequence]
right = [
    float(stored * r.RescaleSlope + r.RescaleIntercept)
    for stored, r in zip(read.pixel_array[:, 0, 0].astype(float), rescales, strict=True)
]
print(f"frame by frame: {right} HU; SimpleITK: {seen}, spacing {image.GetSpacing()[2]} mm")
same = right == [0, -100, -200] and seen == [0, 0, 0] and image.GetSpacing()[2] == 2
sys.exit(0 if same else "the behaviour has changed")
PY
