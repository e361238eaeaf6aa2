"""Weights in and out of memory inside compiled kernels: float32, or bf16 and fp16 as the uint16 bits that hold them.

numba has neither bf16 nor fp16 on the CPU, so both are read and rounded here by integer operations, as torch rounds.
`form` says which of the three an array holds; a kernel is compiled once for float32 and once for uint16 arrays.
"""

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload

from qlora_lab.kernels import vector as v

FLOAT32, BFLOAT16, FLOAT16 = range(3)
FORM = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
INFINITY = np.int32(0x7F800000)  # bits of float32's infinity; larger magnitudes are NaN
MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits but the sign
NAN = np.float32(np.nan)
_HALF_BIAS = np.float32(2.0**112)  # float32's exponent bias less that of fp16
_HALF_MAX = np.float32(65504)  # the largest finite fp16


def check_arrays(length, dtypes, **tensors):
    """Raise ValueError for a tensor that a kernel would misread: it does not check where it reads."""
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes or tensor.shape != (length,) or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise ValueError(
                f"{name} is {tensor.dtype}, {tuple(tensor.shape)} and {layout}: "
                f"it must be {' or '.join(map(str, dtypes))}, {(length,)} and contiguous"
            )


def view(tensor):
    """The same memory as a flat numpy array, (numel,) float32 or uint16."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy().reshape(-1)


def read(array, i, form):
    """Element i as float32."""


def read16(array, i, form):
    """Elements i to i + 15 as a vector of float32."""


def write(array, i, value, form):
    """Store a float32 as element i, rounded to nearest even."""


@overload(read)
def _read_as(array, i, form):
    if array.dtype == types.float32:
        return lambda array, i, form: array[i]

    def from_bits(array, i, form):
        bits = np.int32(array[i])
        if form == BFLOAT16:
            return v.as_floats(bits << 16)  # bf16 is the upper half of a float32
        magnitude = v.as_floats((bits & 0x7FFF) << 13) * _HALF_BIAS  # exact, subnormals too
        bits = v.as_ints(magnitude) | (bits & 0x8000) << 16
        return v.as_floats(bits | INFINITY if magnitude > _HALF_MAX else bits)

    return from_bits


@overload(read16)
def _read16_as(array, i, form):
    if array.dtype == types.float32:
        return lambda array, i, form: v.load(array, i)

    def from_bits(array, i, form):  # as _read_as, in 16 lanes
        bits = v.load(array, i)
        if form == BFLOAT16:
            return v.as_floats(bits << v.splat(16))
        magnitude = v.as_floats((bits & v.splat(0x7FFF)) << v.splat(13)) * v.splat(_HALF_BIAS)
        top = v.where_greater(magnitude, v.splat(_HALF_MAX), v.splat(INFINITY))
        return v.as_floats(v.as_ints(magnitude) | (bits & v.splat(0x8000)) << v.splat(16) | top)

    return from_bits


@overload(write)
def _write_as(array, i, value, form):
    if array.dtype == types.float32:

        def store(array, i, value, form):
            array[i] = value

        return store

    def store_bits(array, i, value, form):
        array[i] = _bfloat16(v.as_ints(value)) if form == BFLOAT16 else _float16(v.as_ints(value))

    return store_bits


@njit(forceinline=True)
def _bfloat16(bits):
    if bits & MAGNITUDE > INFINITY:
        return np.uint16(0x7FC0)  # torch's NaN
    # half a unit of the last kept bit is added; a tie, to which that bit is added, goes to the even neighbour
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


@njit(forceinline=True)
def bfloat16_of(values):
    """16 float32 rounded to bf16, as the low 16 bits of int32; a NaN must be torch's, whose bits survive rounding."""
    bits = v.as_ints(values)
    return (bits + v.splat(0x7FFF) + (bits >> v.splat(16) & v.splat(1))) >> v.splat(16)


@njit(forceinline=True)
def _float16(bits):
    sign = bits >> 16 & 0x8000
    magnitude = bits & MAGNITUDE
    if magnitude > INFINITY:
        return np.uint16(0x7E00)  # torch's NaN
    if magnitude >= 0x477FF000:  # 65520 and above round to infinity
        return np.uint16(sign | 0x7C00)
    if magnitude >= 0x38800000:  # 2^-14: normal in fp16
        return np.uint16(sign | (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13)
    # subnormal: adding 0.5 rounds to a multiple of 2^-24, the step of fp16 there, which the low bits then hold
    return np.uint16(sign | v.as_ints(v.as_floats(magnitude) + np.float32(0.5)) - 0x3F000000)
