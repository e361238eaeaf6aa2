"""Notebook 05 in the real JupyterLab: the kernel map follows the keyboard, and every control has a name."""

import re
from pathlib import Path

from playwright.sync_api import expect

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_the_kernel_map(open_notebook):
    lab = open_notebook(NOTEBOOKS / "05_kernels.ipynb")
    picture = lab.picture("Weights")
    assert "program 3 of 4" in picture.get_attribute("alt")
    assert "204 weights" in lab.move("Weights", "ArrowRight")
    assert "block size 32" in lab.move("Block size", "ArrowLeft")
    assert "tile 128: program 3 of 2 is not launched" in lab.move("Tile", "End")
    assert "program 0 of 2 loads words 0 to 15" in lab.move("Program", "Home")
    lab.page.get_by_role("button", name="Reset").press("Enter")
    expect(picture).to_have_attribute("alt", re.compile("203 weights, block size 64, tile 64: program 3 of 4"))
    assert lab.unnamed() == []
