"""A JupyterLab that has the configuration of `qlora-lab open` and none of the user's, with its token kept.

    with lab_server(folder) as (address, token, served): ...

The browser tests and bench/widgets.py open their notebooks in it.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from qlora_lab.doctor.lab import SETTINGS

# What Chromium is started with.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
GRACE = 15  # seconds to end in, once asked
START = 120  # seconds to start in; a busy machine takes more than one minute
FOR_TESTS = {  # no news popup over the page, and nothing written back behind the reader
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
SHUT_DOWN = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()"


def find_chromium() -> str | None:
    """Return where Chromium is on this machine."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def lab_server(home: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield (address, token, served folder) of a JupyterLab whose files all lie in the empty folder `home`."""
    token = secrets.token_hex(16)
    (home / "served").mkdir()
    (home / "app").mkdir()
    (home / "app" / "overrides.json").write_text(json.dumps(FOR_TESTS))  # read once, when the server starts
    command = [sys.executable, "-m", "jupyterlab", *_options(home, token)]
    with started(command, home, JUPYTER_CONFIG_PATH=str(SETTINGS)) as server:
        yield wait_for(server, home, token), token, home / "served"


@contextlib.contextmanager
def started(command: list[str], home: Path, **variables: str) -> Iterator[subprocess.Popen]:
    """Yield a server that writes to server.log in `home`. It ends with the block, by force if need be."""
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=clean_environment(home) | variables)
    try:
        yield server
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE)
        server.kill()
        server.wait()


def _options(home: Path, token: str) -> list[str]:
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


def clean_environment(home: Path) -> dict[str, str]:
    folders = {f"JUPYTER_{kind}_DIR": str(home / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{kind}_DIR": str(home / kind) for kind in ("SETTINGS", "WORKSPACES")}
    folders["JUPYTER_CONFIG_PATH"] = ""
    return {**os.environ, **folders, "IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1"}


def printed_token(server: subprocess.Popen, home: Path) -> str:
    """The token of the address in the server's log, once the line is whole."""
    begin = time.monotonic()
    while not (printed := re.search(r"token=(\w{16,})\s", log := (home / "server.log").read_text())):
        _check_it_starts(server, begin, log)
        time.sleep(0.1)
    return printed[1]


def wait_for(server: subprocess.Popen, home: Path, token: str) -> str:
    """The address, once it answers. With --port=0 the port chosen stands in this file only, at times half written."""
    begin = time.monotonic()
    info = home / "RUNTIME" / f"jpserver-{server.pid}.json"
    while True:
        with contextlib.suppress(OSError, ValueError):
            url = json.loads(info.read_text())["url"]
            request = urllib.request.Request(url + "api/status", headers={"Authorization": f"token {token}"})
            urllib.request.urlopen(request, timeout=5).close()
            return url
        _check_it_starts(server, begin, (home / "server.log").read_text())
        time.sleep(0.1)


def _check_it_starts(server: subprocess.Popen, begin: float, log: str) -> None:
    assert server.poll() is None, f"JupyterLab stopped with exit code {server.returncode}:\n{log[-3000:]}"
    assert time.monotonic() - begin < START, f"JupyterLab did not answer within {START} s:\n{log[-3000:]}"
