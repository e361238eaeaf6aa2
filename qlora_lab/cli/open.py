"""Open the course in JupyterLab."""

import argparse
import os
import sys
from pathlib import Path

EXAMPLE = "qlora-lab open"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("notebook", nargs="?", default="notebooks/00_start_here.ipynb", help="notebook to open")


def run(a: argparse.Namespace) -> None:
    """Replace this process by JupyterLab with the notebook; its token stays on."""
    notebook = Path(a.notebook)
    if not notebook.is_file():
        raise FileNotFoundError(f"{notebook} is not here: run this in the folder of the course, or name a notebook")
    command = [sys.executable, "-m", "jupyterlab", str(notebook), "--LabApp.news_url=None"]  # no call to jupyter.org
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # containers run as root, where Jupyter refuses to start without it
    os.execv(sys.executable, command)
