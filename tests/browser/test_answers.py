"""An answer to "Predict first" stays out of sight until the reader runs its cell or opens what we saw."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

SESSION = "window.jupyterapp?.shell.currentWidget?.sessionContext"
IDLE = f"() => {SESSION}?.session?.kernel?.status === 'idle'"
RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "00_start_here.ipynb"


@pytest.fixture
def opened(lab, context):
    """Notebook 00's question about two gradients, its cell and its answer: opened as stored, not run."""
    url, token, served = lab
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    (asked,) = [i for i, cell in enumerate(cells) if re.search(r"\*\*Predict", "".join(cell["source"]))]
    book = nbformat.from_dict({"cells": cells[asked : asked + 3], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    book.metadata["kernelspec"] = {"display_name": "Python 3", "name": "python3"}
    book.cells[1].source = "{'lora_A': 'still zero', 'lora_B': True}"  # what it needs is elsewhere in the notebook
    nbformat.write(book, served / "answers.ipynb")
    page = context.new_page()
    page.goto(f"{url}lab/tree/answers.ipynb?token={token}&reset")
    page.wait_for_function(IDLE, timeout=60_000)
    yield page
    page.evaluate(f"() => {SESSION}?.shutdown()")
    page.close()


def test_a_stored_answer_is_hidden_until_its_cell_runs(opened):
    expect(opened.locator("p").filter(has_text="which of the two matrices")).to_be_visible()
    assert not [text for text in opened.locator(".jp-OutputArea-output").all() if text.is_visible()]
    assert opened.evaluate(RUN_ALL)
    expect(opened.locator(".jp-OutputArea-output").get_by_text("still zero")).to_be_visible()


def test_what_we_saw_opens_with_a_click(opened):
    answer = opened.locator("details p").filter(has_text="has to wait until")
    expect(answer).to_be_hidden()
    opened.locator("summary").click()
    expect(answer).to_be_visible()
