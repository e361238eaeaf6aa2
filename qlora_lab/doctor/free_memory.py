"""Count the bytes that can still be allocated on a device.

In: a device. Out: bytes, or None if the system does not say. On a GPU: what the driver has left plus what torch keeps
for later use; on Linux: what the kernel calls available, or what the container's limit leaves if that is less;
elsewhere: free pages, if the C library counts them.
"""

import os
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # (free, total)
    bounds = [bound for bound in (_available(), _container()) if bound is not None]
    return min(bounds, default=None)  # the tighter one


def _available() -> int | None:
    if MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024  # the file counts KiB
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # pages times bytes
    except (AttributeError, ValueError):  # Windows has no sysconf, macOS not this name
        return None


def _container() -> int | None:
    """Return what the limit of this control group (version 2) leaves; None without a limit."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    # Not memory.current: it includes cached files, which are dropped when memory is needed.
    return None if limit == "max" else max(0, int(limit) - int(stat["anon"]))
