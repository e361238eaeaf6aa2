"""Constants of blocks inside compiled kernels, with double quantization undone.

In: `constants`, the tuple that cpu.arrays_of describes. Out: float32, one for each block. Twin of
quant.double_quant.double_dequantize, bit for bit.
"""

import numpy as np
from numba import njit

from qlora_lab.kernels import vector as v


@njit(forceinline=True)
def undouble(constants, first, n):
    """Constants of n blocks from `first` on: a view where they are not quantised, else new memory."""
    absmax, codes, _, _, _, _ = constants
    if len(codes) == 0:
        return absmax[first : first + n]
    values = np.empty(n, np.float32)  # (n,)
    undouble_into(constants, first, n, values)
    return values


@njit(forceinline=True)
def undouble_into(constants, first, n, values):
    """Write the constants of n blocks from `first` on into `values`, at least n long: nothing is allocated."""
    absmax, codes, scale, offset, table, group_shift = constants
    if len(codes) == 0:
        for i in range(n):  # a slice on the left makes numba compile 2 s longer, for its error message
            values[i] = absmax[first + i]
        return
    i = 0
    while i < n:
        block = first + i
        if i + 16 <= n and block >> group_shift == (block + 15) >> group_shift:  # 16 constants with one scale
            factor = v.splat(scale[block >> group_shift])
            v.store(values, i, v.gather(table, v.load(codes, block)) * factor + v.splat(offset))
            i += 16
        else:
            values[i] = table[codes[block]] * scale[block >> group_shift] + offset
            i += 1
