"""A panel of a matrix holds the weights that the whole matrix has, whatever its codebook, blocks and width."""

import pytest
import torch

from qlora_lab.export import layerwise
from qlora_lab.export.layerwise import panels
from qlora_lab.quant.quantize import dequantize, quantize


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("codebook, block_size", [("nf4", 64), ("nf3", 16), ("int8", 32), ("fp4", 128)])
@pytest.mark.parametrize("shape", [(50, 48), (7, 33), (1, 65), (40, 5)])
def test_panels_are_the_rows_of_the_matrix(shape, codebook, block_size, double_quant, monkeypatch):
    monkeypatch.setattr(layerwise, "PANEL", 500)  # weights: a few rows
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for matrix in (weight, weight.bfloat16(), quantize(weight, codebook, block_size, double_quant)):
        whole = dequantize(matrix, torch.float32) if hasattr(matrix, "codebook") else matrix.float()
        got = torch.full(shape, torch.nan)
        for rows, panel in panels(matrix):
            got[rows] = panel
        assert torch.equal(got, whole)


def test_a_panel_is_small_where_rows_are_whole_blocks(monkeypatch):
    monkeypatch.setattr(layerwise, "PANEL", 500)
    heights = [len(panel) for _, panel in panels(quantize(torch.ones(50, 64), "nf4", 64))]
    assert heights == [7] * 7 + [1]  # 500 // 64 rows
