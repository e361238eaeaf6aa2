"""The generated questions: the same for a seed, balanced, and without the answer in the question."""

import re
from collections import Counter

import pytest

from qlora_lab.data import docstring_choice as module
from qlora_lab.data.choice_files import group_by_subject
from qlora_lab.data.docstring_choice import EXAMPLES, docstring_choice
from qlora_lab.data.docstrings import TRAIN


@pytest.fixture(scope="module")
def questions():
    return docstring_choice(60, libraries=["matplotlib", "IPython"], progress=False)


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def test_each_library_is_a_subject_with_examples(questions):
    assert questions.name == "docstring-choice"
    assert Counter(q.subject for q in questions.test) == {"IPython": 30, "matplotlib": 30}
    assert {subject: len(examples) for subject, examples in questions.dev.items()} == dict.fromkeys(
        ("IPython", "matplotlib"), EXAMPLES
    )
    every = [q.text for q in (*questions.test, *questions.dev["IPython"], *questions.dev["matplotlib"])]
    assert len(set(every)) == len(every), "an example is also a question"


def test_no_question_holds_its_answer(questions):
    for q in questions.test:
        assert words(q.options[q.answer]) not in words(q.text)
        assert len({words(option) for option in q.options}) == 4


def test_letters_are_balanced_within_each_subject(questions):
    for group in group_by_subject(questions.test).values():
        counts = Counter(q.answer for q in group)
        assert len(counts) == 4 and max(counts.values()) - min(counts.values()) <= 1


def test_length_gives_nothing_away(questions):
    """The right one is the longest, and the shortest, about as often as chance has it: within 3 standard deviations."""
    for pick in (max, min):
        often = sum(q.options.index(pick(q.options, key=len)) == q.answer for q in questions.test)
        assert abs(often - 15) <= 3 * (60 * 0.25 * 0.75) ** 0.5


def test_the_seed_decides(questions):
    again = docstring_choice(60, libraries=("IPython", "matplotlib"), progress=False)
    other = docstring_choice(60, seed=1, libraries=("IPython", "matplotlib"), progress=False)
    assert again == questions
    assert [q.text for q in other.test] == [q.text for q in questions.test] and other != questions


def test_a_remainder_goes_to_the_first(monkeypatch):
    assert Counter(
        q.subject for q in docstring_choice(3, libraries=["matplotlib", "IPython"], progress=False).test
    ) == {"IPython": 2, "matplotlib": 1}


def test_what_training_reads_is_refused():
    assert set(module.LIBRARIES).isdisjoint(TRAIN)
    with pytest.raises(ValueError, match="torch is in the training docstrings"):
        docstring_choice(10, libraries=["torch"], progress=False)


@pytest.mark.parametrize(
    "number, libraries, said",
    [
        (0, ["IPython"], "questions=0 is not allowed"),
        (10_000, ["IPython"], "fewer than 10000 questions and 5 examples: ask for fewer"),
        (4, ["no_such_library"], "no installed package is called 'no_such_library'"),
        (4, [], "name at least one library"),
    ],
)
def test_what_cannot_be_made(number, libraries, said):
    with pytest.raises(ValueError, match=said):
        docstring_choice(number, libraries=libraries, progress=False)
