"""Where pages lie: a few in frames, all that have been written elsewhere, and how one moves between the two.

In: the number of a page and of a frame. Changed: the bytes of a frame, or what is kept of a page.
Source: QLoRA section 3, "Paged Optimizers".

A store writes a page away, reads it back, and starts to do so beside the arithmetic that goes on. FileStore holds
nothing but frames in memory: pages are read from a file and written to it, not mapped, which would add a fault of the
system's own for each 4 KiB. The file has no name: it is gone with the process, however that ends.

Not here: which page moves when (paging.py).
"""

import errno
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

Wait = Callable[[], BaseException | None]  # returns when a move is over, with what stopped it


class FileStore:
    """Frames in the CPU's memory, pages in a file. One thread reads and writes, which leaves Python to others."""

    def __init__(self, count: int, page_size: int, frames: int, folder: str | Path | None):
        self.frames = torch.zeros(frames, page_size, dtype=torch.uint8)
        self.file = None
        if frames < count:
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - as long as self
            weakref.finalize(self, self.file.close)
            self._thread = ThreadPoolExecutor(1)  # starts with its first move

    def bytes(self, page: int, frame: int) -> torch.Tensor:
        return self.frames[frame]

    def clear(self, page: int, frame: int) -> None:
        self.frames[frame].zero_()

    def write(self, page: int, frame: int) -> None:
        size = self.frames.shape[1]
        self.file.seek(page * size)
        if self.file.write(self.frames[frame].numpy().data) != size:  # the page stays where it is
            raise OSError(errno.ENOSPC, f"no space to write back page {page} of {size} bytes")

    def read(self, page: int, frame: int) -> None:
        size = self.frames.shape[1]
        self.file.seek(page * size)
        if self.file.readinto(self.frames[frame].numpy().data) != size:
            raise OSError(errno.EIO, f"page {page} cannot be read back whole")

    def start(self, move: Callable[[], None]) -> Wait:
        return self._thread.submit(move).exception if self.file else _at_once(move)


def _at_once(move: Callable[[], None]) -> Wait:
    stopped = None
    try:
        move()
    except BaseException as error:  # an interruption too: the page table has to know how far it came
        stopped = error
    return lambda: stopped
