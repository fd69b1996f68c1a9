# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Commands that write reports: `demo`, `report`, `batch`, `app`, `serve`."""

import contextlib
import functools
import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..progress import counting
from ..report_diffvp import RESEARCH_USE, stated_domain
from .console import (
    check_found,
    check_free,
    check_kept,
    check_writable,
    err,
    find_checkpoint,
    is_loopback,
    listed_problems,
    one_line_errors,
    out,
    quiet,
    resumable,
    say,
    warn,
)
from .options import (
    CORES,
    AllowFailures,
    AnyAnatomy,
    Checkpoint,
    Dicom,
    Dtype,
    Engine,
    Fhir,
    MaxNewTokens,
    Open,
    Readers,
    References,
    ReferenceSeed,
    ReportLines,
    Revision,
    Scans,
)


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the phantom and its report.")] = Path("outputs/demo"),
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    seed: Annotated[int, typer.Option(min=0, help="Phantom patient to render; each seed gives another one.")] = 0,
    open_figure: Open = False,
) -> None:
    """Write the report of a phantom patient that was not in the training data, and show it next to the true one."""
    check_writable(folders=[output])
    with _reporting(checkpoint, revision, output / "report") as reporting:
        scan, truth = _phantom(output / "phantom.nii.gz", seed)
        written = reporting(scan, truth=truth)
    _print_comparison(written)
    _print_places(written, open_figure)
    out.print(
        "\nFor a scan of your own: [bold]diffvp report FILE[/bold]  (NIfTI, NRRD, MetaImage, DICOM folder or .zip)"
    )


def report(
    ct: Annotated[
        Path | None, typer.Argument(help="NIfTI, NRRD or MetaImage file, or a folder or .zip of DICOM slices.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Normal scan to compare with (default: one of the checkpoint's references).")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report. An earlier report in it is replaced.")] = Path(
        "outputs/report"
    ),
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    seed: ReferenceSeed = 0,
    max_new_tokens: MaxNewTokens = None,
    series: Annotated[
        str | None, typer.Option(help="DICOM series to read if there are several: its number or UID.")
    ] = None,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Read a DICOM series although some of its files are missing.")
    ] = False,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Voxel size along x, y, z in mm, for a NIfTI file with a blank header."),
    ] = None,
    metadata: Annotated[
        Path | None, typer.Option(help="Metadata table of CT-RATE, for version 1 scans with blank headers.")
    ] = None,
    allow_non_hu: Annotated[
        bool, typer.Option("--allow-non-hu", help="Accept voxels that are not in Hounsfield units.")
    ] = False,
    hu_window: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Intensity window, lower and upper end in HU (default: the checkpoint's)."),
    ] = None,
    foreground_hu: Annotated[
        float | None, typer.Option(help="HU threshold separating patient from air (default: the checkpoint's).")
    ] = None,
    allow_any_anatomy: AnyAnatomy = False,
    engine: Engine = "transformers",
    dicom: Dicom = None,
    fhir: Fhir = False,
    dicomweb: Annotated[
        str | None, typer.Option(help="URL of a DICOMweb service to read --study from, instead of a file.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="StudyInstanceUID to read from --dicomweb.")] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Send the structured report and the difference map to --dicomweb.")
    ] = False,
    dtype: Dtype = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print report.json to stdout, and nothing else (docs/reports.md).")
    ] = False,
    open_figure: Open = False,
) -> None:
    """Write the report of a scan, its difference map on the grid of the input, and a figure."""
    check_writable(folders=[output, dicom])
    if (ct is None) == (study is None) or (study is None) != (dicomweb is None) or (store and dicomweb is None):
        raise typer.BadParameter("give a scan, or --dicomweb URL with --study UID. --store needs --dicomweb.")
    with one_line_errors(ValueError):
        if hu_window is not None and not hu_window[0] < hu_window[1]:
            raise ValueError(f"--hu-window: {hu_window[0]:g} {hu_window[1]:g} (expected two rising HU)")
    clinical = {"dicom": dicom, "fhir": fhir, "dicomweb": dicomweb, "study": study, "store": store}
    with (
        _reporting(checkpoint, revision, output, engine, dtype) as reporting,
        _clinical_results(ct, series, allow_incomplete, **clinical) as (scan, write),
    ):
        written = reporting(
            scan, reference=reference, reference_seed=seed, series=series,
            allow_incomplete=allow_incomplete, spacing=spacing,
            metadata=None if metadata is None else _metadata(metadata, scan.name),
            max_new_tokens=max_new_tokens, allow_non_hu=allow_non_hu, hu_window=hu_window, foreground_hu=foreground_hu,
            allow_any_anatomy=allow_any_anatomy,
        )  # fmt: skip
        write(written)
    if as_json:
        typer.echo(json.dumps(written.document, indent=2, ensure_ascii=False))
    else:
        say(written.text + "\n")
        _print_places(written, open_figure)


def batch(
    scans: Scans,
    output: ReportLines = Path("outputs/reports.jsonl"),
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    engine: Engine = "transformers",
    dtype: Dtype = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of scans to decode together.")] = 16,
    workers: Readers = CORES,
    reference: References = None,
    seed: ReferenceSeed = 0,
    max_new_tokens: MaxNewTokens = None,
    allow_any_anatomy: AnyAnatomy = False,
    dicom: Dicom = None,
    fhir: Fhir = False,
    allow_failures: AllowFailures = False,
) -> None:
    """Write the reports of many scans, one JSON line each. Unreadable scans are skipped and listed."""
    check_writable(folders=[dicom])
    check_dtype(engine, dtype)
    listed = list_batch(scans, output, reference)
    name, hub_kwargs = find_checkpoint(checkpoint, revision)
    if dicom is not None:
        import highdicom  # noqa: F401
    quiet()
    from ..inference.batch import ReportWriter, write_reports
    from ..inference.report import EXPECTED_ERRORS

    with one_line_errors(*EXPECTED_ERRORS), listed_problems():
        err.print(RESEARCH_USE, style="bold yellow")
        writer = ReportWriter(
            name, engine, reference=reference, reference_seed=seed, max_new_tokens=max_new_tokens, dtype=dtype,
            allow_any_anatomy=allow_any_anatomy, dicom=dicom, fhir=fhir, hub_kwargs=hub_kwargs,
        )  # fmt: skip
        write = functools.partial(write_reports, listed, output, writer, batch_size=batch_size, workers=workers)
        run_batch(write, output, len(listed), allow_failures)


def list_batch(scans: Path, output: Path, reference: str | None) -> list:
    """Check the files of a batch, before the libraries load, and return its scans."""
    check_writable(files=[output])
    from ..data.scans import NEAREST, list_references, list_scans
    from ..inference.report_file import BatchError, ReportFile, failures_path

    references = None if reference in (None, NEAREST) else Path(reference)
    for written in (output, failures_path(output)):
        check_kept(written, scans, references)
    check_found(scans, what="list", expected="a folder of scans, or a list of them: text in UTF-8, or a .csv table")
    expected = f"a normal scan, a folder or a list of them, or {NEAREST}"
    check_found(references, what="reference", expected=expected)
    with one_line_errors(BatchError), listed_problems():
        ReportFile(output)  # another file is refused
        if references is not None:
            list_references(references)
        return list_scans(scans)


def run_batch(write: Callable, output: Path, total: int, allow_failures: bool) -> None:
    """
    Write the reports of a batch with progress, and print their number.

    Args:
        write: takes `on_progress` and `on_replaced` of `inference.batch.write_reports`; returns the file of reports.
        total: number of scans.
    """
    from ..inference.report_file import BatchError

    def on_replaced(count: int) -> None:
        warn(
            f"{output.name} already has reports under the names of {count} of these scans, whose content is "
            "different: they are read, and their reports are added.",
            style=None,
        )

    with one_line_errors(BatchError), resumable(output), counting("Scans", err) as count:
        file = write(on_progress=lambda file: count(len(file.done) + file.failed, total), on_replaced=on_replaced)
    say(f"{len(file.done)} reports: {file.path}")
    if file.failed:
        say(f"{file.failed} scans could not be read: {file.failures}")
        if not allow_failures:
            raise typer.Exit(1)


def serve_page(
    checkpoint: Checkpoint = None,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 admits other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 7860,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Also serve a tool for language models (Model Context Protocol).")
    ] = False,
) -> None:
    """Serve a web page that shows scans and difference map while the report is written."""
    with one_line_errors():
        check_free(host, port)
    name, _ = find_checkpoint(checkpoint, None)
    from ..hub.space.page import serve_page as run
    from ..inference.report import EXPECTED_ERRORS

    quiet()
    out.print(f"{RESEARCH_USE}\nhttp://{host}:{port}", highlight=False)
    with one_line_errors(*EXPECTED_ERRORS):
        run(name, host, port, mcp=mcp)


def serve(
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    engine: Engine = "transformers",
    host: Annotated[
        str,
        typer.Option(help="Address to bind; 0.0.0.0 admits other machines, which must send the token $DIFFVP_TOKEN."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 8000,
    batch_size: Annotated[int, typer.Option(min=1, help="Maximum number of scans to decode together.")] = 16,
    workers: Readers = CORES,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Maximum number of unanswered requests; further ones get status 429.")
    ] = 32,
    max_upload: Annotated[
        int, typer.Option(min=1, help="Maximum size of a request in MB; larger ones get status 413.")
    ] = 512,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds from a request to its answer; later ones get status 503.")
    ] = 300,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds to finish accepted requests after a signal to stop.")
    ] = 30,
    seed: ReferenceSeed = 0,
    max_new_tokens: MaxNewTokens = None,
    allow_any_anatomy: AnyAnatomy = False,
    dicomweb: Annotated[
        str | None, typer.Option(help="URL of a DICOMweb service. Requests may name its studies by UID.")
    ] = None,
) -> None:
    """Serve reports to programs over HTTP (docs/serving.md)."""
    token = os.environ.get("DIFFVP_TOKEN") or None
    with one_line_errors(ValueError):
        if token is None and not is_loopback(host):
            raise ValueError(f"host is {host}, which admits other machines; expected a token in $DIFFVP_TOKEN.")
        check_free(host, port)
    name, hub_kwargs = find_checkpoint(checkpoint, revision)
    from ..service.app import serve_reports
    from ..service.jobs import Limits, ReportQueue

    retrieve = None
    if dicomweb is not None:
        from ..clinical.dicomweb import retrieve as retrieve_from

        retrieve = functools.partial(retrieve_from, dicomweb)
    quiet()
    from ..inference.batch import ReportWriter
    from ..inference.report import EXPECTED_ERRORS

    with one_line_errors(*EXPECTED_ERRORS):
        err.print(RESEARCH_USE, style="bold yellow")
        writer = ReportWriter(
            name, engine, reference_seed=seed, max_new_tokens=max_new_tokens, allow_any_anatomy=allow_any_anatomy,
            hub_kwargs=hub_kwargs,
        )  # fmt: skip
        limits = Limits(
            batch_size=batch_size, workers=workers, waiting=max_waiting, upload_bytes=max_upload * 2**20,
            timeout=timeout, grace=grace,
        )  # fmt: skip
        serve_reports(ReportQueue(writer, limits), host, port, token=token, retrieve=retrieve)


def _phantom(path: Path, seed: int) -> tuple[Path, str]:
    """Write the scan of a phantom patient, and return its path and its true report."""
    import nibabel as nib

    from ..data.phantom_cohort import single_phantom

    scan, truth = single_phantom(seed, "demo")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(scan, path)
    return path, truth


def _metadata(table: Path, volume: str):
    """Return the row of a volume in the metadata table of CT-RATE."""
    from ..reading_diffvp import CTMetadata, load_metadata
    from ..volume_diffvp import CTReadError

    rows = load_metadata(table)
    if volume not in rows:
        raise CTReadError(table.name, "VolumeName", f"no row for {volume}", "a row for the scan")
    return CTMetadata.from_ct_rate(rows[volume])


@contextlib.contextmanager
def _reporting(
    checkpoint: str | None, revision: str | None, output: Path, engine: str = "transformers", dtype: str | None = None
) -> Iterator[Callable]:
    """
    Yield a function that loads a checkpoint and writes a report, while a status line shows the current step.

    Invalid arguments are refused before the libraries load, which takes seconds.
    """
    from ..inference.folder import ReportError, check_output
    from ..volume_diffvp import CTInputError

    check_dtype(engine, dtype)
    with one_line_errors(ReportError):
        check_output(output)
    name, hub_kwargs = find_checkpoint(checkpoint, revision)
    with err.status("", spinner="line") as status, _uncollected(), one_line_errors(CTInputError):

        def step(text: str) -> None:
            status.update(text)
            if not err.is_terminal:  # a line cannot be rewritten there
                warn(text, style=None)

        def write(ct: Path, **options):
            step("Reading the scan")
            options = _read_scans(options | {"ct": ct})
            step("Loading the libraries")
            quiet()
            from ..inference.engines import merged_engine
            from ..inference.report import EXPECTED_ERRORS, compose_report, load_checkpoint, save_report

            with one_line_errors(*EXPECTED_ERRORS):
                step(f"Loading {name}")
                model, processor = load_checkpoint(name, dtype=dtype, **hub_kwargs)
                # For a single report, merging LoRA takes longer than it saves.
                decoder = None if engine == "transformers" else merged_engine(engine, model, processor.tokenizer)
                err.print(RESEARCH_USE, style="bold yellow")
                warn(f"This checkpoint is intended for: {stated_domain(model.config.intended_domain)}.", style=None)
                composed = compose_report(
                    model, processor, engine=decoder, hub_kwargs=hub_kwargs, on_step=step, **options
                )
                model.to("meta")  # frees the weights, half of the memory, before the figure needs some
                written = save_report(composed, processor, output, on_step=step)
            for warning in written.document["warnings"]:
                warn(warning)
            return written

        yield write


def check_dtype(engine: str, dtype: str | None) -> None:
    if engine == "vllm" and dtype == "int8":
        raise typer.BadParameter("--dtype int8 is for the engine transformers.")


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Turn the garbage collector off: it would scan the imported modules, which are never freed, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _clinical_results(ct: Path | None, series: str | None, allow_incomplete: bool, **options) -> Iterator:
    """Yield the scan of `diffvp report`, from a file or a PACS, and the function that writes the clinical results."""
    if not any(options.values()):
        yield ct, lambda written: None
        return
    if options["dicom"] is not None or options["store"]:
        import highdicom  # noqa: F401  a missing library is reported before a minute of work
    if options["dicomweb"] is not None:
        import dicomweb_client  # noqa: F401
    from ..clinical.results import clinical_results

    with clinical_results(ct, series=series, allow_incomplete=allow_incomplete, **options) as results:
        yield results.ct, results.write


def _read_scans(options: dict) -> dict:
    """Read and check the scan, and the reference if one is given; return the options with these volumes."""
    from ..anatomy_diffvp import check_chest
    from ..reading_diffvp import read_ct
    from ..volume_diffvp import CTReadError

    names = ("spacing", "metadata", "series", "allow_incomplete")
    given = {name: options[name] for name in names if name in options}
    allow_non_hu = options.get("allow_non_hu", False)
    scans = {"ct": read_ct(options["ct"], allow_non_hu=allow_non_hu, **given)}
    if options.get("reference") is not None:
        scans["reference"] = read_ct(options["reference"], allow_non_hu=allow_non_hu)
        if scans["reference"].sha256 == scans["ct"].sha256:  # nothing would differ
            raise CTReadError(scans["reference"].source, "reference", "the scan itself", "another scan, a normal one")
    for volume in scans.values():
        if not options.get("allow_any_anatomy"):
            check_chest(volume.coverage, volume.source)
    return {name: value for name, value in options.items() if name not in names} | scans


def _print_places(report, open_figure: bool) -> None:
    say(f"Report, difference map and provenance: {report.folder}")
    say(f"Figure: {report.figure}")
    if open_figure:
        typer.launch(str(report.figure))


def _print_comparison(report) -> None:
    """Print the generated report next to the true one by region, with the findings hit, missed and false."""
    truth = report.document["truth"]
    table = Table("", "generated", "true", show_lines=True)
    regions = dict.fromkeys([*truth["regions"], *report.regions])
    for region in regions:
        table.add_row(region, *(Text(words.get(region, "-")) for words in (report.regions, truth["regions"])))
    out.print(table)
    for kind, color in (("hit", "green"), ("missed", "red"), ("false", "magenta")):
        out.print(f"Findings {kind}: [{color}]{', '.join(truth[kind]) or 'none'}[/{color}]")
