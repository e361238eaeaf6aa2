"""Notebooks exported to HTML: each picture has its alt text, and nothing is left of what only JupyterLab can show."""

import re
from pathlib import Path

import IPython.display
import nbformat
import pytest
from nbconvert import HTMLExporter
from toy import RoundingExplorer

from qlora_lab.show.still import VIEW

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))


def alt_texts(notebook, template="lab"):
    page, _ = HTMLExporter(template_name=template).from_notebook_node(notebook)
    assert "No description has been provided" not in page
    outputs = re.findall(r'<div class="[^"]*jp-OutputArea-output[^>]*>', page)  # the classic template has none
    assert all("data-mime-type=" in output for output in outputs)  # those without one are hidden where a still is
    return re.findall(r'<img alt="([^"]+)"', page), page.count("<img ")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_of_the_course_have_their_alt_text(path):
    notebook = nbformat.read(path, 4)
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = "data:image/png;base64,", "data:image/svg+xml;base64,"
    pictures = sum(any(kind in data.get("text/html", "") for kind in kinds) for data in outputs)
    for template in ("lab", "classic"):
        texts, count = alt_texts(notebook, template)
        assert pictures and len(texts) == count == pictures


@pytest.mark.slow
def test_a_copy_that_a_student_saved_has_its_alt_text_too(monkeypatch):
    """JupyterLab saves the output with the live view, but no widget for it: nbconvert leaves it out and warns."""
    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw: shown.append(bundle))
    RoundingExplorer()._ipython_display_()
    assert list(shown[1]) == [VIEW]
    outputs = [nbformat.v4.new_output("display_data", bundle) for bundle in shown]
    cell = nbformat.v4.new_code_cell("RoundingExplorer()", outputs=outputs, execution_count=1)
    with pytest.warns(UserWarning, match="widget-view.* is not able to be represented"):
        texts, count = alt_texts(nbformat.v4.new_notebook(cells=[cell]))
    assert texts == ["Rounding explorer: 16 steps, RMSE 0.1157"] and count == 1
