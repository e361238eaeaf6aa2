"""The midpoint explorer: what it shows is what a block of 64 weights stores."""

import pytest
import torch

from qlora_lab.quant.codebook import codebook
from qlora_lab.quant.quantize import quantize
from qlora_lab.show.midpoint import MidpointExplorer

EXPLORER = MidpointExplorer()
LEVELS = codebook("nf4")


@pytest.mark.long
def test_every_state_is_what_a_block_stores():
    """All codes and changes at once: the first weight of each block holds the constant."""
    for code in range(1, 14):
        changes = torch.arange(-25, 26) / 100
        blocks = torch.stack([torch.ones(51), LEVELS[code] + changes], dim=1)  # (51, 2)
        blocks = torch.cat([blocks, torch.zeros(51, 62)], dim=1)
        stored = quantize(blocks, "nf4", block_size=64).codes.view(51, 64)[:, 1].tolist()
        found = [MidpointExplorer.compute({"code": code, "change": change}) for change in range(-25, 26)]
        assert [result["code"] for result in found] == stored
        assert all(result["stored"] == LEVELS[code] for result, code in zip(found, stored, strict=True))
        assert all(result["below"] < result["level"] < result["above"] for result in found)


@pytest.mark.parametrize(("change", "stored"), [(3, 7), (4, 8), (-4, 7), (-5, 6)])
def test_a_state_is_drawn(change, stored):
    """Zero's neighbours are -0.0911 and 0.0796, so its midpoints are -0.0455 and 0.0398."""
    EXPLORER.set(code=7, change=change)
    (x,), (y,) = EXPLORER.stored.get_data()
    assert (x, y) == pytest.approx((100 * LEVELS[stored].item(), 0), abs=1e-4)
    ((left, right),) = EXPLORER.kept.get_segments()
    assert (left[0], right[0]) == pytest.approx((-4.55, 3.98), abs=0.01)
    assert [text.get_text() for text in EXPLORER.names if text.get_text()] == ["4", "5", "6", "7", "8", "9", "10", "11"]


def test_the_sentences():
    EXPLORER.reset()
    assert EXPLORER.summary() == (
        "A weight at code 7, a change of +3 % of absmax: the code stays, and nothing of the change is stored; "
        "the midpoints lie at -4.6 and +4.0 %"
    )
    EXPLORER.set(change=5)
    assert "+5 % of absmax: the code becomes 8, and +8.0 % is stored" in EXPLORER.summary()


@pytest.mark.long
def test_a_picture_does_not_depend_on_the_one_before_it():
    EXPLORER.set(code=13, change=-25)
    EXPLORER.set(code=2, change=10)
    assert MidpointExplorer(code=2, change=10).png == EXPLORER.png


def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="code=15 is not allowed: from 1 to 13 in steps of 1. Nearest: 13"):
        EXPLORER.set(code=15)
