"""What `qlora-lab open` starts sends each message to the page at once, whatever class connects it to a kernel."""

import asyncio
from types import SimpleNamespace

import pytest
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler

import qlora_lab as ql
from qlora_lab.doctor import lab, websocket


class Configured:
    """A connection of the server's own, or of a gateway."""

    def __init__(self, handler):
        self.websocket_handler = handler

    async def connect(self):
        self.websocket_handler.done.append("connected")
        return "the kernel"


def test_nothing_waits_from_the_first_message_on():
    app = SimpleNamespace(web_app=SimpleNamespace(settings={websocket.CONNECTION_CLASS: Configured}))
    websocket._load_jupyter_server_extension(app)
    done = []
    handler = SimpleNamespace(ws_connection=1, done=done, set_nodelay=lambda value: done.append(("no delay", value)))
    connection = app.web_app.settings[websocket.CONNECTION_CLASS](handler)
    assert isinstance(connection, Configured)
    assert asyncio.run(connection.connect()) == "the kernel"
    assert done == [("no delay", True), "connected"]
    server = SimpleNamespace(settings=app.web_app.settings)
    assert KernelWebsocketHandler.kernel_websocket_connection_class.fget(server) is type(connection)
    handler.ws_connection = None  # the page has left
    done.clear()
    assert asyncio.run(connection.connect()) == "the kernel" and done == ["connected"]


@pytest.mark.slow
def test_the_server_of_open_has_it(tmp_path):
    """It is loaded, and a kernel still answers."""
    (extension,) = websocket._jupyter_server_extension_points()
    with lab.started(tmp_path) as server:
        assert lab.check_kernel(server, ql.__version__).status == lab.OK
        log = (tmp_path / "server.log").read_text()
    assert f"{extension['module']} | extension was successfully loaded" in log
