"""A course of one notebook that imports nothing heavy, so that its kernel starts in a second."""

import json

import pytest

from qlora_lab.exercises import submission

NAME = "07_toy"
TITLE = "# How is a number doubled?"
# cells of the course; the third is an exercise with its check, the fifth and the last are one in two cells
IMPORTS = """from qlora_lab.exercises import verdicts
class ql:
    def check(answer, expected, name):
        verdicts.record(name, "passed" if answer(3) == expected else "not attempted", "a line")
        print(name, "done")"""
LONG = "slow = [print('a long run') for _ in range(10)]"
DOUBLE = """def my_double(x):
    return ...

six = 3 + 3
ql.check(my_double, six, name="my_double")"""
BESIDE = "nine = 9"
SQUARE = "def my_square(x):\n    return ..."
DATA = "def square(answer):\n    if answer is ...:\n        return ...\n    return answer(3)\nwanted = nine"
CHECK = 'ql.check(my_square, wanted, name="my_square")'
OWN = [IMPORTS, LONG, DOUBLE, BESIDE, SQUARE, DATA, CHECK]


def notebook(sources, ids=True, title=TITLE) -> dict:
    """A notebook as JupyterLab saves it. sources: of its code cells; (id, source) for a cell with another id."""
    cells = [{"cell_type": "markdown", "id": "markdown-000", "metadata": {}, "source": [f"{title}\n", "Words."]}]
    for number, source in enumerate(sources):
        name, source = source if isinstance(source, tuple) else (f"code-{number:03d}", source)
        cell = {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        cells.append(cell | ({"id": name} if ids else {}))
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def toy_course(tmp_path, monkeypatch):
    """Make this the course; returns a function that saves a student's notebook and gives its path."""

    def save(sources, name=f"{NAME}.ipynb", **options):
        path = tmp_path / "handed-in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(notebook(sources, **options)))
        return path

    own = submission._read_cells(save(OWN, "own.ipynb"))
    (tmp_path / "handed-in" / "own.ipynb").unlink()
    monkeypatch.setattr(submission, "course", lambda: {NAME: own})
    submission.exercises_of.cache_clear()
    yield save
    submission.exercises_of.cache_clear()
