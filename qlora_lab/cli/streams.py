"""Standard streams that may be closed, full, or of ASCII only: what goes wrong there ends no run.

    2>&1 | head    >&-    2>&-    > /dev/full    LC_ALL=C    a terminal that is gone

Progress and notes (stderr) are dropped where they cannot be written. What is printed to stdout is dropped as well, but
remembered: the caller knows whether it was a result that was asked for.
Not here: which output is a result, and exit codes (cli.py).
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class Patient:
    """A stream that never raises. error: the first that it met, None as long as all could be written."""

    def __init__(self, stream: TextIO | None):
        self.error, self._stream = None, stream or _Closed()

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable, *text: str) -> None:
        try:
            call(*text)
        except (OSError, ValueError) as error:  # ValueError: Python itself has closed it
            self.error = self.error or error

    def let_go(self) -> None:
        """Flush a last time; what cannot be written goes nowhere, where Python's own last flush would fail."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or error
            with suppress(OSError, ValueError):  # it has no number: not a stream of the system
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class _Closed(io.TextIOBase):
    """What Python leaves out where a stream was closed before it began."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


@contextmanager
def patient_streams() -> Iterator[Patient]:
    """Inside the `with` block stdout and stderr are Patient; yields that of stdout."""
    _fill_numbers()
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal lacks is spelled, as on stderr
    out, notes = Patient(before[0]), Patient(before[1])
    sys.stdout, sys.stderr = out, notes
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        out.let_go()
        notes.let_go()


def _fill_numbers() -> None:
    """Open what is closed of 0, 1 and 2: the next file would have that number, and get what a library prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
