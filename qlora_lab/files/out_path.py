"""Check the path that a user names for results, before anything is computed."""

import errno
from pathlib import Path


def out_path(path: str | Path) -> Path:
    """Return the path, unless it is empty: Path("") would mean the current folder.

    Raises ValueError for "", and OSError for links that lead in a circle.
    """
    if not str(path):
        raise ValueError("the path is empty, perhaps because a shell variable is not set: name a place for the results")
    resolved(path)
    return Path(path)


def out_folder(path: str | Path) -> Path:
    """Return the path of a folder of weights. Raises ValueError also where it is not UTF-8, as safetensors demands."""
    try:
        str(resolved(out_path(path))).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{ascii(str(path))} is not UTF-8, so no weights can be written there: name another") from None
    return Path(path)


def resolved(path: str | Path) -> Path:
    """Follow all links of a path. Raises OSError where they form a circle, for which Python raises RuntimeError."""
    try:
        return Path(path).resolve()
    except RuntimeError:
        raise OSError(errno.ELOOP, "Links lead in a circle, so name another place", str(path)) from None
