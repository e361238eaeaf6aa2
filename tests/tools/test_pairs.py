"""A notebook and its solution in one kernel: what both have runs once, and a wrong output of either is still found."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools.notebooks import student_version

pytestmark = pytest.mark.slow  # nbval takes a second to import, and one test starts a kernel
ROOT = Path(__file__).parents[2]


@pytest.fixture
def pair(stored, tmp_path):
    """write(): both notebooks in a folder, with the outputs that they have now. Returns their paths."""
    student = student_version(stored)
    for mine, solved in zip(student.cells, stored.cells, strict=True):
        if "outputs" in solved:
            mine.outputs, mine.execution_count = copy.deepcopy(solved.outputs), solved.execution_count

    def write() -> tuple[Path, Path]:
        (tmp_path / "solutions").mkdir(exist_ok=True)
        paths = tmp_path / "nb.ipynb", tmp_path / "solutions" / "nb.ipynb"
        for notebook, path in zip((student, stored), paths, strict=True):
            nbformat.write(notebook, path)
        return paths

    return student, stored, write


def test_cells_are_shared_up_to_the_first_that_differs(pair):
    from tools.pairs import shared  # here: the stages that leave this test out import no nbval

    student, solution, write = pair
    assert shared(*write()) == 2  # the third is the exercise
    solution.cells[3].outputs[1].data["text/plain"] = "0.6"  # one of the two is stale: both run
    assert shared(*write()) == 1
    for notebook in (student, solution):
        notebook.cells[3].metadata["tags"] = ["nbval-ignore-output"]  # compared in neither
    assert shared(*write()) == 2
    student.cells[1].source = "import cmath"
    assert shared(*write()) == 0


def test_a_wrong_output_is_found_wherever_it_stands(pair):
    """In both (found once), in the student's alone, in the solution's alone."""
    student, solution, write = pair
    for notebook in (student, solution):
        notebook.cells[3].outputs[0].text = "whole\n"
    student.cells[4].outputs[0].text, solution.cells[4].outputs[0].text = "False\n", "Neither\n"
    folder = write()[0].parent
    options = ["-p", "tools.pairs", "-p", "conftest", "-p", "no:cacheprovider", "-q", "--nbval-current-env"]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={folder}", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout
    failed = [line.split(" - ")[0] for line in said.splitlines() if line.startswith("FAILED")]
    assert failed == [f"FAILED nb.ipynb::{name}" for name in ("Cell 1", "Cell 2", "solution::Cell 2")], said
    assert "3 failed, 3 passed" in said  # the imports, and the rules of both
