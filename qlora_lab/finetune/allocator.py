"""Make the C library hand freed memory out again instead of giving it back to the system.

Every step of training allocates the same large temporaries. By default glibc returns each to the kernel, and the next
one is paid for in page faults, which can cost more than its arithmetic. Linux with glibc only; elsewhere it does
nothing.
The price: resident memory stays at its peak until the process ends.
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1


def recycle_memory() -> bool:
    """Keep freed memory in this process. Returns whether the C library took the setting."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, LARGEST) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
