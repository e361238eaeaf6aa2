"""The tables: NF4 against the published float32 values, the rule for the others, nearest codes against brute force."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from qlora_lab.quant.codebook import (
    CODEBOOKS,
    bits_of,
    codebook,
    evenly_spaced,
    float_levels,
    integer_levels,
    midpoints,
    nearest_codes,
    normal_float,
    normal_offset,
    zero_code,
)

PUBLISHED_NF4 = json.loads((Path(__file__).parents[2] / "data" / "published" / "nf4.json").read_text())["levels"]


def test_nf4_is_the_published_table_bit_for_bit():
    equal = torch.tensor(PUBLISHED_NF4).view(torch.int32) == codebook("nf4").view(torch.int32)
    assert int(equal.sum()) == 16


def test_seven_digits_of_the_offset_matter():
    rule = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    assert normal_offset(4) == 0.9677083 != rule
    assert int((normal_float(4, offset=rule) == torch.tensor(PUBLISHED_NF4)).sum()) == 4


def test_nf3_and_nf2_follow_the_rule():
    """Worked from the rule with the standard library's normal distribution, an implementation apart from scipy's."""
    from statistics import NormalDist

    for bits in (2, 3):
        offset = round(((1 - 1 / (2 * (2**bits - 1))) + (1 - 1 / 2 ** (bits + 1))) / 2, 7)
        q = NormalDist().inv_cdf
        n = 2 ** (bits - 1)
        positive = [q(offset + (0.5 - offset) * i / n) / q(offset) for i in range(n)]
        negative = [-q(offset + (0.5 - offset) * i / (n - 1)) / q(offset) for i in range(n - 1)]
        want = torch.tensor(sorted([*negative, 0.0, *positive]))
        torch.testing.assert_close(codebook(f"nf{bits}"), want, rtol=0, atol=1e-6)  # float32 quantiles


@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_table(name):
    levels = codebook(name)
    assert levels.dtype == torch.float32 and len(levels) == 2 ** bits_of(levels)
    assert levels.max() == 1 and levels[zero_code(levels)] == 0
    assert name.startswith("int") or levels.min() == -1
    ascending = torch.equal(levels, levels.sort().values)
    assert ascending == (name not in ("fp4", "e2m1", "e3m0"))


def test_symmetric_table_leaves_one_code_unused():
    levels = normal_float(4, symmetric=True)
    assert len(levels) == 15 and torch.equal(levels, -levels.flip(0)) and bits_of(levels) == 4


def test_relative_error_of_each_type_on_normal_weights():
    """Relative mean square error at block size 64, against figures from a throw-away implementation with argmin."""
    from qlora_lab.quant.quantize import dequantize, quantize

    weight = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    known = {"nf4": 0.00846, "fp4": 0.01486, "int4": 0.01158, "e2m1": 0.01116, "e3m0": 0.03541}
    for name, want in known.items():
        error = (dequantize(quantize(weight, name)) - weight).square().mean() / weight.square().mean()
        assert error.item() == pytest.approx(want, rel=0.01), name


@pytest.mark.long
@given(
    name=st.sampled_from(CODEBOOKS),
    values=st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=1, max_size=50),
)
def test_nearest_is_nearest(name, values):
    x, levels = torch.tensor(values), codebook(name).double()
    chosen = (levels[nearest_codes(x, codebook(name)).int()] - x).abs()
    best = (levels - x[:, None].double()).abs().min(dim=1).values
    assert (chosen <= best + 1e-7).all()  # float32 midpoints are off by at most half a unit in the last place


def test_ties_go_to_the_lower_level():
    levels = codebook("nf4")
    assert nearest_codes(midpoints(levels), levels).tolist() == list(range(15))
    above = torch.nextafter(midpoints(levels), torch.tensor(2.0))
    assert nearest_codes(above, levels).tolist() == list(range(1, 16))


def test_table_is_a_copy():
    codebook("nf4").zero_()
    assert codebook("nf4")[15] == 1


def test_float_levels_are_the_formats():
    assert (float_levels(2, 1) * 6)[:8].tolist() == pytest.approx([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert float_levels(3, 0)[:8].tolist() == [0, *(2.0**-i for i in range(6, -1, -1))]
    assert torch.signbit(float_levels(2, 1)[8:]).all()


def test_bitsandbytes_fp4_is_not_e2m1():
    """As codebook.py says of them in twelfths: E2M1's smallest step is 1, that of FP4 a sixteenth."""
    assert (codebook("e2m1")[:8] * 12).tolist() == pytest.approx([0, 1, 2, 3, 4, 6, 8, 12])
    assert sorted((codebook("fp4")[:8] * 12).tolist()) == pytest.approx([0, 0.0625, 2, 3, 4, 6, 8, 12])


def test_the_outermost_levels_of_equation_4_are_infinite():
    quantiles = torch.special.ndtri(torch.linspace(0, 1, 17, dtype=torch.float64))  # Q(i / 2^4), i from 0 to 16
    levels = (quantiles[:-1] + quantiles[1:]) / 2
    assert levels[[0, -1]].tolist() == [-torch.inf, torch.inf] and levels[1:-1].isfinite().all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: codebook("nf5"), "'nf5' is not known: choose one of nf4, nf3"),
        (lambda: normal_float(1), "bits=1 is not supported: choose a whole number from 2 to 8"),
        (lambda: normal_float(4, offset=1.0), "offset=1.0 must lie between 0.5 and 1"),
        (lambda: integer_levels(9), "bits=9 is not supported"),
    ],
)
def test_errors_teach(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="there torch.linspace rounds twice")
@pytest.mark.parametrize("start, end", [(0.1, 1.0), (0.9677083, 0.5), (0.7, 0.5)])
def test_evenly_spaced_is_torchs_linspace(start, end):
    for n in (2, 3, 5, 8, 9, 16, 17, 33, 65, 128, 129, 257):
        assert torch.equal(evenly_spaced(start, end, n), torch.linspace(start, end, n))
