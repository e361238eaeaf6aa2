"""The real JupyterLab, in Debian's Chromium, with its token kept: `open_notebook(path)` runs a copy of any notebook.

A new test of a course notebook is five lines:

    def test_codebook(open_notebook):
        lab = open_notebook(NOTEBOOKS / "01_codebook.ipynb")
        lab.move("Bits", "ArrowRight")
        lab.move("Offset", "End")
        assert lab.unnamed() == []

`pytest tests/browser --browser-runs 5` runs each test five times in a row.
"""

import re
import secrets
import shutil
import sys

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from tests.browser.controls import CLOSE, alt_text, pixels
from tools.lab_server import (
    FLAGS,
    RUN_ALL,
    SHUT_DOWN,
    find_chromium,
    lab_server,
    printed_token,
    started,
    wait_for,
)

# What ipykernel says on stderr of encryption, when it starts, reaches JupyterLab without its header at times.
NOT_OURS = "Kernel message validation error: Unexpected token 's', \"stream.stderr\" is not valid JSON"
SAVE = "() => window.jupyterapp.commands.execute('docmanager:save')"
OPEN = "async (path) => { await window.jupyterapp.commands.execute('docmanager:open', { path }) }"
IDLE = """(path) => {
  const opened = window.jupyterapp?.shell.currentWidget;
  return opened?.context?.path === path && opened.sessionContext?.session?.kernel?.status === "idle";
}"""
OPENED = "() => window.jupyterapp?.shell.currentWidget?.context?.isReady"


def pytest_generate_tests(metafunc):
    if "open_notebook" in metafunc.fixturenames:
        runs = range(metafunc.config.getoption("--browser-runs"))
        metafunc.parametrize("browser_run", runs, indirect=True, scope="module")  # a module's tests share their pages


@pytest.fixture(scope="module")
def browser_run(request):
    return request.param


@pytest.fixture(scope="session")
def chromium():
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium on this machine. Install it with: apt-get install -y --no-install-recommends chromium")
    return path


@pytest.fixture(scope="session")
def lab(chromium, tmp_path_factory):
    with lab_server(tmp_path_factory.mktemp("lab")) as served:
        yield served


@pytest.fixture(scope="module")
def course_server(tmp_path_factory):
    """(address, token) of JupyterLab as `qlora-lab open` starts it: without the settings of the tests or the user."""
    home = tmp_path_factory.mktemp("open")
    with started([sys.executable, "-m", "qlora_lab.cli", "open", str(home / "mine"), "--no-browser"], home) as server:
        token = printed_token(server, home)
        yield wait_for(server, home, token), token


@pytest.fixture(scope="session")
def context(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser.new_context(viewport={"width": 1280, "height": 900})  # one context: Lab's scripts stay cached
        browser.close()


class LabNotebook:
    """A notebook that has run to its end in JupyterLab."""

    def __init__(self, page, address):
        self.page = page
        self.address = address

    def slider(self, name):
        return self.page.get_by_role("slider", name=name, exact=True)

    def control(self, name):
        """The control of this name; of several, such as "Reset" of two explorers, the first."""
        roles = [self.page.get_by_role(role, name=name, exact=True) for role in ("slider", "checkbox", "button")]
        return roles[0].or_(roles[1]).or_(roles[2]).first

    def picture(self, name):
        """The picture of the explorer that this control belongs to."""
        return self.control(name).locator("xpath=ancestor::*[contains(@class, 'qlora-explorer')]").locator("img")

    def move(self, name, key):
        """Press a key on a control; the alt text and the pixels must change. Returns the new alt text."""
        picture = self.picture(name)
        alt, before = picture.get_attribute("alt"), pixels(picture)
        self.control(name).press(key)
        said = alt_text(picture, alt, same=False)
        assert said != alt, f"{key} on {name!r}: {said}, as before"
        assert not np.array_equal(before, pixels(picture)), f"{key} on {name!r}: new alt text, same pixels"
        return said

    def pixels(self, picture):
        return pixels(picture)

    def pictures(self):
        """The alt texts of all pictures among the outputs that can be seen."""
        images = self.page.locator(".jp-OutputArea img").all()
        return [image.get_attribute("alt") for image in images if image.is_visible()]

    def reopen(self):
        """What a student sees on the next day: save, shut the kernel down, load the page anew, run nothing."""
        self.page.evaluate(SAVE)
        self.page.evaluate(SHUT_DOWN)
        self.page.goto(self.address)
        self.page.wait_for_function(OPENED, timeout=60_000)

    def expect_stills_alone(self, count):
        """Each explorer's picture stays with a line below; the errors that JupyterLab has in its place are hidden."""
        play, errors = self.page.get_by_text("Run this cell to play."), self.page.get_by_text("Error displaying widget")
        if count:
            expect(play.first).to_be_visible(timeout=30_000)
            expect(errors.nth(count - 1)).to_be_attached(timeout=30_000)
        assert not [error for error in errors.all() if error.is_visible()]
        expect(self.page.get_by_text("Loading widget")).to_have_count(0, timeout=30_000)
        assert [line.is_visible() for line in play.all()] == [True] * count

    def controls(self):
        """The explorers' controls as a screen reader meets them, one a line: `slider "Bits": ...`."""
        text = "\n".join(e.aria_snapshot() for e in self.page.locator(".qlora-explorer").all())
        return re.findall(r"(?:slider|checkbox|button|img|combobox|textbox|spinbutton)\b.*", text)

    def unnamed(self):
        """Controls and pictures without an accessible name; and an explorer must be there at all."""
        assert self.controls(), "no explorer on this page"
        return [line for line in self.controls() if '"' not in line]


@pytest.fixture(scope="module")
def open_notebook(lab, context, browser_run, tmp_path_factory):
    """open_notebook(path, *beside): run a copy of a notebook, with the files it needs beside it, in JupyterLab.

    A module's notebooks follow each other on one page, because JupyterLab takes seconds to load.
    """
    url, token, served = lab
    page, opened, errors = context.new_page(), [], []
    page.on("pageerror", lambda error: NOT_OURS in str(error) or errors.append(f"{opened[-1:]}: {error.stack}"))

    def open_and_run(path, *beside):
        folder = served / secrets.token_hex(4)
        folder.mkdir()
        for file in (path, *beside):
            shutil.copy(file, folder)
        here = f"{folder.name}/{path.name}"
        address = f"{url}lab/tree/{here}?token={token}&reset"
        page.set_viewport_size({"width": 1280, "height": 900})
        if opened:
            page.evaluate(CLOSE)
            page.evaluate(OPEN, here)
        else:
            page.goto(address)
        opened.append(path.name)
        page.wait_for_function(IDLE, arg=here, timeout=60_000)
        assert page.evaluate(RUN_ALL), page.locator(".jp-OutputArea-output").all_inner_texts()
        return LabNotebook(page, address)

    yield open_and_run
    page.set_viewport_size({"width": 1280, "height": 900})
    page.screenshot(path=tmp_path_factory.mktemp("last") / "page.png")
    page.evaluate(SHUT_DOWN)
    page.close()
    assert not errors, errors
