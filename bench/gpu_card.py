"""Choose where the Triton rungs run: on a CUDA device, or on the CPU if Triton interprets them.

In: this machine. Out: the device, or the reason why there is none; the facts at the start of every GPU bench's JSON.
"""

import datetime
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from triton import knobs

from bench.cpu import versions
from qlora_lab import kernels
from qlora_lab.model.linear4bit import Linear4bit


def refusal() -> str | None:
    """The reason why nothing can run here, or None."""
    if knobs.runtime.interpret or torch.cuda.is_available():
        return None
    return "torch finds no CUDA device here; to see that this bench runs: TRITON_INTERPRET=1, --quick and --out."


def the_device() -> torch.device:
    return torch.device("cpu" if knobs.runtime.interpret else "cuda")


@contextmanager
def rungs_on(device: torch.device) -> Iterator[None]:
    """Inside, the library runs its rungs on `device`, as it does on a GPU, also where Triton interprets them.

    The interpreter takes CPU tensors, for which choose() would take the CPU's kernels, and a layer its adapter.
    """
    override = os.environ.pop(kernels.OVERRIDE, None)
    choose = kernels.choose
    takes_adapter = Linear4bit.takes_adapter
    if device.type == "cpu":
        kernels.choose = lambda device="cpu": choose("cuda")
        Linear4bit.takes_adapter = False
    try:
        yield
    finally:
        kernels.choose, Linear4bit.takes_adapter = choose, takes_adapter
        if override is not None:
            os.environ[kernels.OVERRIDE] = override


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "interpreter",
        "capability": list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        "driver": driver() if on_gpu else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "interpreted": not on_gpu,
        "date": datetime.date.today().isoformat(),
        "versions": {"triton": triton.__version__} | versions(),
    }


def driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def slug(name: str) -> str:
    """A device's name in a form that a file's name can hold."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
