"""Notebook 06 in the real JupyterLab: its explorers follow keyboard and mouse, and every control has a name.

Only the cells that the explorers need are run; nbval runs the others.
"""

import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from playwright.sync_api import expect

from tests.browser.theme import resize

NF4 = "-1 -0.696 -0.525 -0.395 -0.284 -0.185 -0.0911 0 0.0796 0.161 0.246 0.338 0.441 0.563 0.723 1"
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "06_data_types.ipynb"


def explorers_alone(folder):
    """A copy with the imports and the cells that make an explorer."""
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [cell for cell in cells if re.search(r"\b[A-Z]\w+Explorer\(", cell.source)]
    assert len(shown) == 2
    notebook.cells = [cells[0], *shown]
    path = folder / NOTEBOOK.name
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="module")
def lab(open_notebook, tmp_path_factory):
    return open_notebook(explorers_alone(tmp_path_factory.mktemp("alone")))


def test_every_control_is_named(lab):
    assert lab.unnamed() == []


def test_the_outlier_explorer(lab):
    picture = lab.picture("Outlier")
    assert "its block uses 6 of 16 codes" in picture.get_attribute("alt")
    assert "NF4, blocks of 256, an outlier of -10 at 100: its block uses 9 of 16" in lab.move("Data type", "Home")
    assert lab.slider("Data type").get_attribute("aria-valuetext") == "nf4"
    assert "an outlier of 12 at 100" in lab.move("Outlier", "End")
    assert "an outlier of 12 at 255" in lab.move("Position", "End")
    explorer = lab.page.locator(".qlora-explorer").filter(has=lab.slider("Outlier"))
    block_size = explorer.get_by_role("slider", name="Block size", exact=True)  # either explorer has one
    block_size.press("Home")
    expect(picture).to_have_attribute("alt", re.compile("^NF4, blocks of 16, an outlier of 12 at 255"))


@pytest.fixture
def codebook(lab):
    """The explorer of levels in its start state."""
    explorer = lab.page.locator(".qlora-explorer").filter(has=lab.slider("Level 0"))
    lab.slider("Level 0").scroll_into_view_if_needed()  # the mouse needs it
    if not re.search(f"Levels {NF4}, blocks of 64 ", explorer.locator("img").get_attribute("alt")):
        explorer.get_by_role("button", name="Reset").press("Enter")  # the next message may overtake it
    expect(explorer.locator("img")).to_have_attribute("alt", re.compile(f"Levels {NF4}, blocks of 64 given weights"))
    return explorer


def drag(lab, number, *, by):
    """Take a level with the mouse, a little beside its middle, and move it by so much of the axis, in steps."""
    box, ends = lab.slider(f"Level {number}").bounding_box(), [middle(lab, i) for i in (0, 15)]
    x, y, way = box["x"] + box["width"] / 2 + 2, box["y"] + 10, by * (ends[1] - ends[0]) / 2
    lab.page.mouse.move(x, y)
    lab.page.mouse.down()
    lab.page.mouse.move(x + way, y, steps=20)
    lab.page.mouse.up()


def middle(lab, number):
    box = lab.slider(f"Level {number}").bounding_box()
    return box["x"] + box["width"] / 2


def value(lab, number):
    return float(lab.slider(f"Level {number}").get_attribute("aria-valuenow"))


def test_a_level_is_dragged(lab, codebook):
    """Picture, sentence and line to copy follow to the last move; the other levels stay."""
    picture = lab.picture("Level 9")
    pixels = picture.get_attribute("src")
    drag(lab, 9, by=0.05)
    assert value(lab, 9) == pytest.approx(0.21, abs=0.011)
    expect(picture).to_have_attribute("alt", re.compile(rf"Levels -1 .* 0 0.0796 {value(lab, 9)} 0.246 .* 1, blocks"))
    assert picture.get_attribute("src") != pixels
    expect(codebook.locator("code")).to_contain_text("CodebookExplorer(weight, levels=(-1.0, -0.6961928, ")
    expect(codebook.locator("code")).to_contain_text(f"0.0795803, {value(lab, 9)}, 0.2461123, ")
    expect(lab.slider("Level 9")).to_be_focused()


def test_levels_cannot_cross(lab, codebook):
    drag(lab, 9, by=1.0)
    assert value(lab, 9) == 0.23 and value(lab, 10) == pytest.approx(0.2461123)
    drag(lab, 10, by=-1.0)
    assert value(lab, 10) == 0.24  # a step from the other, which did not give way
    drag(lab, 15, by=0.5)
    assert value(lab, 15) == 1
    drag(lab, 0, by=-0.5)
    assert value(lab, 0) == -1
    expect(lab.picture("Level 9")).to_have_attribute("alt", re.compile("Levels -1 .* 0.0796 0.23 0.24 0.338 .* 1, "))


def test_a_level_is_moved_by_keys(lab, codebook):
    assert " 0.0796 0.17 0.246 " in lab.move("Level 9", "ArrowRight")
    assert " 0.0796 0.16 0.246 " in lab.move("Level 9", "ArrowDown")
    assert " 0.0796 0.23 0.246 " in lab.move("Level 9", "End")
    assert " 0.0796 0.13 0.246 " in lab.move("Level 9", "Shift+ArrowLeft")
    assert " 0.0796 0.09 0.246 " in lab.move("Level 9", "Home")
    slider = lab.slider("Level 9")
    limits = [float(slider.get_attribute(f"aria-value{end}")) for end in ("min", "max")]
    assert limits == [0.09, 0.23]
    assert " -0.0911 0.01 0.0796 " in lab.move("Level 7", "ArrowRight")  # keys reach what lies beside zero


def test_the_read_out_follows_the_reset(lab, codebook):
    lab.move("Level 1", "Shift+ArrowRight")
    said = codebook.locator("output")
    expect(said).to_have_text("Level 1: -0.6 of absmax")
    codebook.get_by_role("button", name="Reset").click()
    expect(said).to_have_text("Level 1: -0.696 of absmax")
    lab.slider("Level 0").focus()
    expect(said).to_have_text("Level 0: -1 of absmax")


def test_zero_is_caught(lab, codebook):
    """A level that is dragged near zero becomes zero."""
    lab.move("Level 7", "End")
    assert value(lab, 7) == 0.06
    drag(lab, 7, by=-0.045)
    assert value(lab, 7) == 0
    expect(lab.picture("Level 7")).to_have_attribute("alt", re.compile("Levels -1 .* -0.0911 0 0.0796 "))


def test_another_start_and_block_size(lab, codebook):
    picture = lab.picture("Level 0")
    size = codebook.get_by_role("slider", name="Block size", exact=True)
    size.press("End")
    expect(picture).to_have_attribute("alt", re.compile("Levels -1 -0.696 .* blocks of 1024 given weights"))
    codebook.get_by_role("button", name="Start from even steps").click()
    expect(picture).to_have_attribute("alt", re.compile("Levels -1 -0.857 .* 0.125 .* blocks of 1024 given weights"))
    codebook.get_by_role("button", name="Start from Lloyd-Max").press("Enter")
    same = r"Relative error (\S+) % \(.* Lloyd-Max \1\)"
    expect(picture).to_have_attribute("alt", re.compile(f"{same}.* blocks of 1024 given weights"))
    size.press("Home")
    expect(picture).to_have_attribute("alt", re.compile("blocks of 16 given weights"))
    codebook.get_by_role("button", name="Start from Lloyd-Max").press("Enter")  # of these blocks now
    expect(picture).to_have_attribute("alt", re.compile(f"{same}.* blocks of 16 given weights"))


def outermost_lines(lab, picture):
    """Where on the page the picture draws its first and its last level."""
    box = picture.bounding_box()
    row = lab.pixels(picture)[60].astype(int)  # across the histogram
    blue = np.flatnonzero((abs(row - [0, 114, 178]) < 9).all(axis=1)) + 0.5
    ends = blue[blue < blue[0] + 9].mean(), blue[blue > blue[-1] - 9].mean()
    return [box["x"] + end / len(row) * box["width"] for end in ends]


def test_handles_stand_over_their_lines(lab, codebook):
    """In a narrow window too."""
    for width in (600, 1280):
        resize(lab.page, width)
        lines = outermost_lines(lab, lab.picture("Level 0"))
        assert [middle(lab, 0), middle(lab, 15)] == pytest.approx(lines, abs=1.5)


def test_typing_on_a_handle_inserts_no_cells(lab, codebook):
    cells = lab.page.locator(".jp-Notebook .jp-Cell").count()
    lab.slider("Level 3").focus()
    for key in ("a", "b"):
        lab.page.keyboard.press(key)
    assert lab.page.locator(".jp-Notebook .jp-Cell").count() == cells
