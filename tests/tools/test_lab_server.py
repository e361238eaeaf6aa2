"""Servers of the browser tests: they start or say why not, and none outlives its test."""

import sys
import time

import pytest

from tools import lab_server

TOKEN = "0123456789abcdef"


def python(code):
    return [sys.executable, "-c", code]


def test_a_token_is_read_once_its_line_is_whole(tmp_path):
    """The log is read while it is written."""
    code = f"import time; print('?token={TOKEN}', end='', flush=True); time.sleep(0.5); print('ef')"
    with lab_server.started(python(code), tmp_path) as server:
        assert lab_server.printed_token(server, tmp_path) == f"{TOKEN}ef"


def test_a_server_that_stops_or_prints_no_token_is_an_error(tmp_path, monkeypatch):
    with lab_server.started(python("print('no port')"), tmp_path) as server:
        server.wait()
        with pytest.raises(AssertionError, match="JupyterLab stopped with exit code 0:\nno port"):
            lab_server.printed_token(server, tmp_path)
    monkeypatch.setattr(lab_server, "START", 0)
    late = pytest.raises(AssertionError, match="JupyterLab did not answer within 0 s")
    with lab_server.started(python("import time; time.sleep(60)"), tmp_path) as server, late:
        lab_server.printed_token(server, tmp_path)


def test_a_server_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(lab_server, "GRACE", 0.1)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    with lab_server.started(python(code), tmp_path) as server:
        while not (tmp_path / "server.log").read_text():
            time.sleep(0.01)
    assert server.returncode == -9
