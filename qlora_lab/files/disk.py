"""The few calls by which anything of ours reaches a disk: all writing, renaming and removing is done here.

One home for two reasons: a test makes each call fail in turn, and what a full disk or another system does differently
is handled once.
"""

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

AT_FDCWD = -100  # linux/fcntl.h: paths are relative to the current folder
RENAME_EXCHANGE = 2  # linux/fs.h
# A kernel before 3.15; a file system without it (twice); a sandbox that forbids unknown calls.
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8. It survives a power cut only after `sync`."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def write_bytes(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def open_for(path: Path, mode: str) -> IO[bytes]:
    """Open a file of bytes to append ("ab") or to change ("r+b"), without a buffer: each write is one call."""
    return open(path, mode, buffering=0)  # an error belongs to its write, not to a later flush


def write_all(file: IO[bytes], data: bytes) -> None:
    """Write all of `data` to a file without a buffer, however small the parts that it takes."""
    while data:  # a nearly full disk takes a part, and raises for the rest
        data = data[file.write(data) :]


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(path: Path, target: Path) -> None:
    """Rename a file or folder, replacing a file or an empty folder of that name."""
    os.replace(path, target)  # os.rename refuses to replace a file on Windows


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step. Returns False, and does nothing, where the system cannot."""
    try:
        _renameat2(a, b)
    except OSError as error:
        if error.errno in NO_EXCHANGE:
            return False
        raise
    return True


def make_folder(path: Path) -> None:
    """Make a folder and its parents; an existing one stays as it is."""
    path.mkdir(parents=True, exist_ok=True)  # as `mkdir -p`


@contextmanager
def scratch(home: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder with an unguessable name in `home`, and remove it at the end, if the disk allows."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
    try:
        yield folder
    finally:
        remove_if_possible(folder)


def unnamed_file(folder: str | Path | None) -> IO[bytes]:
    """Open a nameless file in `folder` to write and read: it is gone when the process ends, however it ends."""
    return tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - the caller closes it


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes, without its times and permissions."""
    shutil.copyfile(source, target)  # permissions by umask, as for a file of ours


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder with all its content into one that may exist already."""
    shutil.copytree(source, target, dirs_exist_ok=True)


def copy_mode(source: Path, target: Path) -> None:
    shutil.copymode(source, target)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all its content; do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():  # of a link, remove the link alone
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_if_possible(path: Path) -> None:
    """Remove a scratch folder as far as possible; what is left is found by its name later."""
    shutil.rmtree(path, ignore_errors=True)  # never in the way of the error that led here


def remove_if_empty(path: Path) -> bool:
    """Remove a folder if it is empty. Returns whether it was."""
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def _renameat2(a: Path, b: Path) -> None:
    """Call renameat2. Raises OSError with ENOSYS where the C library lacks it: glibc has it since 2.28."""
    call = _exchanging()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(a))
    if call(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE):
        number = ctypes.get_errno()  # C's errno, which Python keeps for us
        raise OSError(number, os.strerror(number), str(a), None, str(b))


@cache
def _exchanging():
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Python has no name for it
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call
