"""The real JupyterLab, in Debian's Chromium, with its token kept: `open_notebook(path)` runs a copy of any notebook.

A new test of a course notebook is five lines:

    def test_codebook(open_notebook):
        lab = open_notebook(NOTEBOOKS / "01_codebook.ipynb")
        lab.move("Bits", "ArrowRight")
        lab.move("Offset", "End")
        assert lab.unnamed() == []

`pytest tests/browser --browser-runs 5` runs each test five times in a row.
"""

import base64
import contextlib
import io
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
SETTINGS = {  # no news popup over the page, and nothing written back behind the test
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}
IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"  # resolves to false when a cell raised
# What ipykernel says on stderr of encryption, when it starts, reaches JupyterLab without its header at times.
NOT_OURS = "Kernel message validation error: Unexpected token 's', \"stream.stderr\" is not valid JSON"
SAVE = "() => window.jupyterapp.commands.execute('docmanager:save')"
OPENED = "() => window.jupyterapp?.shell.currentWidget?.context?.isReady"
SHUT_DOWN = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()"
NEW_PICTURE_MS = 10_000  # a redraw takes 50; this is a machine that does something else


def pytest_generate_tests(metafunc):
    if "open_notebook" in metafunc.fixturenames:
        runs = range(metafunc.config.getoption("--browser-runs"))
        metafunc.parametrize("browser_run", runs, indirect=True, scope="module")  # a module's tests share their pages


@pytest.fixture(scope="module")
def browser_run(request):
    return request.param


@pytest.fixture(scope="session")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine. Install it with: apt-get install -y --no-install-recommends chromium")
    return path


@pytest.fixture(scope="session")
def lab(chromium, tmp_path_factory):
    """(address, token, served folder) of a JupyterLab that knows nothing of the user's own settings and kernels."""
    home, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    (home / "served").mkdir()
    (home / "app").mkdir()
    (home / "app" / "overrides.json").write_text(json.dumps(SETTINGS))  # read once, when the server starts
    with (home / "server.log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *_server_options(home, token)]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=_clean_environment(home))
    try:
        yield _wait_for(server, home, token), token, home / "served"
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(15)
        server.kill()


def _server_options(home, token):
    return [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        "--port=0",
        "--expose-app-in-browser",
        f"--ServerApp.root_dir={home / 'served'}",
        f"--IdentityProvider.token={token}",
        f"--LabApp.app_settings_dir={home / 'app'}",
        "--LabApp.extension_manager=readonly",
        "--LabApp.news_url=None",
    ]


def _clean_environment(home):
    folders = {f"JUPYTER_{kind}_DIR": str(home / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{kind}_DIR": str(home / kind) for kind in ("SETTINGS", "WORKSPACES")}
    return {**os.environ, **folders, "IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1"}


def _wait_for(server, home, token):
    """The address, once it answers. With --port=0 the port chosen stands in this file only, at times half written."""
    started, info = time.monotonic(), home / "RUNTIME" / f"jpserver-{server.pid}.json"
    while True:
        with contextlib.suppress(OSError, ValueError):
            url = json.loads(info.read_text())["url"]
            request = urllib.request.Request(url + "api/status", headers={"Authorization": f"token {token}"})
            urllib.request.urlopen(request, timeout=5).close()
            return url
        log = (home / "server.log").read_text()[-3000:]
        assert server.poll() is None, f"JupyterLab stopped with exit code {server.returncode}:\n{log}"
        assert time.monotonic() - started < 60, f"JupyterLab did not answer within 60 s:\n{log}"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def context(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser.new_context(viewport={"width": 1280, "height": 900})  # one context: Lab's scripts stay cached
        browser.close()


class LabNotebook:
    """A notebook that has run to its end in JupyterLab."""

    def __init__(self, page):
        self.page = page

    def slider(self, name):
        return self.page.get_by_role("slider", name=name, exact=True)

    def picture(self, slider_name):
        """The picture of the explorer that this slider belongs to."""
        explorer = self.page.locator(".qlora-explorer").filter(has=self.slider(slider_name))
        return explorer.locator("img")

    def move(self, slider_name, key):
        """Press a key on a slider; the alt text and the pixels must change. Returns the new alt text."""
        picture = self.picture(slider_name)
        alt, pixels = picture.get_attribute("alt"), _pixels(picture)
        self.slider(slider_name).press(key)
        expect(picture).not_to_have_attribute("alt", alt, timeout=NEW_PICTURE_MS)
        assert not np.array_equal(pixels, _pixels(picture)), f"{key} on {slider_name!r}: new alt text, same pixels"
        return picture.get_attribute("alt")

    def pictures(self):
        """The alt texts of all pictures among the outputs that can be seen."""
        images = self.page.locator(".jp-OutputArea img").all()
        return [image.get_attribute("alt") for image in images if image.is_visible()]

    def reopen(self):
        """What a student sees on the next day: save, shut the kernel down, load the page anew, run nothing."""
        self.page.evaluate(SAVE)
        self.page.evaluate(SHUT_DOWN)
        self.page.reload()
        self.page.wait_for_function(OPENED, timeout=60_000)

    def controls(self):
        """The explorers' controls as a screen reader meets them, one a line: `slider "Bits": ...`."""
        text = "\n".join(e.aria_snapshot() for e in self.page.locator(".qlora-explorer").all())
        return re.findall(r"(?:slider|checkbox|button|img|combobox|textbox|spinbutton)\b.*", text)

    def unnamed(self):
        """Controls and pictures without an accessible name; and an explorer must be there at all."""
        assert self.controls(), "no explorer on this page"
        return [line for line in self.controls() if '"' not in line]


def _pixels(picture):
    data = picture.get_attribute("src").partition("base64,")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def open_notebook(lab, context, browser_run, tmp_path_factory):
    """open_notebook(path, *beside): run a copy of a notebook, with the files it needs beside it, in JupyterLab."""
    url, token, served = lab
    pages, errors = [], []

    def open_and_run(path, *beside):
        folder, page = served / secrets.token_hex(4), context.new_page()
        pages.append(page)
        page.on("pageerror", lambda error: errors.append(f"{path.name}: {error}"))
        folder.mkdir()
        for file in (path, *beside):
            shutil.copy(file, folder)
        page.goto(f"{url}lab/tree/{folder.name}/{path.name}?token={token}&reset")
        page.wait_for_function(IDLE, timeout=60_000)
        assert page.evaluate(RUN_ALL), page.locator(".jp-OutputArea-output").all_inner_texts()
        return LabNotebook(page)

    yield open_and_run
    for page in pages:
        page.screenshot(path=tmp_path_factory.mktemp("last") / "page.png")
        page.evaluate(SHUT_DOWN)
        page.close()
    assert not errors, errors
