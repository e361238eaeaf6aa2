"""x W^T with int8 activations: whole numbers within a block, float32 between blocks. Twin of infer/int8.py.

In: x (tokens, columns) float32, a packed W of 4 bits, and its levels as whole numbers from -127 to 127. Out: (tokens,
rows) float32. What a block adds up is exact, so results differ from the twin's by the rounding of float32 sums alone,
and an output depends on its row of x and its row of W alone.

Moved for each weight and call: 0.5 bytes packed and 1/64 of a constant, and 1 byte of a panel that is decoded once,
stays in the second-level cache, and is read again for each tile of tokens. A lane of a register is a row of W, so a
sum becomes float32 at the cost of 3 instructions for each 8 that multiply. On a core of a Zen 4 the products of 511
tokens of SmolLM2-135M take 0.34 s, 160 billion multiplications a second, and rounding x 0.05 s. In float32 they take
1.3 s.
"""

import numpy as np
import torch
from numba import njit, prange

from qlora_lab.kernels import byte_sums, cpu, sums as each, vector as v
from qlora_lab.kernels.compiled import parallel, run, thread_count
from qlora_lab.kernels.constants import undouble_into
from qlora_lab.kernels.elements import INFINITY, MAGNITUDE, NAN, view
from qlora_lab.kernels.packed_weight import PackedWeight

TOP = 127  # the largest int8 that is used, on both sides of 0
MIDDLE = 128  # added to levels: the instruction takes one of its factors without a sign
BLOCK = 32  # columns of x with one scale, as in the twin
ROWS = 16  # of a weight, one in each lane
PANEL = 2**16  # bytes of decoded levels, a part of the second-level cache
ROUND = np.float32(1.5 * 2**23)  # added, it leaves a whole number in the low bits, ties to even
ROUND_BITS = np.int32(0x4B400000)  # of ROUND itself
TINY = np.float32(1e-30)  # as in the twin


@njit(forceinline=True)
def whole16(x, i, factor):
    """16 numbers, scaled and rounded to whole ones; int32."""
    return v.as_ints(v.load(x, i) * factor + v.splat(ROUND)) + v.splat(-ROUND_BITS)


@njit(forceinline=True)
def _write(words, signed, numbers, start, size, as_bytes):
    """32 int8 of a token, the even columns first, into every size-th place of `numbers`.

    words, signed: the 32 as int32 and as int8.
    """
    if as_bytes:
        for k in range(8):
            numbers[start + k * size] = words[k]
        return
    for k in range(16):
        i = k // 2 * 4 + k % 2  # 0 and 2, 1 and 3, 4 and 6 ...: pairs as byte_sums.dot reads them
        numbers[start + k * size] = np.int32(signed[i]) & 0xFFFF | np.int32(signed[i + 2]) << 16


@parallel
def _round_rows(x, tokens, columns, size, as_bytes, numbers, scales, starts):
    """Round x, flat, to int8, in tiles of `size` tokens, which lie side by side.

    numbers: of a tile (columns / 4, size) int32, twice as many in words. scales, starts: of a tile (columns / BLOCK,
    size), the scale of each block, and what its integer sum begins with: it takes off what MIDDLE adds.
    """
    blocks = columns // BLOCK
    per = BLOCK // 4 * size if as_bytes else BLOCK // 2 * size  # places for a block of each token
    magnitude = v.splat(MAGNITUDE)
    for tile in prange((tokens + size - 1) // size):
        codes = np.empty(BLOCK, np.uint8)
        words, signed = codes.view(np.int32), codes.view(np.int8)  # made here: for each block they took half the time
        for t in range(min(size, tokens - tile * size)):
            row = (tile * size + t) * columns
            for block in range(blocks):
                i = row + block * BLOCK
                tops = v.larger(v.as_ints(v.load(x, i)) & magnitude, v.as_ints(v.load(x, i + 16)) & magnitude)
                top = v.largest(tops)  # bits of floats are ordered as floats are, and NaN comes last
                absmax = v.as_floats(top)
                place = (tile * blocks + block) * size + t
                scales[place] = absmax / np.float32(TOP) if top < INFINITY else NAN
                factor = v.splat(np.float32(TOP) * (np.float32(1) / max(absmax, TINY)))
                left, right = whole16(x, i, factor), whole16(x, i + 16, factor)
                starts[place] = -MIDDLE * byte_sums.total(left + right)
                v.store(codes, 0, v.evens(left, right))
                v.store(codes, 16, v.odds(left, right))
                _write(words, signed, numbers, (tile * blocks + block) * per + t, size, as_bytes)


@njit(forceinline=True)
def _decode(packed, table, row, columns, panel, start):
    """Levels of ROWS rows from `row` on, uint8, as (columns / 4, ROWS, 4) into panel, int32, from `start` on.

    A gather takes 8 codes of each row, so rows come to lie side by side without a transposition.
    """
    mask = v.splat(0x0F0F0F0F)
    words = columns // 8  # of a row's codes
    places = byte_sums.lane_numbers() * v.splat(words) + v.splat(row * words)
    for i in range(start, start + 4 * columns, 128):  # 32 columns
        for k in range(0, 64, 16):
            codes = v.gather(packed, places)
            v.store(panel, i + k, byte_sums.permute_bytes(table, codes >> v.splat(4) & mask))  # even columns
            v.store(panel, i + k + 64, byte_sums.permute_bytes(table, codes & mask))
            places = places + v.splat(1)


@njit(forceinline=True)
def _constants(constants, row, blocks, unit, values, scales, start):
    """Constants of ROWS rows times `unit`, as (blocks, ROWS) into `scales` from `start` on."""
    undouble_into(constants, row * blocks, ROWS * blocks, values)
    for block in range(blocks):
        for i in range(ROWS):
            scales[start + block * ROWS + i] = values[i * blocks + block] * unit


@njit(forceinline=True)
def _sums(panel, scales, parts, x, tile, per, zeros):
    """Sums of ROWS rows for a tile of tokens. parts: BLOCKs in a block of the weight."""
    numbers, factors, starts = x
    size = len(zeros)
    totals = each.splat(zeros)
    blocks = len(scales) // ROWS
    weight, number, place = 0, tile * blocks * parts * (BLOCK // 4) * per, tile * blocks * parts * size
    for block in range(blocks):
        scale = v.load(scales, block * ROWS)
        for _ in range(parts):
            sums = byte_sums.splat_from(zeros, starts, place)
            for _ in range(BLOCK // 4):
                sums = byte_sums.dot(sums, v.load(panel, weight), numbers, number)
                weight += 16
                number += per
            totals = byte_sums.add_scaled(totals, sums, scale, factors, place)
            place += size
    return totals


@parallel
def _multiply(x, per, zeros, packed, table, unit, constants, block_size, parts, out):
    """out (tokens, rows) = x W^T, tokens filled up to whole tiles. x: what _round_rows writes. parts: threads."""
    tokens, rows = out.shape
    columns = len(packed) * 8 // rows
    blocks = columns // block_size
    tiles = (rows + ROWS - 1) // ROWS
    height = max(1, PANEL // columns // ROWS)  # tiles that are decoded before all tokens pass
    size = len(zeros)
    for part in prange(parts):  # by hand, so that a thread allocates once and not for each panel
        panel = np.empty((height, ROWS * columns // 4), np.int32)
        scales = np.empty((height, ROWS * blocks), np.float32)
        values = np.empty(ROWS * blocks, np.float32)
        start, stop = part * tiles // parts, (part + 1) * tiles // parts
        for first in range(start, stop, height):
            n = min(height, stop - first)
            for i in range(n):
                row = min((first + i) * ROWS, rows - ROWS)  # the last tile may compute rows of its neighbour once more
                _decode(packed, v.load(table, 0), row, columns, panel[i], 0)
                _constants(constants, row, blocks, unit, values, scales[i], 0)
            for tile in range(tokens // size):
                some = out[tile * size : (tile + 1) * size]
                for i in range(n):  # so that a tile's numbers come from the first-level cache for all rows but 16
                    sums = _sums(panel[i], scales[i], block_size // BLOCK, x, tile, per, zeros)
                    each.store(sums, some, (min((first + i) * ROWS, rows - ROWS),))


def can_multiply(rows: int) -> bool:
    """Whether `multiply` takes a weight with so many rows: fewer do not fill the lanes."""
    return rows >= ROWS


def multiply(x: torch.Tensor, weight: PackedWeight, rows: int, levels: torch.Tensor, unit: float) -> torch.Tensor:
    """Multiply by W^T: (tokens, columns) float32 -> (tokens, rows) float32.

    weight: 4-bit codes, in blocks of a multiple of BLOCK that end with the rows. levels: at most 16 whole numbers from
    -127 to 127, float32; 1 of them stands for `unit`.
    """
    tokens, columns = x.shape
    block_size = weight.block_size
    arrays = cpu.arrays_of(weight)
    cpu.check_length(weight, rows * columns, arrays.numel)
    size, as_bytes = byte_sums.tokens_at_once(), byte_sums.has_bytes()
    per = size if as_bytes else 2 * size
    filled = -(-tokens // size) * size  # with tokens of zeros: whole tiles
    numbers = np.zeros(filled // size * columns // 4 * per, np.int32)
    scales = np.zeros(filled * columns // BLOCK, np.float32)
    starts = np.zeros(len(scales), np.int32)
    run(_round_rows, view(x.contiguous()), tokens, columns, size, as_bytes, numbers, scales, starts)
    table = np.zeros(16, np.uint8)
    table[: len(levels)] = levels.numpy() + MIDDLE
    out = torch.empty(filled, rows, device="cpu")
    packed = arrays.packed[: rows * columns // 2].view(np.int32)
    looked_up = packed, np.tile(table, 4).view(np.int32), np.float32(unit), arrays.constants
    zeros = (np.float32(0),) * size  # a tuple, so that sums are registers and not an array
    given = (numbers, scales, starts), per, zeros
    run(_multiply, *given, *looked_up, block_size, thread_count(), out.numpy())
    return out[:tokens]
