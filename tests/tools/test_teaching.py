"""docs/teaching.md plans with notebooks and sections that exist."""

import json
import re
from pathlib import Path

from qlora_lab import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "teaching.md").read_text("utf-8")
LAB = re.findall(r"^\| (\d+) \| (?:(\d\d) )?\| ([^|]*)\|", TEXT, re.M)  # minutes, notebook, sections


def sections(number: str) -> set[str]:
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return set(re.findall(r"^## (.+)$", text, re.M))


def test_the_lab_takes_two_hours_and_its_sections_exist():
    assert sum(int(minutes) for minutes, *_ in LAB) == 120
    for _, number, named in LAB:
        known = sections(number) if number else {""}
        # a heading may hold a comma: what is left after all headings are taken out is separators alone
        for heading in sorted(known, key=len, reverse=True):
            named = named.replace(heading, "")
        assert not named.strip(",; "), f"notebook {number} has no section {named.strip(',; ')!r}"


def test_the_weeks_name_every_notebook_once():
    numbers = re.findall(r"^\| (?:\d\.|later)[^|]* \| ([\d, a-z]+) \|", TEXT, re.M)
    named = [number for cell in numbers for number in re.findall(r"\d\d", cell)]
    assert sorted(named) == [path.name[:2] for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


def test_every_command_is_one():
    words = re.findall(r"qlora-lab ([a-z-]+)", TEXT + (ROOT / "docs" / "capstone.md").read_text("utf-8"))
    assert set(words) <= {*cli.COMMANDS} and len(set(words)) > 5
