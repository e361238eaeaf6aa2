"""Elo: one update by hand, the readable twin, unread verdicts and both orders, and the paper's table 1."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from qlora_lab.files.course import course_path
from qlora_lab.measure import tournament
from qlora_lab.measure.games import VERDICTS, Games
from qlora_lab.measure.judgments import read_games
from qlora_lab.measure.tournament import BOTH_ORDERS, Rules, elo, elo_of_one_order, rank_ranges, scores

# QLoRA, arXiv 2305.14314, table 1, under the names of the authors' files
TABLE_1 = {"gpt-4": 1348, "65b-guanaco": 1022, "33b-guanaco": 992, "vicuna-13b": 974, "gpt-3.5": 966}
TABLE_1 |= {"13b-guanaco": 916, "bard": 902, "7b-guanaco": 879}

ONE = Games.of([("q", "a", "b", "tie")])
ROWS = st.lists(
    st.tuples(
        st.sampled_from("pqr"), st.permutations("abcd").map(lambda names: tuple(names[:2])), st.sampled_from(VERDICTS)
    ),
    min_size=1,
    max_size=30,
)


def vicuna() -> Games:
    return read_games(course_path("data", "published", "guanaco_vicuna_pairs.csv"))


def test_one_update_by_hand():
    # equals: p = 1/2, so the winner gets 16. Then 1016 against 1000: p = 1 / (1 + 10^(-16/400)) = 0.52301
    games = Games.of([("q1", "a", "b", "first"), ("q2", "a", "c", "first")])
    ratings = elo_of_one_order(scores(games, Rules()), [0, 1], 3, Rules())
    assert ratings == pytest.approx([1016 + 32 * (1 - 0.5230094), 984, 1000 - 32 * (1 - 0.5230094)], abs=1e-4)


def test_a_tie_moves_points_to_the_weaker():
    games = Games.of([("q", "a", "b", "first"), ("q", "a", "b", "tie")])
    assert elo_of_one_order(scores(games, Rules()), [0, 1], 2, Rules())[0] < 1016


@settings(deadline=None, max_examples=25)
@given(rows=ROWS, both_orders=st.sampled_from(BOTH_ORDERS), unread=st.sampled_from(tournament.AS_UNREAD))
def test_each_order_is_the_readable_loop(rows, both_orders, unread):
    games = Games.of((question, *pair, verdict) for question, pair, verdict in rows)
    rules = Rules(both_orders=both_orders, unread=unread, k=20.0, start=0.0)
    if unread == "left out" and games.unread == len(games):
        return
    found = elo(games, rules, orders=3, seed=5)
    # the same shuffle of the kinds of games, played by the loop
    first, second, score, kinds = tournament._kinds(scores(games, rules))
    draws = np.random.default_rng(5).permuted(np.tile(kinds, (3, 1)), axis=1)
    for order, ratings in zip(draws, found.by_order, strict=True):
        again = elo_of_one_order(tournament.Scores(first, second, score), order, len(games.systems), rules)
        # numpy's power and Python's differ by a unit in the last place of p, times k = 20, in at most 30 games
        assert ratings.tolist() == pytest.approx(again, abs=30 * 20 * 4e-16 * 10)
    assert found.by_order.sum(axis=1) == pytest.approx(0, abs=1e-9)  # what one gains another loses


@pytest.mark.long
def test_the_size_of_a_chunk_changes_nothing(monkeypatch):
    games = vicuna()
    whole = elo(games, orders=5, seed=1).by_order
    monkeypatch.setattr(tournament, "SHUFFLED", 2 * len(games))
    assert (elo(games, orders=5, seed=1).by_order == whole).all()


@pytest.mark.long
def test_a_seed_repeats_and_another_does_not():
    games = vicuna()
    first, again, other = (elo(games, orders=2, seed=seed).by_order for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_unread_verdicts_are_left_out_or_ties():
    games = Games.of([("q", "a", "b", "unread"), ("q", "b", "a", "first")])
    left_out, tied = (scores(games, Rules(unread=word)).score.tolist() for word in tournament.AS_UNREAD)
    assert (left_out, tied) == ([1.0], [0.5, 1.0])


def test_a_tie_if_they_differ_needs_two_that_differ():
    """A win beside a tie differs; where one order was not read, the other decides."""
    rows = [("p", "a", "b", "first"), ("p", "b", "a", "tie"), ("q", "a", "b", "first"), ("q", "b", "a", "unread")]
    assert scores(Games.of(rows), Rules(both_orders="tie if they differ")).score.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("verdicts", "apart", "mean", "differ"),
    [  # of a against b, then of b against a. Scores: of the first system of each game
        (("first", "second"), [1, 0], [1], [1]),  # a wins both
        (("first", "first"), [1, 1], [0.5], [0.5]),
        (("first", "tie"), [1, 0.5], [0.75], [0.5]),
        (("tie", "tie"), [0.5, 0.5], [0.5], [0.5]),
        (("unread", "first"), [1], [0], [0]),  # the order that was read decides
    ],
)
def test_both_orders_of_one_question(verdicts, apart, mean, differ):
    games = Games.of([("q", "a", "b", verdicts[0]), ("q", "b", "a", verdicts[1])])
    for both_orders, expected in zip(BOTH_ORDERS, (apart, mean, differ), strict=True):
        assert scores(games, Rules(both_orders=both_orders)).score.tolist() == expected


def test_ranks_are_ranges():
    samples = np.array([[3.0, 2.0, 1.0]] * 99 + [[1.0, 2.0, 3.0]])
    assert rank_ranges(samples) == [(1, 1), (2, 2), (3, 3)]  # one sample in a hundred lies outside 95 %
    assert rank_ranges(samples, 1.0) == [(1, 3), (2, 2), (1, 3)]
    assert rank_ranges(np.array([[5.0, 5.0, 1.0]])) == [(1, 1), (1, 1), (3, 3)]  # equals share the better rank


@pytest.mark.long
def test_the_paper_s_table_1_comes_out_of_its_judgments():
    found = elo(vicuna(), Rules(unread="tie"), orders=2500)  # the standard error of a mean is 45 / sqrt(2500) = 0.9
    assert list(found.ratings) == list(TABLE_1)
    for name, rating in found.ratings.items():
        assert abs(rating - TABLE_1[name]) <= (30 if name == "gpt-4" else 10), name
    assert all(35 < deviation < 55 for deviation in found.deviations.values())  # one order tells little


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: Rules(unread="dropped"), "unread is 'dropped'; allowed are 'left out', 'tie'"),
        (lambda: Rules(both_orders="sum"), "both_orders is 'sum'; allowed are 'apart', 'mean', 'tie if they differ'"),
        (lambda: Rules(k=0), "k=0 is not allowed: it is a finite number above 0"),
        (lambda: Rules(k="32"), "k='32' is not allowed"),
        (lambda: Rules(k=float("inf")), "k=inf is not allowed"),
        (lambda: Rules(start=float("nan")), "start=nan is not allowed: it is a finite number"),
        (lambda: Rules(start=None), "start=None is not allowed"),
        (lambda: elo(ONE, orders=0), "orders=0 is not allowed: it is a whole number of at least 1"),
        (lambda: elo(ONE, orders=2.5), "orders=2.5 is not allowed"),
        (lambda: elo(ONE, orders="10"), "orders='10' is not allowed"),
        (lambda: elo(ONE, seed=-1), "seed=-1 is not allowed"),
        (lambda: rank_ranges(np.empty((0, 2))), r"samples have the shape \(0, 2\): .* at least one sample"),
        (lambda: rank_ranges(np.ones(3)), r"samples have the shape \(3,\)"),
        (
            lambda: elo(Games.of([("q", "a", "b", "unread")])),
            "no game can be rated: of 1 verdicts, 1 could not be read",
        ),
        (lambda: elo(vicuna(), Rules(both_orders="mean")), "needs the question of each game, .* counts alone: read"),
        (lambda: rank_ranges(np.ones((1, 2)), 0), "share is 0"),
    ],
)
def test_errors_say_what_to_do(act, words):
    with pytest.raises(ValueError, match=words):
        act()
