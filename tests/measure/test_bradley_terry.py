"""Bradley-Terry: tournaments solved by hand, intervals, and those that have no answer."""

from math import inf, log

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from qlora_lab.files.course import course_path
from qlora_lab.measure.bradley_terry import POINTS, _Model, _resampled, _tail, bradley_terry
from qlora_lab.measure.connected import Decided
from qlora_lab.measure.games import VERDICTS, Games
from qlora_lab.measure.judgments import read_games
from qlora_lab.measure.simulated_games import simulate

# Two systems, both orders, made so that the model fits exactly: in natural units d = position = ln 4, and nu = 1.
# a first: e^((d + p) / 2) : e^-((d + p) / 2) : nu = 4 : 1/4 : 1. b first: the two cancel, 1 : 1 : 1.
EXACT = [("a", "b", (16, 1, 4, 0)), ("b", "a", (4, 4, 4, 0))]


def test_two_systems_by_hand():
    found = bradley_terry(Games.of_counts(EXACT), resamples=50)
    assert found.ratings["a"].value == pytest.approx(1000 + POINTS * log(4) / 2, abs=1e-5)
    assert found.position.value == pytest.approx(POINTS * log(4), abs=1e-5)
    assert found.ties.value == pytest.approx(1 / 3, abs=1e-7)
    assert found.over == "games" and list(found.ratings) == ["a", "b"]


def test_without_ties_and_position_odds_are_wins_to_losses():
    games = Games.of_counts([("a", "b", (30, 10, 0, 0))])
    found = bradley_terry(games, position=False, resamples=50)
    difference = found.ratings["a"].value - found.ratings["b"].value
    assert difference == pytest.approx(POINTS * log(3), abs=1e-5)
    assert found.position is None and found.ties.value == 0


def test_the_authors_judgments_in_the_paper_s_order():
    found = bradley_terry(read_games(course_path("data", "published", "guanaco_vicuna_pairs.csv")), resamples=50)
    order = ["gpt-4", "65b-guanaco", "33b-guanaco", "vicuna-13b", "gpt-3.5", "13b-guanaco", "bard", "7b-guanaco"]
    assert list(found.ratings) == order and found.over == "games"
    assert found.position.low > 100  # points, by its position alone


def test_ratings_centre_on_1000_and_intervals_hold_them():
    found = bradley_terry(simulate({"a": 1100, "b": 1000, "c": 850}, position=80, seed=3), resamples=200)
    assert sum(one.value for one in found.ratings.values()) == pytest.approx(3000)
    assert all(one.low < one.value < one.high for one in [*found.ratings.values(), found.position, found.ties])
    assert found.over == "questions" and found.without_answer == 0


def test_a_question_that_speaks_for_all_its_games_widens_the_interval():
    games = simulate({"a": 1050, "b": 950}, questions=60, question_effect=1.0, seed=1)
    apart = Games(games.systems, (), np.full(len(games), -1), games.first, games.second, games.verdicts)
    by_question, by_game = (bradley_terry(one, resamples=400).ratings["a"] for one in (games, apart))
    assert by_question.value == pytest.approx(by_game.value)
    assert by_question.high - by_question.low > 1.2 * (by_game.high - by_game.low)  # sqrt 2 if both orders repeat


def test_newton_s_resamples_are_scipy_s_maxima():
    games = simulate({"a": 1100, "b": 1000, "c": 900, "d": 950}, position=100, questions=30, seed=2)
    rated = Decided.of(games)
    model = _Model.of(rated, position=True)
    start = model.fit(rated.counts)
    drawn = _resampled(games, rated, 20, np.random.default_rng(0))
    one_by_one = np.stack([model.fit(counts) for counts in drawn])
    # scipy stops at a slope of 1e-10 per game; the curvature per game is above 1e-2
    np.testing.assert_allclose(model.refit(drawn, start), one_by_one, atol=1e-7)


def test_resampled_questions_keep_their_games():
    games = simulate({"a": 1000, "b": 1000}, questions=10, seed=0)
    rated = Decided.of(games)
    drawn = _resampled(games, rated, 30, np.random.default_rng(0))
    assert (drawn.sum(axis=2) == 10).all()  # each question has one game of each ordered pair
    assert drawn.std(axis=0).any()


@pytest.mark.long
@settings(deadline=None, max_examples=10)
@given(shuffle=st.randoms(use_true_random=False))
def test_neither_the_order_of_games_nor_of_systems_matters(shuffle):
    games = simulate({"a": 1100, "b": 1000, "c": 900}, position=50, questions=20, seed=4)
    rows = np.column_stack([games.question, games.first, games.second, games.verdicts]).tolist()
    shuffle.shuffle(rows)
    other = Games.of((f"q{q}", games.systems[i], games.systems[j], VERDICTS[v]) for q, i, j, v in rows)
    ours, theirs = (bradley_terry(one, resamples=2).ratings for one in (games, other))
    assert {name: one.value for name, one in ours.items()} == pytest.approx(
        {name: one.value for name, one in theirs.items()}, abs=1e-5
    )


def test_who_won_or_lost_everything_is_named_and_the_others_are_rated():
    rows = [*EXACT, ("top", "a", (5, 0, 0, 0)), ("b", "top", (0, 5, 0, 0)), ("low", "b", (0, 3, 0, 0))]
    found = bradley_terry(Games.of_counts(rows), resamples=50)
    assert found.always == {"top": "won", "low": "lost"}
    assert list(found.ratings) == ["top", "a", "b", "low"]
    assert found.ratings["top"].value == inf and found.ratings["low"].high == -inf
    assert found.ranks["top"] == (1, 1) and found.ranks["low"] == (4, 4)
    alone = bradley_terry(Games.of_counts(EXACT), resamples=50)
    assert found.ratings["a"].value == pytest.approx(alone.ratings["a"].value)


def test_a_system_that_wins_all_in_some_resamples_has_an_open_end():
    # b beat a once in eight questions, so every third resample, (7/8)^8, has only wins of a
    rows = [(f"q{i}", "a", "b", "second" if i == 0 else "first") for i in range(8)]
    found = bradley_terry(Games.of(rows), position=False, resamples=400)
    assert found.without_answer == 0
    a, b = found.ratings["a"], found.ratings["b"]
    assert 1000 < a.value < inf and a.low < a.value and a.high == inf
    assert (b.low, b.high) == (-inf, pytest.approx(2000 - a.low))


def nearly_always(winner: str) -> Games:
    """Both orders of three systems on 20 questions: "top" wins (or loses) all but two games, of one question."""
    rows = []
    for q in range(20):
        for x, y in ("top", "b"), ("top", "c"), ("b", "c"):
            better = {"won": x, "lost": y}[winner] if x == "top" else (x, y)[q % 2]
            if q == 0 and y == "b":
                better = y if better == x else x
            rows += [(str(q), x, y, "first" if better == x else "second")]
            rows += [(str(q), y, x, "first" if better == y else "second")]
    return Games.of(rows)


@pytest.mark.parametrize("winner", ["won", "lost"])
def test_others_stay_finite_beside_an_open_end(winner):
    found = bradley_terry(nearly_always(winner), resamples=400)
    top = found.ratings["top"]
    assert found.without_answer == 0 and (top.high if winner == "won" else -top.low) == inf
    assert np.isfinite([top.value, top.low if winner == "won" else top.high]).all()
    # the mean stays where it is, so no resample tears the others away
    others = [found.ratings[name] for name in "bc"]
    assert all(abs(end - one.value) < 200 for one in others for end in (one.low, one.high))
    assert np.isfinite([found.position.low, found.position.high]).all()


def test_resamples_without_a_tie_count():
    rows = [(f"q{i}", *pair, ("first", "second")[i % 2]) for i in range(30) for pair in ("ab", "ba")]
    found = bradley_terry(Games.of([*rows, ("q30", "a", "b", "tie")]), resamples=300)  # (30/31)^31: 36 % have none
    assert found.without_answer == 0 and found.ties.low == 0 and 0 < found.ties.value < found.ties.high < 0.2


def test_resamples_that_rate_nobody_are_counted():
    # only on question 0 the second answer won, so every third resample knows nothing but the position
    rows = [(f"q{i}", *pair, "first" if i else "second") for i in range(8) for pair in ("ab", "ba")]
    found = bradley_terry(Games.of(rows), resamples=400)
    # four standard deviations of a binomial, 9.5
    assert found.without_answer == pytest.approx(400 * (7 / 8) ** 8, abs=40)


def test_few_questions_have_thicker_tails():
    assert _tail(10**6) == pytest.approx(0.025, abs=1e-5)
    assert _tail(10) == pytest.approx(0.0086, abs=1e-4)  # Phi(-sqrt(10 / 9) * 2.262): t of 9 degrees from a table


def test_unread_verdicts_are_left_out_or_ties():
    rows = [("a", "b", (16, 1, 3, 1)), ("b", "a", (4, 4, 4, 0))]
    left_out, tied = (bradley_terry(Games.of_counts(rows), unread=word, resamples=2) for word in ("left out", "tie"))
    assert left_out.ties.value < tied.ties.value
    assert tied.ties.value == pytest.approx(1 / 3, abs=1e-7)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [("a", "b", (1, 1, 0, 0)), ("c", "d", (1, 1, 0, 0))],
            r"these groups never met in a game with a verdict: 'a', 'b' \| 'c', 'd'; let them answer",
        ),
        ([("a", "b", (1, 0, 0, 0)), ("b", "c", (3, 0, 0, 0))], "no finite ratings exist: .*'a' won all, 'b' won all"),
        ([("a", "b", (0, 0, 0, 4))], r"never met in a game with a verdict: 'a' \| 'b'; let"),
        # always the first: the broken judge
        (
            [("a", "b", (9, 0, 1, 0)), ("b", "a", (9, 0, 0, 0))],
            "the first answer won all decided games, so position alone",
        ),
        ([("a", "b", (0, 9, 0, 0)), ("b", "a", (0, 9, 0, 0))], "the second answer won all decided games"),
        ([("a", "b", (5, 2, 1, 0)), ("a", "c", (5, 2, 1, 0))], "strength and position cannot be told apart"),
        ([("a", "b", (0, 0, 5, 0)), ("b", "a", (0, 0, 5, 0))], "every verdict is a tie; play more"),
        (
            [(*pair, (2, 1, 0, 0)) for pair in ("ab", "ba", "cd", "dc")]
            + [("a", "c", (3, 0, 0, 0)), ("d", "b", (0, 2, 0, 0))],
            "no verdict ever speaks against 'a', 'b' over 'c', 'd'",
        ),
        (
            [("hub", "a", (2, 0, 0, 0)), ("hub", "b", (2, 0, 0, 0))],
            r"these groups never met in .*: 'a' \| 'b', apart from games of 'hub', which won or lost all",
        ),
    ],
)
def test_tournaments_without_an_answer_say_why(rows, words):
    with pytest.raises(ValueError, match=words):
        bradley_terry(Games.of_counts(rows))


def test_an_interval_needs_resamples():
    for resamples in (1, 2.5, "10"):
        with pytest.raises(ValueError, match="resamples=.* is not allowed: it is a whole number of at least 2"):
            bradley_terry(Games.of_counts(EXACT), resamples=resamples)
    with pytest.raises(ValueError, match="seed=-1 is not allowed"):
        bradley_terry(Games.of_counts(EXACT), seed=-1)
    with pytest.raises(ValueError, match="needs two with a verdict, but there is one"):
        bradley_terry(Games.of([("q", "a", "b", "first"), ("q", "b", "a", "first"), ("r", "a", "b", "unread")]))
    with pytest.raises(ValueError, match="unread is 'no'"):
        bradley_terry(Games.of_counts(EXACT), unread="no")
