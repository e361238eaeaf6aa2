"""The generated questions: the same for a seed, balanced, and without the answer in the question."""

import re
from collections import Counter

import pytest

from qlora_lab.data import docstring_choice as module
from qlora_lab.data.choice_baselines import baselines
from qlora_lab.data.choice_files import group_by_subject
from qlora_lab.data.docstring_choice import EXAMPLES, docstring_choice
from qlora_lab.data.docstrings import INSTRUCTION, TRAIN
from qlora_lab.data.examples import Example


@pytest.fixture(scope="module")
def questions():
    return docstring_choice(240, libraries=["matplotlib", "IPython"], progress=False)


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.mark.long
def test_each_library_is_a_subject_with_examples(questions):
    assert questions.name == "docstring-choice"
    counts = Counter(q.subject for q in questions.test)
    assert counts.total() == 240 and set(counts) == {"IPython", "matplotlib"}
    assert {subject: len(examples) for subject, examples in questions.dev.items()} == dict.fromkeys(counts, EXAMPLES)
    every = [q.text for q in questions.test] + [q.text for examples in questions.dev.values() for q in examples]
    assert len(set(every)) == len(every), "an example is also a question"


def test_no_question_holds_its_answer(questions):
    for q in questions.test:
        assert not any(words(option) in words(q.text) for option in q.options)
        assert len({words(option) for option in q.options}) == 4


def pair(code: str, summary: str) -> Example:
    return Example((("user", f"{INSTRUCTION}\n\n```python\n{code}\n```"), ("assistant", summary)))


def test_a_summary_that_stands_in_the_code_makes_no_question():
    """Functions made up for this: of those installed, one in a hundred repeats its docstring in a comment."""
    told = pair("def width(self):\n    # return the\n    # width\n    return self.w", "Return the width.")
    kept = pair("def height(self):\n    return self.h  # in pixels", "Return how tall it is.")
    long = pair(f"def depth(self):\n    return {'1 + ' * 60}1", "Return how deep it is.")
    two = [pair(f"def area{i}(self):\n    return {i}", text) for i, text in enumerate(["Its area.", "Its  AREA."])]
    assert list(module._usable([told, kept, long, *two])) == [
        ("def height(self):\n    return self.h  # in pixels", "Return how tall it is.")
    ]


def test_letters_are_balanced_within_each_subject(questions):
    for group in group_by_subject(questions.test).values():
        counts = Counter(q.answer for q in group)
        assert len(counts) == 4 and max(counts.values()) - min(counts.values()) <= 1


MATCHED = (
    "longest",
    "shortest",
    "most shared stems",
    "the name's stems",
)  # one by one, so chance is met nearly exactly


def test_length_and_shared_words_give_nothing_away(questions):
    found = baselines(questions)
    assert {name: found[name] for name in MATCHED} == pytest.approx(dict.fromkeys(MATCHED, 0.25), abs=0.01)


@pytest.mark.slow
def test_500_questions_leave_little_to_rules_that_read_nothing():
    """500 guesses have a standard deviation of 0.019. With options drawn by length alone, shared words found 0.87.

    Rare words and inflected ones remain a clue: the page says so, with the figures.
    """
    questions = docstring_choice(500, progress=False)
    counts = Counter(q.subject for q in questions.test)
    assert set(counts) == set(module.LIBRARIES) and abs(counts["stdlib"] - counts["matplotlib"]) <= 1
    found = baselines(questions)
    assert {name: found[name] for name in MATCHED} == pytest.approx(dict.fromkeys(MATCHED, 0.25), abs=0.01)
    assert 0.2 < found["nearest to the mean length"] < 0.3
    assert found["most shared words"] < 0.37 and found["rarest shared stems"] < 0.4


def test_the_right_one_has_each_rank_of_length_equally_often(questions):
    ranks = Counter(sum(len(o) < len(q.options[q.answer]) for o in q.options) for q in questions.test)
    assert sorted(ranks) == [0, 1, 2, 3] and max(ranks.values()) - min(ranks.values()) <= 8


@pytest.mark.long
def test_the_seed_decides():
    given = {"libraries": ["matplotlib", "IPython"], "progress": False}
    first = docstring_choice(40, **given)
    assert docstring_choice(40, **given | {"libraries": ("IPython", "matplotlib")}) == first
    assert docstring_choice(40, seed=1, **given) != first


def test_what_one_library_lacks_another_gives():
    assert module._shares({"a": 2, "b": 50, "c": 50}, 11) == {"a": 2, "b": 5, "c": 4}
    assert module._shares({"a": 5, "b": 5}, 3) == {"a": 2, "b": 1}
    with pytest.raises(ValueError, match="a, b: 10 questions, fewer than 11: ask for fewer"):
        module._shares({"a": 5, "b": 5}, 11)


def test_what_training_reads_is_refused():
    assert set(module.LIBRARIES).isdisjoint(TRAIN)
    with pytest.raises(ValueError, match="torch is in the training docstrings"):
        docstring_choice(10, libraries=["torch"], progress=False)


@pytest.mark.parametrize(
    "number, libraries, said",
    [
        (0, ["IPython"], "questions=0 is not allowed"),
        (10_000, ["IPython"], r"IPython: \d+ questions, fewer than 10000: ask for fewer"),
        (4, ["no_such_library"], "no installed package is called 'no_such_library'"),
        (4, [], "name at least one library"),
    ],
)
def test_what_cannot_be_made(number, libraries, said):
    with pytest.raises(ValueError, match=said):
        docstring_choice(number, libraries=libraries, progress=False)
