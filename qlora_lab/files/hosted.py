"""A cell that installs the library where a notebook is opened in a hosted service, such as Colab, Kaggle or Binder.

In: a notebook of the course, and where the wheel lies. Out: the notebook with that cell in front. Where the library is
installed, the cell only looks for it. The wheel is named by the teacher who hands the course out, and is never looked
up on a package index: anyone could publish a package called qlora-lab there.

But: on a hosted service, what shows widgets is the service's own page, which fits the ipywidgets and ipykernel that are
there. So these stay as they are, even where they are older than the course asks for (docs/teaching.md). A part that is
absent is installed: without ipywidgets no explorer shows.
"""

import json
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

from qlora_lab.files.home import expanded
from qlora_lab.files.requirements import unmet
from qlora_lab.files.strict_json import decoded, parse

# Parts of the service: a newer one would not fit the page in the browser. JupyterLab is not needed there at all.
PARTS_OF_SERVICE = {"ipykernel", "ipython", "ipywidgets", "jupyterlab"}
# In a notebook for people who learn: plain Python, which runs in every service, and no line of IPython's magic, which
# `qlora-lab grade` could not read.
CELL = """# Installs the library of this course where it is missing, as on a hosted service.
import importlib.util
import subprocess
import sys
wheel = {wheel}
if importlib.util.find_spec("qlora_lab") is None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*command, wheel], check=True)
    importlib.invalidate_caches()
    importlib.import_module("qlora_lab.files.hosted").install_unmet()"""
_MARK = CELL.partition("\n")[0].encode()
# https alone: what the address sends is installed, and run.
_ADDRESS = re.compile(r"(git\+)?https://[^\s\"'\ud800-\udfff]+")  # a lone surrogate: bytes that are not UTF-8
_WHEEL = re.compile(r"qlora_lab-[\w.+!]+-py3-none-any\.whl")


def wheel_beside(where: str) -> Path | None:
    """Return the wheel on this machine that `where` names, or None for an address.

    Raises ValueError for what is neither an https address nor the path of a wheel of this library, and
    FileNotFoundError for a wheel that is not there.
    """
    if _ADDRESS.fullmatch(where):
        return None
    if "://" in where:
        raise ValueError(f"{where!r} is not allowed: give an address that begins with https:// or git+https://")
    # the name is pip's own proof of what a wheel holds: it refuses a renamed one
    path = expanded(where)
    if not _WHEEL.fullmatch(path.name):
        rule = "is neither an https address nor a wheel of this library, qlora_lab-VERSION-py3-none-any.whl"
        raise ValueError(f"{where!r} {rule}: build one with `pip wheel --no-deps .`")
    if not path.is_file():
        raise FileNotFoundError(f"there is no wheel {path}: build it with `pip wheel --no-deps .`")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged, or no wheel: build it again with `pip wheel --no-deps .`")
    return path


def with_setup(notebook: bytes, wheel: str) -> bytes:
    """Return a notebook with the cell in front. wheel: an address, or a path as seen from the notebook's folder."""
    content = parse(decoded(notebook, "a notebook of the course"), "a notebook of the course")
    # JSON's quotes are Python's, too. Its escapes are not: of a letter beyond 16 bits it makes two halves
    lines = CELL.format(wheel=json.dumps(wheel, ensure_ascii=False)).splitlines(keepends=True)
    cell = {"cell_type": "code", "execution_count": None, "id": "setup", "metadata": {"tags": ["setup"]}}
    content["cells"].insert(0, cell | {"outputs": [], "source": lines})
    # as nbformat writes it, so that a copy differs from the course in this cell alone
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def has_setup(file: Path) -> bool:
    """Tell whether a file is a notebook with the cell in front, whichever editor has saved it."""
    return file.suffix == ".ipynb" and file.is_file() and _MARK in file.read_bytes()


def install_unmet() -> None:
    """Install what the library needs and the service lacks, with this environment's pip. The cell calls it.

    Warns of a part of the service that is older than the course asks for. Raises CalledProcessError if pip fails.
    """
    lacking = unmet()
    # all at once, so that pip finds versions that fit each other
    absent = [package for package in lacking if package.installed is None and package.name != "jupyterlab"]
    wanted = [package.requirement for package in lacking if package.name not in PARTS_OF_SERVICE or package in absent]
    if wanted:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
    older = [package for package in lacking if package.name in PARTS_OF_SERVICE and package.installed]
    if older:
        names = ", ".join(f"{package.name} {package.installed} (tested: {package.requirement})" for package in older)
        kept = "they belong to this service and were kept; live views during training may appear only at the end"
        warnings.warn(f"{names}: {kept}", stacklevel=2)
