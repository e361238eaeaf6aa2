"""Rung 2. Twin of qlora_lab.quant.quantize.dequantize_blocks: packed bytes and block constants -> weights.

One multiplication per weight, so the result is the twin's, bit for bit. Moved for each weight at block size 64: half a
byte of codes and 4 / 64 byte of constants are read, 2 or 4 bytes are written.
"""

import torch
import triton
import triton.language as tl

from qlora_lab.kernels.triton import launch
from qlora_lab.kernels.triton.codes import levels_of

TILE = 2048  # weights a program takes: one warp, which waits for no other, with eight words for each thread


@triton.jit
def _dequantize_nf4_kernel(words, absmax, levels, out, n_words, numel, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    pid = tl.program_id(0)
    offsets = pid * (TILE // 8) + tl.arange(0, TILE // 8)  # of words: eight weights each
    mask = offsets < n_words
    packed = tl.load(words + offsets, mask=mask, other=0)
    constants = tl.load(absmax + offsets // (BLOCK_SIZE // 8), mask=mask, other=0.0)  # one for each word
    values = levels_of(packed, levels) * constants[:, None]  # (words, 8)
    offsets = offsets[:, None] * 8 + tl.arange(0, 8)[None, :]  # of weights
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=offsets < numel)


def dequantize_nf4(
    packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, block_size: int, out: torch.Tensor
) -> None:
    """Fill `out`, contiguous float32, bf16 or fp16. Raises ValueError before any launch for what does not match."""
    words, constants, levels = launch.checked_codes(packed, absmax, levels, block_size, out)
    numel = out.numel()
    grid = (triton.cdiv(numel, TILE),)
    with launch.on(out):
        _dequantize_nf4_kernel[grid](
            words, constants.absmax, levels, out, len(words), numel, block_size, TILE, num_warps=1
        )
