"""Pictures on the page: text of 12 pixels in a window of 1280, twice that at a zoom of 200 %, a play button."""

import re

import nbformat
import pytest
from playwright.sync_api import expect

from qlora_lab.show.figure import DPI, SMALLEST
from tests.browser.controls import NEW_PICTURE_MS
from tests.browser.theme import resize

CELLS = [
    "import qlora_lab as ql\nfrom qlora_lab.show import figure\nfrom qlora_lab.show.midpoint import MidpointExplorer\n"
    "from qlora_lab.show.memory import MemoryExplorer",
    "MidpointExplorer(change=22)",
    "fig, ax = figure.new_figure(width=figure.ACROSS)\nql.picture(fig, 'axes alone')",
    "MemoryExplorer()",
]
# CSS pixels of a point in each picture that is seen, from its size on the page
POINTS = """(dpi) => [...document.querySelectorAll(".qlora-picture img")].filter((img) => img.checkVisibility())
  .map((img) => img.getBoundingClientRect().width / (img.naturalWidth / dpi) / 72)"""
SCROLLS = """() => [...document.querySelectorAll(".qlora-picture")].filter((place) => place.checkVisibility())
  .map((place) => place.scrollWidth > place.clientWidth + 1)"""


@pytest.fixture(scope="module")
def lab(open_notebook, tmp_path_factory):
    kernel = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
    notebook = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    path = tmp_path_factory.mktemp("pictures") / "pictures.ipynb"
    nbformat.write(notebook, path)
    return open_notebook(path)


def smallest_text(lab):
    """CSS pixels of the smallest text in each picture."""
    return [SMALLEST * point for point in lab.page.evaluate(POINTS, DPI)]


def test_text_has_12_pixels_and_grows_with_the_zoom(lab):
    texts = smallest_text(lab)
    assert len(texts) == 3 and min(texts) >= 12
    assert lab.page.evaluate(SCROLLS) == [False] * 3  # there is room for them in a window of 1280
    # a page at 200 % has half the width, in pixels of twice the size
    resize(lab.page, 640)
    assert min(2 * text for text in smallest_text(lab)) >= 24
    assert lab.page.evaluate(SCROLLS) == [True] * 3
    resize(lab.page, 1280)


def test_a_play_button_moves_to_the_end_and_stops(lab):
    picture, button = lab.picture("Play"), lab.control("Play")
    button.press("Enter")
    expect(lab.control("Pause")).to_be_visible()
    expect(lab.slider("Change")).to_have_value("50", timeout=NEW_PICTURE_MS)  # from +22 to +25 %
    expect(picture).to_have_attribute("alt", re.compile(r"a change of \+25 % of absmax"), timeout=NEW_PICTURE_MS)
    expect(button).to_be_visible()  # "Play" again


def test_another_control_stops_it(lab):
    lab.slider("Change").press("Home")
    lab.control("Play").press("Enter")
    lab.slider("Code of the weight").press("ArrowRight")
    expect(lab.control("Play")).to_be_visible()
    lab.page.wait_for_timeout(600)  # a move that was asked for before is still drawn
    stopped = lab.slider("Change").input_value()
    lab.page.wait_for_timeout(600)  # more than two paces
    expect(lab.slider("Change")).to_have_value(stopped)


def test_with_reduced_motion_a_press_is_one_step(lab):
    lab.slider("Change").press("Home")
    lab.page.emulate_media(reduced_motion="reduce")
    picture = lab.picture("Change")
    expect(picture).to_have_attribute("alt", re.compile(r"a change of -25 % of absmax"), timeout=NEW_PICTURE_MS)
    lab.control("Step").press("Enter")
    expect(lab.slider("Change")).to_have_value("1", timeout=NEW_PICTURE_MS)
    lab.page.wait_for_timeout(600)  # more than two paces
    expect(lab.slider("Change")).to_have_value("1")
    lab.page.emulate_media(reduced_motion="no-preference")


def test_details_stay_open_while_a_control_moves(lab):
    details = lab.page.locator(".qlora-pane details")
    details.locator("summary").click()
    expect(details).to_contain_text("r=64")
    lab.move("r", "Home")
    expect(details).to_contain_text("r=1,")
    expect(details).to_have_attribute("open", "")
