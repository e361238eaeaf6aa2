"""Compile for all cores, keep the machine code on disk, and run it with as many threads as torch has.

torch.compile cannot trace that, so `opaque` keeps it out of its graphs: numba's machine code runs between two of them.
Products need no `opaque`: while a model is compiled they are operations of torch (model/product_ops.py).
The GPU's kernels are operations of torch (triton/ops.py) and stay in the graph.
"""

import threading
import warnings
from functools import lru_cache, wraps
from pathlib import Path
from zlib import crc32

import numba
import torch
from numba import njit

_local = threading.local()


@lru_cache
def _room() -> int:
    """Checksum of this room's files: numba's cache watches one file, but kernels inline functions of several."""
    return crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


def parallel(function):
    """Compile for all cores; the machine code is kept on disk if a folder can be written."""
    return _compiled(function, parallel=True)


def serial(function):
    """Compile for one core, on which functions that are compiled for all may be called; kept as those are."""
    return _compiled(function)


def _compiled(function, **options):
    function.__qualname__ += f"_{_room():08x}"  # part of the file's name in the cache
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder that it can write to
        _warn_uncached("no folder for them can be written")
        return njit(**options)(function)


@lru_cache  # once
def _warn_uncached(reason):
    warnings.warn(
        f"compiled kernels cannot be kept, so every start compiles them again ({reason}): "
        "set NUMBA_CACHE_DIR to a folder with space",
        stacklevel=2,
    )


def kept() -> bool:
    """Whether the machine code of all kernels so far could be kept on disk."""
    return _warn_uncached.cache_info().currsize == 0  # an entry is a warning that was given


@lru_cache  # once
def _start_threads():
    """Start numba's threads without changing torch's number: both may share one OpenMP library."""
    threads = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(threads)


def thread_count() -> int:
    """How many threads `run` gives a kernel."""
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


def run(kernel, *args, threads=None):
    """Call a compiled kernel with at most so many threads; without `threads`, with torch's number of them."""
    _start_threads()
    threads = min(threads or torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if getattr(_local, "threads", None) != threads:  # numba keeps a number for each Python thread, too
        numba.set_num_threads(threads)
        _local.threads = threads
    try:
        kernel(*args)
    except OSError as error:  # compiled, but the disk is full or has become read-only
        _warn_uncached(error.strerror)
        kernel(*args)


def opaque(function):
    """`function` as it is; while torch.compile traces, the graph ends before it and a new one begins after it."""
    outside = torch._disable_dynamo(function)  # the public decorator imports the compiler, 0.9 s

    @wraps(function)
    def call(*args, **kwargs):
        return (outside if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call
