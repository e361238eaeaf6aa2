"""Rung 2. Twin of qlora_lab.quant.quantize.dequantize_blocks: packed bytes and block constants -> weights.

One multiplication a weight, so the result is the twin's, bit for bit. Moved for each weight at block size 64: half a
byte of codes and 4 / 64 byte of constants are read, 2 or 4 bytes are written.
"""

import torch
import triton
import triton.language as tl

from qlora_lab.kernels.triton.codes import levels_of
from qlora_lab.kernels.triton.launch import (
    check_block_size,
    check_device,
    check_output,
    checked_constants,
    named,
    on,
    table_of,
    words_of,
)

TILE = 2048  # weights a program takes: one warp, which waits for no other; twice four words a thread, loaded at once


@triton.jit
def _dequantize_nf4_kernel(words, absmax, levels, out, n_words, numel, BLOCK: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0) * (TILE // 8) + tl.arange(0, TILE // 8)  # words
    packed = tl.load(words + at, mask=at < n_words, other=0)
    constants = tl.load(absmax + at // (BLOCK // 8), mask=at < n_words, other=0.0)
    values = levels_of(packed, levels) * constants[:, None]
    to = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + to, values.to(out.dtype.element_ty), mask=to < numel)


def dequantize_nf4(
    packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, block_size: int, out: torch.Tensor
) -> None:
    """Fill `out`, contiguous float32, bf16 or fp16. Raises ValueError before any launch for what does not match."""
    check_device(packed=packed, levels=levels, out=out, **named(absmax))
    check_block_size(block_size)
    check_output(out)
    numel = out.numel()
    words, constants = words_of(packed, numel), checked_constants(absmax, -(-numel // block_size))
    grid, levels = (triton.cdiv(numel, TILE),), table_of(levels)
    with on(out):
        _dequantize_nf4_kernel[grid](
            words, constants.absmax, levels, out, len(words), numel, block_size, TILE, num_warps=1
        )
