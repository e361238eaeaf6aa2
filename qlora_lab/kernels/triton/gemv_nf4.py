"""Rung 5. Twin of x @ dequantize(W).t() for 1 to 8 tokens: W is read once and its weights never leave registers.

A level is multiplied by x first; eight of these share one multiplication by the block's constant. Products and sums are
float32. Moved for each weight: half a byte and its share of the constants; x and y are small beside W.
"""

import torch
import triton
import triton.language as tl

from qlora_lab.kernels.packed_weight import PackedWeight
from qlora_lab.kernels.triton.codes import constants_of, levels_in_place, split8
from qlora_lab.kernels.triton.launch import DTYPES, check_product, on

MAX_TOKENS = 8  # a tile of sums for them still lies in registers
TILES = {1: (4, 128), 2: (4, 128), 4: (8, 64), 8: (16, 64)}  # tokens: rows of W, words of each row


@triton.jit
def _gemv_nf4_kernel(
    x, words, absmax, scale, offset, table, levels, y, n_tokens, n_rows, n_words,
    BLOCK_SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    rows = pid * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)  # padded to a power of two
    # A sum for each word of the tile, not for each row: lanes add up on their own, and meet once, after the loop.
    sums = tl.zeros((TOKENS, ROWS, WORDS), tl.float32)
    for first in range(0, n_words, WORDS):
        word = first + tl.arange(0, WORDS)
        mask = (rows < n_rows)[:, None] & (word < n_words)[None, :]  # (ROWS, WORDS)
        packed = tl.load(words + rows[:, None] * n_words + word[None, :], mask=mask, other=0)
        blocks = rows[:, None] * (n_words * 8 // BLOCK_SIZE) + (word // (BLOCK_SIZE // 8))[None, :]
        constants = constants_of(blocks, mask, absmax, scale, offset, table, GROUP_SIZE)
        # Eight weights of a word and eight numbers of x stay in one thread, so products need no exchange of lanes.
        levels8 = levels_in_place(tl.reshape(packed, (ROWS * WORDS,)), levels)
        w0, w1, w2, w3, w4, w5, w6, w7 = split8(tl.reshape(levels8, (1, ROWS, WORDS, 2, 2, 2)))
        mask = (tokens < n_tokens)[:, None, None] & (word < n_words)[None, :, None]
        offsets = tokens[:, None, None] * (n_words * 8) + word[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        x8 = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)  # (TOKENS, WORDS, 8)
        x0, x1, x2, x3, x4, x5, x6, x7 = split8(tl.reshape(x8, (TOKENS, 1, WORDS, 2, 2, 2)))
        products = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3 + x4 * w4 + x5 * w5 + x6 * w6 + x7 * w7
        sums += products * constants[None, :, :]  # a word never straddles two blocks
    # A store is as wide as the tile gives each thread elements. So the tile is one of copies, eight elements for each
    # of 128 threads, and the first copy alone is written: all rows of a token at once.
    COPIES: tl.constexpr = 1024 // (TOKENS * ROWS)
    results = tl.broadcast_to(tl.sum(sums, axis=2)[None, :, :], (COPIES, TOKENS, ROWS))
    first_copy = (tl.arange(0, COPIES) == 0)[:, None, None]
    mask = first_copy & (tokens < n_tokens)[None, :, None] & (rows < n_rows)[None, None, :]
    offsets = tl.broadcast_to(tokens[None, :, None] * n_rows + rows[None, None, :], (COPIES, TOKENS, ROWS))
    tl.store(y + offsets, results.to(y.dtype.element_ty), mask=mask)


def gemv_nf4(x: torch.Tensor, weight: PackedWeight, rows: int) -> torch.Tensor:
    """(tokens, columns) float32, bf16 or fp16, at most 8 tokens -> (tokens, rows), same dtype.

    A row of the weight is a whole number of blocks. Raises ValueError before the launch for what does not match.
    """
    words, parts, levels = check_product(x, x.shape[-1], rows, weight, DTYPES)
    tokens, columns = x.shape
    if tokens > MAX_TOKENS:
        raise ValueError(f"x has {tokens} tokens: gemv_nf4 takes at most {MAX_TOKENS}; use matmul_nf4 for more")
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(tokens)  # a kernel is compiled for 1, 2, 4 and 8
    height, width = TILES[padded]
    grid = (triton.cdiv(rows, height),)
    with on(x):
        _gemv_nf4_kernel[grid](
            x.contiguous(), words, *parts[:4], levels, y, tokens, rows, columns // 8,
            weight.block_size, parts.group, padded, height, width,
        )  # fmt: skip
    return y
