"""x W^T in float32 for the tokens of a prompt and a packed W of 4 bits. Twin of x @ dequantize(W).t().

In: x in tiles of tokens (prompt_rows.py), float32. Out: (tokens, rows) float32. A sum goes from the first column to the
last, each product added with one rounding, so an output depends on its row of x and its row of W alone.

As in int8_products.py a lane is a row of W, and a panel of decoded weights stays in the second-level cache while all
tokens pass: 64 bytes of it and 12 numbers of x for 12 multiplications of 16 lanes, one a cycle on a Zen 4. A weight is
decoded once for a prompt, in a thirtieth of the time for 512 tokens.
"""

import numpy as np
import torch
from numba import njit, prange

from qlora_lab.kernels import byte_sums, cpu, sums as each, vector as v
from qlora_lab.kernels.compiled import parallel, run, thread_count
from qlora_lab.kernels.int8_products import ROWS, SIZE, constants_of
from qlora_lab.kernels.packed_weight import PackedWeight

PANEL = 2**16  # decoded weights, 256 KiB: a quarter of the second-level cache
ONE = np.float32(1)


@njit
def _decode(packed, levels, row, scales, block_size, panel):
    """ROWS rows from `row` on, as (columns, ROWS) into panel, flat. scales: (blocks, ROWS), flat."""
    columns = len(panel) // ROWS
    words = columns // 8  # of a row's codes
    table = v.load(levels, 0)
    places = byte_sums.lane_numbers() * v.splat(words) + v.splat(row * words)
    for i in range(0, len(panel), 8 * ROWS):
        scale = v.load(scales, i // ROWS // block_size * ROWS)
        codes = v.gather(packed, places)  # 8 columns of each row
        places = places + v.splat(1)
        for k in range(0, 8, 2):  # the even column is the upper half of its byte
            v.store(panel, i + k * ROWS, v.permute(table, codes >> v.splat(4 * k + 4)) * scale)
            v.store(panel, i + k * ROWS + ROWS, v.permute(table, codes >> v.splat(4 * k)) * scale)


@njit(forceinline=True)
def _sums(panel, x, start, zeros):
    """Sums of ROWS rows for a tile of tokens, which begins at `start` of x: (columns, tokens)."""
    sums = each.splat(zeros)
    for i in range(0, len(panel), ROWS):
        sums = each.fma_scalars(sums, v.load(panel, i), x, start)
        start += len(zeros)
    return sums


@parallel
def _multiply(x, zeros, packed, levels, constants, shape, block_size, parts, out, column):
    """out (tokens, rows) = x W^T, tokens filled up to whole tiles, from `column` on. parts: threads."""
    rows, columns = shape
    blocks = columns // block_size
    tiles = (rows + ROWS - 1) // ROWS
    height = max(1, PANEL // columns // ROWS)  # tiles that are decoded before all tokens pass
    for part in prange(parts):  # by hand, so that a thread allocates once and not for each panel
        panel = np.empty((height, ROWS * columns), np.float32)
        scales, values = np.empty(ROWS * blocks, np.float32), np.empty(ROWS * blocks, np.float32)
        stop = (part + 1) * tiles // parts
        for first in range(part * tiles // parts, stop, height):
            n = min(height, stop - first)  # of the last panel
            for i in range(n):
                row = min((first + i) * ROWS, rows - ROWS)  # the last tile may compute rows of its neighbour once more
                constants_of(constants, row, blocks, ONE, values, scales, 0)  # of double quantization, decoded once
                _decode(packed, levels, row, scales, block_size, panel[i])
            for tile in range(len(out) // SIZE):
                some = out[tile * SIZE : (tile + 1) * SIZE]
                for i in range(n):  # so that a tile's numbers come from the first-level cache for all rows but 16
                    sums = _sums(panel[i], x, tile * SIZE * columns, zeros)
                    each.store(sums, some, (column + min((first + i) * ROWS, rows - ROWS),))


def can_multiply(rows: int) -> bool:
    """Whether `multiply` takes a weight with so many rows, on this CPU: fewer do not fill the lanes."""
    return rows >= ROWS and v.is_fast()


def multiply(x: np.ndarray, weight: PackedWeight, shape: tuple[int, int], out: torch.Tensor, column: int = 0) -> None:
    """Write x W^T, (tokens, rows), into `out` (tokens of whole tiles, at least rows) float32 from `column` on.

    weight: 4-bit codes of `shape` (rows, columns), in blocks of a multiple of 8 that end with the rows.
    """
    arrays = cpu.arrays_of(weight)
    cpu.check_length(weight, shape[0] * shape[1], arrays.numel)
    packed = arrays.packed[: shape[0] * shape[1] // 2].view(np.int32)
    zeros = (np.float32(0),) * SIZE
    given = x, zeros, packed, arrays.levels, arrays.constants, tuple(shape)
    run(_multiply, *given, weight.block_size, thread_count(), out.numpy(), column)
