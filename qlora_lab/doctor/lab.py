"""Start JupyterLab as `qlora-lab open` does, and see whether a notebook with a widget would run in it.

In: an empty folder. Out: three Checks: the server and its token, the extensions that draw widgets, and a kernel, which
is asked over a websocket, as the page in a browser asks it. No browser is needed, and no notebook of the course.
"""

import asyncio
import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from qlora_lab.doctor.machine import OK, PROBLEM, WARNING, Check

SERVER, WIDGETS, KERNEL = "JupyterLab", "widgets", "kernel"  # names of the checks
START_SECONDS = 60  # for the server, and for a kernel, on a busy machine, too
KERNEL_SECONDS = 60  # for a kernel that has started to import torch and matplotlib
# Shutting down waits for kernels, so a moment is not enough.
GRACE = 10  # seconds to end in, once asked
SETTINGS = Path(__file__).parents[1] / "cli" / "jupyter"
EXTENSIONS = ("@jupyter-widgets/jupyterlab-manager", "anywidget")  # without them a page has no widget
# Of the two addresses that are printed, the one with a host: the other is a file in the runtime folder.
_ADDRESS = re.compile(r"(http://(?:localhost|127\.0\.0\.1):\d+/\S*?)lab\S*\s")
_TOKEN = re.compile(r"[?&]token=(\w{16,})\s")
_CONFIG = re.compile(r'<script id="jupyter-config-data"[^>]*>(.*?)</script>', re.S)
# http_proxy may name a proxy without no_proxy naming this machine, which a browser leaves out by itself.
_OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
BY_HAND = "run `qlora-lab open room-check` and read what it says"
VIEW = "application/vnd.jupyter.widget-view+json"
# What the kernel is asked: which Python it is, which library it finds, and to show an explorer of notebook 01.
QUESTION = """import json, sys
import qlora_lab
from qlora_lab.show.normal_float import NormalFloatExplorer
print(json.dumps({"python": sys.executable, "version": qlora_lab.__version__}))
NormalFloatExplorer()"""


class Server(NamedTuple):
    """A JupyterLab that answers. token: None where the user has set a password or a token of their own."""

    address: str  # ends with a slash
    token: str | None


def lab_command(place: Path, browser: bool = True) -> tuple[list[str], dict[str, str]]:
    """Return the command that opens a notebook or a folder in JupyterLab, and the environment variables it changes.

    Its token stays on.
    """
    # absolute, so that no folder's name begins like an option
    command = [sys.executable, "-m", "jupyterlab", str(place.absolute())]
    # These settings stop JupyterLab from asking about its news; without an address it calls no one.
    command.append("--LabApp.news_url=None")
    command.append(f"--LabServerApp.extra_labextensions_path={SETTINGS / 'labextensions'}")
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # containers run as root, where Jupyter refuses to start without it
    earlier = os.environ.get("JUPYTER_CONFIG_PATH")
    return command, {"JUPYTER_CONFIG_PATH": os.pathsep.join([str(SETTINGS), *([earlier] if earlier else [])])}


def check_lab(folder: Path, expected_version: str) -> list[Check]:
    """Start JupyterLab on an empty folder, ask it, and end it. What follows a failure is left out.

    expected_version: the version of this library, which the kernel has to find as well.
    """
    found: list[Check] = []
    name = SERVER  # of the check that runs: an error is its own, and what was found before stays
    try:
        with started(folder) as server:
            found.append(check_server(server))
            if server.token is None or found[0].status == PROBLEM:
                return found
            name = WIDGETS
            found.append(check_widgets(server))
            name = KERNEL
            found.append(check_kernel(server, expected_version))
    except (OSError, RuntimeError, ValueError) as error:
        found.append(Check(name, PROBLEM, f"{error}: {BY_HAND}"))
    return found


@contextmanager
def started(folder: Path) -> Iterator[Server]:
    """Yield a JupyterLab on the port that it finds free. Raises RuntimeError if it stops or does not answer in time."""
    command, changes = lab_command(folder, browser=False)
    log = folder / "server.log"
    # a file: a full pipe that nobody reads would stop the server
    with log.open("w") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}  # it reads nothing typed
        process = subprocess.Popen(command, **streams, cwd=folder, env=os.environ | changes)
    try:
        yield _wait(process, log)
    finally:
        process.terminate()  # it asks its kernels to end, which a kill would leave behind
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.kill()  # one that hangs; of an ended process, nothing
        process.wait()


def _wait(process: subprocess.Popen, log: Path) -> Server:
    """Read the address from the log: JupyterLab takes the next port where 8888 is in use."""
    begin = time.monotonic()
    while True:
        said = log.read_text(errors="replace")
        if address := _ADDRESS.search(said):
            token = _TOKEN.search(said)
            server = Server(address[1], token[1] if token else None)
            if _listens(server):  # the address is printed a moment earlier
                return server
        last = (said.strip().splitlines() or ["nothing"])[-1][-200:]
        if process.poll() is not None:
            raise RuntimeError(f"it stopped with exit code {process.returncode} and said {last!r}")
        if time.monotonic() - begin > START_SECONDS:
            raise RuntimeError(f"it did not answer within {START_SECONDS} s and said {last!r}")
        time.sleep(0.1)


# --------------------------------------------------------------------------------------------------------- the checks


def check_server(server: Server) -> Check:
    """Check that the server wants a token: without one, everybody on the machine could run code as its user."""
    port = f"answers on port {urlsplit(server.address).port}"
    if _status(server, with_token=False) == 200:
        fix = "remove the settings that empty the token from your Jupyter configuration"
        return Check(SERVER, PROBLEM, f"{port} without a token, so others on this machine can use it: {fix}")
    if server.token is None:  # a shared server of a school, often
        asked = "widgets and kernel were not checked: open a notebook by hand, and run one cell"
        return Check(SERVER, WARNING, f"{port}, with a password or token of your own; {asked}")
    if (status := _status(server, with_token=True)) != 200:
        return Check(SERVER, PROBLEM, f"{port}, and refuses its own token with status {status}: {BY_HAND}")
    return Check(SERVER, OK, f"{port}, and wants its token")


def check_widgets(server: Server) -> Check:
    """Check that the page which JupyterLab sends loads the extensions that draw widgets."""
    with _answer(_request(server, "lab")) as answer:
        page = answer.read().decode()
    if not (settings := _CONFIG.search(page)):
        return Check(WIDGETS, PROBLEM, "JupyterLab's page has no settings to read: report it")
    config = json.loads(settings[1])  # what the page will load: truer than the files on the disk
    loaded = {extension["name"] for extension in config.get("federated_extensions", ())}
    # by the user, or by the image of the room; some name a plugin, as in "anywidget:plugin"
    off = {entry.split(":")[0] for entry in config.get("disabledExtensions", ())}
    if missing := [name for name in EXTENSIONS if name not in loaded or name in off]:
        fix = "run `python -m pip install --force-reinstall jupyterlab_widgets anywidget`, or enable them"
        return Check(WIDGETS, PROBLEM, f"JupyterLab does not load {' and '.join(missing)}: {fix}")
    return Check(WIDGETS, OK, f"JupyterLab loads {' and '.join(EXTENSIONS)}")


def check_kernel(server: Server, expected_version: str) -> Check:
    """Check that a kernel starts, imports this version of the library, and shows an explorer of the course."""
    from tornado.httpclient import HTTPClientError  # its own, and no OSError

    # the usual reason: a kernel called python3 that another environment left in the home folder
    same = "run `python -m ipykernel install --sys-prefix` in the environment of the course"
    try:
        printed, kinds = asyncio.run(_ask(server, QUESTION))
        answer = json.loads(printed)
    except (OSError, RuntimeError, TimeoutError, ValueError, HTTPClientError) as error:
        reason = str(error) or f"no answer within {KERNEL_SECONDS} s"
        return Check(KERNEL, PROBLEM, f"a notebook cannot run: {reason}; {same}")
    if answer["version"] != expected_version:
        found = f"the kernel's Python, {answer['python']}, has version {answer['version']} of this library"
        return Check(KERNEL, PROBLEM, f"{found}, not {expected_version}: {same}")
    if VIEW not in kinds:
        fix = "run `python -m pip install --force-reinstall ipywidgets anywidget`"
        return Check(KERNEL, PROBLEM, f"the kernel answers, and its explorers have no live view: {fix}")
    return Check(KERNEL, OK, f"answers, and shows an explorer; it is {answer['python']}")


# -------------------------------------------------------------------------------------------------------- the requests


def _request(server: Server, path: str, method: str = "GET", body: bytes | None = None) -> urllib.request.Request:
    headers = {"Authorization": f"token {server.token}"} if server.token else {}
    return urllib.request.Request(server.address + path, body, headers, method=method)


@contextmanager
def _answer(request: urllib.request.Request) -> Iterator[HTTPResponse]:
    """Yield what the server answers. Raises HTTPError, which is closed: it holds a connection."""
    try:
        with _OPEN(request, timeout=START_SECONDS) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _listens(server: Server) -> bool:
    try:
        return _status(server, with_token=False) > 0
    except OSError:  # URLError is one; a server that has begun to listen can hang up, or keep silent
        return False


def _status(server: Server, with_token: bool) -> int:
    """Return the status of a request that reads the list of files, which is not for everybody."""
    asked = server if with_token else server._replace(token=None)
    try:
        with _answer(_request(asked, "api/contents")) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


async def _ask(server: Server, code: str) -> tuple[str, set[str]]:
    """Run code in a new kernel; return what it prints, and the types of what it shows.

    Raises RuntimeError with the kernel's error, and TimeoutError.
    """
    body = json.dumps({"name": "python3"}).encode()
    with _answer(_request(server, "api/kernels", "POST", body)) as answer:
        kernel = json.loads(answer.read())["id"]
    return await _run(server, kernel, code)


async def _run(server: Server, kernel: str, code: str) -> tuple[str, set[str]]:
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import websocket_connect

    # as a page does it: JSON in text frames, all channels of the kernel on one connection
    channels = f"{server.address.replace('http', 'ws', 1)}api/kernels/{kernel}/channels"
    messages, closed = asyncio.Queue(), asyncio.Event()

    def receive(message: str | bytes | None) -> None:
        messages.put_nowait(message)
        if message is None:
            closed.set()

    # the server lets nobody in before the kernel has started; tornado's own limits are 20 s
    limits = {"connect_timeout": START_SECONDS, "request_timeout": START_SECONDS}
    request = HTTPRequest(channels, headers={"Authorization": f"token {server.token}"}, **limits)
    connection = await websocket_connect(request, on_message_callback=receive)
    number = secrets.token_hex(8)
    header = {"msg_id": number, "msg_type": "execute_request", "session": number, "username": "", "version": "5.3"}
    content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False, "stop_on_error": True}
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    try:
        await connection.write_message(json.dumps(message))
        return await asyncio.wait_for(_until_idle(messages, number), KERNEL_SECONDS)
    finally:
        connection.close()  # the kernel itself ends with the server
        await closed.wait()  # for the server's goodbye, or 5 s: the end of the loop would leave the socket open


async def _until_idle(messages: asyncio.Queue, number: str) -> tuple[str, set[str]]:
    """Collect what answers the message of this number, until the kernel is idle again."""
    printed, kinds = "", set()
    while True:
        text = await messages.get()
        if text is None:
            raise RuntimeError("the connection to the kernel closed")
        answer = json.loads(text) if isinstance(text, str) else {}  # bytes are a widget's buffers
        if answer.get("parent_header", {}).get("msg_id") != number:
            continue
        kind, content = answer["msg_type"], answer["content"]
        if kind == "stream" and content["name"] == "stdout":
            printed += content["text"]
        elif kind == "error":
            raise RuntimeError(f"{content['ename']}: {content['evalue'][:200]}")
        elif kind in ("display_data", "execute_result"):
            kinds |= content["data"].keys()
        elif kind == "status" and content["execution_state"] == "idle":
            return printed, kinds  # the reply comes on another channel, and can overtake what was printed
