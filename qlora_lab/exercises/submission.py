"""Read a student's notebook, and put its answers between the cells of the course's own notebook.

In: the path of a notebook, as JupyterLab, VS Code or a hosted service saved it. Out: a Submission: the pieces of code
to run, in order. What surrounds an answer comes from the course: its imports, its data, its checks. A check that was
edited or deleted is whole again. Cells that a student added run where they stand; of an edited cell, new imports and
functions are kept.

Not here: running the pieces (grade.py), and which of them are needed (needed.py).
"""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from qlora_lab.exercises.needed import needed, parsed
from qlora_lab.files.course import course_path
from qlora_lab.files.home import expanded
from qlora_lab.files.strict_json import LIST, Rule, check_keys, read_json

LARGEST = 64 * 2**20  # bytes: the course's own have less than 1 MiB, and a student may have drawn large pictures
ANSWER, ADDED, COURSE, CHECK = "answer", "added", "course", "check"


class NotOfCourseError(ValueError):
    """A notebook that can be read, and is not one of the course's."""


class Cell(NamedTuple):
    """A code cell."""

    id: str | None
    source: str


class Exercise(NamedTuple):
    """An exercise of the course. cell, check: indices of its answer and of its check among the code cells."""

    name: str
    binds: frozenset[str]  # names of the answer
    cell: int
    check: int
    stub: str
    rest: str  # what the course's cell holds after the stub


class Piece(NamedTuple):
    """Code to run as one cell. kind: whose it is. exercise: the one whose grade suffers if it does not end, or ""."""

    kind: str
    source: str
    exercise: str = ""


class Submission(NamedTuple):
    """A student's notebook. notebook: the name of the course's notebook, such as "07_lora"."""

    path: Path
    notebook: str
    exercises: list[str]
    pieces: list[Piece]


def read_submission(path: str | Path) -> Submission:
    """Read one notebook. Nothing in it is run.

    Raises NotOfCourseError for another notebook, ValueError for a file that is not a notebook, each in one line, and
    OSError for a file that cannot be read.
    """
    path = expanded(path)
    title, cells = _read_cells(path)
    # the heading first: students rename files
    named = [name for name, (known, _) in course().items() if title == known]
    named = named or [name for name in course() if name in path.stem]  # its first heading was edited
    if not named:
        known = "neither its first heading nor its name is known"
        raise NotOfCourseError(
            f"{path} is not a notebook of this course: {known}; name one that `qlora-lab open` copied"
        )
    (name, *_) = named
    exercises = exercises_of(name)
    pieces = _merged(cells, course()[name][1], exercises)
    always = {i for i, piece in enumerate(pieces) if piece.kind in (ANSWER, CHECK)}
    pieces = [pieces[i] for i in needed([piece.source for piece in pieces], always)]
    return Submission(path, name, [exercise.name for exercise in exercises], pieces)


def without(submission: Submission, index: int) -> Submission | None:
    """Return the submission without what piece `index` tried, to run the others; None if that piece is the course's.

    The answer becomes the open one, so that names which other cells need still exist.
    """
    blamed = submission.pieces[index]
    if blamed.exercise:
        stubs = {exercise.name: exercise.stub for exercise in exercises_of(submission.notebook)}
        pieces = []
        for piece in submission.pieces:
            if piece.exercise == blamed.exercise and piece.kind == ANSWER:
                piece = piece._replace(source=stubs[piece.exercise])
            if piece.exercise != blamed.exercise or piece.kind in (ANSWER, COURSE):
                pieces.append(piece)
        return submission._replace(pieces=pieces)
    if blamed.kind == ADDED:  # a student's own cell, which no exercise owns
        return submission._replace(pieces=submission.pieces[:index] + submission.pieces[index + 1 :])
    return None


# --------------------------------------------------------------------------------------------------------- the course


@cache
def course() -> dict[str, tuple[str, list[Cell]]]:
    """Name -> (first heading, code cells) of each notebook of the course."""
    return {path.stem: _read_cells(path) for path in sorted(course_path("notebooks").glob("*.ipynb"))}


@cache
def exercises_of(notebook: str) -> list[Exercise]:
    """The exercises of a notebook, in order: each a cell with an open answer, and the next cell that checks."""
    found = []
    opened = None
    for index, cell in enumerate(course()[notebook][1]):
        tree = parsed(cell.source)
        statements = tree.body if tree else []
        answers = [node for node in statements if _is_open(node)]
        if answers:
            lines = cell.source.splitlines()
            end = answers[-1].end_lineno
            binds = frozenset().union(*map(_binds, answers))
            opened = index, binds, "\n".join(lines[:end]), "\n".join(lines[end:])
        name = _checked(statements)  # often cells later: text and hints lie between
        if name and opened:
            place, binds, stub, rest = opened
            found.append(Exercise(name, binds, place, index, stub, rest))
            opened = None
    return found


def _is_open(node: ast.stmt) -> bool:
    """Tell whether `...` stands where an answer belongs. A check may return `...` too, but not as its last line."""
    last = node.body[-1] if isinstance(node, ast.FunctionDef) else node
    value = last.value if isinstance(last, (ast.Return, ast.Assign, ast.Expr)) else None
    return isinstance(value, ast.Constant) and value.value is ...


def _binds(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a cell gives to functions, classes and values."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {inner.id for target in targets if target for inner in ast.walk(target) if isinstance(inner, ast.Name)}


def _checked(statements: list[ast.stmt]) -> str | None:
    """The name that a call of `ql.check` gives to its exercise."""
    for node in statements:
        call = getattr(node, "value", None)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "ql.check":
            return next(keyword.value.value for keyword in call.keywords if keyword.arg == "name")
    return None


# ------------------------------------------------------------------------------------------------------ the student's


def _read_cells(path: Path) -> tuple[str, list[Cell]]:
    """Return the first heading of a notebook, and its code cells."""
    content = read_json(path, _NOTEBOOK, ("nbformat",), largest=LARGEST)  # an older format has no cells
    check_keys(content, _NOTEBOOK, str(path), _NOTEBOOK)
    title = ""
    cells = []
    for number, cell in enumerate(content["cells"]):
        source = cell.get("source") if isinstance(cell, dict) else None
        lines = [source] if isinstance(source, str) else source
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ValueError(f"{path} is not a notebook: cell {number} has no text; save it in JupyterLab")
        source = "".join(lines)
        if cell.get("cell_type") == "code":
            name = cell.get("id")
            cells.append(Cell(name if isinstance(name, str) else None, source))
        elif not title and source.startswith("# "):
            title = source.partition("\n")[0].strip()
    return title, cells


_FORMAT = Rule("4: open the notebook in JupyterLab and save it", lambda value: value == 4)
_NOTEBOOK = {"nbformat": _FORMAT, "cells": LIST}


def _merged(student: list[Cell], own: list[Cell], exercises: list[Exercise]) -> list[Piece]:
    """Put what a student wrote between the course's cells."""
    matched = _matched(student, own, exercises)
    zone = {}  # index of a cell -> the exercise that it belongs to: from its answer to its check
    for exercise in exercises:
        zone.update(dict.fromkeys(range(exercise.cell, exercise.check + 1), exercise))
    pieces = [Piece(ADDED, source) for source in matched.added.get(-1, [])]  # cells above the first one
    for index, cell in enumerate(own):
        exercise = zone.get(index)
        name = exercise.name if exercise else ""
        if index in matched.edited:
            pieces += [Piece(ADDED, part, name) for part in _new_parts(matched.edited[index], cell.source)]
        source = cell.source
        if exercise and index == exercise.cell:
            pieces.append(Piece(ANSWER, matched.answers.get(name, exercise.stub), name))
            # before the course's cells, so that these are as they were when the check runs
            pieces += [Piece(ADDED, more, name) for more in matched.inside.get(name, [])]
            source = exercise.rest
        checks = exercise and index == exercise.check
        if source.strip():
            pieces.append(Piece(CHECK if checks else COURSE, source, name))
        pieces += [Piece(ADDED, more) for more in matched.added.get(index, [])]
    return pieces


class _Matched(NamedTuple):
    """What a student's cells are: answers and what belongs to them, by exercise; the rest, by index of a course's cell.

    edited: cells of the course that were changed. added: cells that follow this one (-1: that come before all).
    """

    answers: dict[str, str]
    inside: dict[str, list[str]]
    edited: dict[int, str]
    added: dict[int, list[str]]


def _matched(student: list[Cell], own: list[Cell], exercises: list[Exercise]) -> _Matched:
    """Compare a student's cells with the course's.

    Text decides first, because another version of the course may number its cells in another way, and some services
    drop the ids.
    """
    matched = _Matched({}, {}, {}, {})
    place = _same_text(student, own)
    for exercise in exercises:
        answer = _answer(student, own, place, exercise, exercises)
        if answer is not None and exercise.cell not in place.values():
            place[answer] = exercise.cell
            matched.answers[exercise.name] = student[answer].source
    # what is left may be a cell of the course that was edited: its id then tells
    free = {cell.id: i for i, cell in enumerate(own) if i not in place.values() and cell.id}
    for i, cell in enumerate(student):
        if i not in place and cell.id in free:
            place[i] = free.pop(cell.id)
            matched.edited[place[i]] = cell.source
    after = -1
    for i, cell in enumerate(student):
        if i in place:
            after = place[i]
            continue
        names = _names_in(cell.source)
        # between an answer and its check, or an answer given once more, below the check
        owners = [exercise for exercise in exercises if exercise.cell <= after < exercise.check]
        owners += [exercise for exercise in exercises if exercise.binds <= names and exercise.cell <= after]
        if owners:
            matched.inside.setdefault(owners[0].name, []).append(cell.source)
        else:
            matched.added.setdefault(after, []).append(cell.source)
    return matched


def _answer(
    student: list[Cell], own: list[Cell], place: dict[int, int], exercise: Exercise, exercises: list[Exercise]
) -> int | None:
    """The index of the student's cell that answers: one that binds the names, or else the one with the id."""
    free = [i for i in range(len(student)) if i not in place]
    named = {i: {other.name for other in exercises if other.binds <= _names_in(student[i].source)} for i in free}
    same = [i for i in free if student[i].id == own[exercise.cell].id]
    mine = [i for i in [*same, *free] if exercise.name in named[i]]
    # with the id and another name: `def my_answer` in place of `def my_pack`; its check will say what is missing
    return next(iter([*mine, *(i for i in same if not named[i])]), None)


def _same_text(student: list[Cell], own: list[Cell]) -> dict[int, int]:
    """Pair cells of the same text, in order: index of the student's cell -> index of the course's."""
    waiting = {}
    for index, cell in enumerate(own):
        waiting.setdefault(cell.source.strip(), []).append(index)  # some cells occur twice
    place = {}
    for index, cell in enumerate(student):
        if waiting.get(cell.source.strip()):
            place[index] = waiting[cell.source.strip()].pop(0)
    return place


def _names_in(source: str) -> set[str]:
    """The names that a cell binds; of one that is not Python, all its words, since it may hold a broken answer."""
    tree = parsed(source)
    return set().union(*map(_binds, tree.body)) if tree else set(re.findall(r"\w+", source))


def _new_parts(mine: str, own: str) -> list[str]:
    """The imports and functions of an edited cell that the course's cell does not have."""
    tree, known = parsed(mine), parsed(own)
    if tree is None:
        return []
    old = {ast.dump(node) for node in (known.body if known else ())}
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    return [ast.unparse(node) for node in tree.body if isinstance(node, kinds) and ast.dump(node) not in old]
