"""A term of a notebook leads to its entry in the glossary, in the real JupyterLab."""

import shutil

import nbformat
import pytest

from tools.glossary import PAGE, terms
from tools.lab_server import SHUT_DOWN

KERNEL = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
HEADING = "(name) => [...document.querySelectorAll('.jp-MarkdownViewer h2')].find((h) => h.innerText.startsWith(name))"
# The entry of "page fault" ends far below the first screen.
IN_SIGHT = f"""(name) => {{
  const heading = ({HEADING})(name), page = heading?.closest(".jp-MarkdownViewer").getBoundingClientRect();
  const box = heading?.getBoundingClientRect();
  return box && box.top >= page.top - 1 && box.bottom <= page.bottom + 1;
}}"""
CLOSE = "() => window.jupyterapp.shell.currentWidget.dispose()"


@pytest.fixture(scope="module")
def lab(open_notebook, tmp_path_factory):
    links = " ".join(f"[{term.name}](glossary.md#{term.anchor})" for term in terms())
    cells = [nbformat.v4.new_markdown_cell(links), nbformat.v4.new_code_cell("1")]
    folder = tmp_path_factory.mktemp("glossary")
    nbformat.write(nbformat.v4.new_notebook(metadata=KERNEL, cells=cells), folder / "terms.ipynb")
    shutil.copy(PAGE, folder)
    lab = open_notebook(folder / "terms.ipynb", folder / PAGE.name)
    yield lab
    lab.page.evaluate(SHUT_DOWN)


@pytest.mark.parametrize("name", ["page fault", "absmax", "swiglu"])
def test_a_link_opens_the_glossary_at_the_term(lab, name):
    lab.page.locator(".jp-MarkdownOutput").get_by_role("link", name=name, exact=True).click()
    lab.page.wait_for_function(IN_SIGHT, arg=name)
    lab.page.evaluate(CLOSE)
