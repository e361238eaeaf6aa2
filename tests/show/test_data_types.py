"""The explorers of data types: what they show is what quantize stores, and nothing leaves their axes."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlora_lab.measure.codebook_trial import normal_weights, shaped_levels, some_runs
from qlora_lab.measure.in_place import Variant, checked
from qlora_lab.quant.codebook import codebook
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.show.data_types import (
    LEAST,
    MOST,
    MOST_USED,
    N_WEIGHTS,
    STARTS,
    CodebookExplorer,
    OutlierExplorer,
)
from qlora_lab.show.figure import IN_DETAIL
from qlora_lab.show.levels import shortest

OUTLIER, MINE = OutlierExplorer(), CodebookExplorer()
START = OUTLIER.state
LEVELS = st.lists(st.integers(-100, 100), min_size=16, max_size=16, unique=True).map(sorted)


def states(explorer):
    return st.fixed_dictionaries({name: st.sampled_from(c.choices) for name, c in explorer._controls.items()})


def test_the_outlier_of_the_slides():
    """An outlier of -10 leaves about half of the 16 codes of NF4 unused, and more of INT4; only its block suffers."""
    used = {name: OUTLIER.compute({**START, "codebook": name})["used"] for name in ("nf4", "int4")}
    assert used == {"nf4": 9, "int4": 6}
    spoilt = OUTLIER.compute({**START, "codebook": "nf4", "block_size": 64})
    assert spoilt["used"] == 8
    plain = normal_weights(N_WEIGHTS)
    changed = (dequantize(spoilt["q"]) != dequantize(quantize(plain, "nf4", 64))).view(-1, 64).any(dim=1)
    assert changed.tolist() == [False, True, False, False]  # weight number 100 is in the second block


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(states(OUTLIER))
def test_any_outlier(state):
    OUTLIER.set(**state)
    result, start = OUTLIER.result, state["position"] // state["block_size"] * state["block_size"]
    block = slice(start, start + state["block_size"])
    weight = normal_weights(N_WEIGHTS).clone()
    weight[state["position"]] = state["outlier"]
    q = quantize(weight, state["codebook"], state["block_size"])
    assert result["used"] == len(q.codes[block].unique()) and result["counts"].sum() == state["block_size"]
    others = torch.arange(N_WEIGHTS)[block] != state["position"]
    error = (dequantize(q) - weight)[block][others].square().sum() / weight[block][others].square().sum()
    assert result["error"] == pytest.approx(error.item())
    heights = [line[1][1] for line in OUTLIER.bars.get_segments()]
    assert sum(heights) == pytest.approx(100) and len(OUTLIER.unused.get_xdata()) == len(q.levels) - result["used"]
    drawn = {round(line[0][1], 4) for line in OUTLIER.levels.get_segments() if line[0][0] == start}
    assert drawn == {round(value, 4) for value in dequantize(q)[block].tolist()}  # lines in use are where weights lie


def test_fp4_is_shown_by_size_of_its_levels():
    """Bit patterns are another order: the outlier of -10 has the lowest level, and so the first bar."""
    result = OUTLIER.compute({**START, "codebook": "fp4"})
    assert result["counts"][0] == 1 and result["counts"][1:4].sum() == 0


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(LEVELS, st.sampled_from([16, 64, 256, 1024]))
def test_any_levels(hundredths, block_size):
    levels = [n / 100 for n in hundredths]
    MINE.set(levels=levels, block_size=block_size)
    use, weight = MINE.result["use"], some_runs(normal_weights(2**15))
    q = quantize(weight, MINE.levels, block_size)  # a codebook that quantize takes
    assert MINE.state["levels"] == tuple(levels)
    error = (dequantize(q) - weight).square().sum() / weight.square().sum()
    assert use.relative_error == pytest.approx(error.item(), rel=1e-4)
    assert [line[0][0] for line in MINE.lines.get_segments()] == pytest.approx(levels)
    drawn = [line[1][1] for line in MINE.errors.get_segments()]
    found = [100 * one.relative_error for one in (use, *MINE.result["others"].values())]
    assert drawn == pytest.approx([min(max(error, LEAST), MOST) for error in found])
    assert [("↑" in text.get_text()) for text in MINE.values] == [error > MOST for error in found]
    bars, share = [line[1][1] for line in MINE.bars.get_segments()], 100 * use.share
    assert bars == pytest.approx(share.clamp(max=MOST_USED).tolist())
    assert MINE.beyond.get_xdata().tolist() == [i for i, one in enumerate(share) if one > MOST_USED]


@pytest.mark.long
def test_the_sentence_and_the_line_to_copy():
    MINE.reset()
    assert MINE.summary().startswith(
        "Relative error 0.847 % (NF4 0.847, FP4 1.49, INT4 1.15, Lloyd-Max 0.768), better than FP4 and INT4"
        f"{IN_DETAIL}Levels -1 -0.696 -0.525 -0.395 -0.284 -0.185 -0.0911 0 0.0796 0.161 0.246 0.338 0.441 0.563 "
        "0.723 1, blocks of 64 normal weights; codes used 1.7 to 9.3 % of the time, "
    )
    weight = 3 * normal_weights(2**16).view(256, 256).bfloat16()
    own = CodebookExplorer(weight, levels=shaped_levels(2.0), block_size=16)
    assert own.code().startswith("CodebookExplorer(weight, levels=(-1.0, -0.7346939, ")
    assert "blocks of 16 given weights" in own.summary() and f", better than FP4{IN_DETAIL}" in own.summary()
    again = eval(own.code())
    assert again.png == own.png and again.summary() == own.summary()
    own.set(**MINE.state)
    assert torch.equal(own.levels, codebook("nf4"))
    own.reset()
    assert own.state == again.state


@pytest.mark.long
def test_a_picture_does_not_depend_on_the_one_before_it():
    """Levels that leave 1000 % of error, with the widest of texts, first or second."""
    extreme = {"levels": [0.85 + n / 100 for n in range(16)], "block_size": 1024}
    first = CodebookExplorer(**extreme)
    MINE.set(**extreme)
    assert first.png == MINE.png and "Relative error 1002 %" in first.summary()
    MINE.reset()
    first.set(**MINE.state)
    assert first.png == MINE.png


def test_handles_stand_over_the_lines_of_the_picture():
    ax = MINE.lines.axes
    ends = ax.transData.transform([(-1, 0), (1, 0)])[:, 0] / ax.figure.bbox.width
    assert MINE._controls["levels"].span == pytest.approx(ends)


def test_starts_are_tables_and_lloyd_max_fits_the_blocks():
    starts = {}
    for size in (16, 1024):
        MINE.set(block_size=size)
        starts[size] = MINE._controls["levels"].starts
        assert starts[size] == {**STARTS, "Lloyd-Max": shortest(torch.tensor(starts[size]["Lloyd-Max"]))}
        MINE.set(levels=starts[size]["Lloyd-Max"])
        assert MINE.result["use"].relative_error == MINE.result["others"]["Lloyd-Max"].relative_error
    assert starts[16] != starts[1024]


def test_levels_serve_a_sweep():
    MINE.reset()
    for levels in (MINE.levels, MINE.state["levels"]):
        variant = checked(Variant("mine", block_size=64, levels=levels))
        assert torch.equal(variant.levels, codebook("nf4"))


@pytest.mark.slow
def test_one_value_alone_leaves_no_error():
    alone = CodebookExplorer(torch.ones(1024))
    line = "Relative error 0 % (NF4 0, FP4 0, INT4 0, Lloyd-Max 0), better than none of them"
    assert alone.summary().startswith(f"{line}{IN_DETAIL}")
    assert alone.summary().endswith(" 0.00 bits of information in 4")


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.zeros(1023), ValueError, "weight has 1023 elements: give at least 1024"),
        (torch.zeros(1024), ValueError, "the largest of the weights is 0: nothing can be compared"),
        (torch.full((1024,), torch.nan), ValueError, "the largest of the weights is nan"),
        (torch.full((1024,), torch.inf), ValueError, "the largest of the weights is inf"),
        (torch.zeros(1024, dtype=torch.uint8), TypeError, "weight is torch.uint8: give a tensor of floats"),
        ([0.5] * 16, TypeError, "weight is list: give a tensor of floats"),
    ],
)
def test_weights_that_cannot_be_compared(weight, error, message):
    with pytest.raises(error, match=message):
        CodebookExplorer(weight)


def test_states_that_are_not_allowed_are_named():
    with pytest.raises(ValueError, match="outlier=-13 is not allowed: from -12 to 12"):
        OUTLIER.set(outlier=-13)
    with pytest.raises(ValueError, match="codebook='nf5' is not allowed: one of 'nf4', "):
        OUTLIER.set(codebook="nf5")
    with pytest.raises(ValueError, match="levels: level 1, -1, is repeated"):
        MINE.set(levels=[-1.0] * 16)
    with pytest.raises(ValueError, match="CodebookExplorer has no field 'curve': use levels, block_size"):
        MINE.set(curve=1.0)


def test_the_compared_types_are_the_library_s():
    q = quantize(some_runs(normal_weights(2**15)), "int4", 64)
    weight = some_runs(normal_weights(2**15))
    error = (dequantize(q) - weight).square().sum() / weight.square().sum()
    MINE.reset()
    assert MINE.result["others"]["INT4"].relative_error == pytest.approx(error.item(), rel=1e-4)
