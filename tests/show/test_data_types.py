"""The explorers of data types: what they show is what quantize stores, and nothing leaves their axes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlora_lab.quant.codebook import check_levels, integer_levels
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.show.data_types import (
    LEAST,
    MOST,
    MOST_USED,
    N_WEIGHTS,
    CodebookExplorer,
    OutlierExplorer,
    normal_weights,
    shaped_levels,
    some_runs,
)

OUTLIER, BENT = OutlierExplorer(), CodebookExplorer()


def states(explorer):
    return st.fixed_dictionaries({name: st.sampled_from(c.choices) for name, c in explorer._controls.items()})


def shapes():
    sliders = {name: st.sampled_from(BENT._controls[name].choices) for name in ("curve", "below", "ends", "block_size")}
    return st.fixed_dictionaries({**sliders, "zero": st.booleans()})


def test_the_outlier_of_the_slides():
    """An outlier of -10 leaves about half of the 16 codes of NF4 unused, and more of INT4; only its block suffers."""
    explorer = OutlierExplorer(codebook="nf4", block_size=64)
    assert explorer.result["used"] == 8
    assert OutlierExplorer(codebook="nf4").result["used"] == 9 and OutlierExplorer().result["used"] == 6
    plain = normal_weights(N_WEIGHTS)
    changed = (dequantize(explorer.result["q"]) != dequantize(quantize(plain, "nf4", 64))).view(-1, 64).any(dim=1)
    assert changed.tolist() == [False, True, False, False]  # weight number 100 is in the second block


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
    result = OutlierExplorer(codebook="fp4").result
    assert result["counts"][0] == 1 and result["counts"][1:4].sum() == 0


def test_shaped_levels_are_known_ones():
    """Evenly spaced, 7 and 8 beside zero: the 15 levels of INT4 that are ever used, but for one half step."""
    levels = shaped_levels(curve=1, below=7)
    assert torch.allclose(levels[:8], integer_levels(4)[1:9])
    assert torch.allclose(shaped_levels(below=8, zero=False), torch.linspace(-1, 1, 16))
    assert torch.equal(shaped_levels(curve=2, ends=0.5)[[0, 7, 15]], torch.tensor([-0.5, 0.0, 0.5]))


@settings(max_examples=8, deadline=None)
@given(shapes())
def test_any_shape(state):
    BENT.set(**state)
    result = BENT.result
    levels = check_levels(result["levels"])  # a codebook that quantize takes
    assert len(levels) == 16 and (levels < 0).sum() == state["below"] and (levels == 0).any() == state["zero"]
    assert levels[15] == torch.tensor(state["ends"])
    weight = some_runs(normal_weights(2**15))
    q = quantize(weight, levels, state["block_size"])
    error = (dequantize(q) - weight).square().sum() / weight.square().sum()
    assert result["use"].relative_error == pytest.approx(error.item(), rel=1e-4)
    assert LEAST < 100 * result["use"].relative_error < MOST and 100 * result["use"].share.max() < MOST_USED
    drawn = np.array([line[1][1] for line in BENT.errors.get_segments()])
    found = [result["use"], *result["others"].values()]
    np.testing.assert_allclose(drawn, [100 * use.relative_error for use in found])


def test_the_sentence_and_the_line_to_copy():
    BENT.reset()
    assert BENT.summary().startswith(
        "Curve 1, 7 levels below zero, an exact zero, ends at 1, blocks of 64 normal weights: relative error 1.02 % "
        "(NF4 0.847, FP4 1.49, INT4 1.15, Lloyd-Max 0.768), better than FP4 and INT4; codes used 1.1 to 13.8 % "
    )
    own = CodebookExplorer(3 * normal_weights(2**16).view(256, 256).bfloat16(), curve=2.0)
    assert own.code() == "CodebookExplorer(weight, curve=2.0, below=7, ends=1.0, zero=True, block_size=64)"
    assert "blocks of 64 given weights" in own.summary() and "better than FP4;" in own.summary()


def test_the_sample_comes_from_everywhere():
    runs = some_runs(torch.arange(2**17).float())
    assert runs.shape == (32, 1024) and runs[0, 0] == 0 and runs[-1, -1] == 2**17 - 1
    assert torch.equal(some_runs(torch.arange(1025)), torch.arange(1024.0)[None])
    with pytest.raises(ValueError, match="weight has 1023 elements: give at least 1024"):
        CodebookExplorer(torch.zeros(1023))


def test_states_that_are_not_allowed_are_named():
    with pytest.raises(ValueError, match="outlier=-13 is not allowed: from -12 to 12"):
        OutlierExplorer(outlier=-13)
    with pytest.raises(ValueError, match="codebook='nf5' is not allowed: one of 'nf4', "):
        OutlierExplorer(codebook="nf5")


def test_the_compared_types_are_the_library_s():
    q = quantize(some_runs(normal_weights(2**15)), "int4", 64)
    weight = some_runs(normal_weights(2**15))
    error = (dequantize(q) - weight).square().sum() / weight.square().sum()
    BENT.reset()
    assert BENT.result["others"]["INT4"].relative_error == pytest.approx(error.item(), rel=1e-4)
