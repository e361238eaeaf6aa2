"""A student's notebook between the course's cells: what runs, and in which order."""

import json
from pathlib import Path

import pytest

from qlora_lab.exercises import hints, submission
from qlora_lab.exercises.needed import _names_of
from qlora_lab.exercises.submission import ADDED, ANSWER, CHECK, COURSE, Piece, exercises_of, read_submission, without
from tests.exercises import toy_course as toy

toy_course = toy.toy_course
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
EVERY = sorted([*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("solutions/*.ipynb")])
RIGHT = "def my_double(x):\n    return 2 * x"
SQUARED = "def my_square(x):\n    return x * x"
SIX = 'six = 3 + 3\nql.check(my_double, six, name="my_double")'


def shown(read) -> list[tuple[str, str]]:
    return [(piece.kind, piece.source.strip()) for piece in read.pieces]


def test_an_untouched_notebook_runs_the_stubs_and_what_checks_need(toy_course):
    read = read_submission(toy_course(toy.OWN))
    assert read.notebook == toy.NAME and read.exercises == ["my_double", "my_square"]
    wanted = [(COURSE, toy.IMPORTS), (ANSWER, "def my_double(x):\n    return ..."), (CHECK, SIX), (COURSE, toy.BESIDE)]
    assert shown(read) == [*wanted, (ANSWER, toy.SQUARE), (COURSE, toy.DATA), (CHECK, toy.CHECK)]


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "no ids"])
def test_answers_are_found_with_their_ids_and_without(toy_course, ids):
    cells = [*toy.OWN[:2], f"{RIGHT}\n\n{SIX}", toy.BESIDE, SQUARED, *toy.OWN[5:]]
    found = shown(read_submission(toy_course(cells, ids=ids)))
    assert (ANSWER, f"{RIGHT}\n\n{SIX}") in found and (ANSWER, SQUARED) in found
    assert [kind for kind, _ in found].count(CHECK) == 2  # the course's, besides the one in the student's cell


def changed(place: int, source: str) -> list[str]:
    return [source if index == place else cell for index, cell in enumerate(toy.OWN)]


def test_a_check_that_was_edited_or_deleted_is_the_courses(toy_course):
    for cells in (changed(6, "ql.check(my_square, 9, name='other')"), toy.OWN[:6], [toy.IMPORTS]):
        assert (CHECK, toy.CHECK) in shown(read_submission(toy_course(cells)))


def test_an_edited_cell_keeps_what_it_imports_and_defines_and_nothing_else(toy_course):
    mine = "import math\ndef help_me(x):\n    return x * x\nnine = 0"
    cells = [*changed(3, mine)[:4], "def my_square(x):\n    return math.floor(help_me(x))", *toy.OWN[5:]]
    found = shown(read_submission(toy_course(cells)))
    own = found.index((COURSE, toy.BESIDE))
    assert found[own - 2 : own] == [(ADDED, "import math"), (ADDED, "def help_me(x):\n    return x * x")]
    assert not any("nine = 0" in source for _, source in found)


def test_an_added_cell_runs_where_it_stands_if_it_is_needed(toy_course):
    helper = ("new", "def help_me(x):\n    return x * x")
    cells = [toy.IMPORTS, helper, ("other", "unneeded = 1"), *toy.OWN[1:4], "def my_square(x):\n    return help_me(x)"]
    found = shown(read_submission(toy_course([*cells, *toy.OWN[5:]])))
    assert found[1] == (ADDED, helper[1]) and not any("unneeded" in source for _, source in found)


def test_a_cell_that_would_make_any_answer_right_does_not_run(toy_course):
    cells = [*toy.OWN[:6], ("mine", "wanted = my_square(3)"), toy.CHECK]
    assert not any("wanted = my" in source for _, source in shown(read_submission(toy_course(cells))))


@pytest.mark.parametrize("place", [5, 7], ids=["above the check", "below the check"])
def test_an_answer_in_a_cell_of_its_own_counts(toy_course, place):
    cells = [*toy.OWN[:place], ("mine", SQUARED), *toy.OWN[place:]]
    found = shown(read_submission(toy_course(cells)))
    # right after the stub, before the course's data: what a student adds changes nothing that the check needs
    assert found[-4:] == [(ANSWER, toy.SQUARE), (ADDED, SQUARED), (COURSE, toy.DATA), (CHECK, toy.CHECK)]


def test_a_broken_answer_is_still_the_answer(toy_course):
    for ids in (True, False):
        found = shown(read_submission(toy_course(changed(4, "def my_square(x:"), ids=ids)))
        assert (ANSWER, "def my_square(x:") in found


def test_an_answer_under_another_name_is_the_answer_and_not_an_open_one(toy_course):
    found = shown(read_submission(toy_course(changed(4, "def my_answer(x):\n    return x * x"))))
    assert (ANSWER, "def my_answer(x):\n    return x * x") in found and (ANSWER, toy.SQUARE) not in found


def test_answers_of_another_version_of_the_course_are_found_by_name(toy_course):
    """Whose ids are those of other cells."""
    cells = [
        ("code-005", toy.IMPORTS),
        ("code-004", f"{RIGHT}\n\n{SIX}"),
        ("code-002", SQUARED),
        ("code-000", toy.CHECK),
    ]
    found = shown(read_submission(toy_course(cells)))
    assert (ANSWER, f"{RIGHT}\n\n{SIX}") in found and (ANSWER, SQUARED) in found


def test_an_answer_below_a_check_in_its_own_cell_counts(toy_course):
    found = shown(read_submission(toy_course([*toy.OWN[:4], ("mine", RIGHT), *toy.OWN[4:]])))
    assert found.index((ADDED, RIGHT)) < found.index((CHECK, SIX))


def test_a_magic_that_nothing_needs_does_not_run(toy_course):
    found = shown(read_submission(toy_course([*toy.OWN, ("mine", "!rm -rf everything")])))
    assert not any("everything" in source for _, source in found)


def test_a_renamed_file_is_known_by_its_heading_and_a_renamed_heading_by_its_file(toy_course):
    assert read_submission(toy_course(toy.OWN, "anna.ipynb")).notebook == toy.NAME
    assert read_submission(toy_course(toy.OWN, f"{toy.NAME} (2).ipynb", title="# Anna")).notebook == toy.NAME
    with pytest.raises(ValueError, match="anna.ipynb is not a notebook of this course: neither its first heading"):
        read_submission(toy_course(toy.OWN, "anna.ipynb", title="# Anna"))


def test_without_an_answer_its_stub_and_the_other_exercises_remain(toy_course):
    read = read_submission(toy_course([*changed(4, SQUARED), ("mine", SQUARED + "  # again")]))
    rest = without(
        read, next(i for i, piece in enumerate(read.pieces) if piece == Piece(CHECK, toy.CHECK, "my_square"))
    )
    assert {piece.exercise for piece in rest.pieces if piece.kind == CHECK} == {"my_double"}
    assert (ANSWER, toy.SQUARE) in shown(rest) and (COURSE, toy.DATA) in shown(rest)
    assert not any("x * x" in source for _, source in shown(rest))


def test_without_an_added_cell_the_rest_remains_and_the_courses_cells_stay(toy_course):
    helper = ("new", "def help_me(x):\n    return x * x")
    read = read_submission(toy_course([toy.IMPORTS, helper, f"{RIGHT}\nhelp_me\n\n{SIX}", *toy.OWN[3:]]))
    place = shown(read).index((ADDED, helper[1]))
    assert shown(without(read, place)) == [one for one in shown(read) if one[0] != ADDED]
    assert without(read, 0) is None


BAD = {
    "no JSON": ("print('hello')", "line 1, column 1: not JSON"),
    "empty": ("", "it is empty"),
    "a list": ("[]", "it must be a JSON object"),
    "no cells": ('{"nbformat": 4}', "has no 'cells': it must be a list"),
    "an old format": (
        '{"cells": [], "nbformat": 3}',
        "has nbformat=3: it must be 4: open the notebook in JupyterLab and save it",
    ),
    "a cell that is a text": ('{"cells": ["a"], "nbformat": 4}', "cell 0 has no text; save it in JupyterLab"),
    "a cell without text": ('{"cells": [{"cell_type": "code"}], "nbformat": 4}', "cell 0 has no text"),
    "a cell of numbers": ('{"cells": [{"cell_type": "code", "source": [1]}], "nbformat": 4}', "cell 0 has no text"),
    "no cells in it": ('{"cells": [], "nbformat": 4}', "is not a notebook of this course"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_notebook_is_refused_in_one_line(tmp_path, kind):
    text, reason = BAD[kind]
    (tmp_path / "a.ipynb").write_text(text)
    with pytest.raises(ValueError, match="a.ipynb") as error:
        read_submission(tmp_path / "a.ipynb")
    assert reason in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- the course itself


def test_every_exercise_of_the_course_is_found_where_it_is_tagged():
    found = set()
    for path in NOTEBOOKS.glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        tagged = [i for i, cell in enumerate(cells) if "exercise" in cell["metadata"].get("tags", [])]
        exercises = exercises_of(path.stem)
        assert [exercise.cell for exercise in exercises] == tagged or path.stem.startswith("10"), path
        found |= {exercise.name for exercise in exercises}
    assert found == hints.EXERCISES.keys()


@pytest.mark.long
@pytest.mark.parametrize("path", EVERY, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_every_name_that_runs_was_bound_by_a_cell_that_runs(path):
    read = read_submission(path)
    assert len([piece for piece in read.pieces if piece.kind == CHECK]) == len(read.exercises)
    cells = [_names_of(piece.source) for piece in read.pieces]
    bound = set().union(*(cell.bound for cell in cells))
    assert set().union(*(cell.read for cell in cells)) <= bound


@pytest.mark.long
@pytest.mark.parametrize("path", [p for p in EVERY if p.parent.name == "solutions"], ids=lambda path: path.stem)
def test_every_solution_is_taken_for_the_answer(path):
    answers = [piece for piece in read_submission(path).pieces if piece.kind == ANSWER]
    assert answers and all("# solution" in piece.source for piece in answers)
    assert not [piece for piece in read_submission(path).pieces if piece.kind == ADDED]


def test_the_course_is_read_once():
    assert submission.course() is submission.course()
