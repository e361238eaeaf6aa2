"""The chat panel in a real JupyterLab: a question is typed, answered by both, stopped; cells run meanwhile."""

import re
from pathlib import Path

import nbformat
from playwright.sync_api import expect

from tests.browser.test_live import run_cell
from tests.browser.theme import CHANGE, DARK

SHOW = Path(__file__).parents[1] / "show"
# No end token, and words drawn at random: an answer lasts until it is stopped.
CELLS = [
    "from toy_training import toy_tokenizer, toy_training\n\nimport qlora_lab as ql",
    "from qlora_lab.infer import decode\n\ndecode.stop_ids = lambda *given: []\nmodel = toy_training('run').model",
    "ql.ChatPanel(model, toy_tokenizer(), 2000, ql.Sampling(temperature=3.0))",
]


def test_a_question_is_typed_answered_and_stopped(open_notebook, tmp_path):
    kernel = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
    notebook = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nbformat.write(notebook, tmp_path / "chat.ipynb")
    page = open_notebook(tmp_path / "chat.ipynb", SHOW / "toy_training.py").page
    panel = page.locator(".qlora-live")
    question, send = panel.get_by_role("textbox", name="Question"), panel.get_by_role("button", name="Send")
    base, tuned = (panel.get_by_role("log", name=name) for name in ("Base", "With the adapter"))
    expect(page.locator(".qlora-still")).to_be_hidden()

    question.click()
    page.keyboard.type("one two <b>")  # b would insert a cell if the field let it through
    page.keyboard.press("Enter")
    for column in (base, tuned):
        expect(column.locator(".qlora-user")).to_have_text("one two <b>", timeout=30_000)
        expect(column.locator(".qlora-assistant")).to_have_text(re.compile(r"(\w+ ?){3}"), timeout=30_000)
    expect(send).to_be_disabled()
    run_cell(page, "print('cells', 'run')")
    expect(page.locator(".jp-OutputArea-output").last).to_have_text("cells run", timeout=10_000)

    panel.get_by_role("button", name="Stop").press("Enter")
    expect(send).to_be_enabled(timeout=10_000)
    expect(panel).to_contain_text(re.compile(r"\d tokens per second; ended: interrupted"))
    page.evaluate(CHANGE, DARK)
    panel.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "dark.png")
    panel.get_by_role("button", name="Reset").press("Enter")
    expect(base).to_be_empty()
    assert page.locator(".jp-Cell").count() == len(CELLS) + 1
