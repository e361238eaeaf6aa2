"""Nothing half-written: a folder is made under a temporary name beside its place, and renamed when it is complete and
on the disk.

But: a rename over a folder that is not empty does not exist, so the old one is moved aside first, moved back if the new
one cannot take its place, and removed last.
Not here: whether `target` may be replaced (run_folder.py, and each writer).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_lab.finetune.ownership import scratch_name
from qlora_lab.quant.out_path import out_path


@contextmanager
def replacing_folder(target: str | Path, owner: Path | None = None) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `target` on success and vanishes on an error.

    owner: as for scratch_for. A link is followed, and stays.
    """
    owner = owner or out_path(target).parent  # a link's own folder, not that of what it leads to
    target = out_path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_for(target, owner) as scratch:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
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


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yields the name of a file to write; it takes the place of `target` on success and vanishes on an error."""
    owner, target = target.parent, target.resolve()
    with scratch_for(target, owner) as scratch:
        new = scratch / target.name
        yield new
        sync(new)
        new.replace(target)
    sync(target.parent)


@contextmanager
def scratch_for(target: Path, owner: Path | None = None) -> Iterator[Path]:
    """Yields a folder on the disk of `target` for what is not whole yet, or no longer; it vanishes in the end.

    It lies beside the target, in the folder that the mark of `owner` names, if there is one: what a killed process
    leaves is then found. owner: whose mark it is, by default that of the folder that holds `target`.
    """
    home = target.parent
    if recorded := scratch_name(owner or home):
        home = home / recorded
        home.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=home))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if recorded:
            with suppress(OSError):  # it holds something else
                home.rmdir()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and would survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
