"""`qlora-lab grade`: the table, the file, and what is refused. Kernels: tests/exercises/test_grade.py."""

import json

import pytest

from qlora_lab import cli
from qlora_lab.exercises import grade as module
from tests.exercises import toy_course as toy

toy_course = toy.toy_course


@pytest.fixture
def graded(toy_course, tmp_path, monkeypatch, capsys):
    """Grade two notebooks with kernels that tell what is given here."""
    told = [module._Run({"my_double": ["passed", ""], "my_square": ["failed", "Yours: 3."]}, {}, None)]
    told += [module._Run({"my_double": ["not attempted", ""], "my_square": ["not attempted", ""]}, {}, None)]
    monkeypatch.setattr(module, "_run", lambda *_: told.pop(0))
    monkeypatch.chdir(tmp_path)
    for name in ("anna", "ben"):
        toy_course(toy.OWN, f"{name}.ipynb")

    def run(*options):
        code = cli.main(["grade", "handed-in", *options])
        return code, *capsys.readouterr()

    return run


def test_a_low_score_is_no_mistake_and_the_table_names_what_failed(graded, tmp_path):
    code, out, err = graded()
    header, anna, ben, _, total = out.splitlines()
    assert code == 0 and total == "1 of 4 exercises passed"
    assert header.split() == ["file", "notebook", "passed", "seconds", "not", "passed"]
    assert anna.split()[:5] == ["handed-in/anna.ipynb", toy.NAME, "1", "of", "2"] and anna.endswith("my_square failed")
    assert ben.endswith("  2 not attempted")
    assert "grading:" in err and err.endswith("what is wrong with an answer is in scores.json\n")
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["complete"] and [row["passed"] for row in content["notebooks"]] == [1, 0]


def test_json_and_quiet_leave_out_the_rest(graded, tmp_path):
    code, out, err = graded("--json", "--quiet", "--out", "mine.json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "mine.json").read_text())


def test_what_was_graded_before_a_stop_is_kept(graded, tmp_path, monkeypatch):
    first = module._run

    def stopped(*args):
        monkeypatch.setattr(module, "_run", interrupt)
        return first(*args)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_run", stopped)
    code, _, err = graded()
    content = json.loads((tmp_path / "scores.json").read_text())
    assert code == 130 and err.endswith("qlora-lab grade: interrupted\n")
    assert not content["complete"] and [row["passed"] for row in content["notebooks"]] == [1]


BAD = {
    "missing": (["nowhere.ipynb"], "No such file or directory: 'nowhere.ipynb'"),
    "not a notebook": (["notes.txt"], "notes.txt, line 1, column 1: not JSON"),
    "not of this course": (["other.ipynb"], "other.ipynb is not a notebook of this course"),
    "no notebook in it": (["empty"], "empty holds no notebook of this course: name a folder"),
    "an empty path": ([""], "a path is empty"),
    "one of two": (["handed-in/anna.ipynb", "nowhere.ipynb"], "No such file or directory: 'nowhere.ipynb'"),
    "no time": (["handed-in", "--minutes", "0"], "--minutes is 0, but must be above 0 and at most 1,440: try 10"),
    "too much time": (["handed-in", "--minutes", "1e9"], "--minutes is 1e+09, but must be above 0"),
    "somebody's file": (["handed-in", "--out", "notes.txt"], "notes.txt exists and is not a file of scores"),
    "a folder": (["handed-in", "--out", "empty"], "empty is not a file, so it cannot become a file of scores"),
    "a student's notebook": (["handed-in", "--out", "handed-in/anna.ipynb"], "anna.ipynb exists and is not"),
    "no such folder": (["handed-in", "--out", "nowhere/s.json"], "nowhere: create it, or choose another"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_costs_no_kernel(toy_course, tmp_path, monkeypatch, capsys, kind):
    words, reason = BAD[kind]
    monkeypatch.setattr(module, "_run", lambda *_: pytest.fail("a kernel starts"))
    monkeypatch.chdir(tmp_path)
    toy_course(toy.OWN, "anna.ipynb")
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "other.ipynb").write_text(json.dumps(toy.notebook(["1"], title="# Mine")))
    (tmp_path / "empty").mkdir()
    assert cli.main(["grade", *words]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert not out and line.startswith("qlora-lab grade: ") and reason in line
    assert not (tmp_path / "scores.json").exists() and (tmp_path / "notes.txt").read_text() == "my notes"
