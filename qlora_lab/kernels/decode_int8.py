"""The products of one token, or a few, with whole numbers: a part of decode_products.py. Twin of infer/int8.py.

In: x (tokens, columns) float32, rounded once for all products that read it, and rows of a weight packed in 4 bits.
Out: 16 parts of each row's sum, float32. What 8 columns add up is exact, as in int8_products.py, so results differ from
the twin's by the rounding of float32 sums alone, and the order of a sum does not depend on the number of tokens.

Read for each weight, for all tokens together: 0.52 bytes with double quantization. A register of 64 bytes holds 128
weights of a row. Two look-ups turn their codes into levels, two VNNI instructions multiply and add them, and three more
make float32 of 16 sums: 11 instructions, less than half of what float32 sums take. On a Zen 4 that is 1.9 cycles for 32
weights from the second-level cache, and 0.7 for their constants. Memory gives a core 32 weights in 3.2 cycles, so a
large weight waits for memory alone.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from qlora_lab.kernels import byte_sums, sums as each, vector as v
from qlora_lab.kernels.int8_products import BLOCK, MIDDLE, rounded_block
from qlora_lab.kernels.words import I16

CHUNK = 128  # columns of a row whose codes fill a register
PER_CHUNK = 64  # int32 that x takes for a chunk of a token: 16 of even columns, of odd ones, of starts, of scales
FOR_ONE, FOR_SEVERAL = 4, 2  # rows that share loads of x: of eight tokens, 16 sums and 4 registers of levels are there
AHEAD = 2**12  # words of 4 bytes: the least distance at which codes are asked for


def can_multiply(columns: int, block_size: int) -> bool:
    """Whether rows of so many columns have a chunk, and a chunk the same places of blocks wherever it begins."""
    return columns >= CHUNK and block_size >= BLOCK and block_size & (block_size - 1) == 0


@njit
def aligned(n):
    """Memory for n int32 from a multiple of 64 bytes on: a load of 64 bytes across two lines takes twice as long."""
    memory = np.empty(n + 16, np.int32)
    first = (-memory.ctypes.data & 63) // 4
    return memory[first : first + n]


@njit
def round_rows(x, numbers):
    """Round x (tokens, columns) to int8 in blocks of BLOCK, as (chunks, tokens, PER_CHUNK) int32 into `numbers`, flat.

    A lane of a chunk belongs to 8 columns. Its start takes off what MIDDLE adds to their levels. The last chunk ends
    with the row: columns that the one before it has as well count as zeros there.
    """
    tokens, columns = x.shape
    blocks = columns // BLOCK
    chunks = (columns + CHUNK - 1) // CHUNK
    signed, scales = numbers.view(np.uint8), numbers.view(np.float32)
    sums = np.empty(16, np.int32)
    for i in range((chunks - 1) * tokens * PER_CHUNK, chunks * tokens * PER_CHUNK):
        numbers[i] = 0
    for token in range(tokens):
        row = x[token]
        for block in range(blocks):
            scale, left, right = rounded_block(row, block * BLOCK)
            even, odd = v.evens(left, right), v.odds(left, right)
            chunk, quarter = block // 4, block % 4
            if chunk == chunks - 1:
                quarter += 4 * chunks - blocks
            place = (chunk * tokens + token) * PER_CHUNK + 4 * quarter
            v.store(signed, 4 * place, even)
            v.store(signed, 4 * (place + 16), odd)
            v.store(sums, 0, even + odd)
            for lane in range(4):
                total = sums[4 * lane] + sums[4 * lane + 1] + sums[4 * lane + 2] + sums[4 * lane + 3]
                numbers[place + 32 + lane] = -MIDDLE * total
                scales[place + 48 + lane] = scale


def _loaded(context, builder, array_type, array, index, kind):
    return builder.load(v.pointer_to(context, builder, array_type, array, index, kind), align=v.align_of(array_type))


@intrinsic
def _levels(typing, table, codes, rows, i):
    """The levels of 128 codes of each row, two registers of bytes: of even columns, and of odd ones.

    codes: flat int32. rows: a tuple of the places where rows begin.
    """
    result = types.UniTuple(v.INTS, 2 * len(rows))

    def emit(context, builder, sig, args):
        mask, four = (ir.Constant(v.I32, [n] * v.LANES) for n in (0x0F0F0F0F, 4))
        found = []
        for row in cgutils.unpack_tuple(builder, args[2]):
            both = _loaded(context, builder, codes, args[1], builder.add(row, args[3]), v.I32)
            for half in (builder.lshr(both, four), both):  # a look-up of bytes reads more than 4 bits
                found.append(byte_sums.permuted_bytes(builder, args[0], builder.and_(half, mask)))
        return context.make_tuple(builder, sig.return_type, found)

    return result(table, codes, rows, types.intp), emit


@intrinsic
def _constants(typing, scales, rows, i, places):
    """Of each row the constants of a chunk's lanes: its four from scales[row + i] on, in `places` (0 to 3)."""
    four = ir.VectorType(ir.FloatType(), 4)  # a whole register from here would mostly lie across two lines

    def emit(context, builder, sig, args):
        found = []
        for row in cgutils.unpack_tuple(builder, args[1]):
            some = _loaded(context, builder, scales, args[0], builder.add(row, args[2]), four)
            filled = builder.shuffle_vector(some, some, ir.Constant(v.I32, [0, 1, 2, 3] * 4))
            found.append(v.permuted(builder, filled, args[3]))
        return context.make_tuple(builder, sig.return_type, found)

    return types.UniTuple(v.FLOATS, len(rows))(scales, rows, types.intp, places), emit


def _dot(builder, sums, levels, numbers):
    """sums + the products of 4 bytes in each lane: levels without a sign, and int8 numbers."""
    if byte_sums.has_bytes():
        return v.call_intrinsic(builder, "llvm.x86.avx512.vpdpbusd.512", v.I32, [sums, levels, numbers])
    eight = ir.Constant(I16, [8] * 2 * v.LANES)
    levels, numbers = (builder.bitcast(part, I16) for part in (levels, numbers))
    low = builder.and_(levels, ir.Constant(I16, [0xFF] * 2 * v.LANES)), builder.shl(numbers, eight)
    high = builder.lshr(levels, eight), numbers
    for level, number in (low, high):  # a byte of x in the upper half of a word keeps its sign on the way down
        sums = builder.add(sums, byte_sums.dotted_words(builder, level, builder.ashr(number, eight)))
    return sums


@intrinsic
def _add_dots(typing, totals, levels, constants, x, start):
    """totals[r, t] + the products of a chunk for each row r and token t, scaled. x: flat int32, from round_rows."""

    def emit(context, builder, sig, args):
        values, weights, factors = (cgutils.unpack_tuple(builder, part) for part in args[:3])
        tokens = len(values) // len(factors)
        # One pointer and constant offsets: fewer addresses than there are registers for them.
        first = v.pointer_to(context, builder, x, *args[3:], v.I32)
        for t in range(tokens):
            places = (builder.gep(first, [context.get_constant(types.intp, 4 * t + k)]) for k in range(4))
            even, odd, begin, scale = (builder.load(place, align=v.align_of(x)) for place in places)
            scale = builder.bitcast(scale, v.F32)
            for r, factor in enumerate(factors):
                sums = _dot(builder, _dot(builder, begin, weights[2 * r], even), weights[2 * r + 1], odd)
                parts = builder.fmul(builder.sitofp(sums, v.F32), scale), factor, values[r * tokens + t]
                values[r * tokens + t] = v.call_intrinsic(builder, each.FMA, v.F32, parts)
        return context.make_tuple(builder, totals, values)

    return totals(totals, levels, constants, x, types.intp), emit


@intrinsic
def _together(typing, zeros, row, last):
    """The rows from `row` on that share loads of x, as a tuple; where they run out before `last`, the last again."""
    count = FOR_ONE if len(zeros) == 1 else FOR_SEVERAL  # a tuple's length belongs to its type

    def emit(context, builder, sig, args):
        end = builder.sub(args[2], context.get_constant(types.intp, 1))
        rows = [builder.add(args[1], context.get_constant(types.intp, k)) for k in range(count)]
        rows = [builder.select(builder.icmp_signed("<", row, end), row, end) for row in rows]
        return context.make_tuple(builder, sig.return_type, rows)

    return types.UniTuple(types.intp, count)(zeros, types.intp, types.intp), emit


@njit(forceinline=True)
def _add_rows(sums, rows, first, columns, codes, table, scales, blocks, shift, places, x, tokens):
    """sums + the products of `rows` (a tuple), whose constants begin with those of row `first`."""
    words = columns // 8  # of a row's codes
    starts = each.scaled(rows, words, 0)
    constants = each.scaled(rows, blocks, -first * blocks)
    # what lies one group of rows ahead at least: less may be being read already
    ahead = max(AHEAD, 4 * words)
    x_place = 0
    for i in range(0, words, 16):
        for start in starts:
            v.prefetch(codes, start + i + ahead)
        place = min(i, words - 16)  # the last chunk ends with the row
        levels = _levels(table, codes, starts, place)
        sums = _add_dots(sums, levels, _constants(scales, constants, 8 * place >> shift, places), x, x_place)
        x_place += PER_CHUNK * tokens
    return sums


@njit
def add_rows(codes, table, scales, unit, block_size, first, last, columns, x, zeros, lanes):
    """Add the products of the rows first to last to lanes (tokens, 16 a row): 16 parts of each sum.

    codes: all of the weight, int32. scales: constants from row `first` on, which are multiplied by `unit` here.
    """
    blocks = columns // block_size
    shift = 0
    while 1 << shift < block_size:
        shift += 1
    # 4 lanes for each BLOCK of columns
    places = byte_sums.lane_numbers() >> v.splat(2)
    if block_size >= CHUNK:
        places = places & v.splat(0)
    elif block_size > BLOCK:
        places = places >> v.splat(1)
    for i in range(0, (last - first) * blocks, 16):
        v.store(scales, i, v.load(scales, i) * v.splat(unit))
    looked_up = v.load(table, 0)
    tokens = len(zeros)
    for row in range(first, last, FOR_ONE if tokens == 1 else FOR_SEVERAL):
        rows = _together(zeros, row, last)
        starts = each.scaled(rows, 16, -16 * first)
        sums = each.load(zeros, lanes, starts)
        sums = _add_rows(sums, rows, first, columns, codes, looked_up, scales, blocks, shift, places, x, tokens)
        each.store(sums, lanes, starts)
