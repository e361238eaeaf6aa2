"""Each notebook of the course as it is stored, opened without a kernel: pictures and sentences."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.theme import DARK, LIGHT, keep_pictures, set_theme, unreadable
from tools.playable import makes_explorer

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
OPEN = """async (path) => {
  const kernelPreference = { shouldStart: false, canStart: false };
  const how = { path, factory: "Notebook", kernelPreference };
  await (await window.jupyterapp.commands.execute("docmanager:open", how)).context.ready;
}"""
KERNEL = "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.name ?? null"
CLOSE = "() => window.jupyterapp.shell.currentWidget?.dispose()"  # close() would ask whether to save
SHOW_ALL = "async () => { await window.jupyterapp.commands.execute('notebook:show-all-cell-outputs') }"
IMAGES = """(places) => [...document.querySelectorAll(places)].filter((img) => img.checkVisibility())
  .map((img) => [img.complete && img.naturalWidth > 0, img.alt])"""
EMPTY = """() => [...document.querySelectorAll(".jp-OutputArea-output")].filter((output) => output.checkVisibility()
  && !output.innerText.trim() && !output.querySelector("img")).map((output) => output.outerHTML.slice(0, 200))"""
NO_SENTENCE = re.compile("Error displaying|Loading widget|Error rendering|Traceback|model not found|No output")


@pytest.fixture(scope="module")
def page(lab, context):
    url, token, _ = lab
    page = context.new_page()
    page.goto(f"{url}lab?token={token}&reset")
    page.wait_for_function("() => window.jupyterapp?.shell")
    page.evaluate("() => window.jupyterapp.restored.then(() => null)")
    yield page
    set_theme(page, LIGHT)  # JupyterLab stores it for all pages
    page.close()


def assert_pictures_and_sentences(page):
    text = page.locator(".jp-Notebook").inner_text()
    assert not NO_SENTENCE.search(text), NO_SENTENCE.search(text)
    assert page.evaluate(EMPTY) == []
    images = page.evaluate(IMAGES, ".jp-Notebook img")
    assert all(loaded and alt.strip() for loaded, alt in images), images


@pytest.fixture
def closed(page):
    """Whatever happens in one notebook, the next one finds an empty page."""
    yield
    page.evaluate(CLOSE)


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook(page, lab, path):
    """As stored, then with the answers that a reader opens, then in the dark."""
    cells = nbformat.read(path, 4).cells
    shutil.copy(path, lab[2])
    page.evaluate(OPEN, path.name)
    expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(len(cells))
    assert page.evaluate(KERNEL) is None
    play = page.get_by_text("Run this cell to play.")
    assert [line.is_visible() for line in play.all()] == [True] * sum(map(makes_explorer, cells))
    assert_pictures_and_sentences(page)
    page.evaluate(SHOW_ALL)
    assert_pictures_and_sentences(page)
    for theme in (LIGHT, DARK):
        set_theme(page, theme)
        assert unreadable(page) == []
    keep_pictures(page, path.stem)
