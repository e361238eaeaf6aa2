"""A signal that ends a run waits for the end of a step, so that what is saved is a state between two steps.

SIGINT is Ctrl-C, SIGTERM what a launcher sends, SIGHUP what a terminal sends that is closed. The first only sets a
mark; a second one stops at once. A SIGHUP that is ignored stays so: that is what nohup is for.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # Windows has none
ENDING = [signal.SIGINT, signal.SIGTERM, *HANGUP]


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
    with _handled(interrupt.ask, [number for number in ENDING if number not in HANGUP or not _is_ignored(number)]):
        yield


@contextmanager
def ending_like_ctrl_c() -> Iterator[None]:
    """Inside the `with` block SIGTERM and SIGHUP raise KeyboardInterrupt, so that what is open is closed and removed.

    One that somebody else handles, or ignores, is left to them.
    """
    with _handled(_stop, [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]):
        yield


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


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _stop(*_: object) -> None:
    raise KeyboardInterrupt
