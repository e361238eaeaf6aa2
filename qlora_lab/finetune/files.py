"""Nothing half-written: a folder is made under a temporary name beside its place, and renamed when it is complete and
on the disk.

But: a rename over a folder that is not empty does not exist, so the old one is moved aside first, moved back if the new
one cannot take its place, and removed last.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_folder(target: str | Path) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `target` on success and vanishes on an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    new.mkdir()
    try:
        yield new
        for path in [*new.rglob("*"), new]:
            sync(path)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yields the name of a file to write; it takes the place of `target` on success and vanishes on an error."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        new = Path(scratch) / target.name
        yield new
        sync(new)
        new.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and would survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
