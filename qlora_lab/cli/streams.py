"""Standard streams that may be closed, full or ASCII only: their errors end no run.

    2>&1 | head    >&-    2>&-    > /dev/full    LC_ALL=C    a terminal that is gone

In: the streams of the process. Out: streams that never raise. Progress and notes (stderr) are dropped if they cannot be
written; so is output to stdout, but its error is kept, because the caller knows whether it was the requested result.
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class Patient:
    """A stream that never raises. error: its first error, or None while everything could be written."""

    def __init__(self, stream: TextIO | None):
        self.error: Exception | None = None
        self._stream = stream or _Closed()  # Python sets a stream that was closed at its start to None

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
        """Flush one last time; what cannot be written goes to /dev/null, or Python's own last flush would fail."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or error
            with suppress(OSError, ValueError):  # no file number: not a stream of the system
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())  # now the number leads there
                os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class _Closed(io.TextIOBase):
    """A stand-in for a stream that was closed before Python started."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


@contextmanager
def patient_streams() -> Iterator[Patient]:
    """Make stdout and stderr Patient inside the `with` block, and yield stdout."""
    _fill_numbers()  # before any file is opened
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")  # letters that the terminal lacks are spelled out
    out = Patient(before[0])
    notes = Patient(before[1])
    sys.stdout, sys.stderr = out, notes
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before  # pytest, for one, goes on with its own
        out.let_go()
        notes.let_go()


def _fill_numbers() -> None:
    """Open those of 0, 1 and 2 that are closed: the next file would get their number, and what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
