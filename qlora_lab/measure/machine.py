"""Ask the system and torch for the facts about this machine that matter to a fine-tuning run."""

import os
import platform
from importlib.metadata import version

import torch

from qlora_lab.model.load import fast_dtype


def machine() -> dict[str, str]:
    """Return fact -> value, as text: Python, torch, cores, memory, GPU, and the dtype in which load() would compute."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    return {
        "Python": platform.python_version(),
        "torch": version("torch"),
        "processor": f"{platform.machine()}, {threads} thread{'s' * (threads > 1)} for torch",
        "memory": _memory(),
        "GPU": torch.cuda.get_device_name() if device.type == "cuda" else "none: everything runs on the processor",
        "computes in": str(fast_dtype(device)).removeprefix("torch."),
    }


def _memory() -> str:
    if not hasattr(os, "sysconf"):  # Windows
        return "unknown on this system"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
