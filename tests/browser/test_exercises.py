"""An exercise of the course, as a student works on it: type an answer, run the cell, read the hint, try again."""

from pathlib import Path

import nbformat
from playwright.sync_api import expect

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01_codebook.ipynb"
HINT = "Hint: That is the offset for 4 bits. How many slices do `bits` bits make?"
RIGHT = "round(1 - (1 / (2**bits - 1) + 1 / 2**bits) / 4, 7)"
RUN = "Shift+Enter"


def exercise_alone(folder):
    """A copy with the imports and the exercise."""
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (exercise,) = [cell for cell in cells if cell.source.startswith("def my_offset")]
    notebook.cells = [cells[0], exercise]
    nbformat.write(notebook, folder / NOTEBOOK.name)
    return folder / NOTEBOOK.name


def test_an_exercise_is_answered_in_the_browser(open_notebook, tmp_path):
    lab = open_notebook(exercise_alone(tmp_path))
    cell = lab.page.locator(".jp-Notebook .jp-CodeCell").nth(1)
    line, said = cell.locator(".cm-line").filter(has_text="return"), cell.locator(".jp-OutputArea-output")

    def answer(text):
        line.click()
        lab.page.keyboard.press("End")
        lab.page.keyboard.press("Shift+Home")  # the line without its indent
        lab.page.keyboard.type(f"return {text}")
        lab.page.keyboard.press(RUN)

    expect(said).to_have_text("my_offset: not answered yet. Replace the ... and run this cell again.")
    answer("0.9677083")
    expect(said).to_contain_text("my_offset: not yet. Case 2 of 3:")
    expect(said).to_contain_text(HINT)
    answer("...")
    expect(said).to_have_text("my_offset: not answered yet. Replace the ... and run this cell again.")
    answer(RIGHT)
    expect(said).to_have_text("my_offset: correct")
