"""The path that results are written to: what a user names, before anything is computed.

Not here: whether what lies there may be replaced (finetune/ownership.py and each writer).
"""

from pathlib import Path


def out_path(path: str | Path) -> Path:
    """The path, unless it is empty: Path("") would be the current folder. Raises ValueError for ""."""
    if not str(path):
        raise ValueError("the path is empty, as that of a shell variable that is not set: name where results go")
    return Path(path)
