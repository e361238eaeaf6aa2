"""Sliders and switches without a browser: `set_state` is the path a browser's message takes."""

import pytest
from hypothesis import given, strategies as st

from qlora_lab.show.slider import Button, Slider, Steps, Toggle


def test_value_and_position_follow_each_other():
    slider, seen = Slider("Block size", 64, choices=[16, 32, 64, 128], unit="weights"), []
    slider.observe(lambda change: seen.append(change["new"]), "value")
    slider.set_state({"position": 3})
    slider.value = 16
    assert seen == [128, 16]
    assert slider.position == 0


@pytest.mark.long
@given(st.integers(-50, 50), st.integers(1, 40), st.integers(1, 7))
def test_integer_steps_are_pythons_range(low, width, step):
    assert Slider("n", low, Steps(low, low + width, step)).choices == tuple(range(low, low + width + 1, step))


@pytest.mark.long
@given(st.floats(0.01, 0.5))
def test_every_float_choice_is_allowed_and_stays_within_bounds(step):
    slider = Slider("x", 0.0, Steps(0.0, 1.0, step))
    assert min(slider.choices) >= 0.0 and max(slider.choices) <= 1.0 + 1e-9
    assert all(slider.allowed(choice) == choice for choice in slider.choices)


def test_a_start_value_between_steps_becomes_a_step():
    slider = Slider("Offset", 0.9677083, Steps(0.96, 0.98, 0.01))
    assert slider.choices == (0.96, 0.9677083, 0.97, 0.98)
    assert slider.labels[1] == "0.9677083"
    assert slider.value == 0.9677083


def test_floats_are_found_despite_their_last_bits():
    assert Slider("x", 0.3, Steps(0.0, 1.0, 0.1)).allowed(0.1 + 0.2) == 0.3


@pytest.mark.parametrize("value", [0, 9, 4.5, "4", True, None, float("nan"), [4]])
def test_a_bad_value_names_itself_the_rule_and_the_fix(value):
    slider = Slider("Bits", 4, Steps(1, 8))
    with pytest.raises(ValueError, match=r"^Bits=.* is not allowed: from 1 to 8 in steps of 1\. (Nearest|Try)"):
        slider.value = value
    assert slider.value == 4


def test_a_bad_word_lists_the_words():
    with pytest.raises(ValueError, match=r"^codebook='nf5' is not allowed: one of 'nf4', 'fp4'\. Try 'nf4'\."):
        Slider("Codebook", "nf4", choices=["nf4", "fp4"]).allowed("nf5", "codebook")


@pytest.mark.parametrize("steps", [Steps(2, 2), Steps(1, 2, step=0)])
def test_bounds_must_hold_two_values(steps):
    with pytest.raises(ValueError, match="need low < high and step > 0"):
        Slider("Bits", 2, steps)


def test_toggle_takes_bools_only():
    toggle = Toggle("Symmetric", True)
    toggle.set_state({"value": False})
    assert toggle.value is False
    with pytest.raises(ValueError, match=r"^symmetric=1 is not allowed: it is a switch\. Use True or False\."):
        toggle.allowed(1, "symmetric")


def test_reprs_hold_no_address():
    controls = [Slider("Block size", 64, choices=[64], unit="weights"), Toggle("Clip"), Button("Reset")]
    assert repr(controls) == "[Slider('Block size', 64, unit='weights'), Toggle('Clip', False), Button('Reset')]"


@pytest.mark.parametrize("control", [Slider, Toggle, Button])
def test_labs_shortcuts_are_off_on_the_input_itself(control):
    assert 'dataset.lmSuppressShortcuts = "true"' in str(control._esm)
