"""Checksums: what a file held when it was written, so that a later change is found and named.

In: a folder and names of files in it. Out: `qlora-lab.sha256` there, a line a file: 64 digits, two spaces, the name.
`sha256sum -c qlora-lab.sha256` reads it too. Users keep a SHA256SUMS of their own, so ours has another name.
Loading checks nothing: it would read every weight twice. A resume checks the checkpoint that it takes (checkpoint.py).
Not here: which files a folder of ours holds (each writer), and what to say of one that differs (verify.py).
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath

from qlora_lab.files import disk
from qlora_lab.files.replace import replace_bytes

SUMS = "qlora-lab.sha256"
LARGEST = 2**20  # bytes of such a file: 10,000 lines
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of files in a folder that nobody else sees yet; `names` are relative to it, with slashes."""
    disk.write_bytes(folder / SUMS, as_lines({name: sha256(folder / name) for name in names}))


def replace_sums(folder: Path, names: Iterable[str], contents: Mapping[str, bytes] | None = None) -> None:
    """The same where a list may be there already, and be read: it is replaced whole.

    contents: those of files that are to be written next, by name: a file that declares a folder complete comes last.
    """
    digests = {name: sha256(folder / name) for name in names}
    digests |= {name: hashlib.sha256(content).hexdigest() for name, content in (contents or {}).items()}
    replace_bytes(folder / SUMS, as_lines(digests))


def as_lines(digests: Mapping[str, str]) -> bytes:
    """What `sha256sum` prints for these files, by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def read_sums(file: Path) -> dict[str, str]:
    """Name -> digest. Raises ValueError, naming the line, for anything that `write_sums` does not write."""
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file: remove it, and copy the folder again")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has more than {LARGEST} bytes: it is not a list of checksums")
    digests = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = LINE.fullmatch(line)
        if not match or not _is_inside(match[2]) or match[2] in digests:
            raise ValueError(f"{file}, line {number}, is not the checksum of a file in it: copy the folder again")
        digests[match[2]] = match[1]
    return digests


def sha256(path: Path) -> str:
    """64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def log_sha256(log: Path, lines: int) -> str:
    """The checksum that the log had when it had this many lines.

    It grows by a line a step, which is not worth a write of its own: each checkpoint has the checksum of the lines so
    far, and a complete run that of the whole log.
    """
    with log.open("rb") as file:
        return hashlib.sha256(b"".join(islice(file, lines))).hexdigest()


def digest_like(digest: str, path: Path, count: Callable[[int], object]) -> str:
    """The digest of a file: sha256, or git's of a blob where `digest` has only 40 digits. count: takes bytes read."""
    found = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
            count(len(block))
    return found.hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name
