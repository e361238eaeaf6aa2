"""While a cell trains: a slider of another cell moves, the picture of the loss follows, a key stops the run."""

import re
from pathlib import Path

import nbformat
from playwright.sync_api import expect

SHOW = Path(__file__).parents[1] / "show"
CELLS = [
    "import torch\nfrom toy import RoundingExplorer\nfrom toy_training import toy_training\n\nimport qlora_lab as ql",
    "RoundingExplorer()",
]
TRAINING = "run = await ql.live(toy_training('run', steps=100_000, save_every=0))"
ADD_CELL = "() => window.jupyterapp.commands.execute('notebook:insert-cell-below')"
EDIT = "() => window.jupyterapp.commands.execute('notebook:enter-edit-mode')"
RUN = "() => { window.jupyterapp.commands.execute('notebook:run-cell').then(() => window.ended = true) }"
STEPS = re.compile(r"Training loss over (\d+) of 100000 steps")


def run_cell(page, source):
    """Add a cell below and start it; the call does not wait for its end."""
    page.evaluate(ADD_CELL)
    page.evaluate(EDIT)
    page.keyboard.insert_text(source)
    page.evaluate(RUN)


def step_of(picture):
    return int(STEPS.match(picture.get_attribute("alt"))[1])


def test_widgets_work_while_a_cell_trains(open_notebook, tmp_path):
    kernel = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
    notebook = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nbformat.write(notebook, tmp_path / "live.ipynb")
    lab = open_notebook(tmp_path / "live.ipynb", SHOW / "toy.py", SHOW / "toy_training.py")
    page, panel = lab.page, lab.page.locator(".qlora-live")
    picture, stop = panel.locator("img"), panel.get_by_role("button", name="Stop after this step", exact=True)
    run_cell(page, TRAINING)
    expect(picture).to_have_attribute("alt", STEPS, timeout=30_000)

    before, pixels = step_of(picture), picture.get_attribute("src")
    assert "32 steps" in lab.move("Bits", "ArrowRight")
    assert "256 steps" in lab.move("Bits", "End")
    expect(picture).not_to_have_attribute("src", pixels, timeout=10_000)
    assert step_of(picture) > before
    expect(panel).to_contain_text(re.compile(r"step \d+ of 100000, loss \d\.\d+, \d+ tokens per second, .* left"))
    panel.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "training.png")
    assert page.evaluate("window.ended") is None  # all of this while the cell was running

    stop.press("Enter")
    page.wait_for_function("window.ended", timeout=10_000)
    expect(panel).to_have_count(0)
    ended = page.get_by_role("img", name=re.compile("Ended: asked to stop; resume=True goes on$"))
    expect(ended).to_have_count(1)
    expect(page.get_by_text("resume=True goes on")).to_be_visible()
    run_cell(page, "print(run.ended, len(run.losses), run.adapter.exists())")
    expect(page.locator(".jp-OutputArea-output").last).to_have_text(f"asked to stop {step_of(ended)} True")
    assert "2 steps" in lab.move("Bits", "Home")  # and sliders work on after it
    ended.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "stopped.png")
