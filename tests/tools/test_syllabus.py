"""The syllabus names every notebook, and no path asks for what it has not taught."""

import json
import re

import pytest

from tools.syllabus import COMMAND, NOTEBOOKS, PAGE, PATHS, SPINE, lesson, lessons, page


@pytest.fixture(scope="module")
def course():
    return lessons()


def test_the_page_is_up_to_date():
    assert PAGE.read_text("utf-8") == page(), f"run: {COMMAND}"


def test_every_notebook_is_named_once_in_a_table():
    rows = re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\) \|", PAGE.read_text("utf-8"), re.M)
    assert sorted(rows) == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def test_exercises_are_those_that_are_tagged(course):
    """Notebook 10 alone has none of its exercises tagged."""
    for found in course.values():
        cells = json.loads((NOTEBOOKS / f"{found.name}.ipynb").read_text("utf-8"))["cells"]
        tagged = sum("exercise" in cell["metadata"].get("tags", []) for cell in cells)
        assert found.exercises == tagged or found.number == "10" and (tagged, found.exercises) == (0, 2)


@pytest.mark.parametrize("parts", [*PATHS.values(), [("", SPINE)]], ids=[*PATHS, "the spine"])
def test_a_path_reads_first_what_comes_first(course, parts):
    seen = []
    for number in (number for _, numbers in parts for number in numbers):
        assert set(course[number].read_first) <= set(seen), number
        seen.append(number)
    assert len(seen) == len(set(seen))


def test_the_longest_path_has_every_notebook(course):
    assert {number for _, numbers in PATHS["Four weeks"] for number in numbers} == set(course)


OPENING = """# How?

- **Read first**: [01_codebook](01_codebook.ipynb)
- **Paper section**: QLoRA ([arXiv 2305.14314](https://arxiv.org/abs/2305.14314)), section 3. More words"""
CELLS = [
    ("markdown", OPENING, []),
    ("code", "import qlora_lab as ql", []),
    ("code", "ToyExplorer(bits=3)", []),
    ("code", "print(ToyExplorer(bits=3).result)", []),
    ("code", "assert True", ["guard"]),
    ("code", 'seen = ql.guess("How?")', []),
    ("markdown", "**1.** No exercise.\n\n## Exercises\n\n**1.** One.", []),
    ("markdown", "**2.** Two.", []),
    ("code", 'ql.FollowWeight(lit="toy")', []),
]


def test_a_notebook_by_hand(tmp_path):
    cells = [{"cell_type": kind, "source": [source], "metadata": {"tags": tags}} for kind, source, tags in CELLS]
    path = tmp_path / "42_toy.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    found = lesson(path)
    assert (found.question, found.read_first, found.paper) == ("How?", ("01",), "QLoRA, section 3")
    assert (found.widgets, found.exercises) == (("ToyExplorer",), 2)
    # 2 exercises of 8 minutes, a widget of 4, a guess of 1, five visible cells and a few words: 22.8
    assert found.minutes == 25
    sections = ["## Appendix\n\n" + "word " * 3000, "### More\n\n" + "word " * 3000, "## Check yourself"]
    appendix = [{"cell_type": "markdown", "source": [source], "metadata": {}} for source in sections]
    path.write_text(json.dumps({"cells": [*cells[:6], *appendix, *cells[6:]]}))
    assert lesson(path) == found
    path.write_text(json.dumps({"cells": [dict(cells[0], source=["# How?"])]}))
    with pytest.raises(ValueError, match=r"42_toy\.ipynb has no line '- \*\*Paper section\*\*: \.\.\.'"):
        lesson(path)


def minutes(text: str) -> int:
    hours, left = re.fullmatch(r"(\d+) h(?: (\d+) min)?", text).groups("0")
    return 60 * int(hours) + int(left)


def test_the_parts_of_a_path_add_up(course):
    for name, parts in PATHS.items():
        total, listed = re.search(rf"^\*\*{name}\*\*, (.*):\n\n((?:- .*\n)+)", PAGE.read_text("utf-8"), re.M).groups()
        assert minutes(total) == sum(course[number].minutes for _, numbers in parts for number in numbers)
        shown = re.findall(r"^- [^:[]+: ([^.]+)\.", listed, re.M)
        assert sum(map(minutes, shown)) == minutes(total) or len(parts) == 1 and not shown
