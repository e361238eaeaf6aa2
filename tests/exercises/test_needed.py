"""Which cells a later cell needs."""

import pytest

from qlora_lab.exercises.needed import needed

CASES = {
    "what binds it": (["a = 1", "b = 2", "a"], [0, 2]),
    "through another": (["a = 1", "b = a", "c = 3", "b"], [0, 1, 3]),
    "an import": (["import math", "import os", "math.pi"], [0, 2]),
    "a submodule": (["import os.path", "os.path"], [0, 1]),
    "the later of two, which does not look at the earlier": (["a = 1", "a = 2", "a"], [1, 2]),
    "the earlier, too, of one that adds": (["a = 1", "a += 2", "a"], [0, 1, 2]),
    "the earlier, too, of one that may not happen": (["a = 1", "if x:\n    a = 2", "a"], [0, 1, 2]),
    "nothing earlier of what it binds before it reads": (["a = 1", "a = 2\nb = a", "b"], [1, 2]),
    "the earlier, too, of what it reads before it binds": (["a = 1", "b = a\na = 2", "b"], [0, 1, 2]),
    "a method that changes": (["a = []", "a.append(1)", "a"], [0, 1, 2]),
    "an attribute": (["a = b()", "a.data.zero_()", "a.weight.data = 1", "a[0][1] = 2", "a"], [0, 1, 2, 3, 4]),
    "a function that changes": (["a = []", "fill(a)", "a"], [0, 1, 2]),
    "printing changes nothing": (["a = []", "print(a)", "display(a)", "a"], [0, 3]),
    "a module's function changes no module": (["import m", "m.show()", "m.f()\nm.a"], [0, 2]),
    "a seed": (["torch.manual_seed(0)", "torch.randn(3)"], [0, 1]),
    "what a function reads": (["def f(): return g()", "def g(): return n", "n = 1", "f()"], [0, 1, 2, 3]),
    "what a lambda reads": (["n = 1", "f = lambda x: x + n", "f(1)"], [0, 1, 2]),
    "nothing of a function's own names": (["x = 1", "def f(x):\n    y = x\n    return y", "y = 2", "f(1)"], [1, 3]),
    "nothing of a comprehension's own": (["i = 1", "a = [i for i in range(3)]", "a"], [1, 2]),
    "a magic beside it": (["n = 1", "%matplotlib inline\nm = n", "!ls", "m"], [0, 1, 3]),
    "what is not Python is left out": (["a = (", "return 3", "a = 1", "a"], [2, 3]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_last_cell_needs(case):
    sources, wanted = CASES[case]
    assert needed(sources, {len(sources) - 1}) == wanted


def test_what_runs_in_any_case_runs_even_if_it_is_not_python():
    assert needed(["b = 1", "a = (", "b\x00", "b"], {1, 2}) == [1, 2]


@pytest.mark.parametrize(
    "source", ["f(" + "(" * 300, "-" * 5000 + "1", "def f(x):\n\treturn x\n  x", "a\x85b\u2028", '"""', "await x"]
)
def test_odd_text_is_read_without_an_error_and_without_a_warning(source):
    assert 1 in needed([source, "x"], {1})


def test_an_escape_that_python_warns_of_is_read_in_silence(recwarn):
    assert needed(["x = '\\d'", "x"], {1}) == [0, 1] and not recwarn.list
