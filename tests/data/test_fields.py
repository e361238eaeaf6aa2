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


# ------------------------------------------------------------------------------------------ completions, parts, roles


def test_a_prompt_and_its_completion_are_a_question_and_an_answer():
    assert to_example({"prompt": "a", "completion": " b\n"}) == to_example({"messages": TURNS})
    assert to_example({"prompt": "a", "completion": "b", "system": "s"}).messages[0] == ("system", "s")
    assert to_example({"prompt": "a", "completion": "b", "id": 7}).unused == ("id",)


def test_of_turns_in_a_prompt_and_a_completion_only_the_completion_is_learned():
    more = [{"role": "user", "content": "c"}]
    example = to_example({"prompt": TURNS + more, "completion": [{"role": "assistant", "content": "d"}]})
    assert example.messages == (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert example.not_learned == (1,)
    assert to_example({"prompt": TURNS + more, "completion": "d"}) == example


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "completion": None}, "'completion' must be text, found null"),
        ({"prompt": 4, "completion": "b"}, "'prompt' must be text, found 4"),
        ({"prompt": [], "completion": "b"}, "the assistant speaks first|no answer to learn from"),
        ({"prompt": ["a"], "completion": "b"}, "must be a list of turns with the keys role and content"),
        ({"prompt": "a"}, "has the keys prompt; expected .* or completion"),
    ],
)
def test_a_completion_that_cannot_be_used_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        to_example(record)


def test_parts_of_text_are_joined():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "", "image_url": None},
        {"type": "text", "text": "b"},
    ]
    assert to_example(chat(("user", parts), ("assistant", "c"))).messages == (("user", "ab"), ("assistant", "c"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "a.png"}}], "a part of the content is .*image_url.* but only"),
        ([{"type": "text", "text": None}], "a part of the content is .*null"),
        (["a"], "a part of the content is a, but only"),
        ([], r"'content' must be text, found \[\]"),
    ],
)
def test_a_part_that_is_no_text_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        to_example(chat(("user", parts), ("assistant", "c")))


def test_a_developer_leads_as_a_system_does():
    example = to_example(chat(("developer", "s"), ("user", "a"), ("assistant", "b")))
    assert example.messages[0] == ("developer", "s")
    with pytest.raises(ValueError, match="both 'system' and a turn of the system"):
        to_example(chat(("developer", "s"), ("user", "a"), ("assistant", "b"), system="s"))


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            chat(("user", "a"), ("assistant", "b"), functions=[{"name": "f"}]),
            "the record has 'functions', but tools are",
        ),
        (ALPACA | {"videos": ["a.mp4"]}, "the record has 'videos', but sound and video cannot"),
        (
            chat(("user", "a", {"image": "a.png"}), ("assistant", "b")),
            "the turn has 'image', but pictures are read from",
        ),
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
            "a turn of 'function_call' is not read",
        ),
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
