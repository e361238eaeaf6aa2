"""Guesses without a browser: `_handle_custom_msg` is the path that a message of the box takes."""

import numpy as np
import pytest
import torch

import qlora_lab as ql
from qlora_lab.exercises.guess import Guess

NO_GUESS = "(You recorded no guess.)"


def codes():
    return ql.guess("How many codes does it use?", unit="codes")


def bits():
    return ql.guess("How many bits?", unit="bits per weight")


def percent():
    return ql.guess("Which share?", unit="%")


def matrix():
    return ql.guess("Which matrix?", ["A", "B", "both"])


@pytest.mark.parametrize(
    ("asked", "answer", "measured", "sentence"),
    [
        (codes, 12, 8, "You guessed 12 codes; the answer is 8 codes."),
        (codes, 8, 8, "You guessed 8 codes, and that is right."),
        (codes, 1, 2, "You guessed 1 code; the answer is 2 codes."),
        (codes, 1.5, 12_000, "You guessed 1.5 codes; the answer is 12,000 codes."),
        (codes, "9", torch.tensor(9), "You guessed 9 codes, and that is right."),
        (codes, 1e300, np.float32(0.5), "You guessed 1e+300 codes; the answer is 0.5 codes."),
        (codes, 12_345.4, 1e9 + 0.5, "You guessed 12,345 codes; the answer is 1,000,000,000 codes."),
        (codes, 999.96, 1000.4, "You guessed 1,000 codes, and that is right."),
        (codes, -54_321.5, 1e15 + 0.5, "You guessed -54,322 codes; the answer is 1e+15 codes."),
        (bits, 1, 4.127, "You guessed 1 bit per weight; the answer is 4.127 bits per weight."),
        (percent, 1, 2, "You guessed 1 %; the answer is 2 %."),
        (codes, None, 8, f"The answer is 8 codes. {NO_GUESS}"),
        (codes, None, 1, f"The answer is 1 code. {NO_GUESS}"),
        (matrix, "A", "B", 'You guessed "A"; the answer is "B".'),
        (matrix, "B", "B", 'You guessed "B", and that is right.'),
        (matrix, None, "both", f'The answer is "both". {NO_GUESS}'),
    ],
)
def test_a_guess_is_compared_as_a_teacher_would(asked, answer, measured, sentence):
    box = asked()
    if answer is not None:
        box.record(answer)
    assert box.compare(measured) == sentence
    assert repr(box.compare(measured)) == sentence  # a notebook shows it without quotation marks


BAD_NUMBERS = ["", "abc", "nan", float("inf"), "1e999", True, None, [], {}, 10**400, "1" * 5000]
BAD_CHOICES = ["", "C", 0, None, [], {"A": 1}, ["A"], "A" * 5000]


@pytest.mark.parametrize(
    ("asked", "bad", "rule"),
    [(codes, bad, "is not a number. Type one, such as 12 or 0.5.") for bad in BAD_NUMBERS]
    + [(matrix, bad, "is not among the choices. Choose one of: A, B, both.") for bad in BAD_CHOICES],
)
def test_an_impossible_guess_is_refused(asked, bad, rule):
    """From Python by an error, from the browser by a sentence; the guess before it stays."""
    box = asked()
    good = "B" if box.choices else 7
    box.record(good)
    with pytest.raises(ValueError, match=rule):
        box.record(bad)
    for message in ({"guess": bad}, bad, [bad], {"other": bad}):
        box.box._handle_custom_msg(message, [])
        assert box.answer == good
        assert box.box.said.startswith("Nothing was recorded: ") and box.box.said.endswith(rule)
        assert len(box.box.said) < 150


def test_the_browser_records_a_guess():
    box = codes()
    assert box.answer is None
    box.box._handle_custom_msg({"guess": "12"}, [])
    assert box.answer == 12
    assert box.box.said == "Recorded: 12 codes. Now run the next cells."


def test_state_of_the_browser_changes_no_answer():
    box = matrix()
    box.record("A")
    kept = box.box.get_state()
    box.box.set_state({"choices": ["C"], "said": "It is C.", "question": "?", "unit": "%"})
    assert box.box.get_state() == kept
    assert box.compare("B") == 'You guessed "A"; the answer is "B".'
    with pytest.raises(ValueError, match="'C' is not among the choices"):
        box.record("C")


def test_a_measured_value_that_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="'C' is not among the choices. Choose one of: A, B, both"):
        matrix().compare("C")


def test_what_a_stored_notebook_keeps():
    box = Guess("How much is $2?", unit="$")
    kept = "How much is $2? Run this cell to guess."
    assert repr(box) == kept == box.still()["text/plain"]
    assert "<div>How much is <span>$</span>2?</div><div>Run this cell to guess.</div>" in box.still()["text/html"]
    box.record(3)
    assert repr(box) == "How much is $2? You guessed 3 $."


def test_the_status_line_finds_the_box():
    box = codes()
    line, control = box.widget.children
    assert type(line).__name__ == "StatusLine" and control is box.box
    assert '"qlora-control"' in box.box._esm
