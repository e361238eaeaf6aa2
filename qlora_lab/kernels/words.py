"""Words of 16 bits in the vectors of vector.py: one in each lane, or two, such as pairs of bf16.

All but store_words() only where has_pairs(): one instruction then looks up 32 words, or multiplies 32 pairs.
"""

from functools import lru_cache

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qlora_lab.kernels import vector as v
from qlora_lab.kernels.vector import F32, I32, INTS, LANES, call_intrinsic

I16 = ir.VectorType(ir.IntType(16), 2 * LANES)  # two words in each of 16 lanes


@lru_cache
def has_pairs() -> bool:
    """Whether this CPU looks up 32 words at once and multiplies pairs of bf16: load_words() to dot_pairs()."""
    return {"avx512bw", "avx512bf16"} <= v.host_features() and v.is_fast()


@intrinsic
def store_words(typing, array, index, vector):
    """Write the low 16 bits of 16 int32 lanes into a uint16 array from `index`; store() would write all 64 bytes."""

    def emit(context, builder, sig, args):
        value = builder.trunc(args[2], ir.VectorType(ir.IntType(16), LANES))
        builder.store(value, v.pointer_to(context, builder, array, *args[:2], value.type), align=v.align_of(array))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), emit


@intrinsic
def load_words(typing, array, index):
    """32 bytes of `array` from `index`, each in a word of its own: two in a lane."""

    def emit(context, builder, sig, args):
        memory = ir.VectorType(ir.IntType(8), 2 * LANES)
        value = builder.load(v.pointer_to(context, builder, array, *args, memory), align=1)
        return builder.bitcast(builder.zext(value, I16), I32)

    return INTS(array, types.intp), emit


@intrinsic
def permute_words(typing, table, indices):
    """table[index & 31] for each of 32 words."""

    def emit(context, builder, sig, args):
        words = [builder.bitcast(arg, I16) for arg in args]
        return builder.bitcast(call_intrinsic(builder, "llvm.x86.avx512.permvar.hi.512", I16, words), I32)

    return table(INTS, INTS), emit


@intrinsic
def bfloat16_words(typing, first, second):
    """16 float32 and 16 more rounded to bf16, as words 0 to 15 and 16 to 31; subnormals become 0."""

    def emit(context, builder, sig, args):
        # llvmlite has no bf16 type. LLVM still accepts the signature of its earlier versions, with 16-bit words.
        rounded = call_intrinsic(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", I16, [args[1], args[0]])
        return builder.bitcast(rounded, I32)

    return INTS(v.FLOATS, v.FLOATS), emit


def dotted_pairs(builder, sums, left, right):
    return call_intrinsic(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32, [sums, left, right])
