"""Rung 1. Twin of qlora_lab.quant.quantize.quantize_blocks: weights -> packed bytes and block constants.

A code is found by four comparisons in a tree of 15 thresholds, and eight codes leave as one word. The same bytes and
constants as the twin's, bit for bit. Moved for each weight at block size 64: 4 or 2 bytes are read, half a byte of
codes and 4 / 64 byte of constants are written.
"""

import torch
import triton
import triton.language as tl

from qlora_lab.kernels.triton import launch

TILE = 1024  # weights a warp takes; a program takes a whole block at least, so for larger blocks it is more warps


@triton.jit
def absmax_of(values, INFINITY: tl.constexpr = 0x7F800000):
    """(blocks, n) float32 -> (blocks,) largest magnitudes, NaN where one is not finite: as bits, which order alike."""
    magnitude = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    return tl.where(magnitude < INFINITY, magnitude.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def scaled(values, constants, tiny):
    """(blocks, n) values over the constants of their blocks; all of a block whose constant is NaN counts as 0."""
    scale = tl.div_rn(1.0, tl.where(constants > tiny, constants, tiny))
    return tl.where((constants == constants)[:, None], values * scale[:, None], 0.0)


@triton.jit
def _rank_of(x, tree):
    """How many of 15 thresholds lie below x, (n,) float32: four comparisons, each with the one the last ones leave.

    tree: (4, 16) float32; on each level, entry r is the threshold to try next after rank r.
    """
    i = tl.arange(0, 16)
    rank = tl.where(x > tl.load(tree), 8, 0)
    rank += tl.where(x > tl.gather(tl.load(tree + 16 + i), rank, 0), 4, 0)
    rank += tl.where(x > tl.gather(tl.load(tree + 32 + i), rank, 0), 2, 0)
    return rank + tl.where(x > tl.gather(tl.load(tree + 48 + i), rank, 0), 1, 0)


@triton.jit
def _quantize_nf4_kernel(
    weight, tree, order, words, absmax, numel, n_words, tiny, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):
    pid = tl.program_id(0)
    blocks = pid * (TILE // BLOCK_SIZE) + tl.arange(0, TILE // BLOCK_SIZE)
    offsets = blocks[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]  # (blocks, weights of a block)
    values = tl.load(weight + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
    constants = absmax_of(values)  # (blocks,)
    tl.store(absmax + blocks, constants, mask=blocks * BLOCK_SIZE < numel)
    x = tl.reshape(scaled(values, constants, tiny), (TILE,))  # flat, in the order of the weights
    codes = tl.gather(tl.load(order + tl.arange(0, 16)), _rank_of(x, tree), 0)

    first, second = tl.split(tl.reshape(codes, (TILE // 8, 2, 2, 2)))  # the first of two neighbours: the high half
    byte0, byte1 = tl.split(first * 16 + second)  # bytes 0 2 and 1 3 of a word
    low, high = tl.split(byte0 + byte1 * 256)  # 16-bit halves of a word
    offsets = pid * (TILE // 8) + tl.arange(0, TILE // 8)  # of words: eight codes each
    tl.store(words + offsets, low + high * 65536, mask=offsets < n_words)


def quantize_nf4(
    weight: torch.Tensor, thresholds: torch.Tensor, order: torch.Tensor, block_size: int, tiny: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(numel,) float32, bf16 or fp16 -> packed (ceil(numel / 2),) uint8 and absmax (n_blocks,) float32.

    thresholds: (n - 1,) float32 ascending; order: (n,) uint8, the code of each rank; n <= 16. tiny: the least constant
    that is divided by. Raises ValueError before any launch for what does not match.
    """
    launch.check_device(weight=weight, thresholds=thresholds, order=order)
    launch.check_block_size(block_size)
    numel = weight.numel()
    launch.check_numel(numel)
    launch.check_flat("weight", weight, numel)
    launch.check_dtype("thresholds", thresholds, torch.float32)
    if len(order) > launch.CODES or len(thresholds) != len(order) - 1:
        raise ValueError(
            f"{len(thresholds)} thresholds and {len(order)} codes do not match: "
            f"n - 1 thresholds lie between n codes, n at most {launch.CODES}"
        )
    ranks = thresholds.new_full((launch.CODES - 1,), torch.inf)  # no value lies above a threshold that is filled up
    ranks[: len(thresholds)] = thresholds
    tree = thresholds.new_full((4, launch.CODES), torch.inf)
    for level, step in enumerate((8, 4, 2, 1)):
        tree[level, : launch.CODES - step] = ranks[step - 1 :]
    codes = torch.nn.functional.pad(order.int(), (0, launch.CODES - len(order)))
    words = torch.empty(-(-numel // 8), dtype=torch.int32, device=weight.device)  # (ceil(numel / 8),)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=weight.device)
    tile = max(TILE, block_size)  # weights of a program
    grid = (triton.cdiv(numel, tile),)
    warps = tile // TILE
    with launch.on(weight):
        _quantize_nf4_kernel[grid](
            weight, tree, codes, words, absmax, numel, len(words), tiny, block_size, tile, num_warps=warps
        )
    return words.view(torch.uint8)[: -(-numel // 2)], absmax
