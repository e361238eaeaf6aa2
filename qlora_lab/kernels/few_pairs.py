"""x W^T for a few tokens in bf16, two products at once: few_tokens.py on a CPU where bf16 is the fast type.

In: x (tokens, columns) bf16 and a packed W. Out: (tokens, rows), one float32 sum each, rounded once at most. The twin
is x @ dequantize(W, bf16).t(): a block's 16 levels are scaled in float32 and rounded to bf16, as in the bf16 panels of
product.py. AVX512-BF16 then multiplies 32 weights by 32 numbers of x in one instruction, where float32 takes two, and
one look-up finds 32 weights instead of 16. The instruction counts subnormals as 0: a weight, a number of x or a sum
below 2^-126 is lost.

Two rows of W share each load of x. One to four tokens take four rows, because an addition waits for the one
before it, 6 cycles on a Zen 4. The order of a sum is the same in both, so an output depends on its row of x and its
row of W alone.
"""

import numpy as np
from numba import njit, prange

from qlora_lab.kernels import sums as each, vector as v, words
from qlora_lab.kernels.compiled import parallel
from qlora_lab.kernels.constants import undouble
from qlora_lab.kernels.elements import write

TILE = 16  # rows of a product that a thread takes at a time


@njit(forceinline=True)
def _sorted(x, n, columns):
    """x as (columns / 32, n tokens, 32), flat: of each 64 columns the even ones, then the odd ones.

    The codes of 32 bytes have this order: 32 high halves, then 32 low ones. Tokens lie side by side, because rows that
    are 8 KiB apart want the same lines of the first-level cache: 16 tokens, a row of W at a time, took twice as long.
    """
    # Zeros pad the tokens to 1, 2, 4 or 8. Sorting x once is cheaper than interleaving weights.
    pairs = np.zeros(columns * n, np.uint16)
    for token in range(len(x) // columns):
        for i in range(0, columns, 64):
            even = i * n + 32 * token
            odd = even + 32 * n
            start = token * columns + i
            for k in range(32):
                pairs[even + k] = x[start + 2 * k]
                pairs[odd + k] = x[start + 2 * k + 1]
    return pairs


@njit(forceinline=True)
def _table(levels, scale):
    # Unscaled levels, with one scale for each sum of a block, would save one token a fifth of its time at most. But
    # they would cost eight tokens an addition each, and the weights would not be those of the bf16 panels.
    scaled = levels * v.splat(scale)
    return words.bfloat16_words(scaled, scaled)  # twice: a look-up of words reads 5 bits


@njit(forceinline=True)
def _two_rows(packed, bytes_, levels, block_size, scales, first_scales, blocks, pairs, n, zeros):
    """Sums of two rows, which begin at bytes_, for n tokens."""
    a_byte, b_byte = bytes_
    a, b = each.splat(zeros), each.splat(zeros)
    ahead = blocks * block_size  # bytes to the next two rows
    start = 0
    for block in range(blocks):
        a_table = _table(levels, scales[first_scales[0] + block])
        b_table = _table(levels, scales[first_scales[1] + block])
        v.prefetch(packed, a_byte + ahead)
        v.prefetch(packed, b_byte + ahead)
        for _ in range(block_size // 64):
            a_codes, b_codes = words.load_words(packed, a_byte), words.load_words(packed, b_byte)
            a = each.dot_pairs(a, words.permute_words(a_table, a_codes >> v.splat(4)), pairs, start)
            b = each.dot_pairs(b, words.permute_words(b_table, b_codes >> v.splat(4)), pairs, start)
            start += 32 * n
            # a look-up reads 5 bits: the table is there twice, so 4 of them count
            a = each.dot_pairs(a, words.permute_words(a_table, a_codes), pairs, start)
            b = each.dot_pairs(b, words.permute_words(b_table, b_codes), pairs, start)
            start += 32 * n
            a_byte += 32
            b_byte += 32
    return a, b


@njit(forceinline=True)
def _four_rows(packed, bytes_, levels, block_size, scales, first_scales, blocks, pairs, n, zeros):
    """Sums of four rows; as _two_rows, with names for four."""
    a_byte, b_byte, c_byte, d_byte = bytes_
    a, b, c, d = each.splat(zeros), each.splat(zeros), each.splat(zeros), each.splat(zeros)
    ahead = 2 * blocks * block_size  # the next four rows: 4 KiB would ask for what is just being read
    start = 0
    for block in range(blocks):
        a_table = _table(levels, scales[first_scales[0] + block])
        b_table = _table(levels, scales[first_scales[1] + block])
        c_table = _table(levels, scales[first_scales[2] + block])
        d_table = _table(levels, scales[first_scales[3] + block])
        for byte in (a_byte, b_byte, c_byte, d_byte):
            v.prefetch(packed, byte + ahead)
        for _ in range(block_size // 64):
            a_codes, b_codes = words.load_words(packed, a_byte), words.load_words(packed, b_byte)
            c_codes, d_codes = words.load_words(packed, c_byte), words.load_words(packed, d_byte)
            a = each.dot_pairs(a, words.permute_words(a_table, a_codes >> v.splat(4)), pairs, start)
            b = each.dot_pairs(b, words.permute_words(b_table, b_codes >> v.splat(4)), pairs, start)
            c = each.dot_pairs(c, words.permute_words(c_table, c_codes >> v.splat(4)), pairs, start)
            d = each.dot_pairs(d, words.permute_words(d_table, d_codes >> v.splat(4)), pairs, start)
            start += 32 * n
            a = each.dot_pairs(a, words.permute_words(a_table, a_codes), pairs, start)
            b = each.dot_pairs(b, words.permute_words(b_table, b_codes), pairs, start)
            c = each.dot_pairs(c, words.permute_words(c_table, c_codes), pairs, start)
            d = each.dot_pairs(d, words.permute_words(d_table, d_codes), pairs, start)
            start += 32 * n
            a_byte += 32
            b_byte += 32
            c_byte += 32
            d_byte += 32
    return a, b, c, d


@parallel
def multiply_pairs(x, form, zeros, packed, levels, constants, block_size, columns, rows, out):
    """out (tokens, rows) = x W^T for at most len(zeros) tokens, 1, 2, 4 or 8.

    x and out are flat: bf16 as uint16, or for out what `form` says.
    """
    blocks, half, n = columns // block_size, columns // 2, len(zeros)  # half: bytes of a row
    pairs = _sorted(x, n, columns)
    for tile in prange((rows + TILE - 1) // TILE):
        first = tile * TILE
        last = min(first + TILE, rows)
        scales = undouble(constants, first * blocks, (last - first) * blocks)  # of all blocks in the tile
        totals = np.empty((n, TILE), np.float32)  # (tokens, rows of the tile)
        table = v.load(levels, 0)
        for row in range(first, last, 4 if n <= 4 else 2):
            # if the rows run out, the last one is computed again
            i, j = row - first, min(row + 1, last - 1) - first
            bytes_, starts = ((first + i) * half, (first + j) * half), (i * blocks, j * blocks)
            if n <= 4:
                k, m = min(row + 2, last - 1) - first, min(row + 3, last - 1) - first
                four = *bytes_, (first + k) * half, (first + m) * half
                their = *starts, k * blocks, m * blocks
                a, b, c, d = _four_rows(packed, four, table, block_size, scales, their, blocks, pairs, n, zeros)
                each.store_totals(c, totals, k)
                each.store_totals(d, totals, m)
            else:
                a, b = _two_rows(packed, bytes_, table, block_size, scales, starts, blocks, pairs, n, zeros)
            each.store_totals(a, totals, i)
            each.store_totals(b, totals, j)
        for token in range(len(x) // columns):
            for row in range(first, last):
                write(out, token * rows + row, totals[token, row - first], form)
