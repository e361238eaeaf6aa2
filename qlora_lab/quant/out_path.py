"""The path that results are written to: what a user names, before anything is computed.

Not here: whether what lies there may be replaced (finetune/ownership.py and each writer).
"""

import errno
import os
from pathlib import Path


def out_path(path: str | Path) -> Path:
    """The path. Raises ValueError for "", as Path("") would be the current folder, and for a link to itself."""
    if not str(path):
        raise ValueError("the path is empty, as that of a shell variable that is not set: name where results go")
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:  # before Python 3.13, Path.resolve has a RuntimeError for it
            raise ValueError(f"{path} leads through a link that leads to itself: name another place") from None
    return Path(path)
