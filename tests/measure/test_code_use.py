"""Counting codes: a hand-worked case, and the measured fact that notebook 01 tells."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type

from qlora_lab.measure.code_use import code_use
from qlora_lab.measure.published import published_af4, published_nf4
from qlora_lab.quant.blocks import to_blocks
from qlora_lab.quant.codebook import codebook


def test_by_hand():
    blocks = torch.tensor([[4.0, -4.0, 1.0, 0.0]])  # scaled: 1, -1, 0.25, 0; levels -1, 0, 1: error only at 0.25
    use = code_use(torch.tensor([-1.0, 0.0, 1.0, 2.0]), blocks)
    assert use.share.tolist() == [0.25, 0.5, 0.25, 0.0] and use.entropy == 1.5
    assert use.relative_error == pytest.approx(1 / 33)


def test_nf4_codes_are_not_used_equally():
    """3.884 bits of 4, as a throw-away implementation with argmin gave; the most used code is the one below zero."""
    weights = torch.randn(2**20, generator=torch.Generator().manual_seed(1))
    use = code_use(codebook("nf4"), to_blocks(weights, 64))
    assert use.entropy == pytest.approx(3.884, abs=0.002)
    assert use.share.max() == pytest.approx(0.093, abs=0.001) and use.share.argmax() == 6
    assert 0.016 < use.share.min() < 0.019


def test_the_published_tables():
    assert torch.equal(published_nf4(), codebook("nf4"))
    listed = get_4bit_type("af4", device="cpu", blocksize=64)
    assert torch.equal(published_af4(), listed.flip(0)) and listed.diff().max() < 0
