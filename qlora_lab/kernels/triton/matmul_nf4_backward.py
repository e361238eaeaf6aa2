"""Rung 7. Twin of grad @ dequantize(W): the gradient of x, with the tiles of rung 6, W not transposed.

Moved for each weight and each tile of tokens: half a byte and its share of the constants. W itself is frozen and has no
gradient.
"""

import torch
import triton
import triton.language as tl

from qlora_lab.kernels.packed_weight import PackedWeight
from qlora_lab.kernels.triton.codes import weights_of
from qlora_lab.kernels.triton.launch import check_product, on
from qlora_lab.kernels.triton.matmul_nf4 import TOKENS, WARPS

ROWS, COLUMNS = 64, 128  # of W in a tile: rows are what is summed over


@triton.jit
def _matmul_nf4_backward_kernel(
    grad, words, absmax, scale, offset, table, levels, out, n_tokens, n_rows, n_words,
    BLOCK_SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) * COLUMNS
    n_columns = n_words * 8  # eight codes in a word
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)  # in registers until the end
    for row in range(0, n_rows, ROWS):
        rows = row + tl.arange(0, ROWS)
        mask = (tokens < n_tokens)[:, None] & (rows < n_rows)[None, :]
        grad_tile = tl.load(grad + tokens[:, None] * n_rows + rows[None, :], mask=mask, other=0.0)
        weights = weights_of(
            words, rows, n_rows, column, n_words, levels, absmax, scale, offset, table, BLOCK_SIZE, GROUP_SIZE, COLUMNS
        )
        sums = tl.dot(grad_tile, weights.to(grad.dtype.element_ty), sums)
    columns = column + tl.arange(0, COLUMNS)  # (COLUMNS,)
    pointers = out + tokens[:, None] * n_columns + columns[None, :]
    mask = (tokens < n_tokens)[:, None] & (columns < n_columns)[None, :]
    tl.store(pointers, sums.to(out.dtype.element_ty), mask=mask)


def matmul_nf4_backward(grad: torch.Tensor, weight: PackedWeight, columns: int) -> torch.Tensor:
    """(tokens, rows) bf16 or fp16 -> (tokens, columns), same dtype.

    A row of the weight is a whole number of blocks. Raises ValueError before the launch for what does not match.
    """
    words, parts, levels = check_product(grad, columns, grad.shape[-1], weight, (torch.bfloat16, torch.float16))
    tokens, rows = grad.shape
    out = torch.empty(tokens, columns, dtype=grad.dtype, device=grad.device)
    grid = (triton.cdiv(columns, COLUMNS), triton.cdiv(tokens, TOKENS))
    with on(grad):
        _matmul_nf4_backward_kernel[grid](
            grad.contiguous(), words, *parts[:4], levels, out, tokens, rows, columns // 8,
            weight.block_size, parts.group, TOKENS, ROWS, COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return out
