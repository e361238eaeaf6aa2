"""Rung 4. Twin of qlora_lab.quant.double_quant.double_quantize: block constants -> 8-bit codes and group scales.

A code is found by halving the table of 255 thresholds eight times. The same codes and scales as the twin's, bit for
bit; the mean of all constants is one reduction over the device's own library and is handed in. Moved for each constant:
4 bytes are read, 1 byte and 4 / 256 byte are written.
"""

import torch
import triton
import triton.language as tl

from qlora_lab.kernels.packed_weight import PackedConstants
from qlora_lab.kernels.triton import launch
from qlora_lab.kernels.triton.codes import constants_of
from qlora_lab.kernels.triton.launch import NO_FUSION
from qlora_lab.kernels.triton.quantize_nf4 import absmax_of, scaled

GROUPS = 4  # that a program quantises
TILE = 1024  # constants that a program undoes


@triton.jit
def nearest_of(x, thresholds):
    """How many of 255 ascending thresholds lie below float32 values: their codes in an ascending table of 256."""
    rank = tl.zeros(x.shape, tl.int32)  # thresholds that are known to lie below x
    for level in tl.static_range(8):
        rank += tl.where(x > tl.load(thresholds + rank + ((128 >> level) - 1)), 128 >> level, 0)
    return rank.to(tl.uint8)


@triton.jit
def _double_quantize_kernel(
    absmax, offset, thresholds, codes, scales, n_blocks, tiny, GROUP_SIZE: tl.constexpr, GROUPS: tl.constexpr
):
    pid = tl.program_id(0)
    groups = pid * GROUPS + tl.arange(0, GROUPS)
    offsets = groups[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]  # (groups, constants of a group)
    mask = offsets < n_blocks
    constants = tl.load(absmax + offsets, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, constants - tl.load(offset), 0.0)  # beyond the last constant -offset could be the maximum
    scale = absmax_of(centred)  # (groups,)
    tl.store(scales + groups, scale, mask=groups * GROUP_SIZE < n_blocks)
    tl.store(codes + offsets, nearest_of(scaled(centred, scale, tiny), thresholds), mask=mask)


def double_quantize(
    absmax: torch.Tensor, offset: torch.Tensor, thresholds: torch.Tensor, group: int, tiny: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_blocks,) -> absmax_codes (n_blocks,) uint8 and absmax_scale (ceil(n_blocks / group),) float32.

    absmax: float32; weights that are to have 8-bit codes may be bf16 or fp16. offset: () float32, subtracted first.
    thresholds: (255,) float32, between 256 levels in ascending order. Raises ValueError for what does not match.
    """
    launch.check_device(absmax=absmax, offset=offset, thresholds=thresholds)
    launch.check_flat("absmax", absmax, absmax.numel())
    launch.check_numel(len(absmax))
    launch.check_offset(offset)
    launch.check_flat("thresholds", thresholds, 255, torch.float32)
    launch.check_block_size(group, "group")
    codes = torch.empty(len(absmax), dtype=torch.uint8, device=absmax.device)
    scale = torch.empty(-(-len(absmax) // group), dtype=torch.float32, device=absmax.device)
    grid = (triton.cdiv(len(scale), GROUPS),)
    arguments = absmax, offset, thresholds, codes, scale, len(absmax), tiny, group, GROUPS
    with launch.on(absmax):
        _double_quantize_kernel[grid](*arguments, **NO_FUSION)
    return codes, scale


@triton.jit
def _double_dequantize_kernel(codes, scale, offset, table, out, n_blocks, GROUP_SIZE: tl.constexpr, TILE: tl.constexpr):
    offsets = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = offsets < n_blocks
    tl.store(out + offsets, constants_of(offsets, mask, codes, scale, offset, table, GROUP_SIZE), mask=mask)


def double_dequantize(constants: PackedConstants) -> torch.Tensor:
    """Undo double quantization: absmax, (n_blocks,) float32."""
    n_blocks = len(constants.codes)
    launch.check_device(**launch.named(constants))
    launch.check_numel(n_blocks)
    out = torch.empty(n_blocks, dtype=torch.float32, device=constants.codes.device)
    *parts, group = launch.checked_constants(constants, n_blocks)
    with launch.on(out):
        _double_dequantize_kernel[(triton.cdiv(n_blocks, TILE),)](*parts, out, n_blocks, group, TILE, **NO_FUSION)
    return out
