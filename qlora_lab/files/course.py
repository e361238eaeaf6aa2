"""The files of the course: where they lie, and a copy that belongs to its reader.

A checkout holds them at its root; a wheel holds them in `qlora_lab/course` (pyproject.toml lists them). The checksums
in a copy tell which notebooks its reader has changed: a later copy leaves those alone. A folder is filled in place, and
its list is written first, with what is about to come (COMING): so nothing of the reader's is ever removed, and after a
kill the next call knows all files that are ours.
"""

import hashlib
import os
import re
from pathlib import Path

from qlora_lab.files import disk
from qlora_lab.files.checksums import SUMS, as_lines, read_sums
from qlora_lab.files.hosted import has_setup, wheel_beside, with_setup
from qlora_lab.files.lock import clear_after_kill
from qlora_lab.files.out_path import out_path
from qlora_lab.files.replace import replace_bytes

FIRST = "00_start_here.ipynb"
PACKAGED = Path(__file__).parents[1] / "course"
COMING = ".coming/"  # in front of a name in the list: what an unfinished call is about to write there
_DOCS = re.compile(rb"\[([^]]*)\]\(\.\./(docs/[^)#]+)(?:#[^)]*)?\)")  # a link of the syllabus


def is_packaged() -> bool:
    """Tell whether the library comes from a wheel, which holds a course of its own."""
    return PACKAGED.is_dir()


def course_path(*names: str) -> Path:
    """Return the path of a file or folder of the course, such as course_path("bench", "paging.json")."""
    return (PACKAGED if is_packaged() else PACKAGED.parents[1]).joinpath(*names)


def is_hosted(folder: Path) -> bool:
    """Tell whether a folder is a copy with notebooks that begin with a cell that installs the library."""
    return any(has_setup(folder / name) for name in _copied(folder))


def copy_course(folder: str | Path, solutions: bool | None = None, hosted: str | None = None) -> list[str]:
    """Copy the course to `folder`; return the names of files left alone because the reader has changed them.

    Syllabus and glossary go with the notebooks, which link to them; links from there to docs become names. A file that
    is still as an earlier call copied it is replaced by a newer one. solutions: whether the solved exercises go with
    them; None: unless the folder is a copy that has none, such as one that a teacher handed out. hosted: an address of
    a wheel, or a wheel on this machine, which is copied too; each notebook then begins with a cell that installs it
    (hosted.py). Raises FileExistsError for a folder that holds anything else, or solutions that were to be left out;
    OSError for a place that cannot be written; and ValueError for a damaged list of checksums, an address that is not
    allowed, or a copy that has such cells if `hosted` is None: its wheel may be older than this course.
    """
    folder = out_path(folder)
    source = course_path("notebooks")
    clear_after_kill(folder / SUMS, "open")  # a first copy that ended at once left nothing else
    copied = _copied(folder)
    if FIRST not in copied and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files than the course: name a new folder")
    if hosted is None and is_hosted(folder):
        raise ValueError(f"{folder} was copied for a hosted service: name its wheel again (--hosted WHEEL)")
    solved = [name for name in copied if name.startswith("solutions/")]
    if solutions is None:
        # by the list: a reader may have a folder of this name, too
        solutions = FIRST not in copied or bool(solved) and (folder / "solutions").exists()
    if not solutions:
        if any((folder / name).exists() for name in solved):
            raise FileExistsError(
                f"{folder / 'solutions'} holds solved exercises from an earlier copy: delete it, or name a new folder"
            )
        # so a later call finds a copy that has none
        copied = {name: digest for name, digest in copied.items() if name not in solved}
    paths = [*source.glob("*.ipynb"), *source.glob("*.md"), *(source.glob("solutions/*.ipynb") if solutions else ())]
    contents = {path.relative_to(source).as_posix(): _content(path) for path in paths}
    if hosted is not None:
        contents = _hosted(contents, hosted)
    for name in contents:
        _check_place(folder / name)
        clear_after_kill(folder / name, "open")
    return _update(folder, contents, copied)


def _copied(folder: Path) -> dict[str, str]:
    """Return name -> sha256 of what earlier calls wrote, the last one perhaps only in part."""
    if not os.path.lexists(folder / SUMS):
        return {}
    try:
        listed = read_sums(folder / SUMS)
    except ValueError as error:
        how = "name a new folder, and move your notebooks there"
        raise ValueError(f"the list of what was copied is damaged ({error}): {how}") from None
    coming = {name.removeprefix(COMING): digest for name, digest in listed.items() if name.startswith(COMING)}
    copied = {name: digest for name, digest in listed.items() if not name.startswith(COMING)}
    written = {name: digest for name, digest in coming.items() if _digest(folder / name) in (None, digest)}
    return copied | written


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _check_place(file: Path) -> None:
    """Raise OSError, before anything is written, for a place that no file of ours can take."""
    inside = next(parent for parent in file.parents if os.path.lexists(parent))
    if not inside.is_dir():
        raise NotADirectoryError(f"{inside} is not a folder: name another one, or move it away")
    if os.path.lexists(file) and not file.is_file():
        raise FileExistsError(f"{file} is not a file of the course: move it away, and copy again")
    _digest(file)  # it has to be readable


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return _DOCS.sub(rb"\1 (`\2` in the repository)", content) if path.suffix == ".md" else content


def _hosted(contents: dict[str, bytes], where: str) -> dict[str, bytes]:
    """Put the cell that installs in front of each notebook, and the wheel, if it is a file, beside them."""
    wheel = wheel_beside(where)
    made = {}
    for name, content in contents.items():
        # solutions lie one folder deeper than the wheel
        seen = where if wheel is None else "../" * name.count("/") + wheel.name
        made[name] = with_setup(content, seen) if name.endswith(".ipynb") else content
    return made if wheel is None else made | {wheel.name: wheel.read_bytes()}


def _update(folder: Path, contents: dict[str, bytes], copied: dict[str, str]) -> list[str]:
    """Write what is missing or unchanged. copied: name -> sha256 of what an earlier call wrote."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    disk.make_folder(folder)
    if any(_digest(folder / name) != digest for name, digest in digests.items()):
        _list(folder, copied | {COMING + name: digest for name, digest in digests.items()})
    changed = []
    for name, content in contents.items():
        file = folder / name
        present = _digest(file)
        if present not in (None, digests[name], copied.get(name)):
            changed.append(name)
        elif present != digests[name]:
            disk.make_folder(file.parent)
            replace_bytes(file, content)
    _list(folder, copied | {name: digest for name, digest in digests.items() if name not in changed})
    return sorted(changed)


def _list(folder: Path, digests: dict[str, str]) -> None:
    lines = as_lines(digests)
    file = folder / SUMS
    if not file.exists() or file.read_bytes() != lines:  # a folder that is up to date may be read-only
        replace_bytes(file, lines)
