"""Notebook 06 in the real JupyterLab: both of its explorers follow the keyboard, and every control has a name.

Only the cells that the explorers need are run: the sweep takes minutes, and nbval runs it.
"""

import re
from pathlib import Path

import nbformat
from playwright.sync_api import expect

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "06_data_types.ipynb"


def explorers_alone(folder):
    """A copy with the imports and the cells that end in an explorer."""
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [cell for cell in cells if re.match(r"ql\.\w+Explorer\(", cell.source.splitlines()[-1])]
    assert len(shown) == 2
    notebook.cells = [cells[0], *shown]
    path = folder / NOTEBOOK.name
    nbformat.write(notebook, path)
    return path


def test_the_explorers_of_data_types(open_notebook, tmp_path):
    lab = open_notebook(explorers_alone(tmp_path))
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

    codebook = lab.picture("Curve")
    assert "blocks of 64 given weights" in codebook.get_attribute("alt")
    assert "Curve 1.1, 7 levels below zero" in lab.move("Curve", "ArrowRight")
    assert "8 levels below zero" in lab.move("Levels below zero", "ArrowRight")
    assert "ends at 0.98" in lab.move("Ends", "ArrowLeft")
    lab.page.get_by_role("checkbox", name="Exact zero").press("Space")
    expect(codebook).to_have_attribute("alt", re.compile("8 levels below zero, no zero, ends at 0.98"))
    explorer = lab.page.locator(".qlora-explorer").filter(has=lab.slider("Curve"))
    explorer.get_by_role("slider", name="Block size", exact=True).press("End")
    expect(codebook).to_have_attribute("alt", re.compile("ends at 0.98, blocks of 1024 given weights"))
    explorer.get_by_role("button", name="Reset").press("Enter")
    expect(codebook).to_have_attribute("alt", re.compile("^Curve 1, 7 levels below zero, an exact zero, ends at 1, "))
    assert lab.unnamed() == []
