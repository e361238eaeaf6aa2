"""Build the documentation: README, docs/, notebooks as stored, and a reference from docstrings. `make site`.

    python -m tools.make_site                   build/site/html/index.html, which opens from disk and is searched there
    python -m tools.make_site 01_codebook       explorers of this notebook alone are playable, which takes seconds

In: the repository. Out: a folder of pages. Sphinx treats each warning as an error, so a link that leads nowhere fails.
The pages are copied to build/site/source in the repository's own layout, so one relative link is right in both places.
Explorers play: in place of each still is a frame with a page that the notebook's own cells made, in a process of
its own for each notebook. build/site/playable keeps these pages until the library or those cells change. An explorer
that is missing or too large is an error.

Not here: the text of the reference (reference.py), pages of explorers (playable.py), the look (docs/conf.py).
"""

import argparse
import html
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from qlora_lab.files.replace import replace_text
from qlora_lab.show.playable import LIMIT
from tools import slides
from tools.playable import STILL, makes_explorer, page_name, shows_explorer
from tools.reference import public_page, room_page, rooms

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "site"
PAGES = ["CHANGELOG.md", "LOG.md", "CONTRIBUTING.md", "LICENSE"]
FOLDERS = {"docs": ["*.md", "*.gif", "*.png"], "bench": ["*.md", "*.json", "*.png"], "notebooks": ["*.ipynb", "*.md"]}
FOLDERS["notebooks/solutions"] = ["*.ipynb"]
GUIDES = [
    "install",
    "finetune",
    "answers",
    "methods",
    "lora_relatives",
    "many_adapters",
    "long_runs",
    "devices",
    "files",
    "merge",
]
GUIDES += ["multiple_choice", "tournament", "xray", "trust", "machines", "conformance", "families", "templates"]
GUIDES += ["tools", "pictures"]
TEACHING = ["teaching", "playable", "predictions", "capstone"]
FIGURES = ["ablations", "published", "speed", "gpu"]


def contents() -> str:
    """The table of contents of the site, which follows the README on its first page."""
    notebooks = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    solutions = sorted(path.stem for path in (ROOT / "notebooks" / "solutions").glob("*.ipynb"))
    groups = {
        "Learn": [
            "notebooks/README",
            *(f"notebooks/{name}" for name in notebooks),
            "notebooks/glossary",
            *(f"docs/{name}" for name in TEACHING),
        ],
        "Fine-tune": [f"docs/{name}" for name in GUIDES],
        "Read": ["reference/public", *(f"reference/{room}" for room in rooms())],
        "Measured": [*(f"docs/{name}" for name in FIGURES), "bench/README", "LOG"],
        "The project": ["CHANGELOG", "CONTRIBUTING"],
        "Solutions": [f"notebooks/solutions/{name}" for name in solutions],
    }
    return "\n".join(_tree(caption, pages) for caption, pages in groups.items())


def _tree(caption: str, pages: list[str]) -> str:
    options = [":hidden:", ":maxdepth: 1", f":caption: {caption}"]
    return "\n".join(["```{toctree}", *options, "", *pages, "```", ""])


def assemble(source: Path) -> None:
    """Copy and write all pages to `source`."""
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in PAGES:
        shutil.copy(ROOT / name, source / name)
    for folder, patterns in FOLDERS.items():
        (source / folder).mkdir(parents=True, exist_ok=True)
        for path in (path for pattern in patterns for path in (ROOT / folder).glob(pattern)):
            shutil.copy(path, source / folder / path.name)
    shutil.copy(ROOT / "docs" / "conf.py", source / "conf.py")
    shutil.copytree(ROOT / "docs" / "static", source / "docs" / "static")
    (source / "index.md").write_text(f"{(ROOT / 'README.md').read_text('utf-8')}\n{contents()}", "utf-8")
    reference = source / "reference"
    reference.mkdir()
    (reference / "public.md").write_text(public_page(), "utf-8")
    for room in rooms():
        (reference / f"{room}.md").write_text(room_page(room), "utf-8")


def make_playable(source: Path, names: list[str]) -> list[str]:
    """Put a page in place of each explorer's still in these notebooks; return the names of those that failed."""
    pages = SITE / "playable"
    copies = source / "extra" / "playable"  # beside the notebooks' pages in the end
    copies.mkdir(parents=True)
    failed = []
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] explorers of {name}", flush=True)
        command = [sys.executable, "-m", "tools.playable", str(ROOT / "notebooks" / f"{name}.ipynb"), str(pages)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
            continue
        path = source / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, 4)
        for i, cell in enumerate(notebook.cells):
            if shows_explorer(cell):
                shutil.copy(pages / page_name(name, i), copies)
                _play(cell, f"../playable/{page_name(name, i)}")
        nbformat.write(notebook, path)
    return failed


def _play(cell: nbformat.NotebookNode, address: str) -> None:
    """Show a page in place of a cell's still, which stays for browsers without scripts."""
    for output in cell.outputs:
        data = output.get("data", {})
        if STILL in data.get("text/html", ""):
            title = html.escape(f"Explorer: {data['text/plain']}")
            frame = f'<iframe class="qlora-playable" loading="lazy" src="{address}" title="{title}"></iframe>'
            data["text/html"] = f"{frame}<noscript>{data['text/html']}</noscript>"


def faults(pages: Path, names: list[str]) -> list[str]:
    """Say what is wrong with the explorers of these notebooks in the built site; an empty list if nothing is."""
    found = []
    for name in names:
        shown = (pages / "notebooks" / f"{name}.html").read_text("utf-8")
        cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
        for i in (i for i, cell in enumerate(cells) if makes_explorer(cell) or shows_explorer(cell)):
            page = pages / "playable" / page_name(name, i)
            if not shows_explorer(cells[i]):
                found.append(f"{name}, cell {i}: its explorer is not stored: run `make notebooks`")
            elif not page.exists() or f'src="../playable/{page.name}"' not in shown:
                found.append(f"{name}, cell {i}: its explorer is not on the page: delete build/site and try again")
            elif page.stat().st_size > LIMIT:
                size = f"{page.stat().st_size:,} bytes, above {LIMIT:,}"
                found.append(f"{name}, cell {i}: its explorer has {size}: give its controls fewer stops")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Build the site; Sphinx's exit code, or 1 if a notebook's explorers failed, are missing or are too large."""
    known = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    parser = argparse.ArgumentParser(description="Build the documentation as pages that open from disk.")
    parser.add_argument("notebook", nargs="*", help="notebooks whose explorers are playable (default: all)")
    names = parser.parse_args(arguments).notebook or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no notebook is called {unknown[0]}: choose from {', '.join(known)}")
    source, pages = SITE / "source", SITE / "html"
    assemble(source)
    if failed := make_playable(source, names):
        print(f"explorers failed in {', '.join(failed)}, as said above", file=sys.stderr)
        return 1
    shutil.rmtree(pages, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(source), str(pages)]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        replace_text(pages / "slides.html", slides.page())  # no page links to it: in the repository it is not there
        for fault in faults(pages, names):
            print(fault, file=sys.stderr)
            code = 1
    print(f"the site is in {pages / 'index.html'}" if code == 0 else "the site has errors, listed above")
    return code


if __name__ == "__main__":
    sys.exit(main())
