"""Large weights lie in memory that asked for huge pages, and are tensors like all others.

Whether the system then gives such pages depends on what else it holds; that it was asked stands in /proc (proc(5)).
"""

import copy
import io
import mmap
import os
import re
import signal
import weakref
from pathlib import Path

import pytest
import torch

from qlora_lab.kernels import huge_pages
from qlora_lab.kernels.huge_pages import HUGE, empty
from qlora_lab.model.load import load
from qlora_lab.quant.quantize import quantize

MAPS = Path("/proc/self/smaps")
needs_linux = pytest.mark.skipif(
    huge_pages.ADVICE is None or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="only Linux has these pages, and only where it was built with them",
)


def asked(tensor: torch.Tensor) -> int:
    """Bytes of this tensor that the system may put into huge pages."""
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    total = 0
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", MAPS.read_text(), flags=re.MULTILINE)[1:]:
        first, last = (int(number, 16) for number in part.split(" ", 1)[0].split("-"))
        if "hg" in part.split("VmFlags:")[1].split():
            total += max(0, min(stop, last) - max(start, first))
    return total


@pytest.fixture
def small_pages(monkeypatch):
    """Pages of 4 KiB count as huge, so that a small tensor has some."""
    monkeypatch.setattr(huge_pages, "HUGE", mmap.PAGESIZE)


@needs_linux
@pytest.mark.parametrize("numel", [HUGE // 4, HUGE // 4 + 1, 3 * HUGE // 4 - 1, 5 * HUGE // 4])
def test_whole_huge_pages_are_asked_for_and_no_byte_more(numel):
    tensor = empty((numel,), torch.float32)
    assert tensor.data_ptr() % HUGE == 0
    assert asked(tensor) == tensor.nbytes // HUGE * HUGE
    assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("shape", [(3, 5, 7), (0,), ()])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("large", [False, True])
def test_it_is_a_tensor_as_torch_makes_one(shape, dtype, large, small_pages):
    shape = (mmap.PAGESIZE, *shape) if large else shape
    tensor = empty(shape, dtype)
    tensor.fill_(3)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    assert tensor.sum(dtype=torch.float32) == 3 * tensor.numel()


@needs_linux
def test_small_tensors_are_torch_s(monkeypatch):
    monkeypatch.setattr(huge_pages.mmap, "mmap", None)
    assert empty((HUGE - 1,), torch.uint8).shape == (HUGE - 1,)
    with pytest.raises(TypeError, match="not callable"):
        empty((HUGE,), torch.uint8)


class Refusing(mmap.mmap):
    """A kernel that was built without huge pages."""

    def madvise(self, *given):
        raise OSError(22, "Invalid argument")


@pytest.mark.parametrize(
    "name, value", [("ADVICE", None), ("HUGE", 2**62), pytest.param("mmap", Refusing, marks=needs_linux)]
)
def test_a_system_without_them_gives_plain_memory(name, value, monkeypatch):
    monkeypatch.setattr(huge_pages.mmap if name == "mmap" else huge_pages, name, value)
    tensor = empty((HUGE, 2), torch.int16)
    assert tensor.shape == (HUGE, 2) and tensor.dtype == torch.int16
    assert not MAPS.exists() or asked(tensor) == 0


@needs_linux
def test_too_few_addresses_give_torch_s_own_error():
    """What model/out_of_memory.py recognises."""
    with pytest.raises(RuntimeError, match="allocate"):
        empty((2**60,), torch.uint8)


@needs_linux
def test_memory_goes_back_with_the_last_tensor_that_uses_it(monkeypatch):
    made = []

    class Watched(mmap.mmap):
        def __init__(self, *args, **kwargs):
            made.append(weakref.ref(self))

    monkeypatch.setattr(huge_pages.mmap, "mmap", Watched)
    tensor = empty((HUGE,), torch.uint8)
    last = tensor[-5:]
    last.fill_(7)
    del tensor
    assert made[0]() is not None and last.tolist() == [7] * 5
    del last
    assert made[0]() is None


@needs_linux
def test_copies_and_files_hold_the_tensor_alone(small_pages):
    tensor = empty((50, 1000), torch.uint8).random_(0, 256, generator=torch.Generator().manual_seed(0))
    assert asked(tensor) == 50_000 // mmap.PAGESIZE * mmap.PAGESIZE
    file = io.BytesIO()
    torch.save(tensor, file)
    assert file.tell() < tensor.nbytes + 4096
    file.seek(0)
    for copied in (torch.load(file, weights_only=True), copy.deepcopy(tensor), tensor.clone()):
        assert torch.equal(copied, tensor) and copied.data_ptr() != tensor.data_ptr()
        assert copied.untyped_storage().nbytes() == tensor.nbytes
    before = tensor.clone()
    assert torch.equal(tensor.share_memory_(), before)  # as torch.multiprocessing hands it over


@needs_linux
def test_a_forked_process_has_its_own():
    tensor = empty((2 * HUGE,), torch.uint8).numpy()  # torch's threads are not there in the child
    tensor[:] = 1
    child = os.fork()
    if not child:
        right = tensor[0] == tensor[-1] == 1
        tensor[:] = 2
        os.kill(os.getpid(), signal.SIGKILL if right else signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tensor == 1).all()


@needs_linux
def test_quantised_weights_ask():
    q = quantize(torch.ones(2**22 + 64).bfloat16())
    assert asked(q.packed) == HUGE and q.packed.data_ptr() % HUGE == 0
    assert q.packed.untyped_storage().nbytes() == q.packed.nbytes


@needs_linux
def test_what_a_model_keeps_in_16_bits_asks(folder, small_pages):
    """Its head is half of what a token of a small model reads."""
    model, _ = load(folder, dtype=torch.bfloat16, progress=False)
    large = [tensor for tensor in model.parameters() if tensor.nbytes >= mmap.PAGESIZE]
    assert any(tensor is model.lm_head.weight for tensor in large)
    for tensor in large:
        assert asked(tensor) == tensor.nbytes // mmap.PAGESIZE * mmap.PAGESIZE
