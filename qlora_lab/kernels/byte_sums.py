"""Sums of products of bytes for numba: integer dot products of 16 rows of a weight with several tokens.

In and out: the vectors of vector.py, and tuples of them as in sums.py. A lane of a weight holds four levels, uint8; a
number of `x` is four numbers of one token, int8. AVX512-VNNI multiplies and adds 64 of them in one instruction. Other
CPUs take them as 32 words at a time, in plain LLVM vector code; x then holds words (`has_bytes` tells which).
"""

from functools import lru_cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qlora_lab.kernels import vector as v
from qlora_lab.kernels.words import I16

BYTES = ir.VectorType(ir.IntType(8), 4 * v.LANES)
TOKENS = 12  # that share a look-up: 12 sums in int32, 12 in float32 and a weight fit into 32 registers
TOKENS_OF_16 = 4  # where there are 16 registers of half the width


@lru_cache
def has_bytes() -> bool:
    """Whether this CPU adds up products of bytes in one instruction."""
    return {"avx512bw", "avx512vnni"} <= v.host_features()


@lru_cache
def tokens_at_once() -> int:
    """How many tokens' sums fit into the registers."""
    return TOKENS if "avx512f" in v.host_features() else TOKENS_OF_16


@intrinsic
def lane_numbers(typing):
    """0 to 15, int32."""

    def emit(context, builder, sig, args):
        return ir.Constant(v.I32, list(range(v.LANES)))

    return v.INTS(), emit


@intrinsic
def permute_bytes(typing, table, indices):
    """table[index] for each of 64 bytes, of which each is below 16. `table`: 16 bytes, four times over."""

    def emit(context, builder, sig, args):
        return permuted_bytes(builder, *args)

    return v.INTS(v.INTS, v.INTS), emit


def permuted_bytes(builder, table, indices):
    entries, codes = (builder.bitcast(part, BYTES) for part in (table, indices))
    features = v.host_features()
    if "avx512bw" in features:
        looked_up = v.call_intrinsic(builder, "llvm.x86.avx512.pshuf.b.512", BYTES, [entries, codes])
    elif "avx2" in features:
        looked_up = _permute_halves(builder, entries, codes)
    else:  # one after the other: a weight is looked up once for a whole prompt
        looked_up = ir.Constant(BYTES, ir.Undefined)
        for i in range(4 * v.LANES):
            place = ir.Constant(ir.IntType(32), i)
            index = builder.zext(builder.extract_element(codes, place), ir.IntType(32))
            looked_up = builder.insert_element(looked_up, builder.extract_element(entries, index), place)
    return builder.bitcast(looked_up, v.I32)


def _permute_halves(builder, entries, codes):
    half = ir.VectorType(ir.IntType(8), 2 * v.LANES)  # a register of AVX2
    found = []
    for start in (0, 2 * v.LANES):
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), 2 * v.LANES), list(range(start, start + 2 * v.LANES)))
        parts = [builder.shuffle_vector(part, part, lanes) for part in (entries, codes)]
        found.append(v.call_intrinsic(builder, "llvm.x86.avx2.pshuf.b", half, parts))
    every = ir.Constant(ir.VectorType(ir.IntType(32), 4 * v.LANES), list(range(4 * v.LANES)))
    return builder.shuffle_vector(*found, every)


def _number(context, builder, array_type, array, start, t):
    """array[start + t]: one pointer and constant offsets, as few addresses as possible."""
    first = context.make_array(array_type)(context, builder, array).data
    pointer = builder.gep(builder.gep(first, [start]), [context.get_constant(types.intp, t)])
    return builder.load(pointer, align=v.align_of(array_type))


@intrinsic
def splat_from(typing, zeros, array, start):
    """A tuple of vectors, as many as `zeros`, each with array[start + t] in every lane; int32."""

    def emit(context, builder, sig, args):
        numbers = [_number(context, builder, array, *args[1:], t) for t in range(len(zeros))]
        values = [v.splatted(builder, number) for number in numbers]
        return context.make_tuple(builder, sig.return_type, values)

    return types.UniTuple(v.INTS, len(zeros))(zeros, array, types.intp), emit


@intrinsic
def total(typing, vector):
    """The sum of 16 int32."""

    def emit(context, builder, sig, args):
        return v.call_intrinsic(builder, "llvm.vector.reduce.add.v16i32", ir.IntType(32), args)

    return types.int32(v.INTS), emit


@intrinsic
def dot(typing, sums, weights, x, start):
    """sums[t] + the products of 4 levels in each lane of `weights` with 4 numbers of token t, all of them int32.

    x: flat int32. Where has_bytes(), x[start + t] holds a token's 4 int8. Elsewhere it holds the first and the third
    as words, and x[start + len(sums) + t] the second and the fourth.
    """

    def emit(context, builder, sig, args):
        n = len(sums)
        updated = []
        mask = ir.Constant(v.I32, [0x00FF00FF] * v.LANES)
        high = builder.lshr(args[1], ir.Constant(v.I32, [8] * v.LANES))
        words = builder.and_(args[1], mask), builder.and_(high, mask)
        for t, value in enumerate(cgutils.unpack_tuple(builder, args[0])):
            if has_bytes():
                number = v.splatted(builder, _number(context, builder, x, *args[2:], t))
                value = v.call_intrinsic(builder, "llvm.x86.avx512.vpdpbusd.512", v.I32, [value, args[1], number])
            else:
                for k, word in enumerate(words):
                    number = v.splatted(builder, _number(context, builder, x, *args[2:], k * n + t))
                    value = builder.add(value, dotted_words(builder, word, number))
            updated.append(value)
        return context.make_tuple(builder, sums, updated)

    return sums(sums, v.INTS, x, types.intp), emit


def dotted_words(builder, left, right):
    """The sum of two products of words in each lane. LLVM finds the one instruction that x86 has for it."""
    wide = ir.VectorType(ir.IntType(32), 2 * v.LANES)
    product = builder.mul(*(builder.sext(builder.bitcast(part, I16), wide) for part in (left, right)))
    even, odd = (
        builder.shuffle_vector(product, product, ir.Constant(v.I32, list(range(first, 2 * v.LANES, 2))))
        for first in (0, 1)
    )
    return builder.add(even, odd)


@intrinsic
def add_scaled(typing, totals, sums, scales, array, start):
    """totals[t] + sums[t] * scales * array[start + t]: int32 sums of a block become float32. scales: of 16 rows."""

    def emit(context, builder, sig, args):
        updated = []
        pairs = zip(*(cgutils.unpack_tuple(builder, part) for part in args[:2]), strict=True)
        for t, (total, value) in enumerate(pairs):
            scaled = builder.fmul(builder.sitofp(value, v.F32), args[2])
            factor = v.splatted(builder, _number(context, builder, array, *args[3:], t))
            updated.append(v.call_intrinsic(builder, "llvm.fma.v16f32", v.F32, [scaled, factor, total]))
        return context.make_tuple(builder, totals, updated)

    return totals(totals, sums, v.FLOATS, array, types.intp), emit
