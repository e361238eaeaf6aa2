"""silu(x G^T) * (x U^T) in int8, rounded to int8 again: gate, up and what `down` reads, in one pass over a prompt.

In: x (tokens, columns) as int8_products.round_row rounds it, and two packed weights of 4 bits of one shape, (rows,
columns). Out: Numbers of (tokens, rows), bit for bit those of int8_products.multiply, prompt_rows.gated and its
rounding one after the other.

What lies between the products, 12 KiB a token in SmolLM2-135M, never leaves the first-level cache: the same 32 rows of
both weights give one block of the result. In memory, those numbers are more than a second-level cache holds: they were
written and read again for each layer.
"""

import numpy as np
from numba import njit, prange

from qlora_lab.kernels import int8_products as products, sums as each, vector as v
from qlora_lab.kernels.compiled import parallel, run, thread_count
from qlora_lab.kernels.decode_step import gate16
from qlora_lab.kernels.int8_products import BLOCK, PANEL, ROWS, SIZE, Numbers
from qlora_lab.kernels.packed_weight import PackedWeight


@njit
def _decode(packed, table, unit, constants, row, place, columns, blocks, values, panel, scales):
    """BLOCK rows of a weight from `row` on, as two tiles of levels and of constants, from `place` on."""
    for half in range(2):
        first = row + half * ROWS
        products.decode(packed, v.load(table, 0), first, columns, panel[place + half], 0)
        products.constants_of(constants, first, blocks, unit, values, scales[place + half], 0)


@njit
def _gate_block(both, gated, block, codes, rounded):
    """Gate and round BLOCK numbers of each token of a tile. both: of a token 32 of the gate, then 32 of up; flat."""
    for t in range(SIZE):
        for i in range(0, BLOCK, 16):  # flat, because a row of its own for each token costs more than its vectors
            left = 2 * BLOCK * t + i
            v.store(gated, i, gate16(v.load(both, left), v.load(both, left + BLOCK)))
        products.round_block(gated, 0, (block, t), codes, *rounded)


@parallel
def _multiply(x, zeros, gate, up, shape, block_size, tokens, parts, rounded):
    """Write the numbers for `down`. gate, up: codes, table, unit, constants. tokens: tiles of them. parts: threads."""
    rows, columns = shape
    g_codes, g_table, g_unit, g_constants = gate  # numba hands no tuple of tuples to its threads
    u_codes, u_table, u_unit, u_constants = up
    blocks, tiles = columns // block_size, rows // BLOCK
    # A tile's numbers stay in the first-level cache while these rows of both weights pass, as in int8_products.
    height = max(1, PANEL // columns // (4 * ROWS))  # blocks of rows that are decoded before all tokens pass
    for part in prange(parts):
        panel = np.empty((4 * height, ROWS * columns // 4), np.int32)
        scales, values = np.empty((4 * height, ROWS * blocks), np.float32), np.empty(ROWS * blocks, np.float32)
        both, gated = np.empty((SIZE, 2 * BLOCK), np.float32), np.empty(BLOCK, np.float32)
        flat, codes = both.reshape(-1), products.room_for_block()
        stop = (part + 1) * tiles // parts
        for first in range(part * tiles // parts, stop, height):
            n = min(height, stop - first)
            for i in range(n):
                row, room = (first + i) * BLOCK, (columns, blocks, values, panel, scales)
                _decode(g_codes, g_table, g_unit, g_constants, row, 4 * i, *room)
                _decode(u_codes, u_table, u_unit, u_constants, row, 4 * i + 2, *room)
            for tile in range(tokens):
                for i in range(n):
                    for k in range(4):  # two tiles of the gate, and the same two of up
                        own, theirs = panel[4 * i + k], scales[4 * i + k]
                        sums = products.sums_of(own, theirs, block_size // BLOCK, x, tile, zeros)
                        each.store(sums, both, (k * ROWS,))
                    _gate_block(flat, gated, tile * tiles + first + i, codes, rounded)


def can_multiply(first, second) -> bool:
    """Whether `multiply` takes two weights, with a shape and a block_size: 32 rows are a block of what `down` reads."""
    # blocks of one size, so that both have as many constants
    return first.shape[0] % BLOCK == 0 and first.block_size == second.block_size


def multiply(x: Numbers, both: list[PackedWeight], levels: list, shape: tuple[int, int], out: Numbers) -> None:
    """Write silu(x G^T) * (x U^T), rounded, into `out`.

    both: G and U as int8_products.multiply takes them, of `shape` (rows, columns). levels: for each the whole levels,
    (n_levels,) float32, and what 1 of them stands for. out: Numbers of as many tiles, and of `rows` columns.
    """
    weights = (products.described(weight, shape, *theirs) for weight, theirs in zip(both, levels, strict=True))
    tiles = len(x.scales) * BLOCK // (SIZE * shape[1])
    zeros = (np.float32(0),) * SIZE
    run(_multiply, tuple(x), zeros, *weights, tuple(shape), both[0].block_size, tiles, thread_count(), tuple(out))
