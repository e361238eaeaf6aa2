"""The NormalFloat explorer: what it shows is what the library computes, in every state."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlora_lab.quant.codebook import codebook, normal_float, normal_offset
from qlora_lab.show.normal_float import RULE, NormalFloatExplorer

EXPLORER = NormalFloatExplorer()


def test_starts_at_nf4():
    explorer = NormalFloatExplorer()
    assert torch.equal(explorer.result["levels"], codebook("nf4"))
    assert "4 bits, offset 0.9677083 by the rule: 16 levels, relative error 0.8" in explorer.summary()


@pytest.mark.long
@settings(deadline=None, max_examples=15)
@given(
    bits=st.integers(2, 6),
    offset=st.sampled_from(EXPLORER._controls["offset"].choices),
    symmetric=st.booleans(),
)
def test_any_state(bits, offset, symmetric):
    EXPLORER.set(bits=bits, offset=offset, symmetric=symmetric)
    levels = normal_float(bits, None if offset == RULE else offset, symmetric)
    assert torch.equal(EXPLORER.result["levels"], levels)
    drawn = np.array([segment[0][0] for segment in EXPLORER.levels.get_segments()])
    np.testing.assert_allclose(drawn, levels, rtol=1e-6)
    assert len(EXPLORER.bars.get_segments()) == 2**bits
    assert f"{len(levels)} levels" in EXPLORER.summary()


@pytest.mark.long
@pytest.mark.parametrize("bits", range(2, 7))
def test_each_width_has_the_offset_of_the_rule(bits):
    """With NF4's offset NF6 was shown better than it is."""
    explorer = NormalFloatExplorer(bits=bits)
    assert torch.equal(explorer.result["levels"], normal_float(bits))
    assert f"offset {normal_offset(bits):.7g} by the rule" in explorer.summary()


@pytest.mark.long
def test_nf4_stays_behind_as_a_ghost():
    explorer = NormalFloatExplorer(bits=2)
    ghost, moving = explorer.levels.axes.collections[:2]
    assert moving is explorer.levels and ghost.get_zorder() <= moving.get_zorder() and not ghost.get_animated()
    assert [segment[0][0] for segment in ghost.get_segments()] == codebook("nf4").tolist()


@pytest.mark.long
def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="bits=7 is not allowed: from 2 to 6"):
        NormalFloatExplorer(bits=7)


@pytest.mark.long
def test_axes_stand_still_and_no_label_leaves_the_picture():
    """Each width has limits of its own. If its labels moved the axes, no background could be kept."""
    explorer = NormalFloatExplorer()
    fig = explorer.lower.figure
    places = [ax.get_position().bounds for ax in fig.axes]
    for bits in (2, 6):
        explorer.set(bits=bits)
        assert [ax.get_position().bounds for ax in fig.axes] == places
        shown = fig.get_tightbbox()  # inches
        assert shown.x0 >= 0 and shown.y0 >= 0 and shown.x1 <= fig.bbox_inches.x1 and shown.y1 <= fig.bbox_inches.y1


@pytest.mark.long
def test_no_bar_leaves_the_picture():
    explorer = NormalFloatExplorer()
    choices = (range(2, 7), explorer._controls["offset"].choices, (False, True))
    for bits, offset, symmetric in itertools.product(*choices):
        explorer.set(bits=bits, offset=offset, symmetric=symmetric)
        highest = max(end[1] for _, end in explorer.bars.get_segments())
        assert highest < explorer.lower.get_ylim()[1], explorer.code()
