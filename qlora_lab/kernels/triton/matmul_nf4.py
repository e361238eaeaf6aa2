"""Rung 6. Twin of x @ dequantize(W).t() + scaling * (x @ lora_A.t()) @ lora_B.t(): many tokens, W never in memory.

A tile of W is decoded, rounded to the dtype of x and multiplied by the tensor cores, with float32 sums; the adapter's
second, thin product is added to the same sums at the end. Moved for each weight and each tile of tokens: half a byte
and its share of the constants, instead of the 2 bytes of a ready weight. So it wins while it waits for weights (few
tokens), and loses to a separate dequantisation once the tensor cores are the limit: each tile of tokens decodes W anew.
"""

import torch
import triton
import triton.language as tl

from qlora_lab.kernels.packed_weight import PackedWeight
from qlora_lab.kernels.triton.codes import weights_of
from qlora_lab.kernels.triton.launch import check_adapter, check_product, on

# A tile is x (TOKENS, COLUMNS) times W (ROWS, COLUMNS). One SM of an H100 decodes it (8 instructions a weight,
# 128 lanes a cycle) in about the time that its tensor cores take for 128 tokens (2 operations a weight and token, some
# 3,800 a cycle); with half the tokens it would decode for twice as long as it multiplies.
TOKENS, ROWS, COLUMNS = 128, 128, 64
WARPS = 8  # of 32 threads: 64 sums for each thread
FEW = 16, 32, 128, 4  # the same four for at most 16 tokens: as many programs as a GPU has SMs for 4096 rows
WIDTH = 16  # of the adapter's rank, at a time: the tensor cores' least, and with more of it sm_80 spills registers


@triton.jit
def _matmul_nf4_kernel(
    x, words, absmax, scale, offset, table, levels, u, lora_B, y, n_tokens, n_rows, n_words, scaling,
    BLOCK_SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((TOKENS, ROWS), tl.float32)  # in registers until the end
    n_columns = n_words * 8  # eight codes in a word
    for column in range(0, n_columns, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)  # (COLUMNS,)
        mask = (tokens < n_tokens)[:, None] & (columns < n_columns)[None, :]
        x_tile = tl.load(x + tokens[:, None] * n_columns + columns[None, :], mask=mask, other=0.0)
        weights = weights_of(
            words, rows, n_rows, column, n_words, levels, absmax, scale, offset, table, BLOCK_SIZE, GROUP_SIZE, COLUMNS
        )
        sums = tl.dot(x_tile, tl.trans(weights.to(x.dtype.element_ty)), sums)
    if RANK > 0:
        for first in tl.range(0, RANK, WIDTH, num_stages=1):  # not loaded ahead, which would spill, too
            r = first + tl.arange(0, WIDTH)
            mask = (tokens < n_tokens)[:, None] & (r < RANK)[None, :]
            u_tile = tl.load(u + tokens[:, None] * RANK + r[None, :], mask=mask, other=0.0)
            mask = (rows < n_rows)[:, None] & (r < RANK)[None, :]
            b_tile = tl.load(lora_B + rows[:, None] * RANK + r[None, :], mask=mask, other=0.0)
            sums += scaling * tl.dot(u_tile, tl.trans(b_tile))
    pointers = y + tokens[:, None] * n_rows + rows[None, :]
    tl.store(pointers, sums.to(y.dtype.element_ty), mask=(tokens < n_tokens)[:, None] & (rows < n_rows)[None, :])


def matmul_nf4(
    x: torch.Tensor, weight: PackedWeight, rows: int,
    lora_A: torch.Tensor | None = None, lora_B: torch.Tensor | None = None, scaling: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """(tokens, columns) bf16 or fp16 -> (tokens, rows), same dtype.

    A row of the weight is a whole number of blocks. lora_A: (r, columns), lora_B: (rows, r), of the dtype of x.
    Raises ValueError for what does not match.
    """
    words, parts, levels = check_product(x, x.shape[-1], rows, weight, (torch.bfloat16, torch.float16))
    rank = check_adapter(x, rows, lora_A, lora_B)  # 0 without an adapter
    tokens, columns = x.shape
    x = x.contiguous()
    u, lora_B = (x @ lora_A.t(), lora_B.contiguous()) if rank else (None, None)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    tile, height, width, warps = FEW if tokens <= FEW[0] else (TOKENS, ROWS, COLUMNS, WARPS)
    grid = (triton.cdiv(rows, height), triton.cdiv(tokens, tile))
    with on(x):
        _matmul_nf4_kernel[grid](
            x, words, *parts[:4], levels, u, lora_B, y, tokens, rows, columns // 8, scaling,
            weight.block_size, parts.group, rank, WIDTH, tile, height, width, num_warps=warps,
        )  # fmt: skip
    return y
