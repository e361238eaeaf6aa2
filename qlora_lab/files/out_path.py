"""The path that results are written to: what a user names, before anything is computed.

Not here: whether what lies there may be replaced (files/ownership.py and each writer).
"""

import errno
from pathlib import Path


def out_path(path: str | Path) -> Path:
    """The path, unless it is empty: Path("") would be the current folder.

    Raises ValueError for "", and OSError for links that lead in a circle.
    """
    if not str(path):
        raise ValueError("the path is empty, as that of a shell variable that is not set: name where results go")
    resolved(path)
    return Path(path)


def out_folder(path: str | Path) -> Path:
    """The same for a folder of weights, whose library opens no path that is not UTF-8: raises ValueError for one."""
    try:
        str(resolved(out_path(path))).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{ascii(str(path))} is not UTF-8, so no weights can be written there: name another") from None
    return Path(path)


def resolved(path: str | Path) -> Path:
    """The path without links. Raises OSError where they lead in a circle, which Python tells as a RuntimeError."""
    try:
        return Path(path).resolve()
    except RuntimeError:
        raise OSError(errno.ELOOP, "Links lead in a circle, so name another place", str(path)) from None
