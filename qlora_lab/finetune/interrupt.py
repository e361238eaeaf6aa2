"""Ctrl-C that waits for the end of a step, so that what is saved is a state between two steps.

The first SIGINT (or SIGTERM, which a launcher sends) only sets a mark; a second one stops at once, as without this.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupt:
    """asked: whether the user wants the run to stop."""

    def __init__(self):
        self.asked, self._signals = False, 0

    def ask(self, *_: object) -> None:
        self._signals += 1
        if self._signals > 1:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def waiting(interrupt: Interrupt) -> Iterator[None]:
    """Inside the `with` block a signal marks `interrupt`. In another thread than the main one no signal arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set by Python
