"""Grading: real kernels on a toy course, and the score file. From a wheel, a real notebook: tests/test_wheel.py."""

import json

import pytest

from qlora_lab.exercises import check as checking, grade as module, verdicts
from qlora_lab.exercises.grade import Grade, Result, check_scores_path, find_notebooks, grade, save_scores, scores
from qlora_lab.exercises.submission import read_submission
from tests.exercises import toy_course as toy

toy_course = toy.toy_course
DOUBLE = "def my_double(x):\n    return 2 * x"
SQUARE = "def my_square(x):\n    return x * x"
ENDLESS = "def my_double(x):\n    while True:\n        print('my_double: correct')"
DEADLY = "import os\ndef my_square(x):\n    os._exit(1)"


def answered(double: str, square: str) -> list[str]:
    return [*toy.OWN[:2], f"{double}\n{toy.DOUBLE.partition('...')[2]}", toy.BESIDE, square, *toy.OWN[5:]]


def only(path, minutes=1.0) -> list[Result]:
    (graded,) = grade([read_submission(path)], minutes, progress=False)
    return graded.results


@pytest.mark.slow
def test_what_does_not_end_and_what_ends_its_kernel_cost_their_own_exercise_alone(toy_course):
    """Three kernels: without the endless answer, the deadly one is found, and then neither is left."""
    results = only(toy_course(answered(ENDLESS, DEADLY)), minutes=0.05)
    assert results == [
        Result("my_double", "error", "did not end within 0.05 min"),
        Result("my_square", "error", "ended its kernel"),
    ]


@pytest.mark.slow
def test_an_error_costs_its_own_exercise_and_the_students_file_stays(toy_course):
    forged = f"{SQUARE}\nql.check = lambda *_, **__: print('my_double: correct')"
    path = toy_course(answered("def my_double(x)\n    return 2 * x", SQUARE))
    before = path.read_bytes(), path.stat().st_mtime_ns
    double, square = only(path)
    assert double.result == "error" and double.line.startswith("SyntaxError: expected ':'")
    assert square == Result("my_square", "passed", "a line")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before and [*path.parent.iterdir()] == [path]
    assert only(toy_course(answered(DOUBLE, forged)))[1] == Result("my_square", "error", "its check did not run")


# ----------------------------------------------------------------------------------------- what follows from a kernel


@pytest.fixture
def told(toy_course, monkeypatch):
    """Grade an untouched notebook whose kernel tells what is given, each time that one runs."""

    def run(*runs) -> list[tuple]:
        waiting = list(runs)
        monkeypatch.setattr(module, "_run", lambda *_: waiting.pop(0))
        results = only(toy_course(toy.OWN))
        assert not waiting
        return [tuple(result)[1:] for result in results]

    return run


def test_verdicts_come_first_and_errors_say_why_there_is_none(told):
    passed, failed, opened = ["passed", ""], ["failed", "Yours: 1."], ["not attempted", ""]
    assert told(module._Run({"my_double": passed, "my_square": failed}, {}, None)) == [tuple(passed), tuple(failed)]
    errors = {"my_double": "SyntaxError: x", "my_square": "NameError: y"}
    wanted = [("error", "SyntaxError: x"), ("error", "NameError: y")]
    assert told(module._Run({"my_double": opened}, errors, None)) == wanted
    assert told(module._Run({"my_double": passed}, errors, None))[0] == tuple(passed)
    assert told(module._Run({}, {}, None)) == [("error", "its check did not run")] * 2


def test_a_failure_of_the_course_is_not_the_students(told):
    told_by = {"": "ModelError: no model", "my_double": "NameError: name 'model' is not defined"}
    assert told(module._Run({}, told_by, None)) == [("error", "a cell of the course failed: ModelError: no model")] * 2


def test_a_cell_of_the_course_that_does_not_end_ends_the_grading(told):
    stopped = module._Run({"my_double": ["passed", ""]}, {}, (0, "did not end within 1 min"))
    assert told(stopped) == [("passed", ""), ("error", "not reached: another cell did not end within 1 min")]


def test_a_long_line_is_cut(told):
    ((_, line), _) = told(module._Run({"my_double": ["failed", "a \n" * 500]}, {}, None))
    assert len(line) <= module.LONGEST and line.endswith(" ...") and "\n" not in line


# -------------------------------------------------------------------------------------------------------- what is kept


def test_check_records_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verdicts, "_found", {})
    monkeypatch.setattr(checking, "_said", {})
    checking.check(3, 4, name="forgotten")
    verdicts.clear()
    for name, answer in (("a", 4), ("b", 3), ("c", ...)):
        checking.check(answer, 4, name=name)
    verdicts.save(str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"a": ["passed", ""], "b": ["failed", "Yours: 3."], "c": ["not attempted", ""]}


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"a": 1}', '{"a": []}', '{"a": ["won", ""]}', '{"a": ["passed", 1]}']
)
def test_a_verdict_that_a_student_wrote_over_is_none(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert module._verdict(tmp_path / "a.json", "a") is None
    assert module._verdict(tmp_path / "nowhere.json", "a") is None


def test_a_kernel_is_started_again_and_not_for_ever(toy_course, monkeypatch):
    """Another program may take the port that Jupyter has chosen: seen where several kernels started at once."""
    started = []

    class Client:
        def setup_kernel(self, **_):
            started.append(self)
            raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(module, "_client", lambda sources: Client())
    with pytest.raises(OSError, match="kernel does not start .Kernel died before replying to kernel_info.: `python -m"):
        only(toy_course(toy.OWN))
    assert len(started) == module.TRIES and len(set(started)) == 1


# ---------------------------------------------------------------------------------------------------- files and folders


def test_a_folder_gives_the_course_notebooks_in_it_and_nothing_beside_them(toy_course):
    paths = [toy_course(toy.OWN, name) for name in ("anna/07_toy.ipynb", "ben.ipynb", "ben/sub/x.ipynb")]
    toy_course(toy.OWN, "anna/solutions/07_toy.ipynb")
    toy_course(toy.OWN, ".ipynb_checkpoints/07_toy-checkpoint.ipynb")
    toy_course(["1"], "anna/my own.ipynb", title="# Mine")
    home = paths[1].parent
    told = "left out: .*anna/solutions, as folders of this name hold the course's own answers"
    with (
        pytest.warns(UserWarning, match="left out: .*my own.ipynb is not a notebook of this course"),
        pytest.warns(UserWarning, match=told),
    ):
        assert {found.path for found in find_notebooks([home])} == set(paths)
    (home / "anna" / "my own.ipynb").unlink()
    with pytest.warns(UserWarning, match=told):
        assert [found.path for found in find_notebooks([paths[2], home / "anna"])] == [paths[2], paths[0]]
    assert [found.path.parent.name for found in find_notebooks([home / "anna" / "solutions"])] == ["solutions"]


def test_a_damaged_file_in_a_folder_is_named_and_not_left_out(toy_course):
    home = toy_course(toy.OWN).parent
    (home / "ben.ipynb").write_text("")
    with pytest.raises(ValueError, match="ben.ipynb, line 1, column 1: it is empty"):
        find_notebooks([home])


@pytest.mark.filterwarnings("ignore:left out")
def test_bad_paths_are_named_before_anything_runs(toy_course, tmp_path):
    toy_course(["1"], "mine.ipynb", title="# Mine")
    with pytest.raises(ValueError, match="handed-in holds no notebook of this course: name a folder"):
        find_notebooks([tmp_path / "handed-in"])
    with pytest.raises(ValueError, match="a path is empty"):
        find_notebooks([""])
    with pytest.raises(FileNotFoundError):
        find_notebooks([tmp_path / "nowhere.ipynb"])


def some_grades() -> list[Grade]:
    results = [Result("a", "passed"), Result("b", "failed", "Yours: 3."), Result("c", "not attempted")]
    return [Grade("anna.ipynb", "07_toy", results, 1.5), Grade("ben.ipynb", "07_toy", results[:1], 2.0)]


def test_the_score_file_holds_a_row_for_each_notebook(tmp_path):
    path = save_scores(tmp_path / "scores.json", some_grades(), "1.0", complete=False)
    content = json.loads(path.read_text())
    assert content == scores(some_grades(), "1.0", complete=False)
    assert (content["complete"], content["passed"], content["out_of"]) == (False, 2, 4)
    anna = content["notebooks"][0]
    assert (anna["file"], anna["passed"], anna["out_of"], anna["seconds"]) == ("anna.ipynb", 1, 3, 1.5)
    assert anna["exercises"]["b"] == {"result": "failed", "line": "Yours: 3."}
    assert save_scores(path, some_grades(), "1.0") == path and json.loads(path.read_text())["complete"]  # replaced


@pytest.mark.parametrize("text", ["", "{}", '{"notebooks": []}', "my own notes"])
def test_a_file_that_holds_no_scores_is_kept(tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(FileExistsError, match="mine.json exists and is not a file of scores, so it is kept"):
        save_scores(tmp_path / "mine.json", some_grades(), "1.0")
    assert (tmp_path / "mine.json").read_text() == text
    with pytest.raises(FileExistsError, match="is not a file, so it cannot become a file of scores"):
        check_scores_path(tmp_path)
    with pytest.raises(ValueError, match="the path is empty"):
        check_scores_path("")
