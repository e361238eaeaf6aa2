"""Read what training costs: processor seconds, GPU seconds and joules, before and after each step.

In: the device that trains, and the machine's counters. Out: the cost of a step, for its line of the log, and the Cost
of all steps.
Source: RAPL as Linux shows it (Documentation/power/powercap), in microjoules; NVML's
nvmlDeviceGetTotalEnergyConsumption, in millijoules since the driver was loaded, from Volta on.

Joules are those of whole processors, their memory and whole GPUs: other programs' work is in them. There is no figure
unless the device that trains is counted, and `joules_note` then says why.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_lab.train.distributed import is_first_on_node

POWERCAP = Path("/sys/class/powercap")
PACKAGE = "package"  # begins the name of a processor's zone
# Zones within a package, such as its cores, are in its counter already; memory is not. A zone "psys" is not counted: it
# is the whole board, packages included.
COUNTED = (PACKAGE, "dram")
# A counter that goes all the way round within a step looks as if it had hardly moved. AMD's ends at 65 kJ, 131 s of the
# largest processors (500 W: EPYC 9965, Xeon 6980P); Intel's at 262 kJ, after nine minutes. That of Intel's memory ends
# at 65 kJ; that memory draws at most as much as a processor is an assumption.
MOST_WATTS = 500
UNKNOWN = "another process has no figure, a counter fell, or it may have gone all the way round in so long a step"
EARLIER = "logged by an earlier version, which counted none"


@dataclass(frozen=True)
class Cost:
    """The cost of a run's steps, those before a resume included. Loading, evaluations and saving are not in it.

    processor_seconds: user and system time of all threads and processes. gpu_seconds_held: elapsed seconds times GPUs,
    busy or not. joules_note: what joules counts, or why it is None. A log by an earlier version makes all of them None.
    """

    processor_seconds: float | None
    gpu_seconds_held: float | None
    joules: float | None
    joules_note: str


class Counter(NamedTuple):
    """A counter of energy. read: returns joules. highest: the value after which it begins at 0; NaN: it never does."""

    name: str
    read: Callable[[], float]
    highest: float = math.nan


class Reading(NamedTuple):
    """Clocks, in seconds, and counters, in joules, at one moment; None for counters that cannot be read."""

    elapsed: float
    processor: float
    counters: list[float] | None


class Meter:
    """Reads all that this process counts while it trains on `device`. powercap: the folder with RAPL's zones."""

    def __init__(self, device: torch.device, powercap: Path = POWERCAP):
        self._gpus = int(device.type != "cpu")
        # A processor is counted once, by the first process of its machine; the others add 0.
        counters, note = rapl(powercap) if is_first_on_node() else ([], "")
        if device.type == "cuda":
            # The processor's joules alone would pass for those of the run, so the GPU decides.
            gpu, said = nvml(device)
            counters = gpu and [*gpu, *(counters or [])]
            note = f"{said}; {note}" if gpu and note else said
        elif self._gpus:
            counters, note = None, f"no counter is known for a device of type {device.type}"
        self._counters = counters
        self._note = note

    def read(self) -> Reading:
        """Read all clocks and counters."""
        counters = None
        try:
            counters = self._counters and [counter.read() for counter in self._counters]
        except (OSError, ValueError) as error:  # no reason to end a run
            self._counters, self._note = None, f"a counter could not be read any more ({error})"
        return Reading(time.perf_counter(), time.process_time(), counters)

    def since(self, start: Reading, summed: Callable[..., tuple[float, ...]] = lambda *own: own) -> dict[str, Any]:
        """Return the cost since `start` as a line of the log has it. summed: adds numbers up over all processes."""
        end = self.read()
        seconds = end.elapsed - start.elapsed
        joules = math.nan  # in a sum it stays: one process without a figure leaves none
        if start.counters is not None and end.counters is not None:
            readings = zip(self._counters, start.counters, end.counters, strict=True)
            joules = sum(_joules_between(*reading, seconds) for reading in readings)
        processor, held, joules = summed(end.processor - start.processor, self._gpus * seconds, joules)
        missing = math.isnan(joules)
        unexplained = missing and self._counters is not None
        return {
            "seconds": seconds,
            "processor_seconds": processor,
            "gpu_seconds_held": held,
            "joules": None if missing else joules,
            "joules_note": UNKNOWN if unexplained else self._note,
        }


def total(lines: list[dict[str, Any]]) -> Cost:
    """Add up the lines of a log."""
    costs = [[line.get(name) for line in lines] for name in ("processor_seconds", "gpu_seconds_held", "joules")]
    processor, held, joules = (None if None in cost else sum(cost) for cost in costs)
    without = [line for line in lines if line.get("joules") is None]
    notes = dict.fromkeys(line.get("joules_note", EARLIER) for line in without or lines)
    if joules == 0:  # what takes time takes energy, so these counters do not count
        joules, notes = None, [f"counters stood still ({note})" for note in notes]
    elif len(without) < len(lines) and without:
        notes = [f"{len(without)} of {len(lines)} steps have no figure", *notes]
    return Cost(processor, held, joules, "; ".join(notes))


def rapl(powercap: Path = POWERCAP) -> tuple[list[Counter] | None, str]:
    """Return the counters of all processors and their memory, and their names; else None, and the reason."""
    counters = []
    try:
        # Also on AMD. Zones of intel-rapl-mmio, where there are some, show package 0 a second time.
        for zone in sorted(powercap.glob("intel-rapl:*")):
            name = (zone / "name").read_text("utf-8").strip()
            if name.startswith(COUNTED):
                read = partial(_joules, zone / "energy_uj")
                read()
                counters.append(Counter(name, read, _joules(zone / "max_energy_range_uj")))
    except PermissionError as error:  # since Linux 5.10: fine readings gave keys of other programs away
        return None, f"{error.filename} can be read only by root"
    except (OSError, ValueError) as error:
        return None, f"RAPL cannot be read ({error})"
    if not any(counter.name.startswith(PACKAGE) for counter in counters):
        return None, f"{powercap} has no counter of a processor"
    return counters, f"RAPL: {', '.join(counter.name for counter in counters)}"


def nvml(device: torch.device) -> tuple[list[Counter] | None, str]:
    """Return the counter of an NVIDIA GPU, in a list, and its name; else None, and the reason."""
    try:
        import pynvml
    except ImportError:
        return None, "NVML is read through nvidia-ml-py, which is not installed: pip install 'qlora-lab[energy]'"

    def read() -> float:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # from millijoules
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    try:
        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(device)
        # By its UUID: NVML numbers all GPUs of the machine, torch those that CUDA_VISIBLE_DEVICES leaves.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        read()
    except (pynvml.NVMLError, OSError) as error:  # a slice of a GPU (MIG) has no counter
        return None, f"NVML has no counter of this GPU ({error})"
    return [Counter(properties.name, read)], f"NVML: {properties.name}"


def _joules(file: Path) -> float:
    return int(file.read_text("utf-8")) / 1e6  # from microjoules


def _joules_between(counter: Counter, before: float, after: float, seconds: float) -> float:
    if MOST_WATTS * seconds > counter.highest:  # false for NaN, a counter without an end
        return math.nan
    return after - before if after >= before else after - before + counter.highest
