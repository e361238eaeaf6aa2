"""Lloyd-Max: levels with the least squared error on given values, found by two rules in turn.

Source: Lloyd, "Least squares quantization in PCM" (1957, printed 1982), method I; Max, "Quantizing for minimum
distortion" (1960). Rule 1: a value takes the nearest level, so cells end at midpoints. Rule 2: a level is the mean of
its cell. Neither can raise the error, so it falls until nothing moves; that is a minimum, perhaps not the least one.

It starts from NormalFloat's levels, so on the values it is fitted to the result is never worse than these.
Fitted to 2^20 weights of SmolLM2-135M in blocks of 64, it leaves a relative squared error, in thousandths: NF4 8.72;
with zero and both ends kept 8.44; with zero alone 8.11; with nothing kept 8.07.
Zero is kept, which costs 0.5 % of error: padding, pruned and dead weights are zero, and must stay so. The ends at -1
and 1 are not kept: that would make the largest weight of each block exact, but cost 4 % of error (11 % in blocks of
1024).

But: the error that falls is that of scaled values. In the weights' own units each counts by its block's absmax squared;
a fit to that lowers 8.11 to 8.09.
Less error need not mean a better model: on 64 windows of 512 tokens, SmolLM2's perplexity with fitted levels and with
NF4 is a tie, 0.7 % more, -0.3 to 1.8 (bench/data_types.json).
"""

from collections.abc import Iterator

import torch

from qlora_lab.quant.blocks import block_absmax, check_block_size, scale_blocks, to_blocks
from qlora_lab.quant.codebook import midpoints, normal_float, zero_code

PASSES = 500  # 16 levels take about 120; a bound for slower cases
SMALLEST_GAIN = 1e-7  # in a pass, relative to the error: 100 more such passes would not change a figure above


def lloyd_max(values: torch.Tensor, bits: int = 4, *, keep_ends: bool = False) -> torch.Tensor:
    """Fit levels to `values`, any shape, float32 in [-1, 1]: (2^bits,) float32, ascending, 0 among them.

    bits: 2 to 8. keep_ends: leave the outermost levels at -1 and 1. The order of the values does not matter.
    Raises ValueError for an empty tensor, and for a value that is not finite or not in [-1, 1].

    >>> lloyd_max(torch.tensor([-0.9, -0.7, 0.1, 0.2, 0.6, 1.0]), bits=2)
    tensor([-0.8000,  0.0000,  0.6000,  1.0000])
    """
    *_, (levels, _) = passes(values, bits, keep_ends=keep_ends)
    return levels.float()


def passes(values: torch.Tensor, bits: int = 4, *, keep_ends: bool = False) -> Iterator[tuple[torch.Tensor, float]]:
    """Yield each pass of lloyd_max, the start included: levels, (2^bits,) float64, and their mean squared error."""
    cells = _Cells(values)
    start = normal_float(bits)
    kept = [zero_code(start), *([0, len(start) - 1] if keep_ends else [])]
    levels = start.double()
    before = None  # the error of the last pass
    for _ in range(PASSES + 1):
        error, means = cells.measure(levels)
        if before is not None and before - error <= SMALLEST_GAIN * before:
            return
        yield levels, error
        means[kept] = levels[kept]
        levels = means
        before = error


def scaled_sample(weight: torch.Tensor, block_size: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Draw a `share` of the blocks of `weight`, at least one, without repeats, over their absmax: (n,) float32."""
    check_block_size(block_size)
    blocks = to_blocks(weight, block_size)  # (n_blocks, block_size)
    n = min(len(blocks), max(1, round(share * len(blocks))))
    some = blocks[torch.randperm(len(blocks), generator=generator)[:n].to(blocks.device)]  # (n, block_size)
    return scale_blocks(some, block_absmax(some)).view(-1)  # (n * block_size,)


class _Cells:
    """Sorted values with running sums: the sum of any run is one difference, so a pass costs 15 binary searches."""

    def __init__(self, values: torch.Tensor):
        if not values.numel():
            raise ValueError("no values are given: levels are fitted to at least one")
        outside = ~(values.abs() <= 1)  # NaN is outside, too
        if outside.any():
            value = values[outside][0].item()
            raise ValueError(f"values hold {value:g}: give values in [-1, 1], as weights over their absmax are")
        self.values = values.detach().reshape(-1).cpu().sort().values.double()  # float64: sums of a million squares
        self.sums = torch.nn.functional.pad(self.values.cumsum(0), (1, 0))  # (n + 1,), from an empty run on
        self.squares = self.values.square().sum()

    def measure(self, levels: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Return the mean squared error with `levels`, (n_levels,) float64, and the mean of each cell."""
        inner = torch.searchsorted(self.values, midpoints(levels), right=True)  # a tie goes to the lower level
        ends = torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=len(self.values))
        count = ends.diff()  # (n_levels,)
        total = self.sums[ends].diff()  # (n_levels,)
        # sum of (v - l)^2 over a cell, multiplied out
        error = self.squares + (levels.square() * count - 2 * levels * total).sum()
        # an empty cell keeps its level
        return float(error) / len(self.values), torch.where(count > 0, total / count.clamp(min=1), levels)
