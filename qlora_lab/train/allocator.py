"""Make the C library hand freed memory out again instead of giving it back to the system.

Every training step allocates the same large temporaries. By default glibc returns each to the kernel, and the next one
costs page faults, which can take longer than its arithmetic. Linux with glibc only; elsewhere this does nothing.
The price: resident memory stays at its peak until the process ends.
"""

import ctypes
import platform

M_TRIM_THRESHOLD = -1  # malloc.h
M_MMAP_THRESHOLD = -3
LARGEST = 2**31 - 1  # bytes, as much as a C int holds
DOCUMENTED_LARGEST = 32 * 2**20  # older glibc refuses a mmap threshold above 32 MiB


def recycle_memory() -> bool:
    """Keep freed memory in this process. Returns whether the C library took the setting."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim = mallopt(M_TRIM_THRESHOLD, LARGEST)
    mmap = mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, DOCUMENTED_LARGEST)
    return bool(trim and mmap)
