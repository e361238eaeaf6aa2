"""Notebook 01 in the real JupyterLab: its explorer follows the keyboard, and every control has a name."""

import re
from pathlib import Path

from playwright.sync_api import expect

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_the_normal_float_explorer(open_notebook, tmp_path):
    lab = open_notebook(NOTEBOOKS / "01_codebook.ipynb")
    picture = lab.picture("Bits")
    assert "16 levels" in picture.get_attribute("alt")
    for key, bits, bins in [("ArrowLeft", 3, (14, 16)), ("Home", 2, (6, 8)), ("End", 6, (126, 128))]:
        rule = sum(1 - 1 / n for n in bins) / 2
        assert f"{bits} bits, offset {rule:.7g} by the rule: {2**bits} levels" in lab.move("Bits", key)
    assert "5 bits" in lab.move("Bits", "ArrowLeft")
    lab.page.screenshot(path=tmp_path / "bits.png")
    assert "offset 0.995" in lab.move("Offset", "End")
    lab.page.get_by_role("checkbox", name="Symmetric").press("Space")
    expect(picture).to_have_attribute("alt", re.compile("31 levels"))
    lab.page.get_by_role("button", name="Reset").press("Enter")
    expect(picture).to_have_attribute("alt", re.compile("4 bits, offset 0.9677083 by the rule: 16 levels"))
    assert lab.unnamed() == []
