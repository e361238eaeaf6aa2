"""Faults by count: the n-th thing that a command asks of the disk, or of memory, fails.

    with disk_faults(root) as seen:              # counts: seen.operations is [("write", path), ("fsync", path), ...]
        command()
    with disk_faults(root, at=3):                # the third fails: OSError, no space left on device
        command()
    with disk_faults(root, at=3, lasting=True):  # and so does all that takes room after it: a full disk
        command()
    with disk_faults(root, at=3, fail=die):      # or anything else: `die(kind, path)` is called instead of it
        command()
    with allocation_faults(at=3):                # the third operation of torch gets no memory
        command()

In: a folder; what happens elsewhere neither counts nor fails. An operation is "open" (of a file that is written),
"write", "fsync", "rename", "mkdir", "unlink" or "rmdir", as the system sees them: who asks for it does not matter.
A write that fails leaves its first half in the file.
Not here: kills from outside, which come at any moment (tools/trust.py).
"""

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from safetensors import SafetensorError
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lab.files import disk, tensor_file

TAKES_ROOM = ("open", "write", "fsync", "mkdir")
NO_MEMORY = (  # what torch 2.13 says on a CPU
    "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4194304 bytes. Error code 12 (Cannot allocate memory)"
)


def full(kind: str, path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@dataclass
class Seen:
    """What was asked for beneath `root`, and which of it fails."""

    root: Path
    at: int | None
    lasting: bool
    fail: Callable[[str, Path], None]
    operations: list[tuple[str, Path]] = field(default_factory=list)

    def happens(self, kind: str, path) -> bool:
        """Count one operation; returns whether it is to fail."""
        path = _path(path)
        if path is None or not path.is_relative_to(self.root):
            return False
        self.operations.append((kind, path))
        number = len(self.operations)
        return number == self.at or (self.lasting and self.at is not None and number > self.at and kind in TAKES_ROOM)

    def meets(self, kind: str, path) -> None:
        if self.happens(kind, path):
            self.fail(kind, _path(path))


@contextmanager
def disk_faults(
    root: Path, at: int | None = None, *, lasting: bool = False, fail: Callable[[str, Path], None] = full
) -> Iterator[Seen]:
    """Inside the `with` block operation number `at` beneath `root` fails, counted from one; None only counts."""
    seen = Seen(root.resolve(), at, lasting, fail)
    with ExitStack() as stack:
        for module, name, kind in (
            (os, "rename", "rename"),
            (os, "replace", "rename"),
            (os, "mkdir", "mkdir"),
            (os, "unlink", "unlink"),
            (os, "remove", "unlink"),
            (os, "rmdir", "rmdir"),
            (os, "fsync", "fsync"),
            (os, "write", "write"),
        ):
            stack.enter_context(mock.patch.object(module, name, _counted(getattr(module, name), kind, seen)))
        stack.enter_context(mock.patch.object(os, "open", _made(os.open, seen)))
        opened = _opened(io.open, seen)
        stack.enter_context(mock.patch.object(io, "open", opened))
        stack.enter_context(mock.patch.object(builtins, "open", opened))
        stack.enter_context(mock.patch.object(shutil, "_USE_CP_SENDFILE", False))  # copies by read and write
        stack.enter_context(mock.patch.object(tensor_file, "save_file", _saved(tensor_file.save_file, seen)))
        stack.enter_context(mock.patch.object(disk, "_renameat2", _exchanged(disk._renameat2, seen)))
        yield seen


def _path(path) -> Path | None:
    """Where a path, or a number of an open file, is; None for what has no name."""
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    return Path(os.path.abspath(os.fsdecode(path)))


def _counted(real: Callable, kind: str, seen: Seen) -> Callable:
    def asked(path, *args, dir_fd=None, **kwargs):
        base = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) if dir_fd is not None else Path()
        seen.meets(kind, path if isinstance(path, int) else base / os.fsdecode(path))
        return real(path, *args, **kwargs, **({} if dir_fd is None else {"dir_fd": dir_fd}))

    return asked


def _made(real: Callable, seen: Seen) -> Callable:
    """os.open counts where it makes a file."""

    def open_(path, flags, *args, **kwargs):
        if flags & os.O_CREAT and not os.path.exists(path):
            seen.meets("open", path)
        return real(path, flags, *args, **kwargs)

    return open_


def _opened(real: Callable, seen: Seen) -> Callable:
    def open_(file, mode="r", *args, **kwargs):
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return real(file, mode, *args, **kwargs)
        seen.meets("open", file)
        return _File(real(file, mode, *args, **kwargs), _path(file), seen)

    return open_


class _File:
    """An open file whose writes are counted."""

    def __init__(self, file, path: Path, seen: Seen):
        self._file, self._path, self._seen = file, path, seen

    def write(self, data):
        if self._seen.happens("write", self._path):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._seen.fail("write", self._path)
        return self._file.write(data)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __iter__(self):
        return iter(self._file)


def _saved(real: Callable, seen: Seen) -> Callable:
    """safetensors writes by itself, and tells of a full disk in an exception of its own."""

    def save_file(tensors, filename, *args, **kwargs):
        if not seen.happens("write", filename):
            return real(tensors, filename, *args, **kwargs)
        real(tensors, filename, *args, **kwargs)
        os.truncate(filename, os.stat(filename).st_size // 2)
        try:
            seen.fail("write", _path(filename))
        except OSError as error:
            said = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            raise SafetensorError(said) from None

    return save_file


def _exchanged(real: Callable, seen: Seen) -> Callable:
    def renameat2(a, b):
        if seen.happens("rename", a):
            seen.fail("rename", _path(a))
        return real(a, b)

    return renameat2


class allocation_faults(TorchDispatchMode):  # noqa: N801 - used as disk_faults is
    """Inside the `with` block operation number `at` of torch gets no memory, counted from one; None only counts."""

    def __init__(self, at: int | None = None):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise RuntimeError(NO_MEMORY)
        return function(*args, **(kwargs or {}))
