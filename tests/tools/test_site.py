"""The documentation: every relative link leads to a file and a heading, and no page is left out. The build is slow."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools import make_site
from tools.make_site import contents
from tools.playable import STILL
from tools.reference import as_markdown, public_page, room_page, rooms

ROOT = Path(__file__).parents[2]
NOTEBOOKS = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/solutions/*.ipynb")]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("notebooks/*.md"), ROOT / "bench" / "README.md"]
LINK = re.compile(r"\]\(([^()\s]+)\)")


def text_of(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.S)


def anchors(page: Path) -> set[str]:
    """What a link may name of a page, by the rule of code hosts: small letters, hyphens for spaces, no other signs."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in LINK.findall(text_of(page)):
        assert "://" not in target, f"{target}: a page of ours names no host"
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(file), f"{target}: {file.name} has no such heading"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.relative_to(ROOT).as_posix())
def test_links_of_a_notebook_lead_to_a_file_from_where_it_lies(notebook):
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = [target for target in LINK.findall(prose) if "://" not in target]
    assert links  # each notebook names the next one
    for target in links:
        path, _, anchor = target.partition("#")
        assert (notebook.parent / path).is_file(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(notebook.parent / path), f"{target}: there is no such heading"


def test_a_broken_link_is_seen():
    assert LINK.findall("see [a page](docs/none.md#here), ![picture](a.png)") == ["docs/none.md#here", "a.png"]
    assert "a-device-day" in anchors(ROOT / "bench" / "README.md")


def test_pictures_have_words_for_those_who_do_not_see_them():
    for page in PAGES:
        assert all(len(words) > 40 for words in re.findall(r"!\[([^]]*)\]", page.read_text("utf-8"))), page


def test_no_page_is_left_out_of_the_contents():
    listed = set(contents().split())
    written = {f"docs/{page.stem}" for page in (ROOT / "docs").glob("*.md")}
    notebooks = {f"notebooks/{page.stem}" for kind in ("ipynb", "md") for page in ROOT.glob(f"notebooks/*.{kind}")}
    assert written | notebooks | {f"reference/{room}" for room in rooms()} <= listed


def test_docstrings_are_shown_letter_by_letter():
    text = "Divide a_b by *c*, or _d_; `x_y` is code.\n\n>>> 1 + 1\n2\n\n    aligned   as it stands"
    shown = r"Divide a_b by \*c\*, or \_d\_; `x_y` is code."
    assert as_markdown(text) == f"{shown}\n\n```pycon\n>>> 1 + 1\n2\n```\n\n```text\n    aligned   as it stands\n```"


@pytest.mark.long
def test_the_reference_has_signatures_methods_and_files():
    public = public_page()
    assert "{py:function} qlora_lab.quantize(weight: torch.Tensor" in public
    assert (
        "{py:class} qlora_lab.QuantizedTensor(" in public and "{py:attribute} qlora_lab.QuantizedTensor.codes" in public
    )
    assert "## packing.py" in room_page("quant") and "qlora_lab.quant.packing.pack(" in room_page("quant")
    # a class has its parent's fields and properties
    assert "qlora_lab.QuantizedTensor(packed: " in public and "} qlora_lab.QuantizedTensor.nbytes\n" in public


def test_an_explorer_that_is_missing_or_too_large_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(make_site, "ROOT", tmp_path)
    monkeypatch.setattr(make_site, "LIMIT", 10)
    cell = nbformat.v4
    stored = cell.new_output("display_data", {"text/html": STILL, "text/plain": "Station 2"})
    cells = [cell.new_code_cell('ql.FollowWeight(lit="block")', outputs=[stored]), cell.new_code_cell("explorer = 3")]
    cells += [cell.new_code_cell("explorer = ZooExplorer(size=64)\nexplorer")]  # nothing is stored
    for folder in ("notebooks", "playable"):
        (tmp_path / folder).mkdir()
    nbformat.write(cell.new_notebook(cells=cells), tmp_path / "notebooks" / "16_weights.ipynb")
    (tmp_path / "notebooks" / "16_weights.html").write_text('<iframe src="../playable/16_weights-000.html">')
    page = tmp_path / "playable" / "16_weights-000.html"
    missing = "16_weights, cell 0: its explorer is not on the page: delete build/site and try again"
    unstored = "16_weights, cell 2: its explorer is not stored: run `make notebooks`"
    assert make_site.faults(tmp_path, ["16_weights"]) == [missing, unstored]
    page.write_text("0123456789")
    assert make_site.faults(tmp_path, ["16_weights"]) == [unstored]
    page.write_text("0123456789a")
    large = "16_weights, cell 0: its explorer has 11 bytes, above 10: give its controls fewer stops"
    assert make_site.faults(tmp_path, ["16_weights"]) == [large, unstored]


@pytest.mark.slow
def test_the_site_builds_without_a_warning():
    """Also checks the links of notebooks and the references between pages: for Sphinx each is an error.

    One notebook is playable here: for those of all notebooks, models would train.
    """
    command = [sys.executable, "-m", "tools.make_site", "01_codebook"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = ROOT / "build" / "site" / "html"
    assert (pages / "slides.html").read_text("utf-8").count("<section") == 12
    front = (pages / "index.html").read_text("utf-8")
    assert 'alt="A hand drags' in front and (pages / "searchindex.js").stat().st_size > 100_000
    notebook = (pages / "notebooks" / "03_block_size.html").read_text("utf-8")
    assert "<math" in notebook and re.search(r'<img[^>]* alt="[^"]{40}', notebook)
    playable = (pages / "notebooks" / "01_codebook.html").read_text("utf-8")
    frames = re.findall(r'<iframe class="qlora-playable" loading="lazy" src="\.\./(\S+)" title="Explorer: ', playable)
    assert len(frames) == len({*frames}) == playable.count("Run this cell to play.") == 2
    assert all((pages / frame).stat().st_size < 500_000 for frame in frames)
    assert "<iframe" not in notebook
    for page in pages.rglob("*.html"):  # no page loads anything from elsewhere
        assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?:', page.read_text("utf-8")), page
