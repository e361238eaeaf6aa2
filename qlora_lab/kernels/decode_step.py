"""One token of each row of a batch through all decoder layers and the head, in one call from Python.

In: the embeddings x (rows, hidden) float32, tables of weights (decode_products.py), and the cache of keys and values.
Out: logits (rows, vocabulary) float32; the cache holds the new keys and values. Twin of infer/step.py, up to the order
of the sums: everything is float32, and weights are not rounded.

A token of SmolLM2-135M has 210 products of 3 to 50 us. From Python each costs 15 us around it, so a token took twice
the time of its products. Here threads are woken five times a layer, 1 us each on numba's OpenMP layer. A barrier in one
region for the whole token would save those, but waits for ever where a machine gives fewer threads than were asked for.
What stands between the products (norms, rotations, gates) is a few vectors, and one thread does it.
"""

from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload

from qlora_lab.kernels import decode_int8, sums as each, vector as v
from qlora_lab.kernels.compiled import parallel, run, serial
from qlora_lab.kernels.decode_products import ROUNDED, clear, multiply_group, side_by_side, sort_halves, totals16

QKV, OUT, GATE_UP, DOWN, END = 0, 3, 4, 6, 7  # where the products begin that share an input, in a layer's table
ROWS_AT_ONCE = 8  # rows of a batch: two rows of a weight with 8 sums each fill half of the vector registers
_ZEROS = {rows: (np.float32(0),) * rows for rows in (1, 4, ROWS_AT_ONCE)}  # compiled once each, over 10 s: so not for 2
TINY = np.float32(1e-38)  # quant.blocks.TINY
INT8_STEP = np.float32(1 / 127)  # between two levels of INT8, over a block's constant

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # their sum is ln 2; the first has 9 bits
ROUND = np.float32(1.5 * 2**23)  # added, it leaves a whole number in the low bits
# e^r for |r| <= ln(2) / 2 by Horner's rule: the terms 1/7! to 1, Taylor's, whose rest is below half a unit
FACTORS = tuple(np.float32(1 / f) for f in (5040, 720, 120, 24, 6, 2, 1, 1))


@njit(forceinline=True)
def exp16(x):
    """e^x for 16 float32, within 2 units in the last place; x below -87 counts as -87, above 88 as 88."""
    x = v.clamp(x, v.splat(np.float32(-87)), v.splat(np.float32(88)))
    shifted = v.fma(x, v.splat(LOG2_E), v.splat(ROUND))
    n = shifted + v.splat(-ROUND)  # x / ln 2, rounded
    r = v.fma(n, v.splat(-LN2_LOW), v.fma(n, v.splat(-LN2_HIGH), x))
    power = v.splat(FACTORS[0])
    for i in range(1, len(FACTORS)):
        power = v.fma(power, r, v.splat(FACTORS[i]))
    return power * v.as_floats((v.as_ints(shifted) << v.splat(23)) + v.splat(127 << 23))  # 2^n by its exponent


@njit
def norm(x, weight, eps, out):
    """out = x / root mean square of its row * weight."""
    for token in range(len(x)):
        row, result = x[token], out[token]
        squares = v.splat(np.float32(0))
        for i in range(0, len(row), 16):
            values = v.load(row, i)
            squares = v.fma(values, values, squares)
        scale = v.splat(np.float32(1) / np.sqrt(each.total(squares) / np.float32(len(row)) + eps))
        for i in range(0, len(row), 16):
            v.store(result, i, v.load(row, i) * scale * v.load(weight, i))


@njit
def _add(x, more):
    for token in range(len(x)):
        for i in range(x.shape[1]):
            x[token, i] += more[token, i]


@njit(forceinline=True)
def gate16(left, right):
    """silu(left) * right, where silu(g) = g / (1 + e^-g)."""
    return left / (v.splat(np.float32(1)) + exp16(left * v.splat(np.float32(-1)))) * right


@njit
def gate(gate_and_up, out):
    """silu(gate) * up of rows in which both lie side by side."""
    size = out.shape[1]
    for token in range(len(out)):
        both, result = gate_and_up[token], out[token]
        for i in range(0, size, 16):
            v.store(result, i, gate16(v.load(both, i), v.load(both, size + i)))


@njit
def _rotate(vector, cos, sin):
    """Turn the pairs (i, i + half) of a head's vector, each by its own angle."""
    half = len(vector) // 2
    for i in range(half):
        left, right = vector[i], vector[i + half]
        vector[i] = left * cos[i] - right * sin[i]
        vector[i + half] = right * cos[i + half] + left * sin[i + half]


def _keep(vector, kept, absmax, thresholds):
    """Put a head's vector into `kept`; codes need a constant, which goes into absmax (1,)."""


@overload(_keep)
def _keep_as(vector, kept, absmax, thresholds):
    if kept.dtype == types.float32:

        def keep(vector, kept, absmax, thresholds):
            for i in range(len(vector)):
                kept[i] = vector[i]

        return keep

    def keep_codes(vector, kept, absmax, thresholds):
        largest = np.float32(0)
        for number in vector:
            # a comparison with NaN is false, so max() alone would forget one
            largest = max(largest, abs(number)) if abs(number) < np.inf else np.float32(np.nan)  # also of a NaN
            if np.isnan(largest):
                break
        absmax[0] = largest
        # quant.blocks.scale_blocks, and nearest_codes by a guess that is at most one off
        inverse = np.float32(1) / max(largest, TINY)
        for i in range(len(vector)):
            scaled = min(max(vector[i] * inverse, np.float32(-1)), np.float32(1))
            code = np.int64(np.floor(scaled * np.float32(127) + np.float32(128.5))) if largest == largest else 128
            if code < 255 and scaled > thresholds[code]:
                code += 1
            elif code > 0 and scaled <= thresholds[code - 1]:
                code -= 1
            kept[i] = code

    return keep_codes


def _kept16(kept, index):
    """16 numbers of the cache from `index`; codes as whole numbers from -128 to 127."""


@overload(_kept16)
def _kept16_as(kept, index):
    if kept.dtype == types.float32:
        return lambda kept, index: v.load(kept, index)
    return lambda kept, index: v.to_floats(v.load(kept, index)) + v.splat(np.float32(-128))


def _unit(kept, absmax, position):
    """What a 1 of _kept16 stands for at this position."""


@overload(_unit)
def _unit_as(kept, absmax, position):
    if kept.dtype == types.float32:
        return lambda kept, absmax, position: np.float32(1)
    return lambda kept, absmax, position: absmax[position] * INT8_STEP


@njit
def _place(qkv, heads, cos, sin, rows, positions, cache, thresholds):
    """Turn queries where they are, and put keys, turned, and values into the cache."""
    keys, values, key_absmax, value_absmax = cache
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    for token in range(len(qkv)):
        position, row = positions[token], rows[token]
        angles = cos[position], sin[position]
        for head in range(heads + kv_heads):
            _rotate(qkv[token, head * head_dim : (head + 1) * head_dim], *angles)
        for head in range(kv_heads):
            start = (heads + head) * head_dim
            key = qkv[token, start : start + head_dim]
            value = qkv[token, start + kv_heads * head_dim : start + (kv_heads + 1) * head_dim]
            there = slice(position, position + 1)
            _keep(key, keys[row, head, position], key_absmax[row, head, there], thresholds)
            _keep(value, values[row, head, position], value_absmax[row, head, there], thresholds)


@njit
def _attend_head(query, keys, values, key_absmax, value_absmax, length, scores, lanes, out):
    """softmax(query keys^T / sqrt(head_dim)) values for one head. keys and values: flat, (length, head_dim)."""
    head_dim = len(query)
    infinity = v.splat(np.float32(np.inf))
    scale = v.splat(np.float32(1) / np.sqrt(np.float32(head_dim)))
    tops = v.splat(np.float32(-np.inf))
    for first in range(0, length, 16):
        for i in range(min(16, length - first)):
            sums = v.splat(np.float32(0))
            for d in range(0, head_dim, 16):
                sums = v.fma(v.load(query, d), _kept16(keys, (first + i) * head_dim + d), sums)
            v.store(lanes, 16 * i, sums * v.splat(_unit(keys, key_absmax, first + i)))
        v.store(scores, first, totals16(lanes) * scale)
        for i in range(length - first, 16):
            scores[first + i] = np.float32(-np.inf)  # behind the last position
        tops = v.clamp(v.load(scores, first), tops, infinity)  # the larger of the two
    v.store(lanes, 0, tops)
    top = lanes[0]
    for i in range(1, 16):
        top = max(top, lanes[i])
    totals = v.splat(np.float32(0))
    for first in range(0, length, 16):
        # Behind the last position stand 1e-38, which no sum of 1 or more feels.
        powers = exp16(v.load(scores, first) + v.splat(-top))
        totals = totals + powers
        v.store(scores, first, powers)
    # here and not for each of its numbers: a value's constant belongs to all of them
    for position in range(length):
        scores[position] *= _unit(values, value_absmax, position)
    share = v.splat(np.float32(1) / each.total(totals))
    for d in range(0, head_dim, 32):  # two sums: one alone would wait for itself
        left = right = v.splat(np.float32(0))
        for position in range(length):
            weight, start = v.splat(scores[position]), position * head_dim + d
            left = v.fma(weight, _kept16(values, start), left)
            right = v.fma(weight, _kept16(values, start + 16), right)
        v.store(out, d, left * share)
        v.store(out, d + 16, right * share)


@parallel
def _attend(qkv, heads, rows, positions, cache, parts, out):
    """All heads of all rows. cache: of a layer, keys and values (rows of the cache, key heads, capacity, head_dim)."""
    keys, values, key_absmax, value_absmax = cache
    kv_heads, capacity, head_dim = keys.shape[1], keys.shape[2], keys.shape[3]
    items = len(qkv) * heads
    for part in prange(parts):
        scores = np.empty((capacity + 15) // 16 * 16, np.float32)
        lanes = np.empty(256, np.float32)
        clear(lanes)
        for item in range(part * items // parts, (part + 1) * items // parts):
            token, head = item // heads, item % heads
            its = head * kv_heads // heads  # key heads are shared by neighbours
            span = slice(head * head_dim, (head + 1) * head_dim)
            its_keys, its_values = keys[rows[token], its].reshape(-1), values[rows[token], its].reshape(-1)
            absmax = key_absmax[rows[token], its], value_absmax[rows[token], its]
            length = positions[token] + 1
            _attend_head(qkv[token, span], its_keys, its_values, *absmax, length, scores, lanes, out[token, span])


@njit
def _products(products, x, halves, beside, numbers, zeros, parts, out):
    """x through products that share it. The rest but `out` is memory for the forms in which they read x."""
    for i in range(len(products)):
        if products[i].form == ROUNDED:
            decode_int8.round_rows(x, numbers)
            break
    sort_halves(x, halves)
    multiply_group(products, side_by_side(x, beside), halves, numbers, zeros, parts, out)


@serial
def _step(x, weights, eps, heads, rotary, cache, thresholds, rows, positions, zeros, parts, logits):
    layers, norms, head = weights  # PRODUCT (layers, 7), (2 layers + 1, hidden), PRODUCT (1,)
    keys, values, key_absmax, value_absmax = cache  # (layers, rows of the cache, key heads, capacity, ...)
    cos, sin = rotary  # (capacity, head_dim)
    tokens, hidden = x.shape
    wide, middle = heads * keys.shape[4], layers[0, GATE_UP].rows
    normed = np.empty((tokens, hidden), np.float32)
    halves = np.empty((tokens, hidden), np.float32)
    qkv = np.empty((tokens, wide + 2 * keys.shape[2] * keys.shape[4]), np.float32)
    attended = np.empty((tokens, wide), np.float32)
    attended_halves = np.empty((tokens, wide), np.float32)
    gate_and_up = np.empty((tokens, 2 * middle), np.float32)
    gated = np.empty((tokens, middle), np.float32)
    gated_halves = np.empty((tokens, middle), np.float32)
    added = np.empty((tokens, hidden), np.float32)
    beside = np.empty(tokens * max(hidden, wide, middle), np.float32)
    chunks = (max(hidden, wide, middle) + decode_int8.CHUNK - 1) // decode_int8.CHUNK
    numbers = decode_int8.aligned(chunks * tokens * decode_int8.PER_CHUNK)
    for i in range(len(layers)):
        products = layers[i]  # sliced, because numba compiles anew for each pair of constants
        norm(x, norms[2 * i], eps, normed)
        _products(products[QKV:OUT], normed, halves, beside, numbers, zeros, parts, qkv)
        layer = keys[i], values[i], key_absmax[i], value_absmax[i]
        _place(qkv, heads, cos, sin, rows, positions, layer, thresholds)
        _attend(qkv, heads, rows, positions, layer, parts, attended)
        _products(products[OUT:GATE_UP], attended, attended_halves, beside, numbers, zeros, parts, added)
        _add(x, added)
        norm(x, norms[2 * i + 1], eps, normed)
        _products(products[GATE_UP:DOWN], normed, halves, beside, numbers, zeros, parts, gate_and_up)
        gate(gate_and_up, gated)
        _products(products[DOWN:END], gated, gated_halves, beside, numbers, zeros, parts, added)
        _add(x, added)
    norm(x, norms[2 * len(layers)], eps, normed)
    _products(head, normed, halves, beside, numbers, zeros, parts, logits)


class Weights(NamedTuple):
    """What _step reads of a model."""

    layers: np.ndarray  # (layers, 7) of PRODUCT
    norms: np.ndarray  # (2 layers + 1, hidden) float32
    head: np.ndarray  # (1,) of PRODUCT, or (0,): no logits are asked for


def can_step(hidden: int, head_dim: int, middle: int) -> bool:
    """Whether vectors of these sizes are whole registers, as the kernel reads them."""
    return hidden % 32 == head_dim % 32 == middle % 32 == 0


def step(
    x: torch.Tensor,
    weights: Weights,
    eps: float,
    heads: int,
    rotary: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, ...],
    rows: torch.Tensor,
    positions: torch.Tensor,
    thresholds: torch.Tensor,
    threads: int,
) -> torch.Tensor:
    """Return logits (rows, vocabulary) float32. x: (rows, hidden) float32, which is overwritten.

    rotary: cosines and sines, (capacity, head_dim). cache: keys and values, (layers, rows of the cache, key heads,
    capacity, head_dim), float32 or codes of INT8, and their constants (layers, rows of the cache, key heads, capacity),
    of float32 none; thresholds: (255,) float32, between those codes. All are contiguous. rows, positions: (rows,)
    int64, where each row's new token belongs.
    """
    logits = torch.empty(len(x), int(weights.head["rows"].sum()), dtype=torch.float32, device="cpu")
    tables = tuple(t.numpy() for t in rotary), tuple(t.numpy() for t in cache)
    for first in range(0, len(x), ROWS_AT_ONCE):
        some = slice(first, min(first + ROWS_AT_ONCE, len(x)))
        part = x[some]
        n = len(part)
        size = next(rows for rows in _ZEROS if rows >= n)
        where = rows[some], positions[some]
        if size > n:  # the last row once more: the same keys are written twice
            part, *where = (torch.cat([t, t[-1:].expand(size - n, *t.shape[1:])]) for t in (part, *where))
        out = logits[some] if size == n else logits.new_empty(size, logits.shape[1])
        arrays = (t.numpy() for t in where)
        shape = np.float32(eps), heads
        given = *shape, *tables, thresholds.numpy(), *arrays
        run(_step, part.numpy(), tuple(weights), *given, _ZEROS[size], threads, out.numpy(), threads=threads)
        if size > n:
            logits[some] = out[:n]
    return logits
