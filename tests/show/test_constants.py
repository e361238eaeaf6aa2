"""The constants explorer: its bytes are those that the library stores, its errors those of dequantised weights."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.collections import PolyCollection

from qlora_lab.measure.constants import squared_error
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.show.constants import PER_BIT, ROWS, ConstantsExplorer, cells, quantised
from qlora_lab.show.figure import IN_DETAIL

EXPLORER = ConstantsExplorer()
START = EXPLORER.state
STATES = {name: st.sampled_from(control.choices) for name, control in list(EXPLORER._controls.items())[:3]}


def area(outlines: list) -> float:
    """Bits per parameter that rectangles cover."""
    return sum((right - left) * (bottom - top) for (left, top), _, (right, bottom), *_ in outlines) / ROWS


def drawn(collection: PolyCollection) -> float:
    return area([path.vertices for path in collection.get_paths()])


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(st.fixed_dictionaries({**STATES, "mean_offset": st.booleans()}))
def test_any_state(state):
    EXPLORER.set(**state)
    result, block, group = EXPLORER.result, state["block_size"], state["group_size"]
    assert (result["before"], result["after"]) == (32 / block, 8 / block + 32 / (block * group))
    assert drawn(EXPLORER.before.constants) == pytest.approx(result["before"])
    assert drawn(EXPLORER.after.constants) == pytest.approx(8 / block)
    assert drawn(EXPLORER.after.scales) == pytest.approx(32 / (block * group))
    assert result["moved"]["int8"] > 0 and result["moved"]["e4m3"] < result["moved"]["e5m2"]  # one bit less of fraction


def test_the_start_is_what_quantize_stores():
    """With groups of 256 and the mean the explorer's errors and bits are those of double_quant=True."""
    q, nf4, error, squares = quantised(64, 0)
    weight = torch.randn(q.numel, generator=torch.Generator().manual_seed(0))
    weight[:: 2**14] = 0
    double = quantize(weight, double_quant=True)
    EXPLORER.reset()
    result = EXPLORER.result
    assert double.bits_per_parameter - 32 / q.numel == 4 + result["after"]  # the offset is one number a tensor
    assert (dequantize(double) - nf4).square().sum().item() / error == pytest.approx(
        result["moved"]["dynamic"], rel=1e-3
    )
    assert squared_error(weight, quantize(weight)) / squares == pytest.approx(result["relative_error"])


def test_outliers_decide_between_tables():
    """Without outliers the even steps of int8 are finer where most constants lie; an outlier stretches all of them."""
    none, large = (EXPLORER.compute({**START, "outlier": outlier})["moved"] for outlier in (0, 40))
    assert none["int8"] < none["dynamic"] < none["e4m3"] < none["e5m2"]
    assert large["dynamic"] < large["int8"] and large["int8"] > 100 * none["int8"]


def test_the_sentence():
    EXPLORER.reset()
    assert EXPLORER.summary() == (
        "Constants: 0.127 bits per parameter, not 0.5; shifts in percent of NF4's error: dynamic 0.053 %, "
        "int8 0.024 %, "
        f"E4M3 0.19 %, E5M2 0.84 %{IN_DETAIL}blocks of 64, groups of 256, outliers of 0, the mean taken off: relative "
        "error of NF4 0.848 %"
    )
    EXPLORER.set(mean_offset=False)
    assert (
        "shifts in percent of NF4's error: dynamic 0.5" in EXPLORER.summary()
        and "the mean left in" in EXPLORER.summary()
    )


def test_cells_go_down_and_then_to_the_right():
    assert cells(31, 33.5) == [
        [(0.0, 31), (0.125, 31), (0.125, 32), (0.0, 32)],
        [(0.125, 0), (0.25, 0), (0.25, 1.5), (0.125, 1.5)],
    ]
    assert cells(5, 5) == [] and area(cells(0, 4 * PER_BIT * ROWS)) == 4


def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(
        ValueError, match="group_size=100 is not allowed: one of 16, 32, 64, 128, 256, 512. Nearest: 128"
    ):
        EXPLORER.set(group_size=100)
