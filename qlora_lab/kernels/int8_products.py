"""x W^T with int8 activations: whole numbers within a block, float32 between blocks. Twin of infer/int8.py.

In: x (tokens, columns) float32, which round_row rounds, a packed W of 4 bits, and its levels as whole numbers from -127
to 127. Out: (tokens, rows) float32. What a block adds up is exact, so results differ from the twin's by the rounding of
float32 sums alone, and an output depends on its row of x and its row of W alone.

Moved for each weight and call: 0.5 bytes packed and 1/64 of a constant, and 1 byte of a panel that is decoded once,
stays in the second-level cache, and is read again for each tile of tokens. A lane of a register is a row of W, so a
sum becomes float32 at the cost of 3 instructions for each 8 that multiply. On a core of a Zen 4 the products of 511
tokens of SmolLM2-135M take 0.34 s, 160 billion multiplications a second, and rounding x 0.05 s. In float32 they take
1.3 s.
"""

from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange

from qlora_lab.kernels import byte_sums, cpu, sums as each, vector as v
from qlora_lab.kernels.compiled import parallel, run, thread_count
from qlora_lab.kernels.constants import undouble_into
from qlora_lab.kernels.elements import INFINITY, MAGNITUDE, NAN
from qlora_lab.kernels.packed_weight import PackedWeight

# Constants, so that a compiled loop knows them: rounding takes a third of the time that it took with arguments.
SIZE, AS_BYTES = byte_sums.tokens_at_once(), byte_sums.has_bytes()  # tokens of a tile, and the form of their numbers
WORDS = 1 if AS_BYTES else 2  # int32 for 4 numbers
TOP = 127  # the largest int8 that is used, on both sides of 0
MIDDLE = 128  # added to levels: the instruction takes one of its factors without a sign
BLOCK = 32  # columns of x with one scale, as in the twin
ROWS = 16  # of a weight, one in each lane
PANEL = 2**16  # bytes of decoded levels, a part of the second-level cache
ROUND = np.float32(1.5 * 2**23)  # added, it leaves a whole number in the low bits, ties to even
ROUND_BITS = np.int32(0x4B400000)  # of ROUND itself
TINY = np.float32(1e-30)  # as in the twin


@njit(forceinline=True)
def _whole(x, i, factor):
    """16 numbers, scaled and rounded to whole ones; int32."""
    return v.as_ints(v.load(x, i) * factor + v.splat(ROUND)) + v.splat(-ROUND_BITS)


@njit(forceinline=True)
def rounded_block(row, i):
    """BLOCK numbers from `i` on as their scale and two vectors of whole numbers, int32."""
    magnitude = v.splat(MAGNITUDE)
    tops = v.larger(v.as_ints(v.load(row, i)) & magnitude, v.as_ints(v.load(row, i + 16)) & magnitude)
    top = v.largest(tops)  # bits of floats are ordered as floats are, and NaN comes last
    absmax = v.as_floats(top)
    scale = absmax / np.float32(TOP) if top < INFINITY else NAN
    factor = v.splat(np.float32(TOP) * (np.float32(1) / max(absmax, TINY)))
    return scale, _whole(row, i, factor), _whole(row, i + 16, factor)


def level_bytes(levels: torch.Tensor) -> np.ndarray:
    """Whole levels, at most 16, as a register's look-up table (16,) int32: without a sign, four times over."""
    table = np.zeros(16, np.uint8)
    table[: len(levels)] = levels.numpy() + MIDDLE
    return np.tile(table, 4).view(np.int32)


@njit(forceinline=True)
def _write(words, signed, numbers, start):
    """32 int8 of a token, the even columns first, into every SIZE-th place of `numbers`.

    words, signed: the 32 as int32 and as int8.
    """
    if AS_BYTES:
        for k in range(8):
            numbers[start + k * SIZE] = words[k]
        return
    for k in range(16):
        i = k // 2 * 4 + k % 2  # 0 and 2, 1 and 3, 4 and 6 ...: pairs as byte_sums.dot reads them
        numbers[start + k * SIZE] = np.int32(signed[i]) & 0xFFFF | np.int32(signed[i + 2]) << 16


@njit(forceinline=True)
def round_block(row, i, place, codes, numbers, scales, starts):
    """Round BLOCK numbers of a token's row, from `i` on, to int8, beside those of the other tokens of its tile.

    place: the block, counted through all tiles, and the token's place in its tile. numbers: of a tile (columns / 4,
    SIZE) int32, twice as many in words. scales, starts: of a tile (blocks, SIZE), the scale of each block, and what its
    integer sum begins with: it takes off what MIDDLE adds. codes: from room_for_block.
    """
    block, t = place
    own, words, signed = codes
    scales[block * SIZE + t], left, right = rounded_block(row, i)
    starts[block * SIZE + t] = -MIDDLE * byte_sums.total(left + right)
    v.store(own, 0, v.evens(left, right))
    v.store(own, 16, v.odds(left, right))
    _write(words, signed, numbers, block * (BLOCK // 4 * WORDS * SIZE) + t)


@njit(forceinline=True)
def room_for_block():
    """Memory for round_block: BLOCK uint8, and the same as int32 and as int8."""
    # made once: numba counts the users of an array, and a block is rounded in the time of a few counts
    codes = np.empty(BLOCK, np.uint8)
    return codes, codes.view(np.int32), codes.view(np.int8)


@njit
def round_row(row, token, codes, numbers, scales, starts):
    """Round a token's row (columns,), all blocks of it, as round_block does."""
    blocks = len(row) // BLOCK
    first = token // SIZE * blocks  # of all tokens' blocks, those of its tile
    for block in range(blocks):
        round_block(row, block * BLOCK, (first + block, token % SIZE), codes, numbers, scales, starts)


@njit(forceinline=True)
def decode(packed, table, row, columns, panel, start):
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
def constants_of(constants, row, blocks, unit, values, scales, start):
    """Constants of ROWS rows times `unit`, as (blocks, ROWS) into `scales` from `start` on."""
    undouble_into(constants, row * blocks, ROWS * blocks, values)
    for block in range(blocks):
        for i in range(ROWS):
            scales[start + block * ROWS + i] = values[i * blocks + block] * unit


@njit(forceinline=True)
def sums_of(panel, scales, parts, x, tile, zeros):
    """Sums of ROWS rows for a tile of tokens. parts: BLOCKs in a block of the weight."""
    numbers, factors, starts = x
    totals = each.splat(zeros)
    blocks = len(scales) // ROWS
    weight, number, place = 0, tile * blocks * parts * BLOCK // 4 * WORDS * SIZE, tile * blocks * parts * SIZE
    for block in range(blocks):
        scale = v.load(scales, block * ROWS)
        for _ in range(parts):
            sums = byte_sums.splat_from(zeros, starts, place)
            for _ in range(BLOCK // 4):
                sums = byte_sums.dot(sums, v.load(panel, weight), numbers, number)
                weight += 16
                number += WORDS * SIZE
            totals = byte_sums.add_scaled(totals, sums, scale, factors, place)
            place += SIZE
    return totals


@parallel
def _multiply(x, zeros, packed, table, unit, constants, rows, block_size, parts, out, column):
    """out (tokens, rows) = x W^T, tokens filled up to whole tiles. x: what round_row writes. parts: threads.

    out may be wider: the result then begins at `column`.
    """
    tokens = len(out)
    columns = len(packed) * 8 // rows
    blocks = columns // block_size
    tiles = (rows + ROWS - 1) // ROWS
    height = max(1, PANEL // columns // ROWS)  # tiles that are decoded before all tokens pass
    for part in prange(parts):  # by hand, so that a thread allocates once and not for each panel
        panel = np.empty((height, ROWS * columns // 4), np.int32)
        scales = np.empty((height, ROWS * blocks), np.float32)
        values = np.empty(ROWS * blocks, np.float32)
        start, stop = part * tiles // parts, (part + 1) * tiles // parts
        for first in range(start, stop, height):
            n = min(height, stop - first)
            for i in range(n):
                row = min((first + i) * ROWS, rows - ROWS)  # the last tile may compute rows of its neighbour once more
                decode(packed, v.load(table, 0), row, columns, panel[i], 0)
                constants_of(constants, row, blocks, unit, values, scales[i], 0)
            for tile in range(tokens // SIZE):
                some = out[tile * SIZE : (tile + 1) * SIZE]
                for i in range(n):  # so that a tile's numbers come from the first-level cache for all rows but 16
                    sums = sums_of(panel[i], scales[i], block_size // BLOCK, x, tile, zeros)
                    each.store(sums, some, (column + min((first + i) * ROWS, rows - ROWS),))


def described(weight: PackedWeight, shape: tuple[int, int], levels: torch.Tensor, unit: float) -> tuple:
    """Return a weight as the kernels take it: its codes, 8 in an int32, the look-up table, unit, and constants."""
    numel = shape[0] * shape[1]
    arrays = cpu.arrays_of(weight)
    cpu.check_length(weight, numel, arrays.numel)
    return arrays.packed[: numel // 2].view(np.int32), level_bytes(levels), np.float32(unit), arrays.constants


def can_multiply(rows: int) -> bool:
    """Whether `multiply` takes a weight with so many rows: fewer do not fill the lanes."""
    return rows >= ROWS


class Numbers(NamedTuple):
    """Tokens as round_row rounds them, in tiles: filled up with zeros."""

    numbers: np.ndarray
    scales: np.ndarray
    starts: np.ndarray


def room_for(tiles: int, columns: int) -> Numbers:
    """Return Numbers of zeros, for so many tiles of tokens."""
    blocks = tiles * columns // BLOCK * SIZE
    numbers = np.zeros(blocks * BLOCK // 4 * WORDS, np.int32)
    return Numbers(numbers, np.zeros(blocks, np.float32), np.zeros(blocks, np.int32))


def multiply(
    x: Numbers,
    weight: PackedWeight,
    shape: tuple[int, int],
    levels: torch.Tensor,
    unit: float,
    out: torch.Tensor,
    column: int = 0,
) -> None:
    """Write x W^T, (tokens, rows), into `out` (tokens of whole tiles, at least rows) float32 from `column` on.

    weight: 4-bit codes of `shape` (rows, columns), in blocks of a multiple of BLOCK that end with the rows. levels: at
    most 16 whole numbers from -127 to 127, float32; 1 of them stands for `unit`.
    """
    looked_up = described(weight, shape, levels, unit)
    zeros = (np.float32(0),) * SIZE  # a tuple, so that sums are registers and not an array
    run(_multiply, tuple(x), zeros, *looked_up, shape[0], weight.block_size, thread_count(), out.numpy(), column)
