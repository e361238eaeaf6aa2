"""Pages: one flat space of bytes in pieces of one size, a few in fast memory, the others elsewhere.

In: a number of bytes, a page size, a budget. Out: the page that is asked for, as bytes to change in place.
Source: QLoRA section 3, "Paged Optimizers". The words are those of operating systems: asking for a page that is not in
a frame is a fault; if no frame is free, the least recently used page is evicted and written back. A page that is known
to be needed next is prefetched: it comes while the one before it is in use, and causes no fault.

The page table and the choice of who is evicted (`_begin`) are the same everywhere; stores differ in where pages lie.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from qlora_lab.optim.stores import FileStore, HostStore, ManagedStore, Wait

PAGE_SIZE = 2**21  # bytes: the most that CUDA moves of managed memory at once
ALLOWED = "choose 'file' on the CPU, 'host' on any device, 'managed' on a CUDA GPU"
EVENTS = 2**16  # remembered: a long run has millions


class Event(NamedTuple):
    """What happened to a page: "fault" or "prefetch" (it got a frame), "evict" (it lost its frame), "write back"."""

    kind: str
    page: int
    frame: int


@dataclass
class _Move:
    """A page on its way into a frame, and the page that leaves the frame for it."""

    kind: str
    page: int
    frame: int
    leaves: int | None  # None: the frame was free
    written: bool = False  # the page that leaves is in the store, so its frame may be overwritten


class Pages:
    """`nbytes` bytes, zero at first.

    page_size: bytes of a page. budget: bytes for frames; None: a frame for each page. device: where frames are. store:
    where the other pages lie (stores.py): "file" on the CPU, "host" for a GPU, "managed" for CUDA's own paging. folder:
    for the file, on a disk and not in memory; None: the system's temporary folder. events: the last ones, oldest
    first; clear them as you like. Raises ValueError for a size below 1, a budget below one page, or a store that the
    device cannot have; also what the store raises.
    """

    def __init__(
        self,
        nbytes: int,
        page_size: int = PAGE_SIZE,
        budget: int | None = None,
        folder: str | Path | None = None,
        device: torch.device | str = "cpu",
        store: str | None = None,
    ):
        if nbytes < 1 or page_size < 1:
            raise ValueError(f"nbytes={nbytes} and page_size={page_size} are not allowed: give at least 1 for each")
        if budget is not None and budget < page_size:
            raise ValueError(f"budget={budget} is not enough: give at least one page, {page_size} bytes")
        self.page_size = page_size
        self.count = -(-nbytes // page_size)  # rounded up
        frames = self.count if budget is None else min(self.count, budget // page_size)
        device = torch.device(device)
        store = store or ("file" if device.type == "cpu" else "host")
        if store not in ("file", "host", "managed") or (store == "file" and device.type != "cpu"):
            raise ValueError(f"store={store!r} is not allowed on {device}: {ALLOWED}")
        if store == "file":
            self._store = FileStore(self.count, page_size, frames, folder)
        else:
            kind = HostStore if store == "host" else ManagedStore
            self._store = kind(self.count, page_size, frames, device)
        self.frames = self._store.frames
        self.events: deque[Event] = deque(maxlen=EVENTS)
        self._free = list(range(len(self.frames) - 1, -1, -1))  # frames, taken from the end: 0 first
        self._frame_of: OrderedDict[int, int] = OrderedDict()  # page -> frame, least recently used first
        self._written: set[int] = set()  # pages that the store holds; any other is still zero
        self._in_use: int | None = None  # the page that was handed out last
        self._coming: tuple[_Move, Wait] | None = None  # the page on its way, and how to wait for it

    @property
    def resident(self) -> list[int]:
        """Pages in frames, the least recently used first."""
        return list(self._frame_of)

    def page(self, number: int) -> torch.Tensor:
        """Return the bytes of a page, (page_size,) uint8, to read and to change until the next call.

        Raises IndexError for a page that does not exist, and OSError for a disk that failed, now or in a prefetch: no
        page is lost then, and the call may be repeated.
        """
        self._check(number)
        if not self._is_settled(number):
            self._settle()  # a prefetch under way may bring this page, or may be evicting it
        if number not in self._frame_of:
            self._begin("fault", number)
            self._settle()
        self._frame_of.move_to_end(number)  # now the most recently used
        self._in_use = number
        return self._store.bytes(number, self._frame_of[number])

    def prefetch(self, number: int) -> None:
        """Start to bring a page that will be needed next, into the frame of any page but the one handed out last.

        Does nothing if the page is in a frame or on its way, or if there is only one frame. Raises as page() does.
        """
        self._check(number)
        on_its_way = self._coming is not None and self._coming[0].page == number
        if len(self.frames) == 1 or on_its_way or self._is_settled(number):
            return
        self._settle()
        if number not in self._frame_of:
            self._begin("prefetch", number)

    def _check(self, number: int) -> None:
        if not 0 <= number < self.count:
            raise IndexError(f"page {number} does not exist: choose from 0 to {self.count - 1}")

    def _is_settled(self, number: int) -> bool:
        """Tell whether a page is in a frame that no prefetch is taking from it."""
        return number in self._frame_of and (self._coming is None or self._coming[0].leaves != number)

    def _begin(self, kind: str, number: int) -> None:
        if self._free:
            move = _Move(kind, number, self._free.pop(), None)
        else:
            # No frame is free: the least recently used page is evicted, the first of the table. A prefetch spares the
            # page that was handed out last, as its bytes may still change. The table is updated in _settle.
            spared = self._in_use if kind == "prefetch" else None
            leaves = next(page for page in self._frame_of if page != spared)
            move = _Move(kind, number, self._frame_of[leaves], leaves)
        self._coming = move, self._store.start(lambda: self._carry_out(move))

    def _carry_out(self, move: _Move) -> None:
        """Write one page back and read the other. Runs in another thread: it changes the store and `move` alone."""
        if move.leaves is not None:
            self._store.write(move.leaves, move.frame)
            move.written = True  # from here on the evicted page is safe, even if the other one fails to come
        (self._store.read if move.page in self._written else self._store.clear)(move.page, move.frame)

    def _settle(self) -> None:
        """Wait for the page on its way, if there is one, then enter in the table what its move has done."""
        if self._coming is None:
            return
        move, wait = self._coming
        error = wait()  # interrupted here, the move stays on its way
        self._coming = None
        if move.written:
            self._written.add(move.leaves)
            del self._frame_of[move.leaves]
            self.events += [Event("write back", move.leaves, move.frame), Event("evict", move.leaves, move.frame)]
        if error is None:
            self._frame_of[move.page] = move.frame
            self.events.append(Event(move.kind, move.page, move.frame))
            return
        if move.written or move.leaves is None:  # else the page that was to leave keeps its frame
            self._free.append(move.frame)
        raise error
