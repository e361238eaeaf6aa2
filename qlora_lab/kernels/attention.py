"""Attention in bf16 and its gradients, where pairs of bf16 are the fast products: softmax(scale q k^T) v.

In: q (batch, tokens, heads, head_dim), k and v (batch, keys, kv_heads, head_dim), contiguous bf16; head_dim a multiple
of 32. Each key head serves heads / kv_heads query heads. Out: the same layout as q. Twin of torch's
scaled_dot_product_attention, up to rounding: scores, powers and sums are float32, and only the factors of a product are
bf16. For backward only the result and one number a query are kept: the scores are computed again (FlashAttention).

Why not torch's: it multiplies small tiles through a library, at a quarter of this processor's speed. Here 8 queries
meet 32 keys in registers. A row of scores is at most 8 x keys float32, so softmax needs no second pass over v.
What the instruction does to subnormals holds here too (few_pairs.py): they count as 0.
"""

import numpy as np
import torch
from numba import njit, prange

from qlora_lab.kernels import sums as each, vector as v, words
from qlora_lab.kernels.compiled import parallel, run
from qlora_lab.kernels.decode_step import exp16
from qlora_lab.kernels.elements import BFLOAT16, bfloat16_of, read16, view

EIGHT = (np.float32(0),) * 8  # queries at once; with 32 keys they fill half of the 32 vector registers
BLOCK = 64  # queries whose gradients for keys are added up before they leave the registers
MOST = 256  # head_dim up to which all that a tile needs stays in the second-level cache
LEAST = np.float32(-87)  # the least that exp16 tells apart
_INFINITY = np.float32(np.inf)


def can_attend(head_dim: int) -> bool:
    """Whether forward and backward take heads of this size, on this CPU."""
    return head_dim % 32 == 0 and head_dim <= MOST and words.has_pairs()


@njit
def _clear(array):
    for i in range(len(array)):
        array[i] = 0


@njit
def _columns(words, rows, first, step, half, room):
    """(half, room) int32, flat: the pair of numbers i of each row, side by side. Rows begin at first + row * step."""
    columns = np.zeros(half * room, np.int32)
    for row in range(rows):
        start = first + row * step
        for i in range(half):
            columns[i * room + row] = words[start + i]
    return columns


@njit
def _pairs(halves, rows, first, step, head_dim, pairs):
    """Fill pairs (rows / 2, head_dim) int32, flat: the numbers of two neighbouring rows in one lane."""
    for row in range(0, rows, 2):
        start = first + row * step
        for i in range(0, head_dim, 16):
            both = v.load(halves, start + i)
            if row + 1 < rows:
                both = both | v.load(halves, start + step + i) << v.splat(16)
            v.store(pairs, row // 2 * head_dim + i, both)


@njit
def _eight(words, first, step, count, half, rows):
    """Copy `count` rows of words into rows (8, half), flat, and zeros after them."""
    for row in range(8):
        for i in range(half):
            rows[row * half + i] = words[first + row * step + i] if row < count else 0


@njit
def multiply(zeros, rows, step, columns, start, width, count, out, place):
    """Write sums of 32 columns for as many rows as `zeros` into out from column `place` on.

    rows: flat, `step` apart. columns: (count, width), flat, read from `start` on. Both are float32, or pairs of bf16 as
    int32.
    """
    a, b = each.splat(zeros), each.splat(zeros)
    for i in range(count):
        left, right = v.load(columns, start + i * width), v.load(columns, start + i * width + 16)
        a = each.add_steps(a, left, rows, i, step)
        b = each.add_steps(b, right, rows, i, step)
    each.store(a, out, (place,))
    each.store(b, out, (place + 16,))


@njit
def _end(mask, mask_row, first, count, keys):
    """The number of keys up to the last one that any of these queries sees. An empty mask is causal."""
    if len(mask) == 0:
        return first + count
    end = 0
    for row in range(mask_row + first, mask_row + first + count):
        key = keys
        while key > end and not mask[row * keys + key - 1]:
            key -= 1
        end = max(end, key)
    return end


@njit
def _hide(scores, row, start, stop, mask, mask_row, query, keys):
    """Set scores[row] of the keys start to stop, which lie there side by side, to -inf where the query sees none."""
    if len(mask) == 0:
        for key in range(max(start, query + 1), stop):
            scores[row, key - start] = -_INFINITY
        return
    for key in range(start, stop):
        if key >= keys or not mask[(mask_row + query) * keys + key]:
            scores[row, key - start] = -_INFINITY


@njit(forceinline=True)
def power(x):
    """e^x for 16 float32, 0 below -87, so that a hidden key gets and gives exactly nothing. NaN stays."""
    keep = v.where_greater(v.splat(LEAST), x, v.splat(1)) + v.splat(-1)  # 0 below, else all bits
    return v.as_floats(v.as_ints(exp16(x)) & keep)


@njit
def _softmax(scores, row, end, scale, powers, room):
    """Write e^(scale (score - largest)) of a row as bf16. Returns their sum and the largest scaled score."""
    tops = v.splat(-_INFINITY)
    values = scores[row]
    for i in range(0, end, 16):
        tops = v.clamp(v.load(values, i), tops, v.splat(_INFINITY))  # the larger of the two
    lanes = np.empty(16, np.float32)
    v.store(lanes, 0, tops)
    top = -_INFINITY
    for lane in lanes:
        top = lane if not lane <= top else top  # so that NaN stays
    top *= scale
    shift = v.splat(-top if top > -_INFINITY else np.float32(0))
    totals = v.splat(np.float32(0))
    for i in range(0, end, 16):
        powered = power(v.fma(v.load(values, i), v.splat(scale), shift))
        totals = totals + powered
        words.store_words(powers, row * room + i, bfloat16_of(powered))
    return each.total(totals), top


@njit
def _forward_of(item, q, k, values, mask, scale, zeros, shape, out, kept):
    """All queries of one key head."""
    batch, tokens, keys, heads, kv_heads, head_dim = shape
    half, group = head_dim // 2, heads // kv_heads
    room = (keys + 31) // 32 * 32  # zeros follow the last key
    mask_step = tokens if len(mask) > tokens * keys else 0  # rows of the mask from one text to the next
    text, kv_head = item // kv_heads, item % kv_heads
    first_key = (text * keys * kv_heads + kv_head) * head_dim
    columns = _columns(k, keys, first_key // 2, kv_heads * half, half, room)  # (half, room)
    pairs = np.zeros(room // 2 * head_dim, np.int32)
    _pairs(values, keys, first_key, kv_heads * head_dim, head_dim, pairs)
    rows = np.empty(8 * half, np.int32)
    scores = np.empty((8, room), np.float32)  # whole rows, so that softmax knows its maximum before the first product
    power_pairs = np.empty(8 * room // 2, np.int32)
    powers = power_pairs.view(np.uint16)
    result, shares = np.empty((8, head_dim), np.float32), np.empty(8, np.float32)
    for head in range(kv_head * group, kv_head * group + group):
        for first in range(0, tokens, 8):
            count = min(8, tokens - first)
            place = ((text * tokens + first) * heads + head) * head_dim  # of the first query
            _eight(q, place // 2, heads * half, count, half, rows)
            end = (_end(mask, text * mask_step, first, count, keys) + 31) // 32 * 32
            for i in range(0, end, 32):
                multiply(zeros, rows, half, columns, i, room, half, scores, i)
            _clear(power_pairs)  # of missing queries, too
            for row in range(count):
                _hide(scores, row, 0, end, mask, text * mask_step, first + row, keys)
                total, top = _softmax(scores, row, end, scale, powers, room)
                seen = top != -_INFINITY  # by a query that sees no key, as torch: 0
                shares[row] = np.float32(1) / total if seen else np.float32(0)
                kept[text, head, first + row] = top + np.log(total) if seen else _INFINITY
            for i in range(0, head_dim, 32):
                multiply(zeros, power_pairs, room // 2, pairs, i, head_dim, end // 2, result, i)
            for row in range(count):
                for i in range(0, head_dim, 16):
                    share = v.load(result[row], i) * v.splat(shares[row])
                    words.store_words(out, place + row * heads * head_dim + i, bfloat16_of(share))


@parallel
def _forward(q, k, values, mask, scale, zeros, shape, out, kept):
    """q and k: flat, pairs as int32; values and out: flat bf16. kept (batch, heads, tokens): log of the sum of powers.

    mask: (batch or 1, tokens, keys) flat, or empty: causal.
    """
    # A function of its own, and of int64 as outside: the parallel pass takes seconds on a long loop, and on two types.
    for item in prange(shape[0] * shape[4]):
        _forward_of(np.int64(item), q, k, values, mask, scale, zeros, shape, out, kept)


@njit
def _delta(grad, out, place, head_dim):
    """The sum of a query's result times its gradient: what softmax's gradient takes off each key's."""
    sums = v.splat(np.float32(0))
    for i in range(0, head_dim, 16):
        sums = v.fma(read16(grad, place + i, BFLOAT16), read16(out, place + i, BFLOAT16), sums)
    return each.total(sums)


@njit
def _eight_queries(scores, changes, scale, shifts, deltas, place, shared, both, alone, room):
    """From scores and dO v^T of 8 queries and 32 keys: probabilities and the scores' gradients, as bf16.

    shared, both: for pairs of queries, from `place` on, (queries / 2, room). alone: the gradients by query, (8, room).
    """
    key = place % room
    for row in range(0, 8, 2):
        for i in range(0, 32, 16):
            # two queries at a time, because a pair of them shares a lane where gradients of keys are added up
            left = power(v.fma(v.load(scores[row], i), v.splat(scale), v.splat(-shifts[row])))
            right = power(v.fma(v.load(scores[row + 1], i), v.splat(scale), v.splat(-shifts[row + 1])))
            there = place + row // 2 * room + i
            v.store(shared, there, bfloat16_of(left) | bfloat16_of(right) << v.splat(16))
            left = (v.load(changes[row], i) + v.splat(-deltas[row])) * left * v.splat(scale)
            right = (v.load(changes[row + 1], i) + v.splat(-deltas[row + 1])) * right * v.splat(scale)
            left_bits, right_bits = bfloat16_of(left), bfloat16_of(right)
            v.store(both, there, left_bits | right_bits << v.splat(16))
            words.store_words(
                alone, row * room + key + i, left_bits
            )  # by query, where gradients of queries are added up
            words.store_words(alone, row * room + room + key + i, right_bits)


@njit
def _add_keys(zeros, pairs, columns, count, end, room, head_dim, total):
    """total (keys / 8, 8, head_dim) += what `count` pairs of queries give each key."""
    for key in range(0, end, 8):
        rows = total[key // 8]
        for i in range(0, head_dim, 32):
            a, b = each.splat(zeros), each.splat(zeros)
            for j in range(count):
                left, right = v.load(columns, j * head_dim + i), v.load(columns, j * head_dim + i + 16)
                a = each.add_steps(a, left, pairs, j * room + key, 1)
                b = each.add_steps(b, right, pairs, j * room + key, 1)
            each.store(each.fma(a, v.splat(np.float32(1)), rows, i), rows, (i,))
            each.store(each.fma(b, v.splat(np.float32(1)), rows, i + 16), rows, (i + 16,))


@njit
def _write(total, out, first, step, rows, head_dim):
    flat = total.reshape(-1)
    for row in range(rows):
        for i in range(0, head_dim, 16):
            words.store_words(out, first + row * step + i, bfloat16_of(v.load(flat, row * head_dim + i)))


@njit
def _backward_of(item, q, k, values, out, grad, kept, mask, scale, zeros, shape, grad_q, grad_k, grad_v):
    """The gradients of one key head and its queries."""
    batch, tokens, keys, heads, kv_heads, head_dim = shape
    half, group = head_dim // 2, heads // kv_heads
    room = (keys + 31) // 32 * 32
    mask_step = tokens if len(mask) > tokens * keys else 0
    step = heads * head_dim  # from a query to the next
    text, kv_head = item // kv_heads, item % kv_heads
    first_key = (text * keys * kv_heads + kv_head) * head_dim
    q_words, grad_words = q.view(np.int32), grad.view(np.int32)
    k_columns = _columns(k.view(np.int32), keys, first_key // 2, kv_heads * half, half, room)
    v_columns = _columns(values.view(np.int32), keys, first_key // 2, kv_heads * half, half, room)
    k_pairs = np.zeros(room // 2 * head_dim, np.int32)
    _pairs(k, keys, first_key, kv_heads * head_dim, head_dim, k_pairs)
    # float32, because each query head and each block of queries adds to it
    total_k = np.zeros((room // 8, 8, head_dim), np.float32)
    total_v = np.zeros((room // 8, 8, head_dim), np.float32)
    rows, grads = np.empty(8 * half, np.int32), np.empty(8 * half, np.int32)
    scores, changes = np.empty((8, 32), np.float32), np.empty((8, 32), np.float32)  # of 32 keys at a time
    shifts, deltas = np.empty(8, np.float32), np.empty(8, np.float32)
    alone_pairs = np.empty(8 * room // 2, np.int32)
    alone = alone_pairs.view(np.uint16)
    shared, both = np.empty(BLOCK // 2 * room, np.int32), np.empty(BLOCK // 2 * room, np.int32)
    q_pairs, g_pairs = np.empty(BLOCK // 2 * head_dim, np.int32), np.empty(BLOCK // 2 * head_dim, np.int32)
    result = np.empty((8, head_dim), np.float32)
    for head in range(kv_head * group, kv_head * group + group):
        for start in range(0, tokens, BLOCK):
            in_block = min(BLOCK, tokens - start)
            _clear(shared)  # a query's part ends where its keys end
            _clear(both)
            last = 0
            for first in range(start, start + in_block, 8):
                count = min(8, tokens - first)
                place = ((text * tokens + first) * heads + head) * head_dim
                _eight(q_words, place // 2, step // 2, count, half, rows)
                _eight(grad_words, place // 2, step // 2, count, half, grads)
                for row in range(8):
                    shifts[row], deltas[row] = _INFINITY, np.float32(0)  # of a query that is missing
                    if row < count:
                        shifts[row] = kept[text, head, first + row]
                        deltas[row] = _delta(grad, out, place + row * step, head_dim)
                end = (_end(mask, text * mask_step, first, count, keys) + 31) // 32 * 32
                last = max(last, end)
                for i in range(0, end, 32):
                    multiply(zeros, rows, half, k_columns, i, room, half, scores, 0)
                    multiply(zeros, grads, half, v_columns, i, room, half, changes, 0)
                    for row in range(count):
                        _hide(scores, row, i, i + 32, mask, text * mask_step, first + row, keys)
                    pair = (first - start) // 2 * room + i
                    _eight_queries(scores, changes, scale, shifts, deltas, pair, shared, both, alone, room)
                for i in range(0, head_dim, 32):
                    multiply(zeros, alone_pairs, room // 2, k_pairs, i, head_dim, end // 2, result, i)
                _write(result, grad_q, place, step, count, head_dim)
            place = ((text * tokens + start) * heads + head) * head_dim
            _pairs(q, in_block, place, step, head_dim, q_pairs)
            _pairs(grad, in_block, place, step, head_dim, g_pairs)
            _add_keys(zeros, both, q_pairs, (in_block + 1) // 2, last, room, head_dim, total_k)
            _add_keys(zeros, shared, g_pairs, (in_block + 1) // 2, last, room, head_dim, total_v)
    _write(total_k, grad_k, first_key, kv_heads * head_dim, keys, head_dim)
    _write(total_v, grad_v, first_key, kv_heads * head_dim, keys, head_dim)


@parallel
def _backward(q, k, values, out, grad, kept, mask, scale, zeros, shape, grad_q, grad_k, grad_v):
    """All but kept (batch, heads, tokens) and mask: flat bf16 as uint16. Writes the three gradients."""
    for item in prange(shape[0] * shape[4]):
        _backward_of(np.int64(item), q, k, values, out, grad, kept, mask, scale, zeros, shape, grad_q, grad_k, grad_v)


def _shape(q: torch.Tensor, k: torch.Tensor) -> tuple[int, ...]:
    return q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]


def _flat(mask: torch.Tensor | None) -> np.ndarray:
    return np.empty(0, np.bool_) if mask is None else mask.contiguous().numpy().reshape(-1)


def forward(
    q: torch.Tensor, k: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result, in q's layout, and what backward needs of it, (batch, heads, tokens) float32.

    mask: (batch or 1, tokens, keys) bool, True where a query sees a key; None: each query sees the keys up to its own.
    """
    out = torch.empty_like(q)
    kept = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)  # log of the sum of powers
    pairs = view(q).view(np.int32), view(k).view(np.int32)
    run(_forward, *pairs, view(values), _flat(mask), np.float32(scale), EIGHT, _shape(q, k), view(out), kept.numpy())
    return out, kept


def backward(
    grad: torch.Tensor, parts: tuple[torch.Tensor, ...], mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v. parts: q, k, v, and the two that forward returned."""
    q, k, values, out, kept = parts
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(values)
    inputs = (view(part) for part in (q, k, values, out, grad))
    options = _flat(mask), np.float32(scale), EIGHT, _shape(q, k)
    run(_backward, *inputs, kept.numpy(), *options, *(view(gradient) for gradient in gradients))
    return gradients
