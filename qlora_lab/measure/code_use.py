"""How well a table of levels serves: the error it leaves, and how often each code is used.

In: levels, and weights in blocks. Out: a CodeUse.
Source: QLoRA section 3 argues that quantiles of the normal distribution use all codes equally often. That holds for
weights scaled by a constant of the distribution; absmax scaling pins one weight of every block to an end instead.
"""

from dataclasses import dataclass

import torch

from qlora_lab.quant.blocks import block_absmax, scale_blocks
from qlora_lab.quant.codebook import bits_of, nearest_codes


@dataclass(frozen=True)
class CodeUse:
    """share: (2^bits,) float64, how often each code is used; relative_error: squared error over squared weight."""

    share: torch.Tensor
    relative_error: float

    @property
    def entropy(self) -> float:
        """Bits of information that a code carries on average; at most the bits it takes."""
        used = self.share[self.share > 0]
        return float(-(used * used.log2()).sum())


def code_use(levels: torch.Tensor, blocks: torch.Tensor) -> CodeUse:
    """Quantise `blocks`, (n_blocks, block_size) float32, to `levels`, (n,) float32, with absmax scaling, and count.

    >>> round(code_use(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([[2.0, -2.0, 0.0, 0.0]])).entropy, 6)
    1.5
    """
    absmax = block_absmax(blocks)
    codes = nearest_codes(scale_blocks(blocks, absmax), levels)  # (n_blocks, block_size)
    error = levels[codes.int()] * absmax[:, None] - blocks
    counts = torch.bincount(codes.view(-1).int(), minlength=2 ** bits_of(levels))
    return CodeUse(counts.double() / counts.sum(), float(error.square().sum() / blocks.square().sum()))
