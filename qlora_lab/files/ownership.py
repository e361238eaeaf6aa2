"""The mark of a folder of ours: a small file that says what wrote the folder, and where its scratch lies.

    qlora-lab.json   {"application": "qlora_lab run", "scratch": ".qlora-lab-0123456789abcdef0123456789abcdef"}

Scratch holds what is unfinished or about to be removed. Its name has 128 random bits and reaches the disk before the
scratch does: a folder of that name is ours and is removed after a kill; any other is somebody's own.
"""

import json
import os
import re
from pathlib import Path

from qlora_lab.files import disk
from qlora_lab.files.lock import SCRATCH, scratch_name as new_name
from qlora_lab.files.strict_json import read_json

MARK = "qlora-lab.json"
RUN = "qlora_lab run"  # what may have written a folder
QUANTISED = "qlora_lab quantize"


def mark(folder: Path, application: str) -> str:
    """Mark `folder` as ours, unless it is already, and return its scratch's name. The caller decides if it may be ours.

    Raises FileExistsError if anything else has left a mark.
    """
    if not is_marked(folder, application):
        if is_marked_otherwise(folder, application):
            raise FileExistsError(f"{folder / MARK} was not written by {application}: choose another folder")
        try:
            disk.write_text(folder / MARK, _text(application, new_name()))
            disk.sync(folder / MARK)  # before any scratch of that name exists
        except OSError:  # a full disk may leave a part, which the next call would take for somebody's own
            disk.remove(folder / MARK)
            raise
    return scratch_name(folder)


def is_marked(folder: Path, application: str) -> bool:
    return scratch_name(folder) is not None and read_object(folder / MARK)["application"] == application


def is_marked_otherwise(folder: Path, application: str) -> bool:
    """Tell whether anything but `application` left a file of the mark's name."""
    ours = is_marked(folder, application) or is_cut(folder, application)  # also half-written
    return os.path.lexists(folder / MARK) and not ours


def is_cut(folder: Path, application: str) -> bool:
    """Tell whether a kill left a mark of `application` half-written: an empty file, or its beginning."""
    if not (folder / MARK).is_file():
        return False
    whole = _text(application, f".qlora-lab-{'0' * 32}")
    with (folder / MARK).open("rb") as file:
        start = file.read(len(whole)).decode("ascii", "replace")
    without_digits = re.sub(r"(?<=lab-)[0-9a-f]+", lambda digits: "0" * len(digits[0]), start)  # they are random
    return len(start) < len(whole) and whole.startswith(without_digits)


def _text(application: str, scratch: str) -> str:
    return json.dumps({"application": application, "scratch": scratch}) + "\n"


def scratch_name(folder: Path) -> str | None:
    """Return the recorded name of the scratch in `folder`; None without a mark of ours."""
    content = read_object(folder / MARK)
    name = content.get("scratch")  # checked below: the file may be anybody's
    ours = content.get("application") in (RUN, QUANTISED) and isinstance(name, str) and SCRATCH.fullmatch(name)
    return name if ours else None


def read_object(file: Path) -> dict:
    """Return the JSON object in `file`; an empty one if there is no file, or anything else in it."""
    try:
        return read_json(file) if file.is_file() else {}
    except ValueError:
        return {}
