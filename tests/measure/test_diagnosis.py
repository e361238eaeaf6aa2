"""What a judge reads, from games: judges that are fair, broken, capricious, or seen too seldom."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import binomtest

from qlora_lab.files.course import course_path
from qlora_lab.measure.diagnosis import LEVEL, Diagnosis, diagnose_judge
from qlora_lab.measure.games import Games
from qlora_lab.measure.judges import always_first
from qlora_lab.measure.judgments import read_games
from qlora_lab.measure.simulated_games import simulate


def played(judge: Callable[[int, int, int], str], questions: int = 20, systems: int = 4) -> Games:
    """Both orders of every pair. judge: question, first, second -> verdict."""
    return Games.of(
        (f"q{q}", f"s{i}", f"s{j}", judge(q, i, j))
        for q in range(questions)
        for i in range(systems)
        for j in range(systems)
        if i != j
    )


def fair(q: int, i: int, j: int) -> str:
    return "first" if i < j else "second"


def by_question(q: int, i: int, j: int) -> str:
    return ("first", "second")[q % 2]


def test_positions_that_balance_are_unmasked():
    found = diagnose_judge(played(by_question))
    assert found.verdicts.share == 0.5 and found.p == 1 and found.is_broken
    assert (found.pairs, found.contradictions, found.kept, found.mostly_changed) == (120, 120, 0, 20)
    assert found.p_winners == pytest.approx(2 * 2.0**-20)
    assert (
        "120 of 120 pairs changed their winner with the order (p = 1.9e-06): this judge reads positions, not answers"
        in str(found)
    )


def test_ties_do_not_hide_a_judge_that_reads_positions_when_it_decides():
    found = diagnose_judge(played(lambda q, i, j: "tie" if i + j != 1 else "first"))
    assert found.is_broken and found.contradictions == 20 and found.agreed == 100


def test_a_judge_that_always_takes_one_position_is_unmasked():
    found = diagnose_judge(played(always_first))
    assert found.is_broken and found.p == found.p_winners and found.verdicts.share == 1
    last = diagnose_judge(played(lambda *_: "second"))
    assert last.is_broken and last.verdicts.share == 0 and last.p == found.p


def test_a_fair_judge_is_fair():
    found = diagnose_judge(played(fair))
    assert not found.is_broken and (found.kept, found.agreed, found.contradictions) == (120, 120, 0)
    assert str(found).endswith("(p = 1): no favoured position was seen")


def test_a_liking_beside_reading_is_named_and_is_not_broken():
    # close answers go to the first, clear ones to the better
    found = diagnose_judge(played(lambda q, i, j: "first" if i < j or i - j == 1 else "second"))
    assert (found.contradictions, found.kept, found.to_first) == (60, 60, 20) and not found.is_broken
    assert "(p = 1.9e-06): this judge favours the first answer, so only games in both orders are fair" in str(found)


def test_most_winners_changed_is_never_praised():
    # on 12 questions of 20 position rules: too many for a judge, too few for certainty
    found = diagnose_judge(played(lambda q, i, j: by_question(q, i, j) if q < 12 else fair(q, i, j)))
    assert found.contradictions > found.pairs / 2 and not found.is_broken
    assert "too few winners were kept to tell this judge from a coin" in str(found)


@pytest.mark.parametrize(
    ("questions", "words"),
    [(1, "1 question is too few"), (7, "7 questions are too few to tell whether"), (8, "this judge reads positions")],
)
def test_few_questions_accuse_nobody(questions, words):
    # seven questions with one voice have p = 2 / 2^7 = 0.016, eight 0.008
    found = diagnose_judge(played(by_question, questions))
    assert words in str(found) and found.is_broken == (questions == 8)


def test_the_level_is_one_per_cent():
    def broken(changed: int, kept: int) -> bool:
        verdicts = diagnose_judge(played(fair)).verdicts
        return Diagnosis(verdicts, 20, 20, 0, kept, changed, 0, 0, kept, changed).is_broken

    # two-sided binomial tails of 20: 16 or more is 0.0118, 17 or more 0.0026
    assert LEVEL == 0.01 and broken(17, 3) and not broken(16, 4) and not broken(3, 17)


def test_a_pair_is_judged_once_in_each_order_and_read_both_times():
    rows = [("q", "a", "b", "first"), ("q", "b", "a", "first"), ("q", "b", "a", "second")]
    rows += [("r", "a", "b", "first"), ("r", "b", "a", "unread"), ("s", "a", "b", "tie"), ("s", "b", "a", "first")]
    found = diagnose_judge(Games.of(rows))
    assert (found.questions, found.pairs, found.contradictions, found.kept, found.agreed) == (1, 1, 0, 0, 0)


@pytest.mark.long
def test_a_fair_judge_with_whims_is_seldom_accused():
    """A whim: on each question the judge likes one position. Pairs as independent draws accuse it in 14 % of runs."""
    accused = 0
    for seed in range(300):
        draws = np.random.default_rng(seed)
        whim = draws.normal(size=20)
        noise = draws.normal(size=(20, 4, 4))
        judge = lambda q, i, j, w=whim, n=noise: "first" if w[q] + n[q, i, j] > 0 else "second"  # noqa: E731
        accused += diagnose_judge(played(judge)).p < LEVEL
    # the sign test of 20 questions rejects in 0.26 %; more than 6 of 300 has a chance of 1e-5
    assert accused <= 6


def test_a_judge_of_equals_is_seldom_called_broken():
    equals = dict.fromkeys("abc", 1000.0)
    found = [diagnose_judge(simulate(equals, questions=20, question_effect=0.0, seed=seed)) for seed in range(200)]
    # a coin is broken by chance in half of the test's 1 % at most; more than 5 of 200 has a chance of 1e-3
    assert sum(one.is_broken for one in found) <= 5
    assert sum("coin" in str(one) for one in found) > 150


def test_counts_are_tested_as_games_and_say_so():
    found = diagnose_judge(read_games(course_path("data", "published", "guanaco_vicuna_pairs.csv")))
    assert (found.pairs, found.p_winners, found.is_broken) == (0, None, False)
    assert str(found) == (
        "the first answer won 65% of 3,867 decided games, with as many games in either order "
        "(p = 2.7e-78 if games were independent): "
        "this judge favours the first answer, so only games in both orders are fair"
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("q", "a", "b", "tie")], "every verdict is a tie: this judge tells nothing"),
        ([("q", "a", "b", "unread")], "no verdict could be read"),
        ([("q", "a", "b", "first")], "position and strength cannot be told apart"),
    ],
)
def test_what_cannot_be_told(rows, words):
    found = diagnose_judge(Games.of(rows))
    assert words in str(found) and not found.is_broken


def test_counts_without_questions_are_judged_by_single_games():
    n = 40
    arrays = np.full(n, -1), np.arange(n) % 2, 1 - np.arange(n) % 2, np.zeros(n, dtype=np.int64)
    found = diagnose_judge(Games(("a", "b"), (), *arrays))
    assert found.pairs == 0 and found.p == pytest.approx(binomtest(0, n).pvalue)
    assert "with as many games in either order" in str(found) and "favours the first answer" in str(found)
    one_order = diagnose_judge(Games(("a", "b"), (), arrays[0], 0 * arrays[1], 0 * arrays[1] + 1, arrays[3]))
    assert one_order.p is None and "cannot be told apart" in str(one_order)


@pytest.mark.long
@given(st.lists(st.sampled_from(["first", "second", "tie", "unread"]), min_size=2, max_size=30))
def test_swapping_the_positions_mirrors_the_diagnosis(verdicts):
    mirror = {"first": "second", "second": "first"}
    rows = [(f"q{i // 2}", *("ab" if i % 2 else "ba"), verdict) for i, verdict in enumerate(verdicts)]
    a = diagnose_judge(Games.of(rows))
    b = diagnose_judge(Games.of((*row[:3], mirror.get(row[3], row[3])) for row in rows))
    assert (a.verdicts.first, a.to_first, a.pairs, a.contradictions, a.p) == (
        b.verdicts.second,
        b.to_second,
        b.pairs,
        b.contradictions,
        b.p,
    )
    assert (a.p_winners, a.is_broken) == (b.p_winners, b.is_broken)
    if leaning := a.to_first + a.to_second:
        assert a.p == pytest.approx(binomtest(a.to_first, leaning).pvalue)
