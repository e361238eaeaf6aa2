"""Measure how well a table of levels serves: the error it leaves, and how often each code is used.

Source: QLoRA section 3 argues that quantiles of the normal distribution use all codes equally often. That holds for
weights scaled by a constant of the distribution. Absmax scaling instead pins one weight of each block to an end.
"""

from dataclasses import dataclass

import torch

from qlora_lab.quant.blocks import block_absmax, scale_blocks
from qlora_lab.quant.codebook import bits_of, nearest_codes
from qlora_lab.quant.packing import group_of, unpack
from qlora_lab.quant.quantize import QuantizedTensor


@dataclass(frozen=True)
class CodeUse:
    """The use of the codes, and the error."""

    share: torch.Tensor  # (2^bits,) float64: share of the weights that have this code
    relative_error: float  # squared error over squared weight

    @property
    def entropy(self) -> float:
        """Mean bits of information in a code, at most its size. Two codes of one value (FP4's zeros) count as two."""
        used = self.share[self.share > 0]
        return float((used * -used.log2()).sum())  # with this sign a single code has 0, not -0


def code_use(levels: torch.Tensor, blocks: torch.Tensor) -> CodeUse:
    """Quantise `blocks`, (n_blocks, block_size) float32, to `levels`, (n,) float32, with absmax scaling, and count."""
    absmax = block_absmax(blocks)
    codes = nearest_codes(scale_blocks(blocks, absmax), levels)  # (n_blocks, block_size)
    error = levels[codes.int()] * absmax[:, None] - blocks  # (n_blocks, block_size)
    counts = torch.bincount(codes.view(-1).int(), minlength=2 ** bits_of(levels))
    return CodeUse(counts.double() / counts.sum(), float(error.square().sum() / blocks.square().sum()))


def code_counts(q: QuantizedTensor) -> torch.Tensor:
    """Count how often `q` uses each code: (2^bits,) int64."""
    if group_of(q.bits)[1] > 1 or q.numel % group_of(q.bits)[0]:  # codes across bytes, or a padded last group
        return torch.bincount(q.codes.int(), minlength=2**q.bits)
    # Codes fill whole bytes. Counting the 256 kinds of bytes before unpacking is 3 times faster.
    every = torch.arange(256, dtype=torch.uint8, device=q.device)
    codes = unpack(every, 256 * group_of(q.bits)[0], q.bits).view(256, -1)  # (256, codes in a byte)
    counts = torch.bincount(q.packed.int(), minlength=256)[:, None].expand_as(codes)
    return counts.new_zeros(2**q.bits).index_add_(0, codes.reshape(-1).int(), counts.reshape(-1))
