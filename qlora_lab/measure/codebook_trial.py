"""Try a codebook out: weights to try it on, levels of a simple shape, and the damage of one outlier.

"Error" is squared error over squared weight.
"""

import math
from functools import lru_cache

import torch

from qlora_lab.quant.quantize import QuantizedTensor, dequantize

SAMPLE = 2**15  # weights of a layer that a codebook is tried on, as in notebook 01
LARGEST_BLOCK = 1024


@lru_cache
def normal_weights(n: int) -> torch.Tensor:
    """Draw (n,) float32, standard normal, always the same."""
    return torch.randn(n, dtype=torch.float32, generator=torch.Generator().manual_seed(0))


def some_runs(weight: torch.Tensor) -> torch.Tensor:
    """Take at most 32,768 weights, in runs of 1,024 neighbours spread evenly over all: (n_runs, 1024) float32.

    A power of two scales them, which changes no code: squares of very small or large weights would leave float32.
    Raises TypeError unless `weight` is a tensor of floats. Raises ValueError for fewer weights than a run (zeros would
    pad a partial block, and zeros are not weights), for NaN and infinity, and for zeros alone.
    """
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise TypeError(f"weight is {kind}: give a tensor of floats, a layer's weight before it is quantised")
    n_runs = weight.numel() // LARGEST_BLOCK
    if not n_runs:
        raise ValueError(f"weight has {weight.numel()} elements: give at least {LARGEST_BLOCK}, such as a linear layer")
    runs = weight.detach().reshape(-1)[: n_runs * LARGEST_BLOCK].view(n_runs, LARGEST_BLOCK)
    spread = torch.linspace(0, n_runs - 1, min(n_runs, SAMPLE // LARGEST_BLOCK), dtype=torch.float32).long()
    chosen = runs[spread].double().cpu()
    largest = float(chosen.abs().max())
    if not 0 < largest < math.inf:  # false for NaN, too
        raise ValueError(f"the largest of the weights is {largest:g}: nothing can be compared on them, give others")
    return chosen.mul(2.0 ** -math.frexp(largest)[1]).float()  # the largest is now in [0.5, 1)


def shaped_levels(curve: float = 1.0, below: int = 7, zero: bool = True) -> torch.Tensor:
    """Make 16 levels, ascending, float32: `below` of them negative, 0 if `zero`, the others positive.

    On either side level i of n is (i / n)^curve: evenly spaced for curve 1, dense near zero above. Without a zero the
    two innermost levels move half a step towards it, so that the gap between them is as wide as the next one.

    >>> shaped_levels(below=7)[[0, 6, 7, 8, 15]].tolist()
    [-1.0, -0.1428571492433548, 0.0, 0.125, 1.0]
    """
    half = 0.0 if zero else 0.5  # a step

    def side(n: int) -> torch.Tensor:
        return ((torch.arange(1, n + 1, dtype=torch.float32) - half) / (n - half)) ** curve  # (n,)

    middle = torch.zeros(int(zero), dtype=torch.float32)
    return torch.cat([-side(below).flip(0), middle, side(16 - below - len(middle))])


def stretched_density(x: torch.Tensor, offset: float) -> torch.Tensor:
    """Return the normal density at `x`, 1 at its top, after the quantile `offset` is stretched to x = 1.

    >>> stretched_density(torch.tensor([0.0, 1.0]), 0.8413447).round(decimals=4).tolist()  # one standard deviation
    [1.0, 0.6065000295639038]
    """
    edge = torch.special.ndtri(torch.tensor(offset, dtype=torch.float32))  # standard deviations
    return torch.exp(-((x * edge) ** 2) / 2)


def error_beside(weight: torch.Tensor, q: QuantizedTensor, position: int) -> float:
    """Return the error of the other weights in the block of weight number `position`."""
    start = position // q.block_size * q.block_size
    others = [i for i in range(start, start + q.block_size) if i != position]
    error = (dequantize(q) - weight)[others].square().sum() / weight[others].square().sum()
    return float(error)


def block_counts(q: QuantizedTensor, position: int) -> torch.Tensor:
    """Count the codes in the block of weight number `position`: (2^bits,) int64, ordered by the codes' levels."""
    start = position // q.block_size * q.block_size
    counts = torch.bincount(q.codes[start : start + q.block_size].int(), minlength=len(q.levels))
    return counts[q.levels.argsort(stable=True)]  # fp4's codes are bit patterns, not in the order of their levels
