# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The page: what a visitor can choose, and what happens then. `serve` runs it.

For programs it has one endpoint with a name, `report`, which is also a tool for language models where the page is
served with `mcp`. Everything else of it has none.
"""

import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator
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

MAX_VISITS = 24  # studies in memory, of 60 MB each; the one that was looked at longest ago goes first
MAX_WAITING = 32  # visitors in line for the model
RANDOM, NEAREST, OWN = "Random", "Nearest", "Own file"
STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("wheel.js")
DOWNLOADS = ("Report (.txt)", "Report (.json)", "Map (.nii.gz)")
log = logging.getLogger("diffvp.page")


def explained(error: Exception) -> str:
    """What a visitor is told. A defect goes to the log by its kind alone: its message might quote the scan."""
    if isinstance(error, EXPECTED_ERRORS):
        return str(error)
    log.error("%s", type(error).__name__)
    return f"Something went wrong here ({type(error).__name__}). Choose again; if it stays, tell who runs this page."


class Visits:
    """The study of each visitor, by the hash of his session."""

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


def build_page(desk: Desk) -> gr.Blocks:
    """All components and events. The folder for uploads is the desk's, so that it goes with it."""
    os.environ["GRADIO_TEMP_DIR"] = str(desk.uploads)
    visits = Visits()
    middle = dict.fromkeys(PLANES, 1)
    with gr.Blocks(title="DiffVP", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        gr.HTML(header_html(desk.model.config.intended_domain), elem_id="banner")
        with gr.Row(elem_id="work"):
            with gr.Column(elem_id="choose", scale=0, min_width=250):
                sample = gr.Radio(list(desk.sample_names), label="Sample phantom", elem_id="sample")
                upload = Upload(label="Own scan", file_types=[".nii", ".gz", ".zip"], height=110, elem_id="upload")
                gr.HTML(f'<p class="quiet">{LIMITS}</p>')
                kind = gr.Radio([RANDOM, NEAREST, OWN], value=RANDOM, label="Normal reference", elem_id="kind")
                draw = gr.Button("Draw another", size="sm", elem_id="draw")
                own = Upload(
                    label="Own reference", file_types=[".nii", ".gz", ".zip"], height=110, visible=False, elem_id="own"
                )
            with gr.Column(elem_id="view", min_width=300):
                status = gr.HTML(status_html(WAITING), elem_id="status")
                with gr.Row(elem_id="tools"):
                    window = gr.Radio(list(WINDOWS), value="Mediastinum", label="Window", elem_id="window")
                    overlay = gr.Checkbox(True, label="Difference map", elem_id="overlay")
                    opacity = gr.Slider(5, 100, 50, step=5, label="Opacity, %", elem_id="opacity")
                views, sliders = {}, {}
                with gr.Row(elem_id="planes"):
                    for name in PLANES:
                        with gr.Column(min_width=180, elem_classes="one-plane"):
                            views[name] = gr.HTML(plane_html(None, name, 1, "Mediastinum", 0), elem_id=f"view-{name}")
                            sliders[name] = gr.Slider(
                                1, 2, 1, step=1, label=f"{name.capitalize()} slice", interactive=False,
                                buttons=[], elem_id=f"slice-{name}",
                            )  # fmt: skip
            with gr.Column(elem_id="read", scale=0, min_width=320):
                finding = gr.Radio(choices(None), label="Go to", interactive=False, elem_id="finding")
                report = gr.HTML(report_html(None), elem_id="report")
                with gr.Row(elem_id="downloads"):
                    downloads = [gr.DownloadButton(label, size="sm", interactive=False) for label in DOWNLOADS]
        for button in downloads:
            button.GRADIO_CACHE = str(desk.studies)  # else a copy would outlive the study
        # Of the endpoint for programs.
        sent, number, written = Upload(visible=False), gr.Number(0, precision=0, visible=False), gr.JSON(visible=False)
        asked = gr.Button(visible=False)

        look = [window, overlay, opacity]
        pictures, numbers = list(views.values()), list(sliders.values())

        def images(study: PageStudy | None, at: dict[str, int], window: str, overlay: bool, opacity: float) -> dict:
            shown = opacity / 100 if overlay else 0.0
            return {views[name]: plane_html(study, name, at[name], window, shown) for name in PLANES}

        def moved(study: PageStudy, place: str, *look) -> dict:
            at = position(study.places[place])
            lengths = dict(zip(PLANES, study.scan.hu.shape, strict=True))
            sizes = {
                sliders[name]: gr.Slider(maximum=lengths[name], value=at[name], interactive=True) for name in PLANES
            }
            return sizes | images(study, at, *look)

        def empty(*look) -> dict:
            return {
                **images(None, middle, *look),
                **{slider: gr.Slider(interactive=False) for slider in numbers},
                **{button: gr.DownloadButton(value=None, interactive=False) for button in downloads},
                finding: gr.Radio(choices(None), value=None, interactive=False),
                report: report_html(None),
            }

        def compare(scan, truth, kind, own, seed, look, request) -> Iterator[dict]:
            """A study of a scan, from the choice of the reference to the files of the report."""
            name = None
            if kind == OWN:
                reference, described = desk.receive(own), "your own"
            else:
                name = desk.nearest_reference(scan) if kind == NEAREST else desk.random_reference(scan, seed)
                reference = desk.reference(name)
                described = f"{name}, nearest by features" if kind == NEAREST else f"{name}, drawn with seed {seed}"
            options = {"reference_name": name, "seed": seed if kind == RANDOM else None, "truth": truth}
            study = PageStudy(desk, scan, reference, **options)
            visits.put(request, study)
            against = f"Reference: {described}."
            yield {
                **moved(study, LARGEST, *look),
                **{button: gr.DownloadButton(value=None, interactive=False) for button in downloads},
                finding: gr.Radio(choices(study), value=LARGEST, interactive=True),
                status: status_html(f"{against} Writing the report."),
                report: report_html(study, writing=True),
            }
            for _ in study.stream():
                yield {report: report_html(study, writing=True)}
            yield {report: report_html(study), status: status_html(against)}
            if study.document is not None:
                files = study.write_files()
                yield {
                    button: gr.DownloadButton(value=str(file), interactive=True)
                    for button, file in zip(downloads, files, strict=True)
                }

        def run_sample(request: gr.Request, sample, kind, *look):
            def read():
                phantom = desk.sample(sample)
                return desk.read(phantom.path), phantom.truth

            yield {status: status_html(f"Reading {sample}."), upload: None}
            yield from started(read, kind, look, request)

        def run_upload(request: gr.Request, path, kind, *look):
            yield {status: status_html("Reading the scan."), sample: None}
            yield from started(lambda: (desk.receive(path), None), kind, look, request)
            yield {upload: None}

        def started(read, chosen, look, request):
            try:
                # A reference of the visitor's own was for his last scan.
                (scan, truth), chosen = read(), RANDOM if chosen == OWN else chosen
                yield {kind: chosen, own: Upload(value=None, visible=False)}
                yield from compare(scan, truth, chosen, None, 0, look, request)
            except Exception as error:  # whatever it is: else the page would say "Reading" for ever
                visits.leave(request)
                yield {**empty(*look), status: status_html(explained(error), error=True)}

        def run_reference(request: gr.Request, chosen, path, *look):
            yield {own: Upload(visible=chosen == OWN), draw: gr.Button(visible=chosen == RANDOM)}
            yield from again(chosen, path, 0, look, request)

        def run_draw(request: gr.Request, chosen, path, *look):
            study = visits.get(request)
            yield from again(chosen, path, 0 if study is None else (study.seed or 0) + 1, look, request)

        def again(chosen, path, seed, look, request):
            study = visits.get(request)
            if study is None or (chosen == OWN and path is None):
                return
            yield {status: status_html("Reading the reference.")}
            try:
                yield from compare(study.scan, study.truth, chosen, path, seed, look, request)
            except Exception as error:  # what is shown stays
                yield {status: status_html(explained(error), error=True), report: report_html(study)}
            yield {own: None}

        def go_to(request: gr.Request, place, *look):
            study = visits.get(request)
            # A choice of the last study may come in after the next one has taken its place.
            return {} if study is None or place not in study.places else moved(study, place, *look)

        def scroll(name: str):
            def show(number, window, overlay, opacity, request: gr.Request):
                return plane_html(visits.get(request), name, int(number), window, opacity / 100 if overlay else 0.0)

            return show

        def relook(request: gr.Request, axial, coronal, sagittal, *look):
            study = visits.get(request)
            at = {"axial": axial, "coronal": coronal, "sagittal": sagittal}
            return {} if study is None else images(study, at, *look)

        def write_report(scan: str, reference_seed: int = 0) -> dict:
            """
            Write the report of a chest CT by comparing it with a normal scan. Research use only: not a medical
            device, not for diagnosis.

            Args:
                scan: an uploaded NIfTI file or .zip of DICOM slices.
                reference_seed: another number draws another normal reference.

            Returns:
                the report by region, the findings with probabilities, and where all of it came from.
            """
            study = None
            try:
                target = desk.receive(scan)
                seed = int(reference_seed)
                name = desk.random_reference(target, seed)
                study = PageStudy(desk, target, desk.reference(name), reference_name=name, seed=seed)
                for _ in study.stream():
                    pass
                return study.document
            except Exception as error:
                raise gr.Error(explained(error)) from error
            finally:
                if study is not None:
                    study.close()

        asked.click(
            write_report, [sent, number], written, api_name="report", concurrency_id="model", concurrency_limit=1
        )
        everything = [sample, upload, kind, draw, own, status, finding, report, *pictures, *numbers, *downloads]
        silent = {"show_progress": "hidden", "api_visibility": "private"}
        for trigger, run, inputs in (
            (sample.input, run_sample, [sample, kind, *look]),
            (upload.upload, run_upload, [upload, kind, *look]),
            (kind.input, run_reference, [kind, own, *look]),
            (own.upload, run_reference, [kind, own, *look]),
            (draw.click, run_draw, [kind, own, *look]),
        ):
            # Whoever chooses anew does not wait for the report that he has turned away from.
            trigger(visits.stop, None, None, queue=False, **silent).then(
                run, inputs, everything, concurrency_id="model", concurrency_limit=1, **silent
            )
        for name, slider in sliders.items():
            slider.input(scroll(name), [slider, *look], views[name], queue=False, trigger_mode="always_last", **silent)
        finding.input(go_to, [finding, *look], [*numbers, *pictures], queue=False, **silent)
        gr.on(
            [window.input, overlay.input, opacity.input], relook, [*numbers, *look], pictures,
            queue=False, trigger_mode="always_last", **silent,
        )  # fmt: skip
        page.unload(visits.leave)
    page.desk = desk
    return page


def theme() -> gr.themes.Base:
    """Small and grey; no font is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="sky", neutral_hue="slate", text_size="sm", spacing_size="sm", radius_size="sm",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip


def launch(page: gr.Blocks, host: str, port: int | None, *, mcp: bool = False, block: bool = True) -> str:
    """
    Serve the page and give its address; never through a public link of Gradio's.

    Args:
        mcp: also serve its endpoint as a tool, by the Model Context Protocol, at `/gradio_api/mcp/`; so does the
            environment's GRADIO_MCP_SERVER=True.
    """
    _, address, _ = page.queue(max_size=MAX_WAITING).launch(
        server_name=host, server_port=port, share=False, max_file_size=MAX_FILE_BYTES, footer_links=[], quiet=True,
        theme=theme(), css_paths=STYLE, js=SCRIPT.read_text(encoding="utf-8"), ssr_mode=False,
        prevent_thread_lock=not block, mcp_server=mcp or None, allowed_paths=[str(page.desk.studies)],
        run_history=False,  # it would keep reports in the visitor's browser
        app_kwargs={"middleware": [Middleware(UploadLimit, desk=page.desk)]},
    )  # fmt: skip
    return address


def serve_page(checkpoint: str, host: str, port: int, *, mcp: bool = False) -> None:
    """Load a checkpoint and serve the page until the process is ended.

    Raises:
        DiffVPCheckpointError: there is no such checkpoint, or its files do not fit each other.
    """
    folder = make_folder("diffvp-app-")
    try:
        desk = Desk(checkpoint, folder)
        launch(build_page(desk), host, port, mcp=mcp)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
