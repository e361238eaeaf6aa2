"""Twelve slides for the two-hour lab, from tagged cells: what they show, and what they leave to the notes."""

import json
import re
from pathlib import Path

import pytest

from tools import slides as module
from tools.slides import Slide, _add, _code, _picture, _prose, _split, page, slides

ROOT = Path(__file__).parents[2]
MOST_WORDS = 75  # on a face: what is read aloud in half a minute


@pytest.fixture(scope="module")
def made():
    return slides()


def words(pieces: list[str]) -> int:
    return len(re.sub(r"<[^>]+>", " ", " ".join(pieces)).split())


def test_the_lab_has_twelve_slides_in_the_order_of_its_plan(made):
    assert [slide.number for slide in made] == list(range(1, 13))
    text = (ROOT / "docs" / "teaching.md").read_text("utf-8")
    planned = list(dict.fromkeys(re.findall(r"^\| \d+ \| (\d\d) \|", text, re.M)))  # notebooks of the lab
    assert list(dict.fromkeys(slide.notebook[:2] for slide in made)) == planned


def test_a_face_is_short_and_most_have_a_picture(made):
    assert all(slide.title and 0 < words(slide.face) <= MOST_WORDS for slide in made if "<img" not in slide.face[0])
    assert all(words(slide.face) <= MOST_WORDS for slide in made)
    assert sum("<img" in piece for slide in made for piece in slide.face) >= 7


def test_a_question_has_its_answer_in_the_notes_and_not_in_sight(made):
    asked = [slide for slide in made if "?" in " ".join(slide.face)]
    assert len(asked) >= 6
    assert all(words(slide.notes) > 5 for slide in asked)
    guessed = [slide for slide in made if "Predict:" in " ".join(slide.face)]
    assert len(guessed) == 4
    for slide in guessed:
        assert "The answer is" in " ".join(slide.notes) and "The answer is" not in " ".join(slide.face)
    assert "no guess" not in page() and "Run this cell" not in page()


def test_the_page_needs_no_network_and_no_other_file():
    text = page()
    assert re.findall(r"\b(?:src|href)=\"(?!data:image/)[^\"]*\"|url\(|@import|<link|https?://", text) == []
    assert text.count("<section") == 12 and text.count("<script>") == 1
    assert all(alt.strip() for alt in re.findall(r'<img alt="([^"]*)"', text))
    assert len(text.encode()) < 1_000_000


def test_of_prose_the_question_is_shown_and_else_the_first_paragraph():
    assert _split("## A\n\none\n\ntwo") == ("one", "two")
    assert _split("## A\n\none\n\n**Predict first:** x?\n\nthree") == ("**Predict first:** x?", "one\n\nthree")
    html = _prose("**Predict first:** see [this](a.ipynb) <b>")
    assert html == "<p><strong>Predict:</strong> see this &lt;b&gt;</p>\n"
    assert _prose("<details><summary>What we saw</summary>\n\nIt is 4.\n\n</details>") == "<p>It is 4.</p>\n"


def test_a_cell_without_a_paragraph_is_an_error():
    with pytest.raises(ValueError, match="a cell tagged slide-NN has a heading and no paragraph: tag the next one"):
        _split("## A")


def output(**data):
    return {"output_type": "display_data", "data": data}


def test_of_code_pictures_are_shown_and_else_text_and_else_the_source():
    image = '<style>p{}</style><img alt="a &lt; b" style="x" src="data:image/png;base64,AA=="><script>x()</script>'
    shown = '<img alt="a &lt; b" src="data:image/png;base64,AA==">'
    assert _code({"outputs": [output(**{"text/html": image, "text/plain": "a < b"})]}, "x") == shown
    assert _picture('<img alt="x" src="https://example.org/x.png">') == _picture("<img>") == ""
    bar = output(**{"text/plain": "tokens:   0%|          | 0/7"})
    assert _code({"outputs": [bar, {"output_type": "stream", "text": ["1 < 2\n"]}]}, "x") == "<pre>1 &lt; 2</pre>"
    assert _code({"outputs": []}, "a < b") == "<pre>a &lt; b</pre>"


def test_a_title_is_the_cells_own_heading_or_the_one_above():
    slide = Slide(1, "01_codebook")
    _add(slide, "slide", {"cell_type": "markdown"}, "## Own\n\ntext\n\nmore", "Above")
    assert (slide.title, slide.section, slide.face, slide.notes) == (
        "Own",
        "Above",
        ["<p>text</p>\n"],
        ["<p>more</p>\n"],
    )


def write(folder: Path, name: str, *tags: str) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["## A?\n", "\n", "text"], "metadata": {"tags": [tag]}} for tag in tags
    ]
    (folder / "notebooks" / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))


def test_wrong_tags_are_errors(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    write(tmp_path, "01_a", "slide-01", "notes-02")
    with pytest.raises(ValueError, match="slide 2 has notes and no face: tag a cell slide-02"):
        slides()
    write(tmp_path, "01_a", "slide-01")
    write(tmp_path, "02_b", "slide-01")
    with pytest.raises(ValueError, match="slide 1 has cells of 01_a and 02_b: renumber one"):
        slides()
    write(tmp_path, "02_b", "slide-04")
    module.main(["--out", str(tmp_path / "new" / "slides.html")])
    text = (tmp_path / "new" / "slides.html").read_text()
    # numbers of tags can have a gap; a slide says which it is of those that there are
    assert text.count("<section") == 2 and "01_a <span>1 / 2</span>" in text and "02_b <span>2 / 2</span>" in text
