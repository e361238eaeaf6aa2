"""An answer to "Predict first" stays out of sight until the reader runs its cell or opens what we saw; a guess comes
first, by keyboard or by mouse, and is compared with what was measured."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.theme import DARK, LIGHT, set_theme
from tools.lab_server import IDLE, RUN_ALL, SHUT_DOWN

RESTART = "() => window.jupyterapp.shell.currentWidget.sessionContext.restartKernel()"
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "00_start_here.ipynb"
MEASURED = 'has_gradient.compare("lora_B")'  # what the notebook's cell needs is elsewhere in the notebook
NUMBER = 'codes = ql.guess("How many codes?", unit="codes")'


@pytest.fixture(scope="module")
def opened(lab, context):
    """Notebook 00's question about two gradients, its guess and its answer, and a number: as stored, not run yet."""
    url, token, served = lab
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    (asked,) = [i for i, cell in enumerate(cells) if re.search(r"\*\*Predict", "".join(cell["source"]))]
    cells = [nbformat.v4.new_code_cell("import qlora_lab as ql"), *cells[asked : asked + 4]]
    cells += [nbformat.v4.new_code_cell(source) for source in (NUMBER, "codes.compare(8)")]
    book = nbformat.from_dict({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    book.cells[3].source = MEASURED
    book.metadata["kernelspec"] = {"display_name": "Python 3", "name": "python3"}
    nbformat.write(book, served / "answers.ipynb")
    page = context.new_page()
    page.goto(f"{url}lab/tree/answers.ipynb?token={token}&reset")
    page.wait_for_function(IDLE, timeout=60_000)
    set_theme(page, LIGHT)
    yield page
    set_theme(page, LIGHT)  # the server keeps it for all pages
    page.evaluate(SHUT_DOWN)
    page.close()


def run_cell(page, number):
    """Run a cell again, as a reader would after a guess."""
    page.locator(".jp-Notebook .jp-Cell").nth(number).locator(".jp-InputPrompt").click()
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-cell')")


def test_a_stored_answer_is_hidden_until_its_cell_runs(opened):
    expect(opened.locator("p").filter(has_text="which of the two matrices")).to_be_visible()
    expect(opened.get_by_text("Run this cell to guess.")).to_be_visible()  # the still of the guess
    expect(opened.locator(".jp-OutputArea-output").get_by_text("lora_B", exact=False)).to_be_hidden()
    assert opened.evaluate(RUN_ALL), opened.locator(".jp-OutputArea-output").all_inner_texts()
    expect(opened.get_by_text("Run this cell to guess.").first).to_be_hidden()
    expect(opened.get_by_text('The answer is "lora_B". (You recorded no guess.)')).to_be_visible()


def test_what_we_saw_opens_with_a_click(opened):
    answer = opened.locator("details p").filter(has_text="has to wait until")
    expect(answer).to_be_hidden()
    opened.locator("summary").click()
    expect(answer).to_be_visible()


def test_a_guess_by_keyboard_and_by_mouse(opened, tmp_path):
    """Each is recorded and compared; what cannot be a guess is refused; a stopped kernel says so."""
    assert opened.evaluate(RUN_ALL)
    cells = opened.locator(".jp-Notebook .jp-Cell").count()
    choice = opened.get_by_role("group", name="Which matrix has a gradient")
    number = opened.get_by_role("group", name="How many codes?")
    box = opened.get_by_role("spinbutton", name="How many codes?")
    choice.get_by_role("button", name="Record").click()
    expect(choice.get_by_role("status")).to_contain_text("Nothing was recorded: An empty box is not among the choices.")
    choice.get_by_role("radio", name="lora_A", exact=True).click()
    choice.get_by_role("button", name="Record").click()
    expect(choice.get_by_role("status")).to_contain_text('Recorded: "lora_A".')
    box.press("a")  # a shortcut of JupyterLab elsewhere
    box.press("b")
    box.press_sequentially("12")
    box.press("Enter")
    expect(number.get_by_role("status")).to_contain_text("Recorded: 12 codes.")
    box.fill("")
    box.press("Tab")
    number.get_by_role("button", name="Record").press("Space")
    expect(number.get_by_role("status")).to_contain_text("Nothing was recorded: An empty box is not a number.")
    assert opened.locator(".jp-Notebook .jp-Cell").count() == cells
    hostile = choice.get_by_role("radio", name="lora_B", exact=True)
    hostile.evaluate("input => { input.value = '__import__'; input.checked = true; }")
    choice.get_by_role("button", name="Record").press("Enter")
    expect(choice.get_by_role("status")).to_contain_text("Nothing was recorded: '__import__' is not among the choices.")
    run_cell(opened, 3)
    expect(opened.get_by_text('You guessed "lora_A"; the answer is "lora_B".')).to_be_visible()
    run_cell(opened, 6)
    expect(opened.get_by_text("You guessed 12 codes; the answer is 8 codes.")).to_be_visible()
    light = {part: box.evaluate(f"box => getComputedStyle(box).{part}") for part in ("color", "backgroundColor")}
    set_theme(opened, DARK)
    expect(box).not_to_have_css("color", light["color"])  # the box follows the theme, ink and paper
    expect(box).not_to_have_css("background-color", light["backgroundColor"])
    opened.screenshot(path=tmp_path / "guesses.png")
    opened.evaluate(RESTART)
    expect(opened.get_by_text("The kernel has stopped: run this cell again.")).to_have_count(2)
    assert all(control.evaluate("control => control.inert") for control in opened.locator(".qlora-guess").all())
