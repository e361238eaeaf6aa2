"""What a few rules score that read no question: the figures beside which a model's accuracy means something.

In: Questions with four texts each. Out: the share of right answers of each rule. Where options tie, the rule guesses
among them, and its share is what it may expect.

A question set leaks where such a rule is far from 25 %: a model may then have found the rule and not the meaning.
Not here: how docstring_choice keeps its questions from leaking.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from statistics import fmean

from qlora_lab.data.choice_files import ChoiceQuestion, Questions

# Words without a meaning of their own, and those that stand in docstring_choice's task: shared ones say nothing.
_GLUE = "a an and are as at be by code for from if in into is it its not of on or python summary that the this to with"
GLUE = frozenset(_GLUE.split()) | {"function", "func", "def", "self", "cls", "return", "returns", "which", "describes"}
STEM = 4  # characters: "normalized", "normalise" and "norm" are one


def content_words(text: str) -> frozenset[str]:
    """Return the words of a text or of code, in lower case; camelCase and snake_case are several words each.

    >>> sorted(content_words("def getWidth(self): return self._line_width"))
    ['get', 'line', 'width']
    """
    parted = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", text)
    # Digits too: "log2" and "float16" name what a function does.
    return frozenset(re.findall(r"[a-z0-9]+", parted.lower())) - GLUE


def stems(text: str) -> frozenset[str]:
    """Return the beginnings of a text's words, so that "set" and "sets", "normal" and "normalise" are one.

    >>> sorted(stems("Sets the axes"))
    ['axe', 'set']
    """
    # Crude, but a stemmer is one more library, and a rule that finds more would only need a stricter match.
    # "is" and "its" are glue, so a final s of short words is nearly always a plural or a verb's.
    cut = (word[:STEM] for word in content_words(text))
    return frozenset(word.removesuffix("s") if len(word) == STEM else word for word in cut)


def name_of(text: str) -> str:
    """Return the name of the first Python function in a text; "" without one.

    >>> name_of("def get_width(self): ...")
    'get_width'
    """
    # Not parsed: MMLU's questions hold pieces of code that are no Python file.
    found = re.search(r"\bdef (\w+)", text)
    return found[1] if found else ""


def baselines(questions: Questions) -> dict[str, float]:
    """Return the share of right answers by rule, from 0 to 1; chance is 0.25.

    longest, shortest: by characters; nearest to the mean length: of the four; most shared words, most shared stems:
    with the question; rarest shared stems: each counts by how few of the set's options have it; the name's stems: those
    that a Python function's name has. Raises ValueError for whole prompts, whose options are not known apart.
    """
    if any(not question.options for question in questions.test):
        raise ValueError(f"{questions.name} holds whole prompts: baselines need the options one by one")
    # Of all options, right and wrong: a rule must not know which are right.
    options = [option for question in questions.test for option in question.options]
    seen = Counter(stem for option in options for stem in stems(option))

    def shared(one: Callable, other: Callable | None = None) -> Callable[[ChoiceQuestion], list[float]]:
        return lambda q: [len(one(option) & (other or one)(q.text)) for option in q.options]

    rules: dict[str, Callable[[ChoiceQuestion], list[float]]] = {
        "longest": lambda q: [len(option) for option in q.options],
        "shortest": lambda q: [-len(option) for option in q.options],
        "nearest to the mean length": lambda q: _near_the_mean([len(option) for option in q.options]),
        "most shared words": shared(content_words),
        "most shared stems": shared(stems),
        # What only one option of hundreds says weighs most: the strongest of these rules.
        "rarest shared stems": lambda q: [
            sum(math.log(len(options) / seen[stem]) for stem in sorted(stems(option) & stems(q.text)))
            for option in q.options
        ],
        "the name's stems": shared(stems, lambda text: stems(name_of(text))),
    }
    return {name: fmean(_expected(rule(q), q.answer) for q in questions.test) for name, rule in rules.items()}


def _near_the_mean(lengths: list[int]) -> list[float]:
    return [-abs(length - fmean(lengths)) for length in lengths]


def _expected(weights: list[float], answer: int) -> float:
    """Return the chance that a rule picks the answer: it takes the largest weight, and guesses among equal ones."""
    # Equal up to the last bit: sums are of the same terms in the same order.
    best = [i for i, weight in enumerate(weights) if weight == max(weights)]
    return (answer in best) / len(best)
