"""Notebook 01 in the real JupyterLab: its explorer follows the keyboard, and every control has a name."""

from pathlib import Path

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_the_normal_float_explorer(open_notebook):
    lab = open_notebook(NOTEBOOKS / "01_codebook.ipynb")
    lab.move("Bits", "ArrowLeft")
    lab.move("Offset", "End")
    assert lab.unnamed() == []
