"""Write a file or folder whole or not at all: under a temporary name, synced, then renamed into its place.

On an error, what was there stays. Where the system can swap two names (Linux), a new folder replaces an old one in one
step, so a reader always finds one of the two.
But: elsewhere no rename replaces a folder that is not empty. There the old one is moved aside first, moved back if the
new one cannot take its place, and removed last.
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
    """Yield an empty folder to fill; it becomes `target` on success and vanishes on an error.

    owner: as for scratch_for. A link is followed, and remains a link.
    """
    owner = owner or out_path(target).parent  # the folder of a link, not of its target
    target = resolved(out_path(target))
    disk.make_folder(target.parent)
    with scratch_for(target, owner) as scratch:
        new = scratch / "new"  # same disk as the target, so a rename suffices
        disk.make_folder(new)
        yield new
        for path in [*new.rglob("*"), new]:
            sync(path)  # before the rename, which may otherwise reach the disk first: a name without content
        _take_place(new, target, scratch / "old")
        sync(target.parent)


def _take_place(new: Path, target: Path, old: Path) -> None:
    """Rename `new` to `target`; a folder of that name goes into scratch."""
    if not target.exists():
        disk.rename(new, target)
    elif not disk.exchange(new, target):
        disk.rename(target, old)
        try:
            disk.rename(new, target)
        except OSError:
            disk.rename(old, target)  # as it was
            raise


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield the path of a file to write; the file replaces `target` on success and vanishes on an error."""
    owner = target.parent  # of a link, not of what it leads to
    target = resolved(target)
    with scratch_for(target, owner) as scratch:
        new = scratch / target.name
        yield new
        sync(new)
        disk.rename(new, target)
    sync(target.parent)  # the new name, too, survives a power cut


def replace_text(target: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all: a reader finds the old file or the new one."""
    with replacing_file(target) as new:
        disk.write_text(new, text)


def replace_bytes(target: Path, data: bytes) -> None:
    with replacing_file(target) as new:
        disk.write_bytes(new, data)


@contextmanager
def scratch_for(target: Path, owner: Path | None = None) -> Iterator[Path]:
    """Yield a scratch folder on the disk of `target`, for what is unfinished or replaced; it vanishes at the end.

    The mark of `owner` names it, or else a lock beside the target does, so what a killed process leaves can be found.
    owner: by default the folder that holds `target`.
    """
    if not (recorded := scratch_name(owner or target.parent)):
        with locked_file(target, "save", wait=True) as lock:
            disk.make_folder(lock.scratch)
            yield lock.scratch  # the lock removes it
        return
    home = target.parent / recorded
    disk.make_folder(home)
    try:
        with disk.scratch(home, f".{target.name}-") as scratch:
            yield scratch
    finally:
        disk.remove_if_empty(home)  # others may have scratch there
