# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The web page: its components and its events. [`serve_page`] runs it.

Programs have one endpoint, `report`, which is also a tool for language models if the page is served with `mcp`. All
other events are private.
"""

import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from ...inference.figure import PLANES
from ...inference.report import EXPECTED_ERRORS
from ...scratch import make_folder
from .session import LARGEST, MAX_FILE_BYTES, Desk, PageStudy
from .upload import Upload, UploadLimit
from .viewer import (
    LIMITS,
    WAITING,
    WINDOWS,
    choices,
    header_html,
    plane_html,
    position,
    report_html,
    status_html,
)

MAX_VISITS = 24  # studies in memory, 60 MB each; the least recently viewed is dropped
MAX_WAITING = 32  # visitors waiting for the model
RANDOM, NEAREST, OWN = "Random", "Nearest", "Own file"
STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("wheel.js")
DOWNLOADS = ("Report (.txt)", "Report (.json)", "Map (.nii.gz)")
log = logging.getLogger("diffvp.page")


def explained(error: Exception) -> str:
    """Return the message for a visitor. Only the type of a defect is logged: its message might quote the scan."""
    if isinstance(error, EXPECTED_ERRORS):
        return str(error)
    log.error("%s", type(error).__name__)
    return f"An error occurred ({type(error).__name__}). Choose again; if it persists, tell the operator of this page."


class Visits:
    """Studies of the visitors, by the hash of their session."""

    def __init__(self):
        self._studies: OrderedDict[str, PageStudy] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, request: gr.Request) -> PageStudy | None:
        with self._lock:
            if request.session_hash in self._studies:
                self._studies.move_to_end(request.session_hash)
            return self._studies.get(request.session_hash)

    def put(self, request: gr.Request, study: PageStudy) -> None:
        self.leave(request)
        with self._lock:
            self._studies[request.session_hash] = study
            surplus = [self._studies.popitem(last=False)[1] for _ in range(len(self._studies) - MAX_VISITS)]
        for one in surplus:
            one.close()

    def stop(self, request: gr.Request) -> None:
        study = self.get(request)
        if study is not None:
            study.stop()

    def leave(self, request: gr.Request) -> None:
        with self._lock:
            study = self._studies.pop(request.session_hash, None)
        if study is not None:
            study.close()


class _Page:
    """
    Components and events of the page. Made within `gr.Blocks`.

    Handlers `run_...` are generators: each dict that they yield updates some components.
    """

    def __init__(self, desk: Desk):
        self.desk, self.visits = desk, Visits()
        gr.HTML(header_html(desk.model.config.intended_domain), elem_id="banner")
        with gr.Row(elem_id="work"):
            self._add_choices()
            self._add_planes()
            self._add_report()
        self._add_endpoint()
        self.look = [self.window, self.overlay, self.opacity]
        self.pictures, self.numbers = list(self.views.values()), list(self.sliders.values())

    # Components

    def _add_choices(self) -> None:
        """Add the column with the scan and the reference to choose."""
        file = {"file_types": [".nii", ".gz", ".zip"], "height": 110}
        with gr.Column(elem_id="choose", scale=0, min_width=250):
            self.sample = gr.Radio(list(self.desk.sample_names), label="Sample phantom", elem_id="sample")
            self.upload = Upload(label="Own scan", elem_id="upload", **file)
            gr.HTML(f'<p class="quiet">{LIMITS}</p>')
            self.kind = gr.Radio([RANDOM, NEAREST, OWN], value=RANDOM, label="Normal reference", elem_id="kind")
            self.draw = gr.Button("Draw another", size="sm", elem_id="draw")
            self.own = Upload(label="Own reference", visible=False, elem_id="own", **file)

    def _add_planes(self) -> None:
        """Add the column with the status, the display options and the three planes."""
        self.views, self.sliders = {}, {}
        with gr.Column(elem_id="view", min_width=300):
            self.status = gr.HTML(status_html(WAITING), elem_id="status")
            with gr.Row(elem_id="tools"):
                self.window = gr.Radio(list(WINDOWS), value="Mediastinum", label="Window", elem_id="window")
                self.overlay = gr.Checkbox(True, label="Difference map", elem_id="overlay")
                self.opacity = gr.Slider(5, 100, 50, step=5, label="Opacity, %", elem_id="opacity")
            with gr.Row(elem_id="planes"):
                for name in PLANES:
                    with gr.Column(min_width=180, elem_classes="one-plane"):
                        self.views[name] = gr.HTML(plane_html(None, name, 1, "Mediastinum", 0), elem_id=f"view-{name}")
                        self.sliders[name] = gr.Slider(
                            1, 2, 1, step=1, label=f"{name.capitalize()} slice", interactive=False, buttons=[],
                            elem_id=f"slice-{name}",
                        )  # fmt: skip

    def _add_report(self) -> None:
        """Add the column with the findings, the report and the downloads."""
        with gr.Column(elem_id="read", scale=0, min_width=320):
            self.finding = gr.Radio(choices(None), label="Go to", interactive=False, elem_id="finding")
            self.report = gr.HTML(report_html(None), elem_id="report")
            with gr.Row(elem_id="downloads"):
                self.downloads = [gr.DownloadButton(label, size="sm", interactive=False) for label in DOWNLOADS]
        for button in self.downloads:
            button.GRADIO_CACHE = str(self.desk.studies)  # otherwise a copy would outlive the study

    def _add_endpoint(self) -> None:
        """Add the hidden components of the endpoint for programs."""
        sent, seed, written = Upload(visible=False), gr.Number(0, precision=0, visible=False), gr.JSON(visible=False)
        gr.Button(visible=False).click(
            self.write_report, [sent, seed], written, api_name="report", concurrency_id="model", concurrency_limit=1
        )

    def connect(self, page: gr.Blocks) -> None:
        """Connect components and events."""
        sample, upload, kind, draw, own = self.sample, self.upload, self.kind, self.draw, self.own
        look, finding = self.look, self.finding
        everything = [sample, upload, kind, draw, own, self.status, finding, self.report]
        everything += [*self.pictures, *self.numbers, *self.downloads]
        silent = {"show_progress": "hidden", "api_visibility": "private"}
        for trigger, run, inputs in (
            (sample.input, self.run_sample, [sample, kind, *look]),
            (upload.upload, self.run_upload, [upload, kind, *look]),
            (kind.input, self.run_reference, [kind, own, *look]),
            (own.upload, self.run_reference, [kind, own, *look]),
            (draw.click, self.run_draw, [kind, own, *look]),
        ):
            # A new choice stops the report that is being written, so that the visitor does not wait for it.
            trigger(self.visits.stop, None, None, queue=False, **silent).then(
                run, inputs, everything, concurrency_id="model", concurrency_limit=1, **silent
            )
        for name, slider in self.sliders.items():
            slider.input(
                self._scroll(name),
                [slider, *look],
                self.views[name],
                queue=False,
                trigger_mode="always_last",
                **silent,
            )
        finding.input(self.go_to, [finding, *look], [*self.numbers, *self.pictures], queue=False, **silent)
        gr.on(
            [one.input for one in look], self.relook, [*self.numbers, *look], self.pictures,
            queue=False, trigger_mode="always_last", **silent,
        )  # fmt: skip
        page.unload(self.visits.leave)

    # Updates of components

    def _images(self, study: PageStudy | None, at: dict[str, int], window: str, overlay: bool, opacity: float) -> dict:
        shown = opacity / 100 if overlay else 0.0
        return {self.views[name]: plane_html(study, name, at[name], window, shown) for name in PLANES}

    def _moved(self, study: PageStudy, place: str, *look) -> dict:
        at = position(study.places[place])
        lengths = dict(zip(PLANES, study.scan.hu.shape, strict=True))
        sizes = {
            self.sliders[name]: gr.Slider(maximum=lengths[name], value=at[name], interactive=True) for name in PLANES
        }
        return sizes | self._images(study, at, *look)

    def _no_downloads(self) -> dict:
        return {button: gr.DownloadButton(value=None, interactive=False) for button in self.downloads}

    def _empty(self, *look) -> dict:
        return {
            **self._images(None, dict.fromkeys(PLANES, 1), *look),
            **{slider: gr.Slider(interactive=False) for slider in self.numbers},
            **self._no_downloads(),
            self.finding: gr.Radio(choices(None), value=None, interactive=False),
            self.report: report_html(None),
        }

    # Handlers

    def _compare_steps(self, scan, truth, kind, own, seed, look, request) -> Iterator[dict]:
        """Make a study of a scan, from the choice of the reference to the files of the report."""
        name, desk = None, self.desk
        if kind == OWN:
            reference, described = desk.receive_reference(own, scan), "your own"
        else:
            name = desk.nearest_reference(scan) if kind == NEAREST else desk.random_reference(scan, seed)
            reference = desk.reference(name)
            described = f"{name}, nearest by features" if kind == NEAREST else f"{name}, drawn with seed {seed}"
        options = {"reference_name": name, "seed": seed if kind == RANDOM else None, "truth": truth}
        study = PageStudy(desk, scan, reference, **options)
        self.visits.put(request, study)
        against = f"Reference: {described}."
        yield {
            **self._moved(study, LARGEST, *look),
            **self._no_downloads(),
            self.finding: gr.Radio(choices(study), value=LARGEST, interactive=True),
            self.status: status_html(f"{against} Writing the report."),
            self.report: report_html(study, writing=True),
        }
        for _ in study.stream():
            yield {self.report: report_html(study, writing=True)}
        yield {self.report: report_html(study), self.status: status_html(against)}
        if study.document is not None:
            files = study.write_files()
            yield {
                button: gr.DownloadButton(value=str(file), interactive=True)
                for button, file in zip(self.downloads, files, strict=True)
            }

    def _scan_steps(self, read: Callable[[], tuple], chosen, look, request) -> Iterator[dict]:
        """Start with another scan. An own reference belonged to the previous scan."""
        try:
            (scan, truth), chosen = read(), RANDOM if chosen == OWN else chosen
            yield {self.kind: chosen, self.own: Upload(value=None, visible=False)}
            yield from self._compare_steps(scan, truth, chosen, None, 0, look, request)
        except Exception as error:  # any error: otherwise the page would say "Reading" forever
            self.visits.leave(request)
            yield {**self._empty(*look), self.status: status_html(explained(error), error=True)}

    def _again_steps(self, chosen, path, seed, look, request) -> Iterator[dict]:
        """Compare the scan with another reference."""
        study = self.visits.get(request)
        # An own reference without a scan is refused, and deleted, by the desk.
        if (path if chosen == OWN else study) is None:
            return
        scan, truth = (None, None) if study is None else (study.scan, study.truth)
        yield {self.status: status_html("Reading the reference.")}
        try:
            yield from self._compare_steps(scan, truth, chosen, path, seed, look, request)
        except Exception as error:  # the earlier images stay
            yield {self.status: status_html(explained(error), error=True), self.report: report_html(study)}
        yield {self.own: None}

    def run_sample(self, request: gr.Request, sample, kind, *look):
        def read():
            phantom = self.desk.sample(sample)
            return self.desk.read(phantom.path), phantom.truth

        yield {self.status: status_html(f"Reading {sample}."), self.upload: None}
        yield from self._scan_steps(read, kind, look, request)

    def run_upload(self, request: gr.Request, path, kind, *look):
        yield {self.status: status_html("Reading the scan."), self.sample: None}
        yield from self._scan_steps(lambda: (self.desk.receive(path), None), kind, look, request)
        yield {self.upload: None}

    def run_reference(self, request: gr.Request, chosen, path, *look):
        yield {self.own: Upload(visible=chosen == OWN), self.draw: gr.Button(visible=chosen == RANDOM)}
        yield from self._again_steps(chosen, path, 0, look, request)

    def run_draw(self, request: gr.Request, chosen, path, *look):
        study = self.visits.get(request)
        yield from self._again_steps(chosen, path, 0 if study is None else (study.seed or 0) + 1, look, request)

    def go_to(self, request: gr.Request, place, *look):
        study = self.visits.get(request)
        # A choice for the previous study may arrive after it was replaced.
        return {} if study is None or place not in study.places else self._moved(study, place, *look)

    def _scroll(self, name: str) -> Callable:
        def show(number, window, overlay, opacity, request: gr.Request):
            shown = opacity / 100 if overlay else 0.0
            return plane_html(self.visits.get(request), name, int(number), window, shown)

        return show

    def relook(self, request: gr.Request, axial, coronal, sagittal, *look):
        study = self.visits.get(request)
        at = {"axial": axial, "coronal": coronal, "sagittal": sagittal}
        return {} if study is None else self._images(study, at, *look)

    def write_report(self, scan: str, reference_seed: int = 0) -> dict:
        """
        Write the report of a chest CT by comparing it with a normal scan. Research use only: not a medical
        device, not for diagnosis.

        Args:
            scan: an uploaded NIfTI file or .zip of DICOM slices.
            reference_seed: another number draws another normal reference.

        Returns:
            the report by region, the findings with probabilities, and the provenance.
        """
        study = None
        try:
            target = self.desk.receive(scan)
            seed = int(reference_seed)
            name = self.desk.random_reference(target, seed)
            study = PageStudy(self.desk, target, self.desk.reference(name), reference_name=name, seed=seed)
            for _ in study.stream():
                pass
            return study.document
        except Exception as error:
            raise gr.Error(explained(error)) from error
        finally:
            if study is not None:
                study.close()


def build_page(desk: Desk) -> gr.Blocks:
    """Build the page with all components and events. Uploads go to the folder of the desk and disappear with it."""
    os.environ["GRADIO_TEMP_DIR"] = str(desk.uploads)
    with gr.Blocks(title="DiffVP", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        _Page(desk).connect(page)
    page.desk = desk
    return page


def theme() -> gr.themes.Base:
    """Return a small grey theme with system fonts only."""
    return gr.themes.Base(
        primary_hue="sky", neutral_hue="slate", text_size="sm", spacing_size="sm", radius_size="sm",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip


def launch(page: gr.Blocks, host: str, port: int | None, *, mcp: bool = False, block: bool = True) -> str:
    """
    Serve the page, without a public Gradio link, and return its address.

    Args:
        mcp: also serve the endpoint as a tool at `/gradio_api/mcp/` (Model Context Protocol). The environment variable
            GRADIO_MCP_SERVER=True does the same.
    """
    _, address, _ = page.queue(max_size=MAX_WAITING).launch(
        server_name=host, server_port=port, share=False, max_file_size=MAX_FILE_BYTES, footer_links=[], quiet=True,
        theme=theme(), css_paths=STYLE, js=SCRIPT.read_text(encoding="utf-8"), ssr_mode=False,
        prevent_thread_lock=not block, mcp_server=mcp or None, allowed_paths=[str(page.desk.studies)],
        run_history=False,  # otherwise the browser of the visitor would keep reports
        app_kwargs={"middleware": [Middleware(UploadLimit, desk=page.desk)]},
    )  # fmt: skip
    return address


def serve_page(checkpoint: str, host: str, port: int, *, mcp: bool = False) -> None:
    """Load a checkpoint and serve the page until the process ends.

    Raises:
        DiffVPCheckpointError: there is no such checkpoint, or its files do not fit together.
    """
    folder = make_folder("diffvp-app-")
    try:
        desk = Desk(checkpoint, folder)
        launch(build_page(desk), host, port, mcp=mcp)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
