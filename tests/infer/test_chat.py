"""A conversation: what it keeps, whatever happens while an answer comes."""

import pytest

from qlora_lab.infer import fast
from qlora_lab.infer.chat import Chat

pytestmark = pytest.mark.long


@pytest.fixture
def chat(packed, tokenizer, monkeypatch):
    monkeypatch.setattr(fast, "can_step", lambda stack: False)  # the kernel would be compiled
    return Chat(packed, tokenizer, 6)


def test_a_reset_while_an_answer_comes_is_a_reset(chat):
    pieces = chat.ask("a")
    next(pieces)
    chat.reset()
    pieces.close()
    assert chat.turns == [] and chat.reply is None


def test_two_questions_at_once_leave_one_conversation(chat):
    """An answer that did not read the turns before it is none to them."""
    first, second = chat.ask("a"), chat.ask("b")
    next(first)
    said = "".join(second)
    list(first)
    assert chat.turns == [("user", "b"), ("assistant", said)] and chat.reply.text == said


def test_a_question_that_is_never_answered_leaves_nothing(chat):
    chat.ask("a")
    assert chat.turns == [] and "".join(chat.ask("b")) and [text for _, text in chat.turns][0] == "b"
