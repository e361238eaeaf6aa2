"""What this machine offers a fine-tuning run: a few facts, asked of the system and of torch.

Not here: advice (notebook 00 reads these facts with you).
"""

import os
import platform
from importlib.metadata import version

import torch

from qlora_lab.model.load import fast_dtype


def machine() -> dict[str, str]:
    """Fact -> value, as text: Python, torch, cores, memory, GPU, and the dtype that load() would compute in."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "Python": platform.python_version(),
        "torch": version("torch"),
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads for torch",
        "memory": _memory(),
        "GPU": torch.cuda.get_device_name() if device.type == "cuda" else "none: everything runs on the processor",
        "computes in": str(fast_dtype(device)).removeprefix("torch."),
    }


def _memory() -> str:
    if not hasattr(os, "sysconf"):
        return "unknown on this system"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
