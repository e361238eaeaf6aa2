"""The CPU twins of quant/quantize.py: the same bytes and the same values, bit for bit, close to the speed of memory.

In and out: contiguous CPU tensors. Tables are arguments (levels, thresholds, the map of the constants), so NF4, FP4,
INT4, the 8 levels of NF3 and the 256 entries of double quantization share one kernel. The 4-bit ones have a second
form for CPUs that look up 16 codes at once (vector.py): about one instruction per weight, then they wait for memory.

Moved for each weight at block size 64: quantize_blocks reads 4 bytes of float32 and writes 0.56; dequantize_blocks
reads 0.56 and writes 4 or 2.
"""

from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload

from qlora_lab.kernels import huge_pages, vector as v
from qlora_lab.kernels.compiled import opaque, parallel, run
from qlora_lab.kernels.constants import undouble_into
from qlora_lab.kernels.elements import (
    FLOAT16,
    FORM,
    INFINITY,
    MAGNITUDE,
    NAN,
    bfloat16_of,
    check_arrays,
    read,
    read16,
    view,
    write,
)
from qlora_lab.kernels.packed_weight import PackedWeight

PIECE = 2**13  # weights a thread takes at a time: 32 KiB of float32 stay in the first-level cache between two readings
AHEAD = PIECE  # how far in front of the encoder memory is asked for: a third off the time of a large weight
ROWS_AHEAD = 6  # the same where a panel of columns is decoded
FAST = v.is_fast()


def takes(n_levels: int, block_size: int) -> bool:
    """Every table of up to 256 levels, every block size."""
    return True


# --- quantise ---------------------------------------------------------------------------------------------------------


@njit(forceinline=True)
def _finite(magnitude):
    """The float32 with these bits, NaN for infinity. Bits of magnitudes, as integers, order like the magnitudes."""
    return v.as_floats(magnitude) if magnitude < INFINITY else NAN


@njit(forceinline=True)
def absmax16(weight, form, first, last, block_size, absmax):
    """Constants of the blocks from first to last, each whole and a multiple of 16 long."""
    magnitude = v.splat(MAGNITUDE)
    for start in range(first, last, block_size):
        top = v.as_ints(read16(weight, start, form)) & magnitude
        for i in range(start + 16, start + block_size, 16):
            top = v.larger(top, v.as_ints(read16(weight, i, form)) & magnitude)
        absmax[start // block_size] = _finite(v.largest(top))


@njit(forceinline=True)
def _rank16(values, tree):
    """How many of 15 thresholds lie below each of 16 values: by halving, one comparison and one look-up a level."""
    values = v.clamp(values, v.splat(np.float32(-1)), v.splat(np.float32(1)))
    rank = v.where_greater(values, v.load(tree, 0), v.splat(8))  # all lanes ask the same threshold
    rank = rank | v.where_greater(values, v.permute(v.load(tree, 16), rank), v.splat(4))
    rank = rank | v.where_greater(values, v.permute(v.load(tree, 32), rank), v.splat(2))
    return rank | v.where_greater(values, v.permute(v.load(tree, 48), rank), v.splat(1))


@njit(forceinline=True)
def _encode16(weight, form, first, last, block_size, tree, order, fill, tiny, absmax, packed):
    """4-bit codes of whole blocks, each a multiple of 32 long."""
    codes = v.load(order, 0)  # (16,), the code of each rank
    for start in range(first, last, block_size):
        constant = absmax[start // block_size]
        if np.isnan(constant):
            packed[start // 2 : (start + block_size) // 2] = fill << 4 | fill
            continue
        scale = v.splat(np.float32(1) / max(constant, tiny))
        for i in range(start, start + block_size, 32):
            left = _rank16(read16(weight, i, form) * scale, tree)
            right = _rank16(read16(weight, i + 16, form) * scale, tree)
            v.prefetch(weight, i + AHEAD)
            v.prefetch(weight, i + AHEAD + 16)
            high = v.permute(codes, v.evens(left, right))  # weights 0, 2, 4 ... go into high halves
            low = v.permute(codes, v.odds(left, right))
            v.store(packed, i // 2, high << v.splat(4) | low)


@njit(forceinline=True)
def _encode_bytes(weight, form, first, last, block_size, thresholds, order, fill, tiny, absmax, packed):
    """8-bit codes of whole blocks, each a multiple of 16 long: eight levels of halving, 16 weights at once."""
    low, high = v.splat(np.float32(-1)), v.splat(np.float32(1))
    for start in range(first, last, block_size):
        constant = absmax[start // block_size]
        if np.isnan(constant):
            packed[start : start + block_size] = fill
            continue
        scale = v.splat(np.float32(1) / max(constant, tiny))
        for i in range(start, start + block_size, 16):
            values = v.clamp(read16(weight, i, form) * scale, low, high)
            rank = v.splat(0)
            for level in range(8):
                step = 128 >> level  # halves the ranks that are left
                rank = rank + v.where_greater(values, v.gather(thresholds, rank + v.splat(step - 1)), v.splat(step))
            v.store(packed, i, v.gather(order, rank))


@njit(forceinline=True)
def _encode(values, thresholds, order, bits, fill, tiny, codes):
    """Quantise one block of float32, on any CPU, for any number of bits. Scales `values`, returns the constant."""
    top = np.int32(0)
    for value in values:
        top = max(top, np.int32(v.as_ints(value) & MAGNITUDE))
    constant = _finite(top)  # NaN for a block that holds NaN or infinity
    scale = np.float32(1) / max(constant, tiny)
    for i in range(len(values)):
        values[i] = min(max(values[i] * scale, np.float32(-1)), np.float32(1))
    if np.isnan(constant):
        codes[:] = fill
    elif bits <= 4:
        ranks = np.zeros(len(values), np.int32)
        for threshold in thresholds:  # one threshold at a time over all values: compilers make vectors of that
            for i in range(len(values)):
                ranks[i] += np.int32(values[i] > threshold)
        for i in range(len(values)):
            codes[i] = order[np.uintp(ranks[i])]
    else:
        for i in range(len(values)):
            rank = np.uintp(0)
            for level in range(8):
                step = np.uintp(128 >> level)
                rank += step * np.uintp(values[i] > thresholds[rank + step - np.uintp(1)])  # no branch to mispredict
            codes[i] = order[rank]
    return constant


@njit(forceinline=True)
def _pack(codes, bits, packed, byte):
    """Write codes as one stream of bits from `byte` on, first code in the highest bits."""
    if bits == 4:
        for i in range(len(codes) // 2):
            packed[byte + i] = codes[2 * i] << 4 | codes[2 * i + 1]
        return
    window = 0  # bits that wait to become a byte
    held = 0  # bits in the window that are not written yet
    for code in codes:
        window = window << bits | code
        held += bits
        if held >= 8:
            held -= 8
            packed[byte] = window >> held & 0xFF
            byte += 1


@parallel
def _quantize(
    weight, form, thresholds, tree, order, bits, fill, group, block_size, piece, tiny, packed, absmax, vector
):
    n = len(weight)
    for p in prange((n + piece - 1) // piece):
        first = p * piece
        last = min(first + piece, n)
        if vector and (last - first) % block_size == 0:
            absmax16(weight, form, first, last, block_size, absmax)
            if bits == 8:
                _encode_bytes(weight, form, first, last, block_size, thresholds, order, fill, tiny, absmax, packed)
            else:
                _encode16(weight, form, first, last, block_size, tree, order, fill, tiny, absmax, packed)
        else:
            values = np.empty(block_size, np.float32)  # of one block
            codes = np.full((last - first + group - 1) // group * group, np.uint8(fill))
            for start in range(first, last, block_size):
                stop = min(start + block_size, last)
                for i in range(start, stop):
                    values[i - start] = read(weight, i, form)
                absmax[start // block_size] = _encode(
                    values[: stop - start], thresholds, order, bits, fill, tiny, codes[start - first : stop - first]
                )
            _pack(codes, bits, packed, first * bits // 8)


@opaque
def quantize_blocks(
    weight: torch.Tensor, thresholds: torch.Tensor, order: torch.Tensor, block_size: int, group: int, tiny: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of quant.quantize.quantize_blocks: (numel,) weights -> packed uint8, absmax (n_blocks,) float32."""
    bits = (len(order) - 1).bit_length()  # of a code
    n = len(weight)
    piece = block_size * 8 // gcd(block_size, 8)  # ends where a block and a byte end, so no two threads share a byte
    piece *= max(1, PIECE // piece)
    ranks = np.full(255 if bits > 4 else 15, np.inf, np.float32)  # nothing lies above a threshold that is filled up
    ranks[: len(thresholds)] = thresholds.numpy()
    codes = np.zeros(len(ranks) + 1, np.int32)  # (ranks + 1,), the code of each rank
    codes[: len(order)] = order.numpy()
    tree = np.full((4, 16), np.inf, np.float32)
    tree[0] = ranks[7]  # the middle one of 15, in every lane
    for level, step in enumerate((4, 2, 1), start=1):
        tree[level, : 16 - step] = ranks[step - 1 : 15]  # entry r: the next threshold to try after rank r
    fill = int(codes[np.searchsorted(ranks, 0)])  # the code of 0
    packed = huge_pages.empty((-(-n // group) * group * bits // 8,), torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device="cpu")
    vector = bits in (4, 8) and block_size % 32 == 0 and FAST  # else the plain loops
    tables = ranks, tree.ravel(), codes, bits, fill, group, block_size, piece, np.float32(tiny)
    run(_quantize, view(weight), FORM[weight.dtype], *tables, packed.numpy(), absmax.numpy(), vector)
    return packed, absmax


# --- dequantise -------------------------------------------------------------------------------------------------------


@njit(forceinline=True)
def _code_at(packed, i, bits):
    bit = i * bits
    byte = bit >> 3  # the byte in which the code begins
    window = np.int64(packed[byte]) << 8  # two bytes hold any code
    if byte + 1 < len(packed):
        window |= packed[byte + 1]
    return window >> (16 - bits - (bit & 7)) & ((1 << bits) - 1)


def _decode32(packed, i, values, table, out, position):
    """32 weights from 16 bytes. values: the scaled levels, float32; table: the same, rounded to 16 bits."""


@overload(_decode32)
def _decode32_as(packed, i, values, table, out, position):
    if out.dtype == types.float32:

        def decode(packed, i, values, table, out, position):
            codes = v.load(packed, i // 2)  # 16 bytes, one a lane
            first, second = v.permute(values, codes >> v.splat(4)), v.permute(values, codes)
            v.store(out, position, v.lower_half(first, second))
            v.store(out, position + 16, v.upper_half(first, second))

        return decode

    def decode_16_bits(packed, i, values, table, out, position):
        codes = v.load(packed, i // 2)  # two weights a lane: the second in its upper 16 bits
        v.store(out, position, v.permute(table, codes >> v.splat(4)) | v.permute(table << v.splat(16), codes))

    return decode_16_bits


@njit(forceinline=True)
def _decode16(packed, levels, scales, block_size, start, out, position, form):
    """Whole blocks from `start` on, each a multiple of 32 long. The table is scaled and rounded once per block."""
    ahead = position - start  # from a weight's index to its place in `out`
    for scale in scales:
        values = v.load(levels, 0) * v.splat(NAN if np.isnan(scale) else scale)
        table = v.half_bits(values) if form == FLOAT16 else bfloat16_of(values)  # 16 levels as 16-bit floats
        for i in range(start, start + block_size, 32):
            _decode32(packed, i, values, table, out, ahead + i)
        start += block_size


@njit(forceinline=True)
def _decode(packed, bits, levels, scales, block_size, start, stop, out, position, form):
    """Weights start to stop, on any CPU, for any number of bits."""
    table = np.empty(16, out.dtype)  # the levels times a block's constant, rounded once a block
    first = start // block_size
    for block in range(first, (stop + block_size - 1) // block_size):
        scale = scales[block - first]
        end = min((block + 1) * block_size, stop)
        if bits == 4:
            for k in range(16):
                write(table, k, levels[k] * scale, form)
            for i in range(start, end):
                out[position + i - start] = table[packed[i >> 1] >> (4 - 4 * (i & 1)) & 15]
        else:
            for i in range(start, end):
                write(out, position + i - start, levels[_code_at(packed, i, bits)] * scale, form)
        position += end - start
        start = end


@parallel
def _dequantize(packed, bits, levels, constants, block_size, first, stride, length, limit, out, form, vector):
    """Runs of `length` weights, `stride` apart from `first` on, none beyond `limit`; `out` holds them side by side."""
    # Short runs, rows of a panel of columns, share what is allocated: alone it takes longer than 320 weights.
    together = max(1, PIECE // length)
    runs = (len(out) + length - 1) // length
    for group in prange((runs + together - 1) // together):
        room = np.empty(length // block_size + 2, np.float32)  # constants of the blocks that a run touches
        for i in range(group * together, min((group + 1) * together, runs)):
            start = first + i * stride
            position = i * length
            if stride > length:  # no processor foresees a jump to the next row: ask for bytes of a row some rows on
                ahead = (start + ROWS_AHEAD * stride) * bits // 8
                for byte in range(ahead, ahead + length * bits // 8, 64):
                    v.prefetch(packed, byte)
            stop = min(start + length, limit)
            block = start // block_size
            touched = (stop - 1) // block_size + 1 - block
            undouble_into(constants, block, touched, room)
            scales = room[:touched]
            if vector and start % block_size == 0:
                whole = (stop - start) // block_size  # blocks
                _decode16(packed, levels, scales[:whole], block_size, start, out, position, form)
                scales = scales[whole:]
                start += whole * block_size
                position += whole * block_size
            if start < stop:  # part of a block at the end, or all of it without 16 look-ups at once
                _decode(packed, bits, levels, scales, block_size, start, stop, out, position, form)


class Arrays(NamedTuple):
    """What kernels read of a weight, as numpy's arrays over the same memory."""

    packed: np.ndarray  # (n_bytes,) uint8
    bits: int  # of a code
    levels: np.ndarray  # (2^bits,) float32, filled up with zeros
    constants: tuple  # absmax; codes, scale, offset and table of double quantization; log2 of the group size
    numel: int  # weights that codes and constants suffice for


_NONE = np.empty(0, np.float32)


def arrays_of(weight: PackedWeight) -> Arrays:
    """Return the weight's arrays, kept in `weight.prepared` while its memory stays where it is.

    Raises ValueError for a dtype or layout that the kernels would misread.
    """
    constants = weight.constants
    single = isinstance(constants, torch.Tensor)  # not quantised themselves
    parts = (weight.packed, constants) if single else (weight.packed, *constants[:2])
    addresses = [part.data_ptr() for part in parts]  # a storage that is shared between processes moves
    if weight.prepared and weight.prepared[0] == addresses:
        return weight.prepared[1]
    names = ("packed", "absmax") if single else ("packed", "absmax_codes", "absmax_scale")
    for name, part in zip(names, parts, strict=True):
        dtype = torch.float32 if part is parts[-1] else torch.uint8
        check_arrays(part.numel(), (dtype,), **{name: part})
    bits = (len(weight.levels) - 1).bit_length()
    levels = np.zeros(1 << bits, np.float32)  # whole tables, so that no look-up leaves them
    levels[: len(weight.levels)] = weight.levels.numpy()
    if single:
        n_blocks = len(constants)
        described = constants.numpy(), np.empty(0, np.uint8), _NONE, np.float32(0), _NONE, 0
    else:
        codes, scale, offset, table, group = constants
        n_blocks = min(len(codes), len(scale) * group)
        shift = group.bit_length() - 1  # a shift is cheaper than a division by the group size
        described = _NONE, codes.numpy(), scale.numpy(), np.float32(offset.item()), table.numpy(), shift
    numel = min(8 * len(weight.packed) // bits, n_blocks * weight.block_size)
    weight.prepared = addresses, Arrays(weight.packed.numpy(), bits, levels, described, numel)
    return weight.prepared[1]


def check_length(weight: PackedWeight, numel: int, limit: int) -> None:
    """Raise ValueError if `numel` weights need more codes or constants than those of `limit` weights."""
    if numel > limit:
        n_bytes = -(-numel * (len(weight.levels) - 1).bit_length() // 8)
        n_blocks = -(-numel // weight.block_size)
        constants = weight.constants if isinstance(weight.constants, torch.Tensor) else weight.constants.codes
        raise ValueError(
            f"{numel} weights need {n_bytes} bytes and {n_blocks} constants, "
            f"but there are {len(weight.packed)} and {len(constants)}"
        )


@opaque
def dequantize_blocks(weight: PackedWeight, out: torch.Tensor, first: int = 0, stride: int = 0) -> None:
    """Twin of quant.quantize.dequantize_blocks: fills `out`, contiguous float32, bf16 or fp16.

    Writes the flat weights from `first` on. With a `stride`, row i of the matrix `out` starts at first + i * stride.
    """
    arrays = arrays_of(weight)
    block_size = weight.block_size
    if stride:
        length = out.shape[1]
        limit = first + (len(out) - 1) * stride + length
    else:
        stride = length = block_size * max(1, PIECE // block_size)
        limit = first + out.numel()
    check_length(weight, limit, arrays.numel)
    vector = arrays.bits == 4 and block_size % 32 == 0 and FAST
    runs = block_size, first, stride, length, limit
    run(_dequantize, *arrays[:4], *runs, view(out), FORM[out.dtype], vector)
