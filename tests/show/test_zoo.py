"""The explorer of methods shows what the ledger and the count of operations say."""

import re

import pytest
from hypothesis import given, settings, strategies as st

from qlora_lab.memory.predict import predict_memory
from qlora_lab.memory.shape import shape_of
from qlora_lab.show.slider import Slider
from qlora_lab.show.zoo import GIB, NAMES, PANELS, ZooExplorer, _label

EXPLORER = ZooExplorer()
STATES = {
    name: st.sampled_from(control.choices) if isinstance(control, Slider) else st.booleans()
    for name, control in EXPLORER._controls.items()
}


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(st.fixed_dictionaries(STATES))
def test_any_state(state):
    EXPLORER.set(**state)
    for panel, (field, (_, (low, high), _)) in enumerate(PANELS.items()):
        rows = EXPLORER.result["costs"].values()
        values = [row[field] for row in rows]
        there = [row["fits"] or field == "trained" for row in rows]
        drawn = [dot.get_data() for dot in EXPLORER.dots[panel]]
        assert drawn == [([value], [y]) if there[y] else ([], []) for y, value in enumerate(values)]
        assert low < min(values) and max(values) < high
        said = [_label(field, value) if there[y] else "does not fit" for y, value in enumerate(values)]
        assert [text.get_text() for text in EXPLORER.texts[panel]] == said
    assert not re.search(r"\de-\d", EXPLORER.summary())
    colours = [dot.get_color() for dot in EXPLORER.dots[0]]
    chosen = list(NAMES).index(state["method"])
    assert len(set(colours)) == 2 and colours.count(colours[chosen]) == 1


def test_the_start_is_the_ledger_of_qlora():
    EXPLORER.reset()
    found = EXPLORER.result["costs"]
    ledger = predict_memory("llama-7b", r=16, length=256, batch_size=1)
    assert found["lora"]["peak"] == ledger.peak
    assert found["lora"]["trained"] == 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))  # r (out + in) of seven matrices
    assert found["houlsby"]["trained"] == 2 * 32 * (2 * 16 * 4096 + 16 + 4096)  # section 2.1: 2 m d + d + m
    assert found["prefix"]["trained"] == 16 * 2 * 32 * 4096
    assert found["prompt"]["trained"] == 16 * 4096
    assert found["zero_bias"]["trained"] == 32 * (5 * 4096 + 2 * 11008)
    assert found["full"]["trained"] == shape_of("llama-7b").parameters
    assert found["full"]["work"] == found["zero_bias"]["work"] == 1


def test_each_control_has_its_effect():
    EXPLORER.reset()
    before = EXPLORER.result["costs"]
    EXPLORER.set(layers="q and v")
    assert EXPLORER.result["costs"]["lora"]["trained"] == 32 * 16 * 2 * 2 * 4096
    assert EXPLORER.result["costs"]["houlsby"] == before["houlsby"]  # it has places of its own
    EXPLORER.set(four_bit=False)
    assert EXPLORER.result["costs"]["lora"]["peak"] > before["lora"]["peak"]
    assert EXPLORER.result["costs"]["full"]["peak"] == before["full"]["peak"]
    EXPLORER.set(length=512)
    assert EXPLORER.result["costs"]["prompt"]["work"] < before["prompt"]["work"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            "lora",
            "LoRA of rank 16 on all linear layers: 39,976,960 trainable parameters, 0.59 % of the model. In detail: ",
        ),
        ("houlsby", "Houlsby of bottleneck 16: 8,651,776 trainable parameters, 0.13 % of the model. In detail: "),
        ("prompt", "prompt of 16 tokens: 65,536 trainable parameters, 0.00097 % of the model. In detail: "),
        ("zero_bias", "llama-7b in 4 bits, biases: 1,359,872 trainable parameters,"),
        ("full", "llama-7b in 16 bits, full: 6,738,415,616 trainable parameters, 100 % of the model. In detail: "),
    ],
)
def test_the_sentences(method, said):
    EXPLORER.reset()
    EXPLORER.set(method=method)
    assert said in EXPLORER.summary()
    assert ("none once it is merged" in EXPLORER.summary()) == (method == "lora")
    assert f"{EXPLORER.result['costs'][method]['peak'] / GIB:.1f} GiB" in EXPLORER.summary()


def test_one_token_of_a_large_model():
    EXPLORER.reset()
    EXPLORER.set(method="prompt", size=1)
    # 4096 of 6,738,415,616 parameters
    assert "prompt of 1 token: 4,096 trainable parameters, 0.000061 % of the model. In detail: " in EXPLORER.summary()
    EXPLORER.set(method="lora", layers="q and v")
    assert "LoRA of rank 1 on q and v: " in EXPLORER.summary()


@pytest.mark.parametrize(("model", "fits"), [("llama-7b", False), ("llama-2-70b", True), ("llama-3-8b", True)])
def test_a_whole_context_leaves_no_room_for_virtual_tokens(model, fits):
    EXPLORER.reset()
    EXPLORER.set(model=model, method="prefix", size=1, length=2048)
    for method, row in EXPLORER.result["costs"].items():
        assert row["fits"] == (fits or method not in ("prefix", "prompt"))
    assert EXPLORER.summary().endswith("does not fit into the model's context beside them") != fits
    EXPLORER.set(method="prompt", length=1024)
    assert EXPLORER.result["costs"]["prompt"]["fits"] and "GiB" in EXPLORER.summary()


@pytest.mark.long
def test_a_picture_does_not_depend_on_the_one_before_it():
    EXPLORER.set(model="llama-65b", method="full", size=256, length=2048)
    EXPLORER.set(model="llama-3-8b", method="prompt", size=8, length=16)
    assert ZooExplorer(**EXPLORER.state).png == EXPLORER.png


def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="size=3 is not allowed: one of 1, 2, 4"):
        EXPLORER.set(size=3)
