"""Day two: what a notebook shows without the kernel that made it, and what its controls say when the kernel stops."""

import re
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

from tools.lab_server import RUN_ALL, SHUT_DOWN

SHOW = Path(__file__).parents[1] / "show"
CELLS = [
    "import qlora_lab as ql\nfrom qlora_lab.show.data_types import CodebookExplorer\nfrom toy import RoundingExplorer\n"
    "from toy_training import toy_training\nfrom tqdm.auto import tqdm",
    "RoundingExplorer(bits=3)",
    "for i in tqdm(range(3)):\n    print(i)",
    "CodebookExplorer()",
    "run = await ql.live(toy_training('run', steps=3, overwrite=True))",
]
RESTART = "() => window.jupyterapp.shell.currentWidget.sessionContext.restartKernel()"
KILL = """() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel
  .requestExecute({ code: "import os; os.kill(os.getpid(), 9)" }) && null"""
START = re.compile("^Rounding explorer: 8 steps")
STOPPED = "The kernel has stopped: run this cell again."


@pytest.fixture(scope="module")
def run_day(open_notebook, tmp_path_factory):
    """run_day() runs the notebook in a new kernel."""
    kernel = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
    notebook = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    path = tmp_path_factory.mktemp("day") / "day.ipynb"
    nbformat.write(notebook, path)
    return lambda: open_notebook(path, SHOW / "toy.py", SHOW / "toy_training.py")


@pytest.fixture(scope="module")
def ran(run_day):
    """Each test leaves a kernel that has run all cells, but for the last one."""
    return run_day()


def test_pictures_stay_when_the_notebook_is_opened_again(run_day, tmp_path):
    lab = run_day()
    expect(lab.page.get_by_text("Run this cell to play.").first).to_be_hidden()  # the live views cover the stills
    before = lab.pictures()
    assert len(before) == 3 and START.match(before[0])
    lab.reopen()
    lab.expect_stills_alone(2)
    lab.page.screenshot(path=tmp_path / "reopened.png")
    assert lab.pictures() == before


def expect_controls_to_say_so(ran, stop, picture):
    page = ran.page
    said = page.get_by_role("status").filter(has_text=STOPPED)
    controls = page.locator(".qlora-explorer .qlora-control")
    assert "16 steps" in ran.move("Bits", "ArrowRight")
    ran.slider("Bits").focus()
    expect(said).to_have_count(0)
    page.evaluate(stop)
    expect(said).to_have_count(2)  # one for each explorer
    page.screenshot(path=picture)
    page.keyboard.press("ArrowRight")
    page.locator(".qlora-slider input").first.click(force=True, position={"x": 5, "y": 5})
    expect(page.locator(".qlora-slider span").first).to_have_text("4")
    assert controls.count() == 8
    assert all(control.evaluate("control => control.inert") for control in controls.all())
    assert {control.evaluate("control => getComputedStyle(control).opacity") for control in controls.all()} == {"0.4"}


@pytest.mark.parametrize("stop", [RESTART, KILL], ids=["restarted", "killed"])
def test_controls_say_that_the_kernel_has_stopped_and_work_after_the_cell_has_run(ran, stop, tmp_path):
    expect_controls_to_say_so(ran, stop, tmp_path / "stopped.png")
    ran.page.keyboard.press("Escape")  # JupyterLab tells of a killed kernel in a dialog
    assert ran.page.evaluate(RUN_ALL)
    expect(ran.page.get_by_text(STOPPED)).to_have_count(0)
    assert "16 steps" in ran.move("Bits", "ArrowRight")
    assert "8 steps" in ran.move("Bits", "ArrowLeft")


def test_controls_say_that_the_kernel_was_shut_down(ran, tmp_path):
    expect_controls_to_say_so(ran, SHUT_DOWN, tmp_path / "stopped.png")
