"""No byte is lost, whatever is asked for in which order; who is evicted is who was used least recently."""

import ctypes
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

from qlora_lab.optim import stores
from qlora_lab.optim.paging import Event, Pages


class Place:
    type = id = None


class FakeRuntime:
    """cuda-bindings' calls over the CPU's memory, and what was asked where; the names and arguments are the real ones,
    which test_the_bindings_have_these_names checks."""

    cudaMemAttachGlobal = 1
    cudaError_t = Enum("cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2})
    cudaMemLocationType = Enum("cudaMemLocationType", {"cudaMemLocationTypeDevice": 1, "cudaMemLocationTypeHost": 2})
    cudaMemLocation = Place

    def __init__(self):
        self.memory, self.on_device, self.most, self.freed = None, set(), 0, 0

    def cudaMallocManaged(self, size, flags):
        self.memory = (ctypes.c_uint8 * size)(*b"\xaa" * size)  # nothing promises zeros
        return self.cudaError_t.cudaSuccess, ctypes.addressof(self.memory)

    def cudaFree(self, pointer):
        self.freed += 1
        return (self.cudaError_t.cudaSuccess,)

    def cudaMemPrefetchAsync(self, pointer, count, location, flags, stream):
        asked_onto = location.type is self.cudaMemLocationType.cudaMemLocationTypeDevice
        (self.on_device.add if asked_onto else self.on_device.discard)(pointer)
        self.most = max(self.most, len(self.on_device))
        return (self.cudaError_t.cudaSuccess,)

    def cudaGetErrorString(self, error):
        return self.cudaError_t.cudaSuccess, b"out of memory"


@contextmanager
def managed(free: int = 2**30) -> Iterator[FakeRuntime]:
    """store="managed" without a GPU."""

    def view(memory, device):
        (nbytes,), (pointer, _) = (memory.__cuda_array_interface__[name] for name in ("shape", "data"))
        array = (ctypes.c_uint8 * nbytes).from_address(pointer)
        array.owner = memory  # as torch holds what it views
        return torch.frombuffer(array, dtype=torch.uint8)

    runtime = FakeRuntime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "_runtime", lambda device: runtime)
        patch.setattr(stores, "_free", lambda device: free)
        patch.setattr(stores, "_view", view)
        yield runtime


calls_ = st.lists(st.tuples(st.sampled_from(["page", "prefetch"]), st.integers(0, 8), st.integers(0, 255)), max_size=60)


@pytest.mark.long
@given(st.sampled_from(["file", "host", "managed"]), st.integers(1, 9), st.integers(1, 3), st.integers(1, 40), calls_)
def test_no_order_of_calls_loses_a_byte(store, count, frames, page_size, calls):
    page_size = stores.SYSTEM_PAGE if store == "managed" else page_size
    with managed() as runtime:
        pages = Pages(count * page_size, page_size, frames * page_size, store=store)
    known = torch.zeros(count, page_size, dtype=torch.uint8)
    used, page = 0, pages.page(0)
    for call, number, value in calls:
        if call == "prefetch":
            pages.prefetch(number % count)  # the page that was handed out stays where it is
        else:
            used, page = number % count, pages.page(number % count)
            assert len(pages.resident) <= frames and pages.resident[-1] == used
        assert store != "managed" or page.data_ptr() in runtime.on_device
        assert torch.equal(page, known[used])
        page[value % page_size] = known[used, value % page_size] = value
    for number in range(count):
        assert torch.equal(pages.page(number), known[number])
    assert runtime.most <= frames


@pytest.mark.parametrize("store", ["file", "host", "managed"])
def test_the_least_recently_used_page_is_evicted(store):
    with managed():
        pages = Pages(5 * 4096, 4096, 3 * 4096, store=store)
    for number in (0, 1, 2, 0, 3, 1):
        pages.page(number)
    assert list(pages.events) == [
        Event("fault", 0, 0), Event("fault", 1, 1), Event("fault", 2, 2),
        Event("write back", 1, 1), Event("evict", 1, 1), Event("fault", 3, 1),
        Event("write back", 2, 2), Event("evict", 2, 2), Event("fault", 1, 2),
    ]  # fmt: skip
    assert pages.resident == [0, 3, 1]


def test_without_a_budget_there_is_no_file():
    pages = Pages(10, 4)
    pages.page(2)[1] = 7
    assert pages.page(2).tolist() == [0, 7, 0, 0] and pages._store.file is None and len(pages.events) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "nbytes=0 and page_size=8"),
        ((8, 0), "nbytes=8 and page_size=0"),
        ((8, 8, 7), "budget=7 is not enough: give at least one page, 8 bytes"),
    ],
)
def test_errors_name_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pages(*arguments)


def test_a_page_that_is_not_there():
    with pytest.raises(IndexError, match="page 2 does not exist: choose from 0 to 1"):
        Pages(16, 8).page(2)


@pytest.mark.parametrize("store", ["file", "host"])
def test_a_page_that_was_prefetched_is_no_fault(store):
    pages = Pages(4 * 8, 8, 2 * 8, store=store)
    pages.page(0)[:] = 7
    for number in (1, 2, 3):
        pages.prefetch(number)
        pages.prefetch(number)  # it is on its way
        assert pages.page(number).tolist() == [0] * 8
    pages.prefetch(0)
    pages.prefetch(2)  # in a frame, but the one that leaves it for page 0: not any more
    assert pages.page(2).tolist() == [0] * 8 and pages.page(0).tolist() == [7] * 8
    assert list(pages.events) == [
        Event("fault", 0, 0), Event("prefetch", 1, 1),
        Event("write back", 0, 0), Event("evict", 0, 0), Event("prefetch", 2, 0),
        Event("write back", 1, 1), Event("evict", 1, 1), Event("prefetch", 3, 1),
        Event("write back", 2, 0), Event("evict", 2, 0), Event("prefetch", 0, 0),
        Event("write back", 0, 0), Event("evict", 0, 0), Event("prefetch", 2, 0),
        Event("write back", 3, 1), Event("evict", 3, 1), Event("fault", 0, 1),
    ]  # fmt: skip


def test_one_frame_has_no_room_for_a_prefetch():
    pages = Pages(16, 8, 8)
    pages.page(0)
    pages.prefetch(1)
    assert list(pages.events) == [Event("fault", 0, 0)] and pages.resident == [0]


class Broken:
    """A file on a full disk, or one that something cut off."""

    def __init__(self, file, fails):
        self.file, self.fails = file, fails

    def seek(self, at):
        self.file.seek(at)

    def write(self, data):
        return len(data) // 2 if self.fails == "write" else self.file.write(data)

    def readinto(self, data):
        return 0 if self.fails == "read" else self.file.readinto(data)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("fails", "message"),
    [("write", "no space to write back page 0 of 8 bytes"), ("read", "page 1 of 8 bytes cannot be read back whole")],
)
def test_a_disk_that_fails_loses_nothing(fails, message, ahead):
    pages = Pages(32, 8, 16)
    for number in (0, 1, 2, 3, 0, 3):
        pages.page(number)[:] = number + 1
    file = pages._store.file
    pages._store.file = Broken(file, fails)
    pages.events.clear()
    if ahead:
        pages.prefetch(1)
    for _ in range(2):  # it may be asked for again and fails again
        with pytest.raises(OSError, match=message):
            pages.page(1)
    assert [event.kind for event in pages.events] == ([] if fails == "write" else ["write back", "evict"])
    assert pages.resident == ([0, 3] if fails == "write" else [3])
    assert pages.page(3).tolist() == [4] * 8
    pages._store.file = file
    assert [pages.page(number).tolist() for number in range(4)] == [[number + 1] * 8 for number in range(4)]


def test_an_interruption_leaves_a_page_on_its_way(monkeypatch):
    pages = Pages(16, 8, 8)
    pages.page(0)[:] = 7
    start = pages._store.start

    def interrupted(move):
        wait, calls = start(move), []

        def once():
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return wait()

        return once

    monkeypatch.setattr(pages._store, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pages.page(1)
    monkeypatch.undo()
    assert pages.page(0).tolist() == [7] * 8 and pages.page(1).tolist() == [0] * 8


def test_copies_wait_for_what_is_computed_and_what_is_computed_for_copies(monkeypatch):
    log = []
    compute = SimpleNamespace(wait_event=lambda event: log.append(f"computing waits for {event}"))
    copies = SimpleNamespace(
        device="cuda:0",
        wait_stream=lambda other: log.append("copies wait for computing") if other is compute else None,
        record_event=lambda: "copies",
    )

    @contextmanager
    def on(stream):
        log.append("begin")
        yield
        log.append("end")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", on)
    wait = stores._on_stream(copies, lambda: log.append("copy"))
    log.append("compute")
    assert wait() is None
    assert log == ["copies wait for computing", "begin", "copy", "end", "compute", "computing waits for copies"]


def test_managed_memory_is_never_more_than_the_card_has_free():
    with managed(free=2 * 4096 + 4095) as runtime:
        pages = Pages(10 * 4096, 4096, store="managed")
        assert len(pages.frames) == 2 and pages.frames.nbytes == 8192
        for number in range(10):
            pages.page(number)
        assert runtime.most == 2
        kept = pages.page(3)
        del pages
        assert runtime.freed == 0
        del kept
        assert runtime.freed == 1
    with managed(free=4095), pytest.raises(RuntimeError, match="4095 bytes are free on cpu: .* needs a page of 4096"):
        Pages(4096, 4096, store="managed")


def test_an_error_of_cuda_is_named():
    with managed() as runtime:
        runtime.cudaMallocManaged = lambda size, flags: (runtime.cudaError_t.cudaErrorMemoryAllocation, None)
        with pytest.raises(RuntimeError, match="managed memory: cudaErrorMemoryAllocation: out of memory"):
            Pages(4096, 4096, store="managed")


@pytest.mark.parametrize(
    ("device", "store", "message"),
    [
        ("cpu", "disk", "store='disk' is not allowed on cpu: choose 'file' on the CPU, 'host' on any device"),
        ("cuda", "file", "store='file' is not allowed on cuda"),
        ("cpu", "managed", "store='managed' needs a CUDA GPU, but the device is cpu: leave it out"),
    ],
)
def test_a_store_that_is_not_the_devices(device, store, message):
    with pytest.raises(ValueError, match=message):
        Pages(4096, 4096, device=device, store=store)


def test_managed_pages_are_whole_pages_of_the_system():
    with pytest.raises(ValueError, match="page_size=520 is not allowed: choose a multiple of 4096"):
        Pages(520, 520, store="managed")


def test_what_managed_memory_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(ImportError, match="store='managed' needs cuda-bindings: pip install cuda-bindings"):
        Pages(4096, 4096, device="cuda", store="managed")
    runtime = FakeRuntime()
    for name, module in {
        "": ModuleType("cuda"),
        ".bindings": ModuleType("bindings"),
        ".bindings.runtime": runtime,
    }.items():
        monkeypatch.setitem(sys.modules, f"cuda{name}", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU, and torch finds none"):
        Pages(4096, 4096, device="cuda", store="managed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runtime.cudaDeviceAttr = SimpleNamespace(cudaDevAttrConcurrentManagedAccess=89)
    runtime.cudaDeviceGetAttribute = lambda attribute, device: (runtime.cudaError_t.cudaSuccess, 0)
    with pytest.raises(RuntimeError, match="cuda:1 does not move managed memory ahead of its use: use store='host'"):
        Pages(4096, 4096, device="cuda:1", store="managed")


def test_the_bindings_have_these_names():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for name in [name for name in vars(FakeRuntime) if name.startswith("cuda")]:
        assert hasattr(runtime, name), name
    newest = getattr(runtime, "cudaMemPrefetchAsync_v2", runtime.cudaMemPrefetchAsync)
    wanted = list(inspect.signature(FakeRuntime.cudaMemPrefetchAsync).parameters)[1:]
    described = newest.__doc__.splitlines()[0]
    assert [described.index(name.replace("pointer", "devPtr")) for name in wanted] == sorted(
        described.index(name.replace("pointer", "devPtr")) for name in wanted
    )
    place = runtime.cudaMemLocation()
    place.type, place.id = runtime.cudaMemLocationType.cudaMemLocationTypeDevice, 0
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="managed memory: cudaError"):
            stores._checked(runtime, newest(4096, 4096, place, 0, 0))
