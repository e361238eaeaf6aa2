"""The table of a tournament: its ranks and intervals at 95 %, and what it says where there is no rating."""

from math import inf, log, sqrt

import pytest

from qlora_lab.measure import standings as module
from qlora_lab.measure.bradley_terry import POINTS
from qlora_lab.measure.games import Games
from qlora_lab.measure.standings import standings

QUICK = {"orders": 50, "progress": False}


def duel(wins: int, questions: int = 100) -> list[tuple[str, str, str, str]]:
    """Two systems, both orders: "a" wins both games of `wins` questions, "b" those of the others."""
    rows = []
    for q in range(questions):
        rows += [(str(q), "a", "b", "first" if q < wins else "second")]
        rows += [(str(q), "b", "a", "second" if q < wins else "first")]
    return rows


def test_rows_are_best_first_and_count_their_games():
    rows = [*duel(14, 20), ("0", "c", "a", "unread"), ("0", "c", "b", "second"), ("1", "c", "b", "first")]
    found = standings(Games.of(rows), **QUICK)
    assert found.rows[0].system == "a"
    assert [row.elo for row in found.rows] == sorted((row.elo for row in found.rows), reverse=True)
    counted = {row.system: (row.games, row.unread) for row in found.rows}
    assert counted == {"a": (41, 1), "b": (42, 0), "c": (3, 1)}
    assert found.judge.verdicts.unread == 1 and all(row.one_order > 0 for row in found.rows)


def test_an_interval_over_questions_is_at_95_per_cent():
    # A question is one draw: both of its games go to one system. So the log odds have the standard error
    # 1 / sqrt(n p (1 - p)), and a's rating has half of it, since b's moves the other way.
    found = standings(Games.of(duel(50)), **QUICK)
    rating = {row.system: row.rating for row in found.rows}["a"]
    half = 1.96 * POINTS / 2 / sqrt(100 / 4)
    # 1,000 resamples put an end wrong by 5 %; an interval at 80 % has 65 % of this width, one at 99 % has 131 %
    assert (rating.high - rating.low) / 2 == pytest.approx(half, rel=0.15)
    assert rating.value == pytest.approx(1000) and found.over == "questions" and found.without_answer == 0


def test_an_interval_over_games_is_at_95_per_cent():
    counts = [("a", "b", (240, 160, 0, 0)), ("b", "a", (200, 200, 0, 0))]
    found = standings(Games.of_counts(counts), **QUICK)
    assert found.over == "games"
    # strength is half the difference of the two log odds, position half their sum
    error = POINTS * sqrt(1 / 240 + 1 / 160 + 1 / 200 + 1 / 200) / 2
    rating = {row.system: row.rating for row in found.rows}["a"]
    assert (rating.high - rating.low) / 2 == pytest.approx(1.96 * error / 2, rel=0.15)
    assert found.position.value == pytest.approx(POINTS * log(1.5) / 2, abs=1e-4)
    assert (found.position.high - found.position.low) / 2 == pytest.approx(1.96 * error, rel=0.15)


@pytest.mark.parametrize(
    ("wins", "ranks"),
    [
        # log odds over standard error: 1.2, so a resample puts b first with 12 %: above the 2.5 % of either tail
        (56, {"a": (1, 2), "b": (1, 2)}),
        (63, {"a": (1, 1), "b": (2, 2)}),  # 2.6: with 0.5 %
    ],
)
def test_ranks_are_those_of_95_per_cent(wins, ranks):
    assert {row.system: row.ranks for row in standings(Games.of(duel(wins)), **QUICK).rows} == ranks


@pytest.mark.long
def test_an_open_end_is_infinite_and_resamples_without_an_answer_have_a_share():
    rating = standings(Games.of(duel(19, 20)), **QUICK).rows[0].rating  # 36 % of resamples are all a's
    assert rating.low > 1000 and rating.high == inf
    # the second answer won on one question alone, so in a third of the resamples position explains all
    rows = [(f"q{i}", *pair, "first" if i else "second") for i in range(8) for pair in ("ab", "ba")]
    found = standings(Games.of(rows), **QUICK)
    assert found.without_answer == pytest.approx((7 / 8) ** 8, abs=0.06)  # four standard deviations


def test_without_a_rating_the_reason_stands_alone():
    rows = [(str(q), *pair, "first") for q in range(9) for pair in (("a; b", "c"), ("c", "a; b"))]
    found = standings(Games.of(rows), **QUICK)
    assert found.no_rating == (
        "no finite ratings exist: the first answer won all decided games, so position alone explains them"
    )
    assert (found.position, found.over, found.without_answer) == (None, None, None)
    assert all(row.rating is None and row.ranks is None and row.elo for row in found.rows)
    # a semicolon in a name belongs to the reason
    found = standings(Games.of([(str(q), "a; b", "c", "first") for q in range(9)]), **QUICK)
    assert found.no_rating.endswith("one after another, 'a; b' won all remaining games")


def test_groups_that_never_met_and_no_verdict_are_errors():
    with pytest.raises(ValueError, match=r"never met in a game with a verdict: 'a', 'b' \| 'c', 'd'; let them"):
        standings(Games.of([("q", "a", "b", "first"), ("q", "c", "d", "first")]), **QUICK)
    with pytest.raises(ValueError, match="no game can be rated: of 1 verdicts, 1 could not be read"):
        standings(Games.of([("q", "a", "b", "unread")]), **QUICK)


def test_without_progress_there_is_no_bar(monkeypatch):
    seen = []
    for name in ("elo", "bradley_terry"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *given, real=real, **options: seen.append(options["progress"]) or real(*given, **options),
        )
    standings(Games.of(duel(7, 9)), orders=5, resamples=5, progress=False)
    assert seen == [False, False]
