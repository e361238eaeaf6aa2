"""One command at a time for a folder or a file: a lock that the system takes back when its process dies.

In: the path of what a command writes. Out: a `with` block that only one process, and only one thread of it, is in.
The lock file lies in the folder, or beside the file, and says who is in the block:

    .qlora-lab.lock   {"application": "qlora_lab lock", "command": "finetune", "pid": 1234, "host": "lab", "since": ...}

What counts is the kernel's lock on that file (flock): it dies with its process, also after kill -9, so a file that was
left behind is taken over in silence. The block's end removes the file. A process that had it open by then would hold a
lock on a file without a name: so whoever gets the lock looks whether its file still has the name, and else tries again.
A lock also names a scratch folder beside its file: what a killed process left in it goes with the next lock.
Not here: Windows, and file systems without locks (a warning says so): two commands at once are the user's care there.
"""

import errno
import json
import os
import re
import secrets
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from platform import node

from qlora_lab.files import disk
from qlora_lab.files.out_path import resolved
from qlora_lab.files.strict_json import parse

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK, APPLICATION = ".qlora-lab.lock", "qlora_lab lock"
SCRATCH = re.compile(r"\.qlora-lab-[0-9a-f]{32}")
LENGTH = 1024  # bytes of the file, padded: one write replaces another whole
GRACE = 2.0  # seconds for a process that has just got the lock to say who it is
QUIET = 0.5  # seconds for which a process waits without a word
OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # neither links nor FIFOs


@dataclass(eq=False)
class Lock:
    """A lock that is held. scratch: a folder for what is not whole yet: its user makes it, the lock removes it."""

    file: Path
    handle: int
    scratch: Path
    made: list[Path]  # parents of the file that were not there before
    process: int


_held: set[Lock] = set()
_reserved: dict[Path, Lock] = {}


def scratch_name() -> str:
    """A name with 128 random bits, which nobody else's folder has."""
    return f".qlora-lab-{secrets.token_hex(16)}"


@contextmanager
def locked_folder(folder: str | Path, command: str) -> Iterator[Lock]:
    """Only one is in this `with` block for `folder`, which is made if need be, and removed if it is empty then.

    Raises BlockingIOError, which says who is in it and since when; FileExistsError where no folder can be, or where a
    user's file has the lock's name; PermissionError for a folder that cannot be written to.
    """
    with _locked(resolved(folder) / LOCK, Path(folder), command) as lock:
        yield lock


@contextmanager
def locked_file(file: str | Path, command: str, wait: bool = False) -> Iterator[Lock]:
    """As locked_folder, for a file, or a folder that is not there yet. wait: for another to end, warning in time."""
    target = resolved(file)
    with _locked(target.with_name(f".{target.name}{LOCK}"), Path(file), command, wait) as lock:
        yield lock


@contextmanager
def reserved(lock: Lock) -> Iterator[Lock]:
    """Keep a lock for those who ask for it in this process: inside the block they get it, one at a time."""
    _reserved[lock.file] = lock
    try:
        yield lock
    finally:
        _reserved.pop(lock.file, None)


def clear_after_kill(file: str | Path, command: str) -> None:
    """Remove what a killed process left beside `file`; nothing while another process has the lock."""
    target = resolved(file)
    if target.with_name(f".{target.name}{LOCK}").exists():
        with suppress(OSError), locked_file(target, command):
            pass


# ------------------------------------------------------------------------------------------------------- getting a lock


@contextmanager
def _locked(file: Path, target: Path, command: str, wait: bool = False) -> Iterator[Lock]:
    if lock := _reserved.pop(file, None):
        try:
            yield lock
        finally:
            if lock in _held:
                _reserved[file] = lock
        return
    made: list[Path] = []
    try:
        handle = _handle(file, target, wait, made)
        lock = Lock(file, handle, file.with_name(scratch_name()), made, os.getpid())
        _held.add(lock)
        try:
            _sign(lock, command)
            yield lock
        finally:
            _release(lock)
    finally:
        for folder in reversed(made):
            disk.remove_if_empty(folder)


def _handle(file: Path, target: Path, wait: bool, made: list[Path]) -> int:
    """Of the lock file, when this process has the lock; `made` takes the folders that had to be made."""
    start, told = time.monotonic(), False
    while True:
        handle = _opened(file, target, made)
        try:
            got = handle is not None and _got(handle, target)
            if got and _has_name(handle, file):
                _check_ours(file, handle)
                kept, handle = handle, None
                return kept
            holder = None if got or handle is None else _content(handle)
        finally:
            if handle is not None:
                os.close(handle)
        if holder and not wait:
            raise BlockingIOError(f"{_told(target, holder)}: wait until it has ended, or name another place")
        waited = time.monotonic() - start
        if holder and not told and waited > QUIET:
            warnings.warn(f"{_told(target, holder)}: waiting until it has ended", stacklevel=2)
            told = True
        if handle is None and not got and waited > GRACE:  # as in /proc, where nobody can make a folder
            raise FileNotFoundError(f"{file.parent} cannot be made: name another place")
        if not (holder or got or handle is None) and waited > GRACE:
            raise BlockingIOError(f"{target} is in use by another process, which does not say who it is: wait for it")
        time.sleep(0.02)


def _opened(file: Path, target: Path, made: list[Path]) -> int | None:
    """None where another process removed the folder in this very moment."""
    try:
        made += _make(file.parent)
        handle = os.open(file, OPEN, 0o666)
    except FileNotFoundError:
        return None
    except (FileExistsError, NotADirectoryError):
        raise FileExistsError(f"{target} cannot be made, as a file is in its place: name another folder") from None
    except OSError as error:
        if error.errno == errno.ELOOP or os.path.isdir(file):
            raise _not_ours(file) from None
        told = type(error)(_not_writable(file, error))
        told.errno = error.errno
        raise told from None
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise _not_ours(file)


def _not_writable(file: Path, error: OSError) -> str:
    if isinstance(error, PermissionError) and os.path.lexists(file):  # also root may not, in a sticky folder
        alone = "if no command of theirs writes there now, remove it, or name another place"
        return f"{file} is the lock of another user ({error.strerror}): {alone}"
    return f"{file.parent} cannot be written to ({error.strerror}): name another place"


def _make(folder: Path) -> list[Path]:
    """The folder and its parents, as far as they were not there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    made = []
    for path in reversed(missing):
        with suppress(FileExistsError):  # another process was faster
            path.mkdir()
            made.append(path)
    if not folder.is_dir() and os.path.lexists(folder):
        raise NotADirectoryError(folder)
    return made


def _got(handle: int, target: Path) -> bool:
    """Whether this process has the kernel's lock now."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks, as some of clusters are
        alone = "let no other command write there meanwhile"
        warnings.warn(f"{target} cannot be locked ({error.strerror}): {alone}", stacklevel=2)
    return True


def _has_name(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.lstat())
    except OSError:  # removed; on NFS the handle may be stale, too
        return False


# ------------------------------------------------------------------------------------------------- what its file says


def _sign(lock: Lock, command: str) -> None:
    """Say who has the lock, then remove what a killed process had in its scratch."""
    left = _scratch_of(_content(lock.handle))
    about = {
        "application": APPLICATION,
        "command": command,
        "pid": os.getpid(),
        "host": node(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    _write(lock.handle, about | {"scratch": [lock.scratch.name, *left]})
    for name in left:
        disk.remove_if_possible(lock.file.with_name(name))
    if left:
        _write(lock.handle, about | {"scratch": [lock.scratch.name]})


def _write(handle: int, content: dict) -> None:
    length = max(LENGTH, os.fstat(handle).st_size)
    os.lseek(handle, 0, os.SEEK_SET)
    line = json.dumps(content).encode().ljust(length - 1) + b"\n"
    while line:  # nearly always once: a disk that is nearly full takes a part, and says why with the rest
        line = line[os.write(handle, line) :]
    os.fsync(handle)  # the name of a scratch folder is on the disk before the folder


def _content(handle: int) -> dict | None:
    """What its holder wrote; None for an empty file, and for anything else."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        content = parse(os.read(handle, 64 * LENGTH).decode(), "the lock")
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.get("application") == APPLICATION else None


def _scratch_of(content: dict | None) -> list[str]:
    names = (content or {}).get("scratch")
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and SCRATCH.fullmatch(name)]


def _check_ours(file: Path, handle: int) -> None:
    """Raise FileExistsError for a user's file; a process that was killed at once leaves an empty one of ours."""
    if os.fstat(handle).st_size and _content(handle) is None:
        raise _not_ours(file)


def _not_ours(file: Path) -> FileExistsError:
    return FileExistsError(f"{file} was not written by qlora_lab: move it away, or name another place")


def _told(target: Path, holder: dict) -> str:
    who = f"process {holder.get('pid')} on {holder.get('host')}"
    if (holder.get("pid"), holder.get("host")) == (os.getpid(), node()):
        who = "this very process"
    return f"{target} is in use by {who} ({holder.get('command')}) since {holder.get('since')}"


# ------------------------------------------------------------------------------------------------------ giving it back


def _release(lock: Lock) -> None:
    if lock.process != os.getpid():  # a forked child came out of the block, too
        return
    _held.discard(lock)
    disk.remove_if_possible(lock.scratch)
    left = lock.scratch.exists()  # its name stays in the lock file, for the next lock to remove it
    if not left and _has_name(lock.handle, lock.file):  # before it is closed: afterwards it may be another's
        with suppress(OSError):
            lock.file.unlink()
    os.close(lock.handle)


def _in_child() -> None:
    """A forked child shares the lock with its parent, and would keep it when the parent dies."""
    for lock in _held:
        os.close(lock.handle)
    _held.clear()
    _reserved.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
