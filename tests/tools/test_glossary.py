"""Each term of the glossary is linked where it is first used, on the spine as well, and each link has its entry."""

import json
import re
import shutil

import nbformat
import pytest

from tools import glossary
from tools.glossary import COMMAND, LINK, PAGE, Term, link_all, orders, terms, unlinked

ENTRIES = dict(re.findall(r"^## (.*)\n\n((?:.+\n)+)", PAGE.read_text("utf-8"), re.M))


def prose_of(paths):
    read = ((path.stem, json.loads(path.read_text("utf-8"))["cells"]) for path in paths)
    return [(name, ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]) for name, cells in read]


@pytest.fixture(scope="module")
def course():
    return dict(prose_of(orders()[0]))


@pytest.mark.parametrize("way", [0, 1], ids=["course", "spine"])
def test_every_first_use_is_linked(course, way):
    read = [(path.stem, course[path.stem]) for path in orders()[way]]
    missing = [f"{name}, prose {i}: {term.name}" for name, i, term in unlinked(read, terms())]
    assert not missing, f"run: {COMMAND}"


def test_every_link_has_an_entry_and_every_entry_a_link(course):
    linked = {link[1] for cells in course.values() for text in cells for link in LINK.findall(text)}
    assert linked == {term.anchor for term in terms()}


@pytest.mark.parametrize("term", terms(), ids=lambda term: term.name)
def test_an_entry_is_two_sentences_and_a_notebook_that_uses_the_term(course, term):
    entry = " ".join(ENTRIES[term.name].split())
    said, _, named = entry.rpartition(" In ")
    assert len(re.findall(r"[.!?](?= |$)", said)) == 2
    (name,) = term.notebooks
    assert named == f"[{name}]({name}.ipynb)."
    assert any(term.pattern.search(text) for text in course[name])


def test_entries_are_in_order_and_in_small_letters():
    assert list(ENTRIES) == sorted(ENTRIES) == [name.lower() for name in ENTRIES]
    assert len(ENTRIES) == len(terms()) == PAGE.read_text("utf-8").count("\n## ")


NIBBLE = Term("nibble", re.compile(r"\bnibbles?\b", re.I), ("02_packing",))


@pytest.mark.parametrize(
    "text",
    [
        "# A nibble",
        "`nibble` is code",
        "```\nnibble\n```",
        "$nibble$",
        "a [nibble](elsewhere.md)",
        "- **Nibble**: 0 to 15",
        "snibbles",
    ],
)
def test_what_is_no_prose_is_no_use(text):
    assert list(unlinked([("02", [text])], [NIBBLE])) == []
    (found,) = unlinked([("02", [text, "two nibbles"])], [NIBBLE])
    assert found == ("02", 1, NIBBLE)


def test_only_the_first_use_counts():
    linked = "A [nibble](glossary.md#nibble) is half a byte."
    assert list(unlinked([("02", [linked]), ("05", ["a nibble"])], [NIBBLE])) == []
    assert len(list(unlinked([("01", ["a nibble"]), ("02", [linked])], [NIBBLE]))) == 1
    assert len(list(unlinked([("02", [f"A nibble. {linked}"])], [NIBBLE]))) == 1


def test_links_are_set_again_in_a_notebook_and_its_solution(tmp_path, monkeypatch):
    """And a link that is in the wrong place is taken out."""
    monkeypatch.setattr(glossary, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(glossary, "terms", lambda: [NIBBLE])
    (tmp_path / "solutions").mkdir()
    prose = ["One nibble.", "Two [nibbles]({}glossary.md#nibble)."]
    for folder, prefix in ((tmp_path, ""), (tmp_path / "solutions", "../")):
        cells = [nbformat.v4.new_markdown_cell(text.format(prefix), id=f"{i}") for i, text in enumerate(prose)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "02_packing.ipynb")
    shutil.copy(tmp_path / "02_packing.ipynb", tmp_path / "05_kernels.ipynb")  # has no solution
    for _ in range(2):
        link_all(orders()[0])
        (_, first), (_, later), (_, solution) = prose_of(sorted(tmp_path.rglob("*.ipynb")))
        assert first == ["One [nibble](glossary.md#nibble).", "Two nibbles."]
        assert solution == ["One [nibble](../glossary.md#nibble).", "Two nibbles."]
        assert later == ["One nibble.", "Two nibbles."]
