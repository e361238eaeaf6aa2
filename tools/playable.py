"""Make the explorers of notebooks playable: run the cells that make them, and save each as a page of its own.

    python -m tools.playable notebooks/01_codebook.ipynb build/pages      one page for each cell that shows an explorer

In: notebooks as they are stored. Out: pages named after notebook and cell, such as 01_codebook-061.html. Cells are
found by the line under a still explorer, so no list of explorers is kept. Only cells that these need run
(qlora_lab/exercises/needed.py), in a shell of IPython without a kernel. Pages of an earlier run are kept as long as
neither the library nor those cells changed.
"""

import argparse
import ast
import contextlib
import hashlib
import io
import os
import re
import sys
import warnings
from pathlib import Path

import nbformat

from qlora_lab.exercises.needed import needed
from qlora_lab.files.replace import replace_text

ROOT = Path(__file__).resolve().parents[1]
STILL = "Run this cell to play."  # under each explorer that a notebook has stored
DIGEST = "{}.sha256"
# what a cell that shows an explorer calls at its end, or names
_MAKES = re.compile(r"(?:\w+\.)?(?:[A-Z]\w+Explorer|FollowWeight)|explorer")


def shows_explorer(cell: nbformat.NotebookNode) -> bool:
    """Tell whether a cell has stored an explorer's still."""
    outputs = cell.get("outputs", ())
    return any(STILL in output.get("data", {}).get("text/html", "") for output in outputs)


def makes_explorer(cell: nbformat.NotebookNode) -> bool:
    """Tell whether a cell shows an explorer when it runs, by its last expression."""
    if cell.cell_type != "code" or not cell.source.strip():
        return False
    last = ast.parse(cell.source).body[-1]
    shown = last.value if isinstance(last, ast.Expr) else None
    called = shown.func if isinstance(shown, ast.Call) else shown
    return called is not None and _MAKES.fullmatch(ast.unparse(called)) is not None


def page_name(notebook: str, number: int) -> str:
    """Name the page of a cell, by its place among all cells."""
    return f"{notebook}-{number:03d}.html"


def pages_of(path: Path, folder: Path) -> list[Path]:
    """Write the pages of one notebook to `folder`, unless they are there already; return their paths.

    Raises RuntimeError for a cell that fails, and names it.
    """
    cells = nbformat.read(path, 4).cells
    places = {i: cell for i, cell in enumerate(cells) if cell.cell_type == "code"}
    shown = [place for place, (i, cell) in enumerate(places.items()) if shows_explorer(cell)]
    sources = [cell.source for cell in places.values()]
    numbers = list(places)  # of code cells among all cells
    run = needed(sources, set(shown))
    pages = {place: folder / page_name(path.stem, numbers[place]) for place in shown}
    record = folder / DIGEST.format(path.stem)
    digest = _digest([sources[place] for place in run])
    if all(page.exists() for page in pages.values()) and record.exists() and record.read_text("utf-8") == digest:
        return list(pages.values())
    folder.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)  # a run that is cut short leaves pages without it
    _run(path, sources, run, pages)
    replace_text(record, digest)
    return list(pages.values())


def _run(path: Path, sources: list[str], run: list[int], pages: dict[int, Path]) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    with contextlib.chdir(path.parent), warnings.catch_warnings():
        warnings.filterwarnings("error", "this weight is drawn")  # the page would be kept when the model is there
        for place in run:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):  # tables of results, and errors with their colours
                outcome = shell.run_cell(sources[place])
            if not outcome.success:
                raise RuntimeError(f"{path.name}, cell {place}: {printed.getvalue()}")
            if place in pages:
                outcome.result.save_html(pages[place])


def _digest(sources: list[str]) -> str:
    found = hashlib.sha256("\0".join(sources).encode())
    for file in sorted([*(ROOT / "qlora_lab").rglob("*.py"), *(ROOT / "qlora_lab").rglob("*.js")]):
        found.update(file.read_bytes())
    return found.hexdigest()


def main() -> int:
    """Write the pages of one notebook; 1 if a cell failed."""
    parser = argparse.ArgumentParser(description="Save the explorers of notebooks as pages that play without a kernel.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        pages = pages_of(arguments.notebook.resolve(), arguments.folder.resolve())
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for page in pages:
        print(f"{os.path.relpath(page)}: {page.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
