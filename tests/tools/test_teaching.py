"""docs/teaching.md plans with notebooks, sections and slides that exist, and its answers to tasks are right.

The numbers that it repeats from stored notebooks are not compared.
"""

import builtins
import json
import re
import shlex
from pathlib import Path

import pytest

from qlora_lab import cli
from qlora_lab.exercises.needed import _names_of
from qlora_lab.show.memory import MemoryExplorer
from tools.slides import slides
from tools.syllabus import lessons

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "teaching.md").read_text("utf-8")
CAPSTONE = (ROOT / "docs" / "capstone.md").read_text("utf-8")
# minutes, notebook, sections, slides
LAB = re.findall(r"^\| (\d+) \| (?:(\d\d) )?\| ([^|]*)\| (?:([\d, ]+) )?\|", TEXT, re.M)
GIB = 2**30


def cells_of(number: str) -> list[tuple[str, str, str]]:
    """The cells of a notebook, each with its section: (section, kind, source)."""
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    section, found = "", []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and (titles := re.findall(r"^## (.+)$", source, re.M)):
            section = titles[-1]
        found.append((section, cell["cell_type"], source))
    return found


def sections(number: str) -> set[str]:
    text = "\n".join(source for _, kind, source in cells_of(number) if kind == "markdown")
    return set(re.findall(r"^## (.+)$", text, re.M))


def named(number: str, text: str) -> set[str]:
    """The sections that a row names. A heading may hold a comma, so what is left without all headings is separators."""
    found = {heading for heading in sections(number) if heading in text}
    for heading in sorted(found, key=len, reverse=True):
        text = text.replace(heading, "")
    assert not text.strip(",; "), f"notebook {number} has no section {text.strip(',; ')!r}"
    return found


def test_the_lab_takes_two_hours_and_its_sections_exist():
    assert sum(int(minutes) for minutes, *_ in LAB) == 120
    assert all(named(number, text) if number else not text.strip() for _, number, text, _ in LAB)


def test_each_slide_is_in_the_row_of_its_section():
    rows = {
        int(slide): (number, named(number, text)) for _, number, text, of in LAB for slide in re.findall(r"\d+", of)
    }
    assert [*rows] == list(range(1, 13))
    for slide in slides():
        section = slide.title if slide.title in sections(slide.notebook[:2]) else slide.section
        number, headings = rows[slide.number]
        assert (slide.notebook[:2], section in headings) == (number, True), f"slide {slide.number}: {section!r}"


@pytest.mark.parametrize("number", ["00", "01", "04", "07"])
def test_the_sections_of_the_lab_need_no_others(number):
    planned = {""}.union(*(named(number, text) for _, of, text, _ in LAB if of == number))
    known = {*vars(builtins)}
    for section, kind, source in cells_of(number):
        if kind == "code" and section in planned:
            names = _names_of(source)
            assert names.read <= known | names.bound, f"{section}: {names.read - known - names.bound}"
            known |= names.bound


def test_the_weeks_name_every_notebook_once():
    numbers = re.findall(r"^\| \d\.[^|]* \| ([\d, a-z]+) \|", TEXT, re.M)
    named_ = [number for cell in numbers for number in re.findall(r"\d\d", cell)]
    assert sorted(named_) == [path.name[:2] for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


def test_every_command_is_one():
    words = re.findall(r"qlora-lab ([a-z-]+)", TEXT + CAPSTONE)
    assert set(words) <= {*cli.COMMANDS} and len(set(words)) > 5


def test_the_exercises_that_count():
    course = lessons()
    weeks = re.findall(r"^\| \d\. [^|]*\|[^|]*\|[^|]*\| ([^|]*) \|$", TEXT, re.M)
    collected = {number for cell in weeks for number in re.findall(r"\b\d\d\b", cell.partition(";")[0])}
    count = sum(course[number].exercises for number in collected)
    assert f"have {sum(lesson.exercises for lesson in course.values())} exercises, {count} of them" in TEXT
    assert f"how many of the {count} pass" in TEXT and course["15"].exercises == 3 and "15" not in collected


def test_the_rubric_adds_up():
    rows = re.findall(r"^\| \*\*\w+", CAPSTONE, re.M)
    assert f"{3 * len(rows)} points in all: seven rows of three" in CAPSTONE and len(rows) == 7
    assert f"{3 * len(rows)} points" in TEXT
    assert sum(map(int, re.findall(r"\| (\d\d) % \|", TEXT))) == 100


def test_the_answers_of_notebook_10():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    known = {}
    exec(code, known)
    assert known["trainable_at_64"]([(3, 5), (7, 1)]) == 64 * (8 + 8)
    assert known["bytes_for_the_adapter"](10) == 10 * 4 + 10 * 4 + 2 * 10 * 4
    assert len(code.splitlines()) <= 7


def test_the_command_and_the_task_of_notebook_08_give_what_the_page_says(capsys):
    (command,) = re.findall(r"^qlora-lab (memory .*)$", TEXT, re.M)
    assert cli.main(shlex.split(command)) == 0
    (peak,) = re.findall(r"([\d,.]+) MiB, the peak", capsys.readouterr().out)
    assert f"{peak} MiB, which is {float(peak.replace(',', '')) / 1024:.2f} GiB" in TEXT
    opened = MemoryExplorer().result
    assert round(opened["peak"]["qlora"] / GIB, 2) == 7.22 and MemoryExplorer(length=8192).result["card"]["qlora"] == 16
    changes = {
        "48.8": {},
        "10.0": {"gradient_checkpointing": True},
        "46.5": {"r": 1},
        "47.3": {"codebook": "nf2"},
        "47.6": {"optimizer": "paged AdamW"},
        "47.9": {"optimizer": "8-bit AdamW"},
    }
    for said, change in changes.items():
        result = MemoryExplorer(**{"length": 8192, "gradient_checkpointing": False, **change}).result
        assert f"{result['peak']['qlora'] / GIB:.1f}" == said and said in TEXT
        assert (result["card"]["qlora"] == 16) == (said == "10.0")
