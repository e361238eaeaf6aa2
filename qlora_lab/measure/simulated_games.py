"""Draw a tournament whose truth is known: to see what ratings and intervals are worth.

    games = simulate({"a": 1100, "b": 1000, "c": 900}, ties=0.2, position=100, questions=80)    -> Games, 480 of them

Each verdict follows the model of bradley_terry.py exactly, so its strengths are the truth that a fit should find. The
verdicts on one question are not independent, though. Each is drawn from a normal number, part of which belongs to the
question: how well each system answered it. It shifts all games of the question, and both orders alike.
"""

from collections.abc import Mapping

import numpy as np
from scipy.special import ndtri

from qlora_lab.measure.games import FIRST, SECOND, TIE, Games
from qlora_lab.quant.numbers import check_seed, check_whole

NATURAL = np.log(10) / 400  # natural units of strength in a point


def simulate(
    strengths: Mapping[str, float],
    *,
    ties: float = 0.2,
    position: float = 0.0,
    questions: int = 80,
    question_effect: float = 0.5,
    seed: int = 0,
) -> Games:
    """Draw both orders of every pair on every question.

    strengths: points on Elo's scale. ties: share of ties between equals where position does not matter, below 1.
    position: points that the first answer gains by its position. question_effect: share of a verdict's variance that
    belongs to its question, 0 (independent games) to 1.
    Raises ValueError for fewer than two systems or one question, and for a share out of its range.
    """
    check_whole("questions", questions)
    check_seed(seed)
    if len(strengths) < 2:
        raise ValueError(f"there are {len(strengths)} strengths, but a tournament needs at least two systems")
    if not (0 <= ties < 1 and 0 <= question_effect <= 1):
        raise ValueError(f"ties={ties}, question_effect={question_effect}: shares lie between 0 and 1, ties below 1")
    draws = np.random.default_rng(seed)
    names, points = tuple(strengths), np.array([float(value) for value in strengths.values()])
    first, second = np.nonzero(~np.eye(len(names), dtype=bool))  # every ordered pair
    d = NATURAL * (points[first] - points[second] + position)
    weights = np.stack([np.exp(d / 2), np.exp(-d / 2), np.full(len(d), 2 * ties / (1 - ties))])  # nu = 2 t / (1 - t)
    chances = weights / weights.sum(axis=0)  # (3, pairs)
    fit = draws.standard_normal((questions, len(names)))  # how well each answer turned out
    own = draws.standard_normal((questions, len(first)))
    # Each number is standard normal, whatever the share, so the chances are those above.
    behind = np.sqrt(question_effect / 2) * (fit[:, first] - fit[:, second]) + np.sqrt(1 - question_effect) * own
    verdicts = np.full(behind.shape, TIE)
    verdicts[behind > ndtri(1 - chances[FIRST])] = FIRST
    verdicts[behind < ndtri(chances[SECOND])] = SECOND
    asked = np.repeat(np.arange(questions), len(first))
    sides = (np.tile(side, questions) for side in (first, second))
    return Games(names, tuple(f"q{number + 1}" for number in range(questions)), asked, *sides, verdicts.ravel())
