"""Build the documentation: README, docs/, notebooks as stored, and a reference from docstrings. `make site`.

    python -m tools.make_site            build/site/html/index.html, which opens from disk and is searched there

In: the repository. Out: a folder of pages. Sphinx treats each warning as an error, so a link that leads nowhere fails.
The pages are copied to build/site/source in the repository's own layout, so one relative link is right in both places.

Not here: the text of the reference (reference.py), the look (docs/conf.py).
"""

import shutil
import subprocess
import sys
from pathlib import Path

from qlora_lab.files.replace import replace_text
from tools import slides
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
TEACHING = ["teaching", "predictions", "capstone"]
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


def main() -> int:
    """Build the site; Sphinx's exit code."""
    source, pages = SITE / "source", SITE / "html"
    assemble(source)
    shutil.rmtree(pages, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(source), str(pages)]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        replace_text(pages / "slides.html", slides.page())  # no page links to it: in the repository it is not there
    print(f"the site is in {pages / 'index.html'}" if code == 0 else "the site has errors, listed above")
    return code


if __name__ == "__main__":
    sys.exit(main())
