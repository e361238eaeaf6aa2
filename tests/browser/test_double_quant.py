"""Notebook 04 in the real JupyterLab: its explorer follows the keyboard, and every control has a name."""

import re
from pathlib import Path

from playwright.sync_api import expect

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_the_constants_explorer(open_notebook):
    lab = open_notebook(NOTEBOOKS / "04_double_quant.ipynb")
    picture = lab.picture("Group size")
    assert "0.5 bits per parameter in float32 and 0.127 in 8 bits" in picture.get_attribute("alt")
    assert "Block size 128, groups of 256: constants cost 0.25 bits" in lab.move("Block size", "ArrowRight")
    assert "0.07812 in 8 bits" in lab.move("Group size", "Home")
    assert "outliers of 80" in lab.move("Outlier", "End")
    lab.page.get_by_role("checkbox", name="Mean offset").press("Space")
    expect(picture).to_have_attribute("alt", re.compile("outliers of 80, the mean left in"))
    lab.page.get_by_role("button", name="Reset").press("Enter")
    expect(picture).to_have_attribute("alt", re.compile("groups of 256: .* outliers of 0, the mean taken off"))
    assert lab.unnamed() == []
