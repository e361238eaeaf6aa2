"""The page of a tournament: who won what on each question, and that foreign text stays text."""

import re

from qlora_lab.measure.judges import Question
from qlora_lab.show.tournament_page import START, tournament_page

QUESTIONS = [Question("q1", "Why?", "Because."), Question("q2", "How?")]
ANSWERS = {"a": {"q1": "one", "q2": "two"}, "<b>": {"q1": "three", "q2": "four"}}
ROWS = [
    {"question": "q1", "first": "a", "second": "<b>", "verdict": "first"},
    {"question": "q1", "first": "<b>", "second": "a", "verdict": "second"},
    {"question": "q2", "first": "a", "second": "<b>", "verdict": "second"},
    {"question": "q2", "first": "<b>", "second": "a", "verdict": "unread"},
]


def page(**changes):
    given = {"sentences": ["One < two."], "questions": QUESTIONS, "answers": ANSWERS, "rows": ROWS}
    return tournament_page([{"system": "a", "Elo": "1000 ± 5"}], **given | changes)


def test_each_system_has_its_wins_on_each_question():
    won = re.findall(r"<h3>(\S+): won (\d) of (\d)</h3>", page())
    assert won == [("a", "2", "2"), ("&lt;b&gt;", "0", "2"), ("a", "0", "2"), ("&lt;b&gt;", "1", "2")]


def test_table_sentences_prompts_and_references_are_there():
    text = page()
    assert text.startswith(START) and "<td>1000 ± 5</td>" in text and "<p>One &lt; two.</p>" in text
    assert text.index("Why?") < text.index("Because.") < text.index("three") < text.index("How?")
    assert "no reference" in text  # of the second question


def test_control_characters_and_half_characters_are_spelled():
    text = page(sentences=["\x1b[2J \ud800 \x00 end\nof\tit"])
    assert r"\x1b[2J \ud800 \x00 end" in text and "of\tit" in text
    text.encode()  # half a surrogate pair would raise
