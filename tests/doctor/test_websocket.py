"""What `qlora-lab open` starts sends each message to the page at once, whatever class connects it to a kernel."""

import asyncio
from types import SimpleNamespace

import pytest

import qlora_lab as ql
from qlora_lab.doctor import lab, websocket


class Given:
    """A connection of the server's own, or of a gateway."""

    def __init__(self, handler):
        self.websocket_handler = handler

    async def connect(self):
        self.websocket_handler.done.append("connected")
        return "the kernel"


def test_nothing_waits_from_the_first_message_on():
    app = SimpleNamespace(web_app=SimpleNamespace(settings={websocket.CLASS: Given}))
    websocket._load_jupyter_server_extension(app)
    done = []
    handler = SimpleNamespace(done=done, set_nodelay=lambda value: done.append(("no delay", value)))
    connection = app.web_app.settings[websocket.CLASS](handler)
    assert isinstance(connection, Given)
    assert asyncio.run(connection.connect()) == "the kernel"
    assert done == [("no delay", True), "connected"]


@pytest.mark.slow
def test_the_server_of_open_has_it(tmp_path):
    """Its class is the one that kernels are connected by: the setting is read when a page asks for a kernel."""
    (extension,) = websocket._jupyter_server_extension_points()
    with lab.started(tmp_path) as server:
        assert lab.check_kernel(server, ql.__version__).status == lab.OK
        log = (tmp_path / "server.log").read_text()
    assert f"{extension['module']} | extension was successfully loaded" in log
