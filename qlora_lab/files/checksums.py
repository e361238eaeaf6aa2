"""Checksums: what a file held when it was written, so that a later change is found and named.

In: a folder and names of files in it. Out: `qlora-lab.sha256` there, a line for each file: 64 digits, two spaces, the
name. `sha256sum -c qlora-lab.sha256` reads it too. Users keep a SHA256SUMS of their own, so ours has another name.
Loading verifies nothing: it would read every weight twice. Resuming verifies its checkpoint (train/checkpoint.py).
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from qlora_lab.files.replace import replace_bytes

SUMS = "qlora-lab.sha256"
LARGEST = 2**20  # bytes of a list: 10,000 lines
LINE = re.compile(r"([0-9a-f]{64})  (.+)")  # as sha256sum writes it

OK = "ok"
UNKNOWN = "has no checksum"
MISSING = "missing"
DIFFERS = "differs"
RISING = (OK, UNKNOWN, MISSING, DIFFERS)  # from good to bad


@dataclass(frozen=True)
class Part:
    """A file, or a folder, that was checked. state: OK, UNKNOWN, MISSING or DIFFERS; files: those that are not OK."""

    name: str
    state: str
    files: tuple[str, ...] = ()

    @property
    def is_well(self) -> bool:
        return self.state in (OK, UNKNOWN)


def replace_sums(folder: Path, names: Iterable[str], contents: Mapping[str, bytes] | None = None) -> None:
    """Write checksums, replacing in one step a list that others may be reading.

    names: relative to `folder`, with slashes. contents: by name, of files that are written after this, such as the one
    that declares the folder complete.
    """
    digests = {name: sha256(folder / name) for name in names}
    digests |= {name: hashlib.sha256(content).hexdigest() for name, content in (contents or {}).items()}
    replace_bytes(folder / SUMS, as_lines(digests))


def as_lines(digests: Mapping[str, str]) -> bytes:
    """Format digests, by name, as `sha256sum` prints them."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def read_sums(file: Path) -> dict[str, str]:
    """Return name -> digest. Raises ValueError, naming the line, for anything that `as_lines` does not write."""
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file: remove it, and copy the folder again")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has more than {LARGEST} bytes: it is not a list of checksums")
    digests = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = LINE.fullmatch(line)
        if not match or not _is_inside(match[2]) or match[2] in digests:  # a name twice has two digests
            raise ValueError(f"{file}, line {number}, is not the checksum of a file in it: copy the folder again")
        digests[match[2]] = match[1]
    return digests


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def log_sha256(log: Path, lines: int) -> str:
    """Return the checksum that the log had when it had this many lines.

    The log grows by a line a step; a new list for each would be too many writes. So each checkpoint keeps the checksum
    of the lines so far, and a complete run that of the whole log.
    """
    with log.open("rb") as file:
        return hashlib.sha256(b"".join(islice(file, lines))).hexdigest()  # steps since may have lengthened it


def digest_like(digest: str, path: Path, count: Callable[[int], object]) -> str:
    """Return a file's digest of the kind of `digest`: sha256, or git's of a blob for 40 digits. count: takes bytes."""
    running = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(2**20):  # 1 MiB: a weight file may exceed memory
            running.update(block)
            count(len(block))
    return running.hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)  # a list from somewhere else must not make us read /etc or ../
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name
