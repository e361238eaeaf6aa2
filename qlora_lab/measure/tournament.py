"""Rate the systems of a tournament by Elo, in thousands of random orders of its games.

    result = elo(games)                        -> Elo: 10,000 orders, start 1000, K = 32, as the QLoRA paper plays them
    result.ratings                             -> {"gpt-4": 1375.6, ...}, the mean over orders, best first
    result.deviations["gpt-4"]                 -> 39.8, the standard deviation of one order's rating

After each game, the winner takes k (1 - p) points from the loser, where p = 1 / (1 + 10^((r_loser - r_winner) / 400))
is the chance of winning that the ratings gave it (A. Elo, 1978). A tie is half a win. Later games weigh more than
earlier ones, so a rating depends on an order that means nothing here: a judge did not learn from game to game.
Source: QLoRA, section 5 (arXiv 2305.14314), which prints the mean over 10,000 orders. It does not say how
verdicts that cannot be read count, or the two orders of the same answers. Here Rules says so.
Not here: ratings that need no order, with intervals (bradley_terry.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qlora_lab.measure.games import UNREAD, Games
from qlora_lab.quant.numbers import check_number, check_seed, check_whole

AS_UNREAD = ("left out", "tie")
BOTH_ORDERS = ("apart", "mean", "tie if they differ")
SHUFFLED = 2**23  # games that are shuffled at a time: 8 MB for up to 256 kinds of games, so memory stays small


@dataclass(frozen=True)
class Rules:
    """What turns verdicts into ratings. Raises ValueError for a word or number that is not allowed."""

    start: float = 1000.0  # points of every system before its first game; the paper's
    k: float = 32.0  # the most points that one game can move; the paper's
    unread: str = "left out"  # a verdict that could not be read; or "tie": it counts as one
    # "apart": two answers read in both orders are two games. "mean": one game with the mean of both scores.
    # "tie if they differ": one game, a tie unless every verdict on the two answers says the same; a pair of which one
    # order alone has a verdict counts as that order says. The last two need questions.
    both_orders: str = "apart"

    def __post_init__(self) -> None:
        _check("unread", self.unread, AS_UNREAD)
        _check("both_orders", self.both_orders, BOTH_ORDERS)
        # Their kind, too: True would count as 1, and a text would fail far from here, in NumPy's words.
        check_number("k", self.k, lambda k: 0 < k < np.inf, "a finite number above 0")
        check_number("start", self.start, np.isfinite, "a finite number")


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Scores:
    """Games that are ready to be rated, as arrays of shape (n,)."""

    first: np.ndarray  # int64, indices into the systems
    second: np.ndarray
    score: np.ndarray  # float64, of the first system: 1 for a win, 0.5 for a tie, 0 for a loss


@dataclass(frozen=True)
class Elo:
    """Ratings over many orders of the same games."""

    systems: tuple[str, ...]
    by_order: np.ndarray  # (orders, systems) float64, points: the ratings after the last game of each order

    @property
    def ratings(self) -> dict[str, float]:
        """The mean rating over orders, in points, best first."""
        means = dict(zip(self.systems, self.by_order.mean(axis=0).tolist(), strict=True))
        return dict(sorted(means.items(), key=lambda item: -item[1]))

    @property
    def deviations(self) -> dict[str, float]:
        """The standard deviation of one order's rating, in points; 0 for a single order. Best system first."""
        spread = dict(zip(self.systems, self.by_order.std(axis=0).tolist(), strict=True))
        return {name: spread[name] for name in self.ratings}


def elo(games: Games, rules: Rules | None = None, orders: int = 10_000, *, seed: int = 0, progress: bool = True) -> Elo:
    """Rate the systems in `orders` random orders of the games.

    All orders advance together, one game at a time: a row of numpy work for each game in place of a loop for each
    order. The result does not depend on how many are shuffled at a time. Readable twin:
    elo_of_one_order, equal but for the rounding of a power, which is numpy's here and Python's there.
    rules: None for Rules().
    Raises ValueError for no game that can be rated, for orders that are no whole number of at least 1, for a seed that
    is negative or not whole, and as scores does.
    """
    from tqdm.auto import tqdm

    rules = rules or Rules()
    check_whole("orders", orders)
    check_seed(seed)
    played = scores(games, rules)
    first, second, score, kinds = _kinds(played)
    draws = np.random.default_rng(seed)
    chunk = max(1, SHUFFLED // len(kinds))
    by_order = np.empty((orders, len(games.systems)))
    with tqdm(total=orders, desc="Elo", unit="order", leave=False, delay=2, disable=not progress) as bar:
        for begin in range(0, orders, chunk):
            count = min(chunk, orders - begin)
            shuffled = draws.permuted(np.tile(kinds, (count, 1)), axis=1)  # (count, games)
            part = slice(begin, begin + count)
            by_order[part] = _play(np.ascontiguousarray(shuffled.T), first, second, score, len(games.systems), rules)
            bar.update(count)
    return Elo(games.systems, by_order)


def elo_of_one_order(played: Scores, order: Iterable[int], systems: int, rules: Rules) -> list[float]:
    """Rate the games in one order, game by game: the readable twin of `elo`. Returns one rating a system, in points."""
    ratings = [rules.start] * systems
    for game in order:
        first, second = played.first[game], played.second[game]
        expected = 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400))
        points = rules.k * (played.score[game] - expected)
        ratings[first] += points
        ratings[second] -= points  # what one gains the other loses, so the mean stays at the start
    return [float(rating) for rating in ratings]


def _kinds(played: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return first, second and score of each kind of game, and the kind of each game, as small an integer as does.

    4,480 games of eight systems have 168 kinds. A shuffle of bytes moves an eighth of what one of numbers does, and the
    tables stay in the fastest cache.
    """
    table, kinds = np.unique(np.column_stack([played.first, played.second, played.score]), axis=0, return_inverse=True)
    first, second = table[:, :2].astype(np.int64).T
    return first, second, table[:, 2], kinds.ravel().astype(np.min_scalar_type(len(table)))


def _play(
    rows: np.ndarray, first: np.ndarray, second: np.ndarray, score: np.ndarray, systems: int, rules: Rules
) -> np.ndarray:
    """Play the orders in the columns of `rows`, (games, orders). Returns ratings of shape (orders, systems)."""
    orders = rows.shape[1]
    ratings = np.full(systems * orders, rules.start)  # flat: one index a rating is faster than two
    column = np.arange(orders)
    for row in rows:
        ours, theirs = first[row] * orders + column, second[row] * orders + column
        before, other = ratings[ours], ratings[theirs]
        points = rules.k * (score[row] - 1 / (1 + 10 ** ((other - before) / 400)))
        ratings[ours] = before + points  # no two entries of a row are the same rating: each order has a column
        ratings[theirs] = other - points
    return ratings.reshape(systems, orders).T


def scores(games: Games, rules: Rules) -> Scores:
    """Return the games as scores, with unread verdicts and the two orders treated as `rules` says.

    Raises ValueError if nothing is left, and for games without questions where rules.both_orders needs them.
    """
    kept = games if rules.unread == "tie" else games.where(games.verdicts != UNREAD)
    if not len(kept):
        raise ValueError(f"no game can be rated: of {len(games)} verdicts, {games.unread} could not be read")
    value = np.array([1.0, 0.0, 0.5, 0.5])[kept.verdicts]  # in the order of VERDICTS
    if rules.both_orders == "apart":
        return Scores(kept.first, kept.second, value)
    if not games.questions:
        words = f"both_orders={rules.both_orders!r} needs the question of each game, but these games are counts alone"
        raise ValueError(f"{words}: read the judgments themselves, or use both_orders='apart'")
    turned = kept.first > kept.second  # bring every pair into one direction
    low, high = np.where(turned, kept.second, kept.first), np.where(turned, kept.first, kept.second)
    value = np.where(turned, 1 - value, value)
    # a pair counts once however often it was read, or repeated verdicts would weigh more
    pairs, group = np.unique(np.column_stack([kept.question, low, high]), axis=0, return_inverse=True)
    group = group.ravel()
    mean = np.bincount(group, value) / np.bincount(group)
    if rules.both_orders == "tie if they differ":
        # if all scores of a group are one, their mean is that score: 0, 0.5 or 1, exactly
        spread = np.bincount(group, np.abs(value - mean[group]))
        mean = np.where(spread > 0, 0.5, mean)
    return Scores(pairs[:, 1], pairs[:, 2], mean)


def rank_ranges(samples: np.ndarray, share: float = 0.95) -> list[tuple[int, int]]:
    """Return, for each system, the ranks from best to worst that it has in the middle `share` of the samples.

    samples: (samples, systems), such as Elo.by_order. Rank 1 is the best; systems with equal points share the better
    rank. Raises ValueError for a share that is not between 0 and 1, and for no samples.

    >>> rank_ranges(np.array([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0]]))
    [(1, 2), (1, 2), (3, 3)]
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, but it must be above 0 and at most 1")
    if samples.ndim != 2 or not len(samples):
        # A quantile of nothing would be an IndexError from inside NumPy.
        raise ValueError(f"samples have the shape {samples.shape}: give (samples, systems), with at least one sample")
    above = samples[:, None, :] > samples[:, :, None]
    ranks = 1 + above.sum(axis=2)  # (samples, systems)
    tail = (1 - share) / 2
    # no rank lies between two whole numbers: the range takes the outer one
    low, high = np.quantile(ranks, tail, axis=0, method="lower"), np.quantile(ranks, 1 - tail, axis=0, method="higher")
    return [(int(best), int(worst)) for best, worst in zip(low, high, strict=True)]
