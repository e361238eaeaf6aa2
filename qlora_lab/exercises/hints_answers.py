"""The hints for the exercises of notebook 15, in the form that hints.py describes."""

import math

WITHOUT = {
    "my_floor": ("memory.answers.step_work",),
    "my_ridge": ("memory.answers.StepWork.ridge", "memory.answers.StepWork.seconds"),
}


def my_floor(weights, bits, head, moved):
    """How many bytes do the layers have, and how many the head? How long does memory take to move both?"""
    layers = weights * bits / 8
    right = 1000 * (layers + 2 * head) / moved
    yield right / 1000, "These are seconds. How many milliseconds are they?"
    yield 1000 * layers / moved, "That is the time of the layers. A token passes the head, too."
    yield 1000 * (layers + head * bits / 8) / moved, "The head is not quantised. How many bits has a weight of it?"
    yield 8 * right, "You count bits. What does the rate count?"
    yield 1000 * (layers + head) / moved, "You give the head one byte for each weight. It has 16 bits."
    yield 1000 / right, "That is how many tokens come in a second. How long does one take?"


def my_ridge(weight_bytes, text_bytes, operations, moved, computed):
    """Write down both times for `rows` texts. What does one more text add to each, and what is there at the start?"""
    # seconds: once for all texts, and more computing than moving with each of them
    start, more = weight_bytes / moved, operations / computed - text_bytes / moved
    if more > 0:
        exact = start / more
        yield exact, "That is where both take equally long. Which whole number of texts comes next?"
        yield math.floor(exact), "There memory is still the limit. You need the next whole number."
    else:
        yield math.ceil(start / more), "Fewer than no texts: what does one more text add to each of the two times?"
        yield -math.ceil(start / more), "Here each text adds more moving than computing. Do the times ever meet?"
    alone = math.ceil(start * computed / operations)
    yield alone, "You leave out the keys and values. Each text has its own, and they are read, too."
    yield math.ceil(start / (operations / computed + text_bytes / moved)), "Keys and values make moving longer."


def my_hits(ids, n):
    """Take each place, look for the last n tokens before it further to the left, and compare what followed there."""
    places = range(n, len(ids))
    before = {i: [j for j in range(n, i) if ids[j - n : j] == ids[i - n : i]] for i in places}
    guessed = {i: earlier for i, earlier in before.items() if earlier}
    # counted without a look at whether the guess came true
    yield len(guessed), "That is how often there is a guess. How often is it right?"
    first = sum(ids[earlier[0]] == ids[i] for i, earlier in guessed.items())
    yield first, "You take the first place at which these tokens stand. Take the latest one."
    # a lookup that may guess as often as it likes
    any_of = sum(any(ids[j] == ids[i] for j in earlier) for i, earlier in guessed.items())
    yield any_of, "You count a hit if any earlier place is right. There is only one guess: the latest."
    wrong = sum(ids[earlier[-1]] != ids[i] for i, earlier in guessed.items())
    yield wrong, "These are the guesses that fail. How many are right?"
    yield len(ids) - n, "You find each token at its own place. A guess may look only at what comes before."
