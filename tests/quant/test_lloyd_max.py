"""Lloyd-Max levels: known optima, error that never rises, zero kept; and which tables made by hand can serve."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlora_lab.quant.codebook import CUSTOM, check_levels, codebook, nearest_codes
from qlora_lab.quant.lloyd_max import PASSES, lloyd_max, passes, scaled_sample
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.quant.serialize import from_tensors, to_tensors


def normal_blocks(n: int, block_size: int = 64) -> torch.Tensor:
    weight = torch.randn(n, generator=torch.Generator().manual_seed(0))
    return scaled_sample(weight, block_size, 1.0, torch.Generator().manual_seed(0))


def mean_error(values: torch.Tensor, levels: torch.Tensor) -> float:
    return (levels[nearest_codes(values, levels).int()] - values).double().square().mean().item()


def test_by_hand():
    """Zero takes 0.1 and 0.2, which lie nearer to it than to 0.6 and -0.8; the other cells' means are plain."""
    levels = lloyd_max(torch.tensor([1.0, 0.2, -0.9, 0.6, 0.1, -0.7]), bits=2)
    assert torch.allclose(levels, torch.tensor([-0.8, 0.0, 0.6, 1.0]))


def test_a_tie_goes_to_the_lower_level_as_in_rounding():
    """Half of NF2's third level is as near to zero, which takes it; the third then has no value, and stays."""
    start = codebook("nf2")
    levels = lloyd_max(torch.tensor([start[2] / 2, 0.9]), bits=2)
    assert torch.allclose(levels, torch.tensor([-1.0, 0.0, start[2], 0.9]))


def test_of_uniform_values_levels_are_even():
    """Below zero a cell [-1, -a] with its level in the middle, -(1 + a) / 2, and -a half of that: a = 1/3. Above it two
    levels x and y, x the mean of x / 2 and (x + y) / 2, y that of (x + y) / 2 and 1: y = 2 x and x = 2/5.
    """
    levels = lloyd_max(torch.linspace(-1, 1, 200_001), bits=2)
    assert torch.allclose(levels, torch.tensor([-2 / 3, 0.0, 2 / 5, 4 / 5]), atol=1e-3)


@pytest.mark.parametrize("keep_ends", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_never_rises_and_is_what_rounding_leaves(bits, keep_ends):
    values = normal_blocks(2**15)
    levels, errors = zip(*passes(values, bits, keep_ends=keep_ends), strict=True)
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))
    assert 2 < len(errors) <= PASSES
    for table, error in ((levels[0], errors[0]), (levels[-1], errors[-1])):
        assert mean_error(values, table.float()) == pytest.approx(error, rel=1e-5)
    assert errors[0] == pytest.approx(mean_error(values, codebook(f"nf{bits}")), rel=1e-5)  # where it starts


@pytest.mark.long
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50),
    st.integers(2, 4),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_the_result_is_a_codebook_whatever_the_values(values, bits, keep_ends, random):
    levels = lloyd_max(torch.tensor(values), bits, keep_ends=keep_ends)
    assert torch.equal(check_levels(levels), levels) and levels.dtype == torch.float32
    assert len(levels) == 2**bits and 0.0 in levels.tolist()
    if keep_ends:
        assert levels[[0, -1]].tolist() == [-1.0, 1.0]
    random.shuffle(values)
    assert torch.equal(lloyd_max(torch.tensor(values), bits, keep_ends=keep_ends), levels)


@pytest.mark.long
def test_normal_weights_in_blocks_of_64():
    """0.00799 with ends kept, by another implementation that weighs errors by absmax squared; NF4's is 0.00846."""
    weight = torch.randn(2**19, generator=torch.Generator().manual_seed(1))
    error = {}
    for keep_ends in (True, False):
        levels = lloyd_max(normal_blocks(2**19), keep_ends=keep_ends)
        error[keep_ends] = (
            (dequantize(quantize(weight, levels)) - weight).square().sum() / weight.square().sum()
        ).item()
    assert error[True] == pytest.approx(0.00799, rel=0.01)
    assert error[False] < 0.97 * error[True]


def test_a_sample_is_of_whole_blocks():
    weight = torch.arange(1.0, 65.0)
    sample = scaled_sample(weight, 16, 0.5, torch.Generator().manual_seed(0)).view(-1, 16)
    assert sample.shape == (2, 16) and sample[:, -1].tolist() == [1.0, 1.0]
    assert len(scaled_sample(weight, 16, 1e-9, torch.Generator())) == 16


@pytest.mark.parametrize(
    "values, message",
    [([], "no values"), ([0.1, 1.5], "hold 1.5: give values in"), ([math.nan], "hold nan"), ([-math.inf], "hold -inf")],
)
def test_values_that_are_not_scaled(values, message):
    with pytest.raises(ValueError, match=message):
        lloyd_max(torch.tensor(values))


# ------------------------------------------------------------------------------------------------ tables made by hand


def test_a_name_and_its_table_are_the_same():
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    named, by_hand = quantize(weight, "nf4"), quantize(weight, codebook("nf4"))
    assert torch.equal(by_hand.packed, named.packed) and torch.equal(dequantize(by_hand), dequantize(named))
    assert (by_hand.codebook, named.codebook) == (CUSTOM, "nf4") and "custom" in repr(by_hand)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_table_of_any_length_is_stored_with_its_tensor(double_quant):
    levels = torch.tensor([-0.9, -0.3, 0.2, 0.5, 0.95])  # 3 bits, no zero, no end
    weight = torch.randn(300, generator=torch.Generator().manual_seed(0))
    q = quantize(weight, levels, double_quant=double_quant)
    tensors = to_tensors(q, "w")
    again = from_tensors(tensors, "w")
    assert q.bits == 3 and again.codebook == CUSTOM and torch.equal(dequantize(again), dequantize(q))
    assert "w.quant_state.qlora_lab__custom" in tensors  # a name that bitsandbytes does not know
    tensors["w.quant_map"] = levels.flip(0)
    with pytest.raises(ValueError, match="level 1, 0.5, comes after 0.95"):
        from_tensors(tensors, "w")


def test_changing_the_table_afterwards_changes_nothing():
    levels = codebook("nf4")
    q = quantize(torch.ones(64), levels)
    levels.zero_()
    assert dequantize(q).tolist() == [1.0] * 64


@pytest.mark.parametrize(
    "levels, message",
    [
        ([-1.0, 0.0, 0.0, 1.0], "level 2, 0, is repeated: sort"),
        ([0.1, 0.1 + 1e-12], "level 1, 0.1, is repeated"),
        ([-1.0, 0.5, 0.25, 0.1], "level 2, 0.25, comes after 0.5: sort"),
        ([-1.0, math.nan], "level 1 is nan: levels are finite"),
        ([-1.0, 0.0, math.inf], "level 2 is inf"),
        ([-1.5, 0.0], r"level 0 is -1.5: levels are finite and in \[-1, 1\]"),
        ([0.0], "1 levels are given: a codebook has 2 to 256"),
        (torch.linspace(-1, 1, 257).tolist(), "257 levels are given"),
    ],
)
def test_a_table_that_cannot_serve_is_named(levels, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(64), torch.tensor(levels, dtype=torch.float64))


@pytest.mark.parametrize("levels", [16, [-1.0, 1.0], torch.tensor([[0.0, 1.0]]), torch.tensor([0, 1])])
def test_what_is_no_table(levels):
    with pytest.raises(TypeError, match="give a name, such as 'nf4', or a float tensor of one dimension"):
        quantize(torch.ones(64), levels)
