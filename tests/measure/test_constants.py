"""Constants in 8 bits with any table: the library's own, cases by hand, and the specification of 8-bit floats."""

import pytest
import torch

from qlora_lab.measure.constants import constants_table, stored_constants
from qlora_lab.quant.double_quant import double_dequantize, double_quantize, dynamic_map


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_stored_constants_are_those_of_the_library(n):
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.1
    want = double_dequantize(double_quantize(absmax))
    torch.testing.assert_close(stored_constants(absmax), want, rtol=2**-22, atol=0)  # their means are summed in pieces


def test_linear_int8_by_hand():
    """Mean 2, scale 2.5: -50.8, -50.8, -25.4 and 127 of 127 steps; with the mean left in 28.2, 28.2, 42.3 and 127."""
    absmax = torch.tensor([1.0, 1.0, 1.5, 4.5])
    got, without = (stored_constants(absmax, "int8", mean_offset=mean) for mean in (True, False))
    torch.testing.assert_close(got, 2 + 2.5 / 127 * torch.tensor([-51.0, -51, -25, 127]))
    torch.testing.assert_close(without, 4.5 / 127 * torch.tensor([28.0, 28, 42, 127]))


def test_groups_have_their_own_scale():
    """Two groups of 16, one a thousand times as large: the small one is exact only where it has its own scale."""
    absmax = torch.cat([torch.full((16,), 0.002), torch.full((16,), 2.0)])
    apart, together = (stored_constants(absmax, "int8", size, mean_offset=False) for size in (16, 32))
    assert torch.equal(apart, absmax) and together[:16].eq(0).all()


def test_fp8_tables_are_those_of_their_specification():
    """OCP 8-bit floats: E4M3 reaches 448 in steps from 2^-9, E5M2 57344 from 2^-16; NaN and infinity are left out."""
    for name, largest, least, count in (("e4m3", 448, 2**-9, 254), ("e5m2", 57344, 2**-16, 248)):
        values = largest * constants_table(name)
        assert len(values) == count and (values.max(), values.min()) == (largest, -largest)
        assert values[values > 0].min().item() == pytest.approx(least)
    assert torch.equal(constants_table("dynamic"), dynamic_map())


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match="table 'fp8' is not known: choose one of dynamic, int8, e4m3, e5m2"):
        stored_constants(torch.ones(4), "fp8")
