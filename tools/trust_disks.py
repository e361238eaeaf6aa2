"""Fill the disk: the command ends with one line, and continues from what is there once there is room again.

The disk is a tmpfs with a drawn size, or number of files, that is too small for what the command writes. If this
process may not mount one, a drawn limit on the size of each file takes its place (RLIMIT_FSIZE), and the table says so.
"""

import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tools.trust_commands import CASES, Home, run
from tools.trust_kills import Reference, reference
from tools.trust_trials import Trial, part

TRIALS = 3  # of each case
BLOCK = 4096  # bytes that a tmpfs gives at once
ROOMY, MANY = 2**26, 2**16  # bytes and files of a disk with room
WORDS = 1000  # bytes of what a command says, which goes to a file as well


def trials(home: Home, share: float) -> list[Trial]:
    """TRIALS of each case; for a share, of evenly spaced cases."""
    disk, kind = (on_small_disk, "tmpfs") if may_mount(home.folder) else (with_small_files, "file size")
    cases = part([case for case in CASES for _ in range(TRIALS)], share)
    return [Trial(f"{case.name} ({kind})", partial(fill_and_go_on, reference(home, case), disk)) for case in cases]


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a file system."""
    place = folder / "a mount"
    place.mkdir(exist_ok=True)
    if subprocess.run([*MOUNT, f"size={ROOMY}", "none", place], capture_output=True).returncode:
        return False
    subprocess.run(["umount", place], check=True)
    return True


MOUNT = ["mount", "-t", "tmpfs", "-o"]


def fill_and_go_on(reference: Reference, disk, folder: Path, draws: random.Random) -> int:
    """Returns 1 if the disk was full."""
    prepared = reference.prepare(folder / "prepared")
    code, words, grow = disk(reference, prepared, folder / "place", draws)
    try:
        if code == 0:
            return 0
        assert code == 2, f"a full disk ends it with {code}: {words}"
        lines = [line for line in words.splitlines() if line.startswith("qlora-lab ")]
        assert len(lines) == 1 and "Traceback" not in words, f"a full disk is told in other than one line: {words}"
        grow()
        reference.finish(folder / "place")
        return 1
    finally:
        subprocess.run(["umount", "--lazy", folder / "place"], capture_output=True)  # even if it is still in use


def on_small_disk(reference: Reference, prepared: Path, place: Path, draws: random.Random):
    """Exit code and output on a tmpfs, and a function that gives it room."""
    least, most = used(prepared), used(reference.folder)
    names = [1 + sum(1 for _ in folder.rglob("*")) for folder in (prepared, reference.folder)]
    size = draws.randrange(max(least, BLOCK), max(least, most) + BLOCK, BLOCK)
    files = draws.randint(names[0], max(names))
    limit = draws.choice([f"size={size},nr_inodes={MANY}", f"size={ROOMY},nr_inodes={files}"])
    place.mkdir()
    subprocess.run([*MOUNT, limit, "none", place], check=True)
    shutil.copytree(prepared, place, dirs_exist_ok=True)
    code, words = run(reference.home, reference.case.line(reference.home, place), place)
    grow = partial(subprocess.run, ["mount", "-o", f"remount,size={ROOMY},nr_inodes={MANY}", place], check=True)
    return code, words, grow


def with_small_files(reference: Reference, prepared: Path, place: Path, draws: random.Random):
    """The same with a limit on the size of each file."""
    largest = max(path.stat().st_size for path in reference.folder.rglob("*") if path.is_file())
    limit = draws.randrange(WORDS, max(WORDS + 1, largest))
    prepared.rename(place)
    inside = partial(largest_file, limit)
    code, words = run(reference.home, reference.case.line(reference.home, place), place, inside)
    return code, words, lambda: None


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Python ignores the signal, so a write beyond this size raises OSError."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def used(folder: Path) -> int:
    """Bytes in whole blocks."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)
