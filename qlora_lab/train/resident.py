"""Ask Linux for the memory of this whole process: how many bytes are resident now, and how many were at most.

Source: proc(5). Other systems answer None.
"""

from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): written to clear_refs, it sets VmHWM to the resident size of this moment


def peak_resident() -> int | None:
    """Return the peak of this process's resident bytes since its start or reset_peak. None on systems without /proc."""
    return _status("VmHWM")


def resident() -> int | None:
    """Return the resident bytes of this process. None on systems without /proc."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Start the peak of peak_resident again. Returns whether the system allowed it."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    if not STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024  # Linux says kB and means KiB
