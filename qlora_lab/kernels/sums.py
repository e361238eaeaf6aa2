"""Tuples of vectors for numba: one sum of 16 lanes for each token, in registers and not in an array.

In and out: tuples of the vectors of vector.py. A tuple's length is part of its type, so a kernel is compiled for each.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qlora_lab.kernels import vector as v
from qlora_lab.kernels.words import dotted_pairs

FMA = "llvm.fma.v16f32"


@intrinsic
def splat(typing, numbers):
    """A tuple of float32 as a tuple of vectors."""

    def emit(context, builder, sig, args):
        values = [v.splatted(builder, number) for number in cgutils.unpack_tuple(builder, args[0])]
        return context.make_tuple(builder, sig.return_type, values)

    return types.UniTuple(v.FLOATS, len(numbers))(numbers), emit


def _row_pointer(context, builder, array_type, array, row, column):
    made = context.make_array(array_type)(context, builder, array)
    width = cgutils.unpack_tuple(builder, made.shape)[1]  # columns of the array
    return builder.gep(made.data, [builder.add(builder.mul(width, context.get_constant(types.intp, row)), column)])


@intrinsic
def fma(typing, sums, factor, array, column):
    """sums[t] + factor * array[t, column : column + 16] for each t, rounded once; array (len(sums), n), contiguous."""

    def emit(context, builder, sig, args):
        updated = []
        for t, value in enumerate(cgutils.unpack_tuple(builder, args[0])):
            pointer = builder.bitcast(_row_pointer(context, builder, array, args[2], t, args[3]), ir.PointerType(v.F32))
            operand = builder.load(pointer, align=v.align_of(array))  # 16 float32
            updated.append(v.call_intrinsic(builder, FMA, v.F32, [args[1], operand, value]))
        return context.make_tuple(builder, sums, updated)

    return sums(sums, v.FLOATS, array, types.intp), emit


@intrinsic
def fma_scalars(typing, sums, vector, array, start):
    """sums[t] + vector * array[start + t] for each t, rounded once; array float32, contiguous."""

    def emit(context, builder, sig, args):
        updated = []
        first = context.make_array(array)(context, builder, args[2]).data
        pointer = builder.gep(first, [args[3]])  # one pointer and constant offsets, as below
        for t, value in enumerate(cgutils.unpack_tuple(builder, args[0])):
            factor = builder.load(builder.gep(pointer, [context.get_constant(types.intp, t)]))
            updated.append(
                v.call_intrinsic(builder, "llvm.fma.v16f32", v.F32, [args[1], v.splatted(builder, factor), value])
            )
        return context.make_tuple(builder, sums, updated)

    return sums(sums, v.FLOATS, array, types.intp), emit


@intrinsic
def add_steps(typing, sums, vector, array, start, step):
    """sums[t] + vector * array[start + t * step] for each t; array contiguous.

    Both float32: rounded once. Both int32: the products of each lane's two bf16, see dot_pairs.
    """

    def emit(context, builder, sig, args):
        updated = []
        first = context.make_array(array)(context, builder, args[2]).data
        for t, value in enumerate(cgutils.unpack_tuple(builder, args[0])):
            offset = builder.add(args[3], builder.mul(args[4], context.get_constant(types.intp, t)))
            # a load that fills all lanes costs no more than one of 4 bytes
            factor = v.splatted(builder, builder.load(builder.gep(first, [offset])))
            if vector == v.FLOATS:  # known when it is compiled
                updated.append(v.call_intrinsic(builder, FMA, v.F32, [args[1], factor, value]))
            else:
                updated.append(dotted_pairs(builder, value, args[1], factor))
        return context.make_tuple(builder, sums, updated)

    return sums(sums, vector, array, types.intp, types.intp), emit


@intrinsic
def fma_beside(typing, sums, factors, array, start):
    """sums[r, t] + factors[r] * array[start + 16 t : start + 16 t + 16] for each row r and token t, rounded once.

    sums: a tuple of rows * tokens vectors, those of the first row first. factors: a tuple of vectors, one for each row.
    array: flat.
    """

    def emit(context, builder, sig, args):
        values, rows = (cgutils.unpack_tuple(builder, arg) for arg in args[:2])
        tokens = len(values) // len(rows)
        # One pointer and constant offsets: rows of an array would need an address each, more than there are registers.
        first = builder.gep(context.make_array(array)(context, builder, args[2]).data, [args[3]])
        pointer = builder.bitcast(first, ir.PointerType(v.F32))
        places = (builder.gep(pointer, [context.get_constant(types.intp, t)]) for t in range(tokens))
        vectors = [builder.load(place, align=v.align_of(array)) for place in places]
        pairs = [[factor, vector] for factor in rows for vector in vectors]
        updated = [
            v.call_intrinsic(builder, FMA, v.F32, [*pair, value]) for pair, value in zip(pairs, values, strict=True)
        ]
        return context.make_tuple(builder, sums, updated)

    return sums(sums, factors, array, types.intp), emit


@intrinsic
def dot_pairs(typing, sums, pairs, array, start):
    """sums[t] + the products of 32 bf16 in `pairs` with array[start + 32 t : start + 32 t + 32], for each t.

    Only where words.has_pairs(). Each product is added in float32; subnormals count as 0.
    """

    def emit(context, builder, sig, args):
        updated = []
        # One pointer and constant offsets: rows of an array would need an address each, more than there are registers.
        first = context.make_array(array)(context, builder, args[2]).data
        pointer = builder.bitcast(builder.gep(first, [args[3]]), ir.PointerType(v.I32))
        for t, value in enumerate(cgutils.unpack_tuple(builder, args[0])):
            operand = builder.load(builder.gep(pointer, [context.get_constant(types.intp, t)]), align=v.align_of(array))
            updated.append(dotted_pairs(builder, value, args[1], operand))
        return context.make_tuple(builder, sums, updated)

    return sums(sums, v.INTS, array, types.intp), emit


@intrinsic
def store(typing, sums, array, starts):
    """array[t, starts[r] : starts[r] + 16] = sums[r, t] for each row r and token t; array (tokens, n), contiguous."""

    def emit(context, builder, sig, args):
        values, rows = (cgutils.unpack_tuple(builder, args[i]) for i in (0, 2))
        for i, value in enumerate(values):
            row, token = divmod(i, len(values) // len(rows))
            pointer = _row_pointer(context, builder, array, args[1], token, rows[row])
            builder.store(value, builder.bitcast(pointer, ir.PointerType(v.F32)), align=v.align_of(array))
        return context.get_dummy_value()

    return types.void(sums, array, starts), emit


@intrinsic
def load(typing, zeros, array, starts):
    """What store() writes, as a tuple; zeros: a tuple with a number for each token."""

    def emit(context, builder, sig, args):
        rows = cgutils.unpack_tuple(builder, args[2])
        places = (_row_pointer(context, builder, array, args[1], t, row) for row in rows for t in range(len(zeros)))
        pointers = (builder.bitcast(place, ir.PointerType(v.F32)) for place in places)
        values = [builder.load(pointer, align=v.align_of(array)) for pointer in pointers]
        return context.make_tuple(builder, sig.return_type, values)

    return types.UniTuple(v.FLOATS, len(zeros) * len(starts))(zeros, array, starts), emit


@intrinsic
def scaled(typing, numbers, factor, addend):
    """factor * number + addend for each of a tuple of indices."""

    def emit(context, builder, sig, args):
        values = cgutils.unpack_tuple(builder, args[0])
        results = [builder.add(builder.mul(value, args[1]), args[2]) for value in values]
        return context.make_tuple(builder, sig.return_type, results)

    every = types.UniTuple(types.intp, len(numbers))
    return every(every, types.intp, types.intp), emit


def _total(builder, value):
    for width in (8, 4, 2, 1):
        lanes = ir.Constant(v.I32, [(i + width) % v.LANES for i in range(v.LANES)])
        value = builder.fadd(value, builder.shuffle_vector(value, value, lanes))
    return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))  # every lane holds the sum


@intrinsic
def total(typing, vector):
    """The 16 lanes added up as store_totals does."""

    def emit(context, builder, sig, args):
        return _total(builder, *args)

    return types.float32(v.FLOATS), emit


@intrinsic
def store_totals(typing, sums, array, column):
    """array[t, column] = the 16 lanes of sums[t] added up, i to i + 8, then i to i + 4 ..., for each t."""

    def emit(context, builder, sig, args):
        for t, value in enumerate(cgutils.unpack_tuple(builder, args[0])):
            builder.store(_total(builder, value), _row_pointer(context, builder, array, args[1], t, args[2]))
        return context.get_dummy_value()

    return types.void(sums, array, types.intp), emit
