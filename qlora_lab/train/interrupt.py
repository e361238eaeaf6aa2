"""Make a signal that ends a run wait for the end of the step, so that the saved state lies between two steps.

SIGINT is Ctrl-C; launchers send SIGTERM; a terminal sends SIGHUP when it closes. The first signal only sets a mark; a
second one stops at once. An ignored SIGHUP stays ignored: that is what nohup is for.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # Windows has no SIGHUP
ENDING = [signal.SIGINT, signal.SIGTERM, *HANGUP]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: they end a command even where Ctrl-C ends only a part of it."""


class Interrupt:
    """asked: whether the user wants the run to stop."""

    def __init__(self):
        self.asked = False
        self._signals = 0  # received so far

    def ask(self, *_: object) -> None:
        self._signals += 1
        if self._signals > 1:  # the user does not want to wait for the step
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def waiting(interrupt: Interrupt) -> Iterator[None]:
    """Inside the `with` block a signal marks `interrupt`. Python delivers signals to the main thread alone."""
    ignored = [number for number in HANGUP if signal.getsignal(number) is signal.SIG_IGN]
    with _handled(interrupt.ask, [number for number in ENDING if number not in ignored]):
        yield


@contextmanager
def ending_like_ctrl_c() -> Iterator[None]:
    """Inside the `with` block SIGTERM and SIGHUP raise Terminated, so that open files are closed and removed.

    A signal that has a handler already, or is ignored, stays as it is.
    """
    with _handled(_end, [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]):
        yield


def _end(number: int, *_: object) -> None:
    # a subclass, so that whoever catches KeyboardInterrupt still catches both
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


@contextmanager
def _handled(handler, numbers: list[signal.Signals]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier or signal.SIG_DFL)  # None: it was not set by Python
