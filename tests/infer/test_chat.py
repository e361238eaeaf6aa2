"""A conversation: what it keeps, whatever happens while an answer comes."""

from dataclasses import replace

import pytest

from qlora_lab.data.dataset import prompt_of
from qlora_lab.data.examples import Example
from qlora_lab.infer import fast
from qlora_lab.infer.chat import Chat
from qlora_lab.infer.decode import Answer, decode
from qlora_lab.infer.sampling import Sampling

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


def test_an_answer_is_drawn_as_it_was_asked_for(packed, tokenizer, monkeypatch):
    monkeypatch.setattr(fast, "can_step", lambda stack: False)
    sampling = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.3, seed=4)
    drawn = "".join(Chat(packed, tokenizer, 12, sampling).ask("a"))
    ids = prompt_of(Example((("user", "a"), ("assistant", ""))), tokenizer).ids
    (expected,) = decode(packed, tokenizer, [ids], 12, sampling, progress=False)
    assert drawn == expected.text != "".join(Chat(packed, tokenizer, 12).ask("a"))
    chat = Chat(packed, tokenizer, 12, replace(sampling, stop=drawn[3:5]))
    assert "".join(chat.ask("a")) == drawn[: drawn.index(drawn[3:5])] and chat.reply.ended == "stop"


def test_the_speed_is_that_of_the_tokens_after_the_first_piece(chat):
    answer = Answer("abc", [5, 6, 7, 8, 9], "end")
    chat._keep("a", answer, first=2, spent=[4.0, 1.0, 0.5])
    assert (chat.reply.wait, chat.reply.rate, chat.reply.tokens) == (4.0, 2.0, 5)
    chat._keep("a", answer, first=5, spent=[4.0, 0.1])
    assert chat.reply.rate is None and len(chat.turns) == 4


def test_an_answer_without_a_word_is_no_turn(chat):
    chat._keep("a", Answer(" \n", [5], "end"), first=1, spent=[1.0])
    assert chat.turns == [] and chat.reply.ended == "end"


def test_an_answer_that_an_error_ends_is_no_turn(chat, packed):
    packed.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(FloatingPointError):
        list(chat.ask("a"))
    assert chat.turns == [] and chat.reply is None
