"""Exercises: what a student sees, word for word. The course's own exercises: tests/test_wrong_answers.py."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from qlora_lab.exercises import check as module
from qlora_lab.exercises.check import check
from qlora_lab.quant.packing import pack

OPEN = "x: not answered yet. Replace the ... and run this cell again."
T = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def x(a):
    """Look left."""
    yield a + 1, "You add instead of doubling."
    yield a, "You return what you were given."


@pytest.fixture(autouse=True)
def one_exercise(monkeypatch):
    monkeypatch.setattr(module, "_said", {})
    monkeypatch.setattr(module, "EXERCISES", {"x": x})
    monkeypatch.setattr(module, "WITHOUT", {"x": ("quant.packing.pack",)})


@pytest.fixture
def said(capsys):
    def run(answer, expected, **options):
        check(answer, expected, **{"name": "x", **options})
        return capsys.readouterr().out.rstrip("\n")

    return run


def double(a):
    return a * 2


CASES = [(1,), (4,), (7,)]


def case(number, arguments, *lines):
    return "\n  ".join([f"x: not yet. Case {number} of 3:", f"x({arguments})", *lines])


@pytest.fixture
def tried(said):
    def run(answer, cases=CASES, expected=double):
        return said(answer, expected, cases=cases)

    return run


def test_open_prints_a_prompt(said, tried):
    assert said(..., 3) == tried(...) == tried(lambda a: ...) == OPEN


@pytest.mark.parametrize(
    ("function", "lines"),
    [
        (lambda a: a + 1, ["returns  5", "wanted   8", "Hint: You add instead of doubling."]),
        (lambda a: 2 if a == 1 else a, ["returns  4", "wanted   8", "Hint: You return what you were given."]),
        (lambda a: 2 if a == 1 else 0, ["returns  0", "wanted   8", "Hint: Look left."]),
    ],
)
def test_the_hint_answers_the_mistake(tried, function, lines):
    function.__name__ = "x"
    assert tried(function) == case(2, "4", *lines)


def test_the_same_answer_gets_the_same_hint_and_no_hint_comes_twice(tried):
    hints = [tried(lambda a, n=n: n).partition("Hint: ")[2] for n in (9, 9, 9, 8, 8, 5, 9, 8)]
    paper = "Work this out on paper, step by step, and print the same steps in your code."
    assert hints == ["Look left."] * 3 + [paper] * 2 + [""] + ["Look left.", paper]


def test_a_right_answer_clears_the_memory_and_names_do_not_share_it(tried, said, monkeypatch):
    tried(lambda a: 9)
    monkeypatch.setattr(module, "EXERCISES", {"x": x, "y": x})
    assert "Look left" in said(lambda a: 8, double, cases=CASES, name="y")
    assert tried(lambda a: a + a) == "x: correct"
    assert "Look left" in tried(lambda a: 8)


@pytest.mark.parametrize(
    ("function", "lines"),
    [
        (lambda a: None, ["returns  nothing", f"Hint: {module._RETURN}"]),
        (lambda a: a.foo, ["raises   AttributeError: 'int' object has no attribute 'foo'"]),
        (lambda: 2, ["raises   TypeError: <lambda>() takes 0 positional arguments but 1 was given"]),
        (lambda a: "2", ["returns  '2', a text", "wanted   a number"]),
        (lambda a: [2], ["returns  [2], a list", "wanted   a number", "Hint: Read the task again"]),
        (lambda a: T, ["returns  tensor (2, 2), a tensor", "wanted   a number"]),
        (lambda a: ["w" * 20] * 9, [f"returns  ['{'w' * 20}', '{'w' * 20}', '{'w' * 10} ..., a list"]),
    ],
)
def test_a_wrong_type_or_none_is_a_sentence(tried, function, lines):
    function.__name__ = "x"
    shown = tried(function)
    assert shown.startswith(case(1, "1", *lines)) and "\n  Hint: " in shown


def test_no_type_ends_in_a_traceback(said, tried):
    strange = [object(), type, {}, {1}, b"1", 10**400, 1j, float("nan"), T.to("meta"), T.to_sparse(), T.bool(), [[]]]
    strange += [None, (), range(3), np.array(["a"]), np.array(None), torch.nn.Linear(1, 1), x(1), [...], NotImplemented]
    loop = []
    loop.append(loop)
    for right in (1, 1.5, "a", [1.0], (1, 2), T, T.numpy(), True):
        for wrong in [*strange, loop]:
            assert "not yet" in said(wrong, right)
            assert "not yet" in tried(lambda a, wrong=wrong: wrong, expected=lambda a, right=right: right)
            assert "not yet" in said(lambda a: a, lambda a, right=right: right, cases=[(wrong,)], name="y")


def test_the_library_and_the_check_do_not_do_the_work(tried, said):
    whole = [(torch.tensor([1, 2], dtype=torch.uint8),)]
    for function in (pack, lambda a: pack(a), lambda a: [pack(a) for _ in "a"][0]):
        assert "leaves the work to `pack`\n  Hint: Do it without `pack`. Look left." in tried(function, whole, pack)
        module._said.clear()
    copied = lambda b: b * 2  # noqa: E731
    for function in (double, lambda a: double(a), copied):
        assert "leaves the work to the function that checks it" in tried(function)
    assert tried(lambda a: a + a) == "x: correct"


def test_watching_keeps_the_profiler_that_runs(tried):
    events = []
    before = sys.getprofile()
    sys.setprofile(lambda *event: events.append(event))
    mine = sys.getprofile()
    try:
        tried(lambda a: 1 / 0)
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(before)


def test_arguments_and_both_values_are_short(tried):
    long = [(list(range(40)), torch.arange(40), "w" * 99)]
    shown = tried(lambda *case: list(range(40)), long, lambda *case: [*range(39), 0])
    assert "([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...], tensor (40,), 'www" in shown
    assert "returns  39 at index 39\n  wanted   0 at index 39" in shown
    shown = tried(lambda *case: [1, 2], long, lambda *case: [1, 2, 3])
    assert "returns  [1, 2]\n  wanted   [1, 2, 3]" in shown
    assert "returns  0.30000000000000004\n  wanted   0.3" in tried(lambda *case: 0.1 + 0.2, long, lambda *case: 0.3)


def test_a_function_without_arguments_keeps_its_value_secret(tried):
    shown = tried(lambda: T + 1, [()], lambda: T)
    assert "returns  2 at index (0, 0)" in shown and "wanted" not in shown
    assert "wanted   shape (2, 2)" in tried(lambda: T[0], [()], lambda: T)


@pytest.mark.parametrize(
    ("answer", "expected", "difference"),
    [
        (2, 3, "Yours: 2."),
        ("nf", "fp", "Yours: 'nf'."),
        ([1, 2, 9], [1, 5, 7], "Yours: 2 at index 1."),
        ((1, 2), [1, 2, 3], "Yours: length 2; wanted: length 3."),
        (T * torch.tensor([1, 2]), T, "Yours: 4 at index (0, 1)."),
        (T[0], T, "Yours: shape (2,); wanted: shape (2, 2)."),
        (T.double(), T, "Yours: dtype torch.float64; wanted: dtype torch.float32."),
        (np.zeros(2), np.zeros(2, "uint8"), "Yours: dtype float64; wanted: dtype uint8."),
        ([T, T + 1], [T, T], "Yours: 2 at index (1, 0, 0)."),
        ([T, T[0]], [T, T], "Yours: shape (2,) at index 1; wanted: shape (2, 2)."),
        (T.numpy(), T, "Yours: NumPy array (2, 2), a NumPy array; wanted: a tensor."),
        (None, 3, "Yours: None, nothing; wanted: a number."),
        (1, True, "Yours: 1, a number; wanted: True or False."),
        ([1], 1, "Yours: [1], a list; wanted: a number."),
        (double, 3, "Yours: <function double"),
    ],
)
def test_the_first_difference_of_a_value_is_named(said, answer, expected, difference):
    assert said(answer, expected).startswith(f"x: not yet. {difference}")


@pytest.mark.parametrize(
    "right",
    [3, 2.5, True, "nf4", b"\x1f", None, [1, [2, 3]], (1, 2), T, T.bfloat16(), T.numpy(), torch.tensor(3), []],
)
def test_right_answers(said, tried, right):
    assert said(right, right) == tried(lambda a: right, expected=lambda _: [right][0]) == "x: correct"


def test_numbers_of_every_make_agree(said):
    for number in (3, 3.0, np.float32(3), torch.tensor(3.0), np.array(3)):
        assert said(number, 3) == "x: correct"
    assert said(float("nan"), float("nan")) == said([1], (1,)) == said(torch.nn.Parameter(T), T) == "x: correct"
    assert said(1.0, float("nan")).startswith("x: not yet. Yours: 1.")


def test_tolerance_is_asked_for(said):
    assert "not yet" in said(0.1 + 0.2, 0.3)
    assert said(0.1 + 0.2, 0.3, tolerance=1e-9) == "x: correct"
    assert "not yet" in said(0.3 + 1e-6, 0.3, tolerance=1e-9)


@pytest.mark.long
@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.data())
def test_the_index_is_the_first_and_the_expected_value_stays_secret(expected, data):
    i = data.draw(st.integers(0, len(expected) - 1))
    answer = [*expected[:i], 1e9, *[1e9 for _ in expected[i + 1 :]]]
    fault = module._try_value(answer, expected, "x", 0.0)
    assert fault.lines == [f"Yours: 1e+09 at index {i}."]


def test_a_function_that_changes_its_input_spoils_no_later_case(said):
    cases = [(torch.tensor([1, 2]),)]
    assert said(lambda a: a.mul_(2), double, cases=cases) == "x: correct"
    assert cases[0][0].tolist() == [1, 2]


def test_a_value_where_a_function_belongs(tried):
    assert tried(7).startswith("x: not yet. Yours: 7, a number; wanted: a function.\n  Hint: Keep the line that begins")


@pytest.mark.parametrize(("expected", "cases"), [(double, None), (3, [(1,)]), (double, [])])
def test_a_wrongly_written_check_is_an_error(expected, cases):
    with pytest.raises(TypeError, match="check 'x': give cases="):
        check(double, expected, name="x", cases=cases)
