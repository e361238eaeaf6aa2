"""The hints for the exercises of notebook 12, in the form that hints.py describes."""

import math

WITHOUT = {
    "my_elo": ("measure.tournament.elo_of_one_order", "measure.tournament.elo", "measure.replay.win_rate"),
    "my_percent": ("measure.replay.relative_score",),
    "my_errata": ("measure.replay.replay_results",),
}


def my_elo(results, systems):
    """Write down the ratings after each game by hand: the chance, what the first system gains, both new ratings."""
    rated = lambda gain, second="loses": _elo(results, systems, gain, second)  # noqa: E731
    right = lambda score, own, other: 32 * (score - _chance(own, other))  # noqa: E731
    # a mistake in the gain: in the chance, in its place, in its size
    yield (
        rated(lambda score, own, other: 32 * (score - 1 / (1 + math.exp((other - own) / 400)))),
        "Your chance has the right form. Which number does the formula raise to a power?",
    )
    yield (
        rated(lambda score, own, other: right(score, other, own)),
        "By your formula the stronger system is expected to lose. Whose rating comes first?",
    )
    yield (
        rated(lambda score, own, other: right(score, 400 * own, 400 * other)),
        "You take the difference as it is. By what does the formula divide it?",
    )
    yield rated(lambda score, own, other: 32 * score), "You leave the chance out. What does an expected win earn?"
    # as if all ratings were those of the start
    yield (
        rated(lambda score, own, other: 32 * (score - 0.5)),
        "Every win is worth 16 points to you. Do you use the ratings before *this* game?",
    )
    yield (
        rated(lambda score, own, other: right(score, own, other) / 32),
        "The right direction, but 32 times too small.",
    )
    yield (
        rated(lambda score, own, other: right(1 - score, own, other)),
        "Your winner loses points. Whose score is the third number?",
    )
    # the gain is right in these, and what becomes of it is not
    yield rated(right, "gains"), "Both of your systems gain. What one wins, the other must lose."
    yield rated(right, "stays"), "The mean of all ratings must stay at 1000. What does the second system do?"
    yield rated(right, "late"), "You change the first rating and then use it for the second. Compute the gain once."
    # a start moves all ratings alike, because a chance asks for differences alone
    yield [rating - 1000 for rating in rated(right)], "All your ratings are 1000 too low. Where does everyone start?"


def _chance(own, other):
    # clipped: without the 400, 10 ** difference overflows after a few games
    return 1 / (1 + 10 ** min((other - own) / 400, 300))


def _elo(results, systems, gain, second_system):
    """Rate games with one mistake: in `gain`, or in what happens to the second system."""
    ratings = [1000.0] * systems
    for first, second, score in results:
        points = gain(score, ratings[first], ratings[second])
        ratings[first] += points
        # the classic slip of two lines that each compute the gain
        if second_system == "late":
            points = gain(score, ratings[first], ratings[second])
        # "late" has changed the points and loses them like a right answer
        ratings[second] += {"stays": 0.0, "gains": points}.get(second_system, -points)
    return ratings


def my_interval(right, questions):
    """What is the share, what is its standard error, and how many standard errors lie to either side?"""
    # each line is one way to misread "the root of p (1 - p) / n"
    share = right / questions
    error = math.sqrt(share * (1 - share) / questions)
    around = lambda half: (share - half, share + half)  # noqa: E731
    yield around(error), "That is one standard error to either side. How many hold 95 of 100 exams?"
    yield around(1.96 * math.sqrt(share * (1 - share))), "That is the spread of single questions. Divide by what?"
    yield around(1.96 * share * (1 - share) / questions), "A variance, not a standard error. What is missing?"
    yield around(1.96 * math.sqrt(share * (1 - share)) / questions), "You divide by n. What falls with the root of n?"
    yield around(1.96 * math.sqrt(share / questions)), "What of the questions that were answered wrong?"
    # from here on the formula is right, and what is returned is not
    yield tuple(100 * end for end in around(1.96 * error)), "Return shares from 0 to 1, not percentages."
    yield around(1.96 * error)[::-1], "The lower end comes first."
    yield (share, 1.96 * error), "You return the middle and half of the length. Return both ends."
    yield tuple(questions * end for end in around(1.96 * error)), "You count questions. What share of them is it?"


def my_percent(ours, theirs):
    """Which questions count? Add up what each system got on them, and compare the two sums."""
    # -1 always comes in pairs, so that looking at one list is enough
    read = [(a, b) for a, b in zip(ours, theirs, strict=True) if a >= 0]
    total, other = map(sum, zip(*read, strict=True))
    yield (
        100 * sum(a / b for a, b in read) / len(read),
        "That is the mean of the ratios. What is the ratio of the sums?",
    )
    yield 100 * sum(ours) / sum(theirs), "You add up -1 like a score. What does it mean?"
    # the sums are right from here on
    yield 100 * other / total, "Upside down: that is ChatGPT in % of the system."
    yield total / other, "That is a share. How many percent is it?"
    yield 100 * (total - other) / other, "That is how far it is ahead. Which % is a system that is just as good?"
    scored = [(a, b) for a, b in read if a > 0]
    yield 100 * sum(a for a, _ in scored) / sum(b for _, b in scored), "0 is a score, that of an empty answer."


def my_errata(printed, replayed):
    """Round each replayed figure to as many decimal places as the printed text has. Is it the same text?"""
    # what each rule flags; the right one compares texts, because 0.05 is no number of binary floats
    yield (
        [name for name, text in printed.items() if float(text) != replayed[name]],
        "A printed figure is rounded, so hardly any equals the exact one. Round first.",
    )
    yield (
        [name for name, text in printed.items() if f"{replayed[name]:.{_places(text)}f}" == text],
        "These come out. Which ones do not?",
    )
    yield (
        [name for name, text in printed.items() if abs(float(text) - replayed[name]) > 0.5],
        "You forgive too much. How far can rounding move a figure with one decimal place?",
    )
    # half a step is right for one decimal place alone
    yield (
        [name for name, text in printed.items() if abs(float(text) - replayed[name]) > 0.05],
        '0.05 is half a step of the first decimal place. What is half a step for "7", and for "9.25"?',
    )
    yield (
        [name for name, text in printed.items() if f"{replayed[name]:.1f}" != text],
        "Not every figure is printed with one decimal place. How many does its text have?",
    )
    yield (
        [name for name, text in printed.items() if round(replayed[name]) != round(float(text))],
        "You compare whole numbers. The printed decimal places count, too.",
    )


def _places(text):
    return len(text.partition(".")[2])
