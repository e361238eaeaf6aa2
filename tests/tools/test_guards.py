"""The guards of the root conftest.py, with real nbval and real kernels, on notebooks in a temporary folder."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.slow  # each test starts a kernel


@pytest.fixture
def nbval(tmp_path):
    """nbval(notebook, sanitize=...): (exit code, output) of pytest --nbval on one notebook, with our guards."""

    def run(notebook, sanitize=ROOT / "nbval_sanitize.cfg"):
        nbformat.write(notebook, tmp_path / "nb.ipynb")
        options = ["-p", "conftest", "-p", "no:cacheprovider", "-q", "--nbval", "--nbval-current-env"]
        command = [sys.executable, "-m", "pytest", *options, f"--nbval-sanitize-with={sanitize}", "nb.ipynb"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


PICTURE = """\
print("half")
class Picture:
    def _repr_html_(self):
        return '<img alt="step 0.5" src="data:image/png;base64,AAAA">'
Picture()"""


def test_a_stored_notebook_passes(nbval, stored):
    stored.cells[3].source = PICTURE
    stored.cells[3].outputs[1].data = {
        "text/html": '<img alt="step 0.5" src="data:image/png;base64,BBBB">',  # other pixels, the same alt text
        "text/plain": "<__main__.Picture at 0x7f0000000000>",
    }
    code, said = nbval(stored)
    assert code == 0 and "4 passed" in said, said  # three cells and the rules


def test_a_changed_number_and_an_unrun_cell_fail(nbval, stored):
    stored.cells[3].outputs[1].data["text/plain"] = "0.6"
    stored.cells[4].execution_count, stored.cells[4].outputs = None, []  # stripped: nbval itself lets it pass
    code, said = nbval(stored)
    assert code == 1 and "2 failed, 2 passed" in said, said
    assert "cell 4: run number None, not 3" in said


def test_a_rule_that_nbval_would_drop_stops_the_run(nbval, stored, tmp_path):
    dead = tmp_path / "dead.cfg"
    dead.write_text("[a]\nregex: x\nreplace:\n\n[b]\nregex: y\nreplace: Y\n")
    code, said = nbval(stored, dead)
    assert code == 4 and "nbval reads 1 of 2 rules; give each `replace:` a word" in said, said


def test_a_missing_sanitize_file_stops_the_run(nbval, stored):
    code, said = nbval(stored, "gone.cfg")
    assert code == 4 and "gone.cfg does not exist: run pytest from the repository root" in said, said
