"""Sixteen lanes at once, for numba: the few vector operations that the CPU kernels need.

A table of 16 entries fits into one 512-bit register, and one instruction looks up 16 codes in it. numba has no name for
that, so this file gives it one: a vector type, + * / & | << >> between vectors, and permute(), the look-up. It is one
instruction with AVX-512, and four for each half with AVX2. All else is plain LLVM vector code, which any CPU runs.
Where is_fast() is false, permute() and half_bits() compile but must not be called; cpu.py then runs its plain loops.
"""

import operator
from functools import lru_cache

import numba
from llvmlite import ir
from numba import types
from numba.core import codegen
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16


class Vector(types.Type):
    """LANES numbers of one type in one register."""

    def __init__(self, element: types.Type):
        self.element = element
        super().__init__(name=f"vector({element})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, ir.VectorType(manager.lookup(vector.element).get_value_type(), LANES))


FLOATS = Vector(types.float32)
INTS = Vector(types.int32)
I32 = ir.VectorType(ir.IntType(32), LANES)  # the same for LLVM
F32 = ir.VectorType(ir.FloatType(), LANES)


def host_features() -> set[str]:
    """List the features of this CPU by LLVM's names, as numba compiles for it (NUMBA_CPU_FEATURES included)."""
    listed = numba.config.CPU_FEATURES
    listed = codegen.get_host_cpu_features() if listed is None else listed
    return {name[1:] for name in listed.split(",") if name.startswith("+")}


@lru_cache
def is_fast() -> bool:
    """Whether this CPU has instructions for permute() and half_bits()."""
    features = host_features()
    return "f16c" in features and bool(features & {"avx512f", "avx2"})


_EMIT = {  # operator -> (for floats, for ints)
    operator.add: ("fadd", "add"),
    operator.mul: ("fmul", "mul"),
    operator.truediv: ("fdiv", None),
    operator.or_: (None, "or_"),
    operator.and_: (None, "and_"),
    operator.lshift: (None, "shl"),
    operator.rshift: (None, "lshr"),
}


def _binary(operation):
    @infer_global(operation)
    class _Typed(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and args[0] == args[1] and isinstance(args[0], Vector):
                return signature(args[0], *args)
            return None

    @lower_builtin(operation, Vector, Vector)
    def _lower(context, builder, sig, args):
        for_floats, for_ints = _EMIT[operation]
        return getattr(builder, for_floats if sig.return_type == FLOATS else for_ints)(*args)


for _operation in _EMIT:
    _binary(_operation)


def pointer_to(context, builder, array_type, array, index, vector):
    data = context.make_array(array_type)(context, builder, array).data  # the address of element 0
    return builder.bitcast(builder.gep(data, [index]), ir.PointerType(vector))


def align_of(array_type) -> int:
    assert array_type.layout == "C", f"{array_type}: vectors are read from neighbouring elements"
    return array_type.dtype.bitwidth // 8  # arrays promise no more than the alignment of one element


@intrinsic
def load(typing, array, index):
    """16 elements of `array` from `index`: float32 as they are, uint8 and uint16 widened to int32."""
    result = FLOATS if array.dtype == types.float32 else INTS

    def emit(context, builder, sig, args):
        memory = ir.VectorType(context.get_value_type(array.dtype), LANES)  # as it lies in memory
        value = builder.load(pointer_to(context, builder, array, *args, memory), align=align_of(array))
        return value if memory in (F32, I32) else builder.zext(value, I32)

    return result(array, types.intp), emit


@intrinsic
def load_first(typing, array, index, count):
    """The first `count` of 16 float32 of `array` from `index`, zeros after them; the rest is not read."""

    def emit(context, builder, sig, args):
        pointer = pointer_to(context, builder, array, *args[:2], F32)
        i32 = ir.IntType(32)
        wanted = splatted(builder, builder.trunc(args[2], i32))
        mask = builder.icmp_signed("<", ir.Constant(I32, list(range(LANES))), wanted)
        zeros = ir.Constant(F32, [0.0] * LANES)
        name, align = "llvm.masked.load.v16f32.p0", ir.Constant(i32, 4)
        return call_intrinsic(builder, name, F32, [pointer, align, mask, zeros])

    return FLOATS(array, types.intp, types.intp), emit


@intrinsic
def fma(typing, left, right, addend):
    """left * right + addend, rounded once."""

    def emit(context, builder, sig, args):
        return call_intrinsic(builder, "llvm.fma.v16f32", F32, args)

    return FLOATS(FLOATS, FLOATS, FLOATS), emit


@intrinsic
def store(typing, array, index, vector):
    """Write 16 lanes over 64 bytes of `array` from `index`; int32 lanes into a uint8 array keep their low byte."""

    def emit(context, builder, sig, args):
        value = args[2]
        if array.dtype == types.uint8:
            value = builder.trunc(value, ir.VectorType(ir.IntType(8), LANES))
        builder.store(value, pointer_to(context, builder, array, *args[:2], value.type), align=align_of(array))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), emit


@intrinsic
def gather(typing, array, indices):
    """array[indices[lane]] for each lane; the array holds float32 or int32, and every index lies inside."""
    result = FLOATS if array.dtype == types.float32 else INTS

    def emit(context, builder, sig, args):
        first = context.make_array(array)(context, builder, args[0]).data
        value = ir.Constant(I32 if result == INTS else F32, ir.Undefined)
        if "avx512f" in host_features():
            name = f"llvm.x86.avx512.mask.gather.dp{'i' if result == INTS else 's'}.512"
            every = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [1] * LANES)  # a mask of all lanes
            base = builder.bitcast(first, ir.PointerType(ir.IntType(8)))
            scale = ir.Constant(ir.IntType(32), 4)  # bytes of an element
            return call_intrinsic(builder, name, value.type, [value, base, args[1], every, scale])
        for lane in range(LANES):
            position = ir.Constant(ir.IntType(32), lane)
            index = builder.zext(builder.extract_element(args[1], position), ir.IntType(64))
            value = builder.insert_element(value, builder.load(builder.gep(first, [index])), position)
        return value

    return result(array, INTS), emit


@intrinsic
def prefetch(typing, array, index):
    """Ask for the 64 bytes around array[index] ahead of time; an index beyond the end does no harm."""

    def emit(context, builder, sig, args):
        pointer = pointer_to(context, builder, array, *args, ir.IntType(8))
        i32 = ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
        declared = builder.module.declare_intrinsic("llvm.prefetch.p0", (), function)  # read, locality 2, data
        builder.call(declared, [pointer, ir.Constant(i32, 0), ir.Constant(i32, 2), ir.Constant(i32, 1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


def splatted(builder, scalar):
    vector = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(I32, [0] * LANES))


@intrinsic
def splat(typing, number):
    """The same number, float32 or int32, in every lane; integers of other sizes become int32."""
    result = FLOATS if number == types.float32 else INTS

    def emit(context, builder, sig, args):
        return splatted(builder, context.cast(builder, args[0], number, result.element))

    return result(number), emit


@intrinsic
def as_ints(typing, value):
    """The bits of a float32, or of 16, as int32."""

    def emit(context, builder, sig, args):
        return builder.bitcast(args[0], context.get_value_type(sig.return_type))

    return (INTS if value == FLOATS else types.int32)(value), emit


@intrinsic
def as_floats(typing, value):
    """The float32, or 16 of them, whose bits these int32 are; of a wider integer, which numba makes, the low 32."""

    def emit(context, builder, sig, args):
        bits = args[0] if value == INTS else context.cast(builder, args[0], value, types.int32)
        return builder.bitcast(bits, context.get_value_type(sig.return_type))

    return (FLOATS if value == INTS else types.float32)(value), emit


@intrinsic
def to_floats(typing, value):
    """16 int32 as float32."""

    def emit(context, builder, sig, args):
        return builder.sitofp(args[0], F32)

    return FLOATS(INTS), emit


@intrinsic
def half_bits(typing, vector):
    """16 float32 rounded to fp16, as the low 16 bits of int32."""

    def emit(context, builder, sig, args):
        if not is_fast():
            return ir.Constant(I32, ir.Undefined)
        halves = builder.fptrunc(args[0], ir.VectorType(ir.HalfType(), LANES))  # rounds to nearest even
        return builder.zext(builder.bitcast(halves, ir.VectorType(ir.IntType(16), LANES)), I32)

    return INTS(FLOATS), emit


@intrinsic
def where_greater(typing, left, right, value):
    """`value` where left > right, 0 elsewhere: (floats, floats, ints) -> ints. Never true for a NaN."""

    def emit(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], ir.Constant(I32, [0] * LANES))

    return INTS(FLOATS, FLOATS, INTS), emit


@intrinsic
def larger(typing, left, right):
    """The larger of two int32, lane by lane."""

    def emit(context, builder, sig, args):
        return builder.select(builder.icmp_signed(">", *args), *args)

    return INTS(INTS, INTS), emit


@intrinsic
def largest(typing, vector):
    """The largest of 16 int32."""

    def emit(context, builder, sig, args):
        return call_intrinsic(builder, "llvm.vector.reduce.smax.v16i32", ir.IntType(32), args)

    return types.int32(INTS), emit


@intrinsic
def clamp(typing, vector, low, high):
    """Lanes of `vector` no lower than `low` and no higher than `high`; float32, none of them NaN."""

    def emit(context, builder, sig, args):
        value, low, high = args
        value = builder.select(builder.fcmp_ordered("<", value, low), low, value)
        return builder.select(builder.fcmp_ordered(">", value, high), high, value)

    return FLOATS(FLOATS, FLOATS, FLOATS), emit


def _zip(which):
    @intrinsic
    def zipped(typing, left, right):
        def emit(context, builder, sig, args):
            return builder.shuffle_vector(*args, ir.Constant(I32, list(which)))

        return left(left, right), emit

    return zipped


lower_half = _zip([i // 2 + LANES * (i % 2) for i in range(LANES)])  # l0 r0 l1 r1 ... of left and right
upper_half = _zip([LANES // 2 + i // 2 + LANES * (i % 2) for i in range(LANES)])
evens = _zip(range(0, 2 * LANES, 2))  # lanes 0, 2, 4 ... of left, then of right
odds = _zip(range(1, 2 * LANES, 2))


@intrinsic
def permute(typing, table, indices):
    """table[index & 15] for each lane: the 16-entry look-up. `table` holds int32 or float32, `indices` int32."""

    def emit(context, builder, sig, args):
        return permuted(builder, *args)

    return table(table, INTS), emit


def permuted(builder, table, indices):
    bits = builder.bitcast(table, I32)
    if not is_fast():
        return ir.Constant(table.type, ir.Undefined)
    if "avx512f" in host_features():
        looked_up = call_intrinsic(builder, "llvm.x86.avx512.permvar.si.512", I32, [bits, indices])
    else:
        looked_up = _permute_avx2(builder, bits, indices)
    return builder.bitcast(looked_up, table.type)


def call_intrinsic(builder, name, result, args):
    function = builder.module.declare_intrinsic(name, (), ir.FunctionType(result, [a.type for a in args]))
    return builder.call(function, args)


def _permute_avx2(builder, table, indices):
    eight = ir.VectorType(ir.IntType(32), 8)  # a register of AVX2
    halves = [ir.Constant(eight, list(range(start, start + 8))) for start in (0, 8)]
    looked_up = []
    for lanes in halves:  # a register has 8 lanes and looks up 8 entries: look in both halves of the table, then choose
        index = builder.shuffle_vector(indices, indices, lanes)
        low, high = (
            call_intrinsic(builder, "llvm.x86.avx2.permd", eight, [builder.shuffle_vector(table, table, half), index])
            for half in halves
        )
        bit = builder.and_(index, ir.Constant(eight, [8] * 8))  # which half of the table
        is_high = builder.icmp_signed("!=", bit, ir.Constant(eight, [0] * 8))
        looked_up.append(builder.select(is_high, high, low))
    return builder.shuffle_vector(*looked_up, ir.Constant(I32, list(range(LANES))))
