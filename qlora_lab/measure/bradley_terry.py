"""Rate the systems of a tournament by a model of the judge: strengths, ties, and the advantage of being read first.

    result = bradley_terry(games)        -> BradleyTerry: points on Elo's scale, each with a 95 % interval
    result.ratings["gpt-4"]              -> Estimate(value=1494.0, low=1456.5, high=1535.0), over games
    result.position                      -> Estimate of the points that the first answer gains by its position alone

For systems of strengths s, a game of i (read first) against j has d = s_i - s_j + position, and its verdicts have
    P(first) : P(second) : P(tie) = e^(d/2) : e^(-d/2) : nu
Sources: Bradley and Terry, 1952; nu: R. Davidson, JASA 1970; position: Davidson and Beaver, Biometrics 1977. Points
are 400 / ln 10 times the natural unit, and their mean is 1000. As in Elo, 400 points are odds of 10 to 1: here among
the games that are decided, with the advantage of the position taken out.
The likelihood is concave: scipy.optimize finds its only maximum, whatever the order of the games.
Intervals come from resampled questions, or from resampled games where there are counts alone. Games of one question
are not independent draws: a question that suits a system suits it in all its games, in both orders. So intervals over
games are too narrow, as are the ranges of ranks: by a factor of two on the authors' judgments (LOG.md).
Not here: which systems met, and whether a maximum exists (connected.py).
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, stdtrit

from qlora_lab.measure.connected import (
    Decided,
    NoRatingError,
    check_connected,
    check_maximum,
    set_aside,
    without_exception,
)
from qlora_lab.measure.games import TIE, UNREAD, Games
from qlora_lab.measure.tournament import Rules, rank_ranges
from qlora_lab.quant.numbers import check_seed, check_whole

POINTS = 400 / np.log(10)  # points in one natural unit of strength
MEAN = 1000.0  # of the ratings
TOGETHER = 100  # resamples that are solved at once: 30 systems then take 70 MB
STEPS = 40  # of Newton's method for a resample; near the estimate it takes five
LONGEST = 1.0  # natural units, of one step: far from the maximum a full step overshoots
FLAT = 1e-7  # curvature per game, below which a resample says nothing in some direction


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval. An infinite end is open: the games allow any larger (or smaller) value."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BradleyTerry:
    """Ratings with intervals. Points of Elo's scale."""

    ratings: dict[str, Estimate]  # best first. Infinite for a system in `always`
    ranks: dict[str, tuple[int, int]]  # best and worst rank in 95 % of the resamples, in the same order
    position: Estimate | None  # the advantage of the first answer, in points; None if it was ignored
    ties: Estimate  # share of ties between equal systems if no position has an advantage, 0 to 1
    always: dict[str, str]  # system -> "won" or "lost" every game: it has no finite rating, and the others have theirs
    over: str  # "questions", or "games" where there are counts alone
    without_answer: int  # resamples that rate nobody and are left out. Above a few percent, intervals are too narrow


def bradley_terry(
    games: Games,
    *,
    position: bool = True,
    unread: str = "left out",
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> BradleyTerry:
    """Fit strengths, ties and (unless position=False) the advantage of the first answer; resample for intervals.

    unread: "left out", or "tie". resamples: of questions with replacement; where the games have counts alone, of games
    within each ordered pair, which is narrower than it should be.
    A system that won (or lost) every game has no finite rating: it is named, and the others are rated without it. So it
    is in a resample: there it counts as infinite, and the others keep the mean that they have in the estimate. If that
    happens often enough, the interval of the system has an open end.
    Raises NoRatingError, a ValueError, for systems that never met (it names the groups), for games that any larger
    strength, position or number of ties would fit still better, and for a single question; ValueError for fewer than
    two resamples.
    """
    Rules(unread=unread)  # checks the word
    check_whole("resamples", resamples, 2)  # an interval has two ends
    check_seed(seed)
    kept = games if unread == "tie" else games.where(games.verdicts != UNREAD)
    asked = len(np.unique(kept.question))
    if games.questions and asked == 1:
        raise NoRatingError("an interval over questions needs two with a verdict, but there is one", "ask more")
    decided = Decided.of(kept)
    check_connected(decided, games.systems)
    rated, always = without_exception(decided, games.systems)
    drawn = _resampled(kept, rated, resamples, np.random.default_rng(seed))
    table = _fitted(rated, drawn, always, games.systems, position, progress)
    answered = ~np.isnan(table[1:, 0])  # in a row either all systems have points or none
    if answered.sum() < 2:
        raise NoRatingError(f"{resamples} resamples gave no interval", "ask more questions, or play more games")
    points, (advantage, nu) = table[:, :-2], table[:, -2:].T
    order = np.argsort(-points[0], kind="stable")
    # games are hundreds, for which Student's tails are the normal's
    tail = _tail(asked) if games.questions else 0.025
    ranks = rank_ranges(points[1:][answered], 1 - 2 * tail)
    return BradleyTerry(
        ratings={games.systems[i]: _estimate(points[:, i], tail) for i in order},
        ranks={games.systems[i]: ranks[i] for i in order},
        position=_estimate(advantage, tail) if position else None,
        ties=_estimate(nu / (2 + nu), tail),
        always=always,
        over="questions" if games.questions else "games",
        without_answer=int((~answered).sum()),
    )


OUT = 1e9  # points: stands for infinity while ranks are taken, since two infinite ratings may have an order


def _fitted(
    rated: Decided, drawn: np.ndarray, always: dict[str, str], names: tuple[str, ...], position: bool, progress: bool
) -> np.ndarray:
    """Return the estimate, then the resamples, as rows of _columns. drawn: (resamples, pairs, 3)."""
    from tqdm.auto import tqdm

    model = _Model.of(rated, position)
    check_maximum(rated, model.utilities, [*(names[i] for i in rated.systems)], position)
    found = model.fit(rated.counts)
    parts = np.array_split(drawn, -(-len(drawn) // TOGETHER))
    bar = tqdm(parts, "resamples", unit="part", leave=False, delay=2, disable=not progress)
    solved = np.concatenate([model.refit(part, found) for part in bar])
    table = _columns(model, np.vstack([found, solved]), rated, always, names)
    # In most of those without an answer one system won all: to leave them out would cut off its upper end.
    lost = np.flatnonzero(np.isnan(solved).any(axis=1))
    table[1 + lost] = _without_some(drawn[lost], rated, always, table[0], names, position)
    return table


def _columns(
    model: "_Model",
    parameters: np.ndarray,
    rated: Decided,
    always: dict[str, str],
    names: tuple[str, ...],
    mean: float = MEAN,
) -> np.ndarray:
    """Turn parameters into points of all systems, points of the position, and nu: (n, systems + 2), NaN for no answer.

    mean: of the points of the rated systems.
    """
    table = np.full((len(parameters), len(names) + 2), np.nan)
    # NaN parameters make NaN points; the infinite ones are set for rows with an answer alone, or they would hide it
    table[:, rated.systems] = mean + POINTS * model.strengths(parameters)
    answered = np.isfinite(parameters).all(axis=1)
    table[np.ix_(answered, [names.index(name) for name in always])] = _out(always)
    if model.position:
        table[:, -2] = POINTS * model.position_of(parameters)
    table[:, -1] = np.where(answered, model.nu(parameters), np.nan)
    return table


def _out(always: dict[str, str]) -> list[float]:
    """Return what stands for infinite points; the first that was set aside is the farthest out."""
    return [OUT - number if what == "won" else number - OUT for number, what in enumerate(always.values())]


def _without_some(
    counts: np.ndarray,
    rated: Decided,
    always: dict[str, str],
    estimate: np.ndarray,
    names: tuple[str, ...],
    position: bool,
) -> np.ndarray:
    """Rate resamples, (n, pairs, 3), without the systems that won or lost all in them. Returns rows as _columns does.

    A resample without ties has an answer, too: nu is 0.
    """
    alike: dict[tuple, list[tuple[int, Decided]]] = {}  # those that the same model fits are solved together
    for number, one in enumerate(counts):
        # one at a time: who is set aside depends on who was before
        rest, more = set_aside(replace(rated, counts=one), names)
        alike.setdefault((tuple(more.items()), bool(rest.counts[:, TIE].any())), []).append((number, rest))
    table = np.full((len(counts), len(names) + 2), np.nan)
    for (more, _), members in alike.items():
        here, rest = [number for number, _ in members], members[0][1]
        everyone = always | dict(more)
        if len(rest.systems) == 1:
            # The last one lost to all, or beat them: it is at the other end, and position and ties stay unknown.
            everyone[names[rest.systems[0]]] = "lost" if more[-1][1] == "won" else "won"
            table[np.ix_(here, [names.index(name) for name in everyone])] = _out(everyone)
            continue
        model = _Model.of(rest, position)
        solved = model.refit(np.stack([one.counts for _, one in members]), np.zeros(model.utilities.shape[2]))
        # Beside an infinite rating a common mean has no meaning, so the others stay where the estimate has them.
        # With a mean of 1000 they would move by 200 points in the tests' example, and no game of theirs has changed.
        table[here] = _columns(model, solved, rest, everyone, names, estimate[list(rest.systems)].mean())
    return table


def _tail(questions: int) -> float:
    """Return the share of resamples to leave out at each end of an interval: 0.025 for many questions, less for few.

    Resamples of n questions vary less than n new questions would, by (n - 1) / n, and a normal's tails are thinner than
    Student's. Source: T. Hesterberg, What Teachers Should Know About the Bootstrap, 2015, "expanded percentile".
    """
    return float(ndtr(-np.sqrt(questions / (questions - 1)) * stdtrit(questions - 1, 0.975)))


def _estimate(values: np.ndarray, tail: float) -> Estimate:
    """The first value, and the others but for a share of `tail` at each end. NaN: a resample that says nothing."""
    found = values[1:][~np.isnan(values[1:])]
    if not len(found):  # no resample says anything of position or ties, so any value fits
        return Estimate(float(values[0]), -np.inf, np.inf)
    # Between a number and infinity nothing can be interpolated, so the end is the outer one.
    methods = ("lower", "higher") if abs(found).max() > OUT / 2 else ("linear", "linear")
    ends = [np.quantile(found, share, method=how) for share, how in zip((tail, 1 - tail), methods, strict=True)]
    return Estimate(*(float(np.copysign(np.inf, one) if abs(one) > OUT / 2 else one) for one in (values[0], *ends)))


def _resampled(kept: Games, rated: Decided, resamples: int, draws: np.random.Generator) -> np.ndarray:
    """Draw counts of verdicts, (resamples, pairs, 3), in the order of rated.counts."""
    if not kept.questions:
        totals = rated.counts.sum(axis=1)
        shares = rated.counts / totals[:, None]
        return draws.multinomial(totals.astype(np.int64), shares, size=(resamples, len(totals))).astype(float)
    by_question = rated.by_question(kept)  # (questions, pairs, 3)
    questions = len(by_question)
    # A question that was drawn twice counts twice, with all its games.
    times = draws.multinomial(questions, np.full(questions, 1 / questions), size=resamples)
    flat = times.astype(float) @ by_question.reshape(questions, -1)
    return flat.reshape(resamples, *by_question.shape[1:])


@dataclass(frozen=True)
class _Model:
    """The three utilities of a game, linear in the parameters: strengths but one, position, log nu."""

    utilities: np.ndarray  # (pairs, outcomes, parameters): of a first win, a second win and, if there are any, a tie
    basis: np.ndarray  # (systems, systems - 1): strengths that sum to zero
    position: bool

    @classmethod
    def of(cls, rated: Decided, position: bool) -> "_Model":
        systems, pairs = len(rated.systems), len(rated.counts)
        # The last strength is minus the sum of the others. Without such a rule all could rise together.
        basis = np.vstack([np.eye(systems - 1), -np.ones(systems - 1)])
        difference = basis[rated.first] - basis[rated.second]
        if position:
            difference = np.column_stack([difference, np.ones(pairs)])
        half = difference / 2
        if not rated.counts[:, TIE].any():  # no tie: nu is 0 and has no logarithm
            return cls(np.stack([half, -half], axis=1), basis, position)
        utilities = np.zeros((pairs, 3, half.shape[1] + 1))
        utilities[:, 0, :-1], utilities[:, 1, :-1], utilities[:, 2, -1] = half, -half, 1
        return cls(utilities, basis, position)

    def fit(self, counts: np.ndarray) -> np.ndarray:
        """Return the parameters at the maximum of the likelihood, by scipy.optimize with gradient and Hessian."""
        from scipy.optimize import minimize

        counts = counts[:, : self.utilities.shape[1]]
        games = counts.sum()

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:  # nats per game
            chosen = self.utilities @ parameters
            highest = chosen.max(axis=1, keepdims=True)
            log_total = highest + np.log(np.exp(chosen - highest).sum(axis=1, keepdims=True))
            gradient, _ = self._slopes(counts[None], parameters[None])
            return -(counts * (chosen - log_total)).sum() / games, -gradient[0] / games

        def hessian(parameters: np.ndarray) -> np.ndarray:
            return self._slopes(counts[None], parameters[None])[1][0] / games

        start = np.zeros(self.utilities.shape[2])
        result = minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-10})
        return result.x

    def refit(self, counts: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Return the parameters of many tournaments, (n, parameters), from counts (n, pairs, 3); NaN without an answer.

        Newton's method for all at once. A thousand calls of scipy.optimize would cost more than all else.
        """
        counts = counts[:, :, : self.utilities.shape[1]]
        solved = np.tile(start, (len(counts), 1))
        small = 1e-12 * np.eye(len(start))  # keeps a flat direction from dividing by zero; _answered then refuses it
        for _ in range(STEPS):
            gradient, curvature = self._slopes(counts, solved)
            step = np.linalg.solve(curvature + small, gradient[:, :, None])[:, :, 0]
            longest = np.abs(step).max(axis=1, keepdims=True)
            solved += step * np.minimum(1, LONGEST / np.maximum(longest, 1e-300))
            if (longest < 1e-9).all():
                break
        # A resample without a finite maximum runs away, or its likelihood is flat.
        flat = np.linalg.eigvalsh(curvature)[:, 0] < FLAT * np.maximum(counts.sum(axis=(1, 2)), 1)
        solved[flat | (longest[:, 0] > 1e-6)] = np.nan
        return solved

    def _slopes(self, counts: np.ndarray, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return gradient (n, k) and negative Hessian (n, k, k) of the log-likelihood. counts: (n, pairs, outcomes)."""
        pairs, outcomes, k = self.utilities.shape
        flat = self.utilities.reshape(pairs * outcomes, k)
        chosen = (parameters @ flat.T).reshape(-1, pairs, outcomes)
        chances = np.exp(chosen - chosen.max(axis=2, keepdims=True))
        chances /= chances.sum(axis=2, keepdims=True)
        totals = counts.sum(axis=2, keepdims=True)
        expected = totals * chances
        gradient = (counts - expected).reshape(-1, pairs * outcomes) @ flat
        # The variance of the utilities under the model: the mean of their squares less the square of their mean.
        squares = (flat[:, :, None] * flat[:, None, :]).reshape(-1, k * k)
        curvature = (expected.reshape(-1, pairs * outcomes) @ squares).reshape(-1, k, k)
        means = np.einsum("npo,pok->npk", chances, self.utilities) * np.sqrt(totals)
        return gradient, curvature - means.transpose(0, 2, 1) @ means

    def strengths(self, parameters: np.ndarray) -> np.ndarray:
        """(n, systems), natural units, sum 0."""
        return parameters[:, : self.basis.shape[1]] @ self.basis.T

    def position_of(self, parameters: np.ndarray) -> np.ndarray:
        """(n,), natural units."""
        return parameters[:, self.basis.shape[1]]

    def nu(self, parameters: np.ndarray) -> np.ndarray:
        """(n,): the weight of a tie, 0 if there is none."""
        ties = self.utilities.shape[1] == 3
        return np.exp(parameters[:, -1]) if ties else np.zeros(len(parameters))
