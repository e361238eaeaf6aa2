"""Open the course in JupyterLab, or copy it."""

import argparse
import os
import sys

from qlora_lab.cli.options import one_line

EXAMPLE = "qlora-lab open my-course"
FOLDER = "qlora-lab-course"


def add_options(parser: argparse.ArgumentParser) -> None:
    where = (
        "copy the course to this folder first; notebooks that you have changed stay as they are "
        f"(default: a checkout's own notebooks, or else {FOLDER})"
    )
    parser.add_argument("folder", nargs="?", help=where)
    solved = parser.add_mutually_exclusive_group()
    without = "copy no solved exercises; a folder without them stays so when it is opened again"
    solved.add_argument("--without-solutions", dest="solutions", action="store_false", default=None, help=without)
    with_ = "add the solved exercises to a folder that has none (a new folder gets them by default)"
    solved.add_argument("--with-solutions", dest="solutions", action="store_true", default=None, help=with_)
    copy = "copy the course and stop, such as to hand it out"
    parser.add_argument("--copy-only", action="store_true", help=copy)
    where = (
        "with --copy-only: each notebook begins with a cell that installs the library where it is missing, from this "
        "https address, or from this wheel, which is copied beside the notebooks"
    )
    parser.add_argument("--hosted", metavar="WHEEL", help=where)
    parser.add_argument("--no-browser", action="store_true", help="print the address instead of opening a browser")


def run(a: argparse.Namespace) -> None:
    """Replace this process by JupyterLab with the first notebook; its token stays on. --copy-only: start nothing."""
    from qlora_lab.doctor.lab import lab_command
    from qlora_lab.files.course import FIRST, copy_course, course_path, is_hosted, is_packaged
    from qlora_lab.files.out_path import out_path

    if a.hosted is not None and not a.copy_only:
        raise ValueError("--hosted makes copies for a hosted service, which starts its own Jupyter: add --copy-only")
    if a.folder is None and not is_packaged() and not a.copy_only:
        if a.solutions is not None:
            raise ValueError("a checkout opens its own notebooks: name a folder to copy them with or without solutions")
        folder = course_path("notebooks")
    else:
        folder = out_path(FOLDER if a.folder is None else a.folder)
        if not a.copy_only and a.solutions is None and is_hosted(folder):
            how = "to update it, copy it again with --copy-only --hosted WHEEL"
            said = [f"{folder} was copied for a hosted service, and is opened as it is; {how}"]
        else:
            changed = copy_course(folder, a.solutions, a.hosted)
            how = "stays as you changed it; delete it to get the course's own again"
            said = [f"{folder / name} {how}" for name in changed]
        for line in said:
            print(one_line(line), file=sys.stderr)
    if a.copy_only:
        return
    place = folder / FIRST if (folder / FIRST).exists() else folder
    command, changes = lab_command(place, browser=not a.no_browser)
    os.environ.update(changes)
    os.execv(sys.executable, command)
