"""Where pages lie, a few in frames, the others elsewhere, and how a page moves between the two.

Source: QLoRA section 3, "Paged Optimizers".

Three stores for one page table. FileStore: frames in the CPU's memory, pages in a file. HostStore: frames on a GPU,
pages in pinned memory of its host. ManagedStore, the paper's own: CUDA's managed memory, where a page keeps its address
and the driver moves it. Moves run alongside the arithmetic: in a thread for a file, on a stream of its own on a GPU.

But: the tests replace CUDA's own calls, which need a GPU; bench/gpu_paging.py makes them.
"""

import errno
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from qlora_lab.files import disk
from qlora_lab.files.home import expanded

Wait = Callable[[], BaseException | None]  # returns when a move is over: None, or the error that stopped it
SYSTEM_PAGE = 4096  # bytes: the driver moves managed memory in whole system pages


class _Frames:
    """What FileStore and HostStore share: their frames hold the bytes."""

    frames: torch.Tensor  # (number of frames, page_size) uint8

    def bytes(self, page: int, frame: int) -> torch.Tensor:
        return self.frames[frame]

    def clear(self, page: int, frame: int) -> None:
        self.frames[frame].zero_()


class FileStore(_Frames):
    """Frames in memory, pages in a file that is read and written, not mapped: mapping adds a system fault per 4 KiB.

    The file has no name, so it is gone when the process ends, however it ends.
    """

    def __init__(self, count: int, page_size: int, frames: int, folder: str | Path | None):
        self.frames = torch.zeros(frames, page_size, dtype=torch.uint8)
        self.file = None
        if frames < count:  # else every page keeps its frame
            self.file = disk.unnamed_file(folder and expanded(folder))
            weakref.finalize(self, self.file.close)
            self._thread = ThreadPoolExecutor(1)  # started by the first move

    def write(self, page: int, frame: int) -> None:
        size = self.frames.shape[1]
        self.file.seek(page * size)
        if self.file.write(self.frames[frame].numpy().data) != size:  # a full disk takes a part; the frame keeps all
            raise OSError(errno.ENOSPC, f"no space to write back page {page} of {size} bytes")

    def read(self, page: int, frame: int) -> None:
        size = self.frames.shape[1]
        self.file.seek(page * size)
        if self.file.readinto(self.frames[frame].numpy().data) != size:
            raise OSError(errno.EIO, f"page {page} of {size} bytes cannot be read back whole")

    def start(self, move: Callable[[], None]) -> Wait:
        return self._thread.submit(move).exception if self.file else _at_once(move)


class HostStore(_Frames):
    """Frames on `device`, evicted pages in its host's memory. On the CPU it works too, but saves nothing."""

    def __init__(self, count: int, page_size: int, frames: int, device: torch.device):
        self.frames = torch.zeros(frames, page_size, dtype=torch.uint8, device=device)
        self._stream = _stream(device)
        if self._stream:
            self.frames.record_stream(self._stream)  # else torch could reuse their memory during a copy
        self._pages: dict[int, torch.Tensor] = {}  # one tensor each: torch rounds pinned memory up to a power of two

    def write(self, page: int, frame: int) -> None:
        if page not in self._pages:
            size = self.frames.shape[1]
            self._pages[page] = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
        self._pages[page].copy_(self.frames[frame], non_blocking=True)

    def read(self, page: int, frame: int) -> None:
        self.frames[frame].copy_(self._pages[page], non_blocking=True)

    def start(self, move: Callable[[], None]) -> Wait:
        return _on_stream(self._stream, move)


class ManagedStore:
    """Pages in CUDA's managed memory: a page is in a frame once the driver was asked to move it onto the GPU.

    All frames together fit into the memory that is free on the card now. Raises ValueError for a device or a page size
    that is not allowed, ImportError without cuda-bindings, and RuntimeError without a GPU that moves such memory.
    """

    def __init__(self, count: int, page_size: int, frames: int, device: torch.device):
        if page_size % SYSTEM_PAGE:
            allowed = f"a multiple of {SYSTEM_PAGE} with store='managed'"
            raise ValueError(f"page_size={page_size} is not allowed: choose {allowed}")
        self._runtime = _runtime(device)
        free = _free(device)  # bytes
        if free < page_size:
            raise RuntimeError(f"{free} bytes are free on {device}: store='managed' needs a page of {page_size}")
        # A page keeps its address whether it is in a frame or not, so frames are a mere count: no bytes of their own.
        self.frames = torch.empty(min(frames, free // page_size), page_size, dtype=torch.uint8, device="meta")
        self._pages = _view(_Managed(self._runtime, count * page_size), device).view(count, page_size)
        self._stream = _stream(device)
        self._device = device

    def bytes(self, page: int, frame: int) -> torch.Tensor:
        return self._pages[page]

    def clear(self, page: int, frame: int) -> None:
        self.read(page, frame)  # asks for it on the GPU: untouched managed memory is nowhere yet
        self._pages[page].zero_()

    def write(self, page: int, frame: int) -> None:
        self._ask(page, self._runtime.cudaMemLocationType.cudaMemLocationTypeHost, 0)

    def read(self, page: int, frame: int) -> None:
        self._ask(page, self._runtime.cudaMemLocationType.cudaMemLocationTypeDevice, _index(self._device))

    def start(self, move: Callable[[], None]) -> Wait:
        return _on_stream(self._stream, move)

    def _ask(self, page: int, kind: object, number: int) -> None:
        place = self._runtime.cudaMemLocation()
        place.type = kind
        place.id = number
        # The function that takes a place has a second name in CUDA 12; in CUDA 13 it took over the first one.
        prefetch = getattr(self._runtime, "cudaMemPrefetchAsync_v2", self._runtime.cudaMemPrefetchAsync)
        stream = self._stream.cuda_stream if self._stream else 0
        memory = self._pages[page]
        _checked(self._runtime, prefetch(memory.data_ptr(), memory.nbytes, place, 0, stream))


class _Managed:
    """Managed memory that torch can view without a copy, freed when the last view is gone."""

    def __init__(self, runtime: ModuleType, nbytes: int):
        (pointer,) = _checked(runtime, runtime.cudaMallocManaged(nbytes, runtime.cudaMemAttachGlobal))
        weakref.finalize(self, runtime.cudaFree, pointer)
        data = (int(pointer), False)  # False: writable
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": data, "version": 3}


def _view(memory: _Managed, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(memory, dtype=torch.uint8, device=device)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index or 0


def _runtime(device: torch.device) -> ModuleType:
    """cuda-bindings, if this device can move managed memory by it."""
    if device.type != "cuda":
        raise ValueError(f"store='managed' needs a CUDA GPU, but the device is {device}: leave it out")
    try:
        runtime = import_module("cuda.bindings.runtime")  # not a requirement of ours: torch's CUDA wheels bring it
    except ImportError as error:
        raise ImportError(
            "store='managed' needs cuda-bindings: pip install cuda-bindings, or use store='host'"
        ) from error
    if not torch.cuda.is_available():
        raise RuntimeError("store='managed' needs an NVIDIA GPU, and torch finds none: leave it out")
    asked = runtime.cudaDeviceAttr.cudaDevAttrConcurrentManagedAccess
    (allowed,) = _checked(runtime, runtime.cudaDeviceGetAttribute(asked, _index(device)))
    if not allowed:
        raise RuntimeError(f"{device} does not move managed memory ahead of its use: use store='host'")
    return runtime


def _checked(runtime: ModuleType, returned: tuple) -> tuple:
    """Split a call's result into error and values; return the values. Raises RuntimeError for an error."""
    error, *values = returned
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"managed memory: {error.name}: {runtime.cudaGetErrorString(error)[1].decode()}")
    return tuple(values)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _on_stream(stream: torch.cuda.Stream | None, move: Callable[[], None]) -> Wait:
    """Copy on `stream`, alongside what is computed after this call; what is computed after the wait finds it done."""
    if stream is None:
        return _at_once(move)
    stream.wait_stream(torch.cuda.current_stream(stream.device))  # a kernel may still use the frame
    with torch.cuda.stream(stream):
        stopped = _at_once(move)()
    arrived = stream.record_event()

    def wait() -> BaseException | None:
        torch.cuda.current_stream(stream.device).wait_event(arrived)
        return stopped

    return wait


def _at_once(move: Callable[[], None]) -> Wait:
    stopped = None
    try:
        move()
    except BaseException as error:  # Ctrl-C too: the page table must know how far the move came
        stopped = error
    return lambda: stopped
