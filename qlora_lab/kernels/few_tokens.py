"""x W^T for a few tokens on the CPU: no decoded weight is ever written, not even to a cache.

A token of an answer multiplies each weight of a model by one vector, so nothing but reading W takes time, and packed W
is an eighth of float32's bytes. A level is looked up and multiplied while it is in a register. Moved for each weight at
block size 64: 0.56 bytes are read, for all tokens together. For more tokens, decoding a panel once and calling BLAS is
faster (product.py). few_pairs.py is the variant for bf16 where bf16 products are the fast ones.
"""

import numpy as np
import torch
from numba import prange

from qlora_lab.kernels import cpu, sums as each, vector as v, words
from qlora_lab.kernels.compiled import parallel, run
from qlora_lab.kernels.constants import undouble
from qlora_lab.kernels.elements import FORM, read16, view, write
from qlora_lab.kernels.few_pairs import multiply_pairs
from qlora_lab.kernels.packed_weight import PackedWeight

MAX_TOKENS = 16  # up to here multiply_blocks beats decoding a panel and calling BLAS
TILE = 16  # rows of a product that a thread takes at a time
BYTES_AHEAD = 2**12  # how far in front packed bytes are asked for, as cpu.AHEAD
TOKENS_AT_ONCE = 8  # two rows of 8 sums fill half of the 32 vector registers
_ZEROS = [(np.float32(0),) * tokens for tokens in (1, 2, 4, 8)]  # one compiled product each


@parallel
def _multiply(x, form, zeros, packed, levels, constants, block_size, columns, rows, out):
    """out (tokens, rows) = x W^T for at most len(zeros) tokens. x and out are flat.

    Two rows of W are taken at a time: the look-ups of one run while the other's wait for memory, and both use the same
    vectors of x. zeros: a tuple, so that the sums of all tokens are registers and not an array.
    """
    blocks = columns // block_size
    tokens = len(x) // columns
    # A load of 16 bytes holds 32 codes: 16 high halves, weights 0, 2, 4 ..., and 16 low ones, weights 1, 3, 5 ...
    # Sorting x once, even columns before odd ones, is cheaper than interleaving the weights of each row.
    halves = np.zeros((len(zeros), columns), np.float32)  # (tokens, columns)
    for token in range(tokens):
        half = halves[token]
        start = token * columns
        for i in range(0, columns, 32):
            left, right = read16(x, start + i, form), read16(x, start + i + 16, form)
            v.store(half, i, v.evens(left, right))
            v.store(half, i + 16, v.odds(left, right))
    for tile in prange((rows + TILE - 1) // TILE):
        first = tile * TILE
        last = min(first + TILE, rows)
        scales = undouble(constants, first * blocks, (last - first) * blocks)  # of all blocks in the tile
        totals = np.empty((len(zeros), TILE), np.float32)  # (tokens, rows of the tile)
        for row in range(first, last, 2):
            other = min(row + 1, last - 1)  # of an odd number of rows the last is computed twice
            bytes_, other_bytes = packed[row * columns // 2 :], packed[other * columns // 2 :]
            scale, other_scale = scales[(row - first) * blocks :], scales[(other - first) * blocks :]
            sums, other_sums = each.splat(zeros), each.splat(zeros)
            byte = 0
            for block in range(blocks):
                table = v.load(levels, 0) * v.splat(scale[block])  # 16 scaled levels are one register
                other_table = v.load(levels, 0) * v.splat(other_scale[block])
                v.prefetch(bytes_, byte + BYTES_AHEAD)
                v.prefetch(other_bytes, byte + BYTES_AHEAD)
                for _ in range(block_size // 32):
                    codes, other_codes = v.load(bytes_, byte), v.load(other_bytes, byte)
                    high, other_high = codes >> v.splat(4), other_codes >> v.splat(4)
                    sums = each.fma(sums, v.permute(table, high), halves, 2 * byte)
                    other_sums = each.fma(other_sums, v.permute(other_table, other_high), halves, 2 * byte)
                    sums = each.fma(sums, v.permute(table, codes), halves, 2 * byte + 16)  # permute takes 4 bits
                    other_sums = each.fma(other_sums, v.permute(other_table, other_codes), halves, 2 * byte + 16)
                    byte += 16
            each.store_totals(sums, totals, row - first)
            each.store_totals(other_sums, totals, other - first)
        for token in range(tokens):
            for row in range(first, last):
                write(out, token * rows + row, totals[token, row - first], form)


def can_multiply(columns: int, weight: PackedWeight) -> bool:
    """Whether multiply_blocks takes a weight with rows of `columns`: whole blocks of 4-bit codes, on this CPU."""
    block_size = weight.block_size
    return 8 < len(weight.levels) <= 16 and block_size % 32 == 0 and columns % block_size == 0 and cpu.FAST


def can_pair(weight: PackedWeight) -> bool:
    """Whether multiply_blocks can multiply pairs of bf16, for a weight that it takes."""
    return weight.block_size % 64 == 0 and words.has_pairs()


def multiply_blocks(
    x: torch.Tensor, weight: PackedWeight, rows: int, pairs: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Multiply by W^T: (tokens, columns) float32, bf16 or fp16 -> (tokens, rows), of x's dtype or of `dtype`.

    Products and sums are float32, and an output depends on its row of x and its row of W alone. Works where
    can_multiply says so.
    pairs: False keeps the weights in float32. True is for x in bf16, where can_pair says so: few_pairs.py rounds the
    weights to bf16, too. dtype: float32 returns the sums unrounded.
    """
    tokens, columns = x.shape
    arrays = cpu.arrays_of(weight)
    cpu.check_length(weight, rows * columns, arrays.numel)
    out = torch.empty(tokens, rows, dtype=dtype or x.dtype, device="cpu")
    flat = view(x.contiguous())
    result = view(out)
    kernel, form = multiply_pairs if pairs else _multiply, FORM[out.dtype]
    for first in range(0, tokens, TOKENS_AT_ONCE):
        last = min(first + TOKENS_AT_ONCE, tokens)
        zeros = _ZEROS[(last - first - 1).bit_length()]
        x_part = flat[first * columns : last * columns]
        out_part = result[first * rows : last * rows]
        parts = arrays.packed, arrays.levels, arrays.constants
        run(kernel, x_part, form, zeros, *parts, weight.block_size, columns, rows, out_part)
    return out
