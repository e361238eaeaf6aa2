"""The mark of a folder that is ours: a small file that says what wrote the folder, and where its scratch lies.

    qlora-lab.json   {"application": "qlora_lab run", "scratch": ".qlora-lab-0123456789abcdef0123456789abcdef"}

Scratch is what is not whole yet, or about to be removed. Its name has 128 random bits and is on the disk before the
scratch is: a folder of that name is ours and is removed after a kill; one of any other name is somebody's own.
Not here: what a run may replace (run_folder.py).
"""

import json
import os
import re
from pathlib import Path

from qlora_lab.files import disk
from qlora_lab.files.lock import SCRATCH, scratch_name as new_name
from qlora_lab.files.strict_json import read_json

MARK = "qlora-lab.json"
RUN, QUANTISED = "qlora_lab run", "qlora_lab quantize"  # what writes a folder


def mark(folder: Path, application: str) -> str:
    """Mark `folder` as ours, unless it is; returns the name of its scratch. Whether it may be ours is the caller's.

    Raises FileExistsError for a mark of anything else.
    """
    if not is_marked(folder, application):
        if is_marked_otherwise(folder, application):
            raise FileExistsError(f"{folder / MARK} was not written by {application}: choose another folder")
        try:
            disk.write_text(folder / MARK, _text(application, new_name()))
            disk.sync(folder / MARK)
        except OSError:  # a full disk may leave a part, which would be somebody's own
            disk.remove(folder / MARK)
            raise
    return scratch_name(folder)


def is_marked(folder: Path, application: str) -> bool:
    """Whether `application` wrote `folder`."""
    return scratch_name(folder) is not None and read_object(folder / MARK)["application"] == application


def is_marked_otherwise(folder: Path, application: str) -> bool:
    """Whether anything but `application` left something under the mark's name."""
    ours = is_marked(folder, application) or is_cut(folder, application)
    return os.path.lexists(folder / MARK) and not ours


def is_cut(folder: Path, application: str) -> bool:
    """Whether a kill left the beginning of a mark of `application`: an empty file, or more."""
    if not (folder / MARK).is_file():
        return False
    whole = _text(application, f".qlora-lab-{'0' * 32}")
    with (folder / MARK).open("rb") as file:
        found = file.read(len(whole)).decode("ascii", "replace")
    without_digits = re.sub(r"(?<=lab-)[0-9a-f]+", lambda digits: "0" * len(digits[0]), found)
    return len(found) < len(whole) and whole.startswith(without_digits)


def _text(application: str, scratch: str) -> str:
    return json.dumps({"application": application, "scratch": scratch}) + "\n"


def scratch_name(folder: Path) -> str | None:
    """The recorded name of the scratch in `folder`; None where the folder has no mark of ours."""
    content = read_object(folder / MARK)
    name = content.get("scratch")
    ours = content.get("application") in (RUN, QUANTISED) and isinstance(name, str) and SCRATCH.fullmatch(name)
    return name if ours else None


def read_object(file: Path) -> dict:
    """The JSON object in `file`; an empty one for a file of anything else, and for none."""
    try:
        return read_json(file) if file.is_file() else {}
    except ValueError:
        return {}
