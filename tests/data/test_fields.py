"""Fields beside the texts are honoured, refused by name, or passed over and named; none changes a lesson in silence."""

import json

import pytest

from qlora_lab.data.dataset import load_data
from qlora_lab.data.examples import to_example

ALPACA = {"instruction": "Add.", "output": "4"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def chat(*turns: tuple, **record) -> dict:
    """A record of OpenAI messages from (role, content) or (role, content, fields of the turn)."""
    made = [{"role": role, "content": content, **dict(*more)} for role, content, *more in turns]
    return {"messages": made} | record


# ---------------------------------------------------------------------------------------------------------- honoured


def test_alpaca_with_system_and_history_is_a_conversation():
    record = ALPACA | {"system": "Be brief.", "history": [["1 + 1?", "2"], ["2 + 2?", "4"]]}
    example = to_example(record)
    assert example.messages == (
        ("system", "Be brief."),
        ("user", "1 + 1?"),
        ("assistant", "2"),
        ("user", "2 + 2?"),
        ("assistant", "4"),
        ("user", "Add."),
        ("assistant", "4"),
    )
    assert example.not_learned == () and example.unused == ()


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_the_system_of_a_record_comes_first(name):
    example = to_example({name: TURNS, "system": "Be brief."})
    assert example.messages == (("system", "Be brief."), ("user", "a"), ("assistant", "b"))
    with pytest.raises(ValueError, match="both 'system' and a turn of the system: keep one"):
        to_example({name: [{"role": "system", "content": "c"}, *TURNS], "system": "Be brief."})


def test_either_pair_of_keys_stands_under_either_name():
    others = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for name in ("messages", "conversations"):
        assert to_example({name: TURNS}) == to_example({name: others})
    with pytest.raises(ValueError, match="'value' must be text, found null"):
        to_example({"conversations": [{"from": "human", "content": "a"}]})


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}])
def test_an_answer_that_is_switched_off_is_shown_and_not_learned(switch):
    example = to_example(chat(("user", "a"), ("assistant", "b", switch), ("user", "c"), ("assistant", "d")))
    assert example.messages[1] == ("assistant", "b") and example.not_learned == (1,)
    system = to_example(chat(("user", "a"), ("assistant", "b", switch), ("user", "c"), ("assistant", "d"), system="s"))
    assert system.not_learned == (2,)


def test_what_is_switched_on_is_learned_as_without_a_switch():
    on = {"weight": 1, "train": True, "loss": None}
    assert to_example(chat(("user", "a", {"weight": 0}), ("assistant", "b", on))) == to_example({"messages": TURNS})


def test_a_last_answer_that_is_switched_off_is_left_out_with_its_question():
    off = {"weight": 0}
    example = to_example(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d", off)))
    assert example == to_example({"messages": TURNS})
    with pytest.raises(ValueError, match="no answer to learn from: all of them have weight 0, or train is false"):
        to_example(chat(("user", "a"), ("assistant", "b", off)))


def test_a_greeting_is_no_answer_also_behind_a_system_text():
    greeting = chat(("system", "s"), ("assistant", "Hello"), ("user", "a"), ("assistant", "b"))
    assert to_example(greeting).messages == (("system", "s"), ("user", "a"), ("assistant", "b"))


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            chat(("user", "a"), ("assistant", "b"), tools=[{"name": "f"}]),
            "the record has 'tools', but tool calls cannot",
        ),
        ({"conversations": TURNS, "tools": '[{"name": "f"}]'}, "the record has 'tools', but tool calls cannot"),
        (ALPACA | {"images": ["a.png"]}, "the record has 'images', but images, sound and video cannot"),
        (ALPACA | {"rejected": "5"}, "the record has 'rejected', but preferences cannot"),
        (ALPACA | {"weight": 0.5}, "the record has 'weight': 0.5, but all records count alike"),
        (ALPACA | {"history": "a"}, "'history' must be a list of .question, answer. pairs"),
        (ALPACA | {"history": [["a"]]}, "'history' must be a list of .question, answer. pairs"),
        (ALPACA | {"history": [["a", None]]}, "'history' must be text, found null"),
        (ALPACA | {"system": 4}, "'system' must be text, found 4"),
        (ALPACA | {"system": 0}, "'system' must be text, found 0"),
        (ALPACA | {"input": 0}, "'input' must be text, found 0"),  # of which the question may be
        (ALPACA | {"input": False}, "'input' must be text, found false"),
        (ALPACA | {"history": 0}, "'history' must be a list of .question, answer. pairs"),
        (ALPACA | {"train": False}, "the record has 'train': False, but all records count alike"),
        (ALPACA | {"training": 0}, "the record has 'training': 0, but all records count alike"),
        ({"conversations": TURNS, "loss": False}, "the record has 'loss': False, but all records count alike"),
        (
            chat(("user", "a"), ("function_call", "f()"), ("assistant", "b")),
            "a turn of 'function_call' belongs to",
        ),
        (chat(("user", "a"), ("assistant", "", {"tool_calls": [{}]})), "the turn has 'tool_calls', but tool calls"),
        (chat(("user", "a"), ("assistant", "b", {"thinking": "c"})), "the turn has 'thinking', but thoughts are read"),
        (chat(("user", "a"), ("assistant", "b", {"train_detail": [{}]})), "'train_detail', but a turn is learned as a"),
        (chat(("user", "a"), ("assistant", "b", {"weight": 0.5})), "turn has 'weight': 0.5, but a turn"),
        (chat(("user", "a"), ("assistant", "b", {"train": "no"})), "has 'train': 'no', but a turn is learned"),
        (
            chat(("user", "a", {"train": True}), ("assistant", "b")),
            "of user has 'train': True, but only answers",
        ),
        (chat(("user", "a"), ("assistant", "b"), chat_template_kwargs={"x": 1}), "but a record cannot set options"),
    ],
)
def test_a_field_that_would_change_the_lesson_is_refused_with_file_and_line(tmp_path, record, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(ALPACA) + "\n" + json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match=f"mine.jsonl, line 2: .*{message}"):
        load_data(path)


def test_empty_fields_ask_for_nothing():
    empty = {"tools": [], "images": None, "system": "", "history": [], "weight": None, "rejected": ""}
    assert to_example(ALPACA | empty) == to_example(ALPACA)
    turn = ("assistant", "b", {"tool_calls": None, "thinking": "", "weight": None})
    assert to_example(chat(("user", "a"), turn)) == to_example({"messages": TURNS})


@pytest.mark.parametrize("empty", [None, []])
def test_an_empty_form_beside_another_asks_for_nothing(empty):
    """A table of records in several forms has a column for each, and null where a record is in another."""
    assert to_example({"messages": empty, "conversations": TURNS}) == to_example({"messages": TURNS})
    assert to_example({"messages": empty, "conversations": empty} | ALPACA) == to_example(ALPACA)
    with pytest.raises(ValueError, match="a conversation must be a list of turns|no answer to learn from"):
        to_example({"messages": empty})


# ------------------------------------------------------------------------------------------------------- passed over


def test_other_fields_are_passed_over_and_named():
    assert to_example(ALPACA | {"source": "me", "id": 7, "note": None}).unused == ("id", "source")
    assert to_example(ALPACA | {"train": True, "loss": 1.5, "weight": 1}).unused == ("loss", "train")
    assert to_example(ALPACA | {"loss": 0.0}).unused == ("loss",)
    example = to_example(chat(("user", "a", {"name": "Ann"}), ("assistant", "b"), **{"k\ud800": 1, "instruction": "c"}))
    assert example.unused == ("instruction", "k\\ud800", "name of a turn")
    assert example == to_example({"messages": TURNS})
