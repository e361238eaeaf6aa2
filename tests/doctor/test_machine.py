"""Each check of a room's machine is forced to fail, and says in one line what is wrong and what to do."""

import asyncio
import builtins
import gc
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.request
import webbrowser
from collections import namedtuple
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants
from tornado import httpclient, httpserver, netutil, web, websocket

import qlora_lab as ql
from qlora_lab.doctor import free_memory as counting, lab, machine
from qlora_lab.doctor.machine import OK, PROBLEM, WARNING, Check, MachineReport
from qlora_lab.files import requirements
from qlora_lab.kernels import Choice
from qlora_lab.model import fetch

GIB = 2**30


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No model on this machine, and none in the cache of Hugging Face."""
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_in_hub_cache", lambda hub_id: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def not_installed(*_):
    raise PackageNotFoundError("qlora-lab")


# ------------------------------------------------------------------------------------------------- what is installed


def test_what_is_installed_is_fine_here():
    assert machine.python().status == machine.packages().status == OK
    assert f"all {len(requirements.required())} that are required, with torch " in machine.packages().message


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(machine.platform, "python_version", lambda: "3.9.18")
    assert machine.python() == Check(
        "Python", PROBLEM, "3.9.18 is not >=3.11: make the environment with a newer Python"
    )


def test_packages_that_are_old_or_missing(monkeypatch):
    there = {"ipywidgets": "7.7.1", "anywidget": None}
    installed = requirements._installed
    monkeypatch.setattr(requirements, "_installed", lambda name: there.get(name, installed(name)))
    found = machine.packages()
    assert found.status == PROBLEM
    lacking = "anywidget is missing (needed: anywidget>=0.9.13), ipywidgets 7.7.1 (needed: ipywidgets>=8.1.5)"
    # double quotes: cmd.exe knows no others, and would take > for a file to write
    command = f'"{sys.executable}" -m pip install "anywidget>=0.9.13" "ipywidgets>=8.1.5"'
    assert found.message == f"{lacking}: {command}"


@pytest.mark.parametrize("check", [machine.python, machine.packages])
def test_a_library_that_was_never_installed(check, monkeypatch):
    monkeypatch.setattr(requirements, "metadata", not_installed)
    found = check()
    assert found.status == PROBLEM and "is not installed" in found.message and "install the wheel" in found.message


def test_a_requirement_of_another_system_is_none(monkeypatch):
    lines = ["a>=1", "b>=2; sys_platform == 'nowhere'", "c>=3; extra == 'test'"]
    monkeypatch.setattr(requirements, "metadata", lambda name: namedtuple("M", "get_all")(lambda key: lines))
    assert requirements.required() == [("a", "a>=1")]
    assert requirements.unmet() == [("a", "a>=1", None)]


# ------------------------------------------------------------------------------------------------------ what is free


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (Path.home, "your home folder, {}, cannot be written (no): set HOME"),
        (fetch.cache_dir, "the model's cache, {}, cannot be written (no): set QLORA_LAB_CACHE"),
        (lambda: constants.HF_HUB_CACHE, "the hub's cache, {}, cannot be written (no): set HF_HUB_CACHE"),
        (tempfile.gettempdir, "temporary files, {}, cannot be written (no): set TMPDIR"),
        (Path.cwd, "this folder, {}, cannot be written (no): change to another folder"),
    ],
)
def test_a_folder_that_cannot_be_written(place, says, empty_cache, tmp_path, monkeypatch):
    for name in ("home", "cache", "hub", "temporary", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "work")
    assert machine.folders().status == OK
    refused = place()
    monkeypatch.setattr(machine, "_unwritable", lambda folder: "no" if folder == Path(refused) else "")
    assert machine.folders() == Check("folders", PROBLEM, says.format(refused))


def test_a_cache_that_holds_the_model_need_not_be_written(empty_cache, monkeypatch):
    """A school shares one copy, which students can only read."""
    caches = [machine._nearest(Path(place)) for place in (empty_cache, constants.HF_HUB_CACHE)]
    monkeypatch.setattr(machine, "_unwritable", lambda folder: "no" if folder in caches else "")
    assert machine.folders().status == PROBLEM
    monkeypatch.setattr(machine, "model", lambda: Check("model", OK, ""))
    assert machine.folders().status == OK


def test_why_a_folder_cannot_be_written(tmp_path):
    assert machine._unwritable(tmp_path) == ""
    assert machine._unwritable(tmp_path / "missing") == "No such file or directory"
    assert machine._nearest(tmp_path / "a" / "b") == tmp_path


@pytest.mark.parametrize(
    ("free", "model_is_here", "apart", "lacks"),
    [
        (0.5, False, False, "0.8"),  # one disk: the model comes to one of its two caches, and a run beside it
        (0.8, False, False, None),
        (0.5, True, False, None),
        (0.2, True, False, "0.2"),
        (0.4, False, True, "0.5"),  # temporary files have a disk of their own
        (0.5, False, True, None),
    ],
)
def test_a_disk_holds_what_goes_there(free, model_is_here, apart, lacks, empty_cache, monkeypatch):
    temporary = Path(tempfile.gettempdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: namedtuple("usage", "free")(free * GIB))
    monkeypatch.setattr(machine, "_device", lambda place: int(apart and place == temporary))
    if model_is_here:
        monkeypatch.setattr(machine, "model", lambda: Check("model", OK, ""))
    found = machine.disk()
    assert found.status == (PROBLEM if lacks else OK)
    assert not lacks or found.message.endswith(f"but {lacks} GiB are needed: free some space"), found
    if not model_is_here and lacks:
        assert str(empty_cache) in found.message


def test_folders_of_one_disk_are_on_one_device(tmp_path):
    assert machine._device(tmp_path / "a" / "b") == machine._device(tmp_path)


def test_too_little_memory_names_the_notebooks(monkeypatch):
    peaks = {"01_codebook": GIB // 2, "10_finetune_llama": 3 * GIB}
    monkeypatch.setattr(machine, "notebook_peaks", lambda: peaks)
    monkeypatch.setattr(counting, "free_memory", lambda device: 2 * GIB)
    assert machine.memory() == Check(
        "memory",
        PROBLEM,
        "2.0 GiB free, too little for 10_finetune_llama; 10_finetune_llama, the largest notebook, needs 4.0 GiB with "
        "JupyterLab and a browser: close other programs, or leave these notebooks out",
    )
    monkeypatch.setattr(counting, "free_memory", lambda device: 4 * GIB)
    assert machine.memory().status == OK
    monkeypatch.setattr(counting, "free_memory", lambda device: None)
    assert machine.memory().status == WARNING


def test_every_notebook_was_measured():
    notebooks = {path.stem for path in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb")}
    peaks = machine.notebook_peaks()
    assert set(peaks) == notebooks, "run: python bench/notebooks.py"
    assert all(GIB / 10 < peak < 8 * GIB for peak in peaks.values())  # 8 GB is what notebook 10 asks for


# --------------------------------------------------------------------------------------------------------- what runs


def test_a_model_that_is_not_here(empty_cache):
    found = machine.model()
    assert found.status == PROBLEM and "run `qlora-lab fetch smollm2-135m`" in found.message


def test_a_damaged_model(empty_cache):
    (empty_cache / machine.MODEL).mkdir(parents=True)
    found = machine.model()
    assert found.status == PROBLEM and "smollm2-135m has no config.json" in found.message
    assert found.message.endswith("; delete that folder, and run `qlora-lab fetch smollm2-135m`")


def test_a_processor_without_vector_instructions(monkeypatch):
    from qlora_lab import kernels
    from qlora_lab.kernels import vector

    assert "core" in machine.processor().message
    monkeypatch.setattr(vector, "host_features", lambda: set())
    vector.is_fast.cache_clear()
    monkeypatch.setattr(kernels, "choose", lambda device: Choice("cpu", "with plain loops"))
    found = machine.processor()
    vector.is_fast.cache_clear()
    assert found.status == WARNING
    assert "no vector instructions known: kernels are cpu, with plain loops" in found.message


@pytest.mark.long
def test_kernels_that_cannot_be_kept_or_are_wrong(monkeypatch):
    import torch

    from qlora_lab import kernels
    from qlora_lab.kernels import compiled
    from qlora_lab.quant import quantize

    assert machine.kernels().status == OK
    with pytest.warns(UserWarning, match="cannot be kept"):
        compiled._warn_uncached("no folder for them can be written")
    found = machine.kernels()
    compiled._warn_uncached.cache_clear()
    assert found.status == PROBLEM and found.message.endswith("set NUMBA_CACHE_DIR to a folder with space")
    wrong = namedtuple("Q", "codes")(torch.zeros(4096, dtype=torch.uint8))
    monkeypatch.setattr(quantize, "quantize", lambda *args, **kwargs: wrong)
    assert machine.kernels().status == PROBLEM and "gives other codes" in machine.kernels().message
    monkeypatch.setattr(kernels, "choose", lambda device: Choice("reference", "QLORA_LAB_KERNELS asks for it"))
    assert machine.kernels().status == WARNING


def test_a_broken_library_is_a_problem_and_no_traceback(monkeypatch):
    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("libtorch.so: cannot open\nshared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    (found,) = machine._tried("kernels", machine.kernels)
    said = "the check itself failed (ImportError: libtorch.so: cannot open shared object file)"
    assert found == Check("kernels", PROBLEM, f"{said}: install the environment again")


# ------------------------------------------------------------------------------------------------------- what is said


def test_a_network_and_a_browser_are_said_and_never_a_problem(monkeypatch):
    def unreachable(hub_id):
        raise TimeoutError("no answer\nwithin 5 s")

    monkeypatch.setattr(fetch, "ask_hub", unreachable)
    found = machine.network()
    said = "(TimeoutError: no answer within 5 s); no notebook needs it once the model is here"
    assert found.status == WARNING and said in found.message
    monkeypatch.setattr(fetch, "ask_hub", lambda hub_id: None)
    assert machine.network().status == OK

    def no_browser():
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "get", no_browser)
    assert machine.browser().status == WARNING and "--no-browser" in machine.browser().message
    monkeypatch.setattr(webbrowser, "get", lambda: namedtuple("B", "name")("firefox"))
    assert machine.browser() == Check("browser", OK, "firefox")


# --------------------------------------------------------------------------------------------------------- JupyterLab

SERVER = lab.Server("http://localhost:8889/", "0123456789abcdef")


@pytest.mark.parametrize(
    ("without", "token", "with_token", "status", "says"),
    [
        (403, SERVER.token, 200, OK, "answers on port 8889, and wants its token"),
        (200, SERVER.token, 200, PROBLEM, "without a token, so others on this machine can use it: remove"),
        (403, None, 200, WARNING, "a password or token of your own"),
        (403, SERVER.token, 502, PROBLEM, "refuses its own token with status 502: run `qlora-lab open"),
    ],
)
def test_a_server_wants_its_token(without, token, with_token, status, says, monkeypatch):
    monkeypatch.setattr(lab, "_status", lambda server, with_token: codes[with_token])
    codes = {False: without, True: with_token}
    found = lab.check_server(SERVER._replace(token=token))
    assert found.status == status and says in found.message


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"federated_extensions": [{"name": name} for name in lab.EXTENSIONS]}, None),
        ({"federated_extensions": [{"name": "anywidget"}]}, "@jupyter-widgets/jupyterlab-manager"),
        (
            {"federated_extensions": [{"name": name} for name in lab.EXTENSIONS], "disabledExtensions": ["anywidget"]},
            "anywidget",
        ),
        (
            {
                "federated_extensions": [{"name": name} for name in lab.EXTENSIONS],
                "disabledExtensions": ["anywidget:x"],
            },
            "anywidget",  # by the name of its plugin
        ),
    ],
)
def test_a_page_loads_the_extensions_of_widgets(config, missing, tmp_path):
    """The page comes from a file here; urllib opens both."""
    (tmp_path / "lab").write_text(f'<script id="jupyter-config-data" type="json">{json.dumps(config)}</script>')
    found = lab.check_widgets(lab.Server(f"file://{tmp_path}/", None))
    assert (found.status, missing or "") == (PROBLEM if missing else OK, missing or "")
    assert not missing or f"does not load {missing}: run" in found.message


def test_a_page_without_settings_is_a_problem_of_the_widgets_alone(tmp_path, monkeypatch):
    (tmp_path / "lab").write_text("<title>maintenance</title>")
    server = lab.Server(f"file://{tmp_path}/", SERVER.token)
    monkeypatch.setattr(lab, "started", lambda folder: nullcontext(server))
    monkeypatch.setattr(lab, "check_server", lambda server: Check(lab.SERVER, OK, "answers"))
    monkeypatch.setattr(lab, "check_kernel", lambda server, version: Check(lab.KERNEL, OK, "answers"))
    _, widgets, kernel = lab.check_lab(tmp_path, ql.__version__)
    assert widgets == Check(lab.WIDGETS, PROBLEM, "JupyterLab's page has no settings to read: report it")
    assert kernel.status == OK


def test_a_check_that_breaks_down_keeps_what_was_found(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "started", lambda folder: nullcontext(SERVER))
    monkeypatch.setattr(lab, "check_server", lambda server: Check(lab.SERVER, OK, "answers"))
    monkeypatch.setattr(lab, "_OPEN", lambda request, timeout: (_ for _ in ()).throw(ConnectionResetError("reset")))
    server, widgets = lab.check_lab(tmp_path, ql.__version__)
    assert server.status == OK and (widgets.name, widgets.status) == (lab.WIDGETS, PROBLEM)
    assert widgets.message.startswith("reset: run `qlora-lab open")


def told(printed, kinds=(lab.VIEW,)):
    async def ask(server, code):
        if isinstance(printed, Exception):
            raise printed
        return json.dumps({"python": "/usr/bin/python3", "version": ql.__version__} | printed), set(kinds)

    return ask


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (told(RuntimeError("ModuleNotFoundError: No module named 'qlora_lab'")), "No module named 'qlora_lab'; run"),
        (told(TimeoutError()), "no answer within 60 s; run"),
        (told({"version": "0.0.9"}), f"/usr/bin/python3, has version 0.0.9 of this library, not {ql.__version__}: run"),
        (told({}, ["text/html"]), "its explorers have no live view: run"),
    ],
)
def test_a_kernel_that_cannot_run_the_course(ask, says, monkeypatch):
    monkeypatch.setattr(lab, "_ask", ask)
    found = lab.check_kernel(SERVER, ql.__version__)
    assert found.status == PROBLEM and says in found.message
    monkeypatch.setattr(lab, "_ask", told({}))
    assert lab.check_kernel(SERVER, ql.__version__).status == OK


@contextmanager
def answering(reply: bytes):
    """A server of this process that sends these bytes, once, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        yield SERVER._replace(address=f"http://127.0.0.1:{listening.getsockname()[1]}/")
        thread.join()


def test_a_server_is_there_once_it_answers():
    assert not lab._listens(SERVER._replace(address="http://localhost:9/"))  # nobody does
    with answering(b"") as server:  # it accepts, and is not ready
        assert not lab._listens(server)


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # the one that urlopen keeps knows other proxies
    with answering(b"HTTP/1.1 204 No Content\r\n\r\n") as server:
        assert lab._status(server, with_token=False) == 204


def test_a_server_that_stops_or_does_not_answer(tmp_path, monkeypatch):
    def command(code):
        monkeypatch.setattr(lab, "lab_command", lambda place, browser: ([sys.executable, "-c", code], {}))

    command("print('no such option'); raise SystemExit(3)")
    (found,) = lab.check_lab(tmp_path, ql.__version__)
    assert found.status == PROBLEM and "stopped with exit code 3 and said 'no such option': run" in found.message
    command("import time; time.sleep(60)")
    monkeypatch.setattr(lab, "START_SECONDS", 0)
    (found,) = lab.check_lab(tmp_path, ql.__version__)
    assert found.status == PROBLEM and "did not answer within 0 s and said 'nothing'" in found.message


def test_a_server_reads_nothing_that_is_typed(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "lab_command", lambda place, browser: ([sys.executable, "-c", "print(input())"], {}))
    kept, (reading, writing) = os.dup(0), os.pipe()
    os.write(writing, b"typed\n")
    os.dup2(reading, 0)
    try:
        (found,) = lab.check_lab(tmp_path, ql.__version__)
    finally:
        os.dup2(kept, 0)
        for number in (kept, reading, writing):
            os.close(number)
    assert "EOFError" in found.message


class Channels(websocket.WebSocketHandler):
    """A kernel that answers one message, or does not."""

    def initialize(self, kind: str):
        self.kind = kind

    async def prepare(self):
        if self.kind == "refused":
            raise web.HTTPError(403)
        if self.kind == "starting":
            await asyncio.sleep(0.6)

    def on_message(self, text):
        if self.kind == "goodbye":
            self.close()
        if self.kind == "flood":
            with suppress(websocket.WebSocketClosedError):
                self.write_message("{}")
                self.ping()
                asyncio.get_running_loop().call_later(0.01, self.on_message, text)
        if self.kind in ("idle", "starting"):
            parent = json.loads(text)["header"]
            self.write_message({"parent_header": parent, "msg_type": "status", "content": {"execution_state": "idle"}})
            time.sleep(0.3)  # the whole server: it says goodbye late


class NewKernel(web.RequestHandler):
    def post(self):
        self.finish({"id": "k"})


@contextmanager
def channels(kind: str):
    """A server of one kernel, "k", in a thread of its own."""
    (listening,) = netutil.bind_sockets(0, "127.0.0.1")
    loop, ends = asyncio.new_event_loop(), asyncio.Event()

    async def serve():
        pages = [("/api/kernels", NewKernel), ("/api/kernels/k/channels", Channels, {"kind": kind})]
        server = httpserver.HTTPServer(web.Application(pages))
        server.add_socket(listening)
        await ends.wait()
        server.stop()
        await server.close_all_connections()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield SERVER._replace(address=f"http://127.0.0.1:{listening.getsockname()[1]}/")
    finally:
        loop.call_soon_threadsafe(ends.set)
        thread.join()
        loop.close()


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("idle", nullcontext()),
        ("silent", pytest.raises(TimeoutError)),
        ("flood", pytest.raises(TimeoutError)),
        ("goodbye", pytest.raises(RuntimeError, match="the connection to the kernel closed")),
        (
            "starting",
            pytest.raises((httpclient.HTTPClientError, OSError)),
        ),  # OSError: the request before, if it is slow
        ("refused", pytest.raises(httpclient.HTTPClientError, match="403")),
    ],
)
def test_no_connection_to_a_kernel_stays_open(kind, ends, monkeypatch):
    """However it ends: a socket left to the garbage collector is a warning at any later moment."""
    if kind in ("silent", "flood"):
        monkeypatch.setattr(lab, "KERNEL_SECONDS", 0.5)
    if kind == "starting":
        monkeypatch.setattr(lab, "START_SECONDS", 0.3)
    gc.disable()
    try:
        with channels(kind) as server:
            with ends:
                assert asyncio.run(lab._ask(server, "")) == ("", set())
            there = ("127.0.0.1", urlsplit(server.address).port)
            # isinstance would ask a dead proxy for its class
            assert there not in [peer(each) for each in gc.get_objects() if issubclass(type(each), socket.socket)]
    finally:
        gc.enable()


def peer(each: socket.socket):
    with suppress(OSError):  # closed, or not connected
        return each.getpeername()


def test_an_answer_with_an_error_is_closed(monkeypatch):
    kept, opening = [], lab._OPEN

    def keeping(*words, **options):
        try:
            return opening(*words, **options)
        except urllib.error.HTTPError as error:
            kept.append(error)
            raise

    monkeypatch.setattr(lab, "_OPEN", keeping)
    with answering(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\n\r\nnone") as server:
        assert lab._status(server, with_token=False) == 403
    assert kept[0].closed


@pytest.mark.slow
def test_a_real_server_answers_with_its_kernel_and_its_widgets(tmp_path):
    found = lab.check_lab(tmp_path, ql.__version__)
    assert [check.name for check in found] == [lab.SERVER, lab.WIDGETS, lab.KERNEL]
    assert {check.status for check in found} == {OK}, found


# --------------------------------------------------------------------------------------------------------- the report


def test_a_report_is_a_line_for_each_check():
    checks = Check("Python", OK, "3.11"), Check("browser", WARNING, "none"), Check("disk", PROBLEM, "full")
    report = MachineReport(checks)
    assert not report.ok and MachineReport(checks[:2]).ok
    assert str(report).splitlines() == ["ok        Python: 3.11", "warning   browser: none", "problem   disk: full"]


def test_a_report_replaces_a_report_and_nothing_else(tmp_path):
    report = MachineReport((Check("Python", OK, "3.11"),))
    path = machine.save_report(tmp_path / "room.json", report)
    assert json.loads(machine.save_report(path, report).read_text())["checks"][0]["name"] == "Python"
    own = tmp_path / "own.json"
    own.write_text('{"ok": true}')
    with pytest.raises(FileExistsError, match="is not a report, so it is kept: name another file"):
        machine.save_report(own, report)
    with pytest.raises(FileExistsError, match="is not a file, so it cannot become a report"):
        machine.save_report(tmp_path, report)
    with pytest.raises(FileNotFoundError, match="there is no folder .*no: create it"):
        machine.save_report(tmp_path / "no" / "room.json", report)
    assert own.read_text() == '{"ok": true}'
