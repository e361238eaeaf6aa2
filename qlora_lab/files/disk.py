"""The few calls by which anything of ours reaches a disk: whatever writes, renames or removes does it here.

In: paths of files and folders. Out: the same on the disk; an OSError otherwise.
One home for two reasons: a test makes each of them fail in turn, and what a full disk or another system does
differently is mended once.
Not here: what is written under another name first (files/replace.py), safetensors (there as well).
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

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h and linux/fs.h
# A kernel before 3.15, a file system that cannot, a sandbox that forbids calls that it does not know
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; it is not on the disk before `sync`."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def write_bytes(path: Path, data: bytes) -> None:
    """The same for bytes."""
    with open(path, "wb") as file:
        file.write(data)


def open_for(path: Path, mode: str) -> IO[bytes]:
    """Open a file of bytes to append ("ab") or to change ("r+b"), without a buffer: each write is one call."""
    return open(path, mode, buffering=0)


def write_all(file: IO[bytes], data: bytes) -> None:
    """Write to a file without a buffer, which may take a part: the rest is written next, or the disk says why not."""
    while data:
        data = data[file.write(data) :]


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and would survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(path: Path, target: Path) -> None:
    """Give a file or folder another name; a file that has it already is replaced, and so is an empty folder."""
    os.replace(path, target)


def exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step. False: this system cannot, and nothing was done."""
    try:
        _renameat2(a, b)
    except OSError as error:
        if error.errno in NO_EXCHANGE:
            return False
        raise
    return True


def make_folder(path: Path) -> None:
    """Make a folder and those around it; one that is there is left as it is."""
    path.mkdir(parents=True, exist_ok=True)


@contextmanager
def scratch(home: Path, prefix: str) -> Iterator[Path]:
    """Yields a new folder of an unguessable name in `home`; it vanishes in the end, as far as the disk lets it."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
    try:
        yield folder
    finally:
        remove_if_possible(folder)


def unnamed_file(folder: str | Path | None) -> IO[bytes]:
    """Open a file without a name in `folder`, to write and read: it is gone with the process, however that ends."""
    return tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - the caller closes it


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes, without its times and permissions."""
    shutil.copyfile(source, target)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder with all that it holds into one that may be there."""
    shutil.copytree(source, target, dirs_exist_ok=True)


def copy_mode(source: Path, target: Path) -> None:
    """Give `target` the permissions of `source`."""
    shutil.copymode(source, target)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_if_possible(path: Path) -> None:
    """The same for scratch, whose rest is found by its name later."""
    shutil.rmtree(path, ignore_errors=True)


def remove_if_empty(path: Path) -> bool:
    """Remove an empty folder; returns whether it was one."""
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def _renameat2(a: Path, b: Path) -> None:
    """Raises OSError with ENOSYS where the C library lacks it: glibc has it since 2.28."""
    call = _exchanging()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(a))
    if call(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(a), None, str(b))


@cache
def _exchanging():
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call
