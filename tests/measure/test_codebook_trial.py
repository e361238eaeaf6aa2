"""Levels and samples that a codebook is tried out with, by hand."""

import pytest
import torch

from qlora_lab.measure.codebook_trial import normal_weights, shaped_levels, some_runs
from qlora_lab.quant.codebook import integer_levels


def test_shaped_levels_are_known_ones():
    """Evenly spaced, 7 and 8 beside zero: the 15 levels of INT4 that are ever used, but for one half step."""
    levels = shaped_levels(curve=1, below=7)
    assert torch.allclose(levels[:8], integer_levels(4)[1:9])
    assert torch.allclose(shaped_levels(below=8, zero=False), torch.linspace(-1, 1, 16))
    assert torch.allclose(shaped_levels(curve=2)[[0, 6, 7, 11]], torch.tensor([-1.0, -1 / 49, 0.0, 0.25]))


@pytest.mark.parametrize("exponent", [-100, 100])
def test_very_small_and_very_large_weights_are_the_same_ones(exponent):
    """In float32 their squares are 0 or infinite, and so would be what is compared."""
    weight = normal_weights(2**12)
    assert torch.equal(some_runs(weight * 2.0**exponent), some_runs(weight))


def test_the_sample_comes_from_everywhere():
    runs = some_runs(torch.arange(2**17).float()) * 2**17
    assert runs.shape == (32, 1024) and runs[0, 0] == 0 and runs[-1, -1] == 2**17 - 1
    assert torch.equal(some_runs(torch.arange(1025.0)) * 1024, torch.arange(1024.0)[None])
