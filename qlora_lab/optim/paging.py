"""Pages: one flat space of bytes in pieces of one size, of which a few are in fast memory and all others elsewhere.

In: a number of bytes, a page size, a budget. Out: the page that is asked for, as bytes that may be changed in place.
Source: QLoRA section 3, "Paged Optimizers"; the words are those of operating systems: a page that is asked for and is
not in a frame is a fault; if no frame is free, the page that was used least recently is evicted, and written back. A
page that is known to be needed next is prefetched: it comes while the one before it is used, and is no fault then.

The page table and who is evicted are the same everywhere; where frames and all other pages lie is a store's affair.

Not here: frames, files and devices (stores.py), what is in the bytes (paged_adamw.py).
"""

from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from qlora_lab.optim.stores import FileStore, HostStore, ManagedStore, Wait

PAGE_SIZE = 2**21  # bytes; as CUDA's managed memory moves at most
ALLOWED = "it is 'file' on the CPU, 'host' on any device, 'managed' on a CUDA GPU"
EVENTS = 2**16  # that are remembered: a long run has millions


class Event(NamedTuple):
    """What happened to a page: "fault" or "prefetch" (it came into a frame), "evict" (it lost it), "write back"."""

    kind: str
    page: int
    frame: int


@dataclass
class _Move:
    """A page on its way into a frame, and the one that leaves it for that."""

    kind: str
    page: int
    frame: int
    leaves: int | None
    written: bool = False  # the one that leaves is in the store: its frame may be used


class Pages:
    """`nbytes` bytes, zero at first.

    page_size: bytes of a page. budget: bytes for frames, None for all pages. device: where frames are. store: what
    holds the other pages (stores.py), "file", the CPU's; "host", a GPU's; "managed", CUDA's own. folder: where the file
    lies, on a disk and not in memory; None for the system's temporary one. events: what happened last, oldest first;
    clear it as you like. Raises ValueError for a size that is not at least 1, a budget below one page, or a store that
    is not the device's, and what the store raises.
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
            raise ValueError(f"nbytes={nbytes} and page_size={page_size} are not allowed: each is at least 1")
        if budget is not None and budget < page_size:
            raise ValueError(f"budget={budget} is not enough: it holds one page of {page_size} bytes at least")
        self.page_size, self.count = page_size, -(-nbytes // page_size)
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
        self._free = list(range(len(self.frames) - 1, -1, -1))
        self._frame_of: OrderedDict[int, int] = OrderedDict()  # page -> frame, least recently used first
        self._written: set[int] = set()  # pages that the store holds; all others are zero
        self._in_use: int | None = None  # the page that was handed out last
        self._coming: tuple[_Move, Wait] | None = None  # the page on its way, and how to wait for it

    @property
    def resident(self) -> list[int]:
        """Pages in frames, the least recently used first."""
        return list(self._frame_of)

    def page(self, number: int) -> torch.Tensor:
        """The bytes of a page, (page_size,) uint8, to read and to change until the next call.

        Raises IndexError for a page that is not there, and OSError for a disk that failed, now or in a prefetch: no
        page is lost by that, and the call may be repeated.
        """
        self._check(number)
        if not self._is_settled(number):
            self._settle()
        if number not in self._frame_of:
            self._begin("fault", number)
            self._settle()
        self._frame_of.move_to_end(number)
        self._in_use = number
        return self._store.bytes(number, self._frame_of[number])

    def prefetch(self, number: int) -> None:
        """Begin to bring a page that will be asked for, into the frame of any page but the one handed out last.

        Does nothing for a page that is in a frame or on its way, or where there is one frame. Raises as page() does.
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
            raise IndexError(f"page {number} is asked for, there are {self.count}")

    def _is_settled(self, number: int) -> bool:
        """Whether a page is in a frame, and no prefetch takes that from it."""
        return number in self._frame_of and (self._coming is None or self._coming[0].leaves != number)

    def _begin(self, kind: str, number: int) -> None:
        if self._free:
            move = _Move(kind, number, self._free.pop(), None)
        else:
            spared = self._in_use if kind == "prefetch" else None  # its bytes may be changed until the next page()
            leaves = next(page for page in self._frame_of if page != spared)
            move = _Move(kind, number, self._frame_of[leaves], leaves)
        self._coming = move, self._store.start(lambda: self._carry_out(move))

    def _carry_out(self, move: _Move) -> None:
        """Beside everything else: touches the store and `move`, and only reads which pages have been written."""
        if move.leaves is not None:
            self._store.write(move.leaves, move.frame)
            move.written = True
        (self._store.read if move.page in self._written else self._store.clear)(move.page, move.frame)

    def _settle(self) -> None:
        """Wait for the page that is on its way, if any, and bring the table up to what has happened of its move."""
        if self._coming is None:
            return
        move, wait = self._coming
        error = wait()  # an interruption leaves it on its way
        self._coming = None
        if move.written:
            self._written.add(move.leaves)
            del self._frame_of[move.leaves]
            self.events += [Event("write back", move.leaves, move.frame), Event("evict", move.leaves, move.frame)]
        if error is None:
            self._frame_of[move.page] = move.frame
            self.events.append(Event(move.kind, move.page, move.frame))
            return
        if move.written or move.leaves is None:
            self._free.append(move.frame)
        raise error
