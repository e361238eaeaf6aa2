"""A Jupyter server extension: a picture does not wait for the page to acknowledge what came before it.

Tornado leaves Nagle's algorithm on: the last segment of a message waits until everything before it is acknowledged, and
a receiver with nothing to send may take 40 ms for that (Linux). A slider's picture follows two short messages, "busy"
and the echo of its value. On one machine a picture below 64 kB is a single segment, and came 23 to 36 ms late (LOG.md).

jupyter/jupyter_server_config.d in the command line's room switches it on, for what `qlora-lab open` starts.
"""

CONNECTION_CLASS = "kernel_websocket_connection_class"  # the server's setting


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(app) -> None:
    """Have the server's connections to kernels, of whatever class, send each message at once."""
    configured = app.web_app.settings[CONNECTION_CLASS]

    class AtOnce(configured):
        def connect(self):
            if self.websocket_handler.ws_connection:  # a gateway also reconnects for a page that has left
                self.websocket_handler.set_nodelay(True)
            return super().connect()

    app.web_app.settings[CONNECTION_CLASS] = AtOnce
