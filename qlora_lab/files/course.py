"""The files of the course: where they lie, and a copy that belongs to its reader.

A checkout holds them at its root; a wheel holds them in `qlora_lab/course` (pyproject.toml lists them). The checksums
in a copy tell which notebooks its reader has changed: a later copy leaves those alone.
"""

import hashlib
import re
from pathlib import Path

from qlora_lab.files import disk
from qlora_lab.files.checksums import SUMS, as_lines, read_sums
from qlora_lab.files.hosted import has_setup, wheel_beside, with_setup
from qlora_lab.files.out_path import out_path
from qlora_lab.files.replace import replace_bytes, replacing_folder

FIRST = "00_start_here.ipynb"
PACKAGED = Path(__file__).parents[1] / "course"
_DOCS = re.compile(rb"\[([^]]*)\]\(\.\./(docs/[^)#]+)(?:#[^)]*)?\)")  # a link of the syllabus


def is_packaged() -> bool:
    """Tell whether the library comes from a wheel, which holds a course of its own."""
    return PACKAGED.is_dir()


def course_path(*names: str) -> Path:
    """Return the path of a file or folder of the course, such as course_path("bench", "paging.json")."""
    return (PACKAGED if is_packaged() else PACKAGED.parents[1]).joinpath(*names)


def copy_course(folder: str | Path, solutions: bool | None = None, hosted: str | None = None) -> list[str]:
    """Copy the course to `folder`; return the names of files left alone because the reader has changed them.

    Syllabus and glossary go with the notebooks, which link to them; links from there to docs become names. A file that
    is still as an earlier call copied it is replaced by a newer one. solutions: whether the solved exercises go with
    them; None: unless the folder is a copy that has none, such as one that a teacher handed out. hosted: an address of
    a wheel, or a wheel on this machine, which is copied too; each notebook then begins with a cell that installs it
    (hosted.py). None: a copy that has such cells stays as it is, because its wheel may be older than this course.
    Raises FileExistsError for a folder that holds anything else, or solutions that were to be left out; OSError for a
    place that cannot be written; and ValueError for a damaged list of checksums, an address that is not allowed, or
    `solutions` without `hosted` for a copy that has such cells.
    """
    folder = out_path(folder)
    source = course_path("notebooks")
    copied = read_sums(folder / SUMS) if (folder / SUMS).exists() else {}
    solved = [name for name in copied if name.startswith("solutions/")]
    if hosted is None and any(has_setup(folder / name) for name in copied):
        if solutions is not None:
            raise ValueError(f"{folder} was copied for a hosted service: name its wheel again (--hosted WHEEL)")
        return []
    if solutions is None:
        # by the list: a reader may have a folder of this name, too
        solutions = FIRST not in copied or bool(solved) and (folder / "solutions").exists()
    if not solutions and any((folder / name).exists() for name in solved):
        raise FileExistsError(
            f"{folder / 'solutions'} holds solved exercises from an earlier copy: delete it, or name a new folder"
        )
    paths = [*source.glob("*.ipynb"), *source.glob("*.md"), *(source.glob("solutions/*.ipynb") if solutions else ())]
    contents = {path.relative_to(source).as_posix(): _content(path) for path in paths}
    if hosted is not None:
        contents = _hosted(contents, hosted)
    if FIRST in copied:
        return _update(folder, contents, copied)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files than the course: name a new folder")
    with replacing_folder(folder) as new:  # a kill leaves nothing
        return _update(new, contents, {})


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
    changed = []
    for name, content in contents.items():
        file = folder / name
        present = file.read_bytes() if file.exists() else None
        if present not in (None, content) and hashlib.sha256(present).hexdigest() != copied.get(name):
            changed.append(name)
        elif present != content:
            disk.make_folder(file.parent)
            replace_bytes(file, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items() if name not in changed}
    # Last: of a file that a kill left out of this list, the next call finds the content that it would write.
    replace_bytes(folder / SUMS, as_lines(copied | digests))
    return sorted(changed)
