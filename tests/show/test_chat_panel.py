"""The chat panel without a browser: what a page may send, what it gets, and how an answer is stopped."""

import asyncio
import re

import pytest

import qlora_lab as ql
from qlora_lab.infer import decode as decoding
from qlora_lab.show import chat_panel as module
from qlora_lab.show.chat_panel import ChatPanel, turns_html

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def panel(tiny_llama, tokenizer):
    return ChatPanel(tiny_llama, tokenizer, 6)


def send(panel, text="double 3", number=None):
    panel.question.set_state({"sent": [panel.question.sent[0] + 1 if number is None else number, text]})


def test_a_question_gets_its_answer_and_a_speed(panel, tiny_llama, tokenizer):
    send(panel)
    (chat,), (column,) = panel.chats.values(), panel.columns
    prompt = "<|im_start|>user\ndouble 3<|im_end|>\n<|im_start|>assistant\n"
    (want,) = ql.decode(tiny_llama, tokenizer, prompt, 6, progress=False)
    assert chat.turns == [("user", "double 3"), ("assistant", want.text)]
    assert column.turns == turns_html(chat.turns) and not column.busy and not panel.question.busy
    assert "tokens per second" in column.speed
    send(panel)
    assert len(chat.turns) == 4  # the same question is news, too
    panel.reset.set_state({"clicks": 1})
    assert chat.turns == [] and column.turns == ""


def test_base_and_adapter_stand_side_by_side(tiny_llama, tokenizer):
    import torch

    base = ChatPanel(tiny_llama, tokenizer, 6).ask("double 3")
    ql.add_lora(tiny_llama, r=2)
    for name, factor in tiny_llama.named_parameters():
        if "lora_" in name:
            factor.data = torch.randn(factor.shape, generator=torch.Generator().manual_seed(len(name) + 1))
    panel = ChatPanel(tiny_llama, tokenizer, 6)
    assert [column.title for column in panel.columns] == ["Base", "With the adapter"]
    answers = panel.ask("double 3")
    assert answers[:1] == base and answers[1] != answers[0]
    assert [dict(chat.turns)["assistant"] for chat in panel.chats.values()] == answers


FOREIGN = '<img src=x onerror="alert(1)"> $a$ \x1b[2J </p><script>'


def test_markup_is_escaped_also_half_of_it_at_the_end_of_a_piece(panel, monkeypatch):
    shown = []
    monkeypatch.setattr(module, "REDRAW_EVERY", 0)
    panel.columns[0].observe(lambda change: shown.append(change["new"]), "turns")
    monkeypatch.setattr(module.Chat, "_answer", lambda *given: (c for c in FOREIGN))
    panel.ask("<b>?")
    assert len(shown) > len(FOREIGN)  # after each letter
    for page in shown:
        inside = re.sub(r'<p class="qlora-(user|assistant)" dir="auto">', "", page)
        assert not {"<", ">"} & set(inside.replace("</p>", "").replace("<span>$</span>", "")), page
    assert "&lt;b&gt;?" in shown[0] and r"\x1b[2J" in shown[-2]


@pytest.mark.parametrize(
    "state",
    [
        {"sent": [0, "again"]},
        {"sent": [2**53, "x"]},
        {"sent": [True, "x"]},
        {"sent": [1, " \n"]},
        {"sent": [1, "x" * 20_001]},
        {"sent": [1, 5]},
        {"sent": "text"},
        {"busy": True},
        {"description": "x"},
    ],
)
def test_a_page_can_only_ask(panel, state):
    panel.question.set_state(state)
    assert panel.question.refused.startswith('Refused: "Question" got') and not panel.question.busy
    assert panel.columns[0].turns == "" and panel._status.text == panel.question.refused


def test_stop_ends_an_answer_and_a_second_question_waits(tiny_llama, tokenizer):
    """In a loop, as in a kernel: messages arrive while an answer is written."""

    async def pressed(button):
        panel = ChatPanel(tiny_llama, tokenizer, 2000)
        send(panel)
        assert panel.question.busy
        send(panel, "and this?")
        assert "once the last answer has ended" in panel._status.text
        with pytest.raises(ValueError, match="another question is being answered"):
            panel.ask("and this?")
        while "assistant" not in panel.columns[0].turns:
            await asyncio.sleep(0)
        getattr(panel, button).set_state({"clicks": 1})
        await asyncio.wait_for(panel._task, 60)
        return panel

    panel = asyncio.run(pressed("stop"))
    (chat,) = panel.chats.values()
    assert chat.reply.ended == "interrupted" and 0 < chat.reply.tokens < 1000 and not panel.question.busy
    assert len(chat.turns) == 2 and "ended: interrupted" in panel.columns[0].speed
    panel = asyncio.run(pressed("reset"))
    (chat,) = panel.chats.values()
    assert chat.turns == [] and panel.columns[0].turns == "" and not panel.question.busy


def test_an_error_is_told_in_the_status_line(panel, monkeypatch):
    panel.ask("x" * 5000)
    assert "but the context of this model is 2048: reset the conversation" in panel._status.text
    assert not panel.question.busy and not panel.columns[0].busy

    def broken(stack, in_int8):
        raise FloatingPointError("layer 1 of 2 computes a number that is not finite")

    monkeypatch.setattr(decoding, "step_of", broken)
    panel.ask("double 3")
    assert panel._status.text.startswith("layer 1 of 2") and not panel.question.busy and not panel.columns[0].busy


def test_a_stored_notebook_keeps_the_turns_and_no_speed(panel):
    panel.ask("double 3")
    bundle = panel._repr_mimebundle_()
    assert "double 3" in bundle["text/html"] and "per second" not in bundle["text/html"]
    assert bundle["text/plain"] == repr(panel) == "Chat: Model"
