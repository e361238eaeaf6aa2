"""Check the path that a user names for results, before anything is computed."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from qlora_lab.files.home import expanded


def out_path(path: str | Path) -> Path:
    """Return the path, ~ expanded, unless it is empty: Path("") would mean the current folder.

    Raises ValueError for "", and OSError for links that lead in a circle.
    """
    if not str(path):
        raise ValueError("the path is empty, perhaps because a shell variable is not set: name a place for the results")
    resolved(path)
    return expanded(path)


def out_file(path: str | Path) -> Path:
    """Do the same for a single file. Raises OSError where its folder is not there, or is known to be read-only."""
    place = out_path(path)
    parent = resolved(place).parent
    if not parent.is_dir():
        raise FileNotFoundError(f"there is no folder {parent}: create it, or choose another")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{parent} cannot be written to: choose another folder, or change its rights")
    return place


def out_replacing(path: str | Path, kind: str, read: Callable[[Path], object]) -> Path:
    """Do the same for a file that may replace an earlier one of its kind, and nothing else.

    kind: "a plan", say. read: raises ValueError for a file of another kind. Raises FileExistsError for such a file, and
    for a folder.
    """
    place = out_file(path)
    if place.exists() and not place.is_file():
        raise FileExistsError(f"{place} is not a file, so it cannot become {kind}: name a file")
    if place.exists():
        try:
            read(place)
        except ValueError as error:
            raise FileExistsError(f"{place} exists and is not {kind}, so it is kept: name another file") from error
    return place


def out_folder(path: str | Path) -> Path:
    """Do the same for a folder of weights. Raises ValueError also where it is not UTF-8, as safetensors demands."""
    place = out_path(path)
    try:
        str(resolved(place)).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{ascii(str(path))} is not UTF-8, so no weights can be written there: name another") from None
    return place


def check_apart(out: str | Path, *inputs: str | Path) -> None:
    """Raise ValueError if `out` lies in a folder that is read for it, or contains one. The same path is allowed here.

    A lock, a scratch folder and the result would lie among files that are somebody's own. An input that is not there,
    such as the name of a model on a hub, is apart.
    """
    place = resolved(out)
    for source in inputs:
        if not resolved(source).exists():
            continue
        check_outside(out, source)
        if place in resolved(source).parents:
            raise ValueError(f"{out} contains {source}, which is an input: choose a folder beside it")


def check_outside(out: str | Path, source: str | Path) -> None:
    """Raise ValueError if `out` lies in the folder `source`. It may contain it, as a run may lie beside its model."""
    if resolved(source) in resolved(out).parents:
        raise ValueError(f"{out} lies inside {source}, which is an input: choose a place outside of it")


def check_outside_model(out: str | Path, model: str | Path | None) -> None:
    """Do the same for what a model was loaded from, if that is a folder: a name on the hub is none."""
    if model and os.path.isfile(expanded(model) / "config.json"):
        check_outside(out, model)


def resolved(path: str | Path) -> Path:
    """Expand ~ and follow all links. Raises OSError where they form a circle, for which Python raises RuntimeError."""
    try:
        return expanded(path).resolve()
    except RuntimeError:
        raise OSError(errno.ELOOP, "Links lead in a circle, so name another place", str(path)) from None
