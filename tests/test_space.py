# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""A visitor's session without a browser: scans are read and deleted, reports written, sides shown correctly."""

import base64
import inspect
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from diffvp.hub.space import session, viewer
from diffvp.hub.space.session import LARGEST, MAX_FILE_BYTES, Desk, PageStudy
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from diffvp.references_diffvp import ReferencePoolError, index_references
from diffvp.volume_diffvp import CTInputError, CTReadError

from .ct_samples import write_dicom

AFFINE = np.diag([-5.0, -5.0, 5.0, 1.0])  # array in LPS order
MARK = (slice(28, 34), slice(6, 12), slice(20, 26))  # left, anterior, superior


def body(seed: int) -> np.ndarray:
    """Make tissue with lungs in air and a metal block left, anterior and superior; [x, y, z] in LPS order."""
    lps = np.full((40, 36, 30), -1000, np.int16)
    lps[4:-4, 4:-4, 2:-2] = np.random.default_rng(seed).integers(-60, 60, (32, 28, 26))
    lps[9:16, 14:28, 6:22] = lps[24:31, 14:28, 6:18] = -850
    lps[MARK] = 1500
    return lps


def save(path, lps: np.ndarray):
    path.parent.mkdir(exist_ok=True, parents=True)
    nib.save(nib.Nifti1Image(lps, AFFINE), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tiny_fields, tiny_base_with_tokenizer, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    image_processor = DiffVPImageProcessor(size=(32, 32, 32), target_spacing=(7.0, 8.0, 8.5), foreground_hu=-500.0)
    processor = DiffVPProcessor(image_processor, pickle.loads(pickle.dumps(tokenizer)))
    torch.manual_seed(0)
    fields = {
        "diagnosis_prompt_ids": processor.diagnosis_prompt_ids(processor.tokenizer),
        "instruction_ids": processor(text=processor.instruction)["input_ids"][0].tolist(),
        "intended_domain": "boxes <of> noise",
        "initializer_range": 0.2,
    }
    model = DiffVPForConditionalGeneration.from_base(str(tiny_base_with_tokenizer), config={**tiny_fields, **fields})
    model.generation_config.update(max_new_tokens=40)
    references = tmp_path_factory.mktemp("pool")
    for seed in (101, 102, 103):
        save(references / f"normal-{seed}.nii.gz", body(seed))
    index_references(references)
    processor.load_references(references)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def desk(checkpoint, tmp_path_factory):
    return Desk(str(checkpoint), tmp_path_factory.mktemp("desk"))


@pytest.fixture
def study(desk, tmp_path):
    scan = desk.read(save(tmp_path / "scan.nii.gz", body(1)))
    name = desk.random_reference(scan, 3)
    made = PageStudy(desk, scan, desk.reference(name), reference_name=name, seed=3)
    yield made
    made.close()


def brightest(image: np.ndarray, low: int = 250) -> tuple[float, float]:
    """Return the centre (row, column) of the white pixels, as shares of the image. The letters are black here."""
    rows, columns = np.nonzero((image >= low).all(axis=-1))
    return rows.mean() / image.shape[0], columns.mean() / image.shape[1]


@pytest.mark.parametrize(
    ("name", "up", "left"),
    [("axial", True, False), ("coronal", True, False), ("sagittal", True, True)],  # A and L; S and L; S and A
)
def test_marked_voxels_appear_on_the_side_that_the_letters_state(study, name, up, left, monkeypatch):
    hu = study.scan.hu
    depth, height, width = (int(np.median(indices)) for indices in np.nonzero(hu > 1000))
    index = {"axial": depth, "coronal": height, "sagittal": width}[name]
    monkeypatch.setattr(viewer, "letters", lambda image, name: None)
    row, column = brightest(viewer.slice_image(study, name, index, (-160, 240)))
    assert (row < 0.45) == up and (row > 0.55) != up
    assert (column < 0.45) == left and (column > 0.55) != left


@pytest.mark.parametrize(("name", "edges"), [("axial", "RLAP"), ("coronal", "RLSI"), ("sagittal", "APSI")])
def test_letters_are_placed_at_their_edges(name, edges, monkeypatch):
    written = []
    monkeypatch.setattr(
        viewer.ImageDraw, "Draw",
        lambda image: types.SimpleNamespace(text=lambda at, letter, **options: written.append((at, letter))),
    )  # fmt: skip
    viewer.letters(Image.new("RGB", (300, 200)), name)
    at = {letter: place for place, letter in written}
    left, right, top, bottom = edges
    assert at[left][0] < 30 and at[right][0] > 270 and at[top][1] < 30 and at[bottom][1] > 170
    assert at[left][1] == at[right][1] == 100 and at[top][0] == at[bottom][0] == 150


def test_letters_are_drawn(study):
    image = viewer.slice_image(study, "axial", 0, (-160, 240))  # air: black except for the letters
    rows, columns = np.nonzero(image.max(axis=-1) > 200)
    assert rows.min() < 30 and rows.max() > image.shape[0] - 30
    assert columns.min() < 30 and columns.max() > image.shape[1] - 30


@pytest.mark.parametrize(
    ("hu", "window", "expected"),
    [(-160, "Mediastinum", 0), (240, "Mediastinum", 255), (40, "Mediastinum", 128), (-2000, "Lung", 0),
     (-600, "Lung", 128), (3000, "Bone", 255)],
)  # fmt: skip
def test_window_maps_hu_to_grey_values(hu, window, expected):
    assert viewer.grey(np.array([[hu]], np.int16), viewer.WINDOWS[window])[0, 0] == expected


def test_overlay_changes_nothing_when_off_and_colours_only_the_body():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    difference, inside = np.linspace(0, 1, 16).reshape(4, 4), np.ones((4, 4), bool)
    inside[2:] = False
    plain = np.repeat(image[..., None], 3, axis=-1)
    assert (viewer.blend(image, difference, inside, 0.0) == plain).all()
    over = viewer.blend(image, difference, inside, 0.8)
    assert (over[2:] == plain[2:]).all() and (over[0, 0] == plain[0, 0]).all()
    assert (over[1, 3] != plain[1, 3]).any()
    assert np.ptp(over[1, 3].astype(int)) > 20  # a colour, not a grey


def test_slices_are_embedded_in_the_page_as_png(study):
    html = viewer.plane_html(study, "coronal", 5, "Lung", 0.5)
    pictures = [part.split('"')[0] for part in html.split("data:image/png;base64,")[1:]]
    sizes = {Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures}
    assert len(pictures) == 2 and len(sizes) == 1
    width, height = sizes.pop()
    assert width / height == pytest.approx((32 * 8.5) / (32 * 7.0), rel=0.02)  # proportions of the box in mm
    assert "Target with difference map: coronal slice 5, lung window" in html
    assert "Reference: coronal slice 5, lung window" in html


def test_streamed_text_equals_the_text_of_generate(study, desk):
    pieces = list(study.stream())
    inputs = desk.processor(text=desk.processor.instruction)
    ids = desk.model.generate(study.scan.tensor, study.reference.tensor, **inputs, do_sample=False)
    expected = desk.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert len(expected) > 10 and len(set(pieces)) > 2
    assert pieces[-1] == expected == study.text == study.document["report"]
    assert all(expected.startswith(piece) for piece in pieces)


def test_files_match_the_report_and_are_deleted_with_the_study(study, desk):
    for _ in study.stream():
        pass
    text, document, map_file = study.write_files()
    assert text.read_text().startswith("Research use only. Not a medical device; not for diagnosis.")
    content = json.loads(document.read_text())
    assert content["statement"].startswith("Research use only")
    assert content["provenance"]["reference"]["seed"] == 3
    assert content["provenance"]["scan"]["sha256"] == study.scan.geometry.sha256
    image = nib.load(map_file)
    assert image.shape == (40, 36, 30) and np.allclose(image.affine, AFFINE)
    study.close()
    assert not text.exists() and not document.exists() and not map_file.exists()
    assert not list(desk.studies.iterdir())


def test_stopped_report_ends_early_without_a_document(study):
    stream = study.stream()
    next(stream)
    study.stop()
    left = list(stream)
    assert len(left) < 10 and study.document is None
    assert "Stopped before the end" in viewer.report_html(study)


def test_writing_stops_when_the_visitor_leaves(study, monkeypatch):
    written, generate = [], session.TransformersEngine.generate

    def counted(self, prompts, decoding, on_token):
        return generate(self, prompts, decoding, lambda *token: (written.append(token), on_token(*token)))

    monkeypatch.setattr(session.TransformersEngine, "generate", counted)
    stream = study.stream()
    next(stream)
    stream.close()
    assert study.document is None and len(written) < 10


def test_tokens_arrive_one_after_another_up_to_the_end(study):
    prompt = study.desk.compare(study.scan, study.reference)["prompt"]
    steps = list(study.desk.write(prompt))
    assert len(steps) > 5 and steps[5] == steps[-1][:6]
    assert [len(step) for step in steps] == list(range(1, len(steps) + 1))


def test_error_while_writing_reaches_the_reader(study, monkeypatch):
    def fail(**inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(study.desk.model.language_model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(study.stream())


def test_random_reference_equals_that_of_the_processor(desk, study, tmp_path):
    path = save(tmp_path / "same.nii.gz", body(1))
    drawn = [desk.random_reference(study.scan, seed) for seed in range(6)]
    assert drawn == [desk.processor(ct=path, reference_seed=seed).reference_ids[0] for seed in range(6)]
    assert len(set(drawn)) > 1


def test_nearest_reference_is_the_almost_identical_scan(desk, tmp_path):
    almost = body(102)
    almost[20, 18, 15] += 1
    scan = desk.read(save(tmp_path / "almost.nii.gz", almost))
    assert desk.nearest_reference(scan) == "normal-102"


def test_scan_is_never_its_own_reference(desk, tmp_path):
    scan = desk.read(save(tmp_path / "pool.nii.gz", body(102)))
    assert desk.nearest_reference(scan) != "normal-102"
    assert "normal-102" not in {desk.random_reference(scan, seed) for seed in range(8)}


def test_without_a_pool_a_reference_is_required(desk, study, monkeypatch):
    monkeypatch.setattr(desk.processor, "reference_pool", None)
    with pytest.raises(ReferencePoolError, match="give one of your own"):
        desk.nearest_reference(study.scan)


def test_places_are_inside_the_body_and_start_at_the_maps_peak(study):
    assert set(study.places) == {LARGEST, *(one["label"] for one in study.positive)}
    highest = study.difference[study.body].max()
    assert highest == 1.0 and study.difference.min() == 0.0
    assert study.difference[study.places[LARGEST]] > 0.9
    assert all(study.body[place] for place in study.places.values())


@pytest.fixture
def upload(desk):
    """Return `upload(name, content)`, which makes a file as a browser's upload leaves it and returns its path."""

    def put(name: str, content: bytes | None = None):
        path = desk.uploads / "hash" / name
        path.parent.mkdir(exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        return path

    yield put
    shutil.rmtree(desk.uploads / "hash", ignore_errors=True)


def test_upload_is_read_and_deleted(desk, upload):
    path = save(upload("scan.nii.gz"), body(4))
    scan = desk.receive(path)
    assert scan.hu.shape == (149, 171, 181) and not path.exists() and not list(desk.claimed.iterdir())


def test_zip_of_dicom_slices_is_read_and_deleted(desk, upload, tmp_path):
    folder = write_dicom(tmp_path / "slices", body(1))
    path = upload("scan.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    assert desk.receive(path).geometry.spacing == pytest.approx((1.5, 1.25, 2.5))
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("scan.pkl", pickle.dumps([1]), "expected .nii, .nii.gz or a .zip"),
     ("scan.pt", b"PK", "expected .nii, .nii.gz or a .zip"),
     ("scan.npy", b"\x93NUMPY", "expected .nii, .nii.gz or a .zip"),
     ("scan.nii.gz", b"no gzip at all" * 100, "scan.nii.gz"),
     ("scan.zip", b"no archive" * 100, "scan.zip")],
)  # fmt: skip
def test_upload_that_is_not_a_scan_is_refused_and_deleted(desk, upload, name, content, message):
    path = upload(name, content)
    with pytest.raises(CTInputError, match=message):
        desk.receive(path)
    assert not path.exists() and not list(desk.claimed.iterdir())


def test_scan_without_lungs_is_refused_and_deleted(desk, upload):
    path = save(upload("knee.nii.gz"), np.where(body(1) == -850, np.int16(40), body(1)))
    with pytest.raises(CTInputError, match="knee.nii.gz: lungs: "):
        desk.receive(path)
    assert not path.exists()


def test_too_large_file_is_refused_before_it_is_read(desk, upload, monkeypatch):
    path = upload("scan.nii", b"")
    with open(path, "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    monkeypatch.setattr(session, "read_ct", lambda path: pytest.fail("was read"))
    with pytest.raises(CTInputError, match="at most 512 MB"):
        desk.receive(path)
    assert not path.exists()
    assert "512 MB" in viewer.LIMITS


def test_file_that_was_not_uploaded_is_neither_read_nor_deleted(desk, upload, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    outside = save(tmp_path / "elsewhere" / "scan.nii.gz", body(4))
    link = upload("link.nii.gz")
    link.symlink_to(outside)
    sample = desk.sample("Phantom 1").path
    for path in (outside, link, sample, desk.uploads / ".." / "samples" / sample.name):
        with pytest.raises(CTInputError, match="not an uploaded file"):
            desk.receive(path)
        assert path.exists()
    for nothing in (None, ""):
        with pytest.raises(CTInputError, match="upload: file: none"):
            desk.receive(nothing)


@pytest.mark.parametrize("where", ["", "hash", "hash/.."])
def test_folders_of_uploads_are_neither_moved_nor_deleted(desk, upload, where):
    path = save(upload("scan.nii.gz"), body(4))
    for receive in (desk.receive, lambda folder: desk.receive_reference(folder, None)):
        with pytest.raises(CTInputError) as caught:
            receive(os.path.join(desk.uploads, where))
        assert caught.value.field == "upload"
        assert path.is_file() and not list(desk.claimed.iterdir())
    pipe = upload("pipe.nii.gz")
    os.mkfifo(pipe)
    with pytest.raises(CTInputError):
        desk.receive(pipe)
    assert pipe.exists()
    assert desk.receive(path).hu.shape == (149, 171, 181)


def test_own_reference_is_another_scan_than_the_target(desk, study, upload):
    path = save(upload("other.nii.gz"), body(4))
    assert desk.receive_reference(path, study.scan).geometry.sha256 != study.scan.geometry.sha256
    path = save(upload("again.nii.gz"), body(1))  # the scan of the study, under another name
    with pytest.raises(CTReadError) as caught:
        desk.receive_reference(path, study.scan)
    assert caught.value.field == "reference" and not path.exists()


def test_own_reference_before_the_scan_is_refused_and_deleted_unread(desk, upload, monkeypatch):
    path = save(upload("other.nii.gz"), body(4))
    monkeypatch.setattr(session, "read_ct", lambda path: pytest.fail("was read"))
    with pytest.raises(CTReadError) as caught:
        desk.receive_reference(path, None)
    assert caught.value.field == "reference" and not path.exists() and not list(desk.claimed.iterdir())


def test_same_upload_from_two_visitors_is_read_once_and_refused_once(desk, upload):
    path = save(upload("scan.nii.gz"), body(4))
    with ThreadPoolExecutor(2) as threads:
        outcomes = [threads.submit(desk.receive, path) for _ in range(2)]
    [error] = [one.exception() for one in outcomes if one.exception()]
    assert "scan.nii.gz: upload: no longer there (expected the file again" in str(error)


def test_unread_uploads_are_limited_and_old_ones_deleted(desk, upload, monkeypatch):
    monkeypatch.setattr(session, "MAX_UPLOADED_FILES", 2)
    monkeypatch.setattr(session, "MAX_UPLOADED_BYTES", 1000)
    first = upload("a.nii", b"0" * 600)
    assert desk.has_room(400) and not desk.has_room(401)
    second = upload("b.nii", b"0")
    assert not desk.has_room(0)
    long_ago = time.time() - session.UPLOAD_SECONDS - 1
    os.utime(first, (long_ago, long_ago))
    assert desk.has_room(999) and not first.exists() and second.exists()
    second.unlink()
    os.utime(second.parent, (long_ago, long_ago))
    assert desk.has_room(0) and not second.parent.exists()


def test_sample_is_rendered_once_with_its_true_report(desk):
    first, again = desk.sample("Phantom 1"), desk.sample("Phantom 1")
    assert first is again and first.path.is_file() and "Lung:" in first.truth
    assert "phantom_1" in first.path.name and nib.load(first.path).shape[:2] == (144, 144)


def test_report_is_shown_by_region_and_escaped(study):
    study.text = "Heart: <b>large</b>.\nLung: clear.\nMediast"
    html = viewer.report_html(study, writing=True)
    assert "<h3>Heart</h3><p>&lt;b&gt;large&lt;/b&gt;.</p>" in html and "<h3>Lung</h3><p>clear.</p>" in html
    assert "Mediast" not in html and 'aria-busy="true"' in html  # no heading before its colon


def test_statements_and_errors_are_visible_and_escaped(desk):
    header = viewer.header_html(desk.model.config.intended_domain)
    assert "Research use only. Not a medical device; not for diagnosis." in header
    assert "boxes &lt;of&gt; noise" in header
    error = viewer.status_html("a.nii: spacing: <0>", error=True)
    assert 'role="alert"' in error and "a.nii: spacing: &lt;0&gt;" in error


class TestPage:
    @pytest.fixture(autouse=True)
    def gradio(self):
        return pytest.importorskip("gradio", reason="the page needs gradio (pip install -e .[app])")

    def test_page_has_no_public_link_and_only_the_report_endpoint(self, gradio, desk, monkeypatch):
        from diffvp.hub.space.page import build_page, launch

        monkeypatch.setenv("GRADIO_TEMP_DIR", "")
        page, asked = build_page(desk), {}
        monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: asked.update(options) or (0, "", ""))
        launch(page, "127.0.0.1", 7999)
        assert asked["share"] is False and asked["max_file_size"] == MAX_FILE_BYTES
        assert asked["run_history"] is False and asked["mcp_server"] is None
        public = [fn.api_name for fn in page.fns.values() if fn.api_visibility != "private"]
        assert [name for name in public if name != "leave"] == ["report"]

    def test_studies_are_closed_on_leaving_and_beyond_the_limit(self, monkeypatch):
        from diffvp.hub.space import page

        class Closing:
            closed = False

            def close(self):
                self.closed = True

        monkeypatch.setattr(page, "MAX_VISITS", 2)
        visits, studies = page.Visits(), [Closing() for _ in range(4)]
        guests = [types.SimpleNamespace(session_hash=name) for name in "abc"]
        visits.put(guests[0], studies[0])
        visits.put(guests[1], studies[1])
        visits.get(guests[0])
        visits.put(guests[2], studies[2])
        assert [one.closed for one in studies] == [False, True, False, False]  # b was used least recently
        visits.put(guests[0], studies[3])
        visits.leave(guests[2])
        assert [one.closed for one in studies] == [True, True, True, False]
        assert visits.get(guests[2]) is None and visits.get(guests[0]) is studies[3]


def test_temporary_folder_is_empty_after_a_visit(checkpoint, tmp_path, monkeypatch):
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    desk = Desk(str(checkpoint), tmp_path / "desk")
    folder = write_dicom(tmp_path / "slices", body(1))
    upload = shutil.make_archive(str(desk.uploads / "scan"), "zip", folder)
    scan = desk.receive(upload)
    one = PageStudy(desk, scan, desk.reference("normal-101"), reference_name="normal-101")
    for _ in one.stream():
        pass
    one.write_files()
    one.close()
    assert not list(elsewhere.rglob("*")) and not [path for path in (tmp_path / "desk").rglob("*") if path.is_file()]
    assert not list(desk.studies.iterdir()) and not list(desk.claimed.iterdir())


class TestZeroGPU:
    @pytest.fixture
    def zero_gpu(self, monkeypatch):
        """Fake the package `spaces`: arguments and results are pickled, as ZeroGPU passes them to another process."""
        calls = []

        def passed_on(value):
            return pickle.loads(pickle.dumps(value))

        def on_gpu(function):
            if inspect.isgeneratorfunction(function):

                def run(*arguments):
                    calls.append(function.__name__)
                    for value in function(*map(passed_on, arguments)):
                        yield passed_on(value)

            else:

                def run(*arguments):
                    calls.append(function.__name__)
                    return passed_on(function(*map(passed_on, arguments)))

            return run

        monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=on_gpu))
        return calls

    def test_all_computation_runs_in_gpu_functions(self, checkpoint, zero_gpu, study, tmp_path):
        for _ in study.stream():
            pass
        remote = Desk(str(checkpoint), tmp_path / "desk")
        scan = remote.read(save(tmp_path / "scan.nii.gz", body(1)))
        name = study.reference_name
        again = PageStudy(remote, scan, remote.reference(name), reference_name=name, seed=3)
        assert zero_gpu == ["encode", "encode", "compare"]
        pieces = list(again.stream())
        assert zero_gpu[3:] == ["write"] and len(pieces) > 2 and again.text == study.text
        assert again.findings == study.findings and again.places == study.places

    def test_spaces_package_changes_nothing_without_zero_gpu(self):
        pytest.importorskip("spaces")

        def function():
            pass

        assert session.on_gpu(function) is function
