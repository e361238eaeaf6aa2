"""The tournament explorer: four systems whose strengths are known, and what games and ratings make of them.

State: questions, position, both_orders, order. Each system has a row: its true strength, its Elo rating after one
order of the games, and its Bradley-Terry rating with a 95 % interval and the ranks that go with it. The games are drawn
by measure/simulated_games.py, and rated by measure/tournament.py and measure/bradley_terry.py.

A is the weakest, and stands first in the list. So the judge always reads it first if each pair is judged in one order
only, and if the first position is worth enough, Elo puts it on top.
"""

from functools import lru_cache

import numpy as np

from qlora_lab.measure.bradley_terry import BradleyTerry, bradley_terry
from qlora_lab.measure.games import Games
from qlora_lab.measure.simulated_games import simulate
from qlora_lab.measure.tournament import Rules, elo_of_one_order, scores
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, CLOSE, COLOURS, IN_DETAIL, TITLE, new_figure
from qlora_lab.show.results import rank_words
from qlora_lab.show.slider import Slider, Toggle

TRUTH = {"A": 940.0, "B": 1050.0, "C": 1020.0, "D": 990.0}  # points; their mean is 1000, as that of any Elo ratings
RESAMPLES = 200  # for an interval that follows a slider: 10 to 20 ms, and its ends wobble by a tenth of its length
SEED = 1  # of the games: the same draw for every state, so that a slider changes one thing
LIMITS = (600, 1400)  # points. Few games give intervals that reach farther; an arrow at the edge says so


@lru_cache(maxsize=16)  # for a slider that moves back and forth; another order of the games changes none of it
def played(questions: int, position: int, both_orders: bool) -> tuple[Games, BradleyTerry]:
    """Draw the games of a state, and rate them with intervals. Without both orders, one half of them is left out."""
    games = simulate(TRUTH, position=position, questions=questions, seed=SEED)
    if not both_orders:
        games = games.where(games.first < games.second)
    return games, bradley_terry(games, resamples=RESAMPLES)


class TournamentExplorer(Explorer):
    """Questions, the worth of the first position and the order of the games: what two ratings say. See Explorer."""

    def controls(self):
        return {
            # doubled: each step makes an interval shorter by the root of two
            "questions": Slider("Questions", 20, choices=[10, 20, 40, 80, 160, 320]),
            "position": Slider("Worth of the first position", 100, choices=list(range(0, 401, 50)), unit="points"),
            "both_orders": Toggle("Each pair in both orders", True),
            "order": Slider("Order of the games", 1, choices=list(range(1, 11))),
        }

    @staticmethod
    def compute(state):
        games, fit = played(state["questions"], state["position"], state["both_orders"])
        order = np.random.default_rng(state["order"]).permutation(len(games))
        # the readable loop: for one order it is faster than the arrays that play thousands
        points = elo_of_one_order(scores(games, Rules()), order, len(TRUTH), Rules())
        elo = dict(zip(TRUTH, points, strict=True))
        return {"games": len(games), "elo": elo, "fit": fit}

    def draw(self):
        fig, ax = new_figure(width=BESIDE, height=3.6)
        blue, orange, black = (COLOURS[name] for name in ("blue", "orange", "black"))
        ax.set(xlim=LIMITS, ylim=(len(TRUTH) - 0.4, -0.6))
        ax.set_yticks(range(len(TRUTH)), TRUTH)
        ax.set_xlabel("points")
        # drawn once, below all that moves: no control changes the truth
        rows = enumerate(TRUTH.values())
        truth = [ax.plot([points], [y], "|", ms=26, mew=2, color=black)[0] for y, points in rows]
        self.bars = [ax.plot([], [], color=blue, lw=3)[0] for _ in TRUTH]
        self.dots = [ax.plot([], [], "o", ms=9, color=blue)[0] for _ in TRUTH]
        # a bar that is cut off would look like one that ends there
        self.cut = [ax.plot([], [], mark, ms=8, color=blue, clip_on=False)[0] for mark in "<>"]
        # hollow, so that a dot below it shows
        self.diamonds = [ax.plot([], [], "D", ms=8, mfc="none", mew=2, color=orange)[0] for _ in TRUTH]
        # right of the axes, so that no interval crosses them
        right = ax.get_yaxis_transform()
        self.ranks = [ax.text(1.02, y, "ranks 1 to 4", transform=right, va="center") for y in range(4)]
        shown = [truth[0], self.dots[0], self.diamonds[0]]
        # above the axes, because some interval crosses every place inside; ranks name themselves
        names = ["truth", "Bradley-Terry, 95 %", "Elo of this order"]
        title = "Another order of the same games moves only the diamonds"
        fig.suptitle(title, x=0.02, ha="left", fontsize=TITLE)
        legend = fig.legend(shown, names, loc="outside lower left", ncols=3, frameon=False, **CLOSE)
        legend.legend_handles[0].set_markersize(14)
        fix_layout(fig)
        return fig, [*self.bars, *self.cut, *self.dots, *self.diamonds, *self.ranks]

    def update(self, result):
        fit = result["fit"]
        # in the order of the list and not by rating: rows that changed places could not be followed
        for y, name in enumerate(TRUTH):
            rating = fit.ratings[name]
            self.bars[y].set_data(np.clip([rating.low, rating.high], *LIMITS), [y, y])
            self.dots[y].set_data([rating.value], [y])
            self.diamonds[y].set_data([result["elo"][name]], [y])
            self.ranks[y].set_text(rank_words(fit.ranks[name]))
        ratings = [fit.ratings[name] for name in TRUTH]
        # an open end is infinite, so it lies beyond, too
        beyond = ([r.low < LIMITS[0] for r in ratings], [r.high > LIMITS[1] for r in ratings])
        for arrows, edge, rows in zip(self.cut, LIMITS, beyond, strict=True):
            arrows.set_data([edge] * sum(rows), np.flatnonzero(rows))

    @staticmethod
    def describe(state, result):
        fit = result["fit"]
        # 4 of 4 in most states, not in all: one interval of twenty misses
        held = sum(fit.ratings[name].low <= points <= fit.ratings[name].high for name, points in TRUTH.items())
        best_first = sorted(result["elo"].items(), key=lambda item: -item[1])
        elo = ", ".join(f"{name} {points:.0f}" for name, points in best_first)
        ratings = ", ".join(
            f"{name} {rating.value:.0f} ({rating.low:.0f} to {rating.high:.0f})" for name, rating in fit.ratings.items()
        )
        orders = "both orders" if state["both_orders"] else "one order of each pair"
        strongest = max(fit.ratings, key=lambda name: fit.ratings[name].value)
        return (
            f"Elo puts {best_first[0][0]} first, Bradley-Terry {strongest}; Bradley-Terry's intervals hold {held} of "
            f"the 4 true strengths{IN_DETAIL}"
            f"{state['questions']} questions in {orders}, {result['games']:,} games, a first position worth "
            f"{state['position']} points: order {state['order']} of the games gives Elo {elo}; Bradley-Terry gives "
            f"{ratings}, and finds the first position worth {fit.position.value:.0f} points; in truth B has 1050, "
            "C 1020, D 990, A 940"
        )
