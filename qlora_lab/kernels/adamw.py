"""The CPU twin of optim/adamw_8bit.py: one step of AdamW over 8-bit moments, the same bits, in one pass over memory.

In and out: contiguous CPU tensors, as in the Triton rung of the same name. A block of 256 is decoded, updated, used and
quantised again while it lies in the first-level cache. Moved for each float32 parameter: 4 bytes of it, 4 of its
gradient and 2 of its moments are read, 4 and 2 are written.
"""

from functools import lru_cache

import numpy as np
import torch
from numba import njit, prange

from qlora_lab.kernels import cpu, vector as v
from qlora_lab.kernels.compiled import opaque, parallel, run
from qlora_lab.kernels.elements import FLOAT32, FORM, check_arrays, read, read16, view, write

BLOCK = 256  # parameters that share a constant
PIECE = 32  # blocks that a thread takes at a time
_INFINITY = np.float32(np.inf)


@njit(forceinline=True)
def _undo(codes, scale, levels, beta, moment):
    """moment (256,) = beta times what the codes stand for."""
    factor = v.splat(scale)
    keep = v.splat(beta)
    for i in range(0, BLOCK, 16):
        v.store(moment, i, v.gather(levels, v.load(codes, i)) * factor * keep)


@njit(forceinline=True)
def _add(grad, form, rest1, rest2, first, second):
    for i in range(0, BLOCK, 16):
        g = read16(grad, i, form)  # 16 lanes of float32
        v.store(first, i, v.load(first, i) + g * v.splat(rest1))
        v.store(second, i, v.load(second, i) + g * g * v.splat(rest2))


@njit(error_model="numpy")  # Python's model checks each element for a division by 0, which eps = 0 allows
def _use(param, form, first, second, decay, size, correction, eps):
    for i in range(len(param)):
        change = first[i] / (np.sqrt(second[i]) * correction + eps) * size
        write(param, i, read(param, i, form) * decay - change, form)


@njit(forceinline=True)
def _redo(moment, table, tiny, scale, codes):
    """Quantise a moment to codes (256,) and scale[0]. The upper 16 bits of a value nearly tell its code."""
    _, limits, ranks, more, fill = table
    cpu.absmax16(moment, FLOAT32, 0, BLOCK, BLOCK, scale)
    if np.isnan(scale[0]):
        codes[:] = fill
        return
    factor = v.splat(np.float32(1) / max(scale[0], tiny))
    for i in range(0, BLOCK, 16):
        values = v.load(moment, i) * factor
        rank = v.gather(ranks, v.as_ints(values) >> v.splat(16))  # exact for most values
        for _ in range(more):  # the rest is a comparison or two away
            rank = rank + v.where_greater(values, v.gather(limits, rank), v.splat(1))
        v.store(codes, i, rank)


@parallel
def _adamw(
    param, param_form, grad, grad_form, codes1, scale1, codes2, scale2, first_table, second_table, scalars, tiny
):
    beta1, beta2, rest1, rest2, decay, size, correction, eps = scalars
    n_blocks = len(scale1)  # of 256 parameters
    for piece in prange((n_blocks + PIECE - 1) // PIECE):
        first = np.empty(BLOCK, np.float32)  # the moments of one block, in the first-level cache
        second = np.empty(BLOCK, np.float32)
        for block in range(piece * PIECE, min(piece * PIECE + PIECE, n_blocks)):
            start = block * BLOCK
            stop = min(start + BLOCK, len(param))
            g, c1, c2 = grad[start:stop], codes1[start:stop], codes2[start:stop]
            if stop - start < BLOCK:  # the last block is filled up in copies
                g, c1, c2 = np.zeros(BLOCK, g.dtype), np.zeros(BLOCK, np.uint8), np.zeros(BLOCK, np.uint8)
                g[: stop - start] = grad[start:stop]
                c1[: stop - start] = codes1[start:stop]
                c2[: stop - start] = codes2[start:stop]
            _undo(c1, scale1[block], first_table[0], beta1, first)
            _undo(c2, scale2[block], second_table[0], beta2, second)
            _add(g, grad_form, rest1, rest2, first, second)
            first[stop - start :] = 0  # what lies beyond the last parameter must not raise a maximum
            second[stop - start :] = 0
            _use(param[start:stop], param_form, first, second, decay, size, correction, eps)
            _redo(first, first_table, tiny, scale1[block:], c1)
            _redo(second, second_table, tiny, scale2[block:], c2)
            if stop - start < BLOCK:
                codes1[start:stop] = c1[: stop - start]
                codes2[start:stop] = c2[: stop - start]


@lru_cache(maxsize=4)
def _prepared(levels, thresholds):
    """Prepare a table for the kernel; the last ones are kept.

    Returns levels; thresholds and one that nothing exceeds; for each upper 16 bits, how many thresholds lie below the
    least float32 with them; how many more, at most, lie below the greatest; the code of zero.
    """
    limits = thresholds.numpy()  # (255,)
    upper = np.arange(2**16, dtype=np.uint32) << 16
    toward_zero = upper.view(np.float32)  # (2^16,), of the floats with the same upper half
    from_zero = (upper | 0xFFFF).view(np.float32)
    negative = upper >= 2**31
    least = np.where(negative, from_zero, toward_zero)
    greatest = np.where(negative, toward_zero, from_zero)
    ranks = np.searchsorted(limits, least)
    more = np.max(np.searchsorted(limits, greatest) - ranks)  # thresholds that share an upper half
    return levels.numpy(), np.append(limits, _INFINITY), ranks.astype(np.int32), more, np.searchsorted(limits, 0)


@opaque
def adamw_8bit(
    param: torch.Tensor, grad: torch.Tensor,
    codes1: torch.Tensor, scale1: torch.Tensor, codes2: torch.Tensor, scale2: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scalars: tuple[float, float, float, float, float, float], tiny: float,
) -> None:  # fmt: skip
    """Update all but `grad` in place: arguments as in kernels/triton/adamw_8bit.py.

    tables: levels (256,) and thresholds (255,) of the first moment, then of the second, ascending.
    Raises ValueError for what does not match.
    """
    numel = param.numel()
    check_arrays(numel, tuple(FORM), param=param, grad=grad)
    check_arrays(numel, (torch.uint8,), codes1=codes1, codes2=codes2)
    check_arrays(-(-numel // BLOCK), (torch.float32,), scale1=scale1, scale2=scale2)
    check_arrays(256, (torch.float32,), levels1=tables[0], levels2=tables[2])
    check_arrays(255, (torch.float32,), thresholds1=tables[1], thresholds2=tables[3])
    beta1, beta2, *others = scalars
    numbers = tuple(np.float32(number) for number in (beta1, beta2, 1 - beta1, 1 - beta2, *others))  # rounded once
    run(
        _adamw, view(param), FORM[param.dtype], view(grad), FORM[grad.dtype],
        codes1.numpy(), scale1.numpy(), codes2.numpy(), scale2.numpy(),
        _prepared(*tables[:2]), _prepared(*tables[2:]), numbers, np.float32(tiny),
    )  # fmt: skip
