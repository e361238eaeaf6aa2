"""The table of a tournament: each system's ratings with what is known of their error, and what the judge did.

In: Games. Out: Standings, best Elo first.
Elo stands beside Bradley-Terry because their errors differ. Elo's is the spread over orders of the same games, which
says how much a single replay is worth; the interval of Bradley-Terry is over other questions, which is what a reader
wants to know. Ranks come from that interval: "could be first to third".
Not here: the ratings themselves (tournament.py, bradley_terry.py).
"""

from dataclasses import dataclass

import numpy as np

from qlora_lab.measure.bradley_terry import BradleyTerry, Estimate, bradley_terry
from qlora_lab.measure.connected import Decided, NoRatingError, check_connected
from qlora_lab.measure.diagnosis import Diagnosis, diagnose_judge
from qlora_lab.measure.games import UNREAD, Games
from qlora_lab.measure.tournament import elo


@dataclass(frozen=True)
class Standing:
    """One system. Ratings in points of Elo's scale."""

    system: str
    elo: float  # mean over orders of the games
    one_order: float  # standard deviation of the rating that one order gives
    rating: Estimate | None  # of Bradley and Terry; None without an answer, infinite for a system that won or lost all
    ranks: tuple[int, int] | None  # best and worst in 95 % of the resamples
    games: int  # unread ones included
    unread: int


@dataclass(frozen=True)
class Standings:
    """The table, and what to know before believing it."""

    rows: tuple[Standing, ...]  # best first
    judge: Diagnosis
    position: Estimate | None  # points that an answer gains by being read first
    over: str | None  # what the intervals are over: "questions", or "games" where there are counts alone
    without_answer: float | None  # share of resamples that rate nobody; they are left out, so intervals are too narrow
    no_rating: str | None  # why Bradley-Terry has no answer


def standings(games: Games, orders: int = 10_000, resamples: int = 1000, *, progress: bool = True) -> Standings:
    """Rate the systems. Raises ValueError if no verdict was read, and for systems that never met, with their groups.

    Unread verdicts are left out of the ratings and counted. Where Bradley-Terry has no finite answer, as for a judge
    that always names the first answer, `no_rating` says why, and Elo stands alone.
    """
    points = elo(games, orders=orders, progress=progress)  # first: it raises where nothing was read
    check_connected(Decided.of(games.where(games.verdicts != UNREAD)), games.systems)
    fitted, reason = _fitted(games, resamples, progress)
    spread = points.deviations
    rows = []
    for system, rating in points.ratings.items():
        number = games.systems.index(system)
        # unread games stay in the count, so that a judge that fails on one system's answers shows
        played = (games.first == number) | (games.second == number)
        unread = int((played & (games.verdicts == UNREAD)).sum())
        found = (fitted.ratings[system], fitted.ranks[system]) if fitted else (None, None)
        rows.append(Standing(system, rating, spread[system], *found, int(np.count_nonzero(played)), unread))
    if fitted is None:  # Elo stands alone: a mean over orders exists for any games
        return Standings(tuple(rows), diagnose_judge(games), None, None, None, reason)
    lost = fitted.without_answer / resamples
    return Standings(tuple(rows), diagnose_judge(games), fitted.position, fitted.over, lost, None)


def _fitted(games: Games, resamples: int, progress: bool) -> tuple[BradleyTerry | None, str | None]:
    """Return the fit and None, or None and why there is no finite one."""
    try:
        return bradley_terry(games, resamples=resamples, progress=progress), None
    except NoRatingError as error:  # of a tournament whose systems all met: nothing the user gave is wrong
        return None, error.reason
