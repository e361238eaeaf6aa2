"""Nothing half-written: a folder is made under a temporary name beside its place, and takes it when it is complete and
on the disk.

Where the system can exchange two names (Linux), an earlier folder gives its name to the new one in one step: a reader
finds the one or the other, always.
But: elsewhere a rename over a folder that is not empty does not exist, so the old one is moved aside first, moved back
if the new one cannot take its place, and removed last.
Not here: whether `target` may be replaced (run_folder.py, and each writer), the calls themselves (files/disk.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_lab.files import disk
from qlora_lab.files.disk import sync
from qlora_lab.files.lock import locked_file
from qlora_lab.files.out_path import out_path, resolved
from qlora_lab.files.ownership import scratch_name


@contextmanager
def replacing_folder(target: str | Path, owner: Path | None = None) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `target` on success and vanishes on an error.

    owner: as for scratch_for. A link is followed, and stays.
    """
    owner = owner or out_path(target).parent  # a link's own folder, not that of what it leads to
    target = resolved(out_path(target))
    disk.make_folder(target.parent)
    with scratch_for(target, owner) as scratch:
        new = scratch / "new"
        disk.make_folder(new)
        yield new
        for path in [*new.rglob("*"), new]:
            sync(path)
        _take_place(new, target, scratch / "old")
        sync(target.parent)


def _take_place(new: Path, target: Path, old: Path) -> None:
    """Give `new` the name `target`; what has it goes into scratch."""
    if not target.exists():
        disk.rename(new, target)
    elif not disk.exchange(new, target):
        disk.rename(target, old)
        try:
            disk.rename(new, target)
        except OSError:
            disk.rename(old, target)
            raise


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yields the name of a file to write; it takes the place of `target` on success and vanishes on an error."""
    owner = target.parent  # of a link, not of what it leads to
    target = resolved(target)
    with scratch_for(target, owner) as scratch:
        new = scratch / target.name
        yield new
        sync(new)
        disk.rename(new, target)
    sync(target.parent)


def replace_text(target: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all: a reader finds the old file or the new one."""
    with replacing_file(target) as new:
        disk.write_text(new, text)


def replace_bytes(target: Path, data: bytes) -> None:
    """Write a file of bytes, whole or not at all."""
    with replacing_file(target) as new:
        disk.write_bytes(new, data)


@contextmanager
def scratch_for(target: Path, owner: Path | None = None) -> Iterator[Path]:
    """Yields a folder on the disk of `target` for what is not whole yet, or no longer; it vanishes in the end.

    It lies beside the target, in the folder that the mark of `owner` names, else in one that a lock beside the target
    names: what a killed process leaves is then found. owner: by default the folder that holds `target`.
    """
    if not (recorded := scratch_name(owner or target.parent)):
        with locked_file(target, "save", wait=True) as lock:
            disk.make_folder(lock.scratch)
            yield lock.scratch
        return
    home = target.parent / recorded
    disk.make_folder(home)
    try:
        with disk.scratch(home, f".{target.name}-") as scratch:
            yield scratch
    finally:
        disk.remove_if_empty(home)
