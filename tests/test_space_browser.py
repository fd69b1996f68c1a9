# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The page in a browser, end to end, with the shipped checkpoint (`make test-space`).

With DIFFVP_AXE, the path of axe.min.js (npm's package axe-core), its accessibility rules are checked, too. With
DIFFVP_SCREENSHOTS, a folder, the pictures of the documentation are taken.
"""

import io
import os
import time
from pathlib import Path

import nibabel as nib
import pytest
from PIL import Image

from diffvp.data.phantom_cohort import single_phantom

pytest.importorskip("gradio", reason="the page needs gradio (pip install -e .[app])")
playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser (pip install playwright)")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no chromium (apt-get install chromium)", allow_module_level=True)

FIRST_WORD_SECONDS = 10
WRITTEN = 120_000  # ms until a report is complete, on a busy machine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Run the page; yield its address and the folder of its temporary files."""
    from diffvp.cli import SHIPPED_CHECKPOINT
    from diffvp.hub.space.page import build_page, launch
    from diffvp.hub.space.session import Desk

    before = os.environ.get("GRADIO_TEMP_DIR")
    folder = tmp_path_factory.mktemp("page")
    page = build_page(Desk(str(SHIPPED_CHECKPOINT), folder))
    yield launch(page, "127.0.0.1", None, block=False), folder
    page.close()
    os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def tab(browser, server):
    """Open a tab and wait for the complete report of a sample; `tab.first_word` is the time to its first words."""
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    tab.failures = []
    tab.on("pageerror", lambda error: tab.failures.append(str(error)))
    tab.goto(server[0])
    tab.get_by_label("Phantom 2").wait_for()
    begun = time.monotonic()
    tab.get_by_label("Phantom 2").check()
    tab.wait_for_selector("#report h3", timeout=60_000)
    tab.first_word = time.monotonic() - begun
    tab.seen = set()
    while not tab.locator("#report details").count():
        tab.seen.add(tab.locator("#report").inner_text())
        assert time.monotonic() - begun < WRITTEN / 1000
        tab.wait_for_timeout(200)
    tab.wait_for_timeout(1500)
    yield tab
    tab.close()


def picture(tab, name: str, which: int = 0) -> str:
    return tab.locator(f"#view-{name} img").nth(which).get_attribute("src")


def changes(tab, name: str, act, which: int = 0) -> str:
    """Call `act` and wait until the picture of a plane changes."""
    before = picture(tab, name, which)
    act()
    deadline = time.monotonic() + 20
    while picture(tab, name, which) == before:
        assert time.monotonic() < deadline, "the picture did not change"
        tab.wait_for_timeout(50)
    return picture(tab, name, which)


def number(tab, name: str) -> int:
    return int(float(tab.locator(f"#slice-{name} input[type=range]").input_value()))


def test_report_streams_in_within_seconds(tab):
    print(f"first words after {tab.first_word:.1f} s")  # noqa: T201
    assert tab.first_word <= FIRST_WORD_SECONDS
    assert len(tab.seen) > 4
    assert "Lung" in tab.locator("#report").inner_text() and not tab.failures


def test_slider_and_wheel_scroll_through_slices(tab):
    start = number(tab, "axial")
    tab.locator("#slice-axial input[type=range]").focus()
    changes(tab, "axial", lambda: tab.keyboard.press("ArrowRight"))
    assert number(tab, "axial") == start + 1
    tab.locator("#view-axial img").first.hover()
    changes(tab, "axial", lambda: tab.mouse.wheel(0, 100))
    assert number(tab, "axial") == start


def test_overlay_and_window_change_the_pictures(tab):
    target, reference = picture(tab, "coronal"), picture(tab, "coronal", 1)
    changes(tab, "coronal", lambda: tab.get_by_label("Difference map").uncheck())
    assert picture(tab, "coronal", 1) == reference  # the reference has no overlay
    assert changes(tab, "coronal", lambda: tab.get_by_label("Difference map").check()) == target
    changes(tab, "coronal", lambda: tab.get_by_label("Lung", exact=True).check(), which=1)
    changes(tab, "coronal", lambda: tab.get_by_label("Mediastinum").check(), which=1)


def test_choosing_a_finding_moves_the_slices(tab):
    tab.locator("#finding input").first.check()
    tab.wait_for_timeout(1500)
    start = [number(tab, name) for name in ("axial", "coronal", "sagittal")]
    places = set()
    for index in range(1, tab.locator("#finding input").count()):
        tab.locator("#finding input").nth(index).check()
        tab.wait_for_timeout(1200)
        places.add(tuple(number(tab, name) for name in ("axial", "coronal", "sagittal")))
    assert places - {tuple(start)}
    tab.locator("#finding input").first.check()
    tab.wait_for_timeout(1500)
    assert [number(tab, name) for name in ("axial", "coronal", "sagittal")] == start


def test_files_can_be_downloaded(tab, tmp_path):
    for label, name in (("Report (.txt)", "report.txt"), ("Map (.nii.gz)", "difference_map.nii.gz")):
        with tab.expect_download() as caught:
            tab.get_by_text(label).click()
        caught.value.save_as(tmp_path / name)
    assert (tmp_path / "report.txt").read_text().startswith("Research use only.")
    assert (tmp_path / "difference_map.nii.gz").stat().st_size > 1000


def test_statement_stays_visible_when_scrolling(tab):
    tab.set_viewport_size({"width": 1440, "height": 500})
    tab.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    tab.wait_for_timeout(300)
    box = tab.locator("#banner .use").bounding_box()
    scrolled = tab.evaluate("window.scrollY")
    tab.evaluate("window.scrollTo(0, 0)")
    tab.set_viewport_size({"width": 1440, "height": 900})
    assert scrolled > 50 and 0 <= box["y"] < 60


def test_phone_width_needs_no_sideways_scrolling(tab):
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.wait_for_timeout(500)
    width = tab.evaluate("document.documentElement.scrollWidth")
    boxes = [tab.locator(f"#{name}").bounding_box() for name in ("choose", "view", "read")]
    if "DIFFVP_SCREENSHOTS" in os.environ:
        _screenshot(tab, "space_phone.png", clip={"x": 0, "y": 0, "width": 390, "height": 1500}, full_page=True)
    tab.set_viewport_size({"width": 1440, "height": 900})
    assert width <= 390
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"]  # one column


def test_page_passes_the_accessibility_rules(tab):
    if "DIFFVP_AXE" not in os.environ:
        pytest.skip("DIFFVP_AXE does not say where axe.min.js is (npm pack axe-core)")
    if "DIFFVP_SCREENSHOTS" in os.environ:
        _screenshot(tab, "space.png")
    tab.add_script_tag(path=os.environ["DIFFVP_AXE"])
    found = tab.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})")
    assert len(found["passes"]) > 10
    problems = [f"{one['id']}: {node['html'][:160]}" for one in found["violations"] for node in one["nodes"]]
    assert not problems, "\n".join(problems)


def test_bad_file_is_refused_visibly_and_not_kept(browser, server, tmp_path):
    address, folder = server
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"this is no scan" * 50)
    tab = browser.new_page()
    tab.goto(address)
    tab.locator("#upload input[type=file]").set_input_files(bad)
    alert = tab.locator("#status [role=alert]")
    alert.wait_for(timeout=30_000)
    assert "bad.nii.gz" in alert.inner_text() and "expected" in alert.inner_text()
    assert not list(folder.rglob("bad.nii.gz"))
    tab.close()


def test_uploaded_scan_is_shown_and_not_kept(browser, server, tmp_path):
    address, folder = server
    tab = browser.new_page()
    tab.goto(address)
    scan = tmp_path / "someone.nii.gz"
    nib.save(single_phantom(2, "browser")[0], scan)
    tab.locator("#upload input[type=file]").set_input_files(scan)
    tab.wait_for_selector("#report h3", timeout=60_000)
    assert tab.locator("#view-axial img").count() == 2
    assert not list(folder.rglob("someone*"))
    assert not list((folder / "claimed").iterdir())
    tab.close()


def _screenshot(tab, name: str, **options) -> None:
    """Save a screenshot with at most 256 colours, which takes a third of the bytes."""
    taken = Image.open(io.BytesIO(tab.screenshot(**options))).convert("RGB")
    taken.quantize(256).save(Path(os.environ["DIFFVP_SCREENSHOTS"]) / name, optimize=True)
