"""Open the course in JupyterLab, or copy it."""

import argparse
import os
import sys
from pathlib import Path

EXAMPLE = "qlora-lab open my-course"
FOLDER = "qlora-lab-course"


def add_options(parser: argparse.ArgumentParser) -> None:
    where = (
        "copy the course to this folder first; notebooks that you have changed stay as they are "
        f"(default: a checkout's own notebooks, or else {FOLDER})"
    )
    parser.add_argument("folder", nargs="?", help=where)
    parser.add_argument("--without-solutions", action="store_true", help="copy no solved exercises")
    copy = "copy the course and stop, such as to hand it out"
    parser.add_argument("--copy-only", action="store_true", help=copy)
    parser.add_argument("--no-browser", action="store_true", help="print the address instead of opening a browser")


def run(a: argparse.Namespace) -> None:
    """Replace this process by JupyterLab with the first notebook; its token stays on. --copy-only: start nothing."""
    from qlora_lab.files.course import FIRST, copy_course, course_path, is_packaged

    if a.folder is None and not is_packaged() and not a.copy_only:
        folder = course_path("notebooks")
    else:
        folder = Path(FOLDER if a.folder is None else a.folder)
        for name in copy_course(folder, not a.without_solutions):
            print(f"{folder / name} stays as you changed it; delete it to get the course's own again", file=sys.stderr)
    if a.copy_only:
        return
    # The settings beside this file stop JupyterLab from asking about its news; without an address it calls no one.
    settings = Path(__file__).with_name("jupyter")
    command = [sys.executable, "-m", "jupyterlab", str(folder / FIRST), "--LabApp.news_url=None"]
    command.append(f"--LabServerApp.extra_labextensions_path={settings / 'labextensions'}")
    if a.no_browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # containers run as root, where Jupyter refuses to start without it
    earlier = os.environ.get("JUPYTER_CONFIG_PATH")
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join([str(settings), earlier] if earlier else [str(settings)])
    os.execv(sys.executable, command)
