"""docstring-choice: "which summary describes this function?", four summaries from one library, in MMLU's CSV form.

In: docstrings of libraries that every installation has and that no run on `--data docstrings` learns (docstrings.TRAIN
is left out). Out: Questions, one subject a library, and five examples each. It is not MMLU and says nothing about MMLU:
it measures, without a download, whether a model prefers what a function's author wrote to what other authors wrote.

A question is kept if
- its code has at most CODE characters and its summary at most WORDS words: a prompt costs time;
- its summary does not stand in its code, not even in a comment, and belongs to no other function of the library.
The three wrong summaries have about the length of the right one, so length gives nothing away. What remains as a clue
is what readers use, too: the function's name.
The right answer is A, B, C and D equally often, in an order drawn by the seed.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable

from qlora_lab.data.choice_files import Question, Questions
from qlora_lab.data.docstrings import TRAIN, docstring_pairs
from qlora_lab.data.examples import Example
from qlora_lab.quant.numbers import check_seed, check_whole

NAME = "docstring-choice"
# held out from training, and installed with this library: Jupyter and transformers bring the last two
LIBRARIES = ("IPython", "huggingface_hub", "matplotlib", "stdlib")
CODE = 240  # characters, about 70 tokens: half of the functions that have a summary
WORDS = 14  # of a summary
EXAMPLES = 5  # for the prompts of each subject, as in MMLU
NEAR = 24  # summaries of the most similar length from which three wrong ones are drawn
TASK = "Which summary describes this Python function?"


def docstring_choice(
    questions: int = 500, *, seed: int = 0, libraries: Iterable[str] = LIBRARIES, progress: bool = True
) -> Questions:
    """Generate `questions` questions, spread evenly over the libraries, and EXAMPLES more for each.

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
    test = []
    dev = {}
    for number, library in enumerate(libraries):
        share = questions // len(libraries) + (number < questions % len(libraries))
        generated = _of_library(library, share + EXAMPLES, seed, progress)
        dev[library] = tuple(generated[:EXAMPLES])
        test += generated[EXAMPLES:]
    return Questions(NAME, tuple(test), dev)


def _of_library(library: str, number: int, seed: int, progress: bool) -> list[Question]:
    pairs = list(_usable(docstring_pairs([library], progress)))  # in hash order: any beginning is a fair sample
    if len(pairs) < number:
        least = number - EXAMPLES
        raise ValueError(
            f"{library} has {len(pairs)} short functions with a summary, fewer than {least} questions and {EXAMPLES} "
            "examples: ask for fewer questions, or name more libraries"
        )
    draw = random.Random(hashlib.sha256(f"{seed} {library}".encode()).digest())
    answers = _letters(number - EXAMPLES, draw)
    answers = _letters(EXAMPLES, draw) + answers  # balanced in the examples, and in the questions
    by_length = sorted((summary for _, summary in pairs), key=lambda summary: (len(summary), summary))
    place = {summary: i for i, summary in enumerate(by_length)}  # each belongs to one function
    questions = []
    for (code, summary), answer in zip(pairs, answers, strict=False):
        first = min(max(place[summary] - NEAR // 2, 0), max(len(by_length) - NEAR - 1, 0))
        # drawn from neighbours in length, not the nearest three: those would be the same in many questions
        near = [other for other in by_length[first : first + NEAR + 1] if other != summary]
        options = draw.sample(near, 3)
        options.insert(answer, summary)
        questions.append(Question(library, f"{TASK}\n{code}", tuple(options), answer))
    return questions


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
