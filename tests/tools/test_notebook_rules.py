"""Each rule fires on a notebook that breaks it, and none on one that keeps them."""

import json

import nbformat
import pytest

from tools.notebook_rules import headings, problems, unsolved


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
