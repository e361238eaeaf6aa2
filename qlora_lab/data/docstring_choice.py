"""docstring-choice: "which summary describes this function?", four summaries from one library, in MMLU's CSV form.

In: docstrings of libraries that every installation has and that no run on `--data docstrings` learns (docstrings.TRAIN
is left out). Out: Questions, one subject a library, and five examples each. It is not MMLU and says nothing about MMLU:
it measures, without a download, whether a model prefers what a function's author wrote to what other authors wrote.

A question is kept if
- its code has at most CODE characters and its summary at most WORDS words: a prompt costs time;
- its summary does not stand in its code, not even in a comment, and belongs to no other function of the library;
- enough summaries of the library can stand beside it. A wrong summary has as many words in common with the code as the
  right one, and as many with the function's name (by stems, choice_baselines.py). Without that, the summary that shares
  most words with the code was right in 87 of 100 questions.
The right one is the shortest, second, third and longest equally often, and half of the middle ones are not nearest to
the mean length. choice_baselines.baselines measures what is left of such clues.
The right answer is A, B, C and D equally often, in an order drawn by the seed.
"""

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from tqdm.auto import tqdm

from qlora_lab.data.choice_baselines import name_of, stems
from qlora_lab.data.choice_files import ChoiceQuestion, Questions
from qlora_lab.data.docstrings import TRAIN, docstring_pairs
from qlora_lab.data.examples import Example
from qlora_lab.quant.numbers import check_seed, check_whole

NAME = "docstring-choice"
# held out from training, and installed with this library: Jupyter and transformers bring the last two
LIBRARIES = ("IPython", "huggingface_hub", "matplotlib", "stdlib")
CODE = 240  # characters, about 70 tokens: half of the functions that have a summary
WORDS = 14  # of a summary
EXAMPLES = 5  # for the prompts of each subject, as in MMLU
NEAR = 12  # of the summaries that share as much: those of the most similar rarity, from which three are drawn
TRIES = 20  # draws of three for one place among the lengths
# The right one's rank by length, and whether it is nearest to the mean: the first and the last of four never are.
LENGTHS = [(0, False), (0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, False)]
TASK = "Which summary describes this Python function?"


def docstring_choice(
    questions: int = 500, *, seed: int = 0, libraries: Iterable[str] = LIBRARIES, progress: bool = True
) -> Questions:
    """Generate `questions` questions, as evenly from the libraries as those allow, and EXAMPLES more for each.

    The same seed and the same versions of the libraries give the same questions on every machine. Raises ValueError for
    less than one question, a library that training reads, one that is not installed, or too few functions.
    """
    check_whole("questions", questions)
    check_seed(seed)
    if not (libraries := sorted(set(libraries))):
        raise ValueError(f"no libraries are given: name at least one library, such as {LIBRARIES[0]}")
    if trained := [library for library in libraries if library in TRAIN]:
        raise ValueError(f"{trained[0]} is in the training docstrings: choose other libraries, such as {LIBRARIES[0]}")
    # A library more or less changes no other library's questions, only how many of them are taken.
    found = {library: _of_library(library, questions + EXAMPLES, seed, progress) for library in libraries}
    if short := [library for library in libraries if len(found[library]) <= EXAMPLES]:
        raise ValueError(f"{short[0]} has too few short functions with a summary: leave it out, or name a larger one")
    # Examples come first, so that a larger set keeps the examples of a smaller one.
    shares = _shares({library: len(generated) - EXAMPLES for library, generated in found.items()}, questions)
    test = []
    dev = {}
    for library, share in shares.items():
        draw = _generator(seed, f"{library} letters")
        kept = found[library][: EXAMPLES + share]
        letters = _letters(EXAMPLES, draw) + _letters(share, draw)  # balanced in the examples, and in the questions
        kept = [_with_answer_at(letter, question) for letter, question in zip(letters, kept, strict=True)]
        dev[library] = tuple(kept[:EXAMPLES])
        test += kept[EXAMPLES:]
    return Questions(NAME, tuple(test), dev)


def _shares(available: dict[str, int], questions: int) -> dict[str, int]:
    """Return how many questions each library gives: equally many, but one that has fewer gives all it has."""
    if sum(available.values()) < questions:
        there = f"{', '.join(available)}: {sum(available.values())} questions"
        raise ValueError(f"{there}, fewer than {questions}: ask for fewer, or name more libraries")
    shares = {}
    left = questions
    # Small ones first: what they lack falls to the larger ones. Of equal ones, the first by name has the remainder.
    for number, library in enumerate(sorted(available, key=lambda name: (available[name], name))):
        shares[library] = min(available[library], -(-left // (len(available) - number)))
        left -= shares[library]
    return {library: shares[library] for library in available}


def _of_library(library: str, number: int, seed: int, progress: bool) -> list[ChoiceQuestion]:
    """Return at most `number` questions, the right option first in each."""
    pairs = list(_usable(docstring_pairs([library], progress)))  # in hash order: any beginning is a fair sample
    # Wrong summaries are right ones of other questions, so that none is known by its kind.
    parts = {summary: stems(summary) for _, summary in pairs}
    draw = _generator(seed, library)  # of its own, so that no library shifts the draws of another
    seen = Counter(stem for words in parts.values() for stem in words)
    rarity = {stem: math.log(len(parts) / often) for stem, often in seen.items()}
    wanted: list[tuple[int, bool]] = []
    questions = []
    for code, summary in tqdm(pairs, f"questions of {library}", leave=False, disable=not progress):
        if len(questions) == number:
            break
        if not wanted:
            wanted = draw.sample(LENGTHS, len(LENGTHS))
        # What one function cannot give stays for the next, so the shares come out even.
        if found := _drawn(summary, _alike(code, summary, parts, rarity), wanted, draw):
            wrong, place = found
            wanted.remove(place)
            questions.append(ChoiceQuestion(library, f"{TASK}\n{code}", (summary, *wrong), 0))
    return questions


def _alike(code: str, summary: str, parts: dict[str, frozenset[str]], rarity: dict[str, float]) -> list[str]:
    """Return summaries that share as much with the code as its own does, those with the most similar rarity first."""
    in_code = stems(code)
    in_name = stems(name_of(code))
    clues = len(parts[summary] & in_code), len(parts[summary] & in_name)
    plain = _plain(code)
    equal = [
        other
        for other, words in parts.items()
        # one of equal length would be neither shorter nor longer
        if len(other) != len(summary) and (len(words & in_code), len(words & in_name)) == clues
        if _plain(other) not in plain
    ]
    # Words that few summaries have say more. Rounded: a sum's last bit depends on the order of a set.
    weight = {other: round(sum(rarity[stem] for stem in parts[other] & in_code), 6) for other in [*equal, summary]}
    return sorted(equal, key=lambda other: (abs(weight[other] - weight[summary]), other))[:NEAR]


def _drawn(
    summary: str, near: list[str], wanted: list[tuple[int, bool]], draw: random.Random
) -> tuple[list[str], tuple[int, bool]] | None:
    """Draw three wrong summaries, and return them with the one of `wanted` that they meet; None if none is met."""
    # Rank by rank: a function in the middle of the lengths can take any, one at the edge only some.
    shorter = [other for other in near if len(other) < len(summary)]
    longer = [other for other in near if len(other) > len(summary)]
    for rank, nearest in wanted:
        if len(shorter) < rank or len(longer) < 3 - rank:
            continue
        for _ in range(TRIES):  # cheaper than to list all triples
            drawn = draw.sample(shorter, rank) + draw.sample(longer, 3 - rank)
            if _is_nearest(summary, drawn) == nearest:
                return drawn, (rank, nearest)
    return None


def _is_nearest(summary: str, others: list[str]) -> bool:
    """Tell whether the summary's length is nearest to the mean of the four."""
    # Of two equally near ones neither is: a rule would have to guess.
    mean = (len(summary) + sum(map(len, others))) / 4
    return abs(len(summary) - mean) < min(abs(len(other) - mean) for other in others)


def _with_answer_at(letter: int, question: ChoiceQuestion) -> ChoiceQuestion:
    # After the draw, so that letters are balanced over the questions that are taken, not over those that were made.
    right, *wrong = question.options
    return replace(question, options=(*wrong[:letter], right, *wrong[letter:]), answer=letter)


def _generator(seed: int, name: str) -> random.Random:
    return random.Random(hashlib.sha256(f"{seed} {name}".encode()).digest())


def _usable(examples: list[Example]) -> Iterable[tuple[str, str]]:
    """Yield (code, summary) of each function that can be a question."""
    # "Return the width." of six functions would be right for each of them
    owners = Counter(_plain(example.answer) for example in examples)
    for example in examples:
        code = example.messages[0][1].split("```python\n", 1)[1].removesuffix("\n```")
        summary = example.answer
        short = len(code) <= CODE and len(summary.split()) <= WORDS
        if short and owners[_plain(summary)] == 1 and _plain(summary) not in _plain(code):
            yield code, summary


def _plain(text: str) -> str:
    """Reduce a text to its words in lower case: what would give an answer away in any layout."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _letters(number: int, draw: random.Random) -> list[int]:
    """Numbers of right options, each equally often but for a remainder, in a random order."""
    start = draw.randrange(4)  # which letters have one more
    letters = [(start + i) % 4 for i in range(number)]
    draw.shuffle(letters)
    return letters
