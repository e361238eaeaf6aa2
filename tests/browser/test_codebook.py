"""Notebook 01 in the real JupyterLab: its explorer follows the keyboard, and every control has a name."""

import re
from pathlib import Path

from playwright.sync_api import expect

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_the_normal_float_explorer(open_notebook):
    lab = open_notebook(NOTEBOOKS / "01_codebook.ipynb")
    picture = lab.picture("Bits")
    assert "16 levels" in picture.get_attribute("alt")
    assert "3 bits" in lab.move("Bits", "ArrowLeft")
    assert "offset 0.995" in lab.move("Offset", "End")
    lab.page.get_by_role("checkbox", name="Symmetric").press("Space")
    expect(picture).to_have_attribute("alt", re.compile("7 levels"))
    lab.page.get_by_role("button", name="Reset").press("Enter")
    expect(picture).to_have_attribute("alt", re.compile("4 bits, offset 0.9677083: 16 levels"))
    assert lab.unnamed() == []
