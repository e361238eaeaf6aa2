"""Tell whether a tournament has an answer: which systems met, which won everything, what no game ever contradicts.

In: games, counted by ordered pair. Out: nothing, or a NoRatingError in words.
Strengths of a likelihood have no finite maximum if some direction of strengths, position and ties makes no observed
verdict less likely (Albert and Anderson, Biometrika 1984, on logistic models). A linear program finds such a direction
or proves that there is none.
Not here: the maximum itself (bradley_terry.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlora_lab.measure.games import FIRST, SECOND, TIE, UNREAD, Games, quoted


class NoRatingError(ValueError):
    """A tournament has no answer. `reason` alone is for readers of a result, whom advice on arguments does not help."""

    def __init__(self, reason: str, advice: str):
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


@dataclass(frozen=True)
class Decided:
    """Counted verdicts of ordered pairs."""

    systems: tuple[int, ...]  # indices into Games.systems
    first: np.ndarray  # (pairs,) int64, indices into `systems` of this record
    second: np.ndarray
    counts: np.ndarray  # (pairs, 3) float64: first wins, second wins, ties

    @classmethod
    def of(cls, games: Games) -> "Decided":
        """Count the games by ordered pair. An unread verdict counts as a tie: leave it out first if it should not."""
        pairs, pair = np.unique(np.column_stack([games.first, games.second]), axis=0, return_inverse=True)
        counts = np.zeros((len(pairs), 3))
        np.add.at(counts, (pair.ravel(), _as_tie(games)), 1)
        return cls(tuple(range(len(games.systems))), *pairs.T.reshape(2, -1), counts)

    def by_question(self, games: Games) -> np.ndarray:
        """Count verdicts by question, (questions, pairs, 3): of the questions of `games`, and of the pairs here."""
        pair_of = np.full((len(games.systems),) * 2, -1)  # -1: a game of a system that was set aside
        systems = np.array(self.systems)
        pair_of[systems[self.first], systems[self.second]] = np.arange(len(self.first))
        pair = pair_of[games.first, games.second]
        here = pair >= 0
        asked, question = np.unique(games.question, return_inverse=True)  # no question without a read verdict
        counts = np.zeros((len(asked), len(self.counts), 3))
        np.add.at(counts, (question.ravel()[here], pair[here], _as_tie(games)[here]), 1)
        return counts

    def without(self, system: int) -> "Decided":
        """Return the games among the other systems. system: an index into `systems`."""
        kept = (self.first != system) & (self.second != system)
        first, second = (side[kept] - (side[kept] > system) for side in (self.first, self.second))
        systems = self.systems[:system] + self.systems[system + 1 :]
        return replace(self, systems=systems, first=first, second=second, counts=self.counts[kept])


def _as_tie(games: Games) -> np.ndarray:
    return np.where(games.verdicts == UNREAD, TIE, games.verdicts)


def check_connected(decided: Decided, names: Sequence[str], apart_from: Sequence[str] = ()) -> None:
    """Raise NoRatingError, with the groups, if some systems never met the others, not even through third ones."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(decided.systems)
    met = coo_array((np.ones(len(decided.first)), (decided.first, decided.second)), shape=(count, count))
    groups, group = connected_components(met, directed=False)
    if groups > 1 or count < 2:
        members = [[names[decided.systems[i]] for i in np.flatnonzero(group == number)] for number in range(groups)]
        said = " | ".join(quoted(one) for one in members) or "no system"
        besides = f", apart from games of {quoted(apart_from)}, which won or lost all of theirs" if apart_from else ""
        words = "these groups never met in a game with a verdict" if groups > 1 else "a tournament needs two systems"
        advice = "let them answer the same questions, or rate each group alone"
        raise NoRatingError(f"{words}: {said}{besides}", advice)


def set_aside(decided: Decided, names: Sequence[str]) -> tuple[Decided, dict[str, str]]:
    """Set aside, one after another, the systems that won (or lost) all their games. Returns the rest, and which did.

    Their strength is infinite, and then their games say nothing about the others. At least one system is left.
    """
    always = {}
    while len(decided.systems) > 1:
        wins, games = np.zeros((2, len(decided.systems)))
        for side, verdict in ((decided.first, FIRST), (decided.second, SECOND)):
            np.add.at(wins, side, decided.counts[:, verdict])
            np.add.at(games, side, decided.counts.sum(axis=1))
        losses, played = games - wins - _ties(decided), games > 0  # one that met only those set aside has no games left
        found = [(i, "won") for i in np.flatnonzero(played & (wins == games))]
        found += [(i, "lost") for i in np.flatnonzero(played & (losses == games))]
        if not found:
            break
        system, what = found[0]
        always[names[decided.systems[system]]] = what
        decided = decided.without(int(system))
    return decided, always


def without_exception(decided: Decided, names: Sequence[str]) -> tuple[Decided, dict[str, str]]:
    """Set systems aside as set_aside does. Raises NoRatingError if under two are left, or groups that never met."""
    decided, always = set_aside(decided, names)
    if len(decided.systems) < 2:
        said = ", ".join(f"{name!r} {what} all" for name, what in always.items())
        raise NoRatingError(
            f"no finite ratings exist: one after another, {said} remaining games", "play more, or use elo"
        )
    if always:
        check_connected(decided, names, tuple(always))
    return decided, always


def _ties(decided: Decided) -> np.ndarray:
    ties = np.zeros(len(decided.systems))
    for side in (decided.first, decided.second):
        np.add.at(ties, side, decided.counts[:, TIE])
    return ties


def check_maximum(decided: Decided, utilities: np.ndarray, names: Sequence[str], position: bool) -> None:
    """Raise NoRatingError if the likelihood has no single finite maximum, and say what grows without end.

    utilities: (pairs, outcomes, parameters), as in bradley_terry._Model; strengths of all systems but the last come
    first, then the position if `position`, then the logarithm of nu if there is any tie.
    """
    from scipy.optimize import linprog

    if not decided.counts[:, [FIRST, SECOND]].any():
        raise NoRatingError("no finite ratings exist: every verdict is a tie", "play more games, or use elo")
    for side, loser in (("first", SECOND), ("second", FIRST)):
        if position and not decided.counts[:, loser].any():  # a broken judge, or too few games
            words = f"the {side} answer won all decided games, so position alone explains them"
            raise NoRatingError(f"no finite ratings exist: {words}", "play more games, or pass position=False")
    outcomes = utilities.shape[1]
    # (seen, other): how much more the seen verdict gains than each other one. None may be negative.
    gains = np.concatenate(
        [
            utilities[decided.counts[:, seen] > 0, seen] - utilities[decided.counts[:, seen] > 0, other]
            for seen in range(outcomes)
            for other in range(outcomes)
            if seen != other
        ]
    )
    if np.linalg.matrix_rank(gains) < gains.shape[1]:
        words = "strength and position cannot be told apart: no pair was read in both orders, or no chain of systems"
        raise NoRatingError(f"{words} links them", "play both orders, or pass position=False")
    found = linprog(-gains.sum(axis=0), A_ub=-gains, b_ub=np.zeros(len(gains)), bounds=(-1, 1))
    if found.status == 0 and -found.fun < 1e-7:
        return
    strengths = np.append(found.x[: len(names) - 1], -found.x[: len(names) - 1].sum())
    words = []
    if position and abs(found.x[len(names) - 1]) > 1e-6:
        words.append(f"the {'first' if found.x[len(names) - 1] > 0 else 'second'} answer read")
    if np.ptp(strengths) > 1e-6:
        above = strengths > strengths.max() - 1e-6
        groups = [quoted(names[i] for i in np.flatnonzero(above == side)) for side in (True, False)]
        words.append(f"{groups[0]} over {groups[1]}")
    said = " and ".join(words) or "a larger share of ties"
    reason = f"no finite ratings exist: no verdict ever speaks against {said}"
    raise NoRatingError(reason, "play more games, or use elo")
