"""Games as arrays: names get numbers, counts become games, bad rows are named."""

import numpy as np
import pytest

from qlora_lab.measure.games import Games


def test_names_get_numbers_in_the_order_of_their_first_game():
    games = Games.of([("q1", "b", "a", "first"), ("q2", "a", "c", "unread"), ("q1", "c", "b", "second")])
    assert games.systems == ("b", "a", "c") and games.questions == ("q1", "q2")
    assert games.question.tolist() == [0, 1, 0] and games.verdicts.tolist() == [0, 3, 1]
    assert games.first.tolist() == [0, 1, 2] and games.second.tolist() == [1, 2, 0]
    assert len(games) == 3 and games.unread == 1


def test_counts_become_games_without_questions():
    games = Games.of_counts([("a", "b", (2, 1, 0, 1)), ("b", "a", (0, 0, 1, 0))])
    assert games.verdicts.tolist() == [0, 0, 1, 3, 2] and games.first.tolist() == [0, 0, 0, 0, 1]
    assert games.questions == () and set(games.question.tolist()) == {-1}


def test_a_choice_of_games_keeps_the_numbers():
    games = Games.of([("q1", "a", "b", "first"), ("q2", "c", "b", "tie")])
    chosen = games.where(np.array([False, True]))
    assert chosen.systems == games.systems and chosen.first.tolist() == [2] and chosen.question.tolist() == [1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("q", "a", "b", "both"), "game 2: the verdict is 'both'; allowed are first, second, tie, unread"),
        (("q", "a", "a", "tie"), "game 2: 'a' plays against itself"),
    ],
)
def test_a_bad_row_is_named(row, words):
    with pytest.raises(ValueError, match=words):
        Games.of([("q", "a", "b", "tie"), row])


def test_bad_counts_are_named():
    with pytest.raises(ValueError, match=r"row 2: the counts are \[0, -1, 0, 0\]"):
        Games.of_counts([("a", "b", (1, 0, 0, 0)), ("b", "a", (0, -1, 0, 0))])
    with pytest.raises(ValueError, match=r"row 1: the counts are \[1, 2, 3\]; four of 0 or more are needed: of first"):
        Games.of_counts([("a", "b", (1, 2, 3))] * 4)  # twelve numbers, which would also make three rows
