"""Explorers of a notebook as pages: found by what is stored, made by the cells that they need, and kept."""

import nbformat
import pytest

from tools.playable import STILL, main, makes_explorer, page_name, pages_of, shows_explorer

CELL = nbformat.v4
FAILS = "raise ValueError('this cell does not have to run')"
WRITER = """
from pathlib import Path
class Weight:
    def __init__(self, lit): self.lit = lit
    def save_html(self, path): Path(path).write_text(self.lit)
"""


def still(source):
    output = CELL.new_output("display_data", {"text/html": f"<div>{STILL}</div>", "text/plain": "Station 2"})
    return CELL.new_code_cell(source, outputs=[output])


@pytest.fixture
def notebook(tmp_path):
    cells = [
        CELL.new_markdown_cell("# A weight"),
        CELL.new_code_cell(WRITER),
        CELL.new_code_cell("lit = 'block'"),
        CELL.new_code_cell(FAILS),
        still("Weight(lit)"),
    ]
    path = tmp_path / "16_weights.ipynb"
    nbformat.write(CELL.new_notebook(cells=cells), path)
    return path


def test_a_cell_shows_an_explorer_if_its_still_is_stored():
    guess = CELL.new_output("display_data", {"text/html": '<div class="qlora-still">Run this cell to guess.</div>'})
    assert shows_explorer(still("explorer"))
    assert not shows_explorer(CELL.new_code_cell("ql.guess()", outputs=[guess]))
    assert not shows_explorer(CELL.new_markdown_cell(STILL))


@pytest.mark.parametrize(
    ("source", "makes"),
    [("explorer", True), ("x = 1\nshow.ZooExplorer(size=64)\n", True), ("made = ZooExplorer()", False), ("", False)],
)
def test_a_cell_makes_an_explorer_by_its_last_line(source, makes):
    assert makes_explorer(CELL.new_code_cell(source)) == makes
    assert not makes_explorer(CELL.new_markdown_cell(source))


@pytest.mark.long
def test_only_what_an_explorer_needs_runs_and_pages_are_kept(notebook, tmp_path):
    folder = tmp_path / "pages"
    (page,) = pages_of(notebook, folder)
    assert page == folder / page_name("16_weights", 4) == folder / "16_weights-004.html"
    assert page.read_text("utf-8") == "block"
    made = page.stat().st_mtime_ns
    assert pages_of(notebook, folder) == [page] and page.stat().st_mtime_ns == made
    text = notebook.read_text("utf-8")
    notebook.write_text(text.replace("'block'", "'byte'"), "utf-8")
    pages_of(notebook, folder)
    assert page.read_text("utf-8") == "byte"  # a cell that it needs has changed


@pytest.mark.long
def test_a_cell_that_fails_is_named(notebook, tmp_path, monkeypatch, capsys):
    text = notebook.read_text("utf-8")
    notebook.write_text(text.replace("'block'", "1 / 0"), "utf-8")
    monkeypatch.setattr("sys.argv", ["playable", str(notebook), str(tmp_path / "pages")])
    assert main() == 1
    said = capsys.readouterr().err
    assert said.startswith("16_weights.ipynb, cell 1: ") and "ZeroDivisionError" in said
