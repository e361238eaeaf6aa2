"""The explorer of methods shows what the ledger and the count of operations say."""

import re
from functools import cache

import pytest
from hypothesis import given, settings, strategies as st

from qlora_lab.memory.predict import predict_memory
from qlora_lab.memory.shape import shape_of
from qlora_lab.show.slider import Slider
from qlora_lab.show.zoo import GIB, NAMES, PANELS, ZooExplorer, _label


@cache
def shared() -> ZooExplorer:
    return ZooExplorer()


STATES = {
    name: st.sampled_from(control.choices) if isinstance(control, Slider) else st.booleans()
    for name, control in shared()._controls.items()
}


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(st.fixed_dictionaries(STATES))
def test_any_state(state):
    shared().set(**state)
    for panel, (field, (_, (low, high), _)) in enumerate(PANELS.items()):
        rows = shared().result["costs"].values()
        values = [row[field] for row in rows]
        there = [row["fits"] or field == "trained" for row in rows]
        drawn = [dot.get_data() for dot in shared().dots[panel]]
        assert drawn == [([value], [y]) if there[y] else ([], []) for y, value in enumerate(values)]
        assert low < min(values) and max(values) < high
        said = [_label(field, value) if there[y] else "does not fit" for y, value in enumerate(values)]
        assert [text.get_text() for text in shared().texts[panel]] == said
    assert not re.search(r"\de-\d", shared().summary())
    colours = [dot.get_color() for dot in shared().dots[0]]
    chosen = list(NAMES).index(state["method"])
    assert len(set(colours)) == 2 and colours.count(colours[chosen]) == 1


def test_the_start_is_the_ledger_of_qlora():
    shared().reset()
    found = shared().result["costs"]
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
    shared().reset()
    before = shared().result["costs"]
    shared().set(layers="q and v")
    assert shared().result["costs"]["lora"]["trained"] == 32 * 16 * 2 * 2 * 4096
    assert shared().result["costs"]["houlsby"] == before["houlsby"]  # it has places of its own
    shared().set(four_bit=False)
    assert shared().result["costs"]["lora"]["peak"] > before["lora"]["peak"]
    assert shared().result["costs"]["full"]["peak"] == before["full"]["peak"]
    shared().set(length=512)
    assert shared().result["costs"]["prompt"]["work"] < before["prompt"]["work"]


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
    shared().reset()
    shared().set(method=method)
    assert said in shared().summary()
    assert ("none once it is merged" in shared().summary()) == (method == "lora")
    assert f"{shared().result['costs'][method]['peak'] / GIB:.1f} GiB" in shared().summary()


def test_one_token_of_a_large_model():
    shared().reset()
    shared().set(method="prompt", size=1)
    # 4096 of 6,738,415,616 parameters
    assert "prompt of 1 token: 4,096 trainable parameters, 0.000061 % of the model. In detail: " in shared().summary()
    shared().set(method="lora", layers="q and v")
    assert "LoRA of rank 1 on q and v: " in shared().summary()


@pytest.mark.parametrize(("model", "fits"), [("llama-7b", False), ("llama-2-70b", True), ("llama-3-8b", True)])
def test_a_whole_context_leaves_no_room_for_virtual_tokens(model, fits):
    shared().reset()
    shared().set(model=model, method="prefix", size=1, length=2048)
    for method, row in shared().result["costs"].items():
        assert row["fits"] == (fits or method not in ("prefix", "prompt"))
    assert shared().summary().endswith("does not fit into the model's context beside them") != fits
    shared().set(method="prompt", length=1024)
    assert shared().result["costs"]["prompt"]["fits"] and "GiB" in shared().summary()


@pytest.mark.long
def test_a_picture_does_not_depend_on_the_one_before_it():
    shared().set(model="llama-65b", method="full", size=256, length=2048)
    shared().set(model="llama-3-8b", method="prompt", size=8, length=16)
    assert ZooExplorer(**shared().state).png == shared().png


def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="size=3 is not allowed: one of 1, 2, 4"):
        shared().set(size=3)
