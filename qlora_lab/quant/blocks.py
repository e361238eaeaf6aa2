"""Blocks: each run of `block_size` neighbouring weights shares one constant, its largest magnitude.

In: a weight of any shape. Out: blocks, (n_blocks, block_size) float32, and absmax, (n_blocks,) float32.
Source: QLoRA section 2, "Block-wise k-bit quantization". The weight is flattened row by row first, so a block can
straddle two rows. The last block may be partial: it is padded with zeros, which change no maximum.
"""

from reprlib import repr as short

import torch

MIN_BLOCK, MAX_BLOCK = 16, 4096  # below 16 constants cost more than 2 bits a weight; 4096 is bitsandbytes' largest
TINY = 1e-38  # blocks of zeros or denormals are scaled by 1 / TINY, not by infinity, as in bitsandbytes on the CPU


def check_block_size(block_size: int) -> None:
    """Raise TypeError or ValueError unless `block_size` is a whole number from 16 to 4096."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size={short(block_size)} must be a whole number, such as 64")
    if not MIN_BLOCK <= block_size <= MAX_BLOCK:
        sizes = f"from {MIN_BLOCK} to {MAX_BLOCK}, usually 64"
        raise ValueError(f"block_size={short(block_size)} is not allowed: choose {sizes}")


def to_blocks(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """(any shape) -> (n_blocks, block_size) float32, row-major, the last block padded with zeros.

    Shares the memory of `weight` where it can.
    """
    flat = weight.reshape(-1).float()  # (numel,)
    if missing := -len(flat) % block_size:  # pad() copies even where there is nothing to add
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(-1, block_size)  # (n_blocks, block_size)


def block_absmax(blocks: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block: (n_blocks, block_size) -> (n_blocks,) float32."""
    return blocks.abs().amax(dim=1)  # a NaN in a block makes its maximum NaN


def scale_blocks(blocks: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Divide each block by its absmax, so that it lies within [-1, 1]: (n_blocks, block_size) float32.

    Multiplies by the reciprocal, as bitsandbytes does: its bytes can only be matched that way.
    """
    return (blocks * absmax.clamp(min=TINY).reciprocal()[:, None]).clamp(-1, 1)  # rounding can exceed 1 in the last bit
