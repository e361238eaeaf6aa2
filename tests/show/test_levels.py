"""The levels to drag, without a browser: `set_state` is the path a browser's message takes."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlora_lab.quant.codebook import codebook
from qlora_lab.show.levels import Levels, shortest

NF4 = codebook("nf4")
EVEN = [i / 10 for i in range(-8, 8)]


@settings(max_examples=20)
@given(st.lists(st.floats(-1, 1, width=32), min_size=16, max_size=16, unique=True).map(sorted))
def test_any_levels_stay_what_they_are_in_float32(levels):
    """Through the control, through JSON, and through the line to copy."""
    levels = [0.0 if level == 0 else level for level in levels]
    value = Levels("Levels", levels).value
    assert torch.equal(torch.tensor(value), torch.tensor(levels))
    assert shortest(torch.tensor(value)) == value == eval(repr(value))


def test_what_is_given_is_printed_as_it_was():
    assert Levels("Levels", EVEN).value == tuple(EVEN)
    for same in (tuple(EVEN), torch.tensor(EVEN), torch.tensor(EVEN).double().numpy().astype("float32")):
        assert Levels("Levels", same).value == tuple(EVEN)


def test_a_message_moves_levels_and_a_wrong_one_does_not():
    control, seen = Levels("Levels", NF4), []
    control.observe(lambda change: seen.append(change["new"]), "value")
    moved = [*EVEN[:15], 0.95]
    control.set_state({"value": moved})
    assert seen == [tuple(moved)]
    control.set_state({"value": [-1.0, -1.0, *EVEN[2:]]})
    assert control.value == tuple(moved)
    assert control.refused.endswith("which must be 16 ascending numbers in [-1, 1].")
    with pytest.raises(ValueError, match="level 1, -1, is repeated"):
        control.value = [-1.0, -1.0, *EVEN[2:]]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (EVEN[:15], r"^Levels: 15 are given: give 16, ascending, in \[-1, 1\]"),
        ([*EVEN[:3], 0.9, *EVEN[4:]], r"^Levels: level 4, -0.4, comes after 0.9: sort"),
        ([*EVEN[:3], EVEN[2], *EVEN[4:]], r"^Levels: level 3, -0.6, is repeated"),
        ([*EVEN[:3], EVEN[2] + 1e-9, *EVEN[4:]], r"^Levels: level 3, -0.6, is repeated"),  # one float32
        ([*EVEN[:15], 1.5], r"^Levels: level 15 is 1.5: levels are finite and in \[-1, 1\]"),
        ([float("nan"), *EVEN[1:]], r"^Levels: level 0 is nan"),
        ([10**400] * 16, r"^Levels=\[1000.* is not allowed: give 16 ascending numbers in \[-1, 1\]"),
        *((other, r"^Levels=.* is not allowed: give 16") for other in (None, 3, "nf4", {1: 2}, [EVEN], ["a"] * 16)),
    ],
)
def test_the_first_wrong_level_is_named(levels, message):
    with pytest.raises(ValueError, match=message):
        Levels("Levels", levels)


def test_starts_are_checked_and_named():
    assert Levels("Levels", NF4, starts={"even": EVEN}).starts == {"even": tuple(EVEN)}
    with pytest.raises(ValueError, match="^even: 15 are given"):
        Levels("Levels", NF4, starts={"even": EVEN[1:]})
