"""A Jupyter server extension: a picture does not wait for the page to acknowledge what came before it.

Tornado leaves Nagle's algorithm on: the end of a message waits while an earlier one is unacknowledged, and a page that
has nothing to say acknowledges after 40 ms. A slider's picture follows two short messages, "busy" and the echo of its
value. On one machine it is a single segment if it has less than 64 kB, and then came 30 ms late (bench/widgets.py).

jupyter/jupyter_server_config.d in the command line's room switches it on, for what `qlora-lab open` starts.
"""

CLASS = "kernel_websocket_connection_class"  # the server's setting


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(app) -> None:
    """Have the server's connections to kernels, of whatever class, send each message at once."""
    given = app.web_app.settings[CLASS]

    class AtOnce(given):
        def connect(self):
            self.websocket_handler.set_nodelay(True)
            return super().connect()

    app.web_app.settings[CLASS] = AtOnce
