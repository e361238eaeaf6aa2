"""Rung 3. Twin of qlora_lab.quant: dequantize_blocks(packed, double_dequantize(constants), ...), in one launch.

The constants are undone on the way: code -> table -> times the group's scale -> plus the offset, each rounded like the
twin's (no fused multiply-add). Moved for each weight at block size 64: half a byte of codes and 1 / 64 byte of
constants' codes are read, 2 or 4 bytes are written; two launches would write and read 4 / 64 byte more.
"""

import torch
import triton
import triton.language as tl

from qlora_lab.kernels.packed_weight import PackedConstants
from qlora_lab.kernels.triton import launch
from qlora_lab.kernels.triton.codes import constants_of, levels_of
from qlora_lab.kernels.triton.dequantize_nf4 import TILE
from qlora_lab.kernels.triton.launch import NO_FUSION


@triton.jit
def _dequantize_double_kernel(
    words, codes, scale, offset, table, levels, out, n_words, numel,
    BLOCK_SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offsets = pid * (TILE // 8) + tl.arange(0, TILE // 8)  # of words: eight weights each
    mask = offsets < n_words
    packed = tl.load(words + offsets, mask=mask, other=0)
    constants = constants_of(offsets // (BLOCK_SIZE // 8), mask, codes, scale, offset, table, GROUP_SIZE)
    values = levels_of(packed, levels) * constants[:, None]  # (words, 8)
    offsets = offsets[:, None] * 8 + tl.arange(0, 8)[None, :]  # of weights
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=offsets < numel)


def dequantize_double(
    packed: torch.Tensor, constants: PackedConstants, levels: torch.Tensor, block_size: int, out: torch.Tensor
) -> None:
    """Fill `out`, contiguous float32, bf16 or fp16. Raises ValueError before the launch for what does not match."""
    words, parts, levels = launch.checked_codes(packed, constants, levels, block_size, out)
    numel = out.numel()
    grid = (triton.cdiv(numel, TILE),)
    with launch.on(out):
        _dequantize_double_kernel[grid](
            words, *parts[:4], levels, out, len(words), numel, block_size, parts.group, TILE, num_warps=1, **NO_FUSION
        )
