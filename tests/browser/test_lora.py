"""Notebook 07 in the real JupyterLab: its explorer follows the keyboard, and every control has a name."""

import re
from pathlib import Path

from playwright.sync_api import expect

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_the_low_rank_explorer(open_notebook):
    lab = open_notebook(NOTEBOOKS / "07_lora.ipynb")
    picture = lab.picture("Rank r")
    assert "64 x 64, decay 1, r=8" in picture.get_attribute("alt")
    assert "r=9: 1,152 parameters" in lab.move("Rank r", "ArrowRight")
    assert "128 x 128" in lab.move("Size d", "End")
    assert "r=1: 256 parameters, 2 % of 16,384" in lab.move("Rank r", "Home")
    assert "decay 3" in lab.move("Decay", "End")
    lab.page.get_by_role("button", name="Reset").press("Enter")
    expect(picture).to_have_attribute("alt", re.compile("64 x 64, decay 1, r=8: 1,024 parameters"))
    assert lab.unnamed() == []
