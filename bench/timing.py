"""Time contenders in turn, and give the spread of each figure."""

import ctypes
import gc
import os
import platform
import re
import statistics
from collections.abc import Callable
from math import ceil
from pathlib import Path
from time import perf_counter

from qlora_lab.measure.latency import orders


def in_turn(contenders: dict[str, Callable[[], object]], rounds: int, sample: float) -> dict[str, dict]:
    """name -> {median, low, high (quartiles), in seconds per call; calls per sample; rounds}.

    sample: seconds that one sample lasts at least; a shorter call is repeated. Each round runs every contender once,
    in another order, so that other work on the machine, and what a contender leaves in the caches, affects all of them
    alike.
    """
    calls = {}
    samples = {name: [] for name in contenders}
    for name, function in contenders.items():
        for _ in range(2):
            calls[name] = max(1, ceil(sample / _seconds(function, 1)))
    for order in orders(contenders, rounds):
        for name in order:
            samples[name].append(_seconds(contenders[name], calls[name]))
    return {name: {**spread(times), "calls": calls[name], "rounds": rounds} for name, times in samples.items()}


def _seconds(function: Callable[[], object], calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        function()
    return (perf_counter() - start) / calls


def spread(times: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"median": median, "low": low, "high": high}


def peak_bytes(function: Callable[[], object]) -> int | None:
    """The rise of resident memory during the call, in bytes; None if Linux does not provide it."""
    try:
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # free memory that malloc keeps would hide the call's need
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def cpu_name() -> str:
    """The processor's name, or the platform's name for it."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{name[1] if name else 'processor'}, {os.cpu_count()} cores"
