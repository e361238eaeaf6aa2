"""The products of one token with the weights of a decoder layer, several weights in one call.

In: x (tokens, columns) float32 for 1, 2, 4 or 8 tokens, and weights as rows of PRODUCT: packed in 4 bits, or float32,
bf16, fp16; a bias and an adapter of any rank beside each. Out: (tokens, rows) float32. Twin of infer/step.py.

A weight is described by numbers and addresses, so that all of a model are one array: as arguments, the arrays of 210
layers would take Python longer to hand over than the products take. Whoever makes the table keeps the tensors.

Read for each weight and token: 0.52 bytes packed with double quantization, 2 in bf16. The rows of a tile are added up
together: 15 additions of vectors for 16 rows, where one by one they take 64, a fifth of a row of 576.
"""

from math import prod

import numpy as np
import torch
from numba import carray, njit, prange, types
from numba.extending import intrinsic

from qlora_lab.kernels import cpu, decode_int8, int8_products, sums as each, vector as v
from qlora_lab.kernels.compiled import parallel
from qlora_lab.kernels.constants import undouble_into
from qlora_lab.kernels.elements import FLOAT32, FORM, read16
from qlora_lab.kernels.packed_weight import PackedWeight

PACKED, ROUNDED = 3, 4  # forms beside FLOAT32, BFLOAT16 and FLOAT16 of elements.py: packed, with x as it is or in int8
ROWS = 16  # of a weight whose sums are added up together
AHEAD = 2**12  # bytes in front that are asked for, as few_tokens.BYTES_AHEAD

# One product, as a row of a table. Numbers of elements, and addresses of what is contiguous; 0: there is none.
PRODUCT = np.dtype(
    [
        *((name, np.int64) for name in ("rows", "columns", "form", "data", "bias")),
        *((name, np.int64) for name in ("block_size", "levels", "absmax", "codes", "scale", "table", "shift")),
        *((name, np.int64) for name in ("lora_A", "lora_B", "rank")),
        *((name, np.float32) for name in ("offset", "scaling", "unit")),
    ]
)


def describe(weight: PackedWeight | torch.Tensor, shape, bias, lora, whole=None) -> tuple[tuple, list]:
    """Return a row of PRODUCT, and what has to stay in memory while it is used.

    weight: packed, or contiguous (rows, columns). bias: (rows,) float32 or None. lora: A (rank, columns) and
    B (rows, rank), float32, and scaling, or None. All of them contiguous. whole: for a product in int8, the levels of a
    packed weight as whole numbers, (n_levels,), and what 1 of them stands for (infer/int8.py).
    """
    p = dict.fromkeys(PRODUCT.names, 0)  # a row of numpy's takes twice as long to fill
    p["rows"], p["columns"] = shape
    kept = [weight, bias, lora]
    if isinstance(weight, torch.Tensor):
        p["form"], p["data"] = FORM[weight.dtype], weight.data_ptr()
    else:
        arrays = cpu.arrays_of(weight)
        cpu.check_length(weight, prod(shape), arrays.numel)
        absmax, codes, scale, offset, table, shift = arrays.constants
        parts = {"data": arrays.packed, "levels": arrays.levels, "absmax": absmax, "codes": codes}
        for name, array in (parts | {"scale": scale, "table": table}).items():
            p[name] = array.ctypes.data if len(array) else 0
        p["form"], p["block_size"], p["shift"], p["offset"] = PACKED, weight.block_size, shift, offset
        kept.append(arrays)
        if whole is not None:
            levels, p["unit"] = int8_products.level_bytes(whole[0]), whole[1]
            p["form"], p["levels"] = ROUNDED, levels.ctypes.data
            kept.append(levels)
    if bias is not None:
        p["bias"] = bias.data_ptr()
    if lora is not None:
        A, B, scaling = lora
        p["lora_A"], p["lora_B"], p["rank"], p["scaling"] = A.data_ptr(), B.data_ptr(), len(A), scaling
    return tuple(p.values()), kept


def table(described: list) -> np.ndarray:
    """Rows of `describe`, or lists of them, as an array that the kernels take."""
    return np.array(described, PRODUCT)


@intrinsic
def _pointer(typing, address, element):
    """The address of numbers of this type, as a pointer."""
    result = types.CPointer(element.instance_type)

    def emit(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.int64, element), emit


@njit(forceinline=True)
def _at(address, n, element):
    """An array over n numbers that lie elsewhere; nothing keeps them alive."""
    return carray(_pointer(address, element), (n,))


@njit(forceinline=True)
def _constants(p):
    """The constants of a packed weight, as constants.py reads them."""
    n = p.rows * p.columns // p.block_size
    coded = n if p.codes else 0
    groups = (coded >> p.shift) + 1
    scale, table = _at(p.scale, groups, np.float32), _at(p.table, 256, np.float32)
    return _at(p.absmax, n - coded, np.float32), _at(p.codes, coded, np.uint8), scale, p.offset, table, p.shift


@njit(forceinline=True)
def _beside(zeros, lora_B, row, rank, low):
    """Sums to begin a row with: what an adapter adds. Its lanes are added up with the rest of the row, for nothing."""
    sums = each.splat(zeros)
    for k in range(0, rank, 16):
        sums = each.fma(sums, v.load_first(lora_B, row * rank + k, rank - k), low, k)
    return sums


@njit(forceinline=True)
def _packed_pair(packed, bytes_, levels, block_size, scales, halves, sums, zeros):
    """Sums of two rows, for several tokens: both use the same vectors of x, which come from the second-level cache."""
    first, second = bytes_
    first_scales, second_scales = scales
    a, b = sums
    column = 0
    for block in range(len(first_scales)):
        a_table, b_table = levels * v.splat(first_scales[block]), levels * v.splat(second_scales[block])
        v.prefetch(packed, first + AHEAD)
        v.prefetch(packed, second + AHEAD)
        for _ in range(block_size // 32):
            a_codes, b_codes = v.load(packed, first), v.load(packed, second)
            a = each.fma(a, v.permute(a_table, a_codes >> v.splat(4)), halves, column)
            b = each.fma(b, v.permute(b_table, b_codes >> v.splat(4)), halves, column)
            a = each.fma(a, v.permute(a_table, a_codes), halves, column + 16)  # permute reads 4 bits
            b = each.fma(b, v.permute(b_table, b_codes), halves, column + 16)
            first += 16
            second += 16
            column += 32
    return a, b


@njit(forceinline=True)
def _packed_four(packed, rows, first, blocks, block_size, levels, lora_B, rank, halves, low, zeros, scales, lanes):
    """Sums of four rows for one token; as _packed_pair, with names for four."""
    half = blocks * block_size // 2  # bytes of a row
    ahead = 16 * half  # four groups of rows: what lies 4 KiB in front may be being read already
    a_byte, b_byte, c_byte, d_byte = rows[0] * half, rows[1] * half, rows[2] * half, rows[3] * half
    a, b = _beside(zeros, lora_B, rows[0], rank, low), _beside(zeros, lora_B, rows[1], rank, low)
    c, d = _beside(zeros, lora_B, rows[2], rank, low), _beside(zeros, lora_B, rows[3], rank, low)
    a_scale, b_scale = (rows[0] - first) * blocks, (rows[1] - first) * blocks
    c_scale, d_scale = (rows[2] - first) * blocks, (rows[3] - first) * blocks
    column = 0
    for block in range(blocks):
        a_table, b_table = levels * v.splat(scales[a_scale + block]), levels * v.splat(scales[b_scale + block])
        c_table, d_table = levels * v.splat(scales[c_scale + block]), levels * v.splat(scales[d_scale + block])
        for byte in (a_byte, b_byte, c_byte, d_byte):
            v.prefetch(packed, byte + column // 2 + ahead)
        for _ in range(block_size // 32):
            i = column // 2
            a_codes, b_codes = v.load(packed, a_byte + i), v.load(packed, b_byte + i)
            c_codes, d_codes = v.load(packed, c_byte + i), v.load(packed, d_byte + i)
            a = each.fma(a, v.permute(a_table, a_codes >> v.splat(4)), halves, column)
            b = each.fma(b, v.permute(b_table, b_codes >> v.splat(4)), halves, column)
            c = each.fma(c, v.permute(c_table, c_codes >> v.splat(4)), halves, column)
            d = each.fma(d, v.permute(d_table, d_codes >> v.splat(4)), halves, column)
            a = each.fma(a, v.permute(a_table, a_codes), halves, column + 16)
            b = each.fma(b, v.permute(b_table, b_codes), halves, column + 16)
            c = each.fma(c, v.permute(c_table, c_codes), halves, column + 16)
            d = each.fma(d, v.permute(d_table, d_codes), halves, column + 16)
            column += 32
    each.store(a, lanes, (16 * (rows[0] - first),))
    each.store(b, lanes, (16 * (rows[1] - first),))
    each.store(c, lanes, (16 * (rows[2] - first),))
    each.store(d, lanes, (16 * (rows[3] - first),))


@njit
def _packed_rows(p, first, last, halves, low, zeros, scales, lanes):
    """Sums of the rows first to last, at most ROWS, into lanes (tokens, ROWS * 16): 16 parts of each sum.

    An addition waits 4 cycles for the one before it. One token alone has too few sums to fill them with two rows, so it
    takes four. The order of a sum is the same in both, so a row's logits do not depend on how many rows there are.
    """
    columns, block_size, rank = p.columns, p.block_size, p.rank
    blocks = columns // block_size
    packed = _at(p.data, p.rows * columns // 2, np.uint8)
    levels = v.load(_at(p.levels, 16, np.float32), 0)
    lora_B = _at(p.lora_B, p.rows * rank, np.float32)
    undouble_into(_constants(p), first * blocks, (last - first) * blocks, scales)
    if len(zeros) == 1:
        for row in range(first, last, 4):
            rows = row, min(row + 1, last - 1), min(row + 2, last - 1), min(row + 3, last - 1)
            _packed_four(
                packed, rows, first, blocks, block_size, levels, lora_B, rank, halves, low, zeros, scales, lanes
            )
    else:
        for row in range(first, last, 2):
            other = min(row + 1, last - 1)  # of an odd number of rows the last is computed twice
            start, other_start = (row - first) * blocks, (other - first) * blocks
            own, others = scales[start : start + blocks], scales[other_start : other_start + blocks]
            sums = _beside(zeros, lora_B, row, rank, low), _beside(zeros, lora_B, other, rank, low)
            bytes_ = row * columns // 2, other * columns // 2
            a, b = _packed_pair(packed, bytes_, levels, block_size, (own, others), halves, sums, zeros)
            each.store(a, lanes, (16 * (row - first),))
            each.store(b, lanes, (16 * (other - first),))


@njit
def _rounded_rows(p, first, last, numbers, low, zeros, scales, lanes):
    """The same for a product in int8. numbers: x as decode_int8.round_rows writes it."""
    blocks = p.columns // p.block_size
    codes = _at(p.data, p.rows * p.columns // 8, np.int32)
    table = _at(p.levels, 16, np.int32)
    lora_B = _at(p.lora_B, p.rows * p.rank, np.float32)
    undouble_into(_constants(p), first * blocks, (last - first) * blocks, scales)
    for row in range(first, last):
        each.store(_beside(zeros, lora_B, row, p.rank, low), lanes, (16 * (row - first),))
    part = p.unit, p.block_size, first, last, p.columns
    decode_int8.add_rows(codes, table, scales, *part, numbers, zeros, lanes)


@njit(forceinline=True)
def _plain_rows(weight, form, columns, first, last, x, lora_B, rank, low, zeros, lanes):
    """The same for a weight that is not packed. x: flat, from side_by_side.

    One token waits for memory, which is read ahead best as one stream. Several wait for x: two rows share a load of it.
    """
    n = len(zeros)
    if n == 1:
        for row in range(first, last):
            sums = _beside(zeros, lora_B, row, rank, low)
            start = row * columns
            for i in range(0, columns, 16):
                sums = each.fma_beside(sums, (read16(weight, start + i, form),), x, i)
            each.store(sums, lanes, (16 * (row - first),))
    else:
        for row in range(first, last, 2):
            other = min(row + 1, last - 1)
            sums = _beside(zeros, lora_B, row, rank, low) + _beside(zeros, lora_B, other, rank, low)
            start, other_start = row * columns, other * columns
            for i in range(0, columns, 16):
                v.prefetch(weight, start + i + AHEAD // 2)  # in elements
                v.prefetch(weight, other_start + i + AHEAD // 2)
                factors = read16(weight, start + i, form), read16(weight, other_start + i, form)
                sums = each.fma_beside(sums, factors, x, n * i)
            each.store(sums, lanes, (16 * (row - first), 16 * (other - first)))


@njit(forceinline=True)
def totals16(lanes):
    """The sums of 16 vectors that lie side by side, as one vector; writes over them."""
    width = 8  # vectors that are left, each of which holds parts of twice as many sums as before
    for _ in range(4):
        for i in range(width):
            left, right = v.load(lanes, 32 * i), v.load(lanes, 32 * i + 16)
            v.store(lanes, 16 * i, v.evens(left, right) + v.odds(left, right))
        width >>= 1
    return v.load(lanes, 0)


@njit
def _tile(p, first, x, halves, numbers, low, zeros, scales, lanes, out, column):
    """Write ROWS sums, or what is left of the rows from `first` on, into out (tokens, n) from `column` on."""
    last = min(first + ROWS, p.rows)
    n = p.rows * p.columns
    lora_B = _at(p.lora_B, p.rows * p.rank, np.float32)
    if p.form == PACKED:
        _packed_rows(p, first, last, halves, low, zeros, scales, lanes)
    elif p.form == ROUNDED:
        _rounded_rows(p, first, last, numbers, low, zeros, scales, lanes)
    elif p.form == FLOAT32:
        weight = _at(p.data, n, np.float32)
        _plain_rows(weight, FLOAT32, p.columns, first, last, x, lora_B, p.rank, low, zeros, lanes)
    else:
        weight = _at(p.data, n, np.uint16)
        _plain_rows(weight, p.form, p.columns, first, last, x, lora_B, p.rank, low, zeros, lanes)
    bias = _at(p.bias, p.rows if p.bias else 0, np.float32)
    for token in range(len(zeros)):
        v.store(lanes[token], 0, totals16(lanes[token]))
        for row in range(first, last):
            total = lanes[token, row - first]
            out[token, column + row] = total + bias[row] if p.bias else total


@njit
def _low_rows(p, first, last, x, zeros, lanes, low):
    """Rows first to last of scaling x A^T, (tokens, rank), into low."""
    A = _at(p.lora_A, p.rank * p.columns, np.float32)
    for row in range(first, last):
        sums = each.splat(zeros)
        for i in range(0, p.columns, 16):
            sums = each.fma_beside(sums, (v.load(A, row * p.columns + i),), x, len(zeros) * i)
        each.store_totals(sums, low, row)
        for token in range(len(zeros)):
            low[token, row] *= p.scaling


@njit
def clear(array):
    """Write zeros. Where a function is compiled for all cores, np.zeros would wake them."""
    flat = array.reshape(-1)
    for i in range(len(flat)):
        flat[i] = np.float32(0)


@parallel
def multiply_group(products, x, halves, numbers, zeros, parts, out):
    """Multiply x by each of products and write the results side by side into out (tokens, rows of all).

    x: flat, from side_by_side. halves: (tokens, columns), with the even columns of each 32 in front of the odd ones,
    as codes lie in bytes. numbers: x as decode_int8.round_rows writes it, where a product is ROUNDED. parts: threads.
    """
    tokens = len(zeros)
    tiles = rank = columns = 0
    for i in range(len(products)):
        tiles += (products[i].rows + ROWS - 1) // ROWS
        rank = max(rank, products[i].rank)
        columns = max(columns, products[i].columns)
    low = np.empty((len(products), tokens, (rank + 15) // 16 * 16), np.float32)
    if rank:
        clear(low)
        for part in prange(parts):
            lanes = np.empty((tokens, 16), np.float32)
            for i in range(len(products)):
                p = products[i]
                _low_rows(p, part * p.rank // parts, (part + 1) * p.rank // parts, x, zeros, lanes, low[i])
    for part in prange(parts):  # by hand, so that a thread allocates once and not for each tile
        scales = np.empty(ROWS * columns // 16, np.float32)  # a block has 32 columns at least
        lanes = np.empty((tokens, ROWS * 16), np.float32)
        clear(lanes)  # a last tile leaves rows of it as they are
        start, stop = part * tiles // parts, (part + 1) * tiles // parts
        tile = column = 0  # of the product's first row
        for i in range(len(products)):
            p = products[i]
            end = tile + (p.rows + ROWS - 1) // ROWS
            for mine in range(max(tile, start), min(end, stop)):
                _tile(p, (mine - tile) * ROWS, x, halves, numbers, low[i], zeros, scales, lanes, out, column)
            tile = end
            column += p.rows


@njit
def sort_halves(x, halves):
    """Put the even columns of each 32 in front of the odd ones: cheaper than to interleave decoded weights."""
    for token in range(len(x)):
        row, half = x[token], halves[token]
        for i in range(0, x.shape[1], 32):
            left, right = v.load(row, i), v.load(row, i + 16)
            v.store(half, i, v.evens(left, right))
            v.store(half, i + 16, v.odds(left, right))


@njit
def side_by_side(x, beside):
    """x (tokens, columns) as (columns / 16, tokens, 16), flat: one address for all tokens. One token is so already."""
    tokens = len(x)
    if tokens == 1:
        return x.reshape(-1)
    for token in range(tokens):
        row = x[token]
        for i in range(0, x.shape[1], 16):
            v.store(beside, i * tokens + 16 * token, v.load(row, i))
    return beside
