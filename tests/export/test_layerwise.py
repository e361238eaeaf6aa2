"""A model that is read layer by layer computes as transformers' own does; a panel holds the weights of its matrix."""

import pytest
import torch

from qlora_lab.export import layerwise
from qlora_lab.export.layerwise import panels
from qlora_lab.quant.quantize import dequantize, quantize
from tests.model.families import FAMILIES, tiny


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


QUICK = ("Llama4Text", "GPT2", "Mixtral")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_logits_are_those_of_transformers(tmp_path, family):
    theirs = tiny(family)
    theirs.save_pretrained(tmp_path)
    ours = layerwise.layerwise(tmp_path)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        for _ in range(2):  # the second pass begins with what the first has left
            got, want = (model(input_ids=ids, use_cache=False).logits for model in (ours, theirs))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # float32, perhaps summed in another order
