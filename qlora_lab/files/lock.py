"""One command at a time for a folder or a file: a lock that the system releases when its process dies.

Its `with` block is for only one process at a time, and one thread of it.
The lock file lies in the folder, or beside the file, and says who is in the block:

    .qlora-lab.lock   {"application": "qlora_lab lock", "command": "finetune", "pid": 1234, "host": "lab", "since": ...}

What counts is the kernel's lock on that file (flock). It ends with its process, even after kill -9, so a file that was
left behind is silently taken over. The end of the block removes the file. A process that had it open by then would lock
a file without a name, so after locking each process checks that its file still has the name, and otherwise tries again.
A lock also names a scratch folder beside its file: the next lock removes what a killed process left there.
Not here: Windows, and file systems without locks (with a warning): there the user must not run two commands at once.
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

LOCK = ".qlora-lab.lock"
APPLICATION = "qlora_lab lock"
SCRATCH = re.compile(r"\.qlora-lab-[0-9a-f]{32}")  # nothing else is ever removed
LENGTH = 1024  # bytes of the file, padded: each write replaces all of the one before
GRACE = 2.0  # seconds that a process has, once it got the lock, to say who it is
QUIET = 0.5  # seconds of waiting before a warning
OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # neither links nor FIFOs


@dataclass(eq=False)
class Lock:
    file: Path
    handle: int
    scratch: Path  # a folder for unfinished files: the lock's user makes it, the lock removes it
    made: list[Path]  # parents of the file that did not exist before
    process: int  # a forked child has the object too, but not the lock


_held: set[Lock] = set()
_reserved: dict[Path, Lock] = {}  # lock file -> a lock of this process that its next asker gets


def scratch_name() -> str:
    """Return a name with 128 random bits, which no other folder has."""
    return f".qlora-lab-{secrets.token_hex(16)}"


@contextmanager
def locked_folder(folder: str | Path, command: str) -> Iterator[Lock]:
    """Enter this `with` block for `folder` alone. A folder that it has to make is removed at the end if it is empty.

    Raises BlockingIOError, which says who is in the block and since when; FileExistsError where a file is in the way,
    or a user's file has the lock's name; PermissionError for a folder that cannot be written to.
    """
    with _locked(resolved(folder) / LOCK, Path(folder), command) as lock:
        yield lock


@contextmanager
def locked_file(file: str | Path, command: str, wait: bool = False) -> Iterator[Lock]:
    """Do the same for a file, or a folder that does not exist yet. wait: for another process, after a warning."""
    target = resolved(file)
    with _locked(target.with_name(f".{target.name}{LOCK}"), Path(file), command, wait) as lock:
        yield lock


@contextmanager
def reserved(lock: Lock) -> Iterator[Lock]:
    """Lend a lock to callers in this process that ask for it inside the block, one at a time."""
    _reserved[lock.file] = lock
    try:
        yield lock
    finally:
        _reserved.pop(lock.file, None)


def clear_after_kill(file: str | Path, command: str) -> None:
    """Remove what a killed process left beside `file`, unless another process has the lock."""
    target = resolved(file)
    if target.with_name(f".{target.name}{LOCK}").exists():
        with suppress(OSError), locked_file(target, command):
            pass


# ------------------------------------------------------------------------------------------------------- getting a lock


@contextmanager
def _locked(file: Path, target: Path, command: str, wait: bool = False) -> Iterator[Lock]:
    if lock := _reserved.pop(file, None):  # popped: a second thread must not get it too
        try:
            yield lock
        finally:
            if lock in _held:  # else its own block has ended meanwhile
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
    """Wait for the lock and return the file's handle; `made` takes the folders that had to be made."""
    start = time.monotonic()
    warned = False
    while True:
        handle = _opened(file, target, made)
        try:
            got = handle is not None and _got(handle, target)
            if got and _has_name(handle, file):
                if os.fstat(handle).st_size and _content(handle) is None:  # a killed process of ours may leave it empty
                    raise _not_ours(file)
                kept = handle
                handle = None  # not to be closed below
                return kept
            holder = None if got or handle is None else _content(handle)  # who has it
        finally:
            if handle is not None:
                os.close(handle)
        if holder and not wait:
            raise BlockingIOError(f"{_in_use(target, holder)}: wait until it has ended, or name another place")
        waited = time.monotonic() - start  # seconds
        if holder and not warned and waited > QUIET:
            warnings.warn(f"{_in_use(target, holder)}: waiting until it has ended", stacklevel=2)
            warned = True
        if handle is None and not got and waited > GRACE:  # as in /proc, where no folder can be made
            raise FileNotFoundError(f"{file.parent} cannot be made: name another place")
        if not (holder or got or handle is None) and waited > GRACE:
            raise BlockingIOError(f"{target} is in use by another process, which does not say who it is: wait for it")
        time.sleep(0.02)  # flock could wait by itself, but not until a time


def _opened(file: Path, target: Path, made: list[Path]) -> int | None:
    """Open the lock file. None: another process removed the folder at this moment."""
    try:
        made += _make(file.parent)
        handle = os.open(file, OPEN, 0o666)  # the user's umask applies
    except FileNotFoundError:
        return None
    except (FileExistsError, NotADirectoryError):
        raise FileExistsError(f"{target} cannot be made because a file is in the way: name another folder") from None
    except OSError as error:
        if error.errno == errno.ELOOP or os.path.isdir(file):
            raise _not_ours(file) from None
        explained = type(error)(_not_writable(file, error))
        explained.errno = error.errno
        raise explained from None
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise _not_ours(file)


def _not_writable(file: Path, error: OSError) -> str:
    if isinstance(error, PermissionError) and os.path.lexists(file):  # in a sticky folder even root may not
        remedy = "remove it if no command of theirs is writing there, or name another place"
        return f"{file} is the lock of another user ({error.strerror}): {remedy}"
    return f"{file.parent} cannot be written to ({error.strerror}): name another place"


def _make(folder: Path) -> list[Path]:
    """Make a folder and its parents. Returns those that did not exist."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    made = []
    for path in reversed(missing):
        with suppress(FileExistsError):  # another process made it first
            path.mkdir()
            made.append(path)
    if not folder.is_dir() and os.path.lexists(folder):
        raise NotADirectoryError(folder)
    return made


def _got(handle: int, target: Path) -> bool:
    """Ask for the kernel's lock; tell whether this process has it now."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks, as on some clusters
        remedy = "let no other command write there meanwhile"
        warnings.warn(f"{target} cannot be locked ({error.strerror}): {remedy}", stacklevel=2)
    return True


def _has_name(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.lstat())
    except OSError:  # removed; on NFS the handle may be stale as well
        return False


# ------------------------------------------------------------------------------------------------- what its file says


def _sign(lock: Lock, command: str) -> None:
    """Write who has the lock, then remove the scratch of a killed process."""
    left = _scratch_of(_content(lock.handle))  # of the last holder, if it was killed
    about = {
        "application": APPLICATION,
        "command": command,
        "pid": os.getpid(),
        "host": node(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),  # local time: for a person to read
    }
    _write(lock.handle, about | {"scratch": [lock.scratch.name, *left]})
    for name in left:
        disk.remove_if_possible(lock.file.with_name(name))
    if left:
        _write(lock.handle, about | {"scratch": [lock.scratch.name]})


def _write(handle: int, content: dict) -> None:
    length = max(LENGTH, os.fstat(handle).st_size)  # covers all of an older, longer line
    os.lseek(handle, 0, os.SEEK_SET)
    line = json.dumps(content).encode().ljust(length - 1) + b"\n"
    while line:  # a nearly full disk takes a part, and raises for the rest
        line = line[os.write(handle, line) :]
    os.fsync(handle)  # a scratch folder's name is on the disk before the folder


def _content(handle: int) -> dict | None:
    """Return what the holder wrote; None for an empty file and for anything else."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        content = parse(os.read(handle, 64 * LENGTH).decode(), "the lock")
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.get("application") == APPLICATION else None


def _scratch_of(content: dict | None) -> list[str]:
    names = (content or {}).get("scratch")
    names = names if isinstance(names, list) else []  # the file may be anybody's
    return [name for name in names if isinstance(name, str) and SCRATCH.fullmatch(name)]


def _not_ours(file: Path) -> FileExistsError:
    return FileExistsError(f"{file} was not written by qlora_lab: move it away, or name another place")


def _in_use(target: Path, holder: dict) -> str:
    who = f"process {holder.get('pid')} on {holder.get('host')}"
    if (holder.get("pid"), holder.get("host")) == (os.getpid(), node()):
        who = "this very process"
    return f"{target} is in use by {who} ({holder.get('command')}) since {holder.get('since')}"


# ------------------------------------------------------------------------------------------------------ giving it back


def _release(lock: Lock) -> None:
    if lock.process != os.getpid():  # a forked child leaves the block too, but the lock is its parent's
        return
    _held.discard(lock)
    disk.remove_if_possible(lock.scratch)
    left = lock.scratch.exists()  # its name stays in the lock file, for the next lock to remove it
    if not left and _has_name(lock.handle, lock.file):  # before it is closed: afterwards it may be another's
        with suppress(OSError):
            lock.file.unlink()  # one that is left behind does no harm
    os.close(lock.handle)


def _in_child() -> None:
    """Close inherited locks: a forked child shares them and would keep them when its parent dies."""
    for lock in _held:
        os.close(lock.handle)
    _held.clear()
    _reserved.clear()  # they name locks of the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
