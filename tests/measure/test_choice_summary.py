"""Accuracies and their intervals: worked by hand, against scipy, and by how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from qlora_lab.measure.choice_summary import (
    accuracies,
    category_of,
    difference,
    figures,
    mean_over_subjects,
    mmlu_categories,
    paired_difference,
    right,
    wilson,
)

ROW = {
    "data": {"tokens_sha256": "a"},
    "subjects": {"anatomy": 3, "philosophy": 1},
    "right": "AABD",
    "log_likelihoods": [[-1.0, -2, -3, -4], [-9.0, -8, -7, -7], [-4.0, -4, -9, -9], [-5.0, -6, -7, -8]],
    "lengths": {
        "acc_norm": [[1, 1, 1, 1], [9, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 8]],
        "acc_bytes": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 8]],
    },
}


def test_the_likeliest_answer_counts_and_the_first_of_equal_ones():
    assert right(ROW) == [True, False, False, False]
    assert right(ROW, "acc_norm") == [True, True, False, True]  # -9/9 is above -8, -8/8 above -5


def test_means_over_questions_and_over_subjects_differ():
    found = accuracies(ROW)
    assert found.over_questions.mean == 1 / 4 and found.over_questions.n == 4
    assert found.over_subjects.mean == (1 / 3 + 0) / 2 and found.over_subjects.n == 2
    assert found.subjects["anatomy"] == wilson(1, 3) and found.subjects["philosophy"] == wilson(0, 1)
    assert found.categories == {"other (business, health, misc.)": wilson(1, 3), "humanities": wilson(0, 1)}


def test_the_four_categories_of_mmlu():
    """D. Hendrycks et al. (2021), and the counts of the table in their repository."""
    categories = mmlu_categories()
    assert len(categories) == 57
    assert {name: list(categories.values()).count(name) for name in set(categories.values())} == {
        "STEM": 18,
        "humanities": 13,
        "social sciences": 12,
        "other (business, health, misc.)": 14,
    }
    assert category_of("high school us history") == category_of("high_school_us_history") == "humanities"
    assert category_of("matplotlib") is None


@pytest.mark.parametrize("successes, trials", [(0, 1), (1, 1), (130, 500), (0, 40), (40, 40), (7, 9)])
def test_wilson_is_scipy_s(successes, trials):
    ours = wilson(successes, trials)
    theirs = binomtest(successes, trials).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("successes, trials", [(0, 0), (2, 1), (-1, 3)])
def test_what_is_no_share(successes, trials):
    with pytest.raises(ValueError, match="is not a share"):
        wilson(successes, trials)


def test_a_paired_difference_by_hand():
    """12 lost, 6 gained of 98: 100 with half a question more in each cell; its variance is (19/100 - 0.06^2)/100."""
    first = [True] * 12 + [False] * 6 + [True] * 80
    second = [False] * 12 + [True] * 6 + [True] * 80
    found = paired_difference(first, second)
    half = 1.959964 * math.sqrt((0.19 - 0.0036) / 100)
    assert found.mean == pytest.approx(-6 / 98)
    assert (found.low, found.high) == pytest.approx((-0.06 - half, -0.06 + half), abs=1e-6)
    turned = paired_difference(second, first)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_models_that_never_differ_may_still_differ():
    found = paired_difference([True] * 20, [True] * 20)
    assert found.mean == 0 and found.low == -found.high and 0.05 < found.high < 0.15


def covered(draws: np.ndarray, truth: float, interval) -> float:
    """The share of draws whose interval holds the truth."""
    return float(np.mean([low <= truth <= high for low, high in map(interval, draws)]))


def test_intervals_hold_the_truth_in_95_of_100_samples():
    """4000 samples: the share has a standard deviation of 0.0035, and the binomial's steps cost about 0.01."""
    rng = np.random.default_rng(0)
    cells = rng.multinomial(100, [0.4, 0.12, 0.08, 0.4], 4000)  # both, lost, gained, neither

    def paired(counts):
        both, lost, gained, neither = counts
        first = [True] * (both + lost) + [False] * (gained + neither)
        second = [True] * both + [False] * lost + [True] * gained + [False] * neither
        found = paired_difference(first, second)
        return found.low, found.high

    def over_subjects(counts):
        found = mean_over_subjects(list(zip(counts, [20, 50, 200], strict=True)))
        return found.low, found.high

    assert 0.93 <= covered(cells, -0.04, paired) <= 0.97
    counts = rng.binomial([20, 50, 200], [0.25, 0.6, 0.9], (4000, 3))
    assert 0.93 <= covered(counts, (0.25 + 0.6 + 0.9) / 3, over_subjects) <= 0.97


@pytest.mark.parametrize("subjects, questions", [(57, 5), (20, 3), (4, 10)])
def test_a_mean_over_small_subjects_holds_the_truth(subjects, questions):
    """With Wilson's trials + Z^2 in place of the trials, 85 to 90 of 100 did. Few questions cover rather too much."""
    rng = np.random.default_rng(1)
    truth = rng.uniform(0.25, 0.95, subjects)
    draws = rng.binomial(questions, truth, (2000, subjects))

    def over_subjects(counts):
        found = mean_over_subjects([(int(count), questions) for count in counts])
        return found.low, found.high

    assert 0.94 <= covered(draws, truth.mean(), over_subjects) <= 0.995


def test_no_difference_is_larger_than_one():
    found = paired_difference([False], [True])
    assert found.mean == 1 and found.high == 1 and -1 <= found.low < 1
    assert paired_difference([True], [False]).low == -1


def test_figures_say_what_accuracies_and_difference_say():
    better = ROW | {"right": "ADAA"}
    found = figures(better, ROW)
    assert list(found) == ["acc", "acc_norm", "acc_bytes"]
    want = difference(better, ROW, "acc_norm")
    assert found["acc_norm"]["difference"] == pytest.approx([want.mean, want.low, want.high], abs=1e-6)
    assert found["acc"]["over_questions"] == pytest.approx([0.75, *_ends(wilson(3, 4))], abs=1e-6)
    assert found["acc"]["subjects"]["anatomy"][0] == pytest.approx(2 / 3, abs=1e-6)
    assert list(figures(ROW | {"lengths": None}, None)) == ["acc"]
    assert figures(ROW, None)["acc"]["difference"] is None


def _ends(interval) -> tuple[float, float]:
    return interval.low, interval.high


def test_what_cannot_be_compared():
    letters = ROW | {"lengths": None}
    other = ROW | {"data": {"tokens_sha256": "b"}}
    with pytest.raises(ValueError, match="acc_norm needs answers of different lengths, but these are letters"):
        right(letters, "acc_norm")
    with pytest.raises(ValueError, match="metric='f1' is not known: choose from acc, acc_norm"):
        right(ROW, "f1")
    with pytest.raises(ValueError, match="answered other questions"):
        difference(ROW, other)
    with pytest.raises(ValueError, match="2 and 1 answers cannot be paired"):
        paired_difference([True, True], [True])
    with pytest.raises(ValueError, match="at least one subject"):
        mean_over_subjects([])
    with pytest.raises(ValueError, match="a subject has no questions"):
        mean_over_subjects([(1, 2), (0, 0)])
