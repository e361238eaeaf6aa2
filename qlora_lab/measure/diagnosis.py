"""Unmask a judge that reads positions and not answers, from the games alone.

In: Games in which every two answers were read in both orders. Out: a Diagnosis, and what it means in a sentence.
A judge that reads the answers gives the same winner in either order, or a tie. A pair is two answers to one question,
read in both orders. There are two tests, because position can rule without favouring either side: a judge that always
names the first answer on odd questions and the second on even ones favours neither, and changes every winner.

Favour: if position did not matter, a question's pairs would lean to the first answer or to the second with equal
chance. Winners: a coin changes the winner of a pair as often as it keeps it, a judge that reads positions changes it
more often, and one that reads answers keeps it. A pair with a tie neither keeps nor changes a winner, so ties do not
hide a judge that reads positions whenever it decides.
Both are sign tests over questions. Pairs of one question share answers and perhaps a whim of the judge, so as
independent draws they would accuse a fair judge: with 4 systems and 20 questions in 14 % of tournaments (LOG.md).
Counts without questions have no pairs; there single games are tested, if each order was played as often as the other.
Not here: how much position weighs beside the strength of the systems (bradley_terry.py).
"""

from dataclasses import dataclass

import numpy as np

from qlora_lab.measure.agreement import FirstWins, position_bias
from qlora_lab.measure.games import UNREAD, Games

LEVEL = 0.01  # of p: a judge is not accused lightly


@dataclass(frozen=True)
class Diagnosis:
    """What a judge did. A pair: two answers to one question, read once in each order, both times with a verdict."""

    verdicts: FirstWins
    questions: int  # with a pair
    pairs: int
    agreed: int  # pairs with the same winner in both orders, or two ties
    kept: int  # pairs with the same winner in both orders
    contradictions: int  # pairs in which one position won both games
    # Questions whose pairs lean to the first position; without questions, games that the first answer won.
    to_first: int
    to_second: int
    mostly_kept: int  # questions with more winners kept than changed
    mostly_changed: int

    @property
    def p(self) -> float | None:
        """Two-sided p of to_first against to_second. None if position and strength cannot be told apart."""
        # strength does not cancel in games that were read in one order only
        tested = self.pairs or self.to_first or self.to_second
        return _sign_test(self.to_first, self.to_second) if tested else None

    @property
    def p_winners(self) -> float | None:
        """Two-sided p of mostly_changed against mostly_kept. None without pairs."""
        return _sign_test(self.mostly_changed, self.mostly_kept) if self.pairs else None

    @property
    def is_broken(self) -> bool:
        """Whether winners change with the order more often than a coin would change them."""
        return self.pairs > 0 and self.p_winners < LEVEL and self.mostly_changed > self.mostly_kept

    def __str__(self) -> str:
        share = self.verdicts.share
        if share is None:  # no sentence about positions can be true
            ties = self.verdicts.ties
            return "every verdict is a tie: this judge tells nothing" if ties else "no verdict could be read"
        decided = self.verdicts.first + self.verdicts.second
        won = f"the first answer won {share:.0%} of {decided:,} decided games"
        if self.p is None:
            return f"{won}; the two orders were not read equally often, so position and strength cannot be told apart"
        if not self.pairs:
            # p would be right if games were independent draws, but the games of a question are not
            counted = f"with as many games in either order (p = {self.p:.2g} if games were independent)"
            return f"{won}, {counted}: {self._favour() or 'no favoured position was seen'}"
        words, p = self._verdict()
        turned = f"and {self.contradictions:,} of {self.pairs:,} pairs changed their winner with the order"
        return f"{won}, {turned} (p = {p:.2g}): {words}"

    def _verdict(self) -> tuple[str, float]:
        """Say the worst that was shown; where nothing was, say whether anything could have been. With the test's p."""
        if self.is_broken:  # before the favour, which such a judge often shows as well
            return "this judge reads positions, not answers", self.p_winners
        if favour := self._favour():
            return favour, self.p
        if _sign_test(self.questions, 0) >= LEVEL:  # even if they all spoke with one voice
            asked = "1 question is" if self.questions == 1 else f"{self.questions} questions are"
            return f"{asked} too few to tell whether this judge reads positions", min(self.p, self.p_winners)
        if self.p_winners >= LEVEL:
            # also where ties leave few winners: a coin is not refuted then
            return "too few winners were kept to tell this judge from a coin", self.p_winners
        return "no favoured position was seen", self.p

    def _favour(self) -> str | None:
        if self.p >= LEVEL:
            return None
        side = "first" if self.to_first > self.to_second else "second"
        return f"this judge favours the {side} answer, so only games in both orders are fair"


def diagnose_judge(games: Games) -> Diagnosis:
    """Count what the judge did, in games, in pairs of games and in questions.

    A pair is left out if one of its orders was judged several times.

    >>> diagnose_judge(Games.of([("q", "a", "b", "first"), ("q", "b", "a", "first")])).contradictions
    1
    """
    total = position_bias(games).total
    question, leaning, kept = _pairs(games)
    changed = abs(leaning) == 2
    favour = np.bincount(question, leaning)  # (questions,): first wins minus second wins
    # One vote a question: with one vote a pair, a question that all systems find hard would count many times.
    winners = np.bincount(question, kept.astype(int) - changed)
    to_first, to_second = int((favour > 0).sum()), int((favour < 0).sum())
    if not games.questions and _is_balanced(games):  # counts: single games must do
        to_first, to_second = total.first, total.second
    return Diagnosis(
        verdicts=total,
        questions=len(np.unique(question)),
        pairs=len(question),
        agreed=int((leaning == 0).sum()),
        kept=int(kept.sum()),
        contradictions=int(changed.sum()),
        to_first=to_first,
        to_second=to_second,
        mostly_kept=int((winners > 0).sum()),
        mostly_changed=int((winners < 0).sum()),
    )


def _is_balanced(games: Games) -> bool:
    """Tell whether every two systems met as often in either order, so that strength favours no position."""
    order = games.first * len(games.systems) + games.second
    back = games.second * len(games.systems) + games.first
    return len(games) > 0 and np.array_equal(np.sort(order), np.sort(back))


def _pairs(games: Games) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each pair, (pairs,): question, first wins minus second wins (-2 to 2), whether one answer won both.

    Of a pair, each order was judged exactly once.
    """
    read = (games.verdicts != UNREAD) & (games.question >= 0)  # counts have no questions, so no pairs
    low = np.minimum(games.first, games.second)[read]
    high = np.maximum(games.first, games.second)[read]
    turned = (games.first > games.second)[read]
    value = np.array([1, -1, 0])[games.verdicts[read]]
    asked = games.question[read]
    rows, pair = np.unique(np.column_stack([asked, low, high]), axis=0, return_inverse=True)
    pair = pair.ravel()
    straight, back = np.bincount(pair, ~turned), np.bincount(pair, turned)  # games in either order
    both = (straight == 1) & (back == 1)  # of several verdicts on one game, none is the judge's last word
    leaning = np.bincount(pair, value).astype(np.int64)
    # Seen from one answer, turned games count the other way round: 2 or -2 is a winner of both.
    won = np.bincount(pair, np.where(turned, -value, value))
    return rows[both, 0], leaning[both], (abs(won) == 2)[both]


def _sign_test(a: int, b: int) -> float:
    """Return the two-sided p of a heads and b tails of a fair coin."""
    from scipy.special import bdtr  # the binomial distribution's sum; scipy.stats would load for a second

    return min(1.0, 2 * float(bdtr(min(a, b), a + b, 0.5))) if a + b else 1.0
