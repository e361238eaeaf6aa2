"""Memory for large weights in pages of 2 MiB, so that a read waits less for addresses.

In: a shape and a dtype. Out: a tensor without values, as torch.empty gives it, with not a byte more in memory.
A processor finds memory through a table of pages, and remembers a few thousand entries. With pages of 4 KiB, a model of
7B has a million. Linux gives huge pages to memory that asks for them before it is first written to, which is its usual
setting. Moving weights that are there already takes 8 s for 3.5 GB, so they ask when they are made.
Source: madvise(2), MADV_HUGEPAGE; transhuge.rst of the Linux kernel's guide for administrators.

Not for a cache of keys and values: each head has a part of its own, so the first token would touch all huge pages of a
cache that may stay half empty. A file that is mapped cannot have huge pages.
"""

import mmap
from collections.abc import Sequence
from math import prod

import torch

HUGE = 2**21  # bytes: the larger size of page on x86, and on ARM with pages of 4 KiB
ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has it


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous CPU tensor with any values. Its whole huge pages are huge if Linux has some to give.

    Smaller tensors, and those of other systems, are torch's.
    """
    numel = prod(shape)
    n_bytes = numel * dtype.itemsize
    if ADVICE is None or n_bytes < HUGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        # Memory of our own, because malloc may hand out what small pages hold already. Addresses cost nothing: what
        # lies before and behind the tensor is never touched. Shared memory would follow another setting.
        memory = mmap.mmap(-1, n_bytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
        memory.madvise(ADVICE, start, n_bytes // HUGE * HUGE)  # the rest would take a whole page
    except OSError:  # no such pages in this kernel, or too few addresses
        return torch.empty(shape, dtype=dtype, device="cpu")
    # The storage has the tensor's size, so copies and files hold no more; it keeps `memory` while it lives.
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=start).view(shape)
