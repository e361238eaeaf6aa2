"""Exercises: what a student sees, word for word."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from qlora_lab.show import check as module
from qlora_lab.show.check import check

HINTS = ["look left", "look right"]
T = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.fixture(autouse=True)
def first_attempt(monkeypatch):
    monkeypatch.setattr(module, "_attempts", {})


@pytest.fixture
def said(capsys):
    def run(answer, expected, **options):
        check(answer, expected, **{"name": "x", **options})
        return capsys.readouterr().out.strip()

    return run


def test_open_prints_a_prompt_and_counts_no_attempt(said):
    assert said(..., 3, hints=HINTS) == "x: not answered yet. Replace the ... and run this cell again."
    assert said(2, 3, hints=HINTS).endswith("Hint 1: look left")


def test_hints_rise_and_the_last_one_stays(said):
    hints = [said(2, 3, hints=HINTS).splitlines()[1].strip() for _ in range(3)]
    assert hints == ["Hint 1: look left", "Hint 2: look right", "Hint 2: look right"]


def test_hints_start_again_after_a_right_answer_and_by_name(said):
    said(2, 3, hints=HINTS)
    assert "Hint 1" in said(2, 3, hints=HINTS, name="y")
    assert said(3, 3, hints=HINTS) == "x: correct"
    assert "Hint 1" in said(2, 3, hints=HINTS)


@pytest.mark.parametrize(
    ("answer", "expected", "difference"),
    [
        (2, 3, "It differs: yours is 2."),
        ("nf", "fp", "It differs: yours is 'nf'."),
        ([1, 2, 9], [1, 5, 7], "First difference at index 1: yours is 2."),
        ((1, 2), [1, 2, 3], "Its length should be 3, yours is 2."),
        (T * torch.tensor([1, 2]), T, "First difference at index (0, 1): yours is 4.0."),
        (T[0], T, "Its shape should be (2, 2), yours is (2,)."),
        (T.double(), T, "Its dtype should be torch.float32, yours is torch.float64."),
        (np.zeros(2), np.zeros(2, "uint8"), "Its dtype should be uint8, yours is float64."),
        ([T, T + 1], [T, T], "First difference at index (1, 0, 0): yours is 2.0."),
        ([T, T[0]], [T, T], "First difference at index 1: Its shape should be (2, 2), yours is (2,)."),
        (T.numpy(), T, "Wanted: a torch.Tensor. Yours: a numpy.ndarray."),
        (None, 3, "Wanted: a number. Yours: None."),
        (1, True, "Wanted: True or False. Yours: a number."),
        ([1], 1, "Wanted: a number. Yours: a list."),
    ],
)
def test_the_first_difference_is_named(said, answer, expected, difference):
    assert said(answer, expected) == f"x: not yet. {difference}"


@pytest.mark.parametrize(
    "right", [3, 2.5, True, "nf4", b"\x1f", None, [1, [2, 3]], T, T.bfloat16(), T.numpy(), torch.tensor(3), []]
)
def test_right_answers(said, right):
    assert said(right, right) == "x: correct"


def test_numbers_of_every_make_agree(said):
    for answer in (3, 3.0, np.float32(3), torch.tensor(3.0)):
        assert said(answer, 3) == "x: correct"
    assert said(float("nan"), float("nan")) == "x: correct"
    assert said(1.0, float("nan")) == "x: not yet. It differs: yours is 1.0."


def test_tolerance_is_asked_for(said):
    assert "not yet" in said(0.1 + 0.2, 0.3)
    assert said(0.1 + 0.2, 0.3, tolerance=1e-9) == "x: correct"
    assert "not yet" in said(0.3 + 1e-6, 0.3, tolerance=1e-9)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.data())
def test_the_index_is_the_first_and_the_expected_value_stays_secret(expected, data):
    i = data.draw(st.integers(0, len(expected) - 1))
    answer = [*expected[:i], 1e9, *[1e9 for _ in expected[i + 1 :]]]
    assert module._differ(answer, expected, 0.0) == f"First difference at index {i}: yours is 1000000000.0."


def double(x):
    return x * 2


CASES = [(1,), (torch.tensor([5, 2]),), ([1],)]


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (double, "x: correct"),
        (lambda x: x + 1, "x: not yet. Case 2 of 3: First difference at index 0: yours is 6."),
        (
            lambda x: x.foo,
            "x: not yet. Case 1 of 3: your function raised AttributeError: 'int' object has no attribute 'foo'",
        ),
        (lambda x: None, "x: not answered yet. Replace the ... and run this cell again."),
        (lambda x: ..., "x: not answered yet. Replace the ... and run this cell again."),
        (..., "x: not answered yet. Replace the ... and run this cell again."),
        (7, "x: not yet. Wanted: a function. Yours: a number."),
    ],
)
def test_functions_are_tried_case_by_case(said, function, line):
    assert said(function, double, cases=CASES) == line


def test_a_function_that_changes_its_input_spoils_no_later_case(said):
    cases = [(torch.tensor([1, 2]),)]
    assert said(lambda x: x.mul_(2), double, cases=cases) == "x: correct"
    assert cases[0][0].tolist() == [1, 2]


@pytest.mark.parametrize(("expected", "cases"), [(double, None), (3, [(1,)]), (double, [])])
def test_a_wrongly_written_check_is_an_error(expected, cases):
    with pytest.raises(TypeError, match="check 'x': give cases="):
        check(double, expected, name="x", cases=cases)
