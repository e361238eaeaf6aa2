"""The products of an adapter's thin matrices with x in 16 bits, in float32, without a float32 copy of x.

In: x or g (tokens, columns) bf16; A and B in float32, at most a few dozen rows. Out: sums in float32, or added
to a product that is there already and rounded with it. Twins of x.float() @ down, low.t() @ x.float(), out + low @ up.

BLAS takes one dtype. For float32 products x has to be widened into memory, which takes as long as a third of the
products, and a product in bf16 has to be widened and rounded once more. Here a number is widened in a register. Each
output is one sum in a fixed order, whatever the number of threads.
"""

import numpy as np
import torch
from numba import njit, prange

from qlora_lab.kernels import cpu, sums as each, vector as v, words
from qlora_lab.kernels.compiled import parallel, run, thread_count
from qlora_lab.kernels.decode_products import totals16
from qlora_lab.kernels.elements import BFLOAT16, FORM, bfloat16_of, read16, view

FOUR = (np.float32(0),) * 4  # sums at once; four of these tuples fill half of the 32 vector registers
EIGHT = (np.float32(0),) * 8
TOKENS = 64  # that a thread takes at a time: their rows of x and of the result stay in the second-level cache
STRIP = 8  # runs of 32 columns of x that a thread takes at a time in _outer
MANY = 128  # tokens for which a part of a strip is added up


def can_multiply(x: torch.Tensor, size: int, r: int) -> bool:
    """Whether the functions below take bf16 x (tokens, columns), a result of `size` columns and a rank of r."""
    return x.dtype == torch.bfloat16 and r % 8 == 0 and x.shape[1] % 64 == size % 64 == 0 and cpu.FAST


@parallel
def _lower(x, form, down, zeros, low):
    """low (tokens, r) = x down^T; down (r / 4, 4, columns)."""
    groups, _, columns = down.shape
    tokens = len(low)
    for tile in prange((tokens + TOKENS - 1) // TOKENS):
        lanes = np.empty((4, 64), np.float32)  # (rank, 4 tokens of 16 parts of a sum)
        flat = lanes.reshape(256)
        last = min((tile + 1) * TOKENS, tokens)
        for t in range(tile * TOKENS, last, 4):
            # if the tokens run out, the last one is computed again
            second, third, fourth = min(t + 1, last - 1), min(t + 2, last - 1), min(t + 3, last - 1)
            p, q, s, u = t * columns, second * columns, third * columns, fourth * columns
            for group in range(groups):
                rows = down[group]  # (4, columns), which the first-level cache holds for all tokens
                a, b, c, d = each.splat(zeros), each.splat(zeros), each.splat(zeros), each.splat(zeros)
                for i in range(0, columns, 16):
                    a = each.fma(a, read16(x, p + i, form), rows, i)
                    b = each.fma(b, read16(x, q + i, form), rows, i)
                    c = each.fma(c, read16(x, s + i, form), rows, i)
                    d = each.fma(d, read16(x, u + i, form), rows, i)
                each.store(a, lanes, (0,))
                each.store(b, lanes, (16,))
                each.store(c, lanes, (32,))
                each.store(d, lanes, (48,))
                v.store(flat, 0, totals16(flat))  # (rank, token)
                for k in range(4):
                    low[t, 4 * group + k] = flat[4 * k]
                    low[second, 4 * group + k] = flat[4 * k + 1]
                    low[third, 4 * group + k] = flat[4 * k + 2]
                    low[fourth, 4 * group + k] = flat[4 * k + 3]


@njit(forceinline=True)
def _read64(out, i):
    left = read16(out, i, BFLOAT16), read16(out, i + 16, BFLOAT16)
    return *left, read16(out, i + 32, BFLOAT16), read16(out, i + 48, BFLOAT16)


@njit(forceinline=True)
def _write64(out, i, values):
    words.store_words(out, i, bfloat16_of(values[0]))
    words.store_words(out, i + 16, bfloat16_of(values[1]))
    words.store_words(out, i + 32, bfloat16_of(values[2]))
    words.store_words(out, i + 48, bfloat16_of(values[3]))


@parallel
def _add(low, up, out):
    """out (tokens, size), flat bf16, += low up, rounded once; up (size / 64, 4, 16 r)."""
    tokens, r = low.shape
    size = 64 * len(up)
    for tile in prange((tokens + TOKENS - 1) // TOKENS):
        last = min((tile + 1) * TOKENS, tokens)
        for part in range(len(up)):
            columns = up[part]  # (4, 16 r): 64 columns of up, which the first-level cache holds for all tokens
            for t in range(tile * TOKENS, last, 4):
                # if the tokens run out, the last one is read four times before it is written
                second, third, fourth = min(t + 1, last - 1), min(t + 2, last - 1), min(t + 3, last - 1)
                i = 64 * part
                a, b = _read64(out, t * size + i), _read64(out, second * size + i)
                c, d = _read64(out, third * size + i), _read64(out, fourth * size + i)
                for j in range(r):
                    a = each.fma(a, v.splat(low[t, j]), columns, 16 * j)
                    b = each.fma(b, v.splat(low[second, j]), columns, 16 * j)
                    c = each.fma(c, v.splat(low[third, j]), columns, 16 * j)
                    d = each.fma(d, v.splat(low[fourth, j]), columns, 16 * j)
                _write64(out, t * size + i, a)
                _write64(out, second * size + i, b)
                _write64(out, third * size + i, c)
                _write64(out, fourth * size + i, d)


@parallel
def _outer(low, x, form, zeros, total, parts):
    """total (r / 8, 8, columns), zeros, += low^T x; low (tokens, r). parts: threads."""
    tokens, r = low.shape
    groups, _, columns = total.shape
    flat = low.reshape(tokens * r)
    runs = columns // 32
    for part in prange(parts):  # by hand: of the 576 columns of a small model, whole strips gave one thread 512
        stop = (part + 1) * runs // parts
        for first in range(part * runs // parts, stop, STRIP):
            for start in range(0, tokens, MANY):
                for i in range(32 * first, 32 * min(first + STRIP, stop), 32):
                    for group in range(groups):
                        a, b = each.splat(zeros), each.splat(zeros)  # 8 rows of 32 columns
                        for t in range(start, min(start + MANY, tokens)):
                            left, right = read16(x, t * columns + i, form), read16(x, t * columns + i + 16, form)
                            a = each.fma_scalars(a, left, flat, t * r + 8 * group)
                            b = each.fma_scalars(b, right, flat, t * r + 8 * group)
                        rows = total[group]
                        each.store(each.fma(a, v.splat(np.float32(1)), rows, i), rows, (i,))
                        each.store(each.fma(b, v.splat(np.float32(1)), rows, i + 16), rows, (i + 16,))


def lower(x: torch.Tensor, down: torch.Tensor, low: torch.Tensor) -> None:
    """Write x down into low (tokens, r) float32, from x (tokens, columns) and down (columns, r) float32."""
    columns, r = down.shape
    # a copy in backward, where down is B: a hundredth of x
    rows = down.t().contiguous().view(r // 4, 4, columns)
    run(_lower, view(x.contiguous()), FORM[x.dtype], rows.detach().numpy(), FOUR, low.numpy())


def add(out: torch.Tensor, low: torch.Tensor, up: torch.Tensor) -> None:
    """Add low up to out (tokens, size) bf16, rounding once, from low (tokens, r) and up (r, size) float32."""
    r, size = up.shape
    # 64 columns side by side for all r, so that the innermost loop reads on
    parts = up.view(r, size // 64, 4, 16).permute(1, 2, 0, 3).contiguous()  # (size / 64, 4, r, 16)
    run(_add, low.numpy(), parts.view(-1, 4, 16 * r).detach().numpy(), view(out))


def outer(low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return low^T x in float32, (r, columns), from low (tokens, r) float32 and x (tokens, columns)."""
    r, columns = low.shape[1], x.shape[1]
    total = low.new_zeros(r // 8, 8, columns)
    run(_outer, low.numpy(), view(x.contiguous()), FORM[x.dtype], EIGHT, total.numpy(), thread_count())
    return total.view(r, columns)
