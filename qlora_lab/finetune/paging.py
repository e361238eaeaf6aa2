"""Pages: one flat space of bytes in pieces of one size, of which a few are in memory and all others in a file.

In: a number of bytes, a page size, a budget. Out: the page that is asked for, as bytes that may be changed in place.
Source: QLoRA section 3, "Paged Optimizers"; the words are those of operating systems: a page that is asked for and is
not in a frame is a fault; if no frame is free, the page that was used least recently is evicted, and written back.

The frames are all the memory that is held: pages are read from the file and written to it, not mapped, which would add
a fault of the system's own for each 4 KiB. The file has no name: it is gone with the process, however that ends.

But: no thread reads ahead yet, and GPUs have no frames here.
Not here: what is in the bytes (paged_adamw.py).
"""

import errno
import tempfile
import weakref
from collections import OrderedDict, deque
from pathlib import Path
from typing import NamedTuple

import torch

PAGE_SIZE = 2**21  # bytes; as CUDA's managed memory moves at most
EVENTS = 2**16  # that are remembered: a long run has millions


class Event(NamedTuple):
    """What happened to a page: "fault" (it came into a frame), "evict" (it lost it), "write back" (to the file)."""

    kind: str
    page: int
    frame: int


class Pages:
    """`nbytes` bytes, zero at first.

    page_size: bytes of a page. budget: bytes for frames, None for all pages. folder: where the file lies, on a disk and
    not in memory; None for the system's temporary one. events: what happened last, oldest first; clear it as you like.
    Raises ValueError for a size that is not at least 1, or a budget below one page, and OSError for a full disk.
    """

    def __init__(
        self, nbytes: int, page_size: int = PAGE_SIZE, budget: int | None = None, folder: str | Path | None = None
    ):
        if nbytes < 1 or page_size < 1:
            raise ValueError(f"nbytes={nbytes} and page_size={page_size} are not allowed: each is at least 1")
        if budget is not None and budget < page_size:
            raise ValueError(f"budget={budget} is not enough: it holds one page of {page_size} bytes at least")
        self.page_size, self.count = page_size, -(-nbytes // page_size)
        frames = self.count if budget is None else min(self.count, budget // page_size)
        self.frames = torch.zeros(frames, page_size, dtype=torch.uint8)
        self.events: deque[Event] = deque(maxlen=EVENTS)
        self._free = list(range(frames - 1, -1, -1))
        self._frame_of: OrderedDict[int, int] = OrderedDict()  # page -> frame, least recently used first
        self._written: set[int] = set()  # pages that the file holds; all others are zero
        self._file = None
        if frames < self.count:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - as long as self
            weakref.finalize(self, self._file.close)

    @property
    def resident(self) -> list[int]:
        """Pages in frames, the least recently used first."""
        return list(self._frame_of)

    def page(self, number: int) -> torch.Tensor:
        """The bytes of a page, (page_size,) uint8, to read and to change until the next call.

        Raises IndexError for a page that is not there.
        """
        if not 0 <= number < self.count:
            raise IndexError(f"page {number} is asked for, there are {self.count}")
        if number not in self._frame_of:
            frame = self._free.pop() if self._free else self._evict()
            self._read(number, frame)
            self._frame_of[number] = frame
            self.events.append(Event("fault", number, frame))
        self._frame_of.move_to_end(number)
        return self.frames[self._frame_of[number]]

    def _evict(self) -> int:
        number, frame = next(iter(self._frame_of.items()))
        self._file.seek(number * self.page_size)
        if self._file.write(self.frames[frame].numpy().data) != self.page_size:  # the page stays where it is
            raise OSError(errno.ENOSPC, f"no space to write back page {number} of {self.page_size} bytes")
        self._written.add(number)
        del self._frame_of[number]
        self.events += [Event("write back", number, frame), Event("evict", number, frame)]
        return frame

    def _read(self, number: int, frame: int) -> None:
        if number not in self._written:
            self.frames[frame].zero_()
            return
        self._file.seek(number * self.page_size)
        if self._file.readinto(self.frames[frame].numpy().data) != self.page_size:
            raise OSError(errno.EIO, f"page {number} cannot be read back whole")
