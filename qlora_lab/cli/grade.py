"""Count which exercises pass in students' notebooks, by the course's own checks. Each notebook has a fresh kernel."""

import argparse
import json
from typing import TYPE_CHECKING

import qlora_lab as ql
from qlora_lab.cli.loading import print_note
from qlora_lab.cli.options import common, number, one_line
from qlora_lab.cli.printing import table

if TYPE_CHECKING:
    from qlora_lab.exercises.grade import Grade
    from qlora_lab.exercises.submission import Submission

EXAMPLE = "qlora-lab grade my-course/07_lora.ipynb, or for a class: qlora-lab grade handed-in --out scores.json"
LESS_MEMORY = "close other programs; the notebooks graded so far are in --out"
MOST_MINUTES = 24 * 60
CUT = 60  # characters of a path in the table


def add_options(parser: argparse.ArgumentParser) -> None:
    what = "a notebook of the course with a student's answers, or a folder of such notebooks; they are only read"
    parser.add_argument("notebooks", nargs="+", metavar="NOTEBOOK", help=what)
    limit = "how long the kernel of one notebook may run; an answer that does not end by then is left out"
    parser.add_argument("--minutes", type=number, default=10.0, metavar="X", help=limit)
    kept = "file for the scores, as JSON; earlier scores there are replaced"
    parser.add_argument("--out", default="scores.json", metavar="FILE", help=kept)
    common(parser)


def run(a: argparse.Namespace) -> None:
    if not 0 < a.minutes <= MOST_MINUTES:
        raise ValueError(f"--minutes is {a.minutes:g}, but must be above 0 and at most {MOST_MINUTES:,}: try 10")
    from qlora_lab.exercises.grade import check_scores_path, find_notebooks
    from qlora_lab.files.lock import locked_file, reserved

    out = check_scores_path(a.out)
    submissions = find_notebooks(a.notebooks)  # all of them, before minutes are spent on the first
    with locked_file(out, "grade") as lock, reserved(lock):  # two commands must not write the same scores
        grades = _graded(a, submissions, out)
    _report(a, grades)
    print_note(a, f"what is wrong with an answer is in {out}")


def _graded(a: argparse.Namespace, submissions: list["Submission"], out) -> list["Grade"]:
    from qlora_lab.exercises.grade import grade, save_scores

    grades = []
    for one in grade(submissions, a.minutes, progress=not a.quiet):
        grades.append(one)
        # after each, so that Ctrl-C in the middle of a class loses one notebook and not all
        save_scores(out, grades, ql.__version__, complete=len(grades) == len(submissions))
    return grades


def _report(a: argparse.Namespace, grades: list["Grade"]) -> None:
    from qlora_lab.exercises.grade import scores

    content = scores(grades, ql.__version__)
    if a.json:
        print(json.dumps(content))
        return
    print(table([_cells(one) for one in grades]))
    print(f"\n{content['passed']} of {content['out_of']} exercises passed")


def _cells(grade: "Grade") -> dict[str, str]:
    file = one_line(grade.file)  # a student chose its name
    missing = [f"{one.exercise} {one.result}" for one in grade.results if one.result in ("failed", "error")]
    untouched = sum(one.result == "not attempted" for one in grade.results)  # often all of them: no list of names
    return {
        "file": file if len(file) <= CUT else f"...{file[3 - CUT :]}",
        "notebook": grade.notebook,
        "passed": f"{grade.passed} of {grade.out_of}",
        "seconds": f"{grade.seconds:.0f}",
        "not passed": ", ".join([*missing, *[f"{untouched} not attempted"] * bool(untouched)]),
    }
