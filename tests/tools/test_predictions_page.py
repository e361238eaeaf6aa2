"""docs/predictions.md has every question to predict, with its answer."""

import json
import re
from pathlib import Path

import pytest

from tools.predictions_page import COMMAND, PAGE, _section, page

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_the_page_is_up_to_date():
    assert PAGE.read_text("utf-8") == page(), f"run: {COMMAND}"


def test_every_guess_of_the_course_has_an_answer():
    cells = [cell for path in NOTEBOOKS.glob("*.ipynb") for cell in json.loads(path.read_text("utf-8"))["cells"]]
    asked = sum("".join(cell["source"]).count("ql.guess(") for cell in cells if cell["cell_type"] == "code")
    rows = [line for line in page().splitlines() if line.startswith("- ")]
    assert len(rows) == asked > 50
    assert not [row for row in rows if not row.removesuffix(r" \*").endswith("**")]


def test_every_prose_that_asks_is_there():
    cells = [cell for path in NOTEBOOKS.glob("*.ipynb") for cell in json.loads(path.read_text("utf-8"))["cells"]]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    asked = re.findall(r"\*\*Predict(?: first)?\W+(.*)", prose)
    words = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)[1:40] for text in asked]
    shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", page())
    assert len(words) > 40 and not [text for text in words if text not in shown]


def test_every_explanation_stands_under_its_question():
    blocks = re.split(r"\n\n+", page())
    above = [before for before, block in zip(blocks, blocks[1:], strict=False) if block.startswith(">")]
    assert len(above) > 40
    assert not [block for block in above if not (block.startswith("- ") or block.endswith("?"))]


SEEN = "<details><summary>What we saw</summary>\n\nIt is 4.\n\n</details>"
GUESS = ("code", 'g = ql.guess("How many?")', "How many? Run this cell to guess.")
ANSWER = ("code", "g.compare(4)", "The answer is 4. (You recorded no guess.)")
ROW = "- How many? **4**\n\n> It is 4.\n"


@pytest.mark.parametrize(
    ("cells", "shown"),
    [
        (["## A\n\nSee. **Predict first:** how many?", GUESS, ANSWER, SEEN], "### A\n\nSee. How many?\n\n" + ROW),
        (
            ["## A\n\n**Predict first**, for two: how many?", GUESS, ANSWER, SEEN],
            "### A\n\nFor two: how many?\n\n" + ROW,
        ),
        (["## A\n\nA toy.\n\nHow many learn?", ("code", "f()", ""), SEEN], "### A\n\nHow many learn?\n\n> It is 4.\n"),
        (["## A\n\nHow many learn?\n\n## B", ("code", "f()", ""), SEEN], None),
        (
            ["## A\n\n**Predict first:** how many of A?", GUESS, ANSWER, SEEN],
            "### A\n\nHow many of A?\n\n" + ROW,
        ),
        (["Before.\n\n##  A \n\nSee. **Predict first:**", GUESS, ANSWER, SEEN], "### A\n\nSee.\n\n" + ROW),
        (["## A\n\nHow many?", GUESS, ANSWER, SEEN + "\n\nMore.", SEEN], "### A\n\n" + ROW),
        (["## A", GUESS, ANSWER, SEEN + "\n\nAnd why?", SEEN], "### A\n\n" + ROW + "\nAnd why?\n\n> It is 4.\n"),
    ],
    ids=[
        "colon",
        "comma",
        "asked in prose",
        "asked in another section",
        "names its section",
        "asks nothing",
        "asked no more",
        "asked after a reason",
    ],
)
def test_a_notebook_by_hand(tmp_path, cells, shown):
    made = []
    for cell in cells:
        kind, source, text = ("markdown", cell, "") if isinstance(cell, str) else cell
        outputs = [{"data": {"text/plain": [text]}}] if text else []
        made.append({"cell_type": kind, "source": [source], "metadata": {}, "outputs": outputs})
    path = tmp_path / "42_toy.ipynb"
    path.write_text(json.dumps({"cells": made}))
    head = "\n## [42_toy](../notebooks/42_toy.ipynb)\n\n"
    assert _section(path) == ("" if shown is None else head + shown)
