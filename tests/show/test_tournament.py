"""The tournament explorer shows what the ratings say, and its lesson holds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from qlora_lab.measure.bradley_terry import bradley_terry
from qlora_lab.measure.simulated_games import simulate
from qlora_lab.measure.tournament import Rules, elo_of_one_order, scores
from qlora_lab.show.results import rank_words
from qlora_lab.show.slider import Slider
from qlora_lab.show.tournament import LIMITS, SEED, TRUTH, TournamentExplorer

EXPLORER = TournamentExplorer()
STATES = {
    name: st.sampled_from(control.choices) if isinstance(control, Slider) else st.booleans()
    for name, control in EXPLORER._controls.items()
}


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(st.fixed_dictionaries(STATES))
def test_any_state(state):
    EXPLORER.set(**state)
    result = EXPLORER.result
    pairs = 12 if state["both_orders"] else 6  # of four systems
    assert result["games"] == pairs * state["questions"]
    assert sum(result["elo"].values()) == pytest.approx(4000)  # what one gains the other loses
    assert sum(rating.value for rating in result["fit"].ratings.values()) == pytest.approx(4000)
    for y, name in enumerate(TRUTH):
        rating = result["fit"].ratings[name]
        assert EXPLORER.dots[y].get_data() == ([rating.value], [y])
        assert EXPLORER.diamonds[y].get_data() == ([result["elo"][name]], [y])
        ends, _ = EXPLORER.bars[y].get_data()
        assert ends.tolist() == [max(rating.low, LIMITS[0]), min(rating.high, LIMITS[1])]
        assert EXPLORER.ranks[y].get_text() == rank_words(result["fit"].ranks[name])
        assert f"{name} {rating.value:.0f} ({rating.low:.0f} to {rating.high:.0f})" in EXPLORER.summary()
        assert f"{name} {result['elo'][name]:.0f}" in EXPLORER.summary()


@pytest.mark.slow  # 108 states of 10 to 30 ms
def test_every_tournament_has_ratings_inside_of_the_picture():
    choices = [EXPLORER._controls[field].choices for field in ("questions", "position")]
    for questions, position, both in itertools.product(*choices, (True, False)):
        state = {"questions": questions, "position": position, "both_orders": both, "order": 1}
        result = TournamentExplorer.compute(state)  # raises if few games name no winner
        values = [*result["elo"].values(), *(rating.value for rating in result["fit"].ratings.values())]
        assert LIMITS[0] < min(values) and max(values) < LIMITS[1]


def test_the_start_is_what_the_ratings_say():
    EXPLORER.reset()
    games = simulate(TRUTH, position=100, questions=20, seed=SEED)
    order = np.random.default_rng(1).permutation(len(games))
    assert list(EXPLORER.result["elo"].values()) == elo_of_one_order(scores(games, Rules()), order, 4, Rules())
    assert EXPLORER.result["fit"] == bradley_terry(games, resamples=200)


def test_another_order_moves_elo_alone():
    EXPLORER.reset()
    before = EXPLORER.result
    EXPLORER.set(order=2)
    assert EXPLORER.result["fit"] == before["fit"]
    assert EXPLORER.result["elo"] != before["elo"]


def test_read_first_the_weakest_wins_until_both_orders_are_played():
    EXPLORER.set(questions=160, position=400, both_orders=False, order=2)
    elo = EXPLORER.result["elo"]
    assert max(elo, key=elo.get) == "A" == min(TRUTH, key=TRUTH.get)
    position = EXPLORER.result["fit"].position
    assert position.low < 400 < position.high
    EXPLORER.set(both_orders=True)
    elo = EXPLORER.result["elo"]
    assert max(elo, key=elo.get) == "B" == max(TRUTH, key=TRUTH.get)


def test_one_order_of_a_pair_reads_the_first_in_the_list_first():
    games = simulate(TRUTH, questions=10, seed=SEED)
    kept = games.where(games.first < games.second)
    assert len(kept) == 60 and 0 not in kept.second  # 0 is A: it is never read second


def test_more_questions_give_shorter_intervals():
    lengths = []
    for questions in (20, 80, 320):
        EXPLORER.set(questions=questions, position=100, both_orders=True)
        lengths.append(np.mean([rating.high - rating.low for rating in EXPLORER.result["fit"].ratings.values()]))
    assert lengths[0] > 1.6 * lengths[1] > 1.6**2 * lengths[2]  # four times the questions: half, give or take a draw


def test_a_bar_that_is_cut_off_says_so():
    # so few games leave A and D without a lower end in sight, and C without an upper one
    EXPLORER.set(questions=10, position=400, both_orders=False)
    ratings = [EXPLORER.result["fit"].ratings[name] for name in TRUTH]
    low, high = (list(zip(*arrows.get_data(), strict=True)) for arrows in EXPLORER.cut)
    assert low == [(LIMITS[0], y) for y, rating in enumerate(ratings) if rating.low < LIMITS[0]] != []
    assert high == [(LIMITS[1], y) for y, rating in enumerate(ratings) if rating.high > LIMITS[1]] != []
    # arrows must go when their bars fit again
    EXPLORER.set(questions=320, both_orders=True)
    assert all(len(arrows.get_xdata()) == 0 for arrows in EXPLORER.cut)


@pytest.mark.long
def test_a_picture_does_not_depend_on_the_one_before_it():
    EXPLORER.set(questions=10, position=400, both_orders=False, order=10)
    EXPLORER.set(questions=40, position=0, both_orders=True, order=3)
    assert TournamentExplorer(**EXPLORER.state).png == EXPLORER.png


def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="questions=7 is not allowed: one of 10, 20"):
        EXPLORER.set(questions=7)
