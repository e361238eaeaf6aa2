"""The normaliser and the generator behind `make notebooks`."""

import itertools
import shutil
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, strategies as st

from qlora_lab.files import disk
from tools import notebooks

VIEW = "application/vnd.jupyter.widget-view+json"
SECRET = "secret_answer"


@pytest.fixture
def pair(notebook, tmp_path):
    """(student's path, solution's path): a solution on disk whose student's notebook is not made yet."""
    solution = tmp_path / "solutions" / "01_step.ipynb"
    solution.parent.mkdir()
    nbformat.write(notebook, solution)
    return tmp_path / "01_step.ipynb", solution


def free(stored, text, picture="AAAA", width=624):
    """The notebook with a cell whose figures differ from run to run: what it says, and a picture of it."""
    notebook = nbformat.from_dict(stored)
    cell = notebook.cells[3]
    cell.metadata.tags = ["nbval-ignore-output"]
    html = f'<img alt="{text}" style="min-width:{width}px" src="data:image/png;base64,{picture}">'
    cell.outputs = [nbformat.v4.new_output("display_data", {"text/html": html, "text/plain": text})]
    return notebook


TAKES = "a token takes 9.95 ms"


@pytest.mark.parametrize(
    ("old", "new", "alike"),
    [
        (TAKES, ("a token takes 10.25 ms", "BBBB"), True),
        (TAKES, ("a token takes -1e-05 ms", "BBBB"), True),
        (TAKES, ("a token takes 9.96 ms", "AAAA"), True),
        (TAKES, (TAKES, "BBBB"), False),  # drawn in a new way
        (TAKES, ("a token takes 9.96 ms", "BBBB", 720), False),  # and so is this
        (TAKES, ("a prompt takes 9.95 ms", "AAAA"), False),
        ("NF4 takes 9 ms", ("NF3 takes 8 ms", "BBBB"), False),
        ("loss \u2191 9.1", ("loss \u2193 9.2", "BBBB"), False),
        ("it takes 9, and", ("it takes 8. and", "BBBB"), False),
    ],
)
def test_a_notebook_is_stored_again_for_words_and_drawings_and_not_for_figures(stored, old, new, alike):
    assert bool(notebooks._left(notebooks.text_of(free(stored, old)), free(stored, *new))) is alike


def test_figures_elsewhere_sources_and_cells_are_always_stored(stored):
    before = notebooks.text_of(free(stored, "9 ms"))
    other, source, fewer = (free(stored, "8 ms") for _ in range(3))
    other.cells[4].outputs[0].text = "False\n"
    source.cells[3].source = "print('half')"
    fewer.cells.pop()
    assert not any(notebooks._left(before, new) for new in (other, source, fewer))
    assert notebooks._left(before, free(stored, "8 ms")) == [3]


def test_a_cell_of_another_kind_and_another_error_are_stored(stored):
    before, prose = free(stored, "9 ms"), free(stored, "8 ms")
    prose.cells[2].metadata.tags = ["nbval-ignore-output"]
    assert not notebooks._left(notebooks.text_of(before), prose)
    failed = [free(stored, text) for text in ("9 ms", "8 ms")]
    for notebook, said in zip(failed, ("too long", "too short"), strict=True):
        notebook.cells[3].outputs.append(nbformat.v4.new_output("error", ename="ValueError", evalue=said, traceback=[]))
    assert not notebooks._left(notebooks.text_of(failed[0]), failed[1])


def test_what_is_no_notebook_or_not_normalised_is_stored_again(stored):
    new, before = free(stored, "8 ms"), notebooks.text_of(free(stored, "9 ms"))
    assert notebooks._left(before, new)
    for old in (
        "",
        "null",
        "{}",
        before.replace('"outputs"', '"output"'),
        "<<<<<<< ours\n" + before,
        before.replace("\n", "\n "),
    ):
        assert not notebooks._left(old, new)


TOY = Path(__file__).parents[1] / "show" / "toy.py"


@pytest.mark.slow
def test_two_runs_leave_the_same_bytes(pair, notebook, capsys):
    """With a live explorer and a static picture in it, whose widget ids differ from run to run, and a clock."""
    student, solution = pair
    notebook.cells[1].source = "from qlora_lab.show.figure import new_figure, picture\nfrom toy import RoundingExplorer"
    clock = nbformat.v4.new_code_cell("import time; print(time.time())", metadata={"tags": ["nbval-ignore-output"]})
    notebook.cells.insert(5, clock)
    notebook.cells[3].source = "display(picture(new_figure()[0], 'An empty panel'))\nRoundingExplorer()"
    nbformat.write(notebook, solution)
    for folder in (student.parent, solution.parent):
        shutil.copy(TOY, folder)
    assert notebooks.main([str(student)]) == 0
    first = student.read_bytes(), solution.read_bytes()
    assert capsys.readouterr().out.count("] ") == 2
    assert notebooks.main([str(solution)]) == 0
    assert (student.read_bytes(), solution.read_bytes()) == first
    assert capsys.readouterr().out.count(" unchanged but for figures in cells 5, which --figures stores (") == 2
    assert notebooks.main(["--check", str(student)]) == 0
    assert not [p for p in student.parent.rglob("*") if "tmp" in p.name]
    cell = nbformat.read(student, 4).cells[3]
    assert [sorted(output.data) for output in cell.outputs] == [
        ["text/html", "text/plain"],
        ["text/html", "text/plain"],
    ]


@pytest.mark.slow
def test_a_failing_notebook_is_left_untouched(notebook, tmp_path, capsys):
    path = tmp_path / "02_fails.ipynb"
    notebook.cells[3].source, notebook.cells[4].metadata.tags = "1 / 0", []
    nbformat.write(notebook, path)
    before = path.read_bytes()
    assert notebooks.main([str(path)]) == 1
    assert path.read_bytes() == before
    assert "failed, the file is untouched" in (said := capsys.readouterr().out) and "ZeroDivisionError" in said


def test_normalising_twice_changes_nothing_and_removes_what_differs(stored):
    cell = stored.cells[3]
    cell.execution_count, cell.metadata["execution"] = 41, {"iopub.execute_input": "2026-11-22"}
    cell.outputs[1].data[VIEW] = {"model_id": "f00"}
    stored.metadata["widgets"] = {"state": {}}
    once = notebooks.text_of(notebooks.normalise(stored))
    assert notebooks.text_of(notebooks.normalise(nbformat.reads(once, 4))) == once
    for gone in ("f00", "2026-11-22", "widgets", "41"):
        assert gone not in once
    assert [c.execution_count for c in stored.cells if c.cell_type == "code"] == [1, 2, 3]
    assert [c.id for c in stored.cells][:2] == ["markdown-000", "code-001"]
    assert stored.cells[4].metadata.tags == ["exercise"]


def test_unrun_cells_stay_unrun(notebook):
    assert notebooks.normalise(notebook).cells[1].execution_count is None


def test_the_students_version_has_stubs_and_no_outputs(stored):
    student = notebooks.student_version(stored)
    assert student.cells[4].source == "steps = ...\nprint('steps' in globals())"
    assert all(c.outputs == [] and c.execution_count is None for c in student.cells if c.cell_type == "code")
    assert stored.cells[3].outputs and "wide" in stored.cells[4].source  # the solution itself is not touched


def test_a_link_out_of_the_solutions_folder_becomes_shorter(stored):
    stored.cells[2].source = "[this](../10_x.ipynb), [that](03_y.ipynb), [why](../../docs/z.md)"
    links = notebooks.student_version(stored).cells[2].source
    assert links == "[this](10_x.ipynb), [that](03_y.ipynb), [why](../docs/z.md)"


@pytest.mark.parametrize(
    ("region", "stub"),
    [
        (["levels = [1, 2]"], "levels = ..."),
        (["half = 1", "levels = half + 1"], "levels = ..."),
        (["low, high = 1, 2"], "low = high = ..."),
        (["table[0] = 1"], "table[0] = ..."),
        (["for i in range(3):", "    total += i"], "..."),
        (["return 1"], "return ..."),
        ([], "..."),
    ],
)
@pytest.mark.parametrize("indent", ["", "    "])
def test_stubs(region, stub, indent):
    lines = [notebooks.START, *region, notebooks.END]
    source = "\n".join(["before", *(indent + line for line in lines), "after"])
    assert notebooks._stub(source, 0) == f"before\n{indent}{stub}\nafter"


STATEMENTS = st.sampled_from(
    [f"{SECRET} = 1", f"x = {SECRET}", f"return {SECRET}", f"# {SECRET}", f"print({SECRET})", ""]
)


@pytest.mark.long
@given(st.lists(STATEMENTS), st.lists(STATEMENTS), st.integers(0, 8))
def test_no_solution_leaks(first, second, spaces):
    indent, names = " " * spaces, {f"{SECRET} = ..."}
    regions = [[notebooks.START, *region, notebooks.END] for region in (first, second)]
    source = "\n".join(indent + line for line in itertools.chain(*regions))
    stub = {line.strip() for line in notebooks._stub(source, 0).splitlines()}
    assert not any(SECRET in line for line in stub - names)  # the name to assign is part of the question
    assert not stub & {notebooks.START, notebooks.END}


@pytest.mark.parametrize(
    ("source", "tags", "message"),
    [
        ("x = 1", ["exercise"], "cell 4: a cell tagged 'exercise' holds .*add the region"),
        ("# solution\nx = 1\n# end solution", [], "cell 4: .*add the tag"),
        ("# solution\nx = 1", ["exercise"], "cell 4: '# solution' has no '# end solution'"),
        ("x = 1\n# end solution", ["exercise"], "cell 4: '# end solution' does not pair up"),
        ("# solution\n# solution\n# end solution", ["exercise"], "cell 4: '# solution' does not pair up"),
    ],
)
def test_a_bad_exercise_names_its_cell(notebook, source, tags, message):
    notebook.cells[4].source, notebook.cells[4].metadata.tags = source, tags
    with pytest.raises(ValueError, match=message):
        notebooks.student_version(notebook)


def store(path, notebook):
    path.write_text(notebooks.text_of(notebooks.normalise(notebook)))


@pytest.fixture
def checked(stored, tmp_path):
    """A stored pair, and a function that says what --check finds in the student's notebook."""
    (tmp_path / "solutions").mkdir()
    student, solution = tmp_path / "01_step.ipynb", tmp_path / "solutions" / "01_step.ipynb"
    store(student, notebooks.student_version(stored))
    store(solution, stored)
    assert notebooks.check(student) == notebooks.check(solution) == []
    return student, solution


def test_check_finds_an_edited_student_notebook(checked, stored, capsys):
    edited = notebooks.student_version(stored)
    edited.cells[4].source += "\nsteps = 0.375"
    store(checked[0], edited)
    assert notebooks.main(["--check", str(checked[0])]) == 1
    assert "differs from what solutions/01_step.ipynb generates; edit the solution" in capsys.readouterr().out


def test_check_finds_a_file_that_is_not_normalised(checked):
    checked[1].write_text(checked[1].read_text().replace('"code-001"', '"f00"'))
    assert notebooks.check(checked[1]) == ["is not normalised"]


def test_check_finds_missing_halves(checked):
    checked[0].unlink()
    assert notebooks.find([checked[1]]) == [checked[1], checked[0]]
    assert notebooks.check(checked[0]) == ["is missing, though it has a solution"]
    checked[1].replace(checked[0])
    assert notebooks.check(checked[0]) == ["has exercises but no solutions/01_step.ipynb"]


def test_an_unknown_path_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        notebooks.main([str(tmp_path / "no.ipynb")])
    assert stop.value.code == 2
    assert "no.ipynb does not exist." in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ipynb"
    path.write_text("old")
    monkeypatch.setattr(disk.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        notebooks.replace_text(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.ipynb", "old")]
