"""Each rule fires on a notebook that breaks it, and none on one that keeps them."""

import json
import statistics
from pathlib import Path

import nbformat
import pytest

from tools.notebook_rules import LONGEST_CELL, headings, problems, unsolved

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
ALL = sorted(NOTEBOOKS.rglob("*_*.ipynb"))
WIDEST_LINE = 88  # columns: a wider one scrolls in a window of 1280 pixels
MEDIAN_LINES = 3  # of the cells that a student sees


def broken(notebook):
    return problems(json.loads(nbformat.writes(notebook)))


def test_a_good_notebook_breaks_no_rule(stored):
    assert broken(stored) == []


def test_unrun_and_out_of_order_cells(stored):
    stored.cells[1].execution_count = None
    assert "cell 1: run number None, not 1; nbval would compare nothing" in broken(stored)[0]
    stored.cells[1].execution_count = 2
    assert "cell 1: run number 2, not 1" in broken(stored)[0]


def test_stored_errors(stored):
    stored.cells[3].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    assert broken(stored) == [
        "cell 3: an error is stored. Mend the cell, or tag it raises-exception if the error is the lesson."
    ]
    stored.cells[3].metadata.tags = ["raises-exception"]
    assert broken(stored) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("out = W.Output()", "nbval cannot compare Output"),
        ("interact(f, x=1)", "nbval cannot compare Output"),
        ("@interact\ndef f(): pass", "nbval cannot compare Output"),
        ("W.interactive_output(f, {})", "nbval cannot compare Output"),
        ("clear_output()", "nbval cannot compare Output"),
        ("display(x, display_id='a')", "nbval cannot compare Output"),
        ("%pip install torch", "installs, warning filters and autoreload"),
        ("!pip install torch", "installs, warning filters and autoreload"),
        ("%load_ext autoreload", "installs, warning filters and autoreload"),
        ("warnings.filterwarnings('ignore')", "installs, warning filters and autoreload"),
        ("import os", "imports belong in the first code cell"),
        ("x = 1\nfrom os import path", "imports belong in the first code cell"),
        ("x = 1\n" * 11, "cell 3: 11 lines, at most 10"),
    ],
)
def test_code_rules(stored, source, message):
    stored.cells[3].source = source
    (sentence,) = broken(stored)
    assert sentence.startswith("cell 3: ") and message in sentence


@pytest.mark.parametrize("source", ["x = 1\n" * 10, "%timeit 1", "def f():\n    import os"])
def test_code_that_is_fine(stored, source):
    stored.cells[3].source = source
    assert broken(stored) == []


@pytest.mark.parametrize(
    ("cell", "text", "message"),
    [
        (0, "# A\n## B\n# C?", "exactly one H1, a question"),
        (0, "# A statement", "exactly one H1, a question"),
        (0, "No heading", "exactly one H1, a question"),
        (2, "### Deep", "heading 'Deep' jumps from level 1 to 3"),
        (5, "## Exercises\n## Check yourself\n## What we left out\n## Next", "the last four H2 headings are"),
        (5, "## Check yourself\n## Exercises\n## What we left out\n## Next\n## More", "the last four H2 headings are"),
        (0, "# What?\nYou need. Runs in. Paper section.", "needs a line 'After this you can'"),
        (0, "Hello\n# What?\n", "cell 0: the notebook starts with its H1"),
        (1, "import math\nx = 1", "cell 1: the first code cell holds the imports"),
        (1, "x = 1", "cell 1: the first code cell holds the imports"),
        (1, "import os\nos.environ['A'] = str(1)", "cell 1: the first code cell holds the imports"),
        (2, "## A\n![](a.png)", "cell 2: an image has no alt text"),
        (2, "## A\n<img src='a.png'>", "cell 2: an image has no alt text"),
        (2, "## A\n<img alt=' ' src='a.png'>", "cell 2: an image has no alt text"),
    ],
)
def test_shape_rules(stored, cell, text, message):
    stored.cells[cell].source = text
    assert any(message in sentence for sentence in broken(stored))


def test_a_switch_that_is_read_at_import_may_stand_before_it(stored):
    stored.cells[1].source = "import os\nos.environ['TRITON_INTERPRET'] = '1'  # before Triton\nimport triton"
    assert broken(stored) == []


def test_stored_pictures_need_alt_text(stored):
    stored.cells[3].outputs[1].data["text/html"] = '<p><img src="x"><img alt="step 0.5" src="y">'
    assert broken(stored) == ["cell 3: an image has no alt text. Say what it shows, with its key numbers."]
    stored.cells[3].outputs[1].data["text/html"] = '<img alt="step 0.5" src="y">'
    assert broken(stored) == []


TITLED = [  # above a figure: the lines that draw it
    'ax.set_title("Small blocks cost less")',
    'fig.suptitle(f"At {size} weights {name} errs least")',
    'ax.set(xlabel="size", title="Small blocks cost less")',
]
UNTITLED = [
    "ax.plot(x)",
    'ax.set_title("Error of blocks")',
    'ax.set_title(f"{name}: {error:.2f} %")',
    'ax.set(xlabel="the size of a block")',
    'ax.plot(x, label="the size of a block")',
]


@pytest.mark.parametrize(("title", "count"), [*((line, 0) for line in TITLED), *((line, 1) for line in UNTITLED)])
@pytest.mark.parametrize("joint", ["\n", None], ids=["one cell", "two cells"])
def test_a_figure_has_a_title_that_says_what_it_shows(stored, title, count, joint):
    lines = ["fig, ax = new_figure()", title, 'ql.picture(fig, "error 1 to 2 %")']
    if joint:
        stored.cells[3].source = joint.join(lines)
    else:
        stored.cells[3].source = lines[0]
        stored.cells[4].update(source="\n".join(lines[1:]), metadata={})
    found = [sentence for sentence in broken(stored) if "a figure has no title" in sentence]
    assert len(found) == count and all(sentence.startswith(f"cell {3 if joint else 4}: ") for sentence in found)


def test_the_title_of_another_figure_does_not_count(stored):
    first, second = (f'fig, ax = new_figure()\n{line}\nql.picture(fig, "a")' for line in (TITLED[0], UNTITLED[0]))
    stored.cells[3].source = first
    stored.cells[4].update(source=second, metadata={})
    assert [sentence[:7] for sentence in broken(stored) if "a figure has no title" in sentence] == ["cell 4:"]


ANSWER = {"tags": ["answer"], "jupyter": {"outputs_hidden": True}}


@pytest.fixture
def predicted(stored):
    """A question to predict below the second heading, with its guess and its answer in cells 3 and 4."""
    stored.cells[2].source += "\n\n**Predict first:** what is the root?"
    asked = nbformat.v4.new_output("display_data", {"text/plain": "What is it? Run this cell to guess."})
    stored.cells.insert(3, nbformat.v4.new_code_cell('root = ql.guess("What is it?")', outputs=[asked]))
    stored.cells[4].source += "\nroot.compare(step)"
    stored.cells[4].metadata = nbformat.from_dict(ANSWER)
    numbered(stored)
    return stored


def numbered(notebook):
    for count, cell in enumerate([cell for cell in notebook.cells if cell.cell_type == "code"], 1):
        cell.execution_count = count


def test_an_answer_is_out_of_sight(predicted):
    assert broken(predicted) == []
    predicted.cells[4].metadata = nbformat.from_dict({"tags": ["answer"]})
    in_sight = "an answer is in sight. Hide the output of code (outputs_hidden), or use <details>."
    assert broken(predicted) == [f"cell 4: {in_sight}"]
    predicted.cells[4].metadata = nbformat.from_dict(ANSWER)
    told = nbformat.v4.new_markdown_cell("It is a half.", metadata={"tags": ["answer"]})
    predicted.cells.insert(5, told)
    assert broken(predicted) == [f"cell 5: {in_sight}"]
    told.source = "<details><summary>What we saw</summary>\n\nIt is a half.\n\n</details>"
    assert broken(predicted) == []


def test_a_question_to_predict_has_a_guess(predicted):
    del predicted.cells[3]
    numbered(predicted)
    asked = "the question to predict has no guess. Ask in the next cell: name = ql.guess(...)."
    assert broken(predicted) == [f"cell 2: {asked}"]


def test_a_guess_is_compared_in_its_section(predicted):
    compared = "nothing compares the guess. Let an answer of its section end in root.compare(...)."
    predicted.cells.insert(4, nbformat.v4.new_markdown_cell("## Another"))
    assert broken(predicted) == [f"cell 3: {compared}"]
    del predicted.cells[4]
    predicted.cells[4].source = "step = 0.5"
    assert broken(predicted) == [f"cell 3: {compared}"]


def test_a_guess_is_compared_out_of_sight(predicted):
    predicted.cells[4].metadata = nbformat.from_dict({})
    in_sight = "the comparison with the guess root is in sight. Tag it `answer`, and hide its output."
    assert broken(predicted) == [f"cell 4: {in_sight}"]


def test_nothing_in_sight_stands_between_a_guess_and_its_answer(predicted):
    shown = nbformat.v4.new_output("display_data", {"text/plain": "0.5", "text/html": "0.5"})
    between = nbformat.v4.new_code_cell("step", outputs=[shown])
    predicted.cells.insert(4, between)
    numbered(predicted)
    moved = "an output stands in sight between the guess root and its answer. Move it behind the answer."
    assert broken(predicted) == [f"cell 4: {moved}"]
    between.metadata = nbformat.from_dict(ANSWER)
    assert broken(predicted) == []
    between.metadata = nbformat.from_dict({})
    shown.data["text/html"] += "<div>Run this cell to play.</div>"  # an explorer
    assert broken(predicted) == []


def test_a_comparison_of_another_guess_is_none(predicted):
    """Of a guess whose name ends in this one's."""
    predicted.cells[4].source = "step = 0.5\nevery_root.compare(step)"
    compared = "nothing compares the guess. Let an answer of its section end in root.compare(...)."
    assert broken(predicted) == [f"cell 3: {compared}"]


@pytest.mark.parametrize("source", ["root = 1", "def root(): ...", "_, root = 1, 2", "for root in (): ..."])
def test_the_name_of_a_guess_is_bound_once(predicted, source):
    predicted.cells[5].update(cell_type="code", source=source, outputs=[], execution_count=9)
    again = "cell 5: it binds root again, the guess of cell 3. Take another name."
    assert again in broken(predicted)
    predicted.cells[5].source = "def other():\n    root = 1"  # a function's own
    assert again not in broken(predicted)


def test_a_guess_shows_nothing_but_its_box(predicted):
    """A stream beside the box would stand in sight of the question, in its own cell or in the next guess's."""
    printed = nbformat.v4.new_output("stream", text="0.5\n")
    more = nbformat.v4.new_output("display_data", {"text/plain": "0.5"})
    second = nbformat.v4.new_code_cell('half = ql.guess("And this?")', outputs=predicted.cells[3].outputs)
    guesses = [predicted.cells[3], second]
    predicted.cells[4].source += "\nhalf.compare(step)"
    predicted.cells.insert(4, second)
    numbered(predicted)
    assert broken(predicted) == []
    for output in (printed, more):
        for i in (0, 1):
            box = guesses[i].outputs
            guesses[i].outputs = [*box, output]
            rest = f"cell {3 + i}: a guess shows more than its box. Move the rest behind the answer."
            assert rest in broken(predicted)
            guesses[i].outputs = box


def test_a_picture_is_stored_in_html_alone(stored):
    """What a figure of pyplot leaves: JupyterLab shows an image/png without alt text."""
    stored.cells[3].outputs[1].data["image/png"] = "iVBORw0KGgo="
    (sentence,) = broken(stored)
    assert sentence.startswith("cell 3: an image is stored outside of HTML, where its alt text is lost.")


def test_a_notebook_has_at_most_250_kilobytes(stored):
    stored.cells[3].outputs[1].data["text/plain"] = "x" * 248_000
    assert broken(stored) == []
    stored.cells[3].outputs[1].data["text/plain"] = "x" * 250_000
    (sentence,) = broken(stored)
    assert sentence.startswith("the notebook has 25") and "bytes, at most 250,000. Run `make notebooks`" in sentence


def test_headings_in_fenced_code_do_not_count():
    assert headings("# A\n```\n# no\n```\n~~~sh\n## no\n~~~\n## B") == [(1, "A"), (2, "B")]


@pytest.mark.parametrize(
    ("said", "count"),
    [("x: correct", 0), ("x: not yet. It differs: yours is 2.", 1), ("x: not answered yet. Replace", 1)],
)
def test_a_solution_passes_its_own_checks(stored, said, count):
    stored.cells[4].source = "check(steps, 0.375, name='x')"
    stored.cells[4].outputs[0].text = said
    assert len(list(unsolved(json.loads(nbformat.writes(stored))))) == count


def lesson_problems(notebook):
    """What a lesson without test code must not hold: wide lines, long cells, guards in sight, maintainers' talk."""
    visible = []
    for i, cell in enumerate(notebook.cells):
        lines = cell.source.splitlines()
        if cell.cell_type == "markdown":
            if any(word in cell.source for word in ("nbval", "compared by the tests", "asserted")):
                yield f"cell {i}: what the tests do is no part of the lesson"
            continue
        if any(len(line) > WIDEST_LINE for line in lines):
            yield f"cell {i}: a line has more than {WIDEST_LINE} columns"
        if len(lines) > LONGEST_CELL:
            yield f"cell {i}: more than {LONGEST_CELL} lines"
        if not _is_guard(cell):
            visible.append(len(lines))
        yield from (f"cell {i}: {problem}" for problem in _guard_problems(cell, notebook.cells[i + 1 :]))
    if statistics.median(visible) > MEDIAN_LINES:
        yield f"half of the cells in sight have more than {MEDIAN_LINES} lines"


def _is_guard(cell):
    return "guard" in cell.metadata.get("tags", [])


def _guard_problems(cell, following):
    """A guard protects a number of the prose: collapsed, silent, and at the end of its section."""
    if _is_guard(cell) != cell.metadata.get("jupyter", {}).get("source_hidden", False):
        yield "a guard is tagged 'guard' and has its source hidden; no other cell has either"
    if _is_guard(cell):
        after = next((c for c in following if not (c.cell_type == "code" and _is_guard(c))), None)
        if after is None or not after.source.startswith("## "):
            yield "a guard stands at the end of its section"
        if "assert " not in cell.source or cell.outputs:
            yield "a guard asserts, and shows nothing"


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_notebook_keeps_the_rules(path):
    """As nbval's stage finds a quarter of an hour later."""
    assert problems(json.loads(path.read_text("utf-8"))) == []


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_lesson_shows_no_test_code(path):
    assert list(lesson_problems(nbformat.read(path, 4))) == []


@pytest.mark.parametrize("check", ["assert step == 0.5", "if step:\n    testing.assert_close(step, 0.5)"])
def test_an_assertion_in_sight_compares_with_a_result_by_hand(stored, check):
    prose, code = stored.cells[2:4]
    prose.source = said = "## One step"
    code.source = check
    rule = 'cell 3: an assertion is in sight, but neither its cell nor the prose right above says "by hand"'
    (sentence,) = broken(stored)
    assert sentence.startswith(rule)
    for text, source in (
        (f"{said}\n\nBy hand:", check),
        (said, f"{check}  # by hand"),
        (said, f"by_hand = 1\n{check}"),
    ):
        prose.source, code.source = text, source
        assert broken(stored) == []
    prose.source, code.source = f"{said}\n\nBy hand:", check
    stored.cells.insert(3, nbformat.v4.new_code_cell("step = 0.5"))  # between the prose and the assertion
    numbered(stored)
    assert broken(stored)[0].startswith(rule.replace("3", "4"))
    stored.cells[4].metadata = nbformat.from_dict(GUARD)
    assert broken(stored) == []


GUARD = {"tags": ["guard"], "jupyter": {"source_hidden": True}}


@pytest.mark.parametrize(
    ("source", "metadata", "message"),
    [
        ("x = 1  #" + 81 * " ", {}, "more than 88 columns"),
        ("x = 1\n" * 11, {}, "more than 10 lines"),
        ("assert True", {"tags": ["guard"]}, "a guard is tagged 'guard' and has its source hidden"),
        ("assert True", {"jupyter": {"source_hidden": True}}, "a guard is tagged 'guard' and has its source hidden"),
        ("assert True", GUARD, "a guard stands at the end of its section"),
        ("x = 1", GUARD, "a guard asserts, and shows nothing"),
    ],
)
def test_lesson_rules(stored, source, metadata, message):
    stored.cells[3].update(source=source, metadata=nbformat.from_dict(metadata), outputs=[])
    assert any(message in problem for problem in lesson_problems(stored))


def test_a_lesson_has_small_cells_and_no_maintainers_talk(stored):
    assert list(lesson_problems(stored)) == []
    stored.cells[2].source += "\nThis is not compared by the tests."
    stored.cells[3].source = stored.cells[4].source = "x = 1\n" * 4
    assert [problem.partition(": ")[2] or problem for problem in lesson_problems(stored)] == [
        "what the tests do is no part of the lesson",
        "half of the cells in sight have more than 3 lines",
    ]


def test_a_guard_may_stand_at_the_end_of_a_section(stored):
    guard = nbformat.v4.new_code_cell("assert True", metadata=GUARD)
    stored.cells[5:5] = [guard, nbformat.v4.new_code_cell("assert 1", metadata=GUARD)]
    assert list(lesson_problems(stored)) == []
