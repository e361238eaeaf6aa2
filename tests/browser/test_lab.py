"""What only a browser can say: keys reach the kernel, the picture follows, controls are named, no cell is inserted."""

import re
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

TOY = Path(__file__).parents[1] / "show" / "toy.py"
START = "Rounding explorer: 16 steps, RMSE 0.1157"
CELLS = [
    "from qlora_lab.show.source import show_source\nfrom toy import RoundingExplorer, step_width",
    "RoundingExplorer()",
    "show_source(step_width)",
]


@pytest.fixture(scope="module")
def opened(open_notebook, tmp_path_factory):
    kernel = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}  # without it Lab asks which one
    notebook = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    path = tmp_path_factory.mktemp("toy") / "toy.ipynb"
    nbformat.write(notebook, path)
    return open_notebook(path, TOY)


@pytest.fixture
def toy(opened):
    """The toy explorer in its start state."""
    opened.page.get_by_role("button", name="Reset").click()
    expect(opened.picture("Bits")).to_have_attribute("alt", START)
    return opened


def test_slider_by_keyboard_changes_alt_text_and_pixels(toy, tmp_path):
    slider = toy.slider("Bits")
    for key, steps in [("ArrowRight", 32), ("End", 256), ("Home", 2)]:
        assert f": {steps} steps, RMSE" in toy.move("Bits", key)
    expect(slider).to_have_attribute("aria-valuetext", "1")
    toy.move("Offset", "End")
    expect(toy.slider("Offset")).to_have_attribute("aria-valuetext", "0.5 steps")
    toy.move("Mode", "ArrowRight")
    toy.page.screenshot(path=tmp_path / "moved.png")


WATCH_HEIGHT = """(image) => {
  window.heights = [];
  const look = () => {
    window.heights.push(image.isConnected ? image.getBoundingClientRect().height : 0);
    requestAnimationFrame(look);
  };
  look();
}"""


def test_the_page_does_not_jump_while_the_picture_changes(toy):
    """The picture is in every frame, at the same height."""
    toy.picture("Bits").evaluate(WATCH_HEIGHT)
    for key in ("ArrowRight", "End", "Home"):
        toy.move("Bits", key)
    assert len(set(toy.page.evaluate("() => window.heights"))) == 1


def test_reset_and_switch_work_by_keyboard(toy):
    toy.move("Bits", "Home")
    toy.page.get_by_role("button", name="Reset").press("Enter")
    expect(toy.picture("Bits")).to_have_attribute("alt", START)
    toy.page.get_by_role("checkbox", name="Clip outliers").press("Space")
    expect(toy.picture("Bits")).not_to_have_attribute("alt", START)


def test_every_control_is_named(toy):
    assert toy.unnamed() == []
    text = "\n".join(toy.controls())
    for control in ('slider "Bits"', 'slider "Offset"', 'checkbox "Clip outliers"', 'button "Reset"', 'img "Rounding'):
        assert control in text


def test_typing_on_a_control_inserts_no_cells(toy):
    cells, mode = toy.page.locator(".jp-Notebook .jp-Cell"), toy.page.locator(".jp-mod-commandMode")
    toy.page.locator(".jp-Cell").first.click()
    toy.page.keyboard.press("Escape")
    expect(mode).to_have_count(1)
    controls = [toy.slider("Bits"), toy.page.get_by_role("checkbox"), toy.page.get_by_role("button", name="Reset")]
    for control in [*controls, toy.page.locator(".qlora-explorer summary")]:
        control.focus()
        for key in ("a", "b"):
            toy.page.keyboard.press(key)
    expect(cells).to_have_count(len(CELLS))


def test_show_source_opens_by_keyboard(toy, tmp_path):
    source = toy.page.locator(".qlora-explorer details pre")
    expect(source).to_be_hidden()
    toy.page.locator(".qlora-explorer summary").press("Enter")
    expect(source).to_be_visible()
    expect(source).to_contain_text(re.compile(r"def compute\(state\)"))
    toy.page.screenshot(path=tmp_path / "source.png")
