"""Unmask a judge who reads places and not answers, from the games alone.

In: Games in which every two answers were read in both orders. Out: a Diagnosis, and what it means in a sentence.
A judge who reads the answers gives the same winner in either order, or a tie
in one of them. One that always names the first answer contradicts itself on every question.

The test is the sign test on pairs of games: the two orders of one question and two systems. If place did not matter, a
pair that leans to a place would lean to the first or to the second with equal chance. Pairs that agree say nothing of
place, only of the answers. A test on single games would be too weak: two orders that agree hold one first win and
one second win. Counts without questions have no pairs; there single games are tested, if each order was played as often
as the other.
But: pairs of one question share an answer, so they are not independent, and p is too small when few questions are asked
of many systems.
Not here: how much place weighs beside the strength of the systems (bradley_terry.py).
"""

from dataclasses import dataclass

import numpy as np

from qlora_lab.measure.agreement import FirstWins, position_bias
from qlora_lab.measure.games import UNREAD, Games

LEVEL = 0.01  # of p: a judge is not accused lightly
BROKEN = 0.5  # share of pairs without a common winner: a judge who throws a coin contradicts itself as often


@dataclass(frozen=True)
class Diagnosis:
    """What a judge did. A pair: two answers to one question, read in both orders, both times with a verdict."""

    verdicts: FirstWins
    pairs: int
    contradictions: int  # pairs in which one place won both games
    to_first: int  # pairs that lean to the first place: it won both games, or one beside a tie
    to_second: int
    # Of the two-sided sign test of to_first against to_second; without questions, of first wins against second wins.
    p: float | None  # None if neither can be tested

    @property
    def is_broken(self) -> bool:
        """Whether places explain the verdicts better than answers do."""
        return self.p is not None and self.p < LEVEL and self.contradictions > BROKEN * self.pairs

    def __str__(self) -> str:
        share = self.verdicts.share
        if share is None:
            ties = self.verdicts.ties
            return "every verdict is a tie: this judge tells nothing" if ties else "no verdict could be read"
        decided = self.verdicts.first + self.verdicts.second
        won = f"the first answer won {share:.0%} of {decided:,} decided games"
        if self.p is None:
            return f"{won}; no two answers were read in both orders, so place and strength cannot be told apart"
        if self.pairs:
            turned = f"and {self.contradictions:,} of {self.pairs:,} pairs changed their winner with the order"
        else:
            turned = "with as many games in either order"
        return f"{won}, {turned} (p = {self.p:.2g}): {self._verdict()}"

    def _verdict(self) -> str:
        if self.is_broken:
            return "this judge reads positions, not answers"
        if self.p >= LEVEL:
            return "no liking for a place was seen"
        leans = self.to_first - self.to_second if self.pairs else self.verdicts.first - self.verdicts.second
        return (
            f"this judge favours the {'first' if leans > 0 else 'second'} answer, so only games in both orders are fair"
        )


def diagnose_judge(games: Games) -> Diagnosis:
    """Count what the judge did, in games and in pairs of games.

    >>> diagnose_judge(Games.of([("q", "a", "b", "first"), ("q", "b", "a", "first")])).contradictions
    1
    """
    total = position_bias(games).total
    leaning = _leaning(games)  # (pairs,) in -2..2: first wins minus second wins
    to_first, to_second = int((leaning > 0).sum()), int((leaning < 0).sum())
    p = _sign_test(to_first, to_second) if len(leaning) else None
    if p is None and not games.questions and _is_balanced(games):  # counts: single games must do
        p = _sign_test(total.first, total.second)
    return Diagnosis(total, len(leaning), int((abs(leaning) == 2).sum()), to_first, to_second, p)


def _is_balanced(games: Games) -> bool:
    """Tell whether every two systems met as often in either order, so that strength favours no place."""
    order = games.first * len(games.systems) + games.second
    back = games.second * len(games.systems) + games.first
    return len(games) > 0 and np.array_equal(np.sort(order), np.sort(back))


def _leaning(games: Games) -> np.ndarray:
    """Return first wins minus second wins of each pair that was read in both orders, (pairs,) int64."""
    read = (games.verdicts != UNREAD) & (games.question >= 0)  # counts have no questions, so no pairs
    low = np.minimum(games.first, games.second)[read]
    high = np.maximum(games.first, games.second)[read]
    turned = (games.first > games.second)[read]
    value = np.array([1, -1, 0])[games.verdicts[read]]
    _, pair = np.unique(np.column_stack([games.question[read], low, high]), axis=0, return_inverse=True)
    pair = pair.ravel()
    straight, back = np.bincount(pair, ~turned), np.bincount(pair, turned)  # games in either order
    both = (straight == 1) & (back == 1)  # a pair that was judged several times is left out
    return np.bincount(pair, value).astype(np.int64)[both]


def _sign_test(a: int, b: int) -> float:
    """Return the two-sided p of a heads and b tails of a fair coin."""
    from scipy.special import bdtr  # the binomial distribution's sum; scipy.stats would load for a second

    return min(1.0, 2 * float(bdtr(min(a, b), a + b, 0.5))) if a + b else 1.0
