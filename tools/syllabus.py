"""Write notebooks/README.md, the syllabus: what each notebook asks, how long it takes, what to read before it.

In: the notebooks. Question, paper and "Read first" are read from a notebook's opening; widgets, predictions and
exercises are counted. Out: the page, with the spine, the electives and three paths.

No class has been timed. The minutes are computed from what there is to read and to do, and the page says so.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
PAGE = NOTEBOOKS / "README.md"
COMMAND = "python -m tools.syllabus"
SPINE = ("00", "01", "04", "07", "08", "10")
PATHS = {
    "One evening": (("", ("00", "01", "10")),),
    "One weekend": (("Saturday", ("00", "01", "04")), ("Sunday", ("07", "08", "10"))),
    "Four weeks": (
        ("Week 1, a weight", ("00", "01", "02", "04")),
        ("Week 2, a change", ("07", "08", "10")),
        ("Week 3, what it costs", ("03", "05", "09", "15")),
        ("Week 4, what it is worth", ("06", "11", "12", "13", "14")),
    ),
}
# Of the estimate. Reading is slow where every sentence has a number in it; a cell is read aloud and run.
WORDS_A_MINUTE = 150
CELLS_A_MINUTE = 3
GUESS, WIDGET, EXERCISE = 1, 4, 8  # minutes each
TRAINING = {"10": 10}  # minutes that a cell runs and the reader waits
STEP = 5  # minutes: an estimate has no more digits
# The map at the end of each notebook, FollowWeight(lit=...), is counted in none.
_WIDGET = re.compile(
    r"^(?:\w+ = )?(?:\w+\.)?(?:(\w+Explorer|LabelView|FollowWeight)\((?!.*result|lit=)|run = await (ql\.live)\()", re.M
)
_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")
HEAD = f"""# Syllabus

One idea, one notebook. The six notebooks of the **spine** tell the whole story, from a weight to a fine-tuned model.
The **electives** go deeper, in any order that their column "read first" allows. Before you start, you should be able
to read Python and to multiply matrices, and you should know that training follows a gradient downhill. The terms of
the field are in the [glossary](glossary.md); each is linked where the course first uses it. Every notebook after the
first ends with the map of one weight, on which its own station is lit.

After the course comes the [capstone](../docs/capstone.md): tune a model on data of your own. Lecturers find plans for
a lab and for four weeks in [Teaching with this course](../docs/teaching.md).

`{COMMAND}` writes this page from the notebooks; a test fails when it is out of date.
"""
ESTIMATE = f"""## How the minutes were found

They are estimates: no class has been timed. The estimate for a notebook allows one minute for each {WORDS_A_MINUTE}
words of prose and one for each {CELLS_A_MINUTE} visible cells, plus {GUESS} minute for each prediction, {WIDGET} for
each widget and {EXERCISE} for each exercise. Notebook 10 also trains for {TRAINING["10"]} minutes on two cores. The sum
is rounded to the nearest {STEP} minutes. An appendix is not counted. If you skip the exercises, subtract {EXERCISE}
minutes for each. The line "Runs in" of a notebook says how long its cells take.
"""


@dataclass(frozen=True)
class Lesson:
    """What the syllabus says about one notebook."""

    name: str
    question: str
    paper: str
    read_first: tuple[str, ...]  # numbers of notebooks: "01"
    widgets: tuple[str, ...]
    exercises: int
    minutes: int

    @property
    def number(self) -> str:
        """Its two digits."""
        return self.name[:2]


def lesson(path: Path) -> Lesson:
    """Read one notebook. ValueError names a line of the opening that is missing."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    text = _without_appendix([("".join(cell["source"]), cell) for cell in cells])
    prose = "\n\n".join(source for source, cell in text if cell["cell_type"] == "markdown")
    # a guard is folded away: nobody reads it
    code = [s for s, c in text if c["cell_type"] == "code" and "guard" not in c["metadata"].get("tags", [])]
    found = dict.fromkeys(a or b for source in code for a, b in _WIDGET.findall(source))
    after = prose.partition("\n## Exercises\n")[2]
    exercises = len(re.findall(r"^\*\*\d+\.\*\*", after, re.M))
    minutes = _words(prose) / WORDS_A_MINUTE + len(code) / CELLS_A_MINUTE + WIDGET * len(found) + EXERCISE * exercises
    minutes += GUESS * sum("ql.guess(" in source for source in code) + TRAINING.get(path.name[:2], 0)
    return Lesson(
        name=path.stem,
        question=re.match(r"# (.*)", prose)[1],
        paper=_without_links(_line(path, prose, "Paper section")),
        read_first=tuple(re.findall(r"\]\((?:\.\./)?(\d\d)_", _line(path, prose, "Read first"))),
        widgets=tuple(found),
        exercises=exercises,
        minutes=STEP * round(minutes / STEP),
    )


def _without_appendix(text: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """Leave out the section "Appendix", which nothing else in the course needs."""
    kept, inside = [], False
    for source, cell in text:
        if source.startswith("## "):
            inside = source.startswith("## Appendix")
        if not inside:
            kept.append((source, cell))
    return kept


def _line(path: Path, prose: str, label: str) -> str:
    found = re.search(rf"^- \*\*{label}\*\*: (.*)$", prose, re.M)
    if found is None:
        raise ValueError(f"{path.name} has no line '- **{label}**: ...' in its opening: add one")
    return found[1]


def _words(prose: str) -> int:
    return len(re.findall(r"[A-Za-z][\w'-]*", re.sub(r"<[^>]+>|\]\([^)]*\)|`[^`]*`", " ", prose)))


def _without_links(line: str) -> str:
    """The reader finds the addresses in the notebook."""
    return _LINK.sub(r"\1", re.sub(r" \(\[arXiv [\d.]+\]\([^)]*\)\)", "", line)).partition(". ")[0]


def lessons() -> dict[str, Lesson]:
    """All notebooks of the course, by number."""
    return {path.name[:2]: lesson(path) for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}


def page() -> str:
    """The text of the syllabus."""
    course = lessons()
    spine = _table(course[number] for number in SPINE)
    electives = _table(found for number, found in course.items() if number not in SPINE)
    paths = "\n".join(_path(name, parts, course) for name, parts in PATHS.items())
    return f"{HEAD}\n## The spine\n\n{spine}\n## Electives\n\n{electives}\n## Three paths\n\n{paths}\n{ESTIMATE}"


def _table(chosen) -> str:
    head = ["notebook", "its question", "minutes", "widgets", "exercises", "read first", "paper"]
    rows = [head, ["---"] * len(head)]
    for found in chosen:
        widgets = ", ".join(f"`{name}`" for name in found.widgets)
        numbers = [str(found.minutes), widgets or "none", str(found.exercises), ", ".join(found.read_first) or "none"]
        rows.append([_link(found), found.question, *numbers, found.paper])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _path(name: str, parts, course: dict[str, Lesson]) -> str:
    total = _hours(sum(course[number].minutes for _, numbers in parts for number in numbers))
    entries = []
    for label, numbers in parts:
        time = f": {_hours(sum(course[number].minutes for number in numbers))}" if len(parts) > 1 else ""
        links = ", ".join(_link(course[number]) for number in numbers)
        entries.append(f"- {label}{time}{'. ' if label else ''}{links}\n")
    return f"**{name}**, {total}:\n\n{''.join(entries)}"


def _hours(minutes: int) -> str:
    """To the minute: parts that were rounded would not add up."""
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if left else f"{hours} h"


def _link(found: Lesson) -> str:
    return f"[{found.name}]({found.name}.ipynb)"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), "utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
