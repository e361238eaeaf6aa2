"""Accuracy with its interval, and the difference between two models that answered the same questions.

In: rows of choice_rows.py, with the log-likelihoods of each question's answers. Out: accuracies by subject, by category
of MMLU, over all questions and over subjects. The last two differ where subjects have different numbers of questions:
MMLU's own evaluation prints the mean over questions, QLoRA's qlora.py the mean over subjects.

Intervals hold the truth in 95 % of samples of questions. That of an accuracy is Wilson's (1927), which stays inside
[0, 1] and has a width even if all answers are right. That of a difference is of the McNemar kind, Wald's interval of a
paired difference with half a question added to each of the four cells (A. Agresti and Y. Min, Statistics in Medicine
24, 2005): only questions that one model answers right and the other wrong count. A bootstrap over questions gives the
same for many of them; but where two models never differ it says "exactly 0", which a few questions cannot show.
Not here: the log-likelihoods (multiple_choice.py).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean

from qlora_lab.data.choice_files import LETTERS
from qlora_lab.measure.ablations import Interval
from qlora_lab.measure.published import read_data

Z = NormalDist().inv_cdf(0.975)  # 1.96: 2.5 % lie beyond either end
# How an answer is chosen: by the sum of its log-likelihoods, or by that sum per character or byte.
METRICS = ("acc", "acc_norm", "acc_bytes")  # lm-evaluation-harness' names


@dataclass(frozen=True)
class Accuracies:
    """Shares of right answers of one model, each with its 95 % interval and its number of questions (or subjects)."""

    over_questions: Interval
    over_subjects: Interval  # the mean of `subjects`
    subjects: dict[str, Interval]
    categories: dict[str, Interval]  # MMLU's four; those without a subject are left out


def right(row: dict, metric: str = "acc") -> list[bool]:
    """Return whether each question of a row was answered right. Of equal answers the first counts, as in the harness.

    Raises ValueError for another metric, and for one that needs the texts' lengths in a row of letters.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is not known: choose from {', '.join(METRICS)}")
    sizes = row["lengths"] and row["lengths"].get(metric)
    if metric != "acc" and sizes is None:
        raise ValueError(f"{metric} needs answers of different lengths, but these are letters: take acc")
    # log p / n is a mean per unit: a longer answer is no longer less likely only because it is longer.
    chosen = []
    for i, values in enumerate(row["log_likelihoods"]):
        weighed = values if metric == "acc" else [v / n for v, n in zip(values, sizes[i], strict=True)]
        chosen.append(max(range(len(weighed)), key=weighed.__getitem__))  # the first of several
    return [LETTERS[i] == letter for i, letter in zip(chosen, row["right"], strict=True)]


def accuracies(row: dict, metric: str = "acc") -> Accuracies:
    """Return the accuracies of a row. Raises what right raises."""
    answered = right(row, metric)
    by_subject: dict[str, list[bool]] = {}
    # A row names each subject once: for 14,042 questions, names would fill a quarter of a megabyte.
    start = 0
    for subject, number in row["subjects"].items():  # in the order of the questions
        by_subject[subject] = answered[start : start + number]
        start += number
    categories: dict[str, list[bool]] = {}
    for subject, part in by_subject.items():
        if category := category_of(subject):
            categories.setdefault(category, []).extend(part)
    return Accuracies(
        wilson(sum(answered), len(answered)),
        mean_over_subjects([(sum(part), len(part)) for part in by_subject.values()]),
        {subject: wilson(sum(part), len(part)) for subject, part in by_subject.items()},
        {category: wilson(sum(part), len(part)) for category, part in categories.items()},
    )


@cache
def mmlu_categories() -> dict[str, str]:
    """Return subject -> category for the 57 subjects of MMLU."""
    categories = read_data("mmlu_subjects.json")["categories"]
    return {subject: category for category, subjects in categories.items() for subject in subjects}


def category_of(subject: str) -> str | None:
    """Return the category of a subject of MMLU, with spaces or underscores; None for any other subject.

    >>> category_of("anatomy")
    'other (business, health, misc.)'
    """
    return mmlu_categories().get(subject.replace(" ", "_"))


def wilson(successes: int, trials: int) -> Interval:
    """Return a share and Wilson's 95 % interval. Raises ValueError for no trials.

    >>> share = wilson(130, 500)
    >>> f"{share.mean:.3f} ({share.low:.3f} to {share.high:.3f})"
    '0.260 (0.223 to 0.300)'
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials} is not a share: give at least one question, and no more right ones")
    # The two shares p with |share - p| = Z sqrt(p (1 - p) / trials): a quadratic equation, solved.
    share = successes / trials
    spread = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    centre = share + Z**2 / (2 * trials)
    low = (centre - spread) / (1 + Z**2 / trials)
    high = (centre + spread) / (1 + Z**2 / trials)
    return Interval(share, max(0.0, low) if successes else 0.0, min(1.0, high) if successes < trials else 1.0, trials)


def mean_over_subjects(counts: Sequence[tuple[int, int]]) -> Interval:
    """Return the mean of the subjects' accuracies, from (right, questions) of each, and its 95 % interval.

    The subjects are fixed and their questions a sample. The variance of each share is taken at Wilson's centre, so that
    a subject whose answers are all right does not count as certain. Raises ValueError for no subjects, or an empty one.
    """
    if not counts:
        raise ValueError("a mean over subjects needs at least one subject")
    variance = 0.0
    for successes, trials in counts:
        if trials < 1:
            raise ValueError("a subject has no questions: leave it out of the mean")
        share = (successes + Z**2 / 2) / (trials + Z**2)
        # By the questions there are: Wilson's trials + Z^2 would make 57 intervals of 5 questions 0.75 times as wide.
        variance += share * (1 - share) / trials
    mean = fmean(successes / trials for successes, trials in counts)
    half = Z * math.sqrt(variance) / len(counts)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half), len(counts))


def paired_difference(first: Iterable[bool], second: Iterable[bool]) -> Interval:
    """Return the accuracy of `second` minus that of `first` on the same questions, and its 95 % interval.

    Raises ValueError for different numbers of questions, or none.

    >>> gained = paired_difference([True] * 60 + [False] * 40, [True] * 55 + [False] * 5 + [True] * 12 + [False] * 28)
    >>> f"{gained.mean:+.2f} ({gained.low:+.2f} to {gained.high:+.2f})"
    '+0.07 (-0.01 to +0.15)'
    """
    first = list(first)
    second = list(second)
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers cannot be paired: give those to the same questions")
    # Questions that both have right, or both wrong, say nothing of the difference.
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    n = len(first) + 2  # half a question more in each cell: both right, both wrong, lost, gained
    difference = (gained - lost) / n
    half = Z * math.sqrt((gained + lost + 1) / n - difference**2) / math.sqrt(n)
    # No difference of two shares lies beyond -1 and 1.
    return Interval((gained - lost) / len(first), max(-1.0, difference - half), min(1.0, difference + half), len(first))


def difference(row: dict, reference: dict, metric: str = "acc") -> Interval:
    """Return the accuracy of a row minus that of the reference. Raises ValueError if they answered other questions."""
    if row["data"]["tokens_sha256"] != reference["data"]["tokens_sha256"]:
        raise ValueError("the two rows answered other questions, or read other prompts: measure both again")
    return paired_difference(right(reference, metric), right(row, metric))


def figures(row: dict, reference: dict | None, digits: int = 6) -> dict:
    """Return what a command or a bench prints of a row, by metric; an interval is [share, low, high], rounded.

    reference: the row that it is compared with; None: it is the reference itself. Raises what difference raises.
    """

    def numbers(interval: Interval) -> list[float]:
        return [round(number, digits) for number in (interval.mean, interval.low, interval.high)]

    # One home for the command and the bench, so that a page and a terminal never differ.
    found = {}
    for metric in METRICS if row["lengths"] else METRICS[:1]:  # letters are equally long
        shares = accuracies(row, metric)
        found[metric] = {
            "over_questions": numbers(shares.over_questions),
            "over_subjects": numbers(shares.over_subjects),
            "subjects": {name: numbers(share) for name, share in shares.subjects.items()},
            "categories": {name: numbers(share) for name, share in shares.categories.items()},
            "difference": None if reference is None else numbers(difference(row, reference, metric)),
        }
    return found
