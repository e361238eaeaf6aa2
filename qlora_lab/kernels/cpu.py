"""The CPU twins of quant/quantize.py: the same bytes and the same values, bit for bit, close to the speed of memory.

In and out: contiguous CPU tensors. Tables are arguments (levels, thresholds, the map of the constants), so NF4, FP4,
INT4, the 8 levels of NF3 and the 256 entries of double quantization share one kernel. The 4-bit ones have a second
form for CPUs that look 16 codes up at once (vector.py): about one instruction a weight, then they wait for memory.

What is moved, per weight at block size 64: quantize_blocks reads 4 bytes of float32 and writes 0.56;
dequantize_blocks reads 0.56 and writes 4 or 2; multiply_blocks reads 0.56 and writes no weight at all.

Not here: which implementation runs (kernels/__init__.py), layers (model/linear4bit.py).
"""

import threading
import warnings
from functools import lru_cache
from math import gcd
from pathlib import Path
from zlib import crc32

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload

from qlora_lab.kernels import vector as v
from qlora_lab.kernels.opaque import opaque

PIECE = 2**13  # weights a thread takes at a time: 32 KiB of float32 stay in the first-level cache between two readings
AHEAD = PIECE  # how far in front of the encoder memory is asked for: a third off the time of a large weight
TILE = 16  # rows of a product that a thread takes at a time
BYTES_AHEAD = 2**12  # as AHEAD, for the packed bytes of a product
MAX_TOKENS = 16  # up to here multiply_blocks beats decoding a panel and calling BLAS
_TOKENS_AT_ONCE = 8  # two rows of 8 sums fill half of the 32 vector registers
_ZEROS = [(np.float32(0),) * tokens for tokens in (1, 2, 4, 8)]  # one compiled product each

FAST = v.is_fast()

FLOAT32, BFLOAT16, FLOAT16 = range(3)
_FORM = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_INFINITY, _MAGNITUDE = np.int32(0x7F800000), np.int32(0x7FFFFFFF)
_HALF_BIAS, _HALF_MAX = np.float32(2.0**112), np.float32(65504)  # float32's exponent bias less fp16's; largest fp16
_NAN = np.float32(np.nan)
_local = threading.local()


def _parallel(function):
    """Compile for all cores and keep the machine code on disk, where there is a place for it."""
    function.__qualname__ += f"_{crc32(Path(v.__file__).read_bytes()):08x}"  # numba's cache looks at this file alone
    try:
        return njit(parallel=True, cache=True)(function)
    except RuntimeError:  # numba found no folder that it can write to
        _warn_uncached("no folder for them can be written")
        return njit(parallel=True)(function)


@lru_cache  # once
def _warn_uncached(reason):
    warnings.warn(
        f"compiled kernels cannot be kept for the next start, which compiles them again ({reason}): "
        "set NUMBA_CACHE_DIR to a folder with space",
        stacklevel=2,
    )


@lru_cache  # once
def _start_threads():
    """numba's OpenMP threads are torch's own where both find one library, and starting them sets torch's number."""
    threads = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(threads)


def _run(kernel, *args):
    _start_threads()
    threads = torch.get_num_threads()
    if getattr(_local, "threads", None) != threads:  # numba counts them for each Python thread, too
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        _local.threads = threads
    try:
        kernel(*args)
    except OSError as error:  # compiled, but the disk is full or has become read-only
        _warn_uncached(error.strerror)
        kernel(*args)


def takes(n_levels: int, block_size: int) -> bool:
    """Every table of up to 256 levels, every block size."""
    return True


# --- weights in and out: float32, or bf16 and fp16 as uint16 bits -----------------------------------------------------


def _view(tensor):
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy().reshape(-1)


def _read(array, i, form):
    """Element i as float32."""


def _read16(array, i, form):
    """Elements i to i + 15 as a vector of float32."""


def _write(array, i, value, form):
    """Store a float32 as element i, rounded to nearest even."""


@overload(_read)
def _read_as(array, i, form):
    if array.dtype == types.float32:
        return lambda array, i, form: array[i]

    def from_bits(array, i, form):
        bits = np.int32(array[i])
        if form == BFLOAT16:
            return v.as_floats(bits << 16)
        magnitude = v.as_floats((bits & 0x7FFF) << 13) * _HALF_BIAS  # exact, subnormals too
        bits = v.as_ints(magnitude) | (bits & 0x8000) << 16
        return v.as_floats(bits | _INFINITY if magnitude > _HALF_MAX else bits)

    return from_bits


@overload(_read16)
def _read16_as(array, i, form):
    if array.dtype == types.float32:
        return lambda array, i, form: v.load(array, i)

    def from_bits(array, i, form):
        bits = v.load(array, i)
        if form == BFLOAT16:
            return v.as_floats(bits << v.splat(16))
        magnitude = v.as_floats((bits & v.splat(0x7FFF)) << v.splat(13)) * v.splat(_HALF_BIAS)
        top = v.where_greater(magnitude, v.splat(_HALF_MAX), v.splat(_INFINITY))
        return v.as_floats(v.as_ints(magnitude) | (bits & v.splat(0x8000)) << v.splat(16) | top)

    return from_bits


@overload(_write)
def _write_as(array, i, value, form):
    if array.dtype == types.float32:

        def write(array, i, value, form):
            array[i] = value

        return write

    def write_bits(array, i, value, form):
        array[i] = _bfloat16(v.as_ints(value)) if form == BFLOAT16 else _float16(v.as_ints(value))

    return write_bits


@njit(forceinline=True)
def _bfloat16(bits):
    if bits & _MAGNITUDE > _INFINITY:
        return np.uint16(0x7FC0)
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


@njit(forceinline=True)
def _bfloat16_of(values):
    """16 float32 rounded to bf16, as the low 16 bits of int32; no NaN but the usual one."""
    bits = v.as_ints(values)
    return (bits + v.splat(0x7FFF) + (bits >> v.splat(16) & v.splat(1))) >> v.splat(16)


@njit(forceinline=True)
def _float16(bits):
    sign, magnitude = bits >> 16 & 0x8000, bits & _MAGNITUDE
    if magnitude > _INFINITY:
        return np.uint16(0x7E00)
    if magnitude >= 0x477FF000:  # 65520 and above round to infinity
        return np.uint16(sign | 0x7C00)
    if magnitude >= 0x38800000:  # 2^-14: normal in fp16
        return np.uint16(sign | (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13)
    # subnormal: adding 0.5 rounds to a multiple of 2^-24, the step of fp16 there, which the low bits then hold
    return np.uint16(sign | v.as_ints(v.as_floats(magnitude) + np.float32(0.5)) - 0x3F000000)


# --- quantise ---------------------------------------------------------------------------------------------------------


@njit(forceinline=True)
def _finite(magnitude):
    """The float32 with these bits, NaN for infinity. Bits of magnitudes, as integers, order like the magnitudes."""
    return v.as_floats(magnitude) if magnitude < _INFINITY else _NAN


@njit(forceinline=True)
def _absmax16(weight, form, first, last, block_size, absmax):
    """Constants of the blocks from first to last, each whole and a multiple of 16 long."""
    magnitude = v.splat(_MAGNITUDE)
    for start in range(first, last, block_size):
        top = v.as_ints(_read16(weight, start, form)) & magnitude
        for i in range(start + 16, start + block_size, 16):
            top = v.larger(top, v.as_ints(_read16(weight, i, form)) & magnitude)
        absmax[start // block_size] = _finite(v.largest(top))


@njit(forceinline=True)
def _rank16(values, tree):
    """How many of 15 thresholds lie below each of 16 values: by halving, one comparison and one look-up a level."""
    values = v.clamp(values, v.splat(np.float32(-1)), v.splat(np.float32(1)))
    rank = v.where_greater(values, v.load(tree, 0), v.splat(8))
    rank = rank | v.where_greater(values, v.permute(v.load(tree, 16), rank), v.splat(4))
    rank = rank | v.where_greater(values, v.permute(v.load(tree, 32), rank), v.splat(2))
    return rank | v.where_greater(values, v.permute(v.load(tree, 48), rank), v.splat(1))


@njit(forceinline=True)
def _encode16(weight, form, first, last, block_size, tree, order, fill, tiny, absmax, packed):
    """4-bit codes of whole blocks, each a multiple of 32 long."""
    codes = v.load(order, 0)
    for start in range(first, last, block_size):
        constant = absmax[start // block_size]
        if np.isnan(constant):
            packed[start // 2 : (start + block_size) // 2] = fill << 4 | fill
            continue
        scale = v.splat(np.float32(1) / max(constant, tiny))
        for i in range(start, start + block_size, 32):
            left = _rank16(_read16(weight, i, form) * scale, tree)
            right = _rank16(_read16(weight, i + 16, form) * scale, tree)
            v.prefetch(weight, i + AHEAD)
            v.prefetch(weight, i + AHEAD + 16)
            high = v.permute(codes, v.evens(left, right))
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
            values, rank = v.clamp(_read16(weight, i, form) * scale, low, high), v.splat(0)
            for level in range(8):
                step = 128 >> level
                rank = rank + v.where_greater(values, v.gather(thresholds, rank + v.splat(step - 1)), v.splat(step))
            v.store(packed, i, v.gather(order, rank))


@njit(forceinline=True)
def _encode(values, thresholds, order, bits, fill, tiny, codes):
    """Codes and constant of one block of float32, on any CPU, for any number of bits. Scales `values` in place."""
    top = np.int32(0)
    for value in values:
        top = max(top, np.int32(v.as_ints(value) & _MAGNITUDE))
    constant = _finite(top)
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
def _pack(codes, bits, packed, at):
    """Codes as one stream of bits from byte `at` on, first code in the highest bits."""
    if bits == 4:
        for i in range(len(codes) // 2):
            packed[at + i] = codes[2 * i] << 4 | codes[2 * i + 1]
        return
    window, held = 0, 0
    for code in codes:
        window, held = window << bits | code, held + bits
        if held >= 8:
            held -= 8
            packed[at] = window >> held & 0xFF
            at += 1


@_parallel
def _quantize(
    weight, form, thresholds, tree, order, bits, fill, group, block_size, piece, tiny, packed, absmax, vector
):
    n = len(weight)
    for p in prange((n + piece - 1) // piece):
        first, last = p * piece, min(p * piece + piece, n)
        if vector and (last - first) % block_size == 0:
            _absmax16(weight, form, first, last, block_size, absmax)
            if bits == 8:
                _encode_bytes(weight, form, first, last, block_size, thresholds, order, fill, tiny, absmax, packed)
            else:
                _encode16(weight, form, first, last, block_size, tree, order, fill, tiny, absmax, packed)
        else:
            values = np.empty(block_size, np.float32)
            codes = np.full((last - first + group - 1) // group * group, np.uint8(fill))
            for start in range(first, last, block_size):
                stop = min(start + block_size, last)
                for i in range(start, stop):
                    values[i - start] = _read(weight, i, form)
                absmax[start // block_size] = _encode(
                    values[: stop - start], thresholds, order, bits, fill, tiny, codes[start - first : stop - first]
                )
            _pack(codes, bits, packed, first * bits // 8)


@opaque
def quantize_blocks(
    weight: torch.Tensor, thresholds: torch.Tensor, order: torch.Tensor, block_size: int, group: int, tiny: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of quant.quantize.quantize_blocks: (numel,) weights -> packed uint8, absmax (n_blocks,) float32."""
    bits, n = (len(order) - 1).bit_length(), len(weight)
    piece = block_size * 8 // gcd(block_size, 8)  # ends where a block and a byte end
    piece *= max(1, PIECE // piece)
    ranks = np.full(255 if bits > 4 else 15, np.inf, np.float32)
    ranks[: len(thresholds)] = thresholds.numpy()
    codes = np.zeros(len(ranks) + 1, np.int32)
    codes[: len(order)] = order.numpy()
    tree = np.full((4, 16), np.inf, np.float32)
    tree[0] = ranks[7]
    for level, step in enumerate((4, 2, 1), start=1):
        tree[level, : 16 - step] = ranks[step - 1 : 15]  # entry r: the next threshold to try after rank r
    fill = int(codes[np.searchsorted(ranks, 0)])
    packed = torch.empty(-(-n // group) * group * bits // 8, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device="cpu")
    vector = bits in (4, 8) and block_size % 32 == 0 and FAST
    tables = ranks, tree.ravel(), codes, bits, fill, group, block_size, piece, np.float32(tiny)
    _run(_quantize, _view(weight), _FORM[weight.dtype], *tables, packed.numpy(), absmax.numpy(), vector)
    return packed, absmax


# --- dequantise -------------------------------------------------------------------------------------------------------


@njit(forceinline=True)
def _undouble(constants, first, n):
    """Constants of n blocks from `first` on, double quantization undone where there is any."""
    absmax, codes, scale, offset, table, group_shift = constants
    if len(codes) == 0:
        return absmax[first : first + n]
    values, i = np.empty(n, np.float32), 0
    while i < n:
        block = first + i
        if i + 16 <= n and block >> group_shift == (block + 15) >> group_shift:
            factor = v.splat(scale[block >> group_shift])
            v.store(values, i, v.gather(table, v.load(codes, block)) * factor + v.splat(offset))
            i += 16
        else:
            values[i] = table[codes[block]] * scale[block >> group_shift] + offset
            i += 1
    return values


@njit(forceinline=True)
def _code_at(packed, i, bits):
    """Code i of a stream of bits."""
    at = i * bits
    byte = at >> 3
    window = np.int64(packed[byte]) << 8
    if byte + 1 < len(packed):
        window |= packed[byte + 1]
    return window >> (16 - bits - (at & 7)) & ((1 << bits) - 1)


def _decode32(packed, i, values, table, out, at):
    """32 weights from 16 bytes. values: the scaled levels, float32; table: the same, rounded to 16 bits."""


@overload(_decode32)
def _decode32_as(packed, i, values, table, out, at):
    if out.dtype == types.float32:

        def decode(packed, i, values, table, out, at):
            codes = v.load(packed, i // 2)
            first, second = v.permute(values, codes >> v.splat(4)), v.permute(values, codes)
            v.store(out, at, v.lower_half(first, second))
            v.store(out, at + 16, v.upper_half(first, second))

        return decode

    def decode_16_bits(packed, i, values, table, out, at):
        codes = v.load(packed, i // 2)  # two weights a lane: the second in its upper 16 bits
        v.store(out, at, v.permute(table, codes >> v.splat(4)) | v.permute(table << v.splat(16), codes))

    return decode_16_bits


@njit(forceinline=True)
def _decode16(packed, levels, scales, block_size, start, out, at, form):
    """Whole blocks from `start` on, each a multiple of 32 long. The table is scaled and rounded once a block."""
    ahead = at - start
    for scale in scales:
        values = v.load(levels, 0) * v.splat(_NAN if np.isnan(scale) else scale)
        table = v.half_bits(values) if form == FLOAT16 else _bfloat16_of(values)
        for i in range(start, start + block_size, 32):
            _decode32(packed, i, values, table, out, ahead + i)
        start += block_size


@njit(forceinline=True)
def _decode(packed, bits, levels, scales, block_size, start, stop, out, at, form):
    """Weights start to stop, on any CPU, for any number of bits."""
    table, first = np.empty(16, out.dtype), start // block_size
    for block in range(first, (stop + block_size - 1) // block_size):
        scale, end = scales[block - first], min((block + 1) * block_size, stop)
        if bits == 4:
            for k in range(16):
                _write(table, k, levels[k] * scale, form)
            for i in range(start, end):
                out[at + i - start] = table[packed[i >> 1] >> (4 - 4 * (i & 1)) & 15]
        else:
            for i in range(start, end):
                _write(out, at + i - start, levels[_code_at(packed, i, bits)] * scale, form)
        at, start = at + end - start, end


@_parallel
def _dequantize(packed, bits, levels, constants, block_size, first, stride, length, limit, out, form, vector):
    """Runs of `length` weights, `stride` apart from `first` on, none beyond `limit`; `out` holds them side by side."""
    for run in prange((len(out) + length - 1) // length):
        start, at = first + run * stride, run * length
        stop = min(start + length, limit)
        block = start // block_size
        scales = _undouble(constants, block, (stop - 1) // block_size + 1 - block)
        if vector and start % block_size == 0:
            whole = (stop - start) // block_size
            _decode16(packed, levels, scales[:whole], block_size, start, out, at, form)
            scales, start, at = scales[whole:], start + whole * block_size, at + whole * block_size
        if start < stop:
            _decode(packed, bits, levels, scales, block_size, start, stop, out, at, form)


def _prepared(weight):
    """Packed, bits, levels up to a whole power of two, constants, all as numpy's, and how many weights they are enough
    for; kept where `weight` has room for it.

    Raises ValueError for tensors that a kernel would misread: it does not look where it reads.
    """
    packed, constants, levels, block_size = weight
    parts = (packed, constants) if isinstance(constants, torch.Tensor) else (packed, *constants[:2])
    where = [part.data_ptr() for part in parts]  # a storage that is shared between processes moves
    kept = getattr(weight, "prepared", None)
    if kept and kept[0] == where:
        return kept[1]
    for part, dtype in zip(parts, [torch.uint8] * (len(parts) - 1) + [torch.float32], strict=True):
        if part.dtype != dtype or part.dim() != 1 or not part.is_contiguous():
            layout = "contiguous" if part.is_contiguous() else "not contiguous"
            raise ValueError(
                f"a part of a quantised weight is {part.dtype}, {part.dim()}-dimensional and {layout}: "
                f"kernels read {dtype}, 1-dimensional and contiguous"
            )
    bits = (len(levels) - 1).bit_length()
    table = np.zeros(1 << bits, np.float32)
    table[: len(levels)] = levels.numpy()
    if isinstance(constants, torch.Tensor):
        n_blocks = len(constants)
        arrays = constants.numpy(), np.empty(0, np.uint8), _NONE, np.float32(0), _NONE, 0
    else:
        codes, scale, offset, map_, group_size = constants
        n_blocks, shift = min(len(codes), len(scale) * group_size), group_size.bit_length() - 1
        arrays = _NONE, codes.numpy(), scale.numpy(), np.float32(offset.item()), map_.numpy(), shift
    prepared = packed.numpy(), bits, table, arrays, min(8 * len(packed) // bits, n_blocks * block_size)
    if hasattr(weight, "__dict__"):
        weight.prepared = where, prepared
    return prepared


def _check_length(weight, numel, limit):
    """Raise ValueError where `weight` has fewer codes or constants than `numel` weights need."""
    if numel > limit:
        packed, constants, levels, block_size = weight
        have = constants if isinstance(constants, torch.Tensor) else constants[0]
        raise ValueError(
            f"{numel} weights need {-(-numel * (len(levels) - 1).bit_length() // 8)} bytes and "
            f"{-(-numel // block_size)} constants, but there are {len(packed)} and {len(have)}"
        )


_NONE = np.empty(0, np.float32)


@opaque
def dequantize_blocks(weight: tuple, out: torch.Tensor, first: int = 0, stride: int = 0) -> None:
    """Twin of quant.quantize.dequantize_blocks: fills `out`, contiguous float32, bf16 or fp16.

    The flat weights from `first` on; with a `stride`, row i of the matrix `out` comes from first + i * stride.
    weight: packed, constants, levels, block_size; constants are absmax, or (absmax_codes, absmax_scale, absmax_offset,
    map, group_size).
    """
    packed, bits, table, constants, have = _prepared(weight)
    block_size = weight[3]
    if stride:
        length, limit = out.shape[1], first + (len(out) - 1) * stride + out.shape[1]
    else:
        stride = length = block_size * max(1, PIECE // block_size)
        limit = first + out.numel()
    _check_length(weight, limit, have)
    vector = bits == 4 and block_size % 32 == 0 and FAST
    runs = block_size, first, stride, length, limit
    _run(_dequantize, packed, bits, table, constants, *runs, _view(out), _FORM[out.dtype], vector)


# --- a few tokens -----------------------------------------------------------------------------------------------------


@_parallel
def _multiply(x, form, zeros, packed, levels, constants, block_size, columns, rows, out):
    """out (tokens, rows) = x W^T for at most len(zeros) tokens, two rows of W at a time. x and out are flat."""
    blocks, tokens = columns // block_size, len(x) // columns
    halves = np.zeros((len(zeros), columns), np.float32)  # of each 32 columns the even ones first, as codes are read
    for token in range(tokens):
        sorted_, start = halves[token], token * columns
        for i in range(0, columns, 32):
            left, right = _read16(x, start + i, form), _read16(x, start + i + 16, form)
            v.store(sorted_, i, v.evens(left, right))
            v.store(sorted_, i + 16, v.odds(left, right))
    for tile in prange((rows + TILE - 1) // TILE):
        first, last = tile * TILE, min(tile * TILE + TILE, rows)
        scales = _undouble(constants, first * blocks, (last - first) * blocks)
        totals = np.empty((len(zeros), TILE), np.float32)
        for row in range(first, last, 2):
            other = min(row + 1, last - 1)
            bytes_, other_bytes = packed[row * columns // 2 :], packed[other * columns // 2 :]
            scale, other_scale = scales[(row - first) * blocks :], scales[(other - first) * blocks :]
            sums, other_sums = v.splat_each(zeros), v.splat_each(zeros)
            at = 0
            for block in range(blocks):
                table = v.load(levels, 0) * v.splat(scale[block])
                other_table = v.load(levels, 0) * v.splat(other_scale[block])
                v.prefetch(bytes_, at + BYTES_AHEAD)
                v.prefetch(other_bytes, at + BYTES_AHEAD)
                for _ in range(block_size // 32):
                    codes, other_codes = v.load(bytes_, at), v.load(other_bytes, at)
                    high, other_high = codes >> v.splat(4), other_codes >> v.splat(4)
                    sums = v.fma_each(sums, v.permute(table, high), halves, 2 * at)
                    other_sums = v.fma_each(other_sums, v.permute(other_table, other_high), halves, 2 * at)
                    sums = v.fma_each(sums, v.permute(table, codes), halves, 2 * at + 16)
                    other_sums = v.fma_each(other_sums, v.permute(other_table, other_codes), halves, 2 * at + 16)
                    at += 16
            v.store_totals(sums, totals, row - first)
            v.store_totals(other_sums, totals, other - first)
        for token in range(tokens):
            for row in range(first, last):
                _write(out, token * rows + row, totals[token, row - first], form)


def can_multiply(columns: int, weight: tuple) -> bool:
    """Whether multiply_blocks takes a weight with rows of `columns`: whole blocks of 4-bit codes, on this CPU."""
    _, _, levels, block_size = weight
    return 8 < len(levels) <= 16 and block_size % 32 == 0 and columns % block_size == 0 and FAST


@opaque
def multiply_blocks(x: torch.Tensor, weight: tuple, rows: int) -> torch.Tensor:
    """x W^T: (tokens, columns) float32, bf16 or fp16 -> (tokens, rows), same dtype; decoded weights stay in registers.

    Products and sums are float32 and the weights are not rounded to the dtype of x, so an output depends on its row of
    x and its row of W alone. Needs can_multiply. weight: as in dequantize_blocks.
    """
    tokens, columns = x.shape
    packed, _, table, constants, have = _prepared(weight)
    _check_length(weight, rows * columns, have)
    out = torch.empty(tokens, rows, dtype=x.dtype, device="cpu")
    given, result, form = _view(x.contiguous()), _view(out), _FORM[x.dtype]
    for first in range(0, tokens, _TOKENS_AT_ONCE):
        last = min(first + _TOKENS_AT_ONCE, tokens)
        zeros = _ZEROS[(last - first - 1).bit_length()]
        part, to = given[first * columns : last * columns], result[first * rows : last * rows]
        _run(_multiply, part, form, zeros, packed, table, constants, weight[3], columns, rows, to)
    return out
