"""ROUGE-L against numbers worked by hand."""

import pytest
from hypothesis import given, strategies as st

from qlora_lab.measure.rouge import rouge_l


def test_a_pair_worked_by_hand():
    """Lin 2004, section 3.1: "police killed the gunman" against two candidates with the same words.

    "police kill the gunman": longest common subsequence "police the gunman", 3 of 4 words on both sides: F = 0.75.
    "the gunman kill police": "the gunman", 2 of 4: F = 0.5.
    "police": 1 of 1 word of the answer, 1 of 4 of the reference: F = 2 * 1 * 0.25 / 1.25 = 0.4.
    """
    answers = ["police kill the gunman", "the gunman kill police", "police"]
    assert rouge_l(answers, ["police killed the gunman"] * 3) == pytest.approx([0.75, 0.5, 0.4])


def test_case_and_punctuation_do_not_count_but_word_endings_do():
    assert rouge_l(["Return the `sum`!"], ["return the sum."]) == [1.0]
    assert rouge_l(["returns"], ["return"]) == [0.0]


def test_an_empty_text_scores_zero():
    assert rouge_l(["", "sum", ""], ["sum", "", ""]) == [0.0, 0.0, 0.0]
    assert rouge_l([], []) == []


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_it_is_symmetric_and_one_for_equal_texts(first, second):
    first, second = " ".join(first), " ".join(second)
    (there,), (back,) = rouge_l([first], [second]), rouge_l([second], [first])
    assert there == pytest.approx(back)
    assert rouge_l([first], [first]) == [1.0]


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        rouge_l(["a", "b"], ["a"])
