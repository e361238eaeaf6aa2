"""What the rungs share inside a kernel: four packed bytes to eight levels, blocks to their constants.

A program reads the table of 16 levels from memory once. tl.gather() then costs one instruction per weight. In a program
of one warp, lanes hold the levels, and a lane asks the one that its code names (SHFL). In a larger program the table
lies in shared memory, 16 entries in 16 banks, so that 32 look-ups never wait for one another (LDS). A table of 256
pairs would halve the look-ups, but they would collide. Two forms of the look-up differ in where a word's eight weights
end up: levels_of() leaves that to the store that follows, levels_in_place() keeps them in the word's thread.
"""

import triton
import triton.language as tl


@triton.jit
def levels_of(words, levels):
    """(n,) int32, four packed bytes each -> (n, 8) float32 in the order of the weights; `levels` points to 16."""
    halves = words[:, None] >> (tl.arange(0, 2) * 16)[None, :]  # (n, 2), two bytes each
    i = tl.arange(0, 4)
    shifts = (i // 2) * 8 + 4 - (i % 2) * 4  # in a byte, the first weight is the high half
    codes = (halves[:, :, None] >> shifts[None, None, :]) & 15  # (n, 2, 4)
    table = tl.load(levels + tl.arange(0, 16))
    return tl.reshape(tl.gather(table, tl.reshape(codes, (words.numel * 8,)), 0), (words.numel, 8))


@triton.jit
def levels_in_place(words, levels):
    """(n,) int32 -> (n, 2, 2, 2) float32, weight 4 a + 2 b + c at [:, a, b, c]."""
    first = tl.join(tl.join(words >> 4, words >> 20), tl.join(words >> 12, words >> 28))  # weights 0 4, 2 6
    second = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))  # weights 1 5, 3 7
    codes = tl.join(first, second) & 15
    table = tl.load(levels + tl.arange(0, 16))
    return tl.reshape(tl.gather(table, tl.reshape(codes, (words.numel * 8,)), 0), (words.numel, 2, 2, 2))


@triton.jit
def split8(x):
    """(..., 2, 2, 2) -> its eight parts, in the order of the weights."""
    even, odd = tl.split(x)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def constants_of(blocks, mask, absmax, scale, offset, table, GROUP_SIZE: tl.constexpr):
    """Load the constants of some blocks, float32. `absmax` points to them, or to their codes if GROUP_SIZE is not 0."""
    if GROUP_SIZE == 0:
        constants = tl.load(absmax + blocks, mask=mask, other=0.0)
    else:  # double quantization: GROUP_SIZE codes share a scale
        values = tl.load(table + tl.load(absmax + blocks, mask=mask, other=0))
        constants = values * tl.load(scale + blocks // GROUP_SIZE, mask=mask, other=0.0) + tl.load(offset)
    return constants


@triton.jit
def weights_of(
    words, rows, n_rows, column, n_words, levels, absmax, scale, offset, table,
    BLOCK_SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Decode WIDTH columns from `column` on of some rows: (rows, WIDTH) float32, zeros beyond the last.

    n_words: words in a row, which is a whole number of blocks.
    """
    SPAN: tl.constexpr = BLOCK_SIZE if BLOCK_SIZE < WIDTH else WIDTH  # columns that share a constant
    word = column // 8 + tl.arange(0, WIDTH // 8)
    mask = (rows < n_rows)[:, None] & (word < n_words)[None, :]
    packed = tl.load(words + rows[:, None] * n_words + word[None, :], mask=mask, other=0)
    first = column + tl.arange(0, WIDTH // SPAN) * SPAN  # columns where a constant may change
    mask = (rows < n_rows)[:, None] & (first < n_words * 8)[None, :]
    blocks = rows[:, None] * (n_words * 8 // BLOCK_SIZE) + first[None, :] // BLOCK_SIZE
    constants = tl.where(mask, constants_of(blocks, mask, absmax, scale, offset, table, GROUP_SIZE), 0.0)
    # A sum of one changes nothing but hides from Triton that bytes were loaded on the way: for sm_80 it would lay the
    # operands of the product out as if they were 8-bit numbers, and move registers 279 times in each pass.
    constants = tl.sum(tl.expand_dims(constants, 2), 2)
    values = levels_in_place(tl.reshape(packed, (packed.numel,)), levels)
    values = tl.reshape(values, (rows.numel, WIDTH // SPAN, SPAN)) * constants[:, :, None]
    return tl.reshape(values, (rows.numel, WIDTH))
