"""Say what judges do besides judging: prefer a position, agree with others or not.

    bias = position_bias(games)                 -> bias.total.share: how many of the decided games the first answer won
    rank_agreement(elo_of_a, elo_of_b)          -> Kendall's tau and Spearman's rho of two tables of ratings
    judge_agreement([games_of_a, games_of_b])   -> Fleiss' kappa of the verdicts

In: games, or ratings by name. Out: counts, shares and coefficients, without a unit.
Sources: M. Kendall, Biometrika 1938 (tau-b); J. Fleiss, Psychological Bulletin 1971. The QLoRA paper, section 5, has
tau 0.43 and rho 0.55 between GPT-4's and people's ranks of systems, and kappa 0.42 among people.
Not here: whether a judge contradicts itself (diagnosis.py), what the first position is worth (bradley_terry.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_lab.measure.games import UNREAD, Games


@dataclass(frozen=True)
class FirstWins:
    """Counted verdicts, by position."""

    first: int
    second: int
    ties: int
    unread: int

    @property
    def share(self) -> float | None:
        """Share of decided games that the first answer won: 0.5 is fair if both orders were played. None: of none."""
        return self.first / (self.first + self.second) if self.first + self.second else None


@dataclass(frozen=True)
class PositionBias:
    """Which position won."""

    # both orders of a pair together: in one order alone, strength and position look the same

    total: FirstWins
    by_pair: dict[tuple[str, str], FirstWins]  # both orders of two systems, in the order of Games.systems


def position_bias(games: Games) -> PositionBias:
    """Count wins by position, over all games and by pair of systems."""
    low, high = np.minimum(games.first, games.second), np.maximum(games.first, games.second)
    by_pair = {}
    for i, j in np.unique(np.column_stack([low, high]), axis=0).tolist():
        by_pair[games.systems[i], games.systems[j]] = _counted(games.verdicts[(low == i) & (high == j)])
    return PositionBias(_counted(games.verdicts), by_pair)


def _counted(verdicts: np.ndarray) -> FirstWins:
    return FirstWins(*np.bincount(verdicts, minlength=4).tolist())


@dataclass(frozen=True)
class RankAgreement:
    """Two coefficients from -1 (opposite orders) to 1 (one order)."""

    kendall: float  # tau-b
    spearman: float  # rho


def rank_agreement(ours: Mapping[str, float], theirs: Mapping[str, float]) -> RankAgreement:
    """Compare two tables of ratings by the order that they give to the systems in both.

    Raises ValueError for fewer than two systems in common, and for a table that gives them all one rating.

    >>> rank_agreement({"a": 3, "b": 2, "c": 1}, {"a": 30, "b": 10, "c": 20}).spearman
    0.5
    """
    from scipy.stats import kendalltau, spearmanr  # here, because scipy.stats alone takes half a second to import

    common = [name for name in ours if name in theirs]
    if len(common) < 2:
        names = f"{', '.join(ours) or 'none'} and {', '.join(theirs) or 'none'}"
        raise ValueError(f"{len(common)} systems are in both tables, but ranks need at least 2: {names}")
    pair = [[table[name] for name in common] for table in (ours, theirs)]
    if any(len(set(values)) == 1 for values in pair):
        raise ValueError(f"one of the tables gives {', '.join(common)} one rating: that is no order")
    tau, rho = kendalltau(*pair).statistic, spearmanr(*pair).statistic
    return RankAgreement(round(float(tau), 12), round(float(rho), 12))  # 0.49999999999999994 is 0.5


def fleiss_kappa(counts: np.ndarray) -> float:
    """Return how far raters agree beyond chance: 1 always, 0 as by chance, below 0 less than that.

    counts: (subjects, categories), how many raters put each subject into each category. Source: Fleiss 1971.
    Raises ValueError for subjects with different numbers of raters, for fewer than two raters, and if all verdicts are
    in one category, so that chance alone agrees always.
    """
    counts = np.asarray(counts, dtype=float)
    raters = counts.sum(axis=1) if counts.ndim == 2 else np.array([])
    if not len(raters) or raters.min() < 2 or np.ptp(raters):
        found = f"{raters.min():g} to {raters.max():g} verdicts" if len(raters) else "none"
        raise ValueError(f"every game needs the verdicts of the same two or more judges: there are {found} a game")
    n = raters[0]
    agreed = ((counts**2).sum(axis=1) - n) / (n * (n - 1))  # of the pairs of raters, subject by subject
    by_chance = ((counts.sum(axis=0) / counts.sum()) ** 2).sum()
    if by_chance == 1:
        raise ValueError("all verdicts are in one category, so agreement beyond chance has no value: judge more games")
    return float((agreed.mean() - by_chance) / (1 - by_chance))


@dataclass(frozen=True)
class JudgeAgreement:
    """How far judges agree on the games that all of them read."""

    kappa: float  # Fleiss'
    games: int  # with a verdict of every judge
    left_out: int  # further games, that some judge did not see or gave no verdict on


def judge_agreement(judges: Sequence[Games]) -> JudgeAgreement:
    """Compare judges on the same question and the same answers in the same order, over first, second and tie.

    Raises ValueError for fewer than two judges, for games without questions, for a game that a judge judged twice, for
    judges without a game in common, and as fleiss_kappa does.
    """
    if len(judges) < 2 or not all(games.questions for games in judges):
        raise ValueError("agreement needs at least two judges, and the question of each game: counts alone have none")
    verdicts = [_named(games) for games in judges]
    everything = {game for one in verdicts for game in one}
    common = [game for game in everything if all(one.get(game, UNREAD) != UNREAD for one in verdicts)]
    if not common:
        raise ValueError("the judges have no game in common: compare verdicts on the same questions and systems")
    table = np.array([[one[game] for one in verdicts] for game in common])
    counts = (table[:, :, None] == np.arange(UNREAD)).sum(axis=1)
    return JudgeAgreement(fleiss_kappa(counts), len(common), len(everything) - len(common))


def _named(games: Games) -> dict[tuple[str, str, str], int]:
    """Return (question, first, second) -> verdict. Raises ValueError for a game that is there twice."""
    arrays = games.question, games.first, games.second, games.verdicts
    found: dict[tuple[str, str, str], int] = {}
    for question, first, second, verdict in zip(*(array.tolist() for array in arrays), strict=True):
        game = games.questions[question], games.systems[first], games.systems[second]
        if game in found:  # which of the two is the judge's word?
            words = f"{game[1]!r} against {game[2]!r} on question {game[0]!r} was judged twice by one judge"
            raise ValueError(f"{words}: keep one verdict")
        found[game] = verdict
    return found
