"""Day two: what a notebook shows without the kernel that made it, and what its controls say when the kernel stops."""

import re
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

SHOW = Path(__file__).parents[1] / "show"
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CELLS = [
    "import qlora_lab as ql\nfrom qlora_lab.show.data_types import CodebookExplorer\nfrom toy import RoundingExplorer\n"
    "from toy_training import toy_training\nfrom tqdm.auto import tqdm",
    "RoundingExplorer(bits=3)",
    "for i in tqdm(range(3)):\n    print(i)",
    "CodebookExplorer()",
    "run = await ql.live(toy_training('run', steps=3, overwrite=True))",
]
SHUT_DOWN = "() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()"
RESTART = "() => window.jupyterapp.shell.currentWidget.sessionContext.restartKernel()"
KILL = """() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel
  .requestExecute({ code: "import os; os.kill(os.getpid(), 9)" }) && null"""
RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
START = re.compile("^Rounding explorer: 8 steps")
STOPPED = "The kernel has stopped: run this cell again."


@pytest.fixture
def ran(open_notebook, tmp_path):
    kernel = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
    notebook = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nbformat.write(notebook, tmp_path / "day.ipynb")
    return open_notebook(tmp_path / "day.ipynb", SHOW / "toy.py", SHOW / "toy_training.py")


def expect_stills_alone(lab, count):
    """Each explorer's picture stays with a line below, and the error that JupyterLab has in its place is hidden."""
    play, errors = lab.page.get_by_text("Run this cell to play."), lab.page.get_by_text("Error displaying widget")
    expect(play.first).to_be_visible(timeout=30_000)
    expect(errors.nth(count - 1)).to_be_attached(timeout=30_000)
    assert not [error for error in errors.all() if error.is_visible()]
    assert not lab.page.get_by_text("Loading widget").all()
    assert [line.is_visible() for line in play.all()] == [True] * count


def test_pictures_stay_when_the_notebook_is_opened_again(ran, tmp_path):
    expect(ran.page.get_by_text("Run this cell to play.").first).to_be_hidden()  # the live views cover the stills
    before = ran.pictures()
    assert len(before) == 3 and START.match(before[0])
    ran.reopen()
    expect_stills_alone(ran, 2)
    ran.page.screenshot(path=tmp_path / "reopened.png")
    assert ran.pictures() == before


@pytest.mark.parametrize("name", ["01_codebook", "04_double_quant", "05_kernels", "07_lora", "08_memory", "09_paged_*"])
def test_the_course_on_day_two(open_notebook, name):
    """03, 06 and 10 run for minutes, and show nothing of another kind."""
    (path,) = NOTEBOOKS.glob(f"{name}.ipynb")
    lab = open_notebook(path)
    expect(lab.page.locator(".qlora-explorer img")).to_have_count(1)
    before = lab.pictures()
    lab.reopen()
    expect_stills_alone(lab, 1)
    assert lab.pictures() == before


@pytest.mark.parametrize("stop", [SHUT_DOWN, RESTART, KILL], ids=["shut down", "restarted", "killed"])
def test_controls_say_that_the_kernel_has_stopped(ran, stop, tmp_path):
    page = ran.page
    said = page.get_by_role("status").filter(has_text=STOPPED)
    controls = page.locator(".qlora-explorer .qlora-control")
    assert "16 steps" in ran.move("Bits", "ArrowRight")
    ran.slider("Bits").focus()
    expect(said).to_have_count(0)
    page.evaluate(stop)
    expect(said).to_have_count(2)  # one for each explorer
    page.screenshot(path=tmp_path / "stopped.png")
    page.keyboard.press("ArrowRight")
    page.locator(".qlora-slider input").first.click(force=True, position={"x": 5, "y": 5})
    expect(page.locator(".qlora-slider span").first).to_have_text("4")
    assert controls.count() == 8
    assert all(control.evaluate("control => control.inert") for control in controls.all())
    assert {control.evaluate("control => getComputedStyle(control).opacity") for control in controls.all()} == {"0.4"}


def test_controls_work_again_after_the_cell_has_run(ran):
    ran.page.evaluate(RESTART)
    expect(ran.page.get_by_text(STOPPED)).to_have_count(2)
    assert ran.page.evaluate(RUN_ALL)
    expect(ran.page.get_by_text(STOPPED)).to_have_count(0)
    assert "16 steps" in ran.move("Bits", "ArrowRight")
