"""Notebook 00 asks its reader to follow a weight of their own, and runs for that one, too."""

from pathlib import Path

import nbformat
import pytest

from tools.notebooks import execute

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "00_start_here.ipynb"
OURS = "row, column = 5, 7"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight", "shown"),  # a row has 576 weights, which are nine blocks
    [
        ("0, 0", "weight number 0 is at place 0 of block 0"),
        ("100, 13", "weight number 57613 is at place 13 of block 900"),
    ],
)
def test_another_weight_runs_through(weight, shown, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in notebook.cells if OURS in cell.source and cell.source.startswith("row"))
    cell.source = cell.source.replace(OURS, f"row, column = {weight}")
    execute(notebook, tmp_path)
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert shown + "\n" in texts
